//! The text guard's judgement: what becomes of a write of the guest's to guarded text.
//!
//! A write that touches no site of an applied patch is done as it is. One that does may leave
//! code behind that nobody wrote: the guest may have remembered an instruction before it was
//! patched and put back its first byte only, as kprobes do. Whatever the policy, that must
//! not happen. Nor can a write simply be left out: `text_poke` compares afterwards and panics
//! (Linux arch/x86/kernel/alternative.c, `__text_poke`). So what the guest's own patcher
//! writes is done, and the policy says what is done about it once it has let go of its locks;
//! only what somebody else writes can be dropped. `docs/guard.md` has the table.

use serde::{Deserialize, Serialize};

use crate::addr::Gva;
use crate::insn::{self, INT3};

/// What to do when the guest changes the sites of a patch that is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The guest has its way: the patch is given up where it was replaced.
    #[default]
    Yield,
    /// The patch is put back. What the guest wrote is what reverting it restores.
    Rebase,
    /// The patch is put back, and reverting it restores what was there before. Who is not
    /// the kernel's own patcher writes nothing.
    Deny,
}

/// A site of an applied patch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Its first byte.
    pub at: Gva,
    /// What the guest believes to be there, if it looked before the patch.
    pub old: Vec<u8>,
    /// What is there.
    pub new: Vec<u8>,
    /// What to do about writes.
    pub policy: Policy,
}

/// A write that touches a site.
#[derive(Debug, Clone, Copy)]
pub struct Touch<'a> {
    /// What the site holds now, all of it.
    pub now: &'a [u8],
    /// What it will hold after the write.
    pub after: &'a [u8],
    /// Whether the kernel's own patcher does it.
    pub by_patcher: bool,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is done.
    Perform,
    /// These bytes go behind the site's first one, which is the guest's `int3`; a fence; then
    /// it is done.
    Complete(Vec<u8>),
    /// The patch is taken back first; then it is judged again, and done at any rate.
    StepAside,
    /// It is not done.
    Drop,
}

/// Judges a write.
#[must_use]
pub fn judge(site: &Applied, touch: Touch<'_>) -> Verdict {
    let Touch { now, after, by_patcher } = touch;
    if site.policy == Policy::Deny && !by_patcher {
        return Verdict::Drop;
    }
    let (Some((first, rest)), Some((old, old_rest))) = (after.split_first(), site.old.split_first()) else {
        return Verdict::Perform;
    };
    let behind_int3 = now.first() == Some(&INT3) && *first != INT3;
    if behind_int3 && first == old && after != site.new && rest == &site.new[1..] && rest != old_rest {
        return Verdict::Complete(old_rest.to_vec());
    }
    if now == site.new && splits_an_instruction(site, after) { Verdict::StepAside } else { Verdict::Perform }
}

/// Whether one byte was changed, where an instruction began in the old code and none does in
/// the new.
fn splits_an_instruction(site: &Applied, after: &[u8]) -> bool {
    let mut changed = (0..).zip(site.new.iter().zip(after)).filter(|(_, (new, after))| new != after);
    let (Some((at, _)), None) = (changed.next(), changed.next()) else { return false };
    let begins =
        |code: &[u8]| insn::decode(code, site.at).any(|insn| insn.at.offset_from(site.at) == Some(at));
    begins(&site.old) && !begins(&site.new)
}

/// Whether a site that holds `now` is as `code`, but for breakpoints that the guest has put on
/// it.
#[must_use]
pub fn stands(code: &[u8], now: &[u8]) -> bool {
    code.len() == now.len() && code.iter().zip(now).all(|(code, now)| code == now || *now == INT3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `nopl 0(%rax,%rax,1)`, then a jump, five bytes each.
    const OLD: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
    const NEW: [u8; 5] = [0xe9, 1, 2, 3, 4];
    const AT: Gva = Gva(0x1000);

    fn site(old: &[u8], new: &[u8], policy: Policy) -> Applied {
        Applied { at: AT, old: old.to_vec(), new: new.to_vec(), policy }
    }

    fn verdict(site: &Applied, now: &[u8], after: &[u8], by_patcher: bool) -> Verdict {
        judge(site, Touch { now, after, by_patcher })
    }

    const TRAPPED: [u8; 5] = [INT3, 1, 2, 3, 4];

    #[test]
    fn the_guests_own_protocol_is_left_alone() {
        let site = site(&OLD, &NEW, Policy::Yield);
        let half = [INT3, 0x1f, 0x44, 0, 0];
        for (now, after) in [(NEW, TRAPPED), (TRAPPED, half), (half, OLD), (TRAPPED, NEW), (half, NEW)] {
            assert_eq!(verdict(&site, &now, &after, true), Verdict::Perform, "{now:x?} -> {after:x?}");
        }
    }

    #[test]
    fn a_first_byte_from_before_the_patch_brings_the_rest_with_it() {
        let torn = [OLD[0], 1, 2, 3, 4];
        for policy in [Policy::Yield, Policy::Rebase, Policy::Deny] {
            let site = site(&OLD, &NEW, policy);
            assert_eq!(verdict(&site, &TRAPPED, &torn, true), Verdict::Complete(OLD[1..].to_vec()));
        }
        // Where only the first byte differs nothing is torn.
        let alike = site(&[0x74, 2], &[0x75, 2], Policy::Yield);
        assert_eq!(verdict(&alike, &[INT3, 2], &[0x74, 2], true), Verdict::Perform);
    }

    #[test]
    fn a_breakpoint_inside_a_new_instruction_has_the_patch_step_aside() {
        // Two instructions, of two and three bytes, replaced by one.
        let site = site(&[0x31, 0xc0, 0x83, 0xc0, 1], &NEW, Policy::Rebase);
        let with = |at: usize| {
            let mut bytes = NEW;
            bytes[at] = INT3;
            bytes
        };
        assert_eq!(verdict(&site, &NEW, &with(2), true), Verdict::StepAside);
        assert_eq!(verdict(&site, &NEW, &with(0), true), Verdict::Perform, "where the new one begins, too");
        assert_eq!(verdict(&site, &NEW, &with(1), true), Verdict::Perform, "where none ever began");
    }

    #[test]
    fn only_deny_drops_and_only_what_is_not_the_patchers() {
        let write = [0x90, 1, 2, 3, 4];
        for (policy, by_patcher, expected) in [
            (Policy::Deny, false, Verdict::Drop),
            (Policy::Deny, true, Verdict::Perform),
            (Policy::Rebase, false, Verdict::Perform),
            (Policy::Yield, false, Verdict::Perform),
        ] {
            assert_eq!(verdict(&site(&OLD, &NEW, policy), &NEW, &write, by_patcher), expected);
        }
    }

    #[test]
    fn a_patch_stands_under_a_breakpoint() {
        assert!(stands(&NEW, &NEW));
        assert!(stands(&NEW, &TRAPPED));
        assert!(!stands(&NEW, &OLD));
        assert!(!stands(&NEW, &[INT3, 0x1f, 0x44, 0, 0]));
    }
}
