//! Linux' per-CPU data, found from outside: which task runs on a vCPU, and whether the vCPU meets a
//! program's condition.
//!
//! GS.base of a vCPU in the kernel is one of `__per_cpu_offset`, except for some instructions after
//! entry and before exit: there nothing is known of the vCPU.
//!
//! A CPU that the kernel has switched off halts for good, with interrupts off, in its idle task and in a
//! function made for that (Linux arch/x86/kernel/smpboot.c, `native_play_dead`). Only INIT and SIPI start it,
//! from its first instruction. Elsewhere, too, Linux halts with interrupts off (`kvm_wait`, `stop_this_cpu`),
//! so the function counts.

use patcher::addr::{Gva, VcpuId};
use patcher::image::preempt_count::{CountLayout, IN_PCPU_HOT};
use patcher::image::profile::Capability;
use patcher::linux::GuestMemory;
use patcher::linux::memory::read_u64;
use patcher::linux::view::missing;
use patcher::safety::quiesce::{Condition, Mode, Offender, VcpuState};

use crate::guest::kernel::GuestKernel;
use crate::guest::vcpu_state::{Activity, VcpuRegisters};

/// Where CPUs that are switched off halt: the same names from Linux 5.10 to 7.3 at least. Under others a CPU
/// that is switched off is taken for one that runs.
const OFF: [&str; 2] = ["hlt_play_dead", "native_play_dead"];
/// No more CPUs than these are looked for in `__per_cpu_offset`.
const MOST_CPUS: u64 = 64;

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
        let (vcpu, rip) = (*vcpu, registers.rip());
        match data.mode(kernel, registers) {
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
    layout: CountLayout,
    current: u64,
    idle: u64,
}

impl PerCpu {
    pub(crate) fn find(kernel: &GuestKernel) -> Result<Self, String> {
        let image = kernel.kernel().image;
        image.profile().require(Capability::PerCpu).map_err(|lacking| missing(lacking).to_string())?;
        let offset = |name: &str| kernel.kernel().per_cpu(name);
        // Linux 6.2 to 6.14 keep both in one structure (arch/x86/include/asm/current.h,
        // struct pcpu_hot), the current task first.
        let hot = offset("pcpu_hot");
        let preempt_count = offset("__preempt_count").or(hot.map(|hot| hot.wrapping_add(IN_PCPU_HOT)));
        let current = offset("current_task").or(hot);
        let (Some(preempt_count), Some(layout), Some(current), Some(idle)) =
            (preempt_count, image.count_layout(), current, offset("idle_threads"))
        else {
            return Err("the kernel's per-CPU symbols are not known".into());
        };
        let table = kernel.kernel().symbol("__per_cpu_offset").map_err(|refusal| refusal.to_string())?;
        let base = |cpu: u64| read_u64(kernel, Gva(table.0.wrapping_add(8 * cpu))).ok();
        let bases = (0..MOST_CPUS).map_while(base).collect();
        Ok(Self { bases, preempt_count, layout, current, idle })
    }

    /// The task that runs on a vCPU: its `struct task_struct`.
    pub(crate) fn task(&self, kernel: &GuestKernel, registers: &VcpuRegisters) -> Option<Gva> {
        let known = registers.in_kernel() && self.bases.contains(&registers.gs_base());
        let at = Gva(registers.gs_base().wrapping_add(self.current));
        read_u64(kernel, at).ok().filter(|_| known).map(Gva)
    }

    fn preempt_count(&self, kernel: &GuestKernel, at: Gva) -> Option<u32> {
        let mut count = [0; 8];
        kernel.read(at, &mut count[..self.layout.size()]).ok()?;
        Some(self.layout.narrow(u64::from_le_bytes(count)))
    }

    /// The number of the CPU that a vCPU in the kernel is.
    pub(crate) fn cpu(&self, registers: &VcpuRegisters) -> Option<usize> {
        let base = registers.gs_base();
        self.bases.iter().position(|cpu| *cpu == base).filter(|_| registers.in_kernel())
    }

    /// How a vCPU runs. `None` if that is not known.
    pub(crate) fn mode(&self, kernel: &GuestKernel, registers: &VcpuRegisters) -> Option<Mode> {
        if registers.activity() == Activity::NotStarted {
            return Some(Mode::Off);
        }
        if !registers.in_kernel() {
            return Some(Mode::User);
        }
        let base = registers.gs_base();
        if !self.bases.contains(&base) {
            return None;
        }
        let at = |offset: u64| Gva(base.wrapping_add(offset));
        let word = |offset: u64| read_u64(kernel, at(offset)).ok();
        let interrupts = registers.interrupts();
        let idle = word(self.current)? == word(self.idle)?;
        let halts_for_good = registers.activity() == Activity::Halted && !interrupts && idle;
        let function = kernel.kernel().function_at(registers.rip());
        if halts_for_good && function.is_some_and(|function| OFF.contains(&function.name)) {
            return Some(Mode::Off);
        }
        let preempt_count = self.preempt_count(kernel, at(self.preempt_count))?;
        Some(Mode::Kernel { interrupts, preempt_count, idle })
    }
}
