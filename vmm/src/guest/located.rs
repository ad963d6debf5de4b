//! What a vCPU's registers tell about the kernel that it runs: where `SYSCALL` enters it, and its page
//! tables.

use kvm_bindings::{KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_msr_entry, kvm_sregs};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};
use patcher::addr::Gva;

use crate::memory::paging::PageTables;
use crate::x86::{CR4_VMXE, EFER_LMA, EFER_SVME, MSR_LSTAR};

/// Kernel text lies in the upper half.
const UPPER_HALF: u64 = 1 << 63;

/// What a vCPU's registers tell about its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    /// Where `SYSCALL` goes: what the last kernel that set up this CPU wrote.
    pub syscall_entry: Gva,
    /// The page tables in use at that moment.
    pub tables: PageTables,
}

impl Located {
    /// Reads it from a vCPU that is out of `KVM_RUN`. `None` if the vCPU uses no 64-bit page tables of the
    /// guest's kernel: it was not started, or it runs a guest of the guest's.
    pub fn read(vcpu: &VcpuFd, sregs: &kvm_sregs) -> Option<Self> {
        let tables = tables(vcpu, sregs)?;
        let entry = kvm_msr_entry { index: MSR_LSTAR, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        vcpu.get_msrs(&mut msrs).ok()?;
        Some(Self { syscall_entry: Gva(msrs.as_slice().first()?.data), tables })
    }

    /// Whether the kernel has set up system calls on this CPU.
    #[must_use]
    pub fn has_syscalls(&self) -> bool {
        self.syscall_entry.0 & UPPER_HALF != 0
    }
}

/// The 64-bit page tables of the guest that a vCPU uses, if it does.
#[must_use]
pub fn tables(vcpu: &VcpuFd, sregs: &kvm_sregs) -> Option<PageTables> {
    let uses_them = sregs.efer & EFER_LMA != 0 && !is_in_nested_guest(vcpu, sregs);
    uses_them.then(|| PageTables::of(sregs))
}

/// Whether a vCPU runs a guest of the guest's, whose registers KVM reports. Such a vCPU has virtualization
/// on: SVM and VMX demand it of a nested guest's registers too (APM volume 2, 15.5.1; SDM volume 3, 24.8).
#[must_use]
pub fn is_in_nested_guest(vcpu: &VcpuFd, sregs: &kvm_sregs) -> bool {
    if sregs.efer & EFER_SVME == 0 && sregs.cr4 & CR4_VMXE == 0 {
        return false;
    }
    let mut state = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut state).is_ok() && u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0
}
