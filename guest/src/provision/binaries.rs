//! Builds this workspace's own programs, statically linked, for use in the rig and in guests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::provision::command::output_of;
use crate::provision::error::Error;
use crate::provision::progress::Step;

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

/// Which build of the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// With debug assertions, by the profile of everything else.
    Checked,
    /// As `cargo build --release` makes it.
    Shipped,
}

/// What of cargo's JSON messages matters here.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    overflow_checks: bool,
}

/// Builds the programs with the cargo that runs this process, in its target folder.
///
/// # Errors
/// When the build fails; the compiler's messages went to standard error.
pub fn build(monitor: Monitor) -> Result<Binaries, Error> {
    let step = Step::new("Building the programs that run inside, and the monitor for tests");
    let bins = ["guest-init", "rig-init", "vmm-lab"].iter().flat_map(|bin| ["--bin", bin]);
    let own = ["--package", "guest", "--package", "tests"].into_iter().chain(bins);
    let own = cargo_build(&own.collect::<Vec<_>>())?;
    step.done();
    let (title, profile): (_, &[&str]) = match monitor {
        Monitor::Checked => ("Building the monitor", &[]),
        Monitor::Shipped => {
            ("Building the monitor as it ships (release; one or two minutes the first time)", &["--release"])
        }
    };
    let step = Step::new(title);
    let vmm = cargo_build(&[&["--package", "vmm", "--bin", "vmm"], profile].concat())?;
    step.done();
    let find = |built: &[PathBuf], name: &str| {
        let found = built.iter().find(|path| path.file_name().is_some_and(|file| file == name));
        found.cloned().ok_or_else(|| Error::Build(format!("cargo built no program called {name}")))
    };
    Ok(Binaries {
        vmm: find(&vmm, "vmm")?,
        vmm_lab: find(&own, "vmm-lab")?,
        guest_init: find(&own, "guest-init")?,
        rig_init: find(&own, "rig-init")?,
    })
}

/// Builds something, and returns the programs.
fn cargo_build(arguments: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let stdout = output_of(
        Command::new(cargo)
            .current_dir(workspace)
            .args(["build", "--quiet"])
            .args(arguments)
            .args(["--message-format", "json-render-diagnostics"])
            .stderr(Stdio::inherit()),
    )?;
    let mut programs = Vec::new();
    for message in stdout.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok()) {
        let (Some(program), Some(profile)) = (message.executable, message.profile) else { continue };
        if !profile.overflow_checks {
            let what = format!("{} is built without overflow checks (see Cargo.toml)", program.display());
            return Err(Error::Build(what));
        }
        programs.push(program);
    }
    Ok(programs)
}
