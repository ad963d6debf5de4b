//! Promise: whatever a guest does, its monitor goes on, and text changes only by plans and by the guest's kernel.

use std::time::Duration;

use tests::hostile;

use super::Test;

pub(crate) const TESTS: &[Test] =
    &[("hostile::every_attack_at_once", |lab| hostile::everything(lab, Duration::from_secs(60)))];
