//! What the text guard does about a guest's write to guarded text.
//!
//! A write that touches no site of an applied patch is performed. A write to a site by the guest's own
//! patching code can't be dropped: `text_poke` compares afterwards and panics (Linux
//! arch/x86/kernel/alternative.c, `__text_poke`). So it is performed, and the policy is carried out
//! once the guest has released its locks. Any other write to a site can be dropped.

use serde::{Deserialize, Serialize};

use crate::insn::INT3;

/// What to do when the guest writes to a site of an applied patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The guest's code stays; the patch is given up at that site.
    #[default]
    Yield,
    /// The patch is applied again. Reverting it restores what the guest wrote.
    Rebase,
    /// The patch is applied again, and reverting it restores the original code. A write that is not
    /// by the kernel's own patching code is dropped.
    Deny,
}

/// Whether a write that touches a site is performed.
#[must_use]
pub fn is_done(policy: Policy, by_patcher: bool) -> bool {
    by_patcher || policy != Policy::Deny
}

/// Whether a site that holds `now` still holds `code`, apart from breakpoints that the guest has
/// placed.
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
