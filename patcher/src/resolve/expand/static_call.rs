//! A static call: direct calls and tail jumps that are retargeted together (Linux
//! kernel/static_call_inline.c, arch/x86/kernel/static_call.c).
//!
//! Each update has an immutable trap table of its own. A vCPU that hit a site in transit goes to the
//! target of that update, however many updates follow before it resumes. So successive updates need
//! not wait for each other.

use crate::addr::Gva;
use crate::image::call_forms::CALL_SIZE;
use crate::insn::{self, call_rel32, jcc_rel32, jmp_rel32};
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u64};
use crate::plan::refusal::Refusal;
use crate::resolve::expand::call_thunk::thunk;
use crate::resolve::expand::expansion::{Code, Datum, Expansion, verify};

/// The target in a plan if nothing is to be called.
pub(crate) const NOTHING: &str = "none";
/// `X86_FEATURE_RETHUNK`: returns are jumps to a thunk (arch/x86/include/asm/cpufeatures.h,
/// since 5.19).
const RETHUNK: u16 = 11 * 32 + 14;
/// `xor eax, eax` of five bytes, where a call of a function that returns 0 would be.
const RETURN_0: [u8; 5] = [0x2e, 0x2e, 0x2e, 0x31, 0xc0];
/// `ret`, padded with `int3`.
const RETURN: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];

/// Makes the call go to `target`: in every caller, in the trampoline, and in the key, which is called
/// through as a pointer.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    name: &str,
    target: &str,
) -> Result<Expansion, Refusal> {
    let (key, trampoline) = kernel.static_call(name)?;
    kernel.modules.none_is_coming(name)?;
    let new = if target == NOTHING { Gva(0) } else { kernel.address(target)? };
    let old = Gva(read_u64(text, key)?);
    if old == new {
        return Err(Refusal::NothingToDo { at: key });
    }
    if kernel.image.lock_ops().is_some_and(|ops| ops.pointers.contains(&kernel.linked(key))) {
        let why = "it changes with the other operations of spinlocks only: use \"paravirt\"";
        return Err(Refusal::Busy { name: name.to_owned(), why: why.into() });
    }
    let word = |to: Gva| to.0.to_le_bytes().to_vec();
    Ok(Expansion {
        code: retarget(kernel, text, (key, trampoline), old, new)?,
        data: vec![Datum { at: key, old: word(old), new: word(new) }],
        ..Expansion::default()
    })
}

/// The code of a call that goes to `old` and will go to `new`: its trampoline's, and its callers'.
pub(super) fn retarget(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    (key, trampoline): (Gva, Option<Gva>),
    old: Gva,
    new: Gva,
) -> Result<Vec<Code>, Refusal> {
    let forms = Forms { kernel, text, return_0: kernel.symbol("__static_call_return0").ok() };
    let mut code = Vec::new();
    if let Some(at) = trampoline {
        code.extend(forms.switch(at, Kind::Tail, old, new)?);
    }
    let sites = kernel.static_call_sites()?.filter(|site| site.key == key && !kernel.is_init(site.code));
    for site in sites {
        let kind = forms.kind(site.code, site.tail)?;
        code.extend(forms.switch(site.code, kind, old, new)?);
    }
    Ok(code)
}

/// The kind of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Call,
    Tail,
    /// A conditional tail call: the low byte of its opcode (since 6.3).
    Conditional(u8),
}

struct Forms<'a> {
    kernel: &'a Kernel<'a>,
    text: &'a dyn GuestMemory,
    return_0: Option<Gva>,
}

impl Forms<'_> {
    fn kind(&self, at: Gva, tail: bool) -> Result<Kind, Refusal> {
        Ok(match (read(self.text, at, 2)?[..].first_chunk(), tail) {
            (Some([0x0f, condition @ 0x80..=0x8f]), true) => Kind::Conditional(*condition),
            (_, true) => Kind::Tail,
            (_, false) => Kind::Call,
        })
    }

    /// `None` if both targets have the same form.
    fn switch(&self, at: Gva, kind: Kind, old: Gva, new: Gva) -> Result<Option<Code>, Refusal> {
        let old = self.current(at, kind, old)?;
        let new = self.form(at, kind, new)?;
        Ok((old != new).then_some(Code { at, old, new }))
    }

    /// The code that is there, which must lead to `target`.
    fn current(&self, at: Gva, kind: Kind, target: Gva) -> Result<Vec<u8>, Refusal> {
        let expected = self.form(at, kind, target)?;
        // It may still be a `ret` from before the kernel switched to return thunks.
        if target == Gva(0) && kind == Kind::Tail && read(self.text, at, RETURN.len())? == RETURN {
            return Ok(RETURN.to_vec());
        }
        // A call of a function that has a thunk goes there if it was made after the thunk.
        if kind == Kind::Call && target != Gva(0) {
            let found = read(self.text, at, CALL_SIZE)?;
            if found == self.without_thunk(at, target)? {
                return Ok(found);
            }
        }
        verify(self.text, at, &expected)?;
        Ok(expected)
    }

    /// A call of a function that has no thunk.
    fn without_thunk(&self, at: Gva, target: Gva) -> Result<Vec<u8>, Refusal> {
        if Some(target) == self.return_0 {
            return Ok(RETURN_0.to_vec());
        }
        let instead = &self.kernel.image.call_forms().instead;
        if let Some((_, code)) = instead.iter().find(|(to, _)| self.kernel.live(*to) == target) {
            return Ok(code.to_vec());
        }
        Ok(call_rel32(at, target).ok_or(Refusal::OutOfReach { at, to: target })?.to_vec())
    }

    fn form(&self, at: Gva, kind: Kind, target: Gva) -> Result<Vec<u8>, Refusal> {
        let out_of_reach = |to| Refusal::OutOfReach { at, to };
        let nowhere = target == Gva(0);
        Ok(match kind {
            Kind::Call if nowhere => insn::nops(RETURN_0.len()),
            // The kernel looks for a thunk first.
            Kind::Call => match thunk(self.kernel, self.text, target) {
                Some(thunk) => call_rel32(at, thunk).ok_or_else(|| out_of_reach(thunk))?.to_vec(),
                None => self.without_thunk(at, target)?,
            },
            Kind::Tail if nowhere => match self.return_thunk()?.filter(|thunk| self.returns_by(*thunk, at)) {
                Some(thunk) => jmp_rel32(at, thunk).ok_or_else(|| out_of_reach(thunk))?.to_vec(),
                None => RETURN.to_vec(),
            },
            Kind::Tail => jmp_rel32(at, target).ok_or_else(|| out_of_reach(target))?.to_vec(),
            Kind::Conditional(condition) => {
                let to = match (nowhere, self.return_thunk()?) {
                    (false, _) => target,
                    (true, Some(thunk)) => thunk,
                    (true, None) => self.kernel.symbol("__static_call_return")?,
                };
                jcc_rel32(condition, at, to).ok_or_else(|| out_of_reach(to))?.to_vec()
            }
        })
    }

    /// Whether a return at a place is a jump to this thunk. The thunk against indirect target selection
    /// is used in the lower half of a cache line only (arch/x86/kernel/alternative.c,
    /// `cpu_wants_rethunk_at`).
    fn returns_by(&self, thunk: Gva, at: Gva) -> bool {
        const UPPER_HALF: u64 = 0x20;
        self.kernel.symbol("its_return_thunk") != Ok(thunk) || at.0 & UPPER_HALF == 0
    }

    /// The thunk that returns jump to, if there is one.
    fn return_thunk(&self) -> Result<Option<Gva>, Refusal> {
        if !self.kernel.has_feature(self.text, RETHUNK)? {
            return Ok(None);
        }
        match self.kernel.symbol("x86_return_thunk") {
            Ok(pointer) => Ok(Some(Gva(read_u64(self.text, pointer)?))),
            Err(_) => self.kernel.symbol("__x86_return_thunk").map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::call_forms::CallForms;
    use crate::image::offsets::Offsets;
    use crate::image::{KernelImage, Symbols};
    use crate::linux::Modules;
    use crate::resolve::expand::rewrite::moved;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const CALLED: Gva = Gva(TEXT + 0x100);
    const OTHER: Gva = Gva(TEXT + 0x200);
    const TEMPLATE: Gva = Gva(TEXT + 0x300);
    const ITS: Gva = Gva(TEXT + 0x400);
    const RETURN_THUNK: u64 = TEXT + 0x500;
    const CPU: u64 = TEXT + 0x600;
    const CAPABILITY: u64 = 0x20;
    const SITE: Gva = Gva(TEXT + 0x800);

    /// sar qword gs:[rip + 0x1000], 5: it must lead to the same word from wherever it is copied to.
    const COUNT: [u8; 9] = [0x65, 0x48, 0xc1, 0x3d, 0, 0x10, 0, 0, 5];

    struct Text([u8; 0x1000]);

    impl GuestMemory for Text {
        fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
            let from = at.offset_from(Gva(TEXT)).ok_or(at)?;
            into.copy_from_slice(self.0.get(from..from + into.len()).ok_or(at)?);
            Ok(())
        }
    }

    impl Text {
        fn put(&mut self, at: Gva, bytes: &[u8]) {
            let from = at.offset_from(Gva(TEXT)).expect("inside");
            self.0[from..from + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn image() -> KernelImage {
        let symbols = [
            (ITS.0, b'T', "its_return_thunk"),
            (RETURN_THUNK, b'D', "x86_return_thunk"),
            (CPU, b'D', "boot_cpu_data"),
        ];
        let symbols = Symbols::new(symbols.into_iter()).expect("few");
        let forms = CallForms {
            instead: vec![(OTHER, [0x3e, 0x3e, 0xc6, 0x07, 0x00])],
            thunk: Some((TEMPLATE, COUNT.to_vec())),
        };
        let offsets = Offsets { capability: Some(CAPABILITY), ..Offsets::default() };
        KernelImage::from_parts("6.12".into(), symbols, Gva(TEXT)).with(offsets, forms)
    }

    /// What becomes of a call of `old`.
    fn switched(text: &Text, kind: Kind, old: Gva, new: Gva) -> Result<Option<Vec<u8>>, Refusal> {
        let image = image();
        let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        let forms = Forms { kernel: &kernel, text, return_0: None };
        Ok(forms.switch(SITE, kind, old, new)?.map(|code| code.new))
    }

    #[test]
    fn a_call_goes_to_the_thunk_that_the_kernel_made() {
        let mut text = Text([0x90; 0x1000]);
        let call = |to| call_rel32(SITE, to).expect("near").to_vec();
        text.put(SITE, &call(CALLED));
        assert_eq!(switched(&text, Kind::Call, CALLED, Gva(TEXT)), Ok(Some(call(Gva(TEXT)))));
        let thunk = Gva(CALLED.0 - COUNT.len() as u64);
        // Copied without being moved it would count elsewhere, so it is none.
        text.put(thunk, &COUNT);
        assert_eq!(
            switched(&text, Kind::Call, Gva(TEXT), CALLED).map_err(|e| e.code()),
            Err("expect_mismatch")
        );
        text.put(thunk, &moved(&COUNT, TEMPLATE, thunk).expect("near"));
        // A call that was made before the thunk leads there all the same.
        assert_eq!(switched(&text, Kind::Call, CALLED, Gva(TEXT)), Ok(Some(call(Gva(TEXT)))));
        text.put(SITE, &call(thunk));
        assert_eq!(switched(&text, Kind::Call, CALLED, Gva(TEXT)), Ok(Some(call(Gva(TEXT)))));
        text.put(SITE, &call(Gva(TEXT)));
        assert_eq!(switched(&text, Kind::Call, Gva(TEXT), CALLED), Ok(Some(call(thunk))));
        // A jump to the function is no call.
        text.put(SITE, &jmp_rel32(SITE, Gva(TEXT)).expect("near"));
        let jump = jmp_rel32(SITE, CALLED).expect("near").to_vec();
        assert_eq!(switched(&text, Kind::Tail, Gva(TEXT), CALLED), Ok(Some(jump)));
    }

    #[test]
    fn a_counter_at_a_small_address_stays_there_when_kaslr_moves_the_kernel() {
        const SLIDE: u64 = 0x100;
        let counter = |at: Gva, to: u64| {
            let distance =
                i32::try_from(to.wrapping_sub(at.0 + COUNT.len() as u64).cast_signed()).expect("near");
            let mut code = COUNT;
            code[4..8].copy_from_slice(&distance.to_le_bytes());
            code.to_vec()
        };
        let function = Gva(CALLED.0 + SLIDE);
        let at = Gva(function.0 - COUNT.len() as u64);
        for (linked, live) in [(0x40, 0x40), (TEXT + 0x40, TEXT + 0x40 + SLIDE)] {
            let template = counter(TEMPLATE, linked);
            let forms = CallForms { instead: Vec::new(), thunk: Some((TEMPLATE, template)) };
            let image = image().with(Offsets::default(), forms);
            let kernel = Kernel { image: &image, slide: SLIDE, modules: &Modules::NONE };
            let mut text = Text([0x90; 0x1000]);
            assert_eq!(thunk(&kernel, &text, function), None);
            text.put(at, &counter(at, live));
            assert_eq!(thunk(&kernel, &text, function), Some(at), "{linked:#x}");
        }
    }

    #[test]
    fn an_instruction_stands_instead_of_some_calls() {
        let mut text = Text([0x90; 0x1000]);
        text.put(SITE, &call_rel32(SITE, CALLED).expect("near"));
        let unlock = vec![0x3e, 0x3e, 0xc6, 0x07, 0x00];
        assert_eq!(switched(&text, Kind::Call, CALLED, OTHER), Ok(Some(unlock.clone())));
        text.put(SITE, &unlock);
        let call = call_rel32(SITE, CALLED).expect("near").to_vec();
        assert_eq!(switched(&text, Kind::Call, OTHER, CALLED), Ok(Some(call)));
        assert_eq!(switched(&text, Kind::Call, CALLED, OTHER).map_err(|e| e.code()), Err("expect_mismatch"));
    }

    #[test]
    fn returns_in_the_upper_half_of_a_cache_line_need_no_thunk_against_its() {
        let mut text = Text([0x90; 0x1000]);
        text.put(Gva(CPU), &[0xff; 0x100]);
        let jump = |at, to| jmp_rel32(at, to).expect("near").to_vec();
        let image = image();
        let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        for (thunk, at, new) in [
            (ITS, SITE, jump(SITE, ITS)),
            (ITS, Gva(SITE.0 + 0x3f), RETURN.to_vec()),
            (OTHER, Gva(SITE.0 + 0x3f), jump(Gva(SITE.0 + 0x3f), OTHER)),
        ] {
            text.put(Gva(RETURN_THUNK), &thunk.0.to_le_bytes());
            text.put(at, &jump(at, CALLED));
            let forms = Forms { kernel: &kernel, text: &text, return_0: None };
            let code = forms.switch(at, Kind::Tail, CALLED, Gva(0)).expect("it fits").expect("a change");
            assert_eq!(code.new, new, "{at}");
        }
    }
}
