//! The registers of a vCPU that is out of the guest, as far as the monitor judges by them.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    kvm_regs, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use patcher::addr::Gva;

use crate::guest::located::Located;
use crate::x86::{EFER_LMA, RFLAGS_IF};

/// Whether a vCPU executes instructions when it is in the guest (KVM API, `KVM_GET_MP_STATE`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activity {
    /// It does.
    #[default]
    Running,
    /// Not until an interrupt, or an NMI: it has executed `hlt`.
    Halted,
    /// Not until the guest's kernel starts it by INIT and SIPI.
    NotStarted,
}

/// What the monitor needs of a vCPU's registers.
#[derive(Debug, Clone, Copy, Default)]
pub struct VcpuRegisters {
    rip: u64,
    rsp: u64,
    interrupts: bool,
    /// In kernel mode, in 64-bit mode. A CPU that was not started yet is not.
    kernel: bool,
    gs_base: u64,
    activity: Activity,
    located: Option<Located>,
}

impl VcpuRegisters {
    /// Reads them.
    ///
    /// # Errors
    /// What KVM said.
    pub fn read(vcpu: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        // First: KVM takes a pending INIT here, which changes the registers.
        let activity = match vcpu.get_mp_state()?.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
                Activity::NotStarted
            }
            KVM_MP_STATE_HALTED => Activity::Halted,
            _ => Activity::Running,
        };
        let (regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
        Ok(Self { activity, located: Located::read(vcpu, &sregs), ..Self::of(&regs, &sregs) })
    }

    /// Picks them out of KVM's structures, of a vCPU that executes instructions.
    #[must_use]
    pub fn of(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        Self {
            rip: regs.rip,
            rsp: regs.rsp,
            interrupts: regs.rflags & RFLAGS_IF != 0,
            kernel: sregs.efer & EFER_LMA != 0 && sregs.ss.dpl == 0,
            gs_base: sregs.gs.base,
            activity: Activity::default(),
            located: None,
        }
    }

    /// The next instruction.
    #[must_use]
    pub fn rip(&self) -> Gva {
        Gva(self.rip)
    }

    /// The stack pointer.
    #[must_use]
    pub fn rsp(&self) -> Gva {
        Gva(self.rsp)
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

    /// Whether it executes instructions.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.activity
    }

    /// What tells which kernel it runs.
    #[must_use]
    pub fn located(&self) -> Option<Located> {
        self.located
    }

    /// GS.base. In the kernel it points to the CPU's data, except for some instructions after entry
    /// and before exit.
    pub(super) fn gs_base(&self) -> u64 {
        self.gs_base
    }
}
