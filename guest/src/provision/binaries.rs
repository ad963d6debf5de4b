//! Builds this workspace's own programs, statically linked, for use in the rig and in guests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::provision::progress::Step;
use crate::{Error, output_of};

/// The programs that a lab needs.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The monitor.
    pub vmm: PathBuf,
    /// The same with switches for tests.
    pub vmm_lab: PathBuf,
    /// Init of a guest.
    pub guest_init: PathBuf,
    /// Init of the rig's host.
    pub rig_init: PathBuf,
}

/// What of cargo's JSON messages matters here.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
}

/// Builds the programs with the cargo that runs this process, in its target folder.
///
/// # Errors
/// When the build fails; the compiler's messages went to standard error.
pub fn build() -> Result<Binaries, Error> {
    let step = Step::new("Building the monitor and the guest's programs");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let stdout = output_of(
        Command::new(cargo)
            .current_dir(workspace)
            .args(["build", "--quiet", "--package", "vmm", "--package", "guest", "--package", "tests"])
            .args(["--bin", "vmm", "--bin", "vmm-lab", "--bin", "guest-init", "--bin", "rig-init"])
            .args(["--message-format", "json-render-diagnostics"])
            .stderr(Stdio::inherit()),
    )?;
    let built: Vec<PathBuf> =
        stdout.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable).collect();
    let find = |name: &str| {
        built
            .iter()
            .find(|path| path.file_name().is_some_and(|file| file == name))
            .cloned()
            .ok_or_else(|| Error::Archive(format!("cargo built no program called {name}")))
    };
    let binaries = Binaries {
        vmm: find("vmm")?,
        vmm_lab: find("vmm-lab")?,
        guest_init: find("guest-init")?,
        rig_init: find("rig-init")?,
    };
    step.done();
    Ok(binaries)
}
