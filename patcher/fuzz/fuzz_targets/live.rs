//! A guest whose memory holds anything. Seeds as for `image`, with a real module's tables
//! (`FUZZ_MODULE=/lib/modules/.../kvm.ko`), then `cargo +nightly fuzz run -s none live`.
#![no_main]
#![allow(dead_code)]

use std::sync::LazyLock;

use patcher::image::KernelImage;

#[path = "../../tests/properties/checks.rs"]
mod checks;
#[path = "../../tests/properties/miniature.rs"]
mod miniature;

static IMAGE: LazyLock<KernelImage> =
    LazyLock::new(|| KernelImage::parse(&miniature::vmlinux()).expect("a kernel"));

libfuzzer_sys::fuzz_target!(|memory: &[u8]| checks::live(&IMAGE, memory));
