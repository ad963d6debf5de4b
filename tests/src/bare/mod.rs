//! A guest without a kernel: a few instructions with page tables, descriptor tables and handlers of their
//! own, on the monitor's vCPU thread and with its text guard. So an instruction is executed in exactly the
//! state that a test is about, on KVM.
//!
//! Memory, one page each unless told: page tables (1 to 4), IDT (5), GDT and task-state segment (6), handlers
//! (7), the report (8), the kernel's stack (9, 10), the user's stack (11), code (16), and from 32 on what tests
//! make of it. Everything is mapped one to one.

mod layout;

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use patcher::addr::{Gpa, VcpuId};
use vmm::boot::{cpuid, withheld};
use vmm::devices::console::Console;
use vmm::devices::irq_line::IrqLine;
use vmm::devices::ports::Ports;
use vmm::devices::power::Power;
use vmm::guest::events::Event;
use vmm::guest::located::Located;
use vmm::host::backlog::Backlog;
use vmm::kvm::Vm;
use vmm::kvm::kick::{self, Kick};
use vmm::memory::GuestRam;
use vmm::sync::protocol::VcpuThread;
use vmm::sync::rendezvous::Rendezvous;
use vmm::text_guard::Guard;
use vmm::vcpu::{Ending, Listener, Vcpu, VcpuContext};

pub use self::layout::{CODE, END, KERNEL_STACK, PAGE, PRESENT, TABLE, USER, USER_STACK, WRITABLE, handler};
use crate::lab::Lab;

/// RAM in bytes; the page table maps as much.
const RAM: u64 = 2 << 20;
/// Longest time for a guest's few instructions. Generous: the rig is emulated.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the report holds if the code came to its end.
const AT_END: u64 = 0xff;
/// Exceptions with an error code (SDM volume 3, table 6-1).
const WITH_ERROR_CODE: [u64; 7] = [8, 10, 11, 12, 13, 14, 17];

/// In which mode the code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// CPL 0.
    Kernel,
    /// CPL 3, with access to ports.
    User,
    /// CPL 3, in a 32-bit code segment.
    User32,
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The code came to its end.
    End,
    /// It raised an exception.
    Exception {
        /// Which.
        vector: u64,
        /// Its error code, or 0.
        error_code: u64,
        /// Where, as its frame says.
        rip: u64,
        /// CR2.
        cr2: u64,
    },
}

/// A guest that was not started yet.
pub struct Bare {
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// Its text guard.
    pub guard: Arc<Guard>,
    ring: Ring,
    code: Vec<u8>,
    /// RAX, RCX, RSI and RDI.
    registers: [u64; 4],
    cr4: u64,
    flags: u64,
    patience: Duration,
}

struct Told(Sender<Ending>);

impl Listener for Told {
    fn ended(&self, ending: Ending) {
        // The receiver is gone if the test has given up.
        let _ = self.0.send(ending);
    }

    fn located(&self, _: Located) {}
    fn init_gate_written(&self) {}
    fn patch_written(&self) {}
    fn module_at_door(&self) {}
}

impl Bare {
    /// A guest that executes `code` in that mode.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(lab: &Lab, ring: Ring, code: &[u8]) -> Result<Self> {
        let ram = Arc::new(GuestRam::new(RAM)?);
        layout::write(&ram, ring != Ring::Kernel)?;
        let guard = Arc::new(Guard::new(ram.clone(), Arc::default()));
        let patience = PATIENCE * lab.slow;
        Ok(Self { ram, guard, ring, code: code.to_vec(), registers: [0; 4], cr4: 0, flags: 0, patience })
    }

    /// With these registers: RAX, RCX, RSI and RDI.
    #[must_use]
    pub fn registers(self, registers: [u64; 4]) -> Self {
        Self { registers, ..self }
    }

    /// With these bits of CR4, too.
    #[must_use]
    pub fn cr4(self, cr4: u64) -> Self {
        Self { cr4, ..self }
    }

    /// With these bits of RFLAGS, too.
    #[must_use]
    pub fn flags(self, flags: u64) -> Self {
        Self { flags, ..self }
    }

    /// Maps a page to itself with these bits; with none, not at all.
    ///
    /// # Errors
    /// None: it is RAM.
    pub fn page(&self, page: u64, bits: u64) -> Result<()> {
        self.map(page, if bits == 0 { 0 } else { (page * PAGE) | bits })
    }

    /// Sets the page-table entry of a page.
    ///
    /// # Errors
    /// As [`Bare::page`].
    pub fn map(&self, page: u64, entry: u64) -> Result<()> {
        Ok(self.ram.write(Gpa(TABLE + 8 * page), &entry.to_le_bytes())?)
    }

    /// Guards a page.
    ///
    /// # Errors
    /// The host's.
    pub fn protect(&self, page: u64) -> Result<()> {
        Ok(self.guard.guard_text(&(Gpa(page * PAGE)..Gpa((page + 1) * PAGE)))?)
    }

    /// Whether it still is.
    #[must_use]
    pub fn is_protected(&self, page: u64) -> bool {
        self.guard.is_protected(Gpa(page * PAGE))
    }

    /// Some bytes of its memory.
    ///
    /// # Errors
    /// Where there is none.
    pub fn read<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.ram.read(Gpa(at), &mut bytes)?;
        Ok(bytes)
    }

    /// A word of its memory.
    ///
    /// # Errors
    /// As [`Bare::read`].
    pub fn word(&self, at: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read(at)?))
    }

    /// What was told.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.guard.events().since(0)
    }

    /// Executes the code, with #BP exits on, and says how it went.
    ///
    /// # Errors
    /// When the VM ends otherwise, or not in time.
    pub fn run(&self) -> Result<Outcome> {
        self.ram.write(Gpa(CODE), &[&self.code[..], END].concat())?;
        let vm = Arc::new(Vm::new(self.ram.clone(), 1)?);
        let fd = vm.vcpu(0)?;
        let mut features = vm.supported_cpuid()?;
        withheld::withhold(&mut features);
        cpuid::place(&mut features, 0, 1);
        fd.set_cpuid2(&features).context("KVM_SET_CPUID2")?;
        let mut sregs = fd.get_sregs().context("KVM_GET_SREGS")?;
        let (selectors, dpl, long) = match self.ring {
            Ring::Kernel => ([0x10, 0x18], 0, 1),
            Ring::User => ([0x23, 0x2b], 3, 1),
            Ring::User32 => ([0x23, 0x2b], 3, 0),
        };
        let (cs, ss) = (&mut sregs.cs, &mut sregs.ss);
        (cs.selector, ss.selector) = (selectors[0], selectors[1]);
        (cs.type_, ss.type_, cs.l, ss.l) = (0xb, 3, long, 0);
        (cs.db, ss.db) = (1 - long, 1);
        for segment in [cs, ss] {
            (segment.base, segment.limit, segment.present, segment.s) = (0, u32::MAX, 1, 1);
            (segment.dpl, segment.g, segment.unusable) = (dpl, 1, 0);
        }
        (sregs.ds, sregs.es) = (sregs.ss, sregs.ss);
        layout::point_to_tables(&mut sregs);
        sregs.cr4 |= self.cr4;
        fd.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        let mut regs = fd.get_regs().context("KVM_GET_REGS")?;
        [regs.rax, regs.rcx, regs.rsi, regs.rdi] = self.registers;
        regs.rip = CODE;
        regs.rsp = if self.ring == Ring::Kernel { KERNEL_STACK } else { USER_STACK };
        // Reserved, and access to ports in ring 3.
        regs.rflags = 2 | 0x3000 | self.flags;
        fd.set_regs(&regs).context("KVM_SET_REGS")?;

        kick::install_handler()?;
        let kick = Arc::new(Kick::new(&fd)?);
        let rendezvous = Arc::new(Rendezvous::new(vec![kick.clone() as Arc<dyn VcpuThread>], None, true));
        let output = Backlog::start("console", std::io::sink(), |_| String::new())?;
        let console = Console::new(IrqLine::new()?, IrqLine::new()?, output);
        let (sender, ended) = mpsc::channel();
        let context = VcpuContext {
            vm: vm.clone(),
            rendezvous: rendezvous.clone(),
            ports: Arc::new(Ports::new(console, Power::new())),
            guard: self.guard.clone(),
            listener: Arc::new(Told(sender)),
        };
        let thread = Vcpu::new(VcpuId(0), (fd, kick), context).spawn()?;
        let ending = ended.recv_timeout(self.patience);
        rendezvous.stop();
        thread.join().ok().context("the vCPU's thread panicked")?;
        match ending {
            Ok(Ending::PowerOff) => self.report(),
            Ok(other) => bail!("the VM ended: {other:?}"),
            Err(_) => bail!("the guest does not come to an end; what was told: {:#?}", self.events()),
        }
    }

    fn report(&self) -> Result<Outcome> {
        let [vector, cr2, mut frame] =
            [0, 8, 16].map(|offset| self.word(layout::REPORT + offset).unwrap_or(u64::MAX));
        if vector == AT_END {
            return Ok(Outcome::End);
        }
        ensure!(frame < RAM, "vector {vector}: a frame at {frame:#x}");
        let mut error_code = 0;
        if WITH_ERROR_CODE.contains(&vector) {
            error_code = self.word(frame)?;
            frame += 8;
        }
        Ok(Outcome::Exception { vector, error_code, rip: self.word(frame)?, cr2 })
    }
}
