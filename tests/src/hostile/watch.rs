//! What the monitor is like meanwhile: how soon it answers, what it uses, what it prints.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmm::api::client;

use crate::lab::Lab;
use crate::vm::{Method, Vm};

/// Asks the control socket again and again.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Duration>>>,
}

/// How long the answers took.
#[derive(Debug)]
#[expect(dead_code, reason = "it is printed")]
pub(super) struct Answers {
    count: usize,
    median: Duration,
    pub(super) p99: Duration,
    longest: Duration,
}

impl Watch {
    pub(super) fn start(socket: PathBuf) -> Self {
        const PAUSE: Duration = Duration::from_millis(20);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut took = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let started = Instant::now();
                let (status, answer) = client::request(&socket, Method::GET, "/vm", Vec::new())?;
                ensure!(status == 200, "{status}: {answer:#}");
                took.push(started.elapsed());
                thread::sleep(PAUSE);
            }
            Ok(took)
        });
        Self { stop, thread }
    }

    pub(super) fn end(self) -> Result<Answers> {
        self.stop.store(true, Ordering::Relaxed);
        let mut took = self.thread.join().ok().context("the thread panicked")??;
        took.sort_unstable();
        let at =
            |percent: usize| took.get((took.len().max(1) - 1) * percent / 100).copied().context("no answer");
        Ok(Answers { count: took.len(), median: at(50)?, p99: at(99)?, longest: at(100)? })
    }
}

/// What the monitor uses.
#[derive(Debug)]
pub(super) struct Usage {
    pub(super) resident_kib: u64,
    pub(super) descriptors: usize,
}

impl Usage {
    /// With no connection open but those of [`Watch`].
    pub(super) fn of(vm: &Vm) -> Result<Self> {
        let open = || Ok::<_, anyhow::Error>(std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))?.count());
        // One may just be served.
        let counts = (0..10).map(|_| {
            thread::sleep(Duration::from_millis(5));
            open()
        });
        let descriptors = counts.collect::<Result<Vec<_>>>()?.into_iter().min().context("a count")?;
        Ok(Self { resident_kib: vm.resident_kib()?, descriptors })
    }
}

/// Names that the guest gave are escaped in what the commands print.
pub(super) fn nothing_reaches_a_terminal(lab: &Lab, vm: &Vm) -> Result<()> {
    const ESCAPE: u8 = 0x1b;
    for command in
        [&["events"][..], &["vm", "info"], &["vm", "vcpus"], &["patch", "list-targets"], &["patch", "list"]]
    {
        let output = Command::new(&lab.vmm).args(command).arg("--socket").arg(vm.socket()).output()?;
        let text = [output.stdout, output.stderr].concat();
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&text));
        let line = text.split(|byte| *byte == b'\n').find(|line| line.contains(&ESCAPE));
        ensure!(line.is_none(), "{command:?} prints {line:?}");
    }
    Ok(())
}
