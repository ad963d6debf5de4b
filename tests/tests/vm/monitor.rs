//! Promise: the monitor ends when it is told to, whatever the reader of its output does, and it ends as a
//! whole.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};
use vmm::api::client;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("monitor::a_stalled_reader_stops_neither_guest_nor_socket_nor_signals", stalled),
    ("monitor::a_panic_ends_it_at_once", panicking),
    ("monitor::a_dead_socket_is_replaced_and_the_log_tells", killed),
];

/// Waits for a process's end.
fn ends_within(child: &mut Child, patience: Duration) -> Result<std::process::ExitStatus> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if started.elapsed() > patience {
            // It may end right now.
            let _ = child.kill();
            bail!("it has not ended after {patience:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Nobody reads the console any more, and the guest goes on writing.
fn stalled(lab: &Lab) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("socket");
    let mut child = Command::new(&lab.vmm)
        .arg("--kernel")
        .arg(&lab.kernel)
        .arg("--initrd")
        .arg(&lab.initrd)
        .args(["--cpus", "2", "--cmdline", "console=ttyS0 quiet loglevel=1 panic=-1 pci=off"])
        .arg("--api-socket")
        .arg(&socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut keys, output) = (child.stdin.take().context("a pipe")?, child.stdout.take().context("a pipe")?);
    let mut output = BufReader::new(output);
    let mut line = String::new();
    while !line.starts_with("@end ready") {
        line.clear();
        ensure!(output.read_line(&mut line)? > 0, "it ended");
    }
    let get = |uri: &str| -> Result<Value> { Ok(client::request(&socket, Method::GET, uri, Vec::new())?.1) };
    // Megabytes; the pipe and the monitor's own buffer are full soon.
    keys.write_all(b"cat /proc/kallsyms\n")?;
    let started = Instant::now();
    while get("/vm")?["console_dropped_bytes"] == 0 {
        ensure!(started.elapsed() < Duration::from_secs(100) * lab.slow, "nothing is dropped");
        std::thread::sleep(Duration::from_millis(200));
    }
    // A key, which the same thread passes on that serves signals.
    keys.write_all(b"x")?;
    let before = get("/vm")?["console_dropped_bytes"].as_u64();
    std::thread::sleep(Duration::from_secs(1));
    ensure!(get("/vm")?["console_dropped_bytes"].as_u64() > before, "the guest waits for the reader");
    let plan = redirect_plan("meanwhile", None).to_string().into_bytes();
    let (status, answer) = client::request(&socket, Method::POST, "/patches", plan)?;
    ensure!(status == 200, "{answer:#}");
    tests::signal::send(child.id(), "TERM")?;
    let status = ends_within(&mut child, Duration::from_secs(5) * lab.slow)?;
    ensure!(status.code() == Some(0), "it ended with {status}");
    Ok(())
}

/// The controller panics while the guest is held.
fn panicking(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { switches: vec!["--panic-in-hold".to_owned()], ..Setup::cpus(2) })?;
    let plan = redirect_plan("panics", Some("hold")).to_string();
    let answer = vm.request(Method::POST, "/patches", plan.as_bytes());
    ensure!(answer.is_err(), "{answer:?}");
    // It was killed, and not by us.
    let ended = vm.wait().map(|code| format!("exit code {code}"));
    ensure!(ended.is_err(), "{ended:?}");
    ensure!(vm.signal()? == Some(6), "not by SIGABRT");
    let errors = vm.errors();
    ensure!(errors.contains(tests::drivers::PANIC) && errors.contains("controller"), "{errors}");
    Ok(())
}

/// A monitor that was killed leaves its socket; the next replaces it, and says in its log what it does.
fn killed(lab: &Lab) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (socket, log) = (folder.path().join("socket"), folder.path().join("log"));
    let run = || -> Result<(Child, BufReader<std::process::ChildStdout>)> {
        let mut child = Command::new(&lab.vmm)
            .arg("--kernel")
            .arg(&lab.kernel)
            .arg("--initrd")
            .arg(&lab.initrd)
            .arg("--api-socket")
            .arg(&socket)
            .arg("--log-file")
            .arg(&log)
            .args(["--log-level", "info", "--log-format", "json"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().context("a pipe")?);
        Ok((child, output))
    };
    let started = |output: &mut BufReader<std::process::ChildStdout>| -> Result<()> {
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the guest says nothing");
        Ok(())
    };
    let (mut first, mut output) = run()?;
    started(&mut output)?;
    let (mut second, _) = run()?;
    let status = ends_within(&mut second, Duration::from_secs(20) * lab.slow)?;
    ensure!(status.code() == Some(2), "a socket that is in use: {status}");
    first.kill()?;
    ensure!(first.wait()?.signal() == Some(9) && socket.exists(), "it was not killed, or it tidied up");
    let (mut third, mut output) = run()?;
    started(&mut output)?;
    let (status, _) = client::request(&socket, Method::GET, "/vm", Vec::new())?;
    ensure!(status == 200, "the new one does not answer: {status}");
    tests::signal::send(third.id(), "TERM")?;
    ensure!(ends_within(&mut third, Duration::from_secs(20) * lab.slow)?.code() == Some(0));
    ensure!(!socket.exists(), "the socket is left behind");
    let text = std::fs::read_to_string(&log)?;
    let entries: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let starts = entries.iter().filter(|entry| entry["message"] == "the VM starts").count();
    let ends = entries.iter().filter(|entry| entry["message"] == "the VM ends").count();
    ensure!(starts == 2 && ends == 1, "{text}");
    Ok(())
}
