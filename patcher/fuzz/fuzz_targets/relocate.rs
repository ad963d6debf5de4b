//! Relocated instructions. `cargo fuzz run -s none relocate`, in `patcher/`.
#![no_main]
#![allow(dead_code)]

use patcher::addr::Gva;

#[path = "../../tests/properties/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: ([u8; 15], u32, u32)| {
    const KERNEL: u64 = 0xffff_ffff_8000_0000;
    let (code, from, to) = input;
    checks::relocation(&code, Gva(KERNEL + u64::from(from >> 2)), Gva(KERNEL + u64::from(to >> 2)));
});
