//! Promise: a guest that patches itself and the monitor do not get into each other's way.

use tests::selfpatching::{beside, contended};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("selfpatching::the_same_key_from_inside_and_outside", |lab| contended(lab, 30)),
    ("selfpatching::in_every_way_beside_our_sites", |lab| beside(lab, 4)),
];
