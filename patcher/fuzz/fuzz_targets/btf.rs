//! BTF: any bytes in its place in a kernel. `cargo soak fuzz --target btf`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/properties/checks.rs"]
mod checks;
#[path = "../../tests/properties/miniature.rs"]
mod miniature;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    checks::image(&miniature::overwritten(miniature::btf_in_file(), input));
});
