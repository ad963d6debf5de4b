//! The distribution's stock kernel: fetched as a package, unpacked, cached. The packages with its
//! headers lie beside it: an archive forgets those of an older kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::provision::apt::{Apt, Kind};
use crate::provision::cache;
use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};
use crate::provision::progress::Step;

/// The kernels that the tests use, by the suite that has them: Linux 6.1, 6.12, and the newest that
/// Debian offers for its stable release (7.x).
pub(super) const SUITES: [&str; 3] = ["bookworm", "bookworm-backports", "trixie-backports"];
/// Part of the cache key: raise it when an entry has something else in it.
const CONTENT: u32 = 2;
/// Where in an entry the packages with the headers are.
const HEADERS: &str = "headers";
/// The meta package that depends on the newest kernel for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What `uname -r` says in it.
    pub release: String,
    /// The bootable image.
    pub bzimage: PathBuf,
    /// The suite that it is from.
    pub(super) suite: &'static str,
    modules: PathBuf,
    headers: PathBuf,
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

    /// Debian's newest kernel, fetched on first use; only its image, without modules and headers.
    ///
    /// # Errors
    /// As [`Kernel::debian`].
    pub fn current() -> Result<Self, Error> {
        let entry = format!("kernel-{}-cloud-image-{CONTENT}", SUITES[2]);
        Self::open(SUITES[2], &cache::entry(&entry, |into| fetch(SUITES[2], Parts::Image, into))?)
    }

    fn of(suite: &'static str) -> Result<Self, Error> {
        let entry = format!("kernel-{suite}-cloud-{CONTENT}");
        Self::open(suite, &cache::entry(&entry, |into| fetch(suite, Parts::ImageAndHeaders, into))?)
    }

    fn open(suite: &'static str, folder: &Path) -> Result<Self, Error> {
        let (release, bzimage) =
            image_in(folder).ok_or_else(|| Error::Archive(format!("no vmlinuz in {}", folder.display())))?;
        Ok(Self {
            bzimage,
            suite,
            modules: folder.join("lib/modules").join(&release).join("kernel"),
            headers: folder.join(HEADERS),
            release,
        })
    }

    /// The packages with what a module is built against.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn headers(&self) -> Result<Vec<PathBuf>, Error> {
        packages_in(&self.headers)
    }

    /// The configuration that it was built with, if the image's package has it.
    pub fn config(&self) -> PathBuf {
        self.bzimage.with_file_name(format!("config-{}", self.release))
    }

    /// The version of the source package that it was built of, which its banner has after its distribution's
    /// name.
    ///
    /// # Errors
    /// When the image can't be read or has no such banner.
    pub fn version(&self) -> Result<String, Error> {
        let image = fs::read(&self.bzimage).at(&self.bzimage)?;
        source_version(&image).map(str::to_owned).ok_or_else(|| {
            Error::Archive(format!("{}: its banner tells no version of a package", self.bzimage.display()))
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

/// What follows the distribution's name in the banner, whose place is in the header (`kernel_version` in
/// the kernel's `boot.rst`).
fn source_version(image: &[u8]) -> Option<&str> {
    let place = image.get(0x20e..0x210)?.try_into().ok().map(u16::from_le_bytes)?;
    let banner = image.get(0x200 + usize::from(place)..)?.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(banner).ok()?.split(" Debian ").nth(1)?.split_whitespace().next()
}

/// The release and the image of an unpacked package: `boot/vmlinuz-RELEASE`, and since 7.0
/// `usr/lib/modules/RELEASE/vmlinuz`.
pub(super) fn image_in(folder: &Path) -> Option<(String, PathBuf)> {
    let names =
        |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let in_boot = names(folder.join("boot")).find_map(|path| {
        let release = path.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
        Some((release, path))
    });
    let beside_modules = || {
        names(folder.join("usr/lib/modules")).find_map(|path| {
            let release = path.file_name()?.to_str()?.to_owned();
            let image = path.join("vmlinuz");
            image.exists().then_some((release, image))
        })
    };
    in_boot.or_else(beside_modules)
}

/// What of a kernel is fetched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parts {
    Image,
    ImageAndHeaders,
}

fn fetch(suite: &str, parts: Parts, into: &Path) -> Result<(), Error> {
    let step = Step::new(format!("Fetching the stock kernel ({suite}, {META_PACKAGE})"));
    let (work, headers) = (into.join("apt"), into.join(HEADERS));
    let apt = Apt::new(&work, suite, Kind::Binary)?;
    let image = only(depends(&apt, META_PACKAGE, "linux-image-")?, META_PACKAGE)?;
    let release = image.trim_start_matches("linux-image-");
    if parts == Parts::ImageAndHeaders {
        let own_headers = format!("linux-headers-{release}");
        let mut with_headers = depends(&apt, &own_headers, "linux-headers-")?;
        with_headers.extend(depends(&apt, &own_headers, "linux-kbuild-")?);
        with_headers.push(own_headers);
        fs::create_dir_all(&headers).at(&headers)?;
        output_of(apt.command("apt-get").args(["-q", "download"]).args(&with_headers).current_dir(&headers))?;
    }
    fetch_image(&apt, &image, &work.join("image"), into)?;
    fs::remove_dir_all(&work).at(&work)?;
    step.done();
    Ok(())
}

/// Unpacks the package that has an image, given the one that is named after it. It is fetched to
/// `work`, which is removed.
pub(super) fn fetch_image(apt: &Apt, image: &str, work: &Path, into: &Path) -> Result<(), Error> {
    fs::create_dir_all(work).at(work)?;
    // From 6.19 on the package of the image is empty and depends on one that has it.
    let binary = depends(apt, image, "linux-binary-")?.pop().unwrap_or_else(|| image.to_owned());
    output_of(apt.command("apt-get").args(["-q", "download", &binary]).current_dir(work))?;
    output_of(Command::new("dpkg-deb").arg("-x").arg(only(packages_in(work)?, &binary)?).arg(into))?;
    fs::remove_dir_all(work).at(work)
}

/// The packages that one depends on, by how their names begin.
fn depends(apt: &Apt, package: &str, prefix: &str) -> Result<Vec<String>, Error> {
    let listed = output_of(apt.command("apt-cache").args(["depends", package]))?;
    let named = listed.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(named.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
}

fn packages_in(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let paths = fs::read_dir(folder).at(folder)?.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|ext| ext == "deb")).collect())
}

fn only<T>(mut found: Vec<T>, what: &str) -> Result<T, Error> {
    let count = found.len();
    let last = found.pop().filter(|_| count == 1);
    last.ok_or_else(|| Error::Archive(format!("{what}: {count} packages of the kernel instead of one")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_banner_tells_the_version_of_the_source() {
        let mut image = vec![0; 0x300];
        assert_eq!(source_version(&image), None);
        image[0x20e] = 0x10;
        image.extend_from_slice(b"\0#1 SMP Debian 7.0-1");
        image[0x210..][..37].copy_from_slice(b"6.1.0-1 (a@b) #1 SMP Debian 6.1.9-2 (");
        assert_eq!(source_version(&image), Some("6.1.9-2"));
        assert_eq!(source_version(&image[..0x20f]), None);
    }
}
