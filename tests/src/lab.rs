//! The lab: a host where guests can run, and all that they need.
//!
//! On a machine with VMX or SVM that host is this machine. Elsewhere it is the rig's: this very
//! program is started again in it, so a test is written once, as if KVM were local.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest::provision::binaries::{self, Binaries, Monitor};
use guest::provision::initramfs::Initramfs;
use guest::provision::kernel::Kernel;
use guest::provision::objects::{self, Pair};
use guest::provision::{cache, livepatch};
use guest::rig::qemu;
use guest::rig::wire::Request;
use guest::rig::{Emulator, Rig, Stream};

const VMM: &str = "LAB_VMM";
const VMM_LAB: &str = "LAB_VMM_LAB";
const KERNEL: &str = "LAB_KERNEL";
const LATER_KERNEL: &str = "LAB_LATER_KERNEL";
const CURRENT_KERNEL: &str = "LAB_CURRENT_KERNEL";
const INITRD: &str = "LAB_INITRD";
const IN_RIG: &str = "LAB_IN_RIG";
const SLOW: &str = "LAB_SLOW";
/// Which rig is wanted: `bochs`, or the usual one.
const RIG: &str = "GUEST_RIG";
/// Where the objects of either kernel are in an emulated host.
const OBJECTS: &str = "guest/objects";
const LATER_OBJECTS: &str = "guest/objects-later";
/// How much longer everything may take in Bochs.
const BOCHS_SLOWNESS: u32 = 20;

/// What a guest needs, as paths that are valid in this process.
#[derive(Debug, Clone)]
pub struct Lab {
    /// The monitor.
    pub vmm: PathBuf,
    /// The monitor with switches for tests (`vmm-lab`).
    pub vmm_lab: PathBuf,
    /// The stock kernel, Linux 6.1.
    pub kernel: PathBuf,
    /// A stock kernel of a later generation, Linux 6.12.
    pub later_kernel: PathBuf,
    /// The newest stock kernel there is (7.x).
    pub current_kernel: PathBuf,
    /// The guest's initramfs, with the workload.
    pub initrd: PathBuf,
    /// Whether this process is in the rig's host, which runs nothing else.
    pub in_rig: bool,
    /// How many times longer than usual everything may take.
    pub slow: u32,
}

impl Lab {
    /// The lab that an outer process prepared for this one, if there is one.
    pub fn inherited() -> Option<Self> {
        let path = |name| std::env::var_os(name).map(PathBuf::from);
        let in_rig = std::env::var_os(IN_RIG).is_some_and(|value| value == "true");
        let (kernel, later_kernel, current_kernel) =
            (path(KERNEL)?, path(LATER_KERNEL)?, path(CURRENT_KERNEL)?);
        let slow = std::env::var(SLOW).ok().and_then(|value| value.parse().ok()).unwrap_or(1);
        let (vmm, vmm_lab, initrd) = (path(VMM)?, path(VMM_LAB)?, path(INITRD)?);
        Some(Self { vmm, vmm_lab, kernel, later_kernel, current_kernel, initrd, in_rig, slow })
    }

    /// The same lab with the kernel of a later generation in the place of the first.
    #[must_use]
    pub fn with_later_kernel(&self) -> Self {
        Self { kernel: self.later_kernel.clone(), ..self.clone() }
    }

    /// Two objects of the source of `kernel`, before and after the change of that name.
    ///
    /// # Errors
    /// When they can't be built, or this is a host that was prepared without them.
    pub fn objects(&self, name: &str) -> Result<Pair> {
        let is_later = self.kernel == self.later_kernel;
        if !self.in_rig {
            let kernel = if is_later { Kernel::backports() } else { Kernel::debian() };
            return Ok(objects::pair(&kernel?, name)?);
        }
        let kernel = if is_later { LATER_OBJECTS } else { OBJECTS };
        let folder = Path::new("/").join(kernel).join(name);
        let pair = Pair { before: folder.join("before.o"), after: folder.join("after.o") };
        ensure!(pair.after.exists(), "{name}: this host was prepared without such objects");
        Ok(pair)
    }

    fn environment(&self) -> Vec<(String, String)> {
        [
            (VMM, self.vmm.display().to_string()),
            (VMM_LAB, self.vmm_lab.display().to_string()),
            (KERNEL, self.kernel.display().to_string()),
            (LATER_KERNEL, self.later_kernel.display().to_string()),
            (CURRENT_KERNEL, self.current_kernel.display().to_string()),
            (INITRD, self.initrd.display().to_string()),
            (IN_RIG, self.in_rig.to_string()),
            (SLOW, self.slow.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }
}

/// Where guests run.
pub enum Place {
    /// On this machine.
    Here(Lab),
    /// In the rig's host.
    Rig(Rigged),
}

/// The rig's host, where this program is `/bin/self`.
pub struct Rigged {
    rig: Box<Rig>,
    lab: Lab,
}

/// Provides everything that guests need, with that build of the monitor, and a place to run them.
///
/// # Errors
/// Whatever keeps it from being provided, with what to do about it where that is known.
pub fn prepare(monitor: Monitor) -> Result<Place> {
    prepare_with(monitor, &[])
}

/// The same with what [`Lab::objects`] gives: objects of each kernel take two minutes when they are built for the
/// first time.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_with_objects(monitor: Monitor) -> Result<Place> {
    let mut named: Vec<(String, PathBuf)> = Vec::new();
    for (kernel, folder) in [(Kernel::debian()?, OBJECTS), (Kernel::backports()?, LATER_OBJECTS)] {
        for (name, Pair { before, after }) in objects::pairs(&kernel)? {
            named.push((format!("{folder}/{name}/before.o"), before));
            named.push((format!("{folder}/{name}/after.o"), after));
        }
    }
    let files: Vec<_> = named.iter().map(|(name, path)| (name.as_str(), path.as_path())).collect();
    prepare_with(monitor, &files)
}

/// The same as [`prepare`] with more files in the host if that is emulated: their names there, without a leading slash,
/// and where they are here.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_with(monitor: Monitor, files: &[(&str, &Path)]) -> Result<Place> {
    let (kernel, later) = (Kernel::debian()?, Kernel::backports()?);
    let current_kernel = Kernel::current()?.bzimage;
    let binaries = binaries::build(monitor)?;
    let initrd = guest_initrd(&binaries, &[&kernel, &later])?;
    let later_kernel = later.bzimage;
    let wanted = std::env::var(RIG).unwrap_or_default();
    let (emulator, slow) = match wanted.as_str() {
        "bochs" => (Emulator::Bochs, BOCHS_SLOWNESS),
        "" if usable_kvm(&binaries.vmm) => {
            let Binaries { vmm, vmm_lab, .. } = binaries;
            let (kernel, in_rig) = (kernel.bzimage, false);
            let lab = Lab { vmm, vmm_lab, kernel, later_kernel, current_kernel, initrd, in_rig, slow: 1 };
            return Ok(Place::Here(lab));
        }
        "" | "qemu" => (Emulator::Qemu(qemu::corrected()?), 1),
        other => bail!("{RIG}={other}: there are qemu and bochs"),
    };
    let me = std::env::current_exe().context("this program's own path")?;
    let own: [(&str, &Path); 7] = [
        ("bin/vmm", &binaries.vmm),
        ("bin/vmm-lab", &binaries.vmm_lab),
        ("bin/self", &me),
        ("guest/bzImage", &kernel.bzimage),
        ("guest/bzImage-later", &later_kernel),
        ("guest/bzImage-current", &current_kernel),
        ("guest/initrd", &initrd),
    ];
    let rig = Rig::start(&emulator, &kernel, &binaries.rig_init, &[&own, files].concat())?;
    let lab = Lab {
        vmm: "/bin/vmm".into(),
        vmm_lab: "/bin/vmm-lab".into(),
        kernel: "/guest/bzImage".into(),
        later_kernel: "/guest/bzImage-later".into(),
        current_kernel: "/guest/bzImage-current".into(),
        initrd: "/guest/initrd".into(),
        in_rig: true,
        slow,
    };
    Ok(Place::Rig(Rigged { rig: Box::new(rig), lab }))
}

/// Asks the monitor itself, which finds out by trying. Without VMX or SVM it need not be
/// asked: its probes would only time out.
fn usable_kvm(vmm: &Path) -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.split_whitespace().any(|word| word == "vmx" || word == "svm")
        && Command::new(vmm)
            .arg("doctor")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

/// Modules that a guest may load, from `/modules/RELEASE`: one that does nothing without VMX
/// or SVM but has static keys and calls, and what it needs.
const GUEST_MODULES: [&str; 2] = ["virt/lib/irqbypass", "arch/x86/kvm/kvm"];

fn guest_initrd(binaries: &Binaries, kernels: &[&Kernel]) -> Result<PathBuf> {
    let path = cache::root().join("guest-initrd");
    // Another run may be reading the old one: put the new one in its place at once.
    let partial = path.with_extension(std::process::id().to_string());
    let mut initramfs = Initramfs::default().file("init", &binaries.guest_init)?;
    for kernel in kernels {
        let modules = GUEST_MODULES.map(|path| kernel.module(path));
        for module in modules.into_iter().chain(livepatch::modules(kernel)?) {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            initramfs = initramfs.file(&format!("modules/{}/{name}", kernel.release), &module)?;
        }
    }
    initramfs.write(&partial)?;
    std::fs::rename(&partial, &path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Runs `inner` where guests can run: in this process, or in another process of this program, with
/// `arguments`, in the rig's host. `announce` is told the place first.
///
/// # Errors
/// When there is no such place, what `inner` says, or when the rig breaks off.
pub fn run_there(
    monitor: Monitor,
    arguments: impl IntoIterator<Item = String>,
    deadline: Duration,
    announce: impl FnOnce(&Place),
    inner: impl FnOnce(&Lab) -> Result<ExitCode>,
) -> Result<ExitCode> {
    if let Some(lab) = Lab::inherited() {
        return inner(&lab);
    }
    let mut place = prepare(monitor)?;
    announce(&place);
    match &mut place {
        Place::Here(lab) => inner(lab),
        Place::Rig(rigged) => {
            let code = rigged.run_self(arguments, deadline, pass_on)?;
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
        }
    }
}

impl Rigged {
    /// Runs this program with `arguments` in the rig's host; its output is passed on to
    /// `sink`. Returns its exit code.
    ///
    /// # Errors
    /// When it can't be started, or the rig breaks off.
    pub fn run_self(
        &mut self,
        arguments: impl IntoIterator<Item = String>,
        deadline: Duration,
        sink: impl FnMut(Stream, &[u8]),
    ) -> Result<i32> {
        let argv = std::iter::once("/bin/self".to_owned()).chain(arguments).collect();
        Ok(self.rig.run(&Request { argv, env: self.lab.environment() }, deadline, sink)?)
    }

    /// How many times longer than usual everything may take there.
    #[must_use]
    pub fn slow(&self) -> u32 {
        self.lab.slow
    }

    /// Runs any program in the rig's host, as [`Rigged::run_self`] does this one.
    ///
    /// # Errors
    /// As [`Rigged::run_self`].
    pub fn run(
        &mut self,
        argv: Vec<String>,
        deadline: Duration,
        sink: impl FnMut(Stream, &[u8]),
    ) -> Result<i32> {
        Ok(self.rig.run(&Request { argv, env: Vec::new() }, deadline, sink)?)
    }
}

/// Passes output on to this process's own streams.
pub fn pass_on(stream: Stream, bytes: &[u8]) {
    // The reader may be gone; the exit code still tells.
    let _ = match stream {
        Stream::Stdout => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
        Stream::Stderr => io::stderr().write_all(bytes),
    };
}
