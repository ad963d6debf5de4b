//! The rig: an emulated x86 host with virtualization extensions (L1) that runs a stock
//! Linux with stock KVM, for machines that have neither VMX nor SVM.
//!
//! ```text
//!   this machine:  QEMU (TCG) ──────────────────────────────┐
//!   L1:            stock kernel, kvm-amd, rig-init (init)   │ ttyS1: requests, frames
//!                    └─ runs a program of ours ─────────────┘ ttyS0: L1's kernel log
//!   L2:                  └─ which starts guests through KVM
//! ```

mod bochs;
pub mod qemu;
pub mod wire;

use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::provision::error::{AtPath, Error as ProvisionError};
use crate::provision::initramfs::Initramfs;
use crate::provision::kernel::Kernel;
use crate::provision::progress::Step;
use crate::rig::qemu::Qemu;
use crate::rig::wire::{Frame, Request};

/// L1's kernel modules, in loading order, and the processor's feature that each is for, if it
/// is for one.
pub const MODULES: [(&str, &str, Option<&str>); 4] = [
    ("irqbypass", "virt/lib/irqbypass", None),
    ("kvm", "arch/x86/kvm/kvm", None),
    ("kvm-amd", "arch/x86/kvm/kvm-amd", Some("svm")),
    ("kvm-intel", "arch/x86/kvm/kvm-intel", Some("vmx")),
];

/// What the host is emulated by.
#[derive(Debug, Clone)]
pub enum Emulator {
    /// QEMU's TCG: two AMD processors with SVM and nested paging.
    Qemu(Qemu),
    /// Bochs: an Intel processor with VMX and EPT, some twenty times slower.
    Bochs,
}

/// What the name of a rig's folder begins with; the process behind it follows.
const FOLDER: &str = "vmm-rig-";

const BOOT_DEADLINE: Duration = Duration::from_secs(180);
const BOCHS_BOOT_DEADLINE: Duration = Duration::from_secs(1200);
/// CPUs of the emulated host, as many as the machines of CI have.
const CPUS: &str = "2";
const MEMORY_MIB: &str = "4096";

/// Why the rig's host can't be had, or is no more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that it is made of could not be provided.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// It did not come up, or broke off.
    #[error("the rig: {0}")]
    Broken(String),
}

/// Which of the program's streams a piece of output belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A running emulated host. It is shut off when dropped.
pub struct Rig {
    child: Child,
    requests: Box<dyn Write + Send>,
    frames: Receiver<Frame>,
    folder: PathBuf,
}

impl Rig {
    /// Starts the host, with `files` (name in the host without leading slash, source) in
    /// its root file system, and waits until it answers (about five seconds).
    ///
    /// # Errors
    /// [`Error::Broken`] with the end of the host's kernel log when it does not come up.
    pub fn start(
        emulator: &Emulator,
        kernel: &Kernel,
        init: &Path,
        files: &[(&str, &Path)],
    ) -> Result<Self, Error> {
        let parent = std::env::temp_dir();
        sweep(&parent);
        let folder = parent.join(format!("{FOLDER}{}", std::process::id()));
        fs::create_dir_all(&folder).at(&folder)?;
        let mut archive = Initramfs::default().file("init", init)?;
        for (name, path, _) in MODULES {
            archive = archive.file(&format!("modules/{name}.ko"), &kernel.module(path))?;
        }
        for (name, source) in files {
            archive = archive.file(name, source)?;
        }
        let initrd = folder.join("initrd");
        archive.write(&initrd)?;

        let (mut command, wire, deadline) = match emulator {
            Emulator::Qemu(qemu) => {
                let mut command = qemu_command(qemu, kernel, &initrd, &folder.join("console"));
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
                (command, None, BOOT_DEADLINE)
            }
            Emulator::Bochs => {
                let (mut command, wire) = bochs::machine(kernel, &initrd, &folder)?;
                command.stdin(Stdio::null()).stdout(Stdio::null());
                (command, Some(wire), BOCHS_BOOT_DEADLINE)
            }
        };
        let step = Step::new("Starting the emulated host");
        let mut child =
            command.stderr(File::create(folder.join("emulator")).at(&folder)?).spawn().map_err(|source| {
                ProvisionError::Spawn {
                    program: command.get_program().to_string_lossy().into_owned(),
                    source,
                }
            })?;
        let (requests, replies): (Box<dyn Write + Send>, Box<dyn Read + Send>) = match wire {
            Some(wire) => {
                bochs::watch_screen(child.id());
                let wire = bochs::accept(&wire)?;
                (Box::new(wire.try_clone().at("the rig's serial line")?), Box::new(wire))
            }
            None => match (child.stdin.take(), child.stdout.take()) {
                (Some(requests), Some(replies)) => (Box::new(requests), Box::new(replies)),
                _ => return Err(Error::Broken("QEMU has no pipes".into())),
            },
        };
        let (sender, frames) = mpsc::channel();
        thread::spawn(move || {
            let mut reader = BufReader::new(replies);
            while let Ok(frame) = Frame::read(&mut reader) {
                if sender.send(frame).is_err() {
                    break;
                }
            }
        });
        let mut rig = Self { child, requests, frames, folder };
        match rig.next(deadline)? {
            Frame::Ready => {}
            Frame::Error(text) => return Err(Error::Broken(text)),
            other => return Err(Error::Broken(format!("the host began with {other:?}"))),
        }
        step.done();
        Ok(rig)
    }

    /// Runs a program in the host and passes its output to `sink` as it comes.
    /// Returns its exit code.
    ///
    /// # Errors
    /// [`Error::Broken`] when the program does not exist, when the host breaks off, or when
    /// `deadline` passes; then the host is in an unknown state and should be dropped.
    pub fn run(
        &mut self,
        request: &Request,
        deadline: Duration,
        mut sink: impl FnMut(Stream, &[u8]),
    ) -> Result<i32, Error> {
        let mut line = serde_json::to_vec(request).map_err(|e| Error::Broken(e.to_string()))?;
        line.push(b'\n');
        self.requests.write_all(&line).at("the rig's serial line")?;
        let until = Instant::now() + deadline;
        loop {
            match self.next(until.saturating_duration_since(Instant::now()))? {
                Frame::Stdout(bytes) => sink(Stream::Stdout, &bytes),
                Frame::Stderr(bytes) => sink(Stream::Stderr, &bytes),
                Frame::Exit(code) => return Ok(code),
                Frame::Error(text) => return Err(Error::Broken(text)),
                Frame::Ready => return Err(Error::Broken("the host restarted".into())),
            }
        }
    }

    fn next(&mut self, timeout: Duration) -> Result<Frame, Error> {
        self.frames.recv_timeout(timeout).map_err(|error| {
            let what = match error {
                RecvTimeoutError::Timeout => "no answer in time".to_owned(),
                // An exit code of 0 means that the host was reset, as by a triple fault.
                RecvTimeoutError::Disconnected => match self.child.wait() {
                    Ok(status) => format!("the host broke off (the emulator: {status})"),
                    Err(error) => format!("the host broke off ({error})"),
                },
            };
            let log = |name: &str| {
                let bytes = fs::read(self.folder.join(name)).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes);
                let lines: Vec<_> = text.lines().collect();
                lines[lines.len().saturating_sub(25)..].join("\n  ")
            };
            Error::Broken(format!("{what}\n  {}\n  {}", log("emulator"), log("console")))
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Nothing in the host outlives it, so it needs no shutting down; a child that is
        // gone already and a folder that can't be removed are both fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Removes the folders of rigs whose process was killed: each holds a hundred megabytes.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(FOLDER)?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
            // Another process may be sweeping, too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn qemu_command(qemu: &Qemu, kernel: &Kernel, initrd: &Path, console: &Path) -> Command {
    // However this process ends, the emulator must not stay behind.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(&qemu.program);
    for folder in qemu.firmware {
        command.args(["-L", folder]);
    }
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none"])
        .args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC,+svm,+npt"])
        .args(["-machine", "q35", "-smp", CPUS, "-m", MEMORY_MIB])
        .arg("-kernel")
        .arg(&kernel.bzimage)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-chardev", "stdio,id=wire,signal=off", "-serial", "chardev:wire"]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_processes_that_are_gone_are_swept() {
        let parent = tempfile::TempDir::new().expect("a folder");
        let gone = Command::new("true").spawn().and_then(|mut child| {
            child.wait()?;
            Ok(child.id())
        });
        let gone = format!("{FOLDER}{}", gone.expect("a process"));
        let mine = format!("{FOLDER}{}", std::process::id());
        for name in [gone.as_str(), mine.as_str(), "vmm-rig-x", "other"] {
            fs::create_dir(parent.path().join(name)).expect("a folder");
        }
        sweep(parent.path());
        let mut left: Vec<_> =
            fs::read_dir(parent.path()).expect("it").flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        let mut expected = vec!["other".into(), std::ffi::OsString::from(&mine), "vmm-rig-x".into()];
        expected.sort();
        assert_eq!(left, expected);
    }
}
