//! The rig's emulator: QEMU's TCG with its defects corrected, built from the distribution's
//! source package once and cached. `PATCHES` is the whole change;
//! `guest/docs/rig.md` tells how the defects show.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::provision::apt::{Apt, Kind};
use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};
use crate::provision::progress::Step;
use crate::provision::{cache, packages};

/// The suite whose QEMU is used: Debian 13, QEMU 10.0. Debian 12's 7.2 loses IPIs here.
const SUITE: &str = "trixie";
/// Part of the cache key: raise it when anything about the build changes.
const BUILD: u32 = 7;

/// The whole change to QEMU: a series of patches, each of which says what it mends.
const PATCHES: [&str; 6] = [
    include_str!("../../qemu/0001-svm-int3-raises-an-exception.patch"),
    include_str!("../../qemu/0002-svm-deliver-an-injected-interrupt-once.patch"),
    include_str!("../../qemu/0003-fpu-leave-the-first-CPU-alone.patch"),
    include_str!("../../qemu/0004-svm-note-a-virtual-interrupt-under-the-lock.patch"),
    include_str!("../../qemu/0005-tcg-see-every-store-to-code.patch"),
    include_str!("../../qemu/0006-build-without-the-EDK2-images.patch"),
];

const BUILD_PACKAGES: &[&str] = &[
    "gcc",
    "libc6-dev",
    "make",
    "ninja-build",
    "pkg-config",
    "libglib2.0-dev",
    "libfdt-dev",
    "libpixman-1-dev",
    "flex",
    "bison",
    "python3",
    "python3-venv",
    "dpkg-dev",
    "patch",
    "xz-utils",
];
const RUN_PACKAGES: &[&str] = &["seabios", "qemu-system-data"];

/// QEMU and the folders its firmware lies in.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The emulator.
    pub program: PathBuf,
    /// Values for its `-L` option.
    pub firmware: [&'static str; 2],
}

/// The corrected emulator, built on first use (about three minutes on two cores).
///
/// # Errors
/// When packages are missing and can't be installed, or the source can't be fetched or built.
pub fn corrected() -> Result<Qemu, Error> {
    packages::ensure("the rig's firmware", RUN_PACKAGES)?;
    let folder = cache::entry(&format!("qemu-{SUITE}-{BUILD}"), build)?;
    let program = folder.join("qemu-system-x86_64");
    if output_of(Command::new(&program).arg("--version")).is_err() {
        // Cached, but the shared libraries it was built against are not on this machine.
        packages::ensure("the rig's emulator", BUILD_PACKAGES)?;
        output_of(Command::new(&program).arg("--version"))?;
    }
    Ok(Qemu { program, firmware: ["/usr/share/seabios", "/usr/share/qemu"] })
}

fn build(into: &Path) -> Result<(), Error> {
    packages::ensure("building the rig's emulator", BUILD_PACKAGES)?;
    let work = into.join("work");
    let source = work.join("source");
    fs::create_dir_all(&source).at(&source)?;

    let step = Step::new(format!("Fetching QEMU's source ({SUITE})"));
    let apt = Apt::new(&work.join("apt"), SUITE, Kind::Source)?;
    output_of(apt.command("apt-get").args(["-q", "source", "--download-only", "qemu"]).current_dir(&work))?;
    let tarball = fs::read_dir(&work)
        .at(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().ends_with(".orig.tar.xz"))
        .ok_or_else(|| Error::Archive("the source package of qemu has no upstream tarball".into()))?;
    output_of(
        Command::new("tar").arg("-xf").arg(&tarball).arg("-C").arg(&source).arg("--strip-components=1"),
    )?;
    for (number, patch) in (1..).zip(PATCHES) {
        let file = work.join(format!("{number}.patch"));
        fs::write(&file, patch).at(&file)?;
        output_of(Command::new("patch").args(["-p1", "--fuzz=0", "-i"]).arg(&file).arg("-d").arg(&source))?;
    }
    step.done();

    let step = Step::new("Fetching QEMU's build tools (meson, from PyPI)");
    let venv = work.join("venv");
    output_of(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(&venv))?;
    output_of(Command::new(venv.join("bin/pip")).args([
        "install",
        "--quiet",
        "meson>=1.5,<2",
        "pycotap>=1.1,<2",
    ]))?;
    step.done();

    let step = Step::new("Configuring QEMU");
    let build = work.join("build");
    fs::create_dir_all(&build).at(&build)?;
    output_of(
        Command::new(source.join("configure"))
            .current_dir(&build)
            .arg(format!("--python={}", venv.join("bin/python3").display()))
            .args(["--target-list=x86_64-softmmu", "--without-default-features", "--enable-tcg"])
            .args(["--enable-fdt=system", "--enable-pixman", "--disable-docs", "--disable-tools"])
            .arg("--disable-install-blobs"),
    )?;
    step.done();

    compile(&build)?;
    let program = into.join("qemu-system-x86_64");
    fs::copy(build.join("qemu-system-x86_64"), &program).at(&program)?;
    fs::remove_dir_all(&work).at(&work)
}

/// Runs ninja, turning its `[done/total]` lines into progress.
fn compile(build: &Path) -> Result<(), Error> {
    let mut step = Step::new("Building QEMU (about three minutes on two cores, once)");
    let mut child = Command::new("ninja")
        .arg("qemu-system-x86_64")
        .current_dir(build)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Spawn { program: "ninja".into(), source })?;
    let mut log = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some((done, total)) = ninja_progress(&line) {
                step.at(done, total);
            }
            log += &line;
            log += "\n";
        }
    }
    let status = child.wait().at("ninja")?;
    if !status.success() {
        return Err(Error::Failed { program: "ninja".into(), status, output: log });
    }
    step.done();
    Ok(())
}

fn ninja_progress(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.strip_prefix('[')?.split_once(']')?.0.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}
