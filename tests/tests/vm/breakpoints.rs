//! Promise: a breakpoint of the guest's own reaches the guest, with the right address, while
//! the monitor intercepts breakpoints.

use tests::breakpoints::delivered;

use super::Test;

pub(crate) const TESTS: &[Test] =
    &[("breakpoints::of_the_guests_own_are_delivered", |lab| delivered(lab, "always", 10_000))];
