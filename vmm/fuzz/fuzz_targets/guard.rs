//! The state of the text guard against a model: any operations. `cargo soak fuzz --target guard`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmm::text_guard::properties::fuzzed(input));
