//! A state of the machine, and the transitions that are found from it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{Hash, Hasher};

use patcher::addr::Gva;
use patcher::program::session::Session;

use crate::code::Version;
use crate::scenario::{GuestActivity, Scenario};

/// What a vCPU is executing, or was executing when it was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Context {
    /// Code that belongs to no site.
    Elsewhere,
    /// The instruction at `rip` is next.
    At {
        rip: Gva,
        /// The version that it has executed of this site so far.
        begun: Option<Version>,
    },
    /// It patches the guest's text.
    Patching(Patching),
}

/// How far a vCPU is that patches the guest's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Patching {
    /// It has the lock; the blocker at this address is next.
    Locked(Gva),
    /// It is past the blocker.
    Comparing,
    /// It found the sites in this version and relies on it.
    Relying(Version),
}

/// How far the monitor is with a #BP exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum BpExit {
    /// The vCPU has left guest mode.
    Exited,
    /// The trap table was read; whether the program's was published then.
    TableRead { published: bool },
    /// The vCPU waits until the table is withdrawn.
    Waiting,
}

/// The name of a vCPU in a trace. vCPUs are interchangeable, so names are all equal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VcpuName(usize);

impl fmt::Display for VcpuName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.0)
    }
}

impl PartialEq for VcpuName {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for VcpuName {}

impl PartialOrd for VcpuName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for VcpuName {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

impl Hash for VcpuName {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Vcpu {
    pub(crate) name: VcpuName,
    /// What it was executing when it was interrupted, if it was, then what it is executing.
    pub(crate) contexts: Vec<Context>,
    /// Values, besides the present one, that a fetch may still show, by unit of memory.
    pub(crate) stale: BTreeMap<usize, BTreeSet<u64>>,
    /// The #BP exit that it is in.
    pub(crate) exit: Option<BpExit>,
    /// Whether #BP exits to the monitor.
    pub(crate) intercepts: bool,
}

impl Vcpu {
    pub(crate) fn context(&self) -> Context {
        self.contexts.last().copied().unwrap_or(Context::Elsewhere)
    }

    pub(crate) fn set_context(&mut self, context: Context) {
        if let Some(last) = self.contexts.last_mut() {
            *last = context;
        }
    }

    /// Whether it serves an interrupt.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.contexts.len() > 1
    }
}

/// A state of the monitor, the guest and its vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State<'p> {
    pub(crate) session: Session<'p>,
    /// All pieces of memory, one after the other.
    pub(crate) memory: Vec<u8>,
    /// Whether the trap table is published.
    pub(crate) published: bool,
    /// Whether the monitor asked for #BP exits.
    pub(crate) armed: bool,
    /// Whether the vCPUs are held.
    pub(crate) held: bool,
    /// If stores are not atomic: the word that was read and is not written back yet.
    pub(crate) loaded: Option<Vec<u8>>,
    /// How many steps failed.
    pub(crate) failures: u8,
    /// Whether the guest has written its byte.
    pub(crate) guest_wrote: bool,
    /// Whether new code of an atomic group was executed.
    pub(crate) new_executed: bool,
    pub(crate) vcpus: Vec<Vcpu>,
}

impl<'p> State<'p> {
    /// The initial state.
    pub(crate) fn new(scenario: &Scenario<'p>) -> Self {
        // An earlier program was just disarmed, and the vCPUs still intercept #BP.
        let intercepts =
            matches!(scenario.guest, GuestActivity::KeepsInt3(_) | GuestActivity::ReplacesInt3(..));
        let vcpu = |number| Vcpu {
            name: VcpuName(number),
            contexts: vec![Context::Elsewhere],
            stale: BTreeMap::new(),
            exit: None,
            intercepts,
        };
        Self {
            session: Session::new(scenario.program),
            memory: scenario.memory.iter().flat_map(|(_, bytes)| bytes).copied().collect(),
            published: false,
            armed: false,
            held: false,
            loaded: None,
            failures: 0,
            guest_wrote: false,
            new_executed: false,
            vcpus: (0..scenario.vcpus).map(vcpu).collect(),
        }
    }

    /// This state with one vCPU changed.
    pub(crate) fn with_vcpu(&self, index: usize, change: impl FnOnce(&mut Vcpu)) -> Self {
        let mut next = self.clone();
        change(&mut next.vcpus[index]);
        next
    }

    /// This state with one vCPU in another context.
    pub(crate) fn with_context(&self, index: usize, context: Context) -> Self {
        self.with_vcpu(index, |vcpu| vcpu.set_context(context))
    }
}

/// The transitions out of a state.
pub(crate) type Transitions<'p> = crate::explore::Transitions<State<'p>>;
