//! Emulated stores: any instruction, any registers. `cargo soak fuzz --target store`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/properties/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::store(input));
