//! A jump from a function's entry to another function.
//!
//! It takes the place of the fentry call. The guest's function tracer compares what it left there
//! and gives up tracing altogether if it finds something else (Linux arch/x86/kernel/ftrace.c,
//! `ftrace_verify_code`), so the jump goes behind the fentry call while tracing is in use there.

use crate::addr::Gva;
use crate::insn;
use crate::linux::memory::{GuestMemory, read};
use crate::linux::view::Kernel;
use crate::plan::refusal::Refusal;
use crate::resolve::expand::expansion::{Code, Expansion};

/// Length of `jmp rel32`, in bytes.
const JMP_REL32: usize = 5;

/// Replaces whole instructions at the entry of `from` by a jump to `to`, padded with NOPs.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    from: &str,
    to: &str,
    keep_fentry: bool,
) -> Result<Expansion, Refusal> {
    let (from, to) = (kernel.address(from)?, kernel.address(to)?);
    Ok(Expansion::of(jump(kernel, text, from, to, keep_fentry)?))
}

/// The jump to `to` at the entry of the function at `from`.
pub(super) fn jump(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    from: Gva,
    to: Gva,
    keep_fentry: bool,
) -> Result<Code, Refusal> {
    let entry = read(text, from, insn::MARKER + insn::FENTRY + JMP_REL32 + insn::MAX_LENGTH)?;
    let mut skip = insn::marker(&entry);
    let in_use = entry[skip] == insn::CALL;
    let is_fentry = from.plus(skip).is_some_and(|at| is_fentry(kernel, at, &entry[skip..]));
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

/// What the fentry call of a function that is traced goes to, if it is not a trampoline of its own (Linux
/// arch/x86/kernel/ftrace_64.S).
const TRACERS: [&str; 3] = ["ftrace_caller", "ftrace_regs_caller", "__fentry__"];

/// Whether a fentry call, or the NOP in its place, is at `at`, where `code` is. A module's list of them is not
/// read: there, it is a NOP of five bytes, or a call of the tracer or of what is in no function.
fn is_fentry(kernel: &Kernel<'_>, at: Gva, code: &[u8]) -> bool {
    if kernel.module_at(at).is_none() {
        return kernel.is_fentry(at);
    }
    let target = insn::decode(code, at).next().and_then(|insn| insn.branch);
    match (code.first(), target) {
        (Some(&insn::CALL), Some(to)) => {
            kernel.function_at(to).is_none_or(|function| TRACERS.contains(&function.name))
        }
        _ => code.starts_with(&insn::nops(insn::FENTRY)),
    }
}
