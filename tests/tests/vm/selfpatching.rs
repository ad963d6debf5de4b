//! Promise: a guest that patches itself and the monitor do not get into each other's way.

use std::time::Duration;

use tests::matrix::rows_once;
use tests::selfpatching::{contended, same_page};
use tests::targets::both_kernels;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("selfpatching::the_same_key_from_inside_and_outside", |lab| contended(lab, 5)),
    ("selfpatching::the_matrix", rows_once),
    ("selfpatching::on_the_same_page", |lab| {
        same_page(lab, &both_kernels(lab, 4)[1..], Duration::from_secs(20))
    }),
];
