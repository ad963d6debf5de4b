//! A vCPU's thread: its run loop.
//!
//! ```text
//!   Rendezvous::enter ─▶ KVM_RUN ─▶ Rendezvous::leave ─▶ handle the exit ─▶ again
//!                                                         │
//!        #BP exit: breakpoint.rs judges it, inject_bp.rs delivers the guest's own
//!        at a door of the gate for modules: module_door.rs
//!        write to a protected page: emulate_store.rs, or let_through.rs lets the page go
//!        write that KVM emulated: emulated_write.rs
//!        ports, memory without RAM, power: here, by the devices
//! ```

mod breakpoint;
mod emulate_store;
mod emulated_write;
mod events;
mod inject_bp;
mod int3;
mod let_through;
mod module_door;
mod stopped;
mod unexplained;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug};
use kvm_ioctls::VcpuFd;
use patcher::addr::VcpuId;
use smallvec::SmallVec;

use crate::devices::ports::Ports;
use crate::devices::power::PowerRequest;
use crate::guest::located::Located;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::kvm::Vm;
use crate::kvm::exit::{self, Exit};
use crate::kvm::kick::Kick;
use crate::sync::rendezvous::{Admission, Rendezvous};
use crate::text_guard::Guard;
use crate::vcpu::unexplained::Unexplained;

/// Why the machine ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest crashed so that the processor shut down.
    TripleFault,
    /// The monitor was told to stop.
    Stopped,
    /// The plan that init had to wait for was not applied.
    NotPatched,
    /// Something broke.
    Failed(String),
}

/// What the vCPU threads report to.
pub trait Listener: Send + Sync {
    /// The machine ends.
    fn ended(&self, ending: Ending);
    /// The kernel was found. Called once, on the first vCPU's thread; the vCPU goes on when it returns.
    fn located(&self, found: Located);
    /// The guest wrote to the page of the init gate ([`Guard::is_init_gate`]). The vCPU tries again
    /// when it returns.
    fn init_gate_written(&self);
    /// The guest wrote to the site of a patch, or near it, or another kernel wrote to it. Does not wait.
    fn patch_written(&self);
    /// A module has come to a door of the gate for modules. Does not wait.
    fn module_at_door(&self);
}

/// A vCPU and all that its thread needs.
pub struct Vcpu {
    id: VcpuId,
    fd: VcpuFd,
    kick: Arc<Kick>,
    // The VM's memory must outlive the vCPU.
    vm: Arc<Vm>,
    rendezvous: Arc<Rendezvous>,
    ports: Arc<Ports>,
    guard: Arc<Guard>,
    listener: Arc<dyn Listener>,
    intercepting: bool,
    locating: bool,
    /// For tests: the guest's breakpoints are delivered by KVM.
    reinject: bool,
    unexplained: Unexplained,
}

/// What all vCPUs of a machine have in common.
#[derive(Clone)]
pub struct VcpuContext {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Where the controller stops them.
    pub rendezvous: Arc<Rendezvous>,
    /// The devices.
    pub ports: Arc<Ports>,
    /// The text guard.
    pub guard: Arc<Guard>,
    /// What they report to.
    pub listener: Arc<dyn Listener>,
}

/// After so long out of the guest, the guest's watchdog is told (`KVM_KVMCLOCK_CTRL`).
const LONG_STALL: Duration = Duration::from_secs(1);

impl Vcpu {
    /// A vCPU that is not started yet. The first one also looks for the kernel.
    #[must_use]
    pub fn new(id: VcpuId, (fd, kick): (VcpuFd, Arc<Kick>), context: VcpuContext) -> Self {
        let VcpuContext { vm, rendezvous, ports, guard, listener } = context;
        Self {
            id,
            fd,
            kick,
            vm,
            rendezvous,
            ports,
            guard,
            listener,
            intercepting: false,
            locating: id.0 == 0,
            reinject: false,
            unexplained: Unexplained::default(),
        }
    }

    /// For tests: has KVM deliver the guest's own breakpoints, which goes wrong when another
    /// vCPU replaces the `int3` meanwhile.
    #[must_use]
    pub fn reinjecting(self, reinject: bool) -> Self {
        Self { reinject, ..self }
    }

    /// Starts the thread, named after the vCPU.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(self) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(format!("vcpu{}", self.id.0)).spawn(move || self.run())
    }

    fn run(mut self) {
        self.kick.adopt_current_thread();
        if let Some(ending) = self.run_until_stopped() {
            self.listener.ended(ending);
        }
        self.kick.disown();
    }

    /// Does what [`Rendezvous::enter`] says until the machine ends. `None` if it was told to stop.
    fn run_until_stopped(&mut self) -> Option<Ending> {
        loop {
            match self.rendezvous.enter(self.id, self.intercepting) {
                Admission::Stop => return None,
                Admission::Intercept(on) => {
                    self.rendezvous.stall_begins(self.id);
                    if let Err(what) = self.set_debug(on, 0) {
                        return Some(Ending::Failed(what));
                    }
                    self.intercepting = on;
                }
                Admission::Report => {
                    self.rendezvous.stall_begins(self.id);
                    match self.registers() {
                        Ok(registers) => self.rendezvous.report(self.id, registers),
                        Err(what) => return Some(Ending::Failed(what)),
                    }
                }
                Admission::Run => {
                    if self.rendezvous.stall_ends(self.id) > LONG_STALL {
                        // Fails on guests without a kvm clock, which have no such watchdog.
                        let _ = self.fd.kvmclock_ctrl();
                    }
                    if let Some(ending) = self.run_once() {
                        return Some(ending);
                    }
                }
            }
        }
    }

    /// Enters the guest once, and handles its exit. Returns how the machine ends, if it does.
    fn run_once(&mut self) -> Option<Ending> {
        let exit = exit::run(&mut self.fd);
        self.rendezvous.leave(self.id);
        if matches!(exit, Exit::Interrupted | Exit::Breakpoint(_) | Exit::ProtectedWrite(_)) {
            self.rendezvous.stall_begins(self.id);
        }
        let ending = match exit {
            Exit::Interrupted => None,
            Exit::PortIn(port, data) => {
                self.ports.read(port, data);
                None
            }
            Exit::PortOut(port, data) => self.ports.write(port, data).map(|request| match request {
                PowerRequest::Off => Ending::PowerOff,
                PowerRequest::Reset => Ending::Reset,
            }),
            Exit::MemoryIn(data) => {
                data.fill(0xff);
                None
            }
            Exit::MemoryOut(at, bytes) => {
                let bytes = SmallVec::<[u8; 8]>::from_slice(bytes);
                self.emulated_write(at, &bytes).err().map(Ending::Failed)
            }
            Exit::Breakpoint(at) => self.breakpoint(at).err().map(Ending::Failed),
            Exit::ProtectedWrite(page) => self.protected_write(page).err().map(Ending::Failed),
            Exit::NotEmulated => self.not_emulated().err().map(Ending::Failed),
            Exit::Reset => Some(Ending::Reset),
            Exit::PowerOff => Some(Ending::PowerOff),
            Exit::TripleFault => Some(Ending::TripleFault),
            Exit::Failed(what) => Some(Ending::Failed(format!("vCPU {}: {what}", self.id.0))),
        };
        self.locate_kernel();
        ending
    }

    /// Looks for the kernel until it is found, on the first vCPU.
    fn locate_kernel(&mut self) {
        if self.locating
            && let Ok(sregs) = self.fd.get_sregs()
            && let Some(found) = Located::read(&self.fd, &sregs).filter(Located::has_syscalls)
        {
            self.locating = false;
            self.listener.located(found);
        }
    }

    /// Waits for the controller, which may inspect this vCPU's registers meanwhile.
    fn parked<T>(&self, wait: impl FnOnce() -> T) -> Result<T, String> {
        self.rendezvous.park(self.id, self.registers()?);
        let result = wait();
        self.rendezvous.unpark(self.id);
        Ok(result)
    }

    fn registers(&self) -> Result<VcpuRegisters, String> {
        VcpuRegisters::read(&self.fd).map_err(|error| format!("vCPU {}: its registers: {error}", self.id.0))
    }

    fn set_debug(&self, intercept: bool, inject: u32) -> Result<(), String> {
        let intercept = if intercept { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP } else { 0 };
        let inject = if inject == 0 { 0 } else { KVM_GUESTDBG_ENABLE | inject };
        let debug = kvm_guest_debug { control: intercept | inject, ..Default::default() };
        match self.fd.set_guest_debug(&debug) {
            // Another exception is on its way; the vCPU meets the `int3` again after that.
            Err(error) if inject != 0 && error.errno() == libc::EBUSY => Ok(()),
            done => done.map_err(|error| format!("vCPU {}: KVM_SET_GUEST_DEBUG: {error}", self.id.0)),
        }
    }
}
