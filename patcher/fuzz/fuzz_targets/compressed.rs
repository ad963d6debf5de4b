//! Compressed kernels: any bytes behind each method's magic number. `cargo soak fuzz --target compressed`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/properties/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::compressed(input));
