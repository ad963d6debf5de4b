//! The guard of one VM: the [`Protector`] under a lock, and what is told of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::resolve::ResolvedPlan;

use crate::guest::events::{Events, Who};
use crate::guest::introspect::Introspection;
use crate::guest::kernel::GuestKernel;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::host::lock::{Condvar, Mutex, MutexGuard};
use crate::memory::{self, GuestRam};
use crate::text_guard::pages::{Reasons, whole_pages};
use crate::text_guard::protector::Protector;
use crate::text_guard::watch_list::GuestWrites;
use crate::text_guard::watched::Watched;

/// The guard of one VM.
pub struct Guard {
    pub(super) ram: Arc<GuestRam>,
    events: Arc<Events>,
    introspection: RwLock<Option<Arc<Introspection>>>,
    /// Why the kernel that was guarded last is guarded no more.
    pub(super) replaced: parking_lot::Mutex<Option<String>>,
    protector: Mutex<Protector<Arc<GuestRam>>>,
    /// A program ended.
    pub(super) ended: Condvar,
    /// How many vCPUs wait for a program to end.
    pub(super) waiting: AtomicUsize,
    pub(super) stopped_writes: AtomicU64,
    started: Instant,
}

impl Guard {
    /// A guard that guards nothing yet.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, events: Arc<Events>) -> Self {
        Self {
            protector: Mutex::new(Protector::new(ram.clone())),
            ram,
            events,
            introspection: RwLock::default(),
            replaced: parking_lot::Mutex::default(),
            ended: Condvar::new(),
            waiting: AtomicUsize::new(0),
            stopped_writes: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    /// Makes the guest's kernel known, the first one or one that has replaced it.
    pub fn set_kernel(&self, kernel: &GuestKernel) {
        *self.introspection.write() = Some(Arc::new(Introspection::new(kernel)));
        *self.replaced.lock() = None;
        self.set_sentinel(kernel.sentinel());
    }

    /// What is known of the guest's kernel. `None` before [`Guard::set_kernel`], and once it was replaced.
    #[must_use]
    pub fn introspection(&self) -> Option<Arc<Introspection>> {
        self.introspection.read().clone()
    }

    pub(super) fn forget_kernel(&self) {
        *self.introspection.write() = None;
    }

    /// The VM's event log.
    #[must_use]
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// How many pages are guarded as text or for patches.
    #[must_use]
    pub fn guarded_pages(&self) -> u64 {
        self.lock().state.pages.count(Reasons::TEXT | Reasons::SITE)
    }

    /// How many pages of text are protected ahead of programs.
    #[must_use]
    pub fn preprotected_pages(&self) -> u64 {
        self.lock().state.pages.count(Reasons::PREPROTECTED)
    }

    /// How many writes to guarded pages stopped a vCPU.
    #[must_use]
    pub fn stopped_writes(&self) -> u64 {
        self.stopped_writes.load(SeqCst)
    }

    /// Describes a vCPU by the guest's symbol and task, as far as they are known.
    #[must_use]
    pub fn describe_vcpu(&self, vcpu: VcpuId, registers: &VcpuRegisters) -> Who {
        let unknown = || Who::at(vcpu, registers.rip());
        self.introspection().map_or_else(unknown, |introspection| introspection.describe(vcpu, registers))
    }

    /// Guards these pages as text until the VM ends.
    ///
    /// # Errors
    /// The host's; nothing more is guarded than before then.
    pub fn guard_text(&self, text: &Range<Gpa>) -> Result<(), memory::Error> {
        self.lock().add(Reasons::TEXT, &whole_pages(text))
    }

    /// Whether it is known which text is to be protected ahead of programs.
    #[must_use]
    pub fn is_text_known(&self) -> bool {
        self.lock().state.is_text_known()
    }

    /// Says which text is to be protected ahead of programs. Nothing is protected by this.
    pub fn set_text(&self, text: &Range<Gpa>) {
        self.lock().state.set_text(&(text.start.0..text.end.0));
    }

    /// Protects the text that the guest has not written to for [`super::REST`], ahead of programs.
    ///
    /// # Errors
    /// The host's; a part that can't be protected stays as it was, and so do those behind it.
    pub fn preprotect_text(&self) -> Result<(), memory::Error> {
        self.lock().preprotect(self.now())
    }

    /// Watches the sites of a patch that was applied, and guards their pages, if its plan says what
    /// to do about guest writes.
    ///
    /// # Errors
    /// The first page that can't be guarded; all others are guarded, and every site is watched.
    pub fn watch(&self, plan: &ResolvedPlan, kernel: &GuestKernel) -> Result<(), memory::Error> {
        let name: Arc<str> = plan.name.as_str().into();
        let mut protector = self.lock();
        let mut result = Ok(());
        for site in &plan.sites {
            if let Ok(watched) = Watched::new(name.clone(), site, plan.on_guest_write, kernel) {
                result = result.and(protector.watch(watched));
            }
        }
        result
    }

    /// Has [`Guard::take_guest_writes`] return a patch once more.
    pub fn recheck(&self, name: &str) {
        self.lock().state.watch_list.recheck(name);
    }

    /// Forgets the sites of a patch.
    pub fn forget(&self, name: &str) {
        self.forget_some(name, |_| true);
    }

    /// Forgets some sites of a patch.
    pub fn forget_some(&self, name: &str, which: impl Fn(Gva) -> bool) {
        let forgotten = self.lock().forget(name, which);
        Self::report(forgotten);
    }

    /// What the guest wrote to since this was last called. The next write that concerns a patch
    /// notifies the controller again.
    pub fn take_guest_writes(&self) -> GuestWrites {
        self.lock().state.watch_list.take_writes()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Protector<Arc<GuestRam>>> {
        self.protector.lock()
    }

    /// The time since the guard's start.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Logs that the host refused to make pages writable. Guest writes to them are
    /// still done, one by one.
    pub(super) fn report(result: Result<(), memory::Error>) {
        if let Err(error) = result {
            tracing::error!("{error}");
        }
    }
}
