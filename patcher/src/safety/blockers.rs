//! Blockers: where vCPUs are kept while a program is at its sites, by an `int3` that is not at a
//! site. Who comes by waits until the traps are withdrawn.
//!
//! The guest's kernel patches itself, too: it takes locks, compares what is there with what it
//! expects, and replaces it; where it finds something else it panics. So a program keeps away
//! everybody who is about to compare, and begins only when nobody has the locks: who comes for
//! them afterwards comes to a blocker before he looks. Blockers that are shut first and locks that are
//! looked at then stop nobody who patches nothing; the other way round, while nobody runs, it is
//! enough that the locks are free for a moment.

use crate::addr::Gva;
use crate::insn::INT3;
use crate::linux::{GuestMemory, Kernel};
use crate::site::Site;

/// An instruction that vCPUs come by, and its first byte.
pub type Blocker = (Gva, u8);

/// How the guest's kernel patches itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Patchers {
    /// Where it is about to look at text.
    pub blockers: Vec<Blocker>,
    /// The words that are zero while nobody has its locks.
    pub locks: Vec<Gva>,
    /// Whether they kept a program out before. One that patches all the time lets go of its locks
    /// for moments only: the blockers are shut in such a moment then, while nobody runs.
    pub busy: bool,
}

impl Patchers {
    /// Those that this kernel has. None if it does not describe its mutexes.
    pub(crate) fn of(kernel: &Kernel<'_>, text: &dyn GuestMemory, sites: &[Site]) -> Self {
        let locks = locks(kernel);
        if locks.is_empty() {
            return Self::default();
        }
        Self {
            blockers: blockers(kernel, text, sites, &kernel.image.landmarks().patchers),
            locks,
            busy: false,
        }
    }
}

/// The words that are zero while a guest's kernel does not patch itself.
#[must_use]
pub fn locks(kernel: &Kernel<'_>) -> Vec<Gva> {
    kernel.image.landmarks().locks.iter().map(|lock| kernel.live(*lock)).collect()
}

/// Where nobody has a spinlock.
pub(crate) fn unlocked(kernel: &Kernel<'_>, text: &dyn GuestMemory, sites: &[Site]) -> Vec<Blocker> {
    blockers(kernel, text, sites, &kernel.image.landmarks().unlocked)
}

/// Blockers at these places, but for those where a site is, or somebody's `int3`.
fn blockers(kernel: &Kernel<'_>, text: &dyn GuestMemory, sites: &[Site], places: &[Gva]) -> Vec<Blocker> {
    let blocker = |place: &Gva| {
        let (at, mut byte) = (kernel.live(*place), [0]);
        text.read(at, &mut byte).ok()?;
        let taken = byte[0] == INT3 || sites.iter().any(|site| site.at <= at && at < site.end());
        (!taken).then_some((at, byte[0]))
    };
    places.iter().filter_map(blocker).collect()
}
