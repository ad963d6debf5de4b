//! Objects of the kernel's source: any bytes as a file. `cargo soak fuzz --target object`.
#![no_main]
#![allow(dead_code)]

use std::sync::LazyLock;

use patcher::image::KernelImage;

#[path = "../../tests/properties/checks.rs"]
mod checks;
#[path = "../../tests/properties/miniature.rs"]
mod miniature;

/// The kernel that objects are matched with.
static MINIATURE: LazyLock<(Vec<u8>, KernelImage)> = LazyLock::new(|| {
    let file = miniature::vmlinux();
    let image = KernelImage::parse(&file).expect("a kernel");
    (file, image)
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::object(input, &MINIATURE.0, &MINIATURE.1));
