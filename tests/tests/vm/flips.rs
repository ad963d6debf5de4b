//! Promise: a hammered function is switched under full load, on every vCPU, and no caller
//! sees anything but the old and the new behaviour.

use tests::campaigns::flips;
use tests::campaigns::sites::sites;
use tests::vm::Setup;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("flips::breakpoint_1000_times_on_4_vcpus", |lab| {
        flips(lab, &Setup::cpus(4).lingering(), "breakpoint", 1000)
    }),
    ("flips::hold_300_times_on_4_vcpus", |lab| flips(lab, &Setup::cpus(4), "hold", 300)),
    ("flips::bypass_300_times_on_4_vcpus", |lab| flips(lab, &Setup::cpus(4).lingering(), "bypass", 300)),
    ("flips::inspect_200_times_on_4_vcpus", |lab| flips(lab, &Setup::cpus(4), "inspect", 200)),
    ("flips::every_kind_of_site_under_nmis", |lab| sites(lab, 4, 180, true)),
    ("flips::breakpoint_with_fences_by_kick", |lab| flips(lab, &by_kick(), "breakpoint", 100)),
    ("flips::hold_with_fences_by_kick", |lab| flips(lab, &by_kick(), "hold", 100)),
];

fn by_kick() -> Setup {
    Setup { arguments: vec!["--fence".into(), "kick".into()], ..Setup::cpus(4) }
}
