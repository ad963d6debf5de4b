//! Promise: a CPU that the guest's kernel has not started, or has switched off, hinders no plan, and runs new
//! code when it comes.

use tests::hotplug::{comes_and_goes, not_started, switched_off};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("hotplug::a_cpu_that_is_off_stands_right", switched_off),
    ("hotplug::a_cpu_that_was_not_started_stands_right", not_started),
    // The other kernels: `cargo soak hotplug`.
    ("hotplug::a_cpu_comes_and_goes_while_programs_run", |lab| comes_and_goes(lab, &lab.current_kernel, 12)),
];
