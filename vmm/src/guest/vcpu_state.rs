//! The registers of a vCPU that is out of the guest, as far as the monitor judges by them.

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use patcher::addr::Gva;

use crate::x86::{EFER_LMA, RFLAGS_IF};

/// What the monitor needs of a vCPU's registers.
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

    /// Picks them out of KVM's structures.
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

    /// GS.base. In the kernel it points to the CPU's data, except for some instructions after entry
    /// and before exit.
    pub(super) fn gs_base(&self) -> u64 {
        self.gs_base
    }
}
