//! The end of the guest's kernel, as far as it is seen here: another kernel writes to guarded memory, or
//! the controller found out otherwise. Nothing of the old kernel is guarded from then on
//! (`docs/replaced.md`).
//!
//! A kernel that takes another's place in memory writes to that one's banner. So that page is protected
//! too, if nothing else is.

use patcher::addr::Gpa;

use crate::guest::kernel::GuestKernel;
use crate::memory::paging::PageTables;
use crate::text_guard::guard::Guard;
use crate::text_guard::pages::{Reasons, one};
use crate::text_guard::pieces::page_of;

impl Guard {
    /// Protects the page of a kernel that only another kernel writes to.
    pub(super) fn set_sentinel(&self, page: Option<Gpa>) {
        // Where the host refuses, the other signs have to do.
        let _ = page.map(|at| self.lock().add(Reasons::SENTINEL, &one(page_of(at))));
    }

    /// Whether a vCPU that uses these page tables, or none, runs another kernel than the one that is
    /// guarded.
    #[must_use]
    pub fn is_another_kernels(&self, tables: Option<PageTables>) -> bool {
        self.introspection().is_some_and(|introspection| {
            !tables.is_some_and(|tables| introspection.kernel().is_run_with(tables))
        })
    }

    /// Gives up everything: the guest's kernel was replaced, as `why` tells. `false` if a program is in
    /// flight; nothing is given up then.
    #[must_use]
    pub fn let_go(&self, why: &str) -> bool {
        let mut protector = self.lock();
        if protector.state.has_program() {
            return false;
        }
        let mut replaced = self.replaced.lock();
        replaced.get_or_insert_with(|| why.to_owned());
        self.forget_kernel();
        Self::report(protector.let_go());
        true
    }

    /// Whether the guest still has this kernel, the one that is guarded.
    ///
    /// # Errors
    /// What tells otherwise.
    pub fn check(&self, kernel: &GuestKernel) -> Result<(), String> {
        match &*self.replaced.lock() {
            Some(why) => Err(why.clone()),
            None => kernel.check(),
        }
    }
}
