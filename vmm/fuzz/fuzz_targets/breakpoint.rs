//! Delivery of #BP: any registers, any tables, any memory. `cargo soak fuzz --target breakpoint`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmm::vcpu::fuzzed::deliver(input));
