//! Promise: a guest has the terminal to itself while it runs, and the terminal is as it was
//! when the monitor ends.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use tests::lab::Lab;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("terminal::ctrl_a_x_ends_it_and_restores_the_terminal", |lab| typed(lab, b"\x01x")),
    ("terminal::ctrl_c_ends_it_and_restores_the_terminal", |lab| typed(lab, b"\x03")),
    ("terminal::typing_reaches_the_guest", typing),
];

struct Session {
    person: File,
    terminal: File,
    child: std::process::Child,
    output: BufReader<std::process::ChildStdout>,
    before: Termios,
}

/// Starts a VM on a pseudo-terminal and waits until its init is up.
fn start(lab: &Lab) -> Result<Session> {
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&person)?;
    unlockpt(&person)?;
    let path = ptsname(&person, Vec::new())?.into_string()?;
    let terminal = OpenOptions::new().read(true).write(true).open(path)?;
    let before = tcgetattr(&terminal)?;
    ensure!(before.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO), "a strange terminal");
    let mut child = Command::new(&lab.vmm)
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
    let raw = tcgetattr(session.terminal.as_fd())?;
    ensure!(!raw.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO), "the terminal is not raw");
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
        ensure!(after.local_modes == self.before.local_modes, "{:?} became {:?}", self.before, after);
        Ok(())
    }
}

fn typed(lab: &Lab, keys: &[u8]) -> Result<()> {
    let mut session = start(lab)?;
    session.person.write_all(keys)?;
    session.end()
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
