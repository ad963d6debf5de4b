//! Promise: guarded text is written by nobody without leave, and a guest that patches itself
//! does not notice.

use tests::guard::patches_itself;

use super::Test;

pub(crate) const TESTS: &[Test] = &[("guard::the_guest_patches_itself", |lab| patches_itself(lab, 3))];
