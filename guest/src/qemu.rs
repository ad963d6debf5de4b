//! The rig's emulator: QEMU's TCG with three defects of its SVM corrected, built from the
//! distribution's source package once and cached. `EDITS` is the whole change; the
//! decision note `docs/rig.md` tells how the defects show.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::apt::{Apt, Kind};
use crate::progress::Step;
use crate::{AtPath, Error, cache, output_of, packages};

/// The suite whose QEMU is used: Debian 13, QEMU 10.0. Debian 12's 7.2 loses IPIs here.
const SUITE: &str = "trixie";
/// Part of the cache key: raise it when anything about the build changes.
const BUILD: u32 = 5;

/// A piece of QEMU's source and what takes its place.
struct Edit {
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

/// `int3` is checked against the INTn intercept only, never against #BP's (APM volume 2,
/// 15.12.4 and 15.13: `INT3` raises exception 3; the INTn intercept is for `CD ib` only). A
/// hypervisor would never see its guest's breakpoints.
const INT3_INTERCEPT: Edit = Edit {
    file: "target/i386/tcg/excp_helper.c",
    from: "    } else {\n        cpu_svm_check_intercept_param(env, SVM_EXIT_SWINT, 0, retaddr);",
    to: "    } else if (intno == EXCP03_INT3 && next_eip_addend == 1) {\n        \
         cpu_svm_check_intercept_param(env, SVM_EXIT_EXCP_BASE + intno, 0, retaddr);\n    } else {\n        \
         cpu_svm_check_intercept_param(env, SVM_EXIT_SWINT, 0, retaddr);",
};

/// An interrupt that `VMRUN` injects is delivered at once, but stays pending as an exception
/// too. If the emulator's loop is left before something else clears that, it is delivered a
/// second time, with interrupts disabled or in the middle of an entry path, and the guest
/// crashes: about once in 20,000 kicks of a vCPU.
const INJECTED_ONCE: Edit = Edit {
    file: "target/i386/tcg/system/svm_helper.c",
    from: "            do_interrupt_x86_hardirq(env, vector, 1);\n",
    to: "            do_interrupt_x86_hardirq(env, vector, 1);\n            cs->exception_index = -1;\n",
};

/// Very rarely `VMRUN` loses the nested-paging flag that it set itself: an emulator with a
/// log in it showed the flag set where nested paging is switched on and clear some lines
/// further, with the guest's interrupt shadow on. The guest's page tables are then walked as
/// if they lay in host memory, and it dies of a triple fault. Why is not known; setting the
/// flag again before the guest is entered mends it.
const NESTED_PAGING_KEPT: Edit = Edit {
    file: "target/i386/tcg/system/svm_helper.c",
    from: "    env->hflags2 |= HF2_GIF_MASK;\n\n    if (ctl_has_irq(env)) {",
    to: "    env->hflags2 |= HF2_GIF_MASK;\n    if (nested_ctl & SVM_NPT_ENABLED) {\n        \
         env->hflags2 |= HF2_NPT_MASK;\n    }\n\n    if (ctl_has_irq(env)) {",
};

/// `VMRUN` notes a pending virtual interrupt in a word that other CPUs' threads change under
/// the big lock, without that lock: now and then a host's interrupt gets lost. (Later
/// versions of QEMU change that word atomically.)
const PENDING_UNDER_LOCK: Edit = Edit {
    file: "target/i386/tcg/system/svm_helper.c",
    from: "        cs->interrupt_request |= CPU_INTERRUPT_VIRQ;\n",
    to: "        bql_lock();\n        cs->interrupt_request |= CPU_INTERRUPT_VIRQ;\n        bql_unlock();\n",
};
const LOCK_DECLARED: Edit = Edit {
    file: "target/i386/tcg/system/svm_helper.c",
    from: "#include \"qemu/log.h\"\n",
    to: "#include \"qemu/log.h\"\n#include \"qemu/main-loop.h\"\n",
};

/// Like the nested-paging flag the global interrupt flag gets lost: a CPU of the host was
/// found running a guest with it clear and an interrupt pending, for minutes. KVM's guests
/// never run with it clear: `VMRUN` sets it, and their `CLGI` exits.
const INTERRUPTIBLE_GUEST: Edit = Edit {
    file: "target/i386/cpu.c",
    from: "    if (env->hflags2 & HF2_GIF_MASK) {",
    to: "    if (env->hflags2 & HF2_GIF_MASK || env->hflags & HF_GUEST_MASK) {",
};

/// The distribution's source lacks these firmware images; nothing here uses them.
const NO_EDK2: Edit =
    Edit { file: "meson.build", from: "unpack_edk2_blobs = bzip2.found()", to: "unpack_edk2_blobs = false" };

const EDITS: [Edit; 7] = [
    INT3_INTERCEPT,
    INJECTED_ONCE,
    NESTED_PAGING_KEPT,
    PENDING_UNDER_LOCK,
    LOCK_DECLARED,
    INTERRUPTIBLE_GUEST,
    NO_EDK2,
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
    EDITS.iter().try_for_each(|edit| edit.apply(&source))?;
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
    let mut step = Step::new("Building QEMU");
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

impl Edit {
    fn apply(&self, source: &Path) -> Result<(), Error> {
        let path = source.join(self.file);
        let text = fs::read_to_string(&path).at(&path)?;
        if text.matches(self.from).count() != 1 {
            return Err(Error::Archive(format!(
                "{} is not as expected: this QEMU needs another correction (see guest/src/qemu.rs)",
                self.file
            )));
        }
        fs::write(&path, text.replace(self.from, self.to)).at(&path)
    }
}
