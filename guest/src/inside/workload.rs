//! The workload: one pinned thread per CPU hammers a system call and checks every result.
//!
//! Counts are kept per *epoch*. A worker looks for a new epoch before each call, so every
//! call counted in an epoch began after the epoch was opened. That is what makes "nobody
//! saw old code after `applied`" checkable without a clock.
//!
//! If asked to, workers look at the clock too: the longest time between two calls tells how long
//! a CPU stood still, for any reason.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process;
use rustix::thread::{CpuSet, sched_setaffinity};

/// A system call by name.
type Call = (&'static str, fn() -> i64);

/// What to choose from: cheap, without side effects, and with a known result. All but one are
/// system calls.
const CALLS: [Call; 10] = [
    ("getpid", || i64::from(process::getpid().as_raw_nonzero().get())),
    ("getppid", || process::getppid().map_or(0, |pid| i64::from(pid.as_raw_nonzero().get()))),
    ("getuid", || i64::from(process::getuid().as_raw())),
    ("geteuid", || i64::from(process::geteuid().as_raw())),
    ("getgid", || i64::from(process::getgid().as_raw())),
    ("getegid", || i64::from(process::getegid().as_raw())),
    ("probed", || probed(1)),
    // Goes through the scheduler.
    ("sched_yield", || {
        rustix::thread::sched_yield();
        0
    }),
    // Two functions of the kernel hand on what it sets.
    ("setpriority", || {
        let set =
            process::setpriority_process(None, PRIORITY).and_then(|()| process::getpriority_process(None));
        set.map_or(i64::MIN, i64::from)
    }),
    // Allocates memory, so it goes by `might_resched` and `cond_resched`.
    ("getcwd", || process::getcwd("").map_or(-1, |path| i64::try_from(path.as_bytes().len()).unwrap_or(-2))),
];

/// What `setpriority` sets.
const PRIORITY: i32 = 6;

/// A function to put breakpoints on: its first instruction is a multiplication by this.
#[inline(never)]
pub fn probed(number: i64) -> i64 {
    std::hint::black_box(number).wrapping_mul(0x1234_5678)
}

/// Where in this program's file [`probed`] begins.
///
/// # Errors
/// When the system does not tell.
pub fn probed_offset() -> io::Result<usize> {
    file_offset(probed as fn(i64) -> i64 as usize)
}

/// Where in its file what is at an address of this process comes from.
fn file_offset(at: usize) -> io::Result<usize> {
    let number = |text: &str| usize::from_str_radix(text, 16).map_err(io::Error::other);
    for line in fs::read_to_string("/proc/self/maps")?.lines() {
        let mut words = line.split_whitespace();
        let (range, offset) = (words.next().unwrap_or(""), words.nth(1).unwrap_or(""));
        let (start, end) = range.split_once('-').ok_or_else(|| io::Error::other("no range"))?;
        if (number(start)?..number(end)?).contains(&at) {
            return Ok(at - number(start)? + number(offset)?);
        }
    }
    Err(io::Error::other("it is not mapped"))
}

/// Makes a system call 1,000 times on one CPU. Returns what it saw.
///
/// # Errors
/// When there is no such call, or the CPU can't be had.
pub fn call_on(cpu: usize, call: &str, [first, second]: [i64; 2]) -> io::Result<Counts> {
    const TIMES: u32 = 1000;
    let known = CALLS.iter().find(|(name, _)| *name == call).map(|(_, call)| *call);
    let call = known.ok_or_else(|| io::Error::other("unknown system call"))?;
    let worker = thread::spawn(move || -> io::Result<Counts> {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set)?;
        let mut counts = Counts::default();
        for _ in 0..TIMES {
            let result = call();
            counts.first += u64::from(result == first);
            counts.second += u64::from(result == second);
            counts.other += u64::from(result != first && result != second);
        }
        Ok(counts)
    });
    worker.join().map_err(|_| io::Error::other("the worker panicked"))?
}

/// A worker that has not counted this many calls by [`COUNT_DEADLINE`] is reported as it is.
const ENOUGH_CALLS: u64 = 200;
const COUNT_DEADLINE: Duration = Duration::from_secs(20);

/// What one CPU saw in one epoch.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Results equal to the first expected value.
    pub first: u64,
    /// Results equal to the second expected value.
    pub second: u64,
    /// Results that are neither, in all epochs. Any is a failure.
    pub other: u64,
}

#[derive(Default)]
struct Worker {
    epoch: AtomicU64,
    first: AtomicU64,
    second: AtomicU64,
    other: AtomicU64,
    longest_gap_ns: AtomicU64,
}

/// What all workers look at.
struct Orders {
    epoch: AtomicU64,
    /// Whether to look at the clock.
    timed: AtomicBool,
}

/// Workers on every CPU, running until the guest ends.
pub struct Hammer {
    orders: Arc<Orders>,
    workers: Vec<Arc<Worker>>,
}

impl Hammer {
    /// Starts hammering `call` on `cpus` CPUs; results must be one of `expected`.
    ///
    /// # Errors
    /// Names the calls there are when `call` is none of them, or says that a thread failed.
    pub fn start(call: &str, expected: [i64; 2], cpus: usize) -> Result<Self, String> {
        let call = CALLS.iter().find(|(name, _)| *name == call).map(|(_, call)| *call);
        let call = call.ok_or_else(|| {
            let names: Vec<_> = CALLS.iter().map(|(name, _)| *name).collect();
            format!("the system call must be one of {}", names.join(", "))
        })?;
        let orders = Arc::new(Orders { epoch: AtomicU64::new(1), timed: AtomicBool::new(false) });
        let failed: Arc<OnceLock<String>> = Arc::default();
        let mut workers = Vec::new();
        for cpu in 0..cpus {
            let worker = Arc::new(Worker::default());
            workers.push(worker.clone());
            let (orders, failed) = (orders.clone(), failed.clone());
            thread::Builder::new()
                .name(format!("hammer{cpu}"))
                .spawn(move || {
                    let mut set = CpuSet::new();
                    set.set(cpu);
                    // The lowest priority: the thread that answers commands must get through.
                    let ready = sched_setaffinity(None, &set).and_then(|()| process::nice(19));
                    match ready {
                        Ok(_) => worker.work(call, expected, &orders),
                        Err(errno) => _ = failed.set(format!("CPU {cpu}: {errno}")),
                    }
                })
                .map_err(|error| error.to_string())?;
        }
        let hammer = Self { orders, workers };
        hammer.count();
        failed.get().map_or(Ok(hammer), |text| Err(text.clone()))
    }

    /// How many calls were made in the epoch that is open.
    #[must_use]
    pub fn calls(&self) -> u64 {
        let epoch = self.orders.epoch.load(Ordering::SeqCst);
        self.workers.iter().map(|worker| worker.calls_in(epoch)).sum()
    }

    /// The longest time between two calls of each CPU since this was last asked; from the first
    /// time on it is looked at.
    pub fn longest_gaps(&self) -> Vec<Duration> {
        self.orders.timed.store(true, Ordering::SeqCst);
        let take = |worker: &Arc<Worker>| worker.longest_gap_ns.swap(0, Ordering::SeqCst);
        self.workers.iter().map(|worker| Duration::from_nanos(take(worker))).collect()
    }

    /// Opens an epoch, lets every worker make some calls in it, and returns what each saw.
    pub fn count(&self) -> Vec<Counts> {
        let epoch = self.orders.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        let until = Instant::now() + COUNT_DEADLINE;
        while !self.workers.iter().all(|worker| worker.calls_in(epoch) >= ENOUGH_CALLS)
            && Instant::now() < until
        {
            thread::sleep(Duration::from_millis(1));
        }
        self.workers.iter().map(|worker| worker.counts_in(epoch)).collect()
    }
}

impl Worker {
    fn work(&self, call: fn() -> i64, [first, second]: [i64; 2], orders: &Orders) {
        let (mut mine, mut last) = (0, None);
        loop {
            if orders.timed.load(Ordering::Relaxed) {
                self.note_gap(&mut last);
            }
            let now = orders.epoch.load(Ordering::SeqCst);
            if now != mine {
                mine = now;
                // What is neither counts for ever: of a mixture of old and new, the call began before the epoch.
                for counter in [&self.first, &self.second] {
                    counter.store(0, Ordering::Relaxed);
                }
                self.epoch.store(now, Ordering::SeqCst);
            }
            let result = call();
            let counter = if result == first {
                &self.first
            } else if result == second {
                &self.second
            } else {
                &self.other
            };
            counter.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn note_gap(&self, last: &mut Option<Instant>) {
        let now = Instant::now();
        if let Some(last) = last.replace(now) {
            let gap = u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX);
            self.longest_gap_ns.fetch_max(gap, Ordering::Relaxed);
        }
    }

    fn calls_in(&self, epoch: u64) -> u64 {
        let counts = self.counts_in(epoch);
        counts.first + counts.second + counts.other
    }

    fn counts_in(&self, epoch: u64) -> Counts {
        if self.epoch.load(Ordering::SeqCst) != epoch {
            return Counts::default();
        }
        Counts {
            first: self.first.load(Ordering::SeqCst),
            second: self.second.load(Ordering::SeqCst),
            other: self.other.load(Ordering::SeqCst),
        }
    }
}
