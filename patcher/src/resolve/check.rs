//! Checking the code of a site against the guest around it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use crate::addr::Gva;
use crate::image::landings::{Landings, branches_out, is_cold};
use crate::image::symbols::Function;
use crate::insn;
use crate::linux::kprobes::{among, probes};
use crate::linux::livepatches::livepatched;
use crate::linux::memory::{GuestMemory, read};
use crate::linux::view::Kernel;
use crate::plan::refusal::{Pointer, Refusal};
use crate::resolve::expand::{Code, Needs};
use crate::resolve::shape::Shape;
use crate::safety::interior::{Sleepers, boundaries};
use crate::site::Site;

/// Functions longer than this, in bytes, are not decoded.
const MAX_FUNCTION: usize = 1 << 20;

/// What the sites of one plan are checked with.
pub(crate) struct SiteChecker<'a> {
    kernel: Kernel<'a>,
    text: &'a dyn GuestMemory,
    sleepers: Sleepers<'a>,
    /// Where the guest has kprobes.
    probes: Vec<Gva>,
    /// Functions that the guest's own livepatches replace.
    livepatched: Vec<Range<Gva>>,
    /// Whether a copy of the old instruction may be executed elsewhere.
    bypass: bool,
    /// Shapes by function start: a plan of thousands of sites has many in one function.
    shapes: RefCell<HashMap<Gva, Rc<Shape>>>,
    /// What the `.cold` parts of modules branch to, by where a module's text begins.
    cold: RefCell<HashMap<Gva, Landings>>,
}

impl<'a> SiteChecker<'a> {
    /// Reads the guest's kprobes and livepatches.
    pub(crate) fn new(kernel: Kernel<'a>, text: &'a dyn GuestMemory, bypass: bool) -> Result<Self, Refusal> {
        Ok(Self {
            probes: probes(&kernel, text)?,
            livepatched: livepatched(&kernel, text)?,
            sleepers: Sleepers::new(kernel, text),
            kernel,
            text,
            bypass,
            shapes: RefCell::default(),
            cold: RefCell::default(),
        })
    }

    /// Refuses code whose place was chosen by the plan, not by the kernel's tables: where a livepatch of
    /// the guest has replaced the function, it would never be executed; in a `.cold` part, which the rest
    /// of the function branches into, more than one instruction may be entered in the middle.
    pub(crate) fn chosen(&self, code: &Code) -> Result<(), Refusal> {
        if let Some(function) = self.livepatched.iter().find(|function| function.contains(&code.at)) {
            return Err(Refusal::Livepatched { function: function.start });
        }
        let function = self.kernel.function_at(code.at);
        if function.is_some_and(|function| is_cold(function.name))
            && let Some(inside) = insn::decode(&code.old, code.at).map(|insn| insn.at).nth(1)
        {
            let why = "the function branches into its .cold part";
            return Err(Refusal::InteriorReachable { at: code.at, inside, why });
        }
        Ok(())
    }

    /// Checks code against the instructions around it. `named` is the function's name in the plan,
    /// if the plan has one.
    pub(crate) fn site(
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
        // Checked before decoding: the text may hold the kprobe's `int3` or jump.
        unprobed(&self.probes, at, end)?;
        let landing = match self.kernel.landing_inside(at, end) {
            None => self.landing_from_cold_part(at, end)?,
            landing => landing,
        };
        if let Some((from, to)) = landing {
            return Err(Refusal::BranchIntoSite { from, to });
        }
        // Where the kernel replaces one instruction by another itself, the boundaries are known.
        // Decoding thousands of functions would take longer than patching them.
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
        // Where spinlocks are taken and released no task sleeps or is preempted (`expand::paravirt`).
        let may_leave = needs != Needs::Unlocked;
        self.sleepers.keep_out(&old, at, &old_inside, may_leave)?;
        self.sleepers.keep_out(&new, at, &new_inside, may_leave)?;
        let may_fault = self.bypass && self.kernel.may_fault(at);
        let offset = at.offset_from(function.start).unwrap_or(0);
        // Of several names of a function, report the one that the plan uses.
        let is_its =
            |named: &&str| *named != function.name && self.kernel.symbol(named) == Ok(function.start);
        let known = named.filter(is_its);
        let name = known.unwrap_or(function.name);
        let symbol = if offset == 0 { name.to_owned() } else { format!("{name}+{offset:#x}") };
        Ok(Site { pointer: pointer.clone(), at, symbol, old, new, old_inside, new_inside, may_fault })
    }

    /// A branch of a module's `.cold` parts to the inside of a site: from where, to where.
    fn landing_from_cold_part(&self, at: Gva, end: Gva) -> Result<Option<(Gva, Gva)>, Refusal> {
        // Those of the image are known from the image.
        let Some(module) = self.kernel.module_at(at) else { return Ok(None) };
        if let Some(landings) = self.cold.borrow().get(&module.text.start) {
            return Ok(landings.inside(at, end));
        }
        let mut branches = Vec::new();
        for part in module.cold_parts()? {
            let size = part.end.offset_from(part.start).unwrap_or(0);
            branches.extend(branches_out(&read(self.text, part.start, size)?, part.start));
        }
        let landings = Landings::new(&[], branches);
        let inside = landings.inside(at, end);
        self.cold.borrow_mut().insert(module.text.start, landings);
        Ok(inside)
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

/// Refuses a range of bytes in which the guest has a kprobe.
pub(crate) fn unprobed(probes: &[Gva], at: Gva, end: Gva) -> Result<(), Refusal> {
    among(probes, at, end).map_or(Ok(()), |probe| Err(Refusal::Probed { at, probe }))
}
