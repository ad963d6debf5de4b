//! The modules that the guest's kernel has loaded.

use patcher::linux::module_list::read_modules;

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;

impl GuestKernel {
    /// The same kernel with the modules that are loaded now.
    #[must_use]
    pub fn with_modules(&self) -> Self {
        let kernel = self.kernel();
        self.with(read_modules(kernel.image, kernel.slide, &CachedTranslations::of(self)))
    }
}
