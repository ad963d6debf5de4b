//! Forms of static calls that the kernel has its own code for (Linux arch/x86/kernel/static_call.c,
//! `__static_call_transform`; arch/x86/kernel/callthunks.c).

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;

/// Functions whose call is replaced by one instruction, and the kernel's constants that hold it: a trap
/// (6.19 and later) and the release of a spinlock (7.3 and later).
const INSTEAD: [(&str, &str); 2] =
    [("__WARN_trap", "warninsn"), ("__raw_callee_save___native_queued_spin_unlock", "unlockinsn")];
/// The code of a call thunk, and its end (`SKL_TMPL_SIZE`, since 6.2).
const THUNK: (&str, &str) = ("skl_call_thunk_template", "skl_call_thunk_tail");
/// No thunk is longer, in bytes: it lies in the padding before a function
/// (`CONFIG_FUNCTION_PADDING_BYTES`).
const LONGEST_THUNK: usize = 64;

/// Size of a call, and of what stands instead of it, in bytes.
pub const CALL_SIZE: usize = 5;

/// What the image has. Addresses are link-time addresses.
#[derive(Debug, Default)]
pub struct CallForms {
    /// Functions, and the instruction that stands instead of a call of each.
    pub instead: Vec<(Gva, [u8; CALL_SIZE])>,
    /// Where the code of a call thunk is, and the code. A call goes to its copy right before the called
    /// function if call depth is tracked.
    pub thunk: Option<(Gva, Vec<u8>)>,
}

impl CallForms {
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols) -> Self {
        let instead = |(function, constant): (&str, &str)| {
            let code = vmlinux.bytes(symbols.only(constant)?, CALL_SIZE)?;
            Some((symbols.only(function)?, code.try_into().ok()?))
        };
        let thunk = || {
            let (at, end) = (symbols.only(THUNK.0)?, symbols.only(THUNK.1)?);
            let size = end.offset_from(at).filter(|size| (1..=LONGEST_THUNK).contains(size))?;
            Some((at, vmlinux.bytes(at, size)?.to_vec()))
        };
        Self { instead: INSTEAD.into_iter().filter_map(instead).collect(), thunk: thunk() }
    }
}
