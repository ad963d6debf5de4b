//! Modules for the guest's own kernel, a livepatch and an attacker among them, built against the distribution's headers
//! once and cached. No package has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};
use crate::provision::kernel::Kernel;
use crate::provision::progress::Step;
use crate::provision::{cache, packages};

/// The livepatch's name, which its files have too.
pub const NAME: &str = "getppid_livepatch";
/// The name of a module that tells which of its functions its init called.
pub const PROBE: &str = "pending_probe";
/// The name of a module that attacks the monitor.
pub const HOSTILE: &str = "hostile";
const MODULES: [&str; 3] = [NAME, PROBE, HOSTILE];
/// Part of the cache key: raise it when anything about the build changes.
const BUILD: u32 = 4;

const FILES: [(&str, &str); 13] = [
    ("Kbuild", include_str!("../../livepatch/Kbuild")),
    ("getppid_livepatch.c", include_str!("../../livepatch/getppid_livepatch.c")),
    ("pending_probe.c", include_str!("../../livepatch/pending_probe.c")),
    ("hostile.h", include_str!("../../hostile/hostile.h")),
    ("main.c", include_str!("../../hostile/main.c")),
    ("table.c", include_str!("../../hostile/table.c")),
    ("stores.c", include_str!("../../hostile/stores.c")),
    ("stack.c", include_str!("../../hostile/stack.c")),
    ("shadows.c", include_str!("../../hostile/shadows.c")),
    ("steps.c", include_str!("../../hostile/steps.c")),
    ("alias.c", include_str!("../../hostile/alias.c")),
    ("lists.c", include_str!("../../hostile/lists.c")),
    ("nested.c", include_str!("../../hostile/nested.c")),
];
/// `libelf` is for the headers' own `objtool`.
const PACKAGES: &[&str] = &["gcc", "make", "libelf-dev"];

/// The modules for a kernel, built on first use.
///
/// # Errors
/// When packages are missing and can't be installed, or the build fails.
pub fn modules(kernel: &Kernel) -> Result<[PathBuf; 3], Error> {
    let folder = cache::entry(&format!("livepatch-{}-{BUILD}", kernel.release), |into| build(kernel, into))?;
    Ok(MODULES.map(|name| folder.join(format!("{name}.ko"))))
}

fn build(kernel: &Kernel, into: &Path) -> Result<(), Error> {
    packages::ensure("building modules", PACKAGES)?;
    let step = Step::new(format!("Building modules ({})", kernel.release));
    let work = into.join("work");
    for (name, text) in FILES {
        let file = work.join("module").join(name);
        fs::create_dir_all(work.join("module")).at(&work)?;
        fs::write(&file, text).at(&file)?;
    }
    for package in kernel.headers()? {
        output_of(Command::new("dpkg-deb").arg("-x").arg(package).arg(&work))?;
    }
    let headers = work.join(format!("usr/src/linux-headers-{}", kernel.release));
    // It includes another package's, by the path that has when it is installed.
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).at(&makefile)?;
    fs::write(&makefile, text.replace("/usr/src/", &format!("{}/usr/src/", work.display()))).at(&makefile)?;
    // They ask for the compiler that the kernel was built by; any will do. Types for BPF would
    // need one more tool.
    output_of(
        Command::new("make")
            .arg("-C")
            .arg(&headers)
            .arg(format!("M={}", work.join("module").display()))
            .args(["CC=gcc", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]),
    )?;
    for name in MODULES.map(|name| format!("{name}.ko")) {
        // What is for debuggers would only make the initramfs larger.
        let from = work.join("module").join(&name);
        output_of(Command::new("strip").args(["--strip-debug", "-o"]).arg(into.join(&name)).arg(from))?;
    }
    fs::remove_dir_all(&work).at(&work)?;
    step.done();
    Ok(())
}
