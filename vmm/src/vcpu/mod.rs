//! A vCPU's thread: enter the guest, handle what made it leave, again.

mod guarded;
mod inject_bp;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug};
use kvm_ioctls::VcpuFd;
use patcher::addr::{Gva, VcpuId};
use patcher::insn::Effect;
use patcher::safety::trap::{TrapAction, Verdict};

use crate::devices::ports::Ports;
use crate::devices::power::PowerRequest;
use crate::guest::events::{Details, Kind};
use crate::guest::kernel::{self, Located};
use crate::guest::vcpu_state::VcpuRegisters;
use crate::kvm::Vm;
use crate::kvm::exit::{self, Exit};
use crate::kvm::kick::Kick;
use crate::memory::paging::{Mapping, PageTables};
use crate::sync::rendezvous::{Admission, Rendezvous};
use crate::text_guard::Guard;

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
    /// Something broke.
    Failed(String),
}

/// Whom a vCPU tells what happened.
pub trait Listener: Send + Sync {
    /// The machine ends.
    fn ended(&self, ending: Ending);
    /// The kernel was found; called once, on the first vCPU, which goes on when it returns.
    fn located(&self, found: Located);
    /// The guest wrote to the gate's page ([`Guard::is_gate`]). The vCPU tries again when it
    /// returns.
    fn protected_write(&self);
    /// The guest changed the site of a patch. Does not wait.
    fn touched(&self);
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
    /// A write that nothing explained: the instruction, and how often.
    unexplained: (u64, u32),
}

/// What all vCPUs of a machine have in common.
#[derive(Clone)]
pub struct VcpuContext {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Where they meet the controller.
    pub rendezvous: Arc<Rendezvous>,
    /// The devices.
    pub ports: Arc<Ports>,
    /// The text guard.
    pub guard: Arc<Guard>,
    /// Whom they tell.
    pub listener: Arc<dyn Listener>,
}

/// Why the guest was left, as far as the loop cares.
enum Left {
    GoOn,
    ForGood(Ending),
}

/// After so long out of the guest its watchdog is told that it was not to blame.
const LONG_STALL: Duration = Duration::from_secs(1);

impl Vcpu {
    /// Puts a vCPU together. The first one looks for the kernel if `locating`.
    #[must_use]
    pub fn new(id: VcpuId, (fd, kick): (VcpuFd, Arc<Kick>), around: VcpuContext) -> Self {
        let VcpuContext { vm, rendezvous, ports, guard, listener } = around;
        let (intercepting, locating, reinject, unexplained) = (false, id.0 == 0, false, (0, 0));
        Self {
            id,
            fd,
            kick,
            vm,
            rendezvous,
            ports,
            guard,
            listener,
            intercepting,
            locating,
            reinject,
            unexplained,
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
        std::thread::Builder::new().name(format!("vcpu{}", self.id.0)).spawn(move || self.work())
    }

    fn work(mut self) {
        self.kick.adopt_current_thread();
        loop {
            match self.rendezvous.enter(self.id, self.intercepting) {
                Admission::Stop => break,
                Admission::Intercept(on) => {
                    self.rendezvous.stall_begins(self.id);
                    if let Err(what) = self.set_debug(on, 0) {
                        self.listener.ended(Ending::Failed(what));
                        break;
                    }
                    self.intercepting = on;
                    continue;
                }
                Admission::Report => {
                    self.rendezvous.stall_begins(self.id);
                    match self.registers() {
                        Ok(registers) => self.rendezvous.report(self.id, registers),
                        Err(what) => {
                            self.listener.ended(Ending::Failed(what));
                            break;
                        }
                    }
                    continue;
                }
                Admission::Run => {}
            }
            if self.rendezvous.stall_ends(self.id) > LONG_STALL {
                // Fails on guests without a kvm clock, which have no such watchdog.
                let _ = self.fd.kvmclock_ctrl();
            }
            match self.pass() {
                Left::GoOn => {}
                Left::ForGood(ending) => {
                    self.listener.ended(ending);
                    break;
                }
            }
        }
        self.kick.disown();
    }

    /// Enters the guest once.
    fn pass(&mut self) -> Left {
        let exit = exit::run(&mut self.fd);
        self.rendezvous.leave(self.id);
        if matches!(exit, Exit::Interrupted | Exit::Breakpoint(_) | Exit::ProtectedWrite) {
            self.rendezvous.stall_begins(self.id);
        }
        let ending = match exit {
            Exit::Interrupted | Exit::MemoryOut => None,
            Exit::PortIn(port, data) => {
                self.ports.read(port, data);
                None
            }
            Exit::PortOut(port, data) => self.ports.write(port, data).map(|wish| match wish {
                PowerRequest::Off => Ending::PowerOff,
                PowerRequest::Reset => Ending::Reset,
            }),
            Exit::MemoryIn(data) => {
                data.fill(0xff);
                None
            }
            Exit::Breakpoint(at) => self.breakpoint(at).err().map(Ending::Failed),
            Exit::ProtectedWrite => self.protected_write().err().map(Ending::Failed),
            Exit::Reset => Some(Ending::Reset),
            Exit::PowerOff => Some(Ending::PowerOff),
            Exit::TripleFault => Some(Ending::TripleFault),
            Exit::Failed(what) => Some(Ending::Failed(format!("vCPU {}: {what}", self.id.0))),
        };
        if self.locating
            && let Some(found) = kernel::look(&self.fd)
        {
            self.locating = false;
            self.listener.located(found);
        }
        ending.map_or(Left::GoOn, Left::ForGood)
    }

    /// Waits for the controller, which may want to know where this vCPU stands meanwhile.
    fn parked<T>(&self, wait: impl FnOnce() -> T) -> Result<T, String> {
        self.rendezvous.park(self.id, self.registers()?);
        let result = wait();
        self.rendezvous.unpark(self.id);
        Ok(result)
    }

    fn registers(&self) -> Result<VcpuRegisters, String> {
        VcpuRegisters::read(&self.fd).map_err(|error| format!("vCPU {}: its registers: {error}", self.id.0))
    }

    /// Handles an `int3` that left the guest.
    fn breakpoint(&self, at: Gva) -> Result<(), String> {
        loop {
            let table = self.rendezvous.traps();
            // Fetched anew it is what it is now, or a page fault.
            let Some(byte) = self.byte_at(at)? else { return Ok(()) };
            match table.judge(at, byte) {
                Verdict::Resume => return Ok(()),
                Verdict::Pass(way) => {
                    self.rendezvous.count_trap(self.id);
                    self.guard.events().tell(Kind::Trap, || self.trapped(way));
                    if !self.passes(way)? {
                        self.parked(|| self.rendezvous.wait_at_trap(&table))?;
                    }
                    return Ok(());
                }
                // A program began in between: the byte may be its own.
                Verdict::Deliver if !Arc::ptr_eq(&table, &self.rendezvous.traps()) => {}
                Verdict::Deliver => return self.deliver(),
            }
        }
    }

    fn trapped(&self, way: TrapAction) -> Details {
        let what = match way {
            TrapAction::Wait => "ran into a breakpoint of a program and waits",
            TrapAction::Slot(_) => "ran into a breakpoint of a program and goes through a copy",
            TrapAction::Effect(_) => "ran into a breakpoint of a program and goes past it",
        };
        let who = VcpuRegisters::read(&self.fd).ok().map(|registers| self.guard.who(self.id, &registers));
        Details { who, patch: None, what: what.to_owned() }
    }

    /// Gives the guest its own breakpoint.
    fn deliver(&self) -> Result<(), String> {
        self.rendezvous.count_delivery(self.id);
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: delivering #BP: {error}", self.id.0);
        let mut regs = self.fd.get_regs().map_err(failed)?;
        let mut sregs = self.fd.get_sregs().map_err(failed)?;
        if !self.reinject
            && let Ok(changed) = inject_bp::breakpoint(&mut regs, &mut sregs, self.vm.ram())
        {
            if changed {
                self.fd.set_sregs(&sregs).map_err(failed)?;
            }
            return self.fd.set_regs(&regs).map_err(failed);
        }
        // Where entering the handler faults, KVM knows what comes of it.
        self.set_debug(self.intercepting, KVM_GUESTDBG_INJECT_BP)
    }

    /// The page tables that the guest uses on this vCPU.
    fn tables(&self) -> Result<PageTables, kvm_ioctls::Error> {
        Ok(PageTables::of(&self.fd.get_sregs()?))
    }

    /// Takes the vCPU past a site in transit. `false` if it has to wait.
    fn passes(&self, way: TrapAction) -> Result<bool, String> {
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: passing a trap: {error}", self.id.0);
        let to = match way {
            TrapAction::Wait => return Ok(false),
            TrapAction::Slot(to) | TrapAction::Effect(Effect::GoTo(to) | Effect::Call { to, .. }) => to,
        };
        let mut regs = self.fd.get_regs().map_err(failed)?;
        if let TrapAction::Effect(Effect::Call { returns, .. }) = way {
            regs.rsp = regs.rsp.wrapping_sub(8);
            let tables = self.tables().map_err(failed)?;
            let stack = tables.translate_in(self.vm.ram(), Gva(regs.rsp)).filter(|_| regs.rsp % 8 == 0);
            let pushed = |stack: Mapping| self.vm.ram().write(stack.at, &returns.0.to_le_bytes()).is_ok();
            if !stack.is_some_and(pushed) {
                // The call would fault; it will do so by itself when it waited.
                return Ok(false);
            }
        }
        regs.rip = to.0;
        self.fd.set_regs(&regs).map_err(failed)?;
        Ok(true)
    }

    /// Reads a byte as this vCPU sees it, user space included. `None` where nothing is mapped
    /// any more: the guest may have moved the page meanwhile.
    fn byte_at(&self, at: Gva) -> Result<Option<u8>, String> {
        let failed = |what: String| format!("vCPU {}: reading the breakpoint at {at}: {what}", self.id.0);
        let tables = self.tables().map_err(|e| failed(e.to_string()))?;
        let Some(found) = tables.translate_in(self.vm.ram(), at) else { return Ok(None) };
        let mut byte = [0];
        self.vm.ram().read(found.at, &mut byte).map_err(|e| failed(e.to_string()))?;
        Ok(Some(byte[0]))
    }

    fn set_debug(&self, intercept: bool, inject: u32) -> Result<(), String> {
        let intercept = if intercept { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP } else { 0 };
        let inject = if inject == 0 { 0 } else { KVM_GUESTDBG_ENABLE | inject };
        let debug = kvm_guest_debug { control: intercept | inject, ..Default::default() };
        self.fd
            .set_guest_debug(&debug)
            .map_err(|error| format!("vCPU {}: KVM_SET_GUEST_DEBUG: {error}", self.id.0))
    }
}
