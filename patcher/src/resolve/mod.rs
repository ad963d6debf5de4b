//! Plan + kernel image + live text -> resolved plan, or all the reasons why not.
//!
//! Nothing is written here. A resolved plan says for every site which bytes are there now
//! and which will be.

pub mod expand;
pub mod targets;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use crate::addr::Gva;
use crate::image::symbols::Function;
use crate::insn;
use crate::linux::kprobes::{among, probes};
use crate::linux::livepatches::livepatched;
use crate::linux::memory::read;
use crate::linux::{GuestMemory, Kernel};
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::write_policy::Policy;
use crate::plan::{Patch, Plan, Strategy};
use crate::resolve::expand::{Code, Datum, Expansion, Needs};
use crate::safety::blockers::{self, Blocker, Patchers};
use crate::safety::interior::{Sleepers, boundaries};
use crate::site::{OWN, Site, overlaps};

/// Functions longer than this, in bytes, are not decoded.
const MAX_FUNCTION: usize = 1 << 20;

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

/// A plan that fits the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedPlan {
    /// The plan's name.
    pub name: String,
    /// The strategy that was asked for.
    pub strategy: Strategy,
    /// Whether the sites form one group.
    pub atomic: bool,
    /// Time the program may take, in milliseconds.
    pub deadline_ms: u64,
    /// Whether every vCPU must be in user mode, idle, or have a preempt count of zero.
    pub preemptible: bool,
    /// Whether no vCPU may hold a spinlock or wait for one.
    pub unlocked: bool,
    /// Functions that no vCPU may be in.
    pub outside: Vec<Range<Gva>>,
    /// The sites, in the plan's order.
    pub sites: Vec<Site>,
    /// The kernel's own data that goes with them.
    pub data: Vec<Datum>,
    /// Where vCPUs pass that hold no spinlock, if the sites are changed when nobody has one.
    pub blockers: Vec<Blocker>,
    /// How the guest's kernel patches itself.
    pub patchers: Patchers,
    /// What to do when the guest changes the sites afterwards.
    pub on_guest_write: Option<Policy>,
}

impl ResolvedPlan {
    /// The plan that undoes this one. Its sites' old bytes are this plan's new ones. Where
    /// the new code has instructions inside that the old one had not, the strategy is free.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let sites = self.sites.iter().map(Site::reversed).collect();
        let data = self.data.iter().map(Datum::reversed).collect();
        Self {
            name: self.name.clone(),
            strategy: self.strategy_back(),
            sites,
            data,
            outside: self.outside.clone(),
            blockers: self.blockers.clone(),
            patchers: self.patchers.clone(),
            ..*self
        }
    }

    /// The plan for another attempt, when the guest's patchers have kept one out.
    #[must_use]
    pub fn among_busy_patchers(&self) -> Self {
        Self { patchers: Patchers { busy: true, ..self.patchers.clone() }, ..self.clone() }
    }

    /// The strategy that the undoing plan asks for.
    pub(crate) fn strategy_back(&self) -> Strategy {
        let inside = self.sites.iter().any(|site| !site.new_inside.is_empty());
        if inside { Strategy::Auto } else { self.strategy }
    }

    /// Whether it says where the vCPUs may not stand.
    #[must_use]
    pub fn is_conditional(&self) -> bool {
        self.preemptible || self.unlocked || !self.outside.is_empty()
    }
}

/// Resolves `plan` against the guest. `taken` are the sites of patches applied before, with
/// the names of these patches.
///
/// # Errors
/// Every reason that was found, not just the first.
pub fn resolve<'t>(
    plan: &Plan,
    guest: RunningGuest<'_>,
    taken: impl IntoIterator<Item = (&'t str, &'t Site)>,
) -> Result<ResolvedPlan, Vec<Refused>> {
    let RunningGuest { kernel, text, vcpus } = guest;
    let mut refused = Vec::new();
    if let Some(wanted) = plan.release.as_ref().filter(|wanted| *wanted != kernel.image.release()) {
        // Symbols of another kernel would only produce follow-up errors.
        let running = kernel.image.release().to_owned();
        let refusal = Refusal::KernelMismatch { wanted: wanted.clone(), running };
        return Err(vec![refusal.at(Pointer::new("/kernel/release"))]);
    }
    let resolver = Resolver {
        probes: probes(&kernel, text).map_err(|refusal| vec![refusal.at_root()])?,
        livepatched: livepatched(&kernel, text).map_err(|refusal| vec![refusal.at_root()])?,
        kernel,
        text,
        vcpus,
        sleepers: Sleepers::new(kernel, text),
        bypass: plan.strategy == Strategy::Bypass,
        shapes: RefCell::default(),
    };
    let mut sites: Vec<Site> = Vec::new();
    let (mut data, mut needs) = (Vec::new(), Needs::Nothing);
    for (i, patch) in plan.patches.iter().enumerate() {
        let pointer = Pointer::patch(i);
        let expansion = resolver.expand(patch).and_then(|expansion| {
            let wrong = match (expansion.needs, plan.strategy) {
                (Needs::Group, Strategy::Store | Strategy::Breakpoint | Strategy::Bypass) => {
                    "hold or inspect"
                }
                (Needs::Unlocked, Strategy::Auto | Strategy::Inspect)
                | (Needs::Nothing | Needs::Group, _) => {
                    return Ok(expansion);
                }
                (Needs::Unlocked, _) => "inspect",
            };
            Err(Refusal::NeedsGroup { needed: wrong })
        });
        match expansion {
            Ok(Expansion { code, data: words, needs: more }) => {
                needs = needs.max(more);
                data.extend(words);
                for code in code {
                    match resolver.site(&pointer, patch.function(), code, more) {
                        Ok(site) => sites.push(site),
                        Err(refusal) => refused.push(refusal.at(pointer.clone())),
                    }
                }
            }
            Err(refusal) => refused.push(refusal.at(pointer)),
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
    let taken: Vec<(&str, &Site)> = taken.into_iter().collect();
    refused.extend(overlaps(&plan.over, &sites, &taken));
    refused.extend(same_words(&sites, &data));
    if !refused.is_empty() {
        return Err(refused);
    }
    Ok(ResolvedPlan {
        name: plan.name.clone(),
        strategy: plan.strategy,
        atomic: plan.atomic || needs >= Needs::Group,
        deadline_ms: plan.deadline_ms,
        preemptible: plan.preemptible,
        unlocked: needs == Needs::Unlocked,
        outside,
        blockers: if needs == Needs::Unlocked {
            blockers::unlocked(&kernel, text, &sites)
        } else {
            Vec::new()
        },
        patchers: Patchers::of(&kernel, text, &sites),
        sites,
        data,
        on_guest_write: plan.on_guest_write,
    })
}

/// Sites where the guest has a kprobe. It has copied an instruction, executes the copy, and puts
/// the first byte back: under it the code must stay as it was.
#[must_use]
pub fn probed(guest: RunningGuest<'_>, sites: &[Site]) -> Vec<Refused> {
    match probes(&guest.kernel, guest.text) {
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

fn unprobed(probes: &[Gva], at: Gva, end: Gva) -> Result<(), Refusal> {
    among(probes, at, end).map_or(Ok(()), |probe| Err(Refusal::Probed { at, probe }))
}

/// Two patches of a plan that change the same word of data.
fn same_words(sites: &[Site], data: &[Datum]) -> Option<Refused> {
    let mut words: Vec<&Datum> = data.iter().collect();
    words.sort_by_key(|datum| datum.at);
    let clash = words.windows(2).find(|pair| pair[0].at.0 / 8 == pair[1].at.0 / 8)?;
    let (at, other) = (clash[1].at, clash[0].at);
    let pointer = sites.last().map_or(Pointer::new(""), |site| site.pointer.clone());
    Some(Refusal::OverlappingSites { at, other, whose: OWN.to_owned() }.at(pointer))
}

/// What the sites of one plan are resolved with.
struct Resolver<'a> {
    kernel: Kernel<'a>,
    text: &'a dyn GuestMemory,
    vcpus: usize,
    sleepers: Sleepers<'a>,
    /// Where the guest has kprobes.
    probes: Vec<Gva>,
    /// Functions that the guest's own livepatches replace.
    livepatched: Vec<Range<Gva>>,
    /// Whether instructions may have to be executed elsewhere.
    bypass: bool,
    /// Functions, by where they begin: plans of thousands of sites have many in one.
    shapes: RefCell<HashMap<Gva, Rc<Shape>>>,
}

impl Resolver<'_> {
    fn expand(&self, patch: &Patch) -> Result<Expansion, Refusal> {
        let (kernel, text) = (&self.kernel, self.text);
        let one = |code| Expansion { code: vec![code], ..Expansion::default() };
        match patch {
            Patch::Raw { at, expect, replace } => self.executed(self.raw(at, expect, replace)?).map(one),
            Patch::Redirect { from, to, keep_fentry } => {
                self.executed(self.redirect(from, to, *keep_fentry)?).map(one)
            }
            Patch::StaticKey { static_key, enable } => {
                expand::static_key::expand(kernel, text, static_key, *enable)
            }
            Patch::StaticCall { static_call, target } => {
                expand::static_call::expand(kernel, text, static_call, target)
            }
            Patch::Alternatives { alternatives, enable } => {
                expand::alternatives::expand(kernel, text, alternatives, *enable)
            }
            Patch::SmpLocks { smp_locks, force } => {
                expand::smp_locks::expand(kernel, text, *smp_locks, self.vcpus, *force)
            }
            Patch::Paravirt { to } => expand::paravirt::expand(kernel, text, *to),
        }
    }

    /// Code in a function that the guest replaced would be patched in vain.
    fn executed(&self, code: Code) -> Result<Code, Refusal> {
        match self.livepatched.iter().find(|function| function.contains(&code.at)) {
            Some(function) => Err(Refusal::Livepatched { function: function.start }),
            None => Ok(code),
        }
    }

    fn raw(&self, at: &str, expect: &[u8], replace: &[u8]) -> Result<Code, Refusal> {
        let at = self.kernel.address(at)?;
        if replace.len() > expect.len() {
            return Err(Refusal::ReplacementTooLong { replacement: replace.len(), site: expect.len() });
        }
        if insn::count(replace, at).is_none() {
            return Err(Refusal::ReplacementUndecodable { bytes: replace.to_vec() });
        }
        expand::verify(self.text, at, expect)?;
        let mut new = replace.to_vec();
        new.extend(insn::nops(expect.len() - replace.len()));
        Ok(Code { at, old: expect.to_vec(), new })
    }

    fn redirect(&self, from: &str, to: &str, keep_fentry: bool) -> Result<Code, Refusal> {
        let (from, to) = (self.kernel.address(from)?, self.kernel.address(to)?);
        let entry = read(self.text, from, insn::MARKER + insn::FENTRY + JMP_REL32 + insn::MAX_LENGTH)?;
        let mut skip = insn::marker(&entry);
        // The guest checks what it left where it calls the tracer, and gives up on tracing
        // altogether if that is something else.
        let is_fentry = from.plus(skip).is_some_and(|at| self.kernel.is_fentry(at));
        let in_use = entry[skip] == CALL;
        if is_fentry && (keep_fentry || in_use) {
            skip += insn::FENTRY;
        }
        let at = from.plus(skip).ok_or(Refusal::Unmapped { at: from })?;
        let mut length = 0;
        for insn in insn::decode(&entry[skip..], at) {
            length += insn.len;
            if length >= JMP_REL32 {
                break;
            }
        }
        let jump = insn::jmp_rel32(at, to).ok_or(Refusal::OutOfReach { at, to })?;
        let old = entry[skip..].get(..length.max(JMP_REL32)).unwrap_or(&entry[skip..]).to_vec();
        let mut new = jump.to_vec();
        new.extend(insn::nops(old.len().saturating_sub(JMP_REL32)));
        Ok(Code { at, old, new })
    }

    /// Checks a site against the instructions around it. `named` is how the plan calls the
    /// function, if it does.
    fn site(
        &self,
        pointer: &Pointer,
        named: Option<&str>,
        Code { at, old, new }: Code,
        needs: Needs,
    ) -> Result<Site, Refusal> {
        let end = at.plus(old.len()).ok_or(Refusal::Unmapped { at })?;
        let function = self.kernel.function_at(at).ok_or(Refusal::NotText { at })?;
        if end > function.end {
            return Err(Refusal::NotText { at: function.end });
        }
        // What is there may be its breakpoint, and not what the function is made of.
        unprobed(&self.probes, at, end)?;
        // Where the kernel itself replaces one instruction by another, both are known already; to
        // decode thousands of functions takes longer than to patch them.
        if !self.kernel.is_patched_by_itself(at) || insn::count(&old, at) != Some(1) {
            self.shape(&function)?.holds(at, end, &function)?;
        }
        if insn::count(&new, at).is_none() {
            return Err(Refusal::ReplacementUndecodable { bytes: new });
        }
        if old == new {
            return Err(Refusal::NothingToDo { at });
        }
        let (old_inside, new_inside) = (boundaries(&old, at), boundaries(&new, at));
        // What is called at a site of spinlocks does not sleep.
        let calls_sleep = needs != Needs::Unlocked;
        self.sleepers.keep_out(&old, at, &old_inside, calls_sleep)?;
        self.sleepers.keep_out(&new, at, &new_inside, calls_sleep)?;
        let may_fault = self.bypass && self.kernel.may_fault(at);
        let offset = at.offset_from(function.start).unwrap_or(0);
        // Of several names of a function, the plan's own is the one that its author knows.
        let is_its =
            |named: &&str| *named != function.name && self.kernel.symbol(named) == Ok(function.start);
        let known = named.filter(is_its);
        let name = known.unwrap_or(function.name);
        let symbol = if offset == 0 { name.to_owned() } else { format!("{name}+{offset:#x}") };
        Ok(Site { pointer: pointer.clone(), at, symbol, old, new, old_inside, new_inside, may_fault })
    }

    fn shape(&self, function: &Function<'_>) -> Result<Rc<Shape>, Refusal> {
        if let Some(shape) = self.shapes.borrow().get(&function.start) {
            return Ok(shape.clone());
        }
        let size = function.end.offset_from(function.start).unwrap_or(0);
        if size > MAX_FUNCTION {
            return Err(Refusal::NotText { at: function.start });
        }
        let code = read(self.text, function.start, size)?;
        let shape = Rc::new(Shape::of(&code, function.start));
        self.shapes.borrow_mut().insert(function.start, shape.clone());
        Ok(shape)
    }
}

/// What a function is made of, as far as sites are concerned.
struct Shape {
    /// Where its instructions begin, and the last one ends.
    boundaries: Vec<Gva>,
    /// Branches to places inside it: from where to where.
    branches: Vec<(Gva, Gva)>,
}

impl Shape {
    fn of(code: &[u8], start: Gva) -> Self {
        /// Most functions have longer instructions on average, in bytes.
        const TYPICAL: usize = 3;
        let end = start.0.saturating_add(code.len() as u64);
        let mut shape = Self { boundaries: Vec::with_capacity(code.len() / TYPICAL), branches: Vec::new() };
        let mut decoded_to = start;
        for insn in insn::decode(code, start) {
            shape.boundaries.push(insn.at);
            decoded_to = Gva(insn.at.0.saturating_add(insn.len as u64));
            let inside = insn.branch.filter(|to| start < *to && to.0 < end);
            shape.branches.extend(inside.map(|to| (insn.at, to)));
        }
        shape.boundaries.push(decoded_to);
        shape
    }

    /// Checks that a site begins and ends between instructions, and that nobody branches to its
    /// inside.
    fn holds(&self, at: Gva, end: Gva, function: &Function<'_>) -> Result<(), Refusal> {
        self.boundary(at, function)?;
        self.boundary(end, function)?;
        match self.branches.iter().find(|(_, to)| at < *to && *to < end) {
            Some(&(from, to)) => Err(Refusal::BranchIntoSite { from, to }),
            None => Ok(()),
        }
    }

    /// Checks that `at` is where an instruction begins, or the last one ends.
    fn boundary(&self, at: Gva, function: &Function<'_>) -> Result<(), Refusal> {
        match self.boundaries.binary_search(&at) {
            Ok(_) => Ok(()),
            Err(behind) if behind == self.boundaries.len() => {
                let at = self.boundaries.last().copied().unwrap_or(function.start);
                Err(Refusal::Undecodable { function: function.name.to_owned(), at })
            }
            Err(behind) => {
                let begins = self.boundaries[..behind].last().copied().unwrap_or(function.start);
                Err(Refusal::InsideInstruction { at, begins })
            }
        }
    }
}

const JMP_REL32: usize = 5;
/// Opcode of `call rel32`.
const CALL: u8 = 0xe8;
