//! A running VM, driven as a user would: the monitor's process, its console, its socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use guest::provision::initramfs::Initramfs;
use serde_json::Value;
use tempfile::TempDir;
use vmm::api::client;

use crate::cost::{self, Wait};
use crate::lab::Lab;

pub use hyper::Method;

/// Longest silence of a guest that was asked something. Generous: the rig is emulated.
const PATIENCE: Duration = Duration::from_secs(120);
const QUIET_CONSOLE: &str =
    "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 pci=off i8042.noaux i8042.nokbd";

/// Errors that a stock kernel logs whatever the monitor does: it was built for machines with a
/// PCI bus, and this one has none; and the processor that Bochs emulates has a flaw.
const KNOWN_ERRORS: [&str; 2] = [
    "PCI: Fatal: No config space access function found",
    "RETBleed: WARNING: Spectre v2 mitigation leaves CPU vulnerable to RETBleed attacks, data leaks possible!",
];

/// Where a guest has the files of its tracer, once they are mounted.
pub const TRACING: &str = "/sys/kernel/tracing";
/// The file by which a guest switches the static key `sched_schedstats`, and looks at it.
pub const SCHEDSTATS: &str = "/proc/sys/kernel/sched_schedstats";

/// The argument that has a monitor keep its audit log there.
#[must_use]
pub fn audit_log(at: &Path) -> String {
    format!("--audit-log={}", at.display())
}

/// How to start a VM.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Which kernel; the stock one of Linux 6.1 if not said.
    pub kernel: Option<PathBuf>,
    /// How many vCPUs.
    pub cpus: u8,
    /// How much memory.
    pub memory_mib: u64,
    /// Added to the kernel's command line.
    pub command_line: String,
    /// Added to the monitor's command line.
    pub arguments: Vec<String>,
    /// Added to the guest's initramfs: names, without a leading slash, and files.
    pub files: Vec<(String, PathBuf)>,
    /// Switches of `vmm-lab`, which is started instead of `vmm` if there are any.
    pub switches: Vec<String>,
    /// The control socket's path, instead of one in a folder that lives as long as the VM.
    pub socket: Option<PathBuf>,
    /// The user and group that run the monitor, if not those of the test.
    pub user: Option<u32>,
}

impl Setup {
    /// A VM of so many vCPUs.
    #[must_use]
    pub fn cpus(cpus: u8) -> Self {
        Self {
            kernel: None,
            cpus,
            memory_mib: 256,
            command_line: String::new(),
            arguments: Vec::new(),
            files: Vec::new(),
            switches: Vec::new(),
            socket: None,
            user: None,
        }
    }

    /// The same with programs that take their time, so that vCPUs meet what is in transit.
    #[must_use]
    pub fn lingering(mut self) -> Self {
        self.switches.extend(["--linger-ms".into(), "1".into()]);
        self
    }
}

/// A VM whose guest answers commands.
pub struct Vm {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    errors: Arc<Mutex<String>>,
    folder: TempDir,
    socket: PathBuf,
    patience: Duration,
    /// What the guest said when it was up.
    pub greeting: String,
    /// What came on standard output before that.
    pub boot_log: Vec<String>,
}

impl Vm {
    /// Starts a VM and waits until its init answers.
    ///
    /// # Errors
    /// With all that it printed when it does not come up.
    pub fn start(lab: &Lab, setup: &Setup) -> Result<Self> {
        cost::timed(Wait::Boot, || Self::boot(lab, setup))
    }

    /// Starts VMs side by side: a guest that boots keeps one CPU busy, and the host has two.
    ///
    /// # Errors
    /// As [`Vm::start`], of the first that does not come up.
    pub fn start_all<const N: usize>(lab: &Lab, setups: &[Setup; N]) -> Result<[Self; N]> {
        Self::start_each(lab, setups)?.try_into().map_err(|_| anyhow!("not {N} VMs"))
    }

    /// The same for any number.
    ///
    /// # Errors
    /// As [`Vm::start_all`].
    pub fn start_each(lab: &Lab, setups: &[Setup]) -> Result<Vec<Self>> {
        cost::timed_at_once(Wait::Boot, setups.len() as u64, || {
            std::thread::scope(|scope| {
                let boots: Vec<_> =
                    setups.iter().map(|setup| scope.spawn(move || Self::boot(lab, setup))).collect();
                let joined = boots.into_iter().map(std::thread::ScopedJoinHandle::join);
                joined.map(|vm| vm.map_err(|_| anyhow!("starting a VM panicked"))?).collect()
            })
        })
    }

    fn boot(lab: &Lab, setup: &Setup) -> Result<Self> {
        let folder = TempDir::new()?;
        let with_files = folder.path().join("initrd");
        let initrd = if setup.files.is_empty() {
            &lab.initrd
        } else {
            write_initramfs(lab, &setup.files, &with_files)?;
            &with_files
        };
        let socket = setup.socket.clone().unwrap_or_else(|| folder.path().join("socket"));
        let monitor = if setup.switches.is_empty() { &lab.vmm } else { &lab.vmm_lab };
        let mut command = Command::new(monitor);
        if let Some(user) = setup.user {
            std::os::unix::fs::chown(folder.path(), Some(user), Some(user))?;
            command.uid(user).gid(user);
        }
        let mut child = command
            .arg("--kernel")
            .arg(setup.kernel.as_ref().unwrap_or(&lab.kernel))
            .arg("--initrd")
            .arg(initrd)
            .args(["--cpus", &setup.cpus.to_string(), "--memory", &setup.memory_mib.to_string()])
            .arg("--cmdline")
            .arg(format!("{QUIET_CONSOLE} {}", setup.command_line))
            .arg("--api-socket")
            .arg(&socket)
            .args(&setup.arguments)
            .args(&setup.switches)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting vmm")?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(mut stderr)) = (stdin, stdout, stderr) else {
            bail!("vmm has no pipes");
        };
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            while let Ok(1..) = reader.read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        let errors = Arc::new(Mutex::new(String::new()));
        let collected = errors.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = stderr.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                collected.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        let (greeting, boot_log, patience) = (String::new(), Vec::new(), PATIENCE * lab.slow);
        let mut vm = Self { child, stdin, lines, errors, folder, socket, patience, greeting, boot_log };
        let (before, greeting) = vm.answer()?;
        (vm.boot_log, vm.greeting) = (before, greeting);
        ensure!(vm.greeting.starts_with("ready "), "init said {:?}", vm.greeting);
        Ok(vm)
    }

    /// The control socket's path.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// A folder that lives as long as the VM.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The monitor's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the monitor wrote to standard error.
    #[must_use]
    pub fn errors(&self) -> String {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads up to a line that ends an answer; returns the lines before it and its rest.
    fn answer(&mut self) -> Result<(Vec<String>, String)> {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(self.patience) {
                Ok(line) => match line.strip_prefix("@end ") {
                    Some(rest) => return Ok((before, rest.to_owned())),
                    None => before.push(line),
                },
                Err(why) => bail!(
                    "the guest says nothing ({why}); the monitor: {:?} {}; the console so far:\n{}",
                    self.child.try_wait(),
                    self.errors(),
                    before.join("\n")
                ),
            }
        }
    }

    /// Gives the guest's init a command; returns the lines it answered and what it added to
    /// its last line.
    ///
    /// # Errors
    /// When the guest reports an error or stays silent.
    pub fn ask(&mut self, command: &str) -> Result<(Vec<String>, String)> {
        let wait = match command.split(' ').next() {
            Some("hammer" | "count") => Wait::Workload,
            _ => Wait::Command,
        };
        writeln!(self.stdin, "{command}")?;
        let (lines, last) = cost::timed(wait, || self.answer())?;
        match last.strip_prefix("ok") {
            Some(rest) => Ok((lines, rest.trim().to_owned())),
            None => bail!("{command}: {last}"),
        }
    }

    /// Mounts the files of the guest's tracer at [`TRACING`].
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn mount_tracing(&mut self) -> Result<()> {
        self.ask(&format!("mount tracefs {TRACING}")).map(drop)
    }

    /// Gives a command by which another kernel takes the place of the guest's, and waits until its init
    /// answers. Returns what it said.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn replace_kernel(&mut self, command: &str) -> Result<String> {
        self.tell(command)?;
        let (before, greeting) = cost::timed(Wait::Boot, || self.answer())?;
        ensure!(greeting.starts_with("ready "), "{command}: {greeting:?}\n{}", before.join("\n"));
        Ok(greeting)
    }

    /// Fails if the guest's kernel logged errors since this was last asked.
    ///
    /// # Errors
    /// With the errors.
    pub fn expect_no_kernel_errors(&mut self) -> Result<()> {
        let errors = self.kernel_errors()?;
        ensure!(errors.is_empty(), "the kernel log has errors:\n{}", errors.join("\n"));
        Ok(())
    }

    /// The errors that the guest's kernel logged since this was last asked.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn kernel_errors(&mut self) -> Result<Vec<String>> {
        let (lines, _) = self.ask("dmesg")?;
        let errors = lines.iter().filter_map(|line| line.strip_prefix("@dmesg "));
        Ok(errors.filter(|line| !KNOWN_ERRORS.contains(line)).map(str::to_owned).collect())
    }

    /// Sends a request to the control socket.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn request(&self, method: Method, uri: &str, body: &[u8]) -> Result<(u16, Value)> {
        cost::timed(Wait::Request, || client::request(&self.socket(), method, uri, body.to_vec()))
            .with_context(|| format!("the monitor's standard error: {:?}", self.errors()))
    }

    /// Switches the guest off.
    ///
    /// # Errors
    /// When it does not end, or the monitor's exit code is not 0.
    pub fn power_off(mut self) -> Result<()> {
        writeln!(self.stdin, "poweroff")?;
        let code = self.wait()?;
        ensure!(code == 0, "powering off: exit code {code}: {}", self.errors());
        Ok(())
    }

    /// Waits for the answer to a command that was given by [`Vm::tell`].
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn answered(&mut self) -> Result<String> {
        let (_, last) = self.answer()?;
        last.strip_prefix("ok").map(|rest| rest.trim().to_owned()).with_context(|| last.clone())
    }

    /// What the monitor tells of the kernel, once it has read its image.
    ///
    /// # Errors
    /// When it does not.
    pub fn kernel(&self) -> Result<Value> {
        let until = Instant::now() + self.patience;
        loop {
            let (_, info) = self.request(Method::GET, "/vm", b"")?;
            match &info["kernel"] {
                kernel if kernel["release"].is_string() => return Ok(kernel.clone()),
                _ if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
                _ => bail!("the kernel's image is not read: {info:#}"),
            }
        }
    }

    /// Waits so many times longer from now on for a guest that is silent.
    pub fn be_patient(&mut self, times: u32) {
        self.patience *= times;
    }

    /// Gives a command without waiting for its answer.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        Ok(writeln!(self.stdin, "{command}")?)
    }

    /// Gives a command that ends the VM and returns the monitor's exit code.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end_by(mut self, command: &str) -> Result<i32> {
        writeln!(self.stdin, "{command}")?;
        self.wait()
    }

    /// The monitor's exit code, if it has ended.
    ///
    /// # Errors
    /// When a signal ended it.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        let status = self.child.try_wait()?;
        status.map(|status| status.code().with_context(|| format!("{status}: {}", self.errors()))).transpose()
    }

    /// Waits for the monitor's end; returns its exit code.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait(&mut self) -> Result<i32> {
        cost::timed(Wait::End, || self.wait_for_the_end())
    }

    fn wait_for_the_end(&mut self) -> Result<i32> {
        // The console closes when the monitor ends.
        loop {
            match self.lines.recv_timeout(self.patience) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("the VM does not end"),
            }
        }
        self.child.wait()?.code().context("the monitor was killed")
    }
}

/// Writes an initramfs: the lab's with these files, by name without a leading slash. The kernel unpacks archives
/// that follow each other (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
///
/// # Errors
/// When a file can't be read or written.
pub fn write_initramfs(lab: &Lab, files: &[(String, PathBuf)], to: &Path) -> Result<()> {
    let mut archive = Initramfs::default();
    for (name, file) in files {
        archive = archive.file(name, file)?;
    }
    archive.write(to)?;
    let more = std::fs::read(to)?;
    std::fs::write(to, [std::fs::read(&lab.initrd)?, more].concat())?;
    Ok(())
}

impl Vm {
    /// The signal that ended the monitor, if one did.
    ///
    /// # Errors
    /// What the system returned.
    pub fn signal(&mut self) -> Result<Option<i32>> {
        use std::os::unix::process::ExitStatusExt;
        Ok(self.child.wait()?.signal())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already.
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            cost::timed(Wait::End, || {
                let _ = self.child.kill();
                let _ = self.child.wait();
            });
        }
    }
}

/// The number in `name=number`, one of the words that a guest's init answered.
///
/// # Errors
/// When there is none.
pub fn field(line: &str, name: &str) -> Result<u64> {
    let word = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    Ok(word.with_context(|| format!("{line:?} has no {name}"))?.parse()?)
}
