//! Checking the code of a site against the guest around it.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use crate::addr::Gva;
use crate::image::landings::Landings;
use crate::image::symbols::Function;
use crate::insn;
use crate::linux::kprobes::{among, probes};
use crate::linux::livepatches::livepatched;
use crate::linux::memory::{GuestMemory, read};
use crate::linux::view::Kernel;
use crate::plan::refusal::{Pointer, Refusal};
use crate::resolve::expand::{Code, Needs};
use crate::resolve::required;
use crate::resolve::shape::Shape;
use crate::safety::interior::{Sleepers, boundaries};
use crate::site::Site;

/// Functions longer than this, in bytes, are not decoded.
const MAX_FUNCTION: usize = 1 << 20;

/// Modules with more text than this, in bytes, are not decoded. kvm has 1 MiB.
const MAX_MODULE: usize = 32 << 20;

/// Symbols of the padding before functions begin so (Linux tools/objtool, `--prefix`; kCFI).
const PADDING: [&str; 2] = ["__pfx_", "__cfi_"];

/// What the sites of one plan are checked with.
pub(crate) struct SiteChecker<'a> {
    kernel: Kernel<'a>,
    text: &'a dyn GuestMemory,
    sleepers: Sleepers<'a>,
    /// Where the guest has kprobes.
    probes: Vec<Gva>,
    /// Functions that the guest's own livepatches replace, read when first needed.
    livepatched: OnceCell<Result<Vec<Range<Gva>>, Refusal>>,
    /// Whether a copy of the old instruction may be executed elsewhere.
    bypass: bool,
    /// Shapes by function start: a plan of thousands of sites has many in one function.
    shapes: RefCell<HashMap<Gva, Rc<Shape>>>,
    /// What the code of modules leads to, by where a module's text begins.
    of_modules: RefCell<HashMap<Gva, Landings>>,
}

impl<'a> SiteChecker<'a> {
    /// Reads the guest's kprobes.
    pub(crate) fn new(kernel: Kernel<'a>, text: &'a dyn GuestMemory, bypass: bool) -> Result<Self, Refusal> {
        Ok(Self {
            probes: probes(&kernel, text)?,
            livepatched: OnceCell::new(),
            sleepers: Sleepers::new(kernel, text),
            kernel,
            text,
            bypass,
            shapes: RefCell::default(),
            of_modules: RefCell::default(),
        })
    }

    /// Refuses code whose place was chosen by the plan, not by the kernel's tables, where a livepatch of
    /// the guest has replaced the function: it would never be executed.
    pub(crate) fn chosen(&self, code: &Code) -> Result<(), Refusal> {
        let livepatched = self.livepatched.get_or_init(|| livepatched(&self.kernel, self.text));
        let livepatched = livepatched.as_ref().map_err(Clone::clone)?;
        match livepatched.iter().find(|function| function.contains(&code.at)) {
            Some(function) => Err(Refusal::Livepatched { function: function.start }),
            None => Ok(()),
        }
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
        // No task is in a function that is replaced as a whole, and none enters it but by its entry: what leads to the
        // inside of the site, and where tasks stand there, does not matter.
        let is_left = needs == Needs::Left;
        if let Some((from, to)) = self.kernel.landing_inside(at, end).filter(|_| !is_left) {
            return Err(Refusal::BranchIntoSite { from, to });
        }
        // Where the kernel replaces one instruction by another itself, the boundaries are known.
        // Decoding thousands of functions would take longer than patching them.
        let is_one = insn::count(&old, at) == Some(1);
        if is_left {
            self.shape(&function)?.bounds(at, end, &function)?;
        } else if !self.kernel.is_patched_by_itself(at) || !is_one {
            let shape = self.shape(&function)?;
            shape.holds(at, end, &function)?;
            if !is_one {
                self.entered_at_its_first(&function, &shape, &old, at, end)?;
            }
        }
        if insn::count(&new, at).is_none() {
            return Err(Refusal::ReplacementUndecodable { bytes: new });
        }
        if old == new {
            return Err(Refusal::NothingToDo { at });
        }
        let (old_inside, new_inside) = match is_left {
            true => (Vec::new(), Vec::new()),
            false => (boundaries(&old, at), boundaries(&new, at)),
        };
        if !old_inside.is_empty() || !new_inside.is_empty() {
            required::several_instructions(self.kernel.image.profile())?;
        }
        // Where spinlocks are taken and released no task sleeps or is preempted (`expand::paravirt`).
        let may_leave = needs != Needs::Unlocked;
        if !is_left {
            self.sleepers.keep_out(&old, at, &old_inside, may_leave)?;
            self.sleepers.keep_out(&new, at, &new_inside, may_leave)?;
        }
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

    /// Refuses several instructions that execution may enter behind the first, as far as neither the
    /// image's landings nor the function's own branches tell.
    fn entered_at_its_first(
        &self,
        function: &Function<'_>,
        shape: &Shape,
        old: &[u8],
        at: Gva,
        end: Gva,
    ) -> Result<(), Refusal> {
        let inside = insn::decode(old, at).map(|insn| insn.at).nth(1).unwrap_or(end);
        let refuse = |why| Err(Refusal::InteriorReachable { at, inside, why });
        // Linux arch/x86/kernel/callthunks.c, `patch_dest`; FineIBT: arch/x86/include/asm/cfi.h.
        if PADDING.iter().any(|prefix| function.name.starts_with(prefix)) {
            return refuse("calls may enter the padding before a function anywhere");
        }
        // Proposed: linux-kernel, Peter Zijlstra, 2024-09-27, `apply_direct_call_offset`.
        if at == function.start && insn::marker(old) != 0 {
            return refuse("direct calls may go behind the marker of indirect branches");
        }
        let Some(module) = self.kernel.module_at(at) else { return Ok(()) };
        if shape.indirect().is_some() && !self.kernel.has_thunks() {
            return refuse("the module's function jumps to where a table may say");
        }
        if !self.of_modules.borrow().contains_key(&module.text.start) {
            let size = module.text.end.offset_from(module.text.start).unwrap_or(0);
            if size > MAX_MODULE {
                return Err(Refusal::BadModules { why: "the text is too long to be decoded" });
            }
            let code = read(self.text, module.text.start, size)?;
            let landings = Landings::of_code(&code, module.text.start, &module.symbols);
            self.of_modules.borrow_mut().insert(module.text.start, landings);
        }
        match self.of_modules.borrow().get(&module.text.start).and_then(|landings| landings.inside(at, end)) {
            Some((from, to)) => Err(Refusal::BranchIntoSite { from, to }),
            None => Ok(()),
        }
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
