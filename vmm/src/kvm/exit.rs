//! Why a vCPU left the guest: KVM's exits, parsed once.

use kvm_bindings::{KVM_RUN_X86_GUEST_MODE, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use patcher::addr::{Gpa, Gva};

/// An exit, as far as this monitor tells exits apart.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'v> {
    /// A kick, or another signal.
    Interrupted,
    /// Port input. The vCPU gets what is written to the slice.
    PortIn(u16, &'v mut [u8]),
    /// Port output.
    PortOut(u16, &'v [u8]),
    /// A read of memory that is not RAM. The vCPU gets what is written to the slice.
    MemoryIn(&'v mut [u8]),
    /// A write that KVM has done in the guest's place, as far as it could: what it writes to is no RAM, or
    /// protected.
    MemoryOut(Gpa, &'v [u8]),
    /// An `int3` while #BP exits are on. RIP still points to it. The address is linear.
    Breakpoint(Gva),
    /// A write to a protected page. It has not taken effect. With the page, if KVM tells it.
    ProtectedWrite(Option<Gpa>),
    /// KVM can't emulate an instruction, or something else that it had to.
    NotEmulated,
    /// The guest asks to be reset.
    Reset,
    /// The guest asks to be powered off.
    PowerOff,
    /// A triple fault.
    TripleFault,
    /// KVM can't go on.
    Failed(String),
}

/// #BP (SDM volume 3, 6.15; KVM reports the vector).
const BP_VECTOR: u32 = 3;

/// Enters the guest and returns why it was left.
pub fn run(vcpu: &mut VcpuFd) -> Exit<'_> {
    parse(vcpu.run())
}

fn parse(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Exit<'_> {
    match exit {
        Ok(VcpuExit::IoIn(port, data)) => Exit::PortIn(port, data),
        Ok(VcpuExit::IoOut(port, data)) => Exit::PortOut(port, data),
        Ok(VcpuExit::MmioRead(_, data)) => Exit::MemoryIn(data),
        Ok(VcpuExit::MmioWrite(at, data)) => Exit::MemoryOut(Gpa(at), data),
        Ok(VcpuExit::Debug(debug)) if debug.exception == BP_VECTOR => Exit::Breakpoint(Gva(debug.pc)),
        // KVM_EXIT_MEMORY_FAULT, by hosts with KVM_CAP_MEMORY_FAULT_INFO (KVM API 5 and 7.34; Linux 6.8).
        // Flags say that memory is to be private, which this monitor's never is.
        Ok(VcpuExit::MemoryFault { flags: 0, gpa, .. }) => Exit::ProtectedWrite(Some(Gpa(gpa))),
        Ok(VcpuExit::InternalError) => Exit::NotEmulated,
        Ok(VcpuExit::Intr) => Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => Exit::TripleFault,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Exit::Reset,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Exit::PowerOff,
        Ok(other) => Exit::Failed(format!("unexpected exit {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => Exit::Interrupted,
            libc::EFAULT => Exit::ProtectedWrite(None),
            _ => Exit::Failed(format!("KVM_RUN: {error}")),
        },
    }
}

/// Whether the vCPU ran a guest of the guest's at its last exit. Hosts without `KVM_CAP_X86_GUEST_MODE`
/// (before Linux 6.10) do not tell.
pub fn was_nested(vcpu: &mut VcpuFd) -> bool {
    u32::from(vcpu.get_kvm_run().flags) & KVM_RUN_X86_GUEST_MODE != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(errno: i32) -> Exit<'static> {
        parse(Err(kvm_ioctls::Error::new(errno)))
    }

    #[test]
    fn a_write_that_was_refused_tells_its_page_where_the_host_does() {
        let fault = |flags| parse(Ok(VcpuExit::MemoryFault { flags, gpa: 0x12_3000, size: 0x1000 }));
        assert_eq!(fault(0), Exit::ProtectedWrite(Some(Gpa(0x12_3000))));
        // KVM_MEMORY_EXIT_FLAG_PRIVATE.
        assert!(matches!(fault(1 << 3), Exit::Failed(_)));
        assert_eq!(failed(libc::EFAULT), Exit::ProtectedWrite(None));
        assert!(matches!(failed(libc::EHWPOISON), Exit::Failed(_)));
        assert_eq!(failed(libc::EINTR), Exit::Interrupted);
    }

    #[test]
    fn a_write_that_kvm_emulates_comes_with_its_bytes() {
        assert_eq!(parse(Ok(VcpuExit::MmioWrite(0x5000, &[1, 2]))), Exit::MemoryOut(Gpa(0x5000), &[1, 2]));
    }
}
