//! The kernel image of the guest, read once, by whoever needs it first.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use patcher::image::KernelImage;

/// The kernel image, read from its file when first needed, by whoever needs it first.
pub struct Image {
    /// Empty, once it was read: it is as large as all that is known of it.
    file: Mutex<Vec<u8>>,
    parsed: OnceLock<Result<Arc<KernelImage>, String>>,
}

impl Image {
    /// Takes the content of a kernel file.
    #[must_use]
    pub fn new(file: Vec<u8>) -> Self {
        Self { file: Mutex::new(file), parsed: OnceLock::new() }
    }

    /// Whether somebody has read it.
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
            let file = std::mem::take(&mut *self.file.lock().unwrap_or_else(PoisonError::into_inner));
            KernelImage::parse(&file).map(Arc::new).map_err(|e| e.to_string())
        };
        self.parsed.get_or_init(parse).clone()
    }
}
