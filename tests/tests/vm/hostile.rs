//! Promise: whatever a guest does, its monitor goes on, and text changes only by plans and by the guest's kernel.

use std::time::Duration;

use tests::hostile;

use super::Test;

const TIME: Duration = Duration::from_secs(40);

pub(crate) const TESTS: &[Test] = &[
    ("hostile::every_attack_at_once", |lab| hostile::at_once(lab, &lab.kernel, TIME)),
    ("hostile::every_attack_at_once_on_a_later_kernel", |lab| hostile::at_once(lab, &lab.later_kernel, TIME)),
];
