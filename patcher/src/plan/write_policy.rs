//! The text guard's judgement: what becomes of a write of the guest's to guarded text.
//!
//! A write that touches no site of an applied patch is done as it is. One that does can't
//! simply be left out: `text_poke` compares afterwards and panics (Linux
//! arch/x86/kernel/alternative.c, `__text_poke`). So what the guest's own patcher writes is
//! done, and the policy says what is done about it once it has let go of its locks; only what
//! somebody else writes can be dropped.

use serde::{Deserialize, Serialize};

use crate::insn::INT3;

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

/// Whether a write that touches a site of a patch is done.
#[must_use]
pub fn is_done(policy: Policy, by_patcher: bool) -> bool {
    by_patcher || policy != Policy::Deny
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

    #[test]
    fn only_deny_drops_and_only_what_is_not_the_patchers() {
        for (policy, by_patcher, expected) in [
            (Policy::Deny, false, false),
            (Policy::Deny, true, true),
            (Policy::Rebase, false, true),
            (Policy::Yield, false, true),
        ] {
            assert_eq!(is_done(policy, by_patcher), expected, "{policy:?}");
        }
    }

    #[test]
    fn a_patch_stands_under_a_breakpoint() {
        let code = [0xe9, 1, 2, 3, 4];
        assert!(stands(&code, &code));
        assert!(stands(&code, &[INT3, 1, 2, 3, 4]));
        assert!(!stands(&code, &[0x0f, 0x1f, 0x44, 0, 0]));
        assert!(!stands(&code, &[INT3, 0x1f, 0x44, 0, 0]));
    }
}
