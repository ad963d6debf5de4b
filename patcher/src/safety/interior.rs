//! Sites of several instructions: can a task return to a boundary inside?
//!
//! A vCPU's position can be read (strategy `inspect`). That of a task that is not running cannot.
//! Such a task can't be inside if no call inside the site returns there, no instruction there is in
//! the exception table, and the kernel does not preempt tasks in kernel mode.

use std::cell::OnceCell;

use crate::addr::Gva;
use crate::image::banner::Banner;
use crate::insn::{self, Insn};
use crate::linux::{GuestMemory, Kernel};
use crate::plan::refusal::Refusal;

/// The reachable instruction boundaries inside `code`, which is at `at`.
#[must_use]
pub fn boundaries(code: &[u8], at: Gva) -> Vec<Gva> {
    let insns: Vec<Insn> = insn::decode(code, at).collect();
    let mut reached = true;
    let mut inside = Vec::new();
    for (i, insn) in insns.iter().enumerate() {
        reached |= insns.iter().any(|from| from.branch == Some(insn.at));
        if i > 0 && reached {
            inside.push(insn.at);
        }
        // Code behind a jump is reached only by another branch.
        reached &= !insn.ends;
    }
    inside
}

/// Why a task may come back to the inside of a site on a preemptible kernel.
pub(crate) const PREEMPTED: &str = "the kernel preempts tasks in kernel mode";

/// Whether tasks that are not running may return to a place. What the guest says of preemption is
/// read when first needed.
pub(crate) struct Sleepers<'a> {
    kernel: Kernel<'a>,
    text: &'a dyn GuestMemory,
    preempts: OnceCell<bool>,
}

impl<'a> Sleepers<'a> {
    pub(crate) fn new(kernel: Kernel<'a>, text: &'a dyn GuestMemory) -> Self {
        Self { kernel, text, preempts: OnceCell::new() }
    }

    /// Refuses `code` at `at` if such a task may return to one of the boundaries `inside`.
    /// `may_leave` tells whether a task may stop running there otherwise than by a fault: because a
    /// called function sleeps, or by preemption.
    pub(crate) fn keep_out(
        &self,
        code: &[u8],
        at: Gva,
        inside: &[Gva],
        may_leave: bool,
    ) -> Result<(), Refusal> {
        if inside.is_empty() {
            return Ok(());
        }
        let insns: Vec<Insn> = insn::decode(code, at).collect();
        let comes_back = |boundary: Gva| {
            let before = insns.iter().find(|insn| insn.at.plus(insn.len) == Some(boundary));
            if may_leave && before.is_some_and(|insn| insn.returns || self.kernel.may_call(insn.at)) {
                return Some("the call before it returns there");
            }
            if self.kernel.may_fault(boundary) {
                return Some("its instruction may be in the kernel's exception table");
            }
            (may_leave && self.preempts()).then_some(PREEMPTED)
        };
        match inside.iter().find_map(|&boundary| Some((boundary, comes_back(boundary)?))) {
            Some((inside, why)) => Err(Refusal::InteriorReachable { at, inside, why }),
            None => Ok(()),
        }
    }

    fn preempts(&self) -> bool {
        *self.preempts.get_or_init(|| preempts(self.kernel, self.text))
    }
}

/// Whether tasks are preempted in kernel mode. Yes, if that is not known.
#[must_use]
pub fn preempts(kernel: Kernel<'_>, text: &dyn GuestMemory) -> bool {
    read_preempts(kernel, text).unwrap_or(true)
}

fn banner(kernel: Kernel<'_>) -> Option<&str> {
    kernel.image.banner().map(Banner::text)
}

/// `linux_banner` names the build's preemption model; with `PREEMPT_DYNAMIC` it is chosen at boot
/// (Linux kernel/sched/core.c, `preempt_dynamic_mode`: 0 none, 1 voluntary).
fn read_preempts(kernel: Kernel<'_>, text: &dyn GuestMemory) -> Option<bool> {
    let banner = banner(kernel)?;
    if !banner.contains("PREEMPT_DYNAMIC") {
        return Some(banner.contains("PREEMPT"));
    }
    let mut mode = [0; 4];
    text.read(kernel.symbol("preempt_dynamic_mode").ok()?, &mut mode).ok()?;
    Some(!(0..=1).contains(&i32::from_le_bytes(mode)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boundaries_are_where_control_can_come() {
        let at = Gva(0x1000);
        for (code, expected) in [
            (&[0x90][..], &[][..]),
            (&[0x90, 0x90, 0x90], &[0x1001, 0x1002]),
            (&[0xeb, 0x10, 0x90], &[]),
            (&[0xc3, 0x90, 0x90], &[]),
            // jne back to the nop behind the jump
            (&[0x75, 0x02, 0xeb, 0x10, 0x90, 0x90], &[0x1002, 0x1004, 0x1005]),
            (&[0xe8, 0, 0, 0, 0, 0x90], &[0x1005]),
        ] {
            let found: Vec<u64> = boundaries(code, at).into_iter().map(|at| at.0).collect();
            assert_eq!(found, expected, "{}", insn::hex(code));
        }
    }
}
