//! Promise: when another kernel takes the place of the guest's, the patches are reported lost, the new kernel's
//! memory is never written, and a new plan is checked against the kernel that runs, or refused.

use tests::replaced::{by_another, by_the_same};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    // More ways: `cargo soak replaced`.
    ("replaced::by_itself_elsewhere", |lab| by_the_same(lab, "rebase", "pti=on")),
    ("replaced::by_another_kernel", |lab| by_another(lab, "deny", "")),
];
