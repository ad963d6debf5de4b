//! What the vCPUs went through: stalls, traps, breakpoints, fences.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

/// What happened since the last reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Longest time that the monitor kept a vCPU out of the guest, in nanoseconds.
    pub longest_stall_ns: u64,
    /// How often a vCPU hit a breakpoint of a step program.
    pub traps: u64,
    /// How many fences there were, those inside arm and hold included.
    pub fences: usize,
    /// The longest of them, in nanoseconds.
    pub longest_fence_ns: u64,
}

#[derive(Debug, Default)]
struct VcpuCounters {
    /// When the vCPU left the guest for the monitor's sake, or 0.
    out_since_ns: AtomicU64,
    longest_stall_ns: AtomicU64,
    traps: AtomicU64,
    delivered: AtomicU64,
}

/// The counters of one VM. vCPUs are named by their index.
#[derive(Debug)]
pub struct CounterSet {
    vcpus: Vec<VcpuCounters>,
    fences: AtomicUsize,
    longest_fence_ns: AtomicU64,
    /// Times are counted from here.
    epoch: Instant,
}

impl CounterSet {
    /// Counters of so many vCPUs, all 0.
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        Self {
            vcpus: (0..vcpus).map(|_| VcpuCounters::default()).collect(),
            fences: AtomicUsize::new(0),
            longest_fence_ns: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Counts a breakpoint of a step program.
    pub fn count_trap(&self, vcpu: usize) {
        self.vcpus[vcpu].traps.fetch_add(1, SeqCst);
    }

    /// Counts a breakpoint of the guest's own.
    pub fn count_delivery(&self, vcpu: usize) {
        self.vcpus[vcpu].delivered.fetch_add(1, SeqCst);
    }

    /// Breakpoints of the guest's own since the VM began.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.delivered.load(SeqCst)).sum()
    }

    /// The vCPU is out of the guest for the monitor's sake, from now on unless it was already.
    pub fn stall_begins(&self, vcpu: usize) {
        // Only the vCPU's own thread writes it, and the clock is past 0 once a guest has run.
        let out_since_ns = &self.vcpus[vcpu].out_since_ns;
        let _ = out_since_ns.compare_exchange(0, self.now_ns(), SeqCst, SeqCst);
    }

    /// The vCPU enters the guest. Returns how long it was out for the monitor's sake.
    pub fn stall_ends(&self, vcpu: usize) -> Duration {
        let vcpu = &self.vcpus[vcpu];
        match vcpu.out_since_ns.swap(0, SeqCst) {
            0 => Duration::ZERO,
            since => {
                let ns = self.now_ns() - since;
                vcpu.longest_stall_ns.fetch_max(ns, SeqCst);
                Duration::from_nanos(ns)
            }
        }
    }

    /// Whether a vCPU is out of the guest for the monitor's sake.
    #[must_use]
    pub fn is_any_stalled(&self) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.out_since_ns.load(SeqCst) != 0)
    }

    /// Runs a fence and counts it, whether it succeeds or not.
    pub fn fence<T>(&self, fence: impl FnOnce() -> T) -> T {
        let began_ns = self.now_ns();
        let result = fence();
        self.fences.fetch_add(1, SeqCst);
        self.longest_fence_ns.fetch_max(self.now_ns() - began_ns, SeqCst);
        result
    }

    /// Sets what [`CounterSet::read`] returns to 0.
    pub fn reset(&self) {
        self.fences.store(0, SeqCst);
        self.longest_fence_ns.store(0, SeqCst);
        for vcpu in &self.vcpus {
            vcpu.longest_stall_ns.store(0, SeqCst);
            vcpu.traps.store(0, SeqCst);
        }
    }

    /// What happened since the last reset. A stall that lasts counts as far as it got.
    #[must_use]
    pub fn read(&self) -> Counters {
        let now_ns = self.now_ns();
        let longest = |vcpu: &VcpuCounters| match vcpu.out_since_ns.load(SeqCst) {
            0 => vcpu.longest_stall_ns.load(SeqCst),
            since => vcpu.longest_stall_ns.load(SeqCst).max(now_ns.saturating_sub(since)),
        };
        Counters {
            longest_stall_ns: self.vcpus.iter().map(longest).max().unwrap_or(0),
            traps: self.vcpus.iter().map(|vcpu| vcpu.traps.load(SeqCst)).sum(),
            fences: self.fences.load(SeqCst),
            longest_fence_ns: self.longest_fence_ns.load(SeqCst),
        }
    }
}
