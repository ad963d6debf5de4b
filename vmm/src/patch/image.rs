//! The kernel image of the guest: read from its file when first needed, and once.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use patcher::image::KernelImage;

/// A kernel image that is read when first needed.
pub struct Image {
    /// The file's content; empty once it was read, as it is as large as all that follows from it.
    file: Mutex<Vec<u8>>,
    parsed: OnceLock<Result<Arc<KernelImage>, String>>,
}

impl Image {
    /// Takes the content of a kernel file.
    #[must_use]
    pub fn new(file: Vec<u8>) -> Self {
        Self { file: Mutex::new(file), parsed: OnceLock::new() }
    }

    /// Whether it was read.
    #[must_use]
    pub fn is_parsed(&self) -> bool {
        self.parsed.get().is_some()
    }

    /// What is known of the kernel.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn parsed(&self) -> Result<Arc<KernelImage>, String> {
        let parse = || {
            let file = std::mem::take(&mut *self.file.lock());
            KernelImage::parse(&file).map(Arc::new).map_err(|e| e.to_string())
        };
        self.parsed.get_or_init(parse).clone()
    }
}
