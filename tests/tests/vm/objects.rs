//! Promise: what an object's function is replaced by is known before anything is done to a guest.

use anyhow::{Result, ensure};
use std::process::Command;
use tests::lab::Lab;

use crate::Test;

pub(crate) const TESTS: &[Test] =
    &[("objects::of_the_kernels_source_are_where_guests_run", of_the_kernels_source_are_where_guests_run)];

fn of_the_kernels_source_are_where_guests_run(lab: &Lab) -> Result<()> {
    let pair = lab.objects("version")?;
    let told = Command::new(&lab.vmm).args(["kernel", "compare"]).args([pair.before, pair.after]).output()?;
    let text = String::from_utf8_lossy(&told.stdout);
    ensure!(told.status.success() && text.contains("version_proc_show"), "{told:?}");
    ensure!(lab.objects("none").is_err(), "there is no such pair");
    Ok(())
}
