//! `vmm doctor`: tests whether this host can run and patch guests.
//!
//! That `/dev/kvm` exists proves nothing: on some hosts it emulates guests in software and lacks
//! what patching needs. So each probe runs a guest of a few instructions.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug, kvm_regs};
use kvm_ioctls::{Kvm, VcpuFd};
use patcher::addr::{Gpa, Gva};
use serde::Serialize;

use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::output;
use crate::cli::render::page::{Page, bold, green, plain, red};
use crate::host::membarrier::Membarrier;
use crate::host::priority;
use crate::host::sandbox::{self, Files};
use crate::host::signal_mask;
use crate::kvm::Vm;
use crate::kvm::exit::{self, Exit};
use crate::kvm::kick::{self, Kick};
use crate::memory::ram_file::{self, Pages};
use crate::memory::{GuestRam, PAGE};

/// The result of a probe.
#[derive(Debug, Serialize)]
struct Row {
    /// The probe.
    probe: &'static str,
    /// Whether it worked.
    ok: bool,
    /// What it found.
    found: String,
    /// What to do, if it did not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Findings {
    usable: bool,
    probes: Vec<Row>,
}

type Probe = fn() -> Result<String, String>;

/// The probes, and what to do when one fails.
const PROBES: [(&str, Probe, &str); 11] = [
    (
        "CPU virtualization",
        cpu_flags,
        "enable VT-x or AMD-V in the firmware, or nested virtualization if this host is a VM; \
         the tests and the demo use an emulated host (the rig) instead",
    ),
    (
        "/dev/kvm",
        open_kvm,
        "load kvm-intel or kvm-amd, and let this user read and write /dev/kvm (group kvm)",
    ),
    ("a guest runs", guest_runs, "see the host's kernel log; nothing works without this"),
    (
        "int3 exits to the monitor",
        int3_exits,
        "a KVM that emulates guests in software cannot do this: use a host with VMX or SVM; under QEMU's TCG \
         use the corrected QEMU that the tests build",
    ),
    (
        "a write to a protected page exits",
        protected_write_exits,
        "KVM must report a write to a read-only mapping of guest memory (EFAULT); see the host's kernel log",
    ),
    ("a running vCPU can be kicked out", kick_works, "needs KVM_CAP_IMMEDIATE_EXIT (Linux 4.13)"),
    (
        "membarrier SYNC_CORE",
        membarrier_works,
        "needs Linux 4.16 with CONFIG_MEMBARRIER; without it fences kick every vCPU and wait for it",
    ),
    (
        "the controller may go first",
        may_raise_priority,
        "needs CAP_SYS_NICE, or RLIMIT_NICE of 40; without it programs take longer on a busy host",
    ),
    (
        LARGE_PAGES,
        has_large_pages,
        "run as root (CAP_SYS_ADMIN, Linux 5.2), or write advise to \
         /sys/kernel/mm/transparent_hugepage/shmem_enabled; without it a guest takes about twice as long to boot",
    ),
    (
        SANDBOX,
        sandbox_works,
        "needs CONFIG_SECCOMP_FILTER (Linux 4.14); without it VMs run with --no-sandbox only",
    ),
    (
        LANDLOCK,
        landlock_works,
        "needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and landlock among lsm=; without it the sandbox has \
         seccomp filters only",
    ),
];

/// Probes whose failure leaves a usable, if slower, host.
const OPTIONAL: [&str; 5] =
    ["membarrier SYNC_CORE", "the controller may go first", LARGE_PAGES, SANDBOX, LANDLOCK];
const LARGE_PAGES: &str = "guest memory has large pages";
const SANDBOX: &str = "the sandbox";
const LANDLOCK: &str = "Landlock";
/// The CPU's flags explain a failure; what counts is whether guests run.
const EXPLAINING: &str = "CPU virtualization";

/// Runs all probes and prints the results.
pub(super) fn run(json: bool) -> Result<ExitStatus, Error> {
    let probes: Vec<Row> = PROBES
        .iter()
        .map(|&(probe, tried, remedy)| match tried() {
            Ok(found) => Row { probe, ok: true, found, remedy: None },
            Err(found) => Row { probe, ok: false, found, remedy: Some(remedy) },
        })
        .collect();
    let usable = probes.iter().all(|row| row.ok || OPTIONAL.contains(&row.probe) || row.probe == EXPLAINING);
    let findings = Findings { usable, probes };
    if json {
        output::print_json(&findings)?
    } else {
        output::print(&page(&findings))?
    }
    Ok(if usable { ExitStatus::Done } else { ExitStatus::Failed })
}

fn page(findings: &Findings) -> Page {
    let mut page = Page::default();
    page.table(
        findings
            .probes
            .iter()
            .map(|row| [if row.ok { green("ok") } else { red("FAIL") }, bold(row.probe), plain(&row.found)]),
    );
    for row in &findings.probes {
        if let Some(remedy) = row.remedy {
            page.line([bold(row.probe), plain(": "), plain(remedy)]);
        }
    }
    if findings.usable {
        page.line([green("This host can run and patch guests.")]);
        return page;
    }
    let worked = |probe| findings.probes.iter().any(|row| row.probe == probe && row.ok);
    if worked("/dev/kvm") && !worked(EXPLAINING) {
        page.line([plain(
            "/dev/kvm is unusable here: the CPU has no virtualization, so guests are emulated in software, and \
             that emulation lacks what failed above.",
        )]);
    }
    page.line([
        red("This host cannot run and patch guests directly."),
        plain(" `cargo demo` and `cargo test` use the rig instead."),
    ]);
    page
}

fn cpu_flags() -> Result<String, String> {
    let info = fs::read_to_string("/proc/cpuinfo").map_err(|e| format!("/proc/cpuinfo: {e}"))?;
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    match ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|word| word == *flag)) {
        Some(flag) => Ok(format!("{flag} in /proc/cpuinfo")),
        None if fs::exists("/dev/kvm").unwrap_or(false) => {
            Err("neither vmx nor svm in /proc/cpuinfo: /dev/kvm emulates guests in software".into())
        }
        None => Err("neither vmx nor svm in /proc/cpuinfo".into()),
    }
}

fn open_kvm() -> Result<String, String> {
    let kvm = Kvm::new().map_err(|e| e.to_string())?;
    match kvm.get_api_version() {
        12 => Ok(format!("API 12, up to {} vCPUs", kvm.get_max_vcpus())),
        other => Err(format!("API version {other}, not 12")),
    }
}

/// In a thread of its own: the priority of this one must stay as it is.
fn may_raise_priority() -> Result<String, String> {
    let raised = thread::spawn(priority::raise).join().map_err(|_| "it panicked")?;
    raised.map(|()| "nice -20".into()).map_err(|error| error.to_string())
}

fn has_large_pages() -> Result<String, String> {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let choices = fs::read_to_string(SETTING).map_err(|e| format!("{SETTING}: {e}"))?;
    let setting = choices.split(['[', ']']).nth(1).unwrap_or("nothing");
    let (_, pages) = ram_file::zeroed(PAGE).map_err(|e| e.to_string())?;
    match (pages, setting) {
        (Pages::Asked, other) if other != "deny" => Ok(pages.to_string()),
        (Pages::HostSetting, "advise" | "within_size" | "always" | "force") => {
            Ok(format!("shmem_enabled says {setting}"))
        }
        _ => Err(format!("{pages}, which says {setting}")),
    }
}

fn sandbox_works() -> Result<String, String> {
    sandbox::tried()
        .map(|_| "a thread without capabilities, and with seccomp filters".into())
        .map_err(|e| e.to_string())
}

fn landlock_works() -> Result<String, String> {
    match sandbox::tried().map_err(|e| e.to_string())? {
        Files::Denied => Ok("a thread that opens no files".into()),
        Files::PartlyDenied => Ok("a thread that opens no files; this kernel has an older version".into()),
        Files::Open => Err("this kernel lacks it".into()),
    }
}

fn guest_runs() -> Result<String, String> {
    // mov al, 42; out 0x80, al
    let exit = Tiny::new(&[0xb0, 42, 0xe6, 0x80])?.run(|exit| match exit {
        Exit::PortOut(0x80, [42]) => Ok(()),
        other => Err(unexpected(&other)),
    });
    exit.map(|()| "one real-mode instruction after another".into())
}

fn int3_exits() -> Result<String, String> {
    // int3
    let mut tiny = Tiny::new(&[0xcc])?;
    let debug =
        kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, ..Default::default() };
    tiny.vcpu.set_guest_debug(&debug).map_err(|e| format!("KVM_SET_GUEST_DEBUG: {e}"))?;
    tiny.run(|exit| match exit {
        Exit::Breakpoint(at) if at == Gva(CODE) => Ok(()),
        other => Err(unexpected(&other)),
    })?;
    Ok("KVM_EXIT_DEBUG at the int3".into())
}

fn protected_write_exits() -> Result<String, String> {
    // mov byte [0x3000], 7; out 0x80, al
    let code = [0xc6, 0x06, 0x00, 0x30, 7, 0xe6, 0x80];
    let page = Gpa(0x3000);
    let mut tiny = Tiny::new(&code)?;
    let ram = tiny.vm.ram().clone();
    let content = || {
        let mut byte = [0];
        ram.read(page, &mut byte).map(|()| byte[0]).map_err(|e| e.to_string())
    };
    ram.write_protect(&(page..Gpa(page.0 + 1)), true).map_err(|e| e.to_string())?;
    tiny.run(|exit| match exit {
        Exit::ProtectedWrite(_) => Ok(()),
        other => Err(unexpected(&other)),
    })?;
    if content()? != 0 {
        return Err("the write exited, but took effect".into());
    }
    ram.write_protect(&(page..Gpa(page.0 + 1)), false).map_err(|e| e.to_string())?;
    tiny.run(|exit| match exit {
        Exit::PortOut(..) => Ok(()),
        other => Err(unexpected(&other)),
    })?;
    match content()? {
        7 => Ok("EFAULT before the write, which then went through".into()),
        other => Err(format!("after unprotecting, the write left {other}")),
    }
}

fn kick_works() -> Result<String, String> {
    // jmp $
    let mut tiny = Tiny::new(&[0xeb, 0xfe])?;
    tiny.patience = Duration::from_millis(100);
    tiny.run(|exit| match exit {
        Exit::Interrupted => Ok(()),
        other => Err(unexpected(&other)),
    })?;
    Ok("out of an endless loop".into())
}

fn membarrier_works() -> Result<String, String> {
    let barrier = Membarrier::register().map_err(|e| e.to_string())?;
    barrier.sync_core().map_err(|e| e.to_string())?;
    Ok("registered and done".into())
}

fn unexpected(exit: &Exit<'_>) -> String {
    match exit {
        Exit::Failed(what) if what.contains("InternalError") => {
            "KVM_EXIT_INTERNAL_ERROR: KVM emulates guest code and does not know this instruction".into()
        }
        Exit::Interrupted => "the vCPU was stuck for five seconds".into(),
        other => format!("the vCPU exited with {other:?} instead"),
    }
}

/// Where the tiny guest's code lies.
const CODE: u64 = 0x1000;

/// A guest of a few instructions in real mode, with a watchdog.
struct Tiny {
    vcpu: VcpuFd,
    kick: Arc<Kick>,
    vm: Vm,
    patience: Duration,
}

impl Tiny {
    fn new(code: &[u8]) -> Result<Self, String> {
        let text = |e: &dyn std::error::Error| e.to_string();
        let ram = Arc::new(GuestRam::new(16 * PAGE).map_err(|e| text(&e))?);
        ram.write(Gpa(CODE), code).map_err(|e| text(&e))?;
        let vm = Vm::new(ram, 1).map_err(|e| text(&e))?;
        let vcpu = vm.vcpu(0).map_err(|e| text(&e))?;
        let mut sregs = vcpu.get_sregs().map_err(|e| text(&e))?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).map_err(|e| text(&e))?;
        vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).map_err(|e| text(&e))?;
        kick::install_handler().map_err(|e| text(&e))?;
        let kick = Arc::new(Kick::new(&vcpu).map_err(|e| text(&e))?);
        Ok(Self { vcpu, kick, vm, patience: Duration::from_secs(5) })
    }

    /// Enters the guest once and judges the exit.
    fn run<T>(&mut self, judge: impl FnOnce(Exit<'_>) -> Result<T, String>) -> Result<T, String> {
        self.kick.adopt_current_thread().map_err(|e| e.to_string())?;
        let (done, watchdog) = watchdog(self.kick.clone(), self.patience).map_err(|e| e.to_string())?;
        let verdict = judge(exit::run(&mut self.vcpu));
        drop(done);
        // The watchdog does not panic.
        let _ = watchdog.join();
        // It blocked what ends a process.
        signal_mask::take_all().map_err(|e| e.to_string())?;
        self.kick.disown();
        self.kick.clear();
        verdict
    }
}

/// Kicks the vCPU after `patience`, unless the sender is dropped before.
fn watchdog(kick: Arc<Kick>, patience: Duration) -> io::Result<(Sender<()>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new().name("watchdog".into()).spawn(move || {
        if receiver.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            kick.set();
            kick.signal();
        }
    })?;
    Ok((sender, thread))
}
