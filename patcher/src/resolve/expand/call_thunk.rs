//! Call thunks: with call depth tracking a direct call goes to code right before the called function,
//! which counts the call (Linux arch/x86/kernel/callthunks.c, since 6.2).

use crate::addr::Gva;
use crate::insn::{self, call_rel32};
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read};
use crate::resolve::expand::rewrite::{moved, referred_to};

/// Where the addresses of the kernel are.
const UPPER_HALF: u64 = 1 << 63;

/// The thunk of a function, if the kernel has put one before it.
pub(super) fn thunk(kernel: &Kernel<'_>, text: &dyn GuestMemory, function: Gva) -> Option<Gva> {
    let (from, code) = kernel.image.call_forms().thunk.as_ref()?;
    let at = Gva(function.0.checked_sub(code.len() as u64)?);
    // The counter is a CPU's own. Up to 6.14 such symbols are small numbers, which KASLR leaves alone.
    let slides = referred_to(code, *from)?.0 & UPPER_HALF != 0;
    let expected = moved(code, if slides { kernel.live(*from) } else { *from }, at)?;
    (read(text, at, code.len()).ok()? == expected).then_some(at)
}

/// The same code, if it begins with a call of a function that has a thunk, with a call of the thunk.
pub(super) fn through_thunk(kernel: &Kernel<'_>, text: &dyn GuestMemory, code: &[u8], at: Gva) -> Vec<u8> {
    let first = insn::decode(code, at).next().filter(|first| code[0] == insn::CALL && first.returns);
    let thunk = first.and_then(|first| thunk(kernel, text, first.branch?));
    let mut code = code.to_vec();
    if let Some(call) = thunk.and_then(|thunk| call_rel32(at, thunk)) {
        code[..call.len()].copy_from_slice(&call);
    }
    code
}
