//! Lock prefixes, which a guest with one vCPU does not need (Linux
//! arch/x86/kernel/alternative.c, `alternatives_smp_lock`).

use crate::insn;
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read};
use crate::plan::refusal::Refusal;
use crate::resolve::expand::expansion::{Code, Expansion, Needs};

const LOCK: u8 = 0xf0;
/// A segment prefix without an effect in 64-bit mode.
const DS: u8 = 0x3e;

/// Turns every prefix into `lock`, or into one without an effect.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    lock: bool,
    vcpus: usize,
    force: bool,
) -> Result<Expansion, Refusal> {
    if !lock && vcpus > 1 && !force {
        return Err(Refusal::NeedsOneVcpu { vcpus });
    }
    let table = kernel.image.tables().smp_locks.as_ref();
    let table = table.ok_or(Refusal::UnknownSymbol { name: "__smp_locks".into() })?;
    let end = kernel.image.text_end().ok_or(Refusal::UnknownSymbol { name: "_etext".into() })?;
    let (start, end) = (kernel.live(kernel.image.text_base()), kernel.live(end));
    let (old, new) = if lock { (DS, LOCK) } else { (LOCK, DS) };
    let mut code = Vec::new();
    // The table is padded to whole pages.
    for at in table.iter().map(|at| kernel.live(*at)).filter(|at| start <= *at && *at < end) {
        let bytes = read(text, at, insn::MAX_LENGTH)?;
        let Some(insn) = insn::decode(&bytes, at).next() else {
            return Err(Refusal::ExpectMismatch { at, expected: vec![old], found: bytes });
        };
        // The guest may have replaced the instruction by an alternative.
        if bytes[0] == old {
            let old = bytes[..insn.len].to_vec();
            code.push(Code { at, new: [&[new], &old[1..]].concat(), old });
        }
    }
    if code.is_empty() {
        return Err(Refusal::NothingToDo { at: start });
    }
    Ok(Expansion { code, needs: Needs::Group, ..Expansion::default() })
}
