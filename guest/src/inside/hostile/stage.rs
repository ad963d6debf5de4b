//! What an attack has: text of the kernel that nothing executes, mapped into this process; and a
//! tally.
//!
//! Unsafe code: maps pages and reads and writes the one that is mapped. Invariant: addresses that
//! are used lie in a mapping of [`Stage`], which is never unmapped but by an attack that catches
//! the faults that follow.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::process;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::signals;

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
/// Bytes of a slot. Each attack has one of its own, full of [`NOP`].
pub(super) const SLOT: usize = 64;
/// What lies in a slot at rest.
pub(super) const NOP: u8 = 0x90;

/// Which part of the text an attack may write to. Those from 4 on are the module's
/// (`guest/hostile/hostile.h`).
#[derive(Debug, Clone, Copy)]
pub(super) enum Slot {
    /// [`super::stores`] and [`super::traps`].
    Stores = 0,
    /// [`super::stack`].
    Stack = 1,
    /// [`super::races`].
    Races = 2,
    /// Nobody.
    Nobody = 3,
}

pub(super) struct Stage {
    /// Where the text is in the kernel.
    pub(super) target: u64,
    /// Where its page is mapped for writing.
    page: usize,
    device: File,
    stop: AtomicBool,
    done: AtomicU64,
    wrong: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Stage {
    pub(super) fn new(target: u64) -> io::Result<Self> {
        signals::catch()?;
        // Init, which obeys the test, must get through.
        process::nice(19)?;
        let device = OpenOptions::new().read(true).write(true).open("/dev/hostile")?;
        let mut stage = Self {
            target,
            page: 0,
            device,
            stop: AtomicBool::new(false),
            done: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            first: Mutex::new(None),
        };
        // Below 4 GiB, so that 32 bits of an address will do.
        stage.page = stage.map(0, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_32BIT)?;
        Ok(stage)
    }

    /// Maps the page once more. Returns where.
    pub(super) fn map(&self, at: usize, protection: i32, flags: i32) -> io::Result<usize> {
        let flags = flags | libc::MAP_SHARED;
        // SAFETY: with MAP_FIXED, `at` is a mapping that the caller made for this.
        let address = unsafe {
            libc::mmap(at as *mut libc::c_void, PAGE, protection, flags, self.device.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address as usize) }
    }

    pub(super) fn slot(&self, slot: Slot) -> usize {
        self.page + self.offset(slot)
    }

    /// Where in the page a slot is.
    pub(super) fn offset(&self, slot: Slot) -> usize {
        usize::try_from(self.target).unwrap_or(0) % PAGE + slot as usize * SLOT
    }

    /// Where in the kernel a slot is.
    pub(super) fn in_kernel(&self, slot: Slot) -> u64 {
        self.target + (slot as usize * SLOT) as u64
    }

    /// A byte of the page.
    pub(super) fn read(&self, offset: usize) -> u8 {
        // SAFETY: the page is mapped, and others change it at any time.
        unsafe { std::ptr::read_volatile((self.page + offset % PAGE) as *const u8) }
    }

    /// Puts a byte there, by a plain move.
    pub(super) fn put(&self, offset: usize, byte: u8) {
        // SAFETY: as in `read`; what is written is this process's to write.
        unsafe { std::ptr::write_volatile((self.page + offset % PAGE) as *mut u8, byte) };
    }

    /// Whether the first bytes of a slot are `value` and the others at rest.
    pub(super) fn is(&self, slot: Slot, value: u8, length: usize) -> bool {
        let start = self.offset(slot);
        (0..SLOT).all(|at| self.read(start + at) == if at < length { value } else { NOP })
    }

    pub(super) fn clear(&self, slot: Slot) {
        let start = self.offset(slot);
        (0..SLOT).filter(|at| self.read(start + at) != NOP).for_each(|at| self.put(start + at, NOP));
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// It was done once more.
    pub(super) fn done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts what is not as it must be; the first is told.
    pub(super) fn expect(&self, is_right: bool, what: impl FnOnce() -> String) {
        if !is_right {
            self.wrong.fetch_add(1, Ordering::Relaxed);
            self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(what);
        }
    }

    pub(super) fn line(&self) -> String {
        let [done, wrong] = [&self.done, &self.wrong].map(|count| count.load(Ordering::Relaxed));
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
        format!("done={done} wrong={wrong} {first}")
    }

    /// Runs `act` on every CPU again and again, as long as the attack goes on, and `beside` here.
    pub(super) fn on_every_cpu(
        self: &Arc<Self>,
        act: impl Fn(&Self) + Clone + Send + 'static,
        beside: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut threads = Vec::new();
        for cpu in 0..thread::available_parallelism()?.get() {
            let (stage, act) = (self.clone(), act.clone());
            threads.push(thread::spawn(move || -> io::Result<()> {
                let mut set = CpuSet::new();
                set.set(cpu);
                sched_setaffinity(None, &set)?;
                while stage.goes_on() {
                    act(&stage);
                }
                Ok(())
            }));
        }
        let result = beside();
        for thread in threads {
            thread.join().map_err(|_| io::Error::other("a thread panicked"))??;
        }
        result
    }
}
