//! Promise: when another kernel takes the place of the guest's, the patches are reported lost, the new kernel's
//! memory is never written, and a new plan is checked against the kernel that runs, or refused.

use tests::replaced::{by_another, by_the_crash_kernel, by_the_same, in_place};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("replaced::by_itself_in_place", |lab| in_place(lab, "deny")),
    ("replaced::by_itself_elsewhere", |lab| by_the_same(lab, "rebase", "pti=on")),
    ("replaced::by_another_kernel_without_kaslr", |lab| by_another(lab, "rebase", "nokaslr")),
    ("replaced::by_another_kernel", |lab| by_another(lab, "deny", "")),
    ("replaced::by_the_crash_kernel", by_the_crash_kernel),
];
