//! A static call: direct calls and tail jumps that are retargeted together (Linux
//! kernel/static_call_inline.c, arch/x86/kernel/static_call.c).
//!
//! Each update has an immutable trap table of its own. A vCPU that hit a site in transit goes to the
//! target of that update, however many updates follow before it resumes. So successive updates need
//! not wait for each other.

use crate::addr::Gva;
use crate::insn::{self, call_rel32, jcc_rel32, jmp_rel32};
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u64};
use crate::plan::refusal::Refusal;
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
    let new = if target == NOTHING { Gva(0) } else { kernel.address(target)? };
    let old = Gva(read_u64(text, key)?);
    if old == new {
        return Err(Refusal::NothingToDo { at: key });
    }
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
    let word = |to: Gva| to.0.to_le_bytes().to_vec();
    Ok(Expansion {
        code,
        data: vec![Datum { at: key, old: word(old), new: word(new) }],
        ..Expansion::default()
    })
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
        verify(self.text, at, &expected)?;
        Ok(expected)
    }

    fn form(&self, at: Gva, kind: Kind, target: Gva) -> Result<Vec<u8>, Refusal> {
        let out_of_reach = |to| Refusal::OutOfReach { at, to };
        let nowhere = target == Gva(0);
        Ok(match kind {
            Kind::Call if nowhere => insn::nops(RETURN_0.len()),
            Kind::Call if Some(target) == self.return_0 => RETURN_0.to_vec(),
            Kind::Call => call_rel32(at, target).ok_or_else(|| out_of_reach(target))?.to_vec(),
            Kind::Tail if nowhere => match self.return_thunk()? {
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
