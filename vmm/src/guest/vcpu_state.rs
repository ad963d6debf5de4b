//! Where an inspected vCPU stands, in Linux' terms: from its registers and from its per-CPU
//! data, which is found from outside.
//!
//! In the kernel GS points to a CPU's data, except for some instructions after entry and
//! before exit; a vCPU that is there is told by a base that is none of `__per_cpu_offset`.

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use patcher::addr::{Gva, VcpuId};
use patcher::linux::memory::{read_u32, read_u64};
use patcher::safety::quiesce::{Condition, Mode, Offender, VcpuState};

use crate::boot::registers::EFER_LMA;
use crate::guest::kernel::GuestKernel;

/// Interrupts are enabled.
pub(crate) const RFLAGS_IF: u64 = 1 << 9;
const MOST_CPUS: u64 = 64;

/// The registers of a vCPU that is out of the guest, as far as they matter here.
#[derive(Debug, Clone, Copy, Default)]
pub struct VcpuRegisters {
    rip: u64,
    interrupts: bool,
    /// In kernel mode, in 64-bit mode. A CPU that was not started yet is not.
    kernel: bool,
    gs_base: u64,
}

impl VcpuRegisters {
    /// Reads them.
    ///
    /// # Errors
    /// What KVM said.
    pub fn read(vcpu: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self::of(&vcpu.get_regs()?, &vcpu.get_sregs()?))
    }

    /// Picks them out of all.
    #[must_use]
    pub fn of(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        Self {
            rip: regs.rip,
            interrupts: regs.rflags & RFLAGS_IF != 0,
            kernel: sregs.efer & EFER_LMA != 0 && sregs.ss.dpl == 0,
            gs_base: sregs.gs.base,
        }
    }

    /// The next instruction.
    #[must_use]
    pub fn rip(&self) -> Gva {
        Gva(self.rip)
    }

    /// Whether the vCPU is in the kernel.
    #[must_use]
    pub fn in_kernel(&self) -> bool {
        self.kernel
    }

    /// Whether interrupts are enabled.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.interrupts
    }
}

/// Which vCPUs do not meet a condition.
///
/// # Errors
/// A text when the kernel's per-CPU data is not to be found.
pub fn offenders(
    condition: &Condition,
    kernel: &GuestKernel,
    vcpus: &[(VcpuId, VcpuRegisters)],
) -> Result<Vec<Offender>, String> {
    if condition.is_empty() {
        return Ok(Vec::new());
    }
    let data = PerCpu::find(kernel)?;
    let judge = |(vcpu, registers): &(VcpuId, VcpuRegisters)| {
        let (vcpu, rip) = (*vcpu, Gva(registers.rip));
        let mode = if registers.kernel { data.mode(kernel, registers) } else { Some(Mode::User) };
        match mode {
            Some(mode) => condition.check(&VcpuState { vcpu, rip, mode }).err(),
            None => Some(Offender { vcpu, rip, why: "enters or leaves the kernel" }),
        }
    };
    Ok(vcpus.iter().filter_map(judge).collect())
}

/// Offsets into a CPU's data, and the CPUs' bases.
#[derive(Debug)]
pub(crate) struct PerCpu {
    bases: Vec<u64>,
    preempt_count: u64,
    current: u64,
    idle: u64,
}

impl PerCpu {
    pub(crate) fn find(kernel: &GuestKernel) -> Result<Self, String> {
        // Per-CPU symbols are offsets: the slide is not for them.
        let offset = |name: &str| kernel.kernel().image.symbols().only(name).map(|at| at.0);
        // Linux 6.2 to 6.14 keep both in one structure (arch/x86/include/asm/current.h,
        // struct pcpu_hot): the current task first, the preempt count eight bytes on.
        let hot = offset("pcpu_hot");
        let preempt_count = offset("__preempt_count").or(hot.map(|hot| hot + 8));
        let current = offset("current_task").or(hot);
        let (Some(preempt_count), Some(current), Some(idle)) =
            (preempt_count, current, offset("idle_threads"))
        else {
            return Err("the kernel's per-CPU symbols are not known".into());
        };
        let table = kernel.kernel().symbol("__per_cpu_offset").map_err(|refusal| refusal.to_string())?;
        let base = |cpu: u64| read_u64(kernel, Gva(table.0 + 8 * cpu)).ok();
        let bases = (0..MOST_CPUS).map_while(base).collect();
        Ok(Self { bases, preempt_count, current, idle })
    }

    /// The task that runs on a vCPU: its `struct task_struct`.
    pub(crate) fn task(&self, kernel: &GuestKernel, registers: &VcpuRegisters) -> Option<Gva> {
        let known = registers.kernel && self.bases.contains(&registers.gs_base);
        let at = Gva(registers.gs_base.wrapping_add(self.current));
        read_u64(kernel, at).ok().filter(|_| known).map(Gva)
    }

    fn mode(&self, kernel: &GuestKernel, registers: &VcpuRegisters) -> Option<Mode> {
        let base = registers.gs_base;
        if !self.bases.contains(&base) {
            return None;
        }
        let at = |offset: u64| Gva(base.wrapping_add(offset));
        let word = |offset: u64| read_u64(kernel, at(offset)).ok();
        Some(Mode::Kernel {
            interrupts: registers.interrupts,
            preempt_count: read_u32(kernel, at(self.preempt_count)).ok()?,
            idle: word(self.current)? == word(self.idle)?,
        })
    }
}
