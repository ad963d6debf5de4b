//! Sending signals to processes by number.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Sends `SIG<name>` to a process.
///
/// # Errors
/// When there is no such signal or process.
pub fn send(pid: u32, name: &str) -> Result<()> {
    let signal = match name {
        "INT" => Signal::INT,
        "TERM" => Signal::TERM,
        "HUP" => Signal::HUP,
        "QUIT" => Signal::QUIT,
        _ => bail!("SIG{name} is not sent here"),
    };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process id")?;
    Ok(kill_process(pid, signal)?)
}
