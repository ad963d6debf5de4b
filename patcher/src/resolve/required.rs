//! Which capabilities of the kernel a plan needs.

use crate::image::profile::{Capability, Lacking, Profile};
use crate::linux::view::missing;
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::write_policy::Policy;
use crate::plan::{Patch, Plan, Strategy};

/// What a plan needs of a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// The kernel must have the mechanism.
    Have(Capability),
    /// It must be known, or the kernel must provably not have it: it is to be kept away.
    Know(Capability),
}

use Need::{Have, Know};

impl Need {
    fn check(self, profile: &Profile) -> Result<(), Lacking> {
        match self {
            Have(capability) => profile.require(capability),
            Know(capability) => profile.know(capability),
        }
    }
}

/// What every patch of a kind needs. Code that the plan itself chose (raw sites and redirects) needs the
/// patching locks only where the guest may patch it, too: that is decided by site.
fn of_patch(patch: &Patch) -> &'static [Need] {
    match patch {
        Patch::Raw { .. } | Patch::Redirect { .. } => {
            &[Know(Capability::Kprobes), Know(Capability::Livepatches)]
        }
        Patch::Object { .. } => &[
            Have(Capability::Tasks),
            Have(Capability::StackCheck),
            Have(Capability::PerCpu),
            Have(Capability::DirectMapping),
            Know(Capability::ReturnThunks),
            Know(Capability::Kprobes),
            Know(Capability::Livepatches),
        ],
        Patch::StaticKey { .. } => &[
            Have(Capability::StaticKeys),
            Have(Capability::InitSections),
            Know(Capability::Modules),
            Know(Capability::Kprobes),
            Know(Capability::PatchingLocks),
        ],
        Patch::StaticCall { .. } => &[
            Have(Capability::StaticCalls),
            Have(Capability::CpuFeatures),
            Have(Capability::InitSections),
            Know(Capability::ReturnThunks),
            Know(Capability::Modules),
            Know(Capability::Kprobes),
            Know(Capability::PatchingLocks),
        ],
        Patch::Alternatives { .. } => &[
            Have(Capability::Alternatives),
            Have(Capability::CpuFeatures),
            Have(Capability::InitSections),
            Know(Capability::Kprobes),
            Know(Capability::PatchingLocks),
        ],
        Patch::SmpLocks { .. } => {
            &[Have(Capability::LockPrefixes), Know(Capability::Kprobes), Know(Capability::PatchingLocks)]
        }
        Patch::Paravirt { .. } => &[
            Have(Capability::Spinlocks),
            Have(Capability::Alternatives),
            Have(Capability::CpuFeatures),
            Have(Capability::InitSections),
            Have(Capability::PreemptCount),
            Have(Capability::PerCpu),
            Know(Capability::Modules),
            Know(Capability::Kprobes),
            Know(Capability::PatchingLocks),
        ],
    }
}

/// What a site of several instructions needs, before the change or after: that nothing leads into it, that
/// no task returns to its inside, and that the position of each vCPU is known.
const SEVERAL_INSTRUCTIONS: &[Need] = &[
    Know(Capability::StaticKeys),
    Have(Capability::ExceptionTable),
    Have(Capability::PreemptModel),
    Have(Capability::PerCpu),
];

/// Refuses a patch that needs what the kernel's image does not have.
pub(crate) fn patch(profile: &Profile, patch: &Patch) -> Result<(), Refusal> {
    of_patch(patch).iter().try_for_each(|need| need.check(profile)).map_err(missing)
}

/// The same for what the plan asks for besides its patches.
pub(crate) fn plan(profile: &Profile, plan: &Plan) -> Vec<Refused> {
    let asked = [
        (plan.strategy == Strategy::Bypass, "/strategy", Have(Capability::ExceptionTable)),
        (plan.preemptible, "/quiesced/preemptible", Have(Capability::PerCpu)),
        (plan.preemptible, "/quiesced/preemptible", Have(Capability::PreemptCount)),
        (!plan.outside.is_empty(), "/quiesced/outside", Have(Capability::PerCpu)),
        (!plan.tasks_outside.is_empty(), "/quiesced/tasks_outside", Have(Capability::PerCpu)),
        (!plan.tasks_outside.is_empty(), "/quiesced/tasks_outside", Have(Capability::Tasks)),
        (!plan.tasks_outside.is_empty(), "/quiesced/tasks_outside", Have(Capability::StackCheck)),
        (plan.on_guest_write.is_some(), "/on_guest_write", Know(Capability::PatchingLocks)),
        // The kernel's own patcher, whose writes are not dropped, is told by its task.
        (plan.on_guest_write == Some(Policy::Deny), "/on_guest_write", Have(Capability::PerCpu)),
    ];
    let lacking = |(asked, pointer, need): (bool, &str, Need)| {
        let lacking = asked.then(|| need.check(profile).err()).flatten()?;
        Some(missing(lacking).at(Pointer::new(pointer)))
    };
    asked.into_iter().filter_map(lacking).collect()
}

/// The same for a site of several instructions.
pub(crate) fn several_instructions(profile: &Profile) -> Result<(), Refusal> {
    SEVERAL_INSTRUCTIONS.iter().try_for_each(|need| need.check(profile)).map_err(missing)
}

/// The same for a site that the guest may patch, too.
pub(crate) fn patched_by_the_guest(profile: &Profile) -> Result<(), Refusal> {
    Know(Capability::PatchingLocks).check(profile).map_err(missing)
}
