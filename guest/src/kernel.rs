//! The distribution's stock kernel: fetched as a package, unpacked, cached.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Apt, Kind};
use crate::progress::Step;
use crate::{AtPath, Error, cache, output_of};

/// The kernels that the tests use, by the suite that has them: Linux 6.1 and 6.12.
const SUITES: [&str; 2] = ["bookworm", "bookworm-backports"];
/// The meta package that depends on the newest kernel for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What `uname -r` says in it.
    pub release: String,
    /// The bootable image.
    pub bzimage: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// Debian's stock kernel, Linux 6.1, fetched on first use.
    ///
    /// # Errors
    /// When there is no cached copy and the archive can't be reached.
    pub fn debian() -> Result<Self, Error> {
        Self::of(SUITES[0])
    }

    /// Debian's kernel of a later generation, Linux 6.12, fetched on first use.
    ///
    /// # Errors
    /// As [`Kernel::debian`].
    pub fn backports() -> Result<Self, Error> {
        Self::of(SUITES[1])
    }

    fn of(suite: &str) -> Result<Self, Error> {
        let folder = cache::entry(&format!("kernel-{suite}-cloud"), |into| fetch(suite, into))?;
        Self::open(&folder)
    }

    fn open(folder: &Path) -> Result<Self, Error> {
        let boot = folder.join("boot");
        let release = fs::read_dir(&boot)
            .at(&boot)?
            .flatten()
            .find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix("vmlinuz-").map(str::to_owned)
            })
            .ok_or_else(|| Error::Archive(format!("no vmlinuz in {}", boot.display())))?;
        Ok(Self {
            bzimage: boot.join(format!("vmlinuz-{release}")),
            modules: folder.join("lib/modules").join(&release).join("kernel"),
            release,
        })
    }

    /// The file of a kernel module, by its path below `kernel/` without `.ko`. The kernel
    /// itself unpacks those that end with `.xz`.
    pub fn module(&self, path: &str) -> PathBuf {
        let plain = self.modules.join(format!("{path}.ko"));
        let packed = self.modules.join(format!("{path}.ko.xz"));
        if packed.exists() { packed } else { plain }
    }
}

fn fetch(suite: &str, into: &Path) -> Result<(), Error> {
    let step = Step::new(format!("Fetching the stock kernel ({suite}, {META_PACKAGE})"));
    let work = into.join("apt");
    let apt = Apt::new(&work, suite, Kind::Binary)?;
    let depends = output_of(apt.command("apt-cache").args(["depends", META_PACKAGE]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
        .map(|rest| format!("linux-image-{rest}"))
        .ok_or_else(|| Error::Archive(format!("{META_PACKAGE} depends on no kernel:\n{depends}")))?;
    output_of(apt.command("apt-get").args(["-q", "download", &package]).current_dir(&work))?;
    let deb = fs::read_dir(&work)
        .at(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ext| ext == "deb"))
        .ok_or_else(|| Error::Archive(format!("apt downloaded no file for {package}")))?;
    output_of(Command::new("dpkg-deb").arg("-x").arg(deb).arg(into))?;
    fs::remove_dir_all(&work).at(&work)?;
    step.done();
    Ok(())
}
