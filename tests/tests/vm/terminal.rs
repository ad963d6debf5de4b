//! Promise: a guest has the terminal to itself while it runs, and the terminal is as it was
//! when the monitor ends.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, LocalModes, Termios, tcgetattr};
use tests::lab::Lab;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("terminal::ctrl_a_x_ends_it_and_restores_the_terminal", |lab| typed(lab, b"\x01x")),
    ("terminal::ctrl_c_ends_it_and_restores_the_terminal", |lab| typed(lab, b"\x03")),
    ("terminal::signals_end_it_and_restore_the_terminal", signals),
    ("terminal::typing_reaches_the_guest", typing),
    ("terminal::in_the_background_it_runs_without_input", background),
];

struct Session {
    person: File,
    terminal: File,
    child: std::process::Child,
    output: BufReader<std::process::ChildStdout>,
    before: Termios,
}

/// Modes with which the terminal keeps keys from the guest, or changes them: lines, echo, Ctrl-C,
/// Ctrl-V; Ctrl-S and Ctrl-Q, Enter.
const COOKED_LOCAL: LocalModes =
    LocalModes::ICANON.union(LocalModes::ECHO).union(LocalModes::ISIG).union(LocalModes::IEXTEN);
const COOKED_INPUT: InputModes = InputModes::IXON.union(InputModes::ICRNL);

/// Starts a VM on a pseudo-terminal and waits until its init is up.
fn start(lab: &Lab) -> Result<Session> {
    let session = start_in(lab, true)?;
    let raw = tcgetattr(session.terminal.as_fd())?;
    ensure!(
        !raw.local_modes.intersects(COOKED_LOCAL) && !raw.input_modes.intersects(COOKED_INPUT),
        "the terminal is not raw: {raw:?}"
    );
    ensure!(
        raw.output_modes == session.before.output_modes,
        "the monitor's own lines need {:?}",
        session.before
    );
    Ok(session)
}

/// The same in the foreground or in the background.
fn start_in(lab: &Lab, foreground: bool) -> Result<Session> {
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&person)?;
    unlockpt(&person)?;
    let path = ptsname(&person, Vec::new())?.into_string()?;
    let terminal = OpenOptions::new().read(true).write(true).open(path)?;
    let before = tcgetattr(&terminal)?;
    ensure!(
        before.local_modes.contains(COOKED_LOCAL) && before.input_modes.contains(COOKED_INPUT),
        "not a terminal's usual modes: {before:?}"
    );
    let monitor = if foreground { &lab.vmm } else { &lab.vmm_lab };
    let mut child = Command::new(monitor)
        .args((!foreground).then_some("--in-background"))
        .arg("--kernel")
        .arg(&lab.kernel)
        .arg("--initrd")
        .arg(&lab.initrd)
        .args(["--cpus", "2", "--cmdline", "console=ttyS0 quiet loglevel=1 panic=-1 pci=off"])
        .stdin(Stdio::from(terminal.try_clone()?))
        .stdout(Stdio::piped())
        .spawn()?;
    let output = BufReader::new(child.stdout.take().context("a pipe")?);
    let mut session = Session { person: File::from(person), terminal, child, output, before };
    session.read_until("@end ready")?;
    Ok(session)
}

impl Session {
    fn read_until(&mut self, start: &str) -> Result<String> {
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(self.output.read_line(&mut line)? > 0, "the console ended before {start:?}");
            if line.starts_with(start) {
                return Ok(line);
            }
        }
    }

    /// Waits for the end, which must be a clean one.
    fn end(mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.code() == Some(0), "it ended with {status}");
        let after = tcgetattr(self.terminal.as_fd())?;
        // All of it: modes, special characters, line discipline, speeds.
        let (before, after) = (format!("{:?}", self.before), format!("{after:?}"));
        ensure!(before == after, "{before} became {after}");
        Ok(())
    }
}

fn typed(lab: &Lab, keys: &[u8]) -> Result<()> {
    let mut session = start(lab)?;
    session.person.write_all(keys)?;
    session.end()
}

fn signals(lab: &Lab) -> Result<()> {
    for signal in ["HUP", "QUIT"] {
        let session = start(lab)?;
        tests::signal::send(session.child.id(), signal)?;
        session.end().with_context(|| format!("SIG{signal}"))?;
    }
    Ok(())
}

fn typing(lab: &Lab) -> Result<()> {
    let mut session = start(lab)?;
    // Longer than the serial port's buffer of 64 bytes.
    let word = "w".repeat(300);
    session.person.write_all(format!("write /tmp/typed {word}\n").as_bytes())?;
    session.read_until("@end ok")?;
    session.person.write_all(b"cat /tmp/typed\n")?;
    let line = session.read_until("w")?;
    ensure!(line.starts_with(&word), "of {} letters {} arrived: {line:?}", word.len(), line.trim_end().len());
    session.person.write_all(b"poweroff\n")?;
    session.end()
}

/// Started with `&`, the monitor neither reads from the terminal nor changes it, so it is not stopped.
fn background(lab: &Lab) -> Result<()> {
    let mut session = start_in(lab, false)?;
    let modes = format!("{:?}", tcgetattr(session.terminal.as_fd())?);
    ensure!(modes == format!("{:?}", session.before), "the terminal was changed: {modes}");
    session.person.write_all(b"poweroff\n")?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    ensure!(session.child.try_wait()?.is_none(), "it has read what was typed, or was stopped");
    // The monitor is the only child of what stands for the shell.
    let shell = session.child.id();
    let monitor = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"))?;
    tests::signal::send(monitor.trim().parse()?, "TERM")?;
    session.end()
}
