//! Plan + kernel image + guest memory -> resolved plan, or every reason why not.
//!
//! Nothing is written here. A resolved plan holds for every site the bytes that are there now and
//! those that will be.
//!
//! ```text
//! patch ──expand──▶ code, data ──check──▶ sites
//! ```

mod check;
pub mod expand;
mod replaced;
mod required;
mod resolved_plan;
mod shape;
mod supplies;
pub mod targets;

pub use replaced::in_replaced;
pub use resolved_plan::ResolvedPlan;
pub use supplies::Supplies;

use crate::image::KernelImage;
use crate::insn;
use crate::linux::kprobes::probes;
use crate::linux::{Bounded, GuestMemory, Kernel};
use crate::object::{Replacement, Room};
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::{Patch, Plan, Strategy};
use crate::resolve::check::{SiteChecker, unprobed};
use crate::resolve::expand::{Brought, Datum, Expansion, Needs};
use crate::safety::blockers::{self, Patchers};
use crate::safety::interior::{PREEMPTED, preempts};
use crate::safety::old_code::Place;
use crate::site::{OWN, Site, overlaps};

/// A running guest, as far as plans are concerned.
#[derive(Clone, Copy)]
pub struct RunningGuest<'a> {
    /// Its kernel.
    pub kernel: Kernel<'a>,
    /// Its memory.
    pub text: &'a dyn GuestMemory,
    /// How many vCPUs it has.
    pub vcpus: usize,
}

impl<'a> RunningGuest<'a> {
    /// Its memory, of which no more is read than what reading the modules has left of the budget.
    fn bounded(&self) -> Bounded<'a> {
        Bounded::new(self.text, self.kernel.modules.left())
    }
}

/// Resolves `plan` against the guest. `taken` holds the sites of applied patches, each with the name
/// of its patch.
///
/// ```
/// use patcher::addr::Gva;
/// use patcher::image::{KernelImage, Symbols};
/// use patcher::linux::{GuestMemory, Kernel, Modules};
/// use patcher::plan::Plan;
/// use patcher::resolve::{RunningGuest, resolve};
///
/// /// A function of two instructions: mov eax, 1; ret.
/// struct Text;
/// const F: Gva = Gva(0xffff_ffff_8100_0000);
///
/// impl GuestMemory for Text {
///     fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
///         let code = [0xb8, 1, 0, 0, 0, 0xc3];
///         let from = at.offset_from(F).ok_or(at)?;
///         into.copy_from_slice(code.get(from..from + into.len()).ok_or(at)?);
///         Ok(())
///     }
/// }
///
/// let symbols = Symbols::new([(F.0, b'T', "f"), (F.0 + 6, b'T', "g")].into_iter()).expect("few");
/// let image = KernelImage::from_parts("6.1".into(), symbols, F);
/// let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
/// let guest = RunningGuest { kernel, text: &Text, vcpus: 1 };
///
/// let plan = |at: &str, expect: &str| {
///     let json = format!(
///         r#"{{ "version": 1, "name": "demo",
///              "patches": [{{ "at": "{at}", "expect": "{expect}", "replace": "b802000000" }}] }}"#
///     );
///     Plan::parse(json.as_bytes()).expect("well-formed")
/// };
/// let resolved = resolve(&plan("f", "b801000000"), guest, []).expect("it fits");
/// assert_eq!((resolved.sites[0].at, resolved.sites[0].new[1]), (F, 2));
///
/// let refused = resolve(&plan("f+0x1", "01000000c3"), guest, []).unwrap_err();
/// assert_eq!(refused[0].refusal.code(), "inside_instruction");
/// ```
///
/// # Errors
/// Every reason that was found, not just the first.
pub fn resolve<'t>(
    plan: &Plan,
    guest: RunningGuest<'_>,
    taken: impl IntoIterator<Item = (&'t str, &'t Site)>,
) -> Result<ResolvedPlan, Vec<Refused>> {
    resolve_with(plan, &Supplies::default(), guest, taken)
}

/// The same for a plan that brings objects, which `supplies` holds.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_with<'t>(
    plan: &Plan,
    supplies: &Supplies,
    guest: RunningGuest<'_>,
    taken: impl IntoIterator<Item = (&'t str, &'t Site)>,
) -> Result<ResolvedPlan, Vec<Refused>> {
    let bounded = guest.bounded();
    let resolved = resolve_within(plan, supplies, RunningGuest { text: &bounded, ..guest }, taken);
    // What was found with an exhausted budget may lack anything.
    if bounded.is_exhausted() { Err(vec![Refusal::TooMuchToRead.at_root()]) } else { resolved }
}

fn resolve_within<'t>(
    plan: &Plan,
    supplies: &Supplies,
    guest: RunningGuest<'_>,
    taken: impl IntoIterator<Item = (&'t str, &'t Site)>,
) -> Result<ResolvedPlan, Vec<Refused>> {
    let RunningGuest { kernel, text, .. } = guest;
    let other = other_kernel(plan, kernel.image);
    if !other.is_empty() {
        // Symbols of another kernel would only produce follow-up errors.
        return Err(other);
    }
    let bypass = plan.strategy == Strategy::Bypass;
    let mut refused = required::plan(kernel.image.profile(), plan);
    let lacking =
        |(i, patch)| Some(required::patch(kernel.image.profile(), patch).err()?.at(Pointer::patch(i)));
    refused.extend(plan.patches.iter().enumerate().filter_map(lacking));
    if !refused.is_empty() {
        // What is not known would only produce follow-up errors.
        return Err(refused);
    }
    let checker = SiteChecker::new(kernel, text, bypass).map_err(|refusal| vec![refusal.at_root()])?;
    let mut sites: Vec<Site> = Vec::new();
    let (mut data, mut needs) = (Vec::new(), Needs::Nothing);
    let (mut room, mut brings, mut old) = (supplies.room.clone(), Vec::new(), Vec::new());
    let mut counts = Vec::new();
    for (i, patch) in plan.patches.iter().enumerate() {
        let pointer = Pointer::patch(i);
        let brought = supplies.replacements.get(&i).zip(room.as_ref());
        let expansion = match expanded(guest, patch, brought, plan.strategy, &checker) {
            Ok(expansion) => expansion,
            Err(refusal) => {
                refused.push(refusal.at(pointer));
                continue;
            }
        };
        needs = needs.max(expansion.needs);
        data.extend(expansion.data);
        if let Some(Brought { pieces, old: places, left, counts: more }) = expansion.brought {
            brings.extend(pieces);
            counts.extend(more);
            old.extend(places);
            room = Some(left);
        }
        for code in expansion.code {
            match checker.site(&pointer, patch.function(), code, expansion.needs) {
                Ok(site) => sites.push(site),
                Err(refusal) => refused.push(refusal.at(pointer.clone())),
            }
        }
    }
    let mut outside = Vec::new();
    for (i, name) in plan.outside.iter().enumerate() {
        let function =
            kernel.address(name).and_then(|at| kernel.function_at(at).ok_or(Refusal::NotText { at }));
        match function {
            Ok(function) => outside.push(function.start..function.end),
            Err(refusal) => refused.push(refusal.at(Pointer::new(&format!("/quiesced/outside/{i}")))),
        }
    }
    let mut tasks_outside = Vec::new();
    for (i, name) in plan.tasks_outside.iter().enumerate() {
        match Place::find(&kernel, name) {
            Ok(place) => tasks_outside.push(place),
            Err(refusal) => refused.push(refusal.at(Pointer::new(&format!("/quiesced/tasks_outside/{i}")))),
        }
    }
    let patchers = match required::patched_by_the_guest(kernel.image.profile()) {
        Ok(()) => Patchers::of(&kernel, text, &sites),
        // Of patches that need the locks anyway, none has come so far.
        Err(refusal) => {
            let concerned = sites.iter().filter(|site| blockers::may_patch(&kernel, site));
            refused.extend(concerned.map(|site| refusal.clone().at(site.pointer.clone())));
            Patchers::default()
        }
    };
    let taken: Vec<(&str, &Site)> = taken.into_iter().collect();
    refused.extend(overlaps(&plan.over, &sites, &taken));
    refused.extend(same_words(&sites, &data));
    if !refused.is_empty() {
        return Err(refused);
    }
    let unlocked = needs == Needs::Unlocked;
    Ok(ResolvedPlan {
        name: plan.name.clone(),
        strategy: plan.strategy,
        atomic: plan.atomic || needs >= Needs::Group,
        deadline_ms: plan.deadline_ms,
        preemptible: plan.preemptible,
        unlocked,
        outside,
        tasks_outside,
        new: brings.iter().filter(|piece| piece.is_code).map(Place::of_new_code).collect(),
        old,
        brings,
        counts,
        left: room,
        blockers: if unlocked { blockers::unlocked(&kernel, text, &sites) } else { Vec::new() },
        patchers,
        sites,
        data,
        on_guest_write: plan.on_guest_write,
    })
}

/// Refuses a plan that was made for another kernel.
fn other_kernel(plan: &Plan, image: &KernelImage) -> Vec<Refused> {
    let mut refused = Vec::new();
    let mut refuse = |wanted: String, running: String, place: &str| {
        refused.push(Refusal::KernelMismatch { wanted, running }.at(Pointer::new(place)));
    };
    if let Some(wanted) = plan.release.as_deref().filter(|wanted| *wanted != image.release()) {
        refuse(wanted.to_owned(), image.release().to_owned(), "/kernel/release");
    }
    if let Some(wanted) = plan.build_id.as_deref().filter(|wanted| Some(*wanted) != image.build_id()) {
        let build = |id: &[u8]| format!("build {}", insn::hex(id));
        let running = image.build_id().map_or_else(|| "one without a build ID".to_owned(), build);
        refuse(build(wanted), running, "/kernel/build_id");
    }
    refused
}

/// What a patch comes to, if the strategy can change it and the guest would execute it.
fn expanded(
    RunningGuest { kernel, text, vcpus }: RunningGuest<'_>,
    patch: &Patch,
    brings: Option<(&Replacement, &Room)>,
    strategy: Strategy,
    checker: &SiteChecker<'_>,
) -> Result<Expansion, Refusal> {
    let expansion = expand::expand(&kernel, text, vcpus, patch, brings)?;
    // A livepatch has static keys and static calls of its own.
    if matches!(patch, Patch::Raw { .. } | Patch::Redirect { .. } | Patch::Object { .. }) {
        expansion.code.iter().try_for_each(|code| checker.chosen(code))?;
    }
    let needed = match (expansion.needs, strategy) {
        (Needs::Nothing, _)
        | (Needs::Group, Strategy::Auto | Strategy::Hold | Strategy::Inspect)
        | (Needs::Left | Needs::Unlocked, Strategy::Auto | Strategy::Inspect) => return Ok(expansion),
        (Needs::Group, Strategy::Store | Strategy::Breakpoint | Strategy::Bypass) => "hold or inspect",
        (Needs::Left | Needs::Unlocked, _) => "inspect",
    };
    Err(Refusal::NeedsGroup { needed })
}

/// Sites on which the guest has a kprobe now. A kprobe executes a copy of the instruction and later
/// puts its first byte back, so the code under it must not change.
#[must_use]
pub fn probed(guest: RunningGuest<'_>, sites: &[Site]) -> Vec<Refused> {
    match probes(&guest.kernel, &guest.bounded()) {
        Ok(probes) => {
            let refused = |site: &Site| {
                let refusal = unprobed(&probes, site.at, site.end()).err()?;
                Some(refusal.at(site.pointer.clone()))
            };
            sites.iter().filter_map(refused).collect()
        }
        Err(refusal) => vec![refusal.at_root()],
    }
}

/// Sites inside of which a task may have been preempted meanwhile: the guest can change its preemption
/// model while it runs (Linux kernel/sched/debug.c, `sched_dynamic_write`).
#[must_use]
pub fn preempted(guest: RunningGuest<'_>, plan: &ResolvedPlan) -> Vec<Refused> {
    // No task is preempted where spinlocks are taken and released.
    let several = plan.sites.iter().filter(|site| !plan.unlocked && !site.old_inside.is_empty());
    let mut refused = several
        .map(|site| {
            let (at, inside) = (site.at, site.old_inside[0]);
            Refusal::InteriorReachable { at, inside, why: PREEMPTED }.at(site.pointer.clone())
        })
        .peekable();
    if refused.peek().is_none() || !preempts(guest.kernel, guest.text) {
        return Vec::new();
    }
    refused.collect()
}

/// The first two patches of a plan that change the same word of data.
fn same_words(sites: &[Site], data: &[Datum]) -> Option<Refused> {
    let mut words: Vec<&Datum> = data.iter().collect();
    words.sort_by_key(|datum| datum.at);
    let clash = words.windows(2).find(|pair| pair[0].at.0 / 8 == pair[1].at.0 / 8)?;
    let (at, other) = (clash[1].at, clash[0].at);
    let pointer = sites.last().map_or(Pointer::new(""), |site| site.pointer.clone());
    Some(Refusal::OverlappingSites { at, other, whose: OWN.to_owned() }.at(pointer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gva;
    use crate::image::{KernelImage, Symbols};
    use crate::linux::Modules;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const MODE: u64 = TEXT + 0x100;

    /// What the guest says of preemption.
    struct Says(u8);

    impl GuestMemory for Says {
        fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
            into.fill(0);
            into[0] = if at == Gva(MODE) { self.0 } else { return Err(at) };
            Ok(())
        }
    }

    #[test]
    fn several_instructions_are_not_put_back_once_tasks_are_preempted() {
        let symbols = Symbols::new([(MODE, b'D', "preempt_dynamic_mode")].into_iter()).expect("few");
        let image = KernelImage::from_parts("6.12".into(), symbols, Gva(TEXT))
            .with_banner("Linux version 6.12 #1 SMP PREEMPT_DYNAMIC");
        let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        let plan = |old_inside: Vec<Gva>, unlocked| ResolvedPlan {
            name: "demo".into(),
            strategy: Strategy::Auto,
            atomic: false,
            deadline_ms: 100,
            preemptible: false,
            unlocked,
            outside: Vec::new(),
            tasks_outside: Vec::new(),
            old: Vec::new(),
            new: Vec::new(),
            brings: Vec::new(),
            counts: Vec::new(),
            left: None,
            sites: vec![Site {
                pointer: Pointer::patch(0),
                at: Gva(0x1000),
                symbol: "f".into(),
                old: vec![0x90; 2],
                new: vec![0x66, 0x90],
                old_inside,
                new_inside: Vec::new(),
                may_fault: false,
            }],
            data: Vec::new(),
            blockers: Vec::new(),
            patchers: Patchers::default(),
            on_guest_write: None,
        };
        let codes = |mode, plan: &ResolvedPlan| -> Vec<&str> {
            let guest = RunningGuest { kernel, text: &Says(mode), vcpus: 1 };
            preempted(guest, plan).iter().map(|refused| refused.refusal.code()).collect()
        };
        let (none, voluntary, full, lazy) = (0, 1, 2, 3);
        let several = plan(vec![Gva(0x1001)], false);
        for mode in [full, lazy] {
            assert_eq!(codes(mode, &several), ["interior_reachable"]);
            assert!(codes(mode, &plan(Vec::new(), false)).is_empty(), "one instruction");
            assert!(codes(mode, &plan(vec![Gva(0x1001)], true)).is_empty(), "where spinlocks are taken");
        }
        for mode in [none, voluntary] {
            assert!(codes(mode, &several).is_empty());
        }
    }
}
