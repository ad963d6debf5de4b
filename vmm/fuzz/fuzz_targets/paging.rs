//! Page walks: any page tables. `cargo soak fuzz --target paging`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/fuzzed/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::paging(input));
