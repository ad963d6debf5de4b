//! The distribution's packages that set-up needs: installed if this is root on Debian, named
//! otherwise.

use std::path::Path;
use std::process::Command;

use crate::provision::command::output_of;
use crate::provision::error::Error;
use crate::provision::progress::Step;

/// Makes sure that `packages` are installed, saying what it installs and why.
///
/// # Errors
/// [`Error::Packages`] with the exact command when this is not root or not Debian;
/// [`Error::Failed`] when apt fails.
pub fn ensure(purpose: &str, packages: &[&'static str]) -> Result<(), Error> {
    let missing: Vec<_> = packages.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let refuse = |why| Err(Error::Packages { packages: missing.clone(), why });
    if !Path::new("/etc/debian_version").exists() {
        return refuse("this is not Debian (the names below are Debian's)");
    }
    if !rustix::process::geteuid().is_root() {
        return refuse("this is not root");
    }
    eprintln!("  Installing packages for {purpose}: {}", missing.join(" "));
    let step = Step::new("apt-get update");
    output_of(Command::new("apt-get").args(["-q", "update"]))?;
    step.done();
    let step = Step::new("apt-get install");
    output_of(
        Command::new("apt-get")
            .args(["-q", "-y", "--no-install-recommends", "install"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    step.done();
    Ok(())
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .output()
        .is_ok_and(|out| out.status.success() && out.stdout == b"installed")
}
