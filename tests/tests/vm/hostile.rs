//! Promise: whatever its guest does, the monitor answers, grows in nothing, and changes no text but as asked.

use std::time::Duration;

use tests::hostile::each_on;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    // For longer, and on both kernels: `cargo soak hostile-each`.
    ("hostile::one_attack_after_the_other", |lab| each_on(lab, &lab.later_kernel, Duration::from_secs(2))),
];
