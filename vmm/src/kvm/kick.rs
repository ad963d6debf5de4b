//! Gets a vCPU thread out of `KVM_RUN`: the `immediate_exit` byte and a signal.
//!
//! Unsafe code: a second mapping of the vCPU's `kvm_run` page, and the calls on a thread that rustix
//! lacks (`tgkill`, `sched_getscheduler`, `sched_setscheduler`). Invariants: the mapping lives as long
//! as the [`Kick`]; only the byte `immediate_exit` is accessed, always as an atomic; the kernel reads
//! that byte with `READ_ONCE` and never writes it (KVM API 5, `immediate_exit`).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::register_signal_handler;

use crate::host::kick_signal::KICK;
use crate::host::signal_mask;
use crate::memory::PAGE_SIZE;

/// Installs the handler of the kick signal. It does nothing: being interrupted is the point.
///
/// # Errors
/// What `sigaction` returned.
pub fn install_handler() -> io::Result<()> {
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(KICK, interrupt).map_err(io::Error::from)
}

/// A handle on one vCPU's `immediate_exit` and its thread.
#[derive(Debug)]
pub struct Kick {
    page: NonNull<libc::c_void>,
    thread: AtomicI32,
}

// SAFETY: the page is accessed through one atomic byte only.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// Maps the vCPU's `kvm_run` page once more.
    ///
    /// # Errors
    /// What `mmap` returned.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new shared mapping of a vCPU descriptor's first page, at an address of
        // the kernel's choice; it aliases no Rust object.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { page, thread: AtomicI32::new(0) })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping is a page long and lives as long as `self`; a byte is always
        // aligned; see the module invariants for why an atomic view is right.
        unsafe {
            let byte = self.page.as_ptr().byte_add(std::mem::offset_of!(kvm_run, immediate_exit));
            AtomicU8::from_ptr(byte.cast())
        }
    }

    /// Makes the calling thread the vCPU's, which takes the kick signal and no other, whatever mask it has
    /// inherited. Call it before the first entry.
    ///
    /// # Errors
    /// When the mask can't be set. Without it kicks would be void, and so would holds.
    pub fn adopt_current_thread(&self) -> io::Result<()> {
        signal_mask::take_only(&[KICK])?;
        self.thread.store(rustix::thread::gettid().as_raw_pid(), Ordering::SeqCst);
        Ok(())
    }

    /// Makes the next entries return at once, until [`Kick::clear`].
    pub fn set(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Allows entries again. Only the vCPU's thread calls this, *before* it looks for
    /// requests: a kick that comes after the look must not be lost.
    pub fn clear(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Interrupts the thread. Does nothing before the thread exists or after it has ended.
    ///
    /// # Panics
    /// When the signal can't be sent. A hold that relied on it would not be one, so the process ends.
    pub fn signal(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_pid();
            // SAFETY: tgkill takes integers. The process's id can't be reused while it runs.
            let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, KICK) };
            if result != 0 {
                let error = io::Error::last_os_error();
                // A thread that has ended is as good as kicked.
                assert_eq!(error.raw_os_error(), Some(libc::ESRCH), "a vCPU can't be kicked: {error}");
            }
        }
    }

    /// Has the host run the thread before all that share the CPUs, until the result is dropped. A
    /// kicked vCPU leaves the guest when it runs next, which takes tens of milliseconds on a busy host.
    /// `None`, and nothing has changed, if the thread is real-time already, or if this process may not
    /// do it (sched(7): `CAP_SYS_NICE`, or `RLIMIT_RTPRIO`).
    #[must_use]
    pub fn hurry(self: &Arc<Self>) -> Option<Hurried> {
        let shared = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        let thread = self.thread.load(Ordering::SeqCst);
        // SAFETY: sched_getscheduler takes an integer. A thread that has ended gives ESRCH.
        let policy = unsafe { libc::sched_getscheduler(thread) };
        if thread == 0 || !shared.contains(&policy) || !set_policy(thread, libc::SCHED_FIFO, 1) {
            return None;
        }
        Some(Hurried { kick: self.clone(), policy })
    }

    /// Makes the vCPU's thread none. Its thread calls this when it ends: the id may be reused then.
    pub fn disown(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }
}

/// Sets how the host schedules a thread; its nice value stays. Returns whether it did.
fn set_policy(thread: i32, policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the structure lives for the call, which reads it. A thread that has ended gives ESRCH.
    unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) == 0 }
}

/// A vCPU's thread that the host runs before others, until this is dropped.
#[derive(Debug)]
pub struct Hurried {
    kick: Arc<Kick>,
    /// Its policy before.
    policy: libc::c_int,
}

impl Drop for Hurried {
    fn drop(&mut self) {
        let thread = self.kick.thread.load(Ordering::SeqCst);
        if thread != 0 {
            set_policy(thread, self.policy, 0);
        }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and nothing refers to it any more. It can
        // only fail for a bad range.
        unsafe {
            libc::munmap(self.page.as_ptr(), PAGE_SIZE);
        }
    }
}
