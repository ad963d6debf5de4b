//! Describes a vCPU in the guest's terms: which function, which task, and whether it is the kernel's
//! own patcher.

use std::ops::Range;

use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::linux::GuestMemory;
use patcher::linux::memory::read_u64;
use patcher::safety::blockers;
use patcher::safety::quiesce::Mode;

use crate::guest::events::Who;
use crate::guest::kernel::GuestKernel;
use crate::guest::locks::are_free;
use crate::guest::per_cpu::PerCpu;
use crate::guest::vcpu_state::VcpuRegisters;

/// Longest name of a task, with its end (Linux include/linux/sched.h, `TASK_COMM_LEN`).
const NAME: usize = 16;
/// Flags in the word of a mutex (Linux kernel/locking/mutex.c, `MUTEX_FLAGS`).
const MUTEX_FLAGS: u64 = 7;
/// Where the upper half of the address space begins, with four levels of page tables or five.
const UPPER_HALF: u64 = 1 << 63;

/// A guest's kernel, and the addresses that descriptions need.
#[derive(Debug)]
pub struct Introspection {
    kernel: GuestKernel,
    per_cpu: Option<PerCpu>,
    comm: Option<u64>,
    locks: Vec<Gva>,
    /// Where the kernel's own code begins in memory, and how long it is, in bytes.
    text: Option<(Gpa, u64)>,
}

impl Introspection {
    /// Looks the addresses up. What is not found is left out of descriptions.
    #[must_use]
    pub fn new(kernel: &GuestKernel) -> Self {
        let comm = kernel.kernel().image.offsets().task_comm;
        let per_cpu = PerCpu::find(kernel).ok();
        let image = kernel.kernel().image;
        let text = image.text_end().and_then(|end| {
            let size = end.offset_from(image.text_base())? as u64;
            let [from, to] = [image.text_base(), end].map(|at| kernel.translate(kernel.kernel().live(at)));
            (from?.at.0 + size == to?.at.0).then_some((from?.at, size))
        });
        Self { per_cpu, comm, text, locks: blockers::locks(&kernel.kernel()), kernel: kernel.clone() }
    }

    /// Where the kernel's own code lies in memory. `None` if it is not in one piece.
    #[must_use]
    pub fn text(&self) -> Option<Range<Gpa>> {
        self.text.map(|(start, size)| start..Gpa(start.0 + size))
    }

    /// What lies at a place in memory, as `function+0xoffset`, if it is the kernel's own code.
    #[must_use]
    pub fn symbol_in_memory(&self, at: Gpa) -> Option<String> {
        let (start, size) = self.text?;
        let offset = at.0.checked_sub(start.0).filter(|offset| *offset < size)?;
        self.symbol(Gva(self.kernel.base().0 + offset))
    }

    /// The guest's kernel.
    #[must_use]
    pub fn kernel(&self) -> &GuestKernel {
        &self.kernel
    }

    /// A vCPU's function and task.
    #[must_use]
    pub fn describe(&self, vcpu: VcpuId, registers: &VcpuRegisters) -> Who {
        let (symbol, task) = (self.symbol_of(registers), self.task_name(registers));
        Who { symbol, task, ..Who::at(vcpu, registers.rip()) }
    }

    /// Whether a vCPU is one that the kernel has switched off.
    #[must_use]
    pub fn is_off(&self, registers: &VcpuRegisters) -> bool {
        let per_cpu = self.per_cpu.as_ref();
        per_cpu.is_some_and(|per_cpu| per_cpu.mode(&self.kernel, registers) == Some(Mode::Off))
    }

    /// The number of the CPU that a vCPU in the kernel is.
    #[must_use]
    pub fn cpu(&self, registers: &VcpuRegisters) -> Option<usize> {
        self.per_cpu.as_ref()?.cpu(registers)
    }

    /// Where a vCPU's instruction pointer is, as `function+0xoffset`, if it is in the kernel.
    #[must_use]
    pub fn symbol_of(&self, registers: &VcpuRegisters) -> Option<String> {
        self.symbol(registers.rip()).filter(|_| registers.in_kernel())
    }

    /// An address as `function+0xoffset`.
    fn symbol(&self, at: Gva) -> Option<String> {
        let function = self.kernel.kernel().function_at(at)?;
        Some(format!("{}+{:#x}", function.name, at.offset_from(function.start)?))
    }

    fn task_name(&self, registers: &VcpuRegisters) -> Option<String> {
        let task = self.per_cpu.as_ref()?.task(&self.kernel, registers)?;
        let mut name = [0; NAME];
        self.kernel.read(Gva(task.0.wrapping_add(self.comm?)), &mut name).ok()?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
        Some(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    /// Whether a vCPU that writes to `at` does so as the kernel's own patcher: through the
    /// temporary mapping, which is in the lower half of the address space (Linux
    /// arch/x86/kernel/alternative.c, `__text_poke`, since 5.2), and with one of the locks.
    #[must_use]
    pub fn is_kernel_patcher(&self, registers: &VcpuRegisters, at: Gva) -> bool {
        let task = self.per_cpu.as_ref().and_then(|per_cpu| per_cpu.task(&self.kernel, registers));
        let owner = |lock: &Gva| read_u64(&self.kernel, *lock).ok().map(|owner| Gva(owner & !MUTEX_FLAGS));
        let locked = self.locks.is_empty() || self.locks.iter().any(|lock| owner(lock) == task);
        registers.in_kernel() && at.0 & UPPER_HALF == 0 && locked && task.is_some()
    }

    /// Whether the locks of the kernel's own patcher are free.
    #[must_use]
    pub fn patching_locks_are_free(&self) -> bool {
        are_free(&self.kernel, &self.locks)
    }
}
