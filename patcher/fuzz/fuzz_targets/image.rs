//! Kernel images: any file is read or refused. Seeds first, in `patcher/`, which are a made-up
//! kernel and a real one cut down, then the target:
//!
//! ```sh
//! FUZZ_CORPUS=$PWD/fuzz/corpus FUZZ_KERNEL=/boot/vmlinuz cargo test -p patcher --test properties seeds
//! cargo +nightly fuzz run -s none image
//! ```
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/properties/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|file: &[u8]| checks::image(file));
