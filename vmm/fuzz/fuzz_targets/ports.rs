//! The port bus with its UART: any accesses. `cargo soak fuzz --target ports`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/fuzzed/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::ports(input));
