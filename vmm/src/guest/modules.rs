//! The modules that the guest's kernel has loaded.

use std::collections::BTreeSet;

use patcher::addr::Gva;
use patcher::linux::module_list::read_complete_modules;

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;

impl GuestKernel {
    /// The same kernel with the modules that are loaded now, and those that are known to be `complete`.
    #[must_use]
    pub fn with_modules(&self, complete: &BTreeSet<Gva>) -> Self {
        let kernel = self.kernel();
        self.with(read_complete_modules(kernel.image, kernel.slide, &CachedTranslations::of(self), complete))
    }
}
