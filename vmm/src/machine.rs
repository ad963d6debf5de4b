//! The machine: builds the parts of a VM, connects them and owns them.

mod adapters;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use patcher::addr::VcpuId;
use patcher::program::compile::Host;

use crate::boot::{acpi, cpuid, kernel, registers, withheld};
use crate::config::{Config, Fence};
use crate::devices::console::Console;
use crate::devices::irq_line::IrqLine;
use crate::devices::ports::Ports;
use crate::devices::power::Power;
use crate::host::backlog::Backlog;
use crate::host::membarrier::Membarrier;
use crate::host::poll::poll;
use crate::kvm::kick::{self, Kick};
use crate::kvm::{self, KvmContext, Vm};
use crate::memory::layout::COM1_IRQ;
use crate::memory::{self, GuestRam};
use crate::sync::protocol::{Barrier, VcpuThread};
use crate::sync::rendezvous::Rendezvous;
use crate::text_guard::Guard;
use crate::vcpu::{Listener, Vcpu, VcpuContext};

/// Why a machine can't be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM call.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel, its initrd or its boot parameters.
    #[error(transparent)]
    Boot(#[from] kernel::Error),
    /// A file descriptor, a thread or a signal handler.
    #[error("the host: {0}")]
    Host(#[from] io::Error),
}

/// When #BP exits are on, and who delivers the #BP that are the guest's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Breakpoints {
    /// While a program needs them; the monitor.
    #[default]
    AsNeeded,
    /// Always; the monitor.
    Always,
    /// Always; KVM (`KVM_GUESTDBG_INJECT_BP`), which may go wrong (`docs/breakpoints.md`).
    AlwaysByKvm,
}

/// How long the vCPUs' threads have to end.
const LAST_EXIT: Duration = Duration::from_secs(5);

/// A machine that is ready to start.
pub struct Machine {
    vm: Arc<Vm>,
    ports: Arc<Ports>,
    rendezvous: Arc<Rendezvous>,
    guard: Arc<Guard>,
    vcpus: Vec<(kvm_ioctls::VcpuFd, Arc<Kick>)>,
    threads: Vec<JoinHandle<()>>,
    uses_membarrier: bool,
    host: Host,
    breakpoints: Breakpoints,
}

impl Machine {
    /// Builds the machine; `image` is the kernel file's content. The serial console writes
    /// to `output` and raises `drained` when it can take more input.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind.
    pub fn build(
        config: &Config,
        image: &[u8],
        output: Backlog,
        drained: IrqLine,
        breakpoints: Breakpoints,
    ) -> Result<Self, Error> {
        let initrd = config.initrd.as_deref().map(kernel::read).transpose()?;
        let ram = Arc::new(GuestRam::new(config.memory_bytes())?);
        let entry = kernel::load(&ram, &config.kernel, image, initrd.as_deref(), &config.command_line)?;
        acpi::write(&ram, config.cpus)?;
        registers::write_tables(&ram)?;

        let vm = Arc::new(Vm::new(ram, config.cpus)?);
        let interrupt = IrqLine::new()?;
        vm.fd().register_irqfd(interrupt.event(), COM1_IRQ).context("KVM_IRQFD")?;
        let ports = Arc::new(Ports::new(Console::new(interrupt, drained, output), Power::new()));

        let host = Host { stores_are_whole: cpuid::shows_stores_as_a_whole() };
        kick::install_handler()?;
        let mut vcpus = Vec::new();
        for id in 0..config.cpus {
            let fd = vm.vcpu(id)?;
            let mut features = vm.supported_cpuid()?;
            withheld::withhold(&mut features);
            cpuid::place(&mut features, id, config.cpus);
            fd.set_cpuid2(&features).context("KVM_SET_CPUID2")?;
            if id == 0 {
                // The other vCPUs wait for INIT and SIPI from the guest's kernel.
                let sregs = registers::sregs(&fd.get_sregs().context("KVM_GET_SREGS")?, entry);
                fd.set_sregs(&sregs).context("KVM_SET_SREGS")?;
                fd.set_regs(&registers::regs(entry)).context("KVM_SET_REGS")?;
            }
            let kick = Arc::new(Kick::new(&fd)?);
            vcpus.push((fd, kick));
        }
        let barrier = match config.fence {
            Fence::Auto => Membarrier::register().ok(),
            Fence::Kick => None,
        };
        let guard = Arc::new(Guard::new(vm.ram().clone(), Arc::default()));
        let threads = vcpus.iter().map(|(_, kick)| kick.clone() as Arc<dyn VcpuThread>).collect();
        Ok(Self {
            vm,
            ports,
            guard,
            rendezvous: Arc::new(Rendezvous::new(
                threads,
                barrier.map(|barrier| Box::new(barrier) as Box<dyn Barrier>),
                breakpoints != Breakpoints::AsNeeded,
            )),
            vcpus,
            threads: Vec::new(),
            uses_membarrier: barrier.is_some(),
            host,
            breakpoints,
        })
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// When a thread can't be created; [`Machine::shut_down`] ends those that were.
    pub fn start(&mut self, listener: &Arc<dyn Listener>) -> Result<(), Error> {
        let context = VcpuContext {
            vm: self.vm.clone(),
            rendezvous: self.rendezvous.clone(),
            ports: self.ports.clone(),
            guard: self.guard.clone(),
            listener: listener.clone(),
        };
        for (index, parts) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let vcpu = Vcpu::new(VcpuId(index), parts, context.clone());
            self.threads.push(vcpu.reinjecting(self.breakpoints == Breakpoints::AlwaysByKvm).spawn()?);
        }
        Ok(())
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Where the controller meets the vCPUs.
    #[must_use]
    pub fn rendezvous(&self) -> &Arc<Rendezvous> {
        &self.rendezvous
    }

    /// The text guard.
    #[must_use]
    pub fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }

    /// The devices.
    #[must_use]
    pub fn ports(&self) -> &Arc<Ports> {
        &self.ports
    }

    /// Whether fences use membarrier; if not, they kick and wait.
    #[must_use]
    pub fn uses_membarrier(&self) -> bool {
        self.uses_membarrier
    }

    /// What the host's processor guarantees.
    #[must_use]
    pub fn host(&self) -> Host {
        self.host
    }

    /// Ends the vCPU threads and waits for them, but not for ever: the process's end takes those with it
    /// that the host does not let go on.
    pub fn shut_down(self) {
        self.rendezvous.stop();
        let all_ended = || self.threads.iter().all(JoinHandle::is_finished).then_some(());
        let until = Instant::now() + LAST_EXIT;
        if poll(until, Duration::ZERO, Duration::from_millis(1), all_ended).is_none() {
            let late = self.threads.iter().filter(|thread| !thread.is_finished()).count();
            tracing::error!("{late} vCPU threads do not end; the process ends without them");
        }
    }
}
