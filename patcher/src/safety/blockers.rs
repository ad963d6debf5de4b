//! Blockers: an `int3` outside of every site, where a vCPU waits until the program's traps are
//! withdrawn.
//!
//! The guest's kernel patches itself, too. It takes a lock, compares the text with what it expects,
//! replaces it, and panics if it finds something else. So no task may be between comparing and
//! replacing while a program changes sites:
//!
//! - By default the blockers are placed first, then the locks must be free. A task that wants a lock
//!   afterwards reaches a blocker before it compares. This stops only vCPUs that patch text.
//! - If the locks are rarely free, all vCPUs are held while they are, and the blockers are placed
//!   under that hold.

use crate::addr::Gva;
use crate::image::profile::{Capability, State};
use crate::insn::INT3;
use crate::linux::{GuestMemory, Kernel};
use crate::site::Site;

/// The address of an instruction, and its first byte.
pub type Blocker = (Gva, u8);

/// How the guest's kernel patches itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Patchers {
    /// Entries of the functions that compare text.
    pub blockers: Vec<Blocker>,
    /// The words of its locks. Zero means free.
    pub locks: Vec<Gva>,
    /// Whether an earlier attempt found a lock taken. The blockers are then placed while all vCPUs
    /// are held and the locks are free.
    pub busy: bool,
}

impl Patchers {
    /// Reads them from the image. Empty if the kernel does not patch itself.
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

/// Whether the guest's kernel may compare or replace the bytes of a site itself. It does so at the entries
/// of its tables only, and wherever a kprobe is. Tables of modules are in guest memory, which is not trusted.
pub(crate) fn may_patch(kernel: &Kernel<'_>, site: &Site) -> bool {
    const KNOWN: [Capability; 4] = [
        Capability::FunctionTracer,
        Capability::StaticKeys,
        Capability::StaticCalls,
        Capability::LockPrefixes,
    ];
    let profile = kernel.image.profile();
    let is_own = (kernel.live(kernel.image.text_base())..kernel.live(kernel.image.end())).contains(&site.at);
    !is_own
        || *profile.state(Capability::Kprobes) != State::Absent
        || KNOWN.iter().any(|capability| profile.know(*capability).is_err())
        || kernel.image.tables().is_patched_between(kernel.linked(site.at), kernel.linked(site.end()))
}

/// The words that are zero while the guest's kernel does not patch itself.
#[must_use]
pub fn locks(kernel: &Kernel<'_>) -> Vec<Gva> {
    kernel.image.landmarks().locks.iter().map(|lock| kernel.live(*lock)).collect()
}

/// Blockers at functions that are never called with a spinlock held.
pub(crate) fn unlocked(kernel: &Kernel<'_>, text: &dyn GuestMemory, sites: &[Site]) -> Vec<Blocker> {
    blockers(kernel, text, sites, &kernel.image.landmarks().unlocked)
}

/// Blockers at these places, except where a site is or an `int3` already stands.
fn blockers(kernel: &Kernel<'_>, text: &dyn GuestMemory, sites: &[Site], places: &[Gva]) -> Vec<Blocker> {
    let blocker = |place: &Gva| {
        let (at, mut byte) = (kernel.live(*place), [0]);
        text.read(at, &mut byte).ok()?;
        let taken = byte[0] == INT3 || sites.iter().any(|site| site.at <= at && at < site.end());
        (!taken).then_some((at, byte[0]))
    };
    places.iter().filter_map(blocker).collect()
}
