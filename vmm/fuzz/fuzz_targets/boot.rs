//! Kernel files as a boot loader reads them: any file. `cargo soak fuzz --target boot`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/fuzzed/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::boot(input));
