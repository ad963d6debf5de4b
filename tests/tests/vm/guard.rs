//! Promise: no write to guarded text goes unseen, and a guest that patches itself does not notice.

use tests::guard::{ahead, boots, patches_itself, policies, probes, unexpected_writers};
use tests::targets::both_kernels;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("guard::the_guest_patches_itself", |lab| patches_itself(lab, 3)),
    ("guard::text_is_protected_ahead_of_programs", ahead),
    ("guard::the_same_text_as_an_unguarded_twin", |lab| boots(lab, 2)),
    ("guard::what_a_policy_says_is_done", |lab| policies(lab, &both_kernels(lab, 4)[1..])),
    ("guard::probes_on_the_patched_instruction", |lab| probes(lab, &both_kernels(lab, 4)[1..])),
    ("guard::unexpected_writers_are_obeyed_told_or_dropped", |lab| {
        unexpected_writers(lab, &both_kernels(lab, 4)[..1])
    }),
];
