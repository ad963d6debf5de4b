//! A scenario: a program, the memory that it meets, and what the machine around it may do.

use patcher::addr::Gva;
use patcher::program::step::Program;

/// What a fetch sees of memory that was written since the vCPU's last fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetch {
    /// Each byte old or new, whatever its neighbours are: no vendor promises less.
    Bytes,
    /// Each aligned eight bytes as one store left them (APM volume 2, 7.6.1).
    Words,
}

/// What the guest does to its own text, at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestActivity {
    /// Nothing.
    Quiet,
    /// It writes a byte, once.
    WritesByte(Gva, u8),
    /// It has an `int3` of its own, which stays.
    KeepsInt3(Gva),
    /// It has an `int3` of its own, which it replaces with another byte, once.
    ReplacesInt3(Gva, u8),
    /// It patches the sites, any number of times: it takes its lock, passes the blocker, compares
    /// the text with what it expects, and relies on that until it releases the lock.
    PatchesText {
        /// The word that is zero while the lock is free.
        lock: Gva,
        /// An instruction that it executes between the lock and the comparison.
        blocker: Gva,
    },
}

/// What the monitor and the processor do besides the program's steps. A test can switch each off
/// to show that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// After a #BP exit the monitor reads the byte again.
    pub rereads_byte: bool,
    /// Before it injects #BP it checks that its trap table is still the one in force.
    pub rechecks_table: bool,
    /// [`Step::Store`](patcher::program::step::Step::Store) is one atomic access.
    pub stores_are_atomic: bool,
    /// An inspected vCPU reports whether it may have interrupted something.
    pub reports_interrupted: bool,
}

impl Rules {
    /// As the monitor works.
    pub const ALL: Self =
        Self { rereads_byte: true, rechecks_table: true, stores_are_atomic: true, reports_interrupted: true };
}

/// A program on a machine.
#[derive(Debug, Clone)]
pub struct Scenario<'p> {
    /// What the monitor runs.
    pub program: &'p Program,
    /// The initial memory: pieces that do not touch.
    pub memory: Vec<(Gva, Vec<u8>)>,
    /// How many vCPUs.
    pub vcpus: usize,
    /// What fetches see.
    pub fetch: Fetch,
    /// Whether vCPUs are interrupted.
    pub interrupts: bool,
    /// Whether steps fail.
    pub failures: bool,
    /// Whether a write may be reported as done without being done.
    pub lost_writes: bool,
    /// Whether the sites are one group: no vCPU may execute old code of one after any vCPU
    /// executed new code of another.
    pub atomic: bool,
    /// What the guest does.
    pub guest: GuestActivity,
    /// What the monitor does besides the program's steps.
    pub rules: Rules,
}

impl<'p> Scenario<'p> {
    /// Two vCPUs, interrupts, failing steps, and a guest that leaves its text alone.
    #[must_use]
    pub fn new(program: &'p Program, memory: Vec<(Gva, Vec<u8>)>) -> Self {
        Self {
            program,
            memory,
            vcpus: 2,
            fetch: Fetch::Bytes,
            interrupts: true,
            failures: true,
            lost_writes: false,
            atomic: false,
            guest: GuestActivity::Quiet,
            rules: Rules::ALL,
        }
    }
}
