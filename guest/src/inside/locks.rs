//! A workload that contends for two of the kernel's spinlocks and would notice if two CPUs
//! ever held one of them at once.
//!
//! One thread per CPU adds 1 to the same eventfd. The kernel adds under a spinlock, with
//! interrupts disabled and without atomic instructions (Linux fs/eventfd.c, `eventfd_write`),
//! so each time two hold the lock a sum may be lost; and every adder counts what it added.
//! And each makes another descriptor of it, whose number is found under a spinlock with
//! interrupts enabled (fs/file.c, `alloc_fd`), and closes it again: two that hold the lock may
//! find the same.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process;
use rustix::thread::{CpuSet, sched_setaffinity};

/// The threads, running.
pub struct Locks {
    sum: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    added: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    clashes: Arc<AtomicU64>,
}

/// Which descriptors a thread made and has not closed yet.
type Taken = [AtomicBool; 1024];

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What the threads added.
    pub added: u64,
    /// What the kernel has for it.
    pub sum: u64,
    /// How often a thread made a descriptor that another still had.
    pub clashes: u64,
}

impl Locks {
    /// Starts a thread on each of `cpus` CPUs.
    ///
    /// # Errors
    /// What the system said.
    pub fn start(cpus: usize) -> io::Result<Self> {
        let sum = Arc::new(eventfd(0, EventfdFlags::empty())?);
        let stop = Arc::new(AtomicBool::new(false));
        let added: Vec<Arc<AtomicU64>> = (0..cpus).map(|_| Arc::default()).collect();
        let clashes = Arc::new(AtomicU64::new(0));
        let taken: Arc<Taken> = Arc::new(std::array::from_fn(|_| AtomicBool::new(false)));
        let adder = |(cpu, added): (usize, &Arc<AtomicU64>)| {
            let (sum, stop, added) = (sum.clone(), stop.clone(), added.clone());
            let (clashes, taken) = (clashes.clone(), taken.clone());
            thread::Builder::new().name(format!("locks{cpu}")).spawn(move || {
                let mut set = CpuSet::new();
                set.set(cpu);
                sched_setaffinity(None, &set)?;
                // The thread that answers commands must get through.
                process::nice(19)?;
                while !stop.load(Ordering::Relaxed) {
                    rustix::io::write(&*sum, &1_u64.to_ne_bytes())?;
                    added.fetch_add(1, Ordering::Relaxed);
                    let other = rustix::io::dup(&*sum)?;
                    let number = usize::try_from(other.as_raw_fd()).map_err(io::Error::other)?;
                    let place = taken.get(number).ok_or_else(|| io::Error::other("too many descriptors"))?;
                    if place.swap(true, Ordering::SeqCst) {
                        clashes.fetch_add(1, Ordering::Relaxed);
                    }
                    place.store(false, Ordering::SeqCst);
                    drop(other);
                }
                Ok(())
            })
        };
        let threads = added.iter().enumerate().map(adder).collect::<io::Result<_>>()?;
        Ok(Self { sum, stop, added, threads, clashes })
    }

    /// What was added so far.
    pub fn added(&self) -> u64 {
        self.added.iter().map(|added| added.load(Ordering::Relaxed)).sum()
    }

    /// Ends the threads.
    ///
    /// # Errors
    /// What the system said to one of them.
    pub fn end(self) -> io::Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        let added = self.added.clone();
        for thread in self.threads {
            thread.join().map_err(|_| io::Error::other("a thread panicked"))??;
        }
        let mut sum = [0; 8];
        rustix::io::read(&*self.sum, &mut sum)?;
        let added = added.iter().map(|added| added.load(Ordering::Relaxed)).sum();
        let clashes = self.clashes.load(Ordering::Relaxed);
        Ok(Outcome { added, sum: u64::from_ne_bytes(sum), clashes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_the_sum() {
        let locks = Locks::start(1).expect("started");
        while locks.added() < 1000 {
            thread::yield_now();
        }
        let outcome = locks.end().expect("ended");
        assert_eq!((outcome.added, outcome.clashes), (outcome.sum, 0));
        assert!(outcome.sum >= 1000);
    }
}
