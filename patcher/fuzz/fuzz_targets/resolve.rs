//! Resolving in random text. `cargo fuzz run -s none resolve`, in `patcher/`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/properties/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: (u8, u8, [u8; 8], Vec<u8>)| {
    let (offset, lengths, replace, text) = input;
    let length = usize::from(lengths & 7) + 1;
    let shorter = usize::from(lengths >> 4 & 7) + 1;
    checks::resolve_in(&text, usize::from(offset), length, &replace[..shorter]);
});
