//! Why a vCPU left the guest: KVM's exits, parsed once.

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use patcher::addr::Gva;

/// An exit, as far as this monitor tells exits apart.
#[derive(Debug)]
pub enum Exit<'v> {
    /// A kick, or another signal.
    Interrupted,
    /// Port input. The vCPU gets what is written to the slice.
    PortIn(u16, &'v mut [u8]),
    /// Port output.
    PortOut(u16, &'v [u8]),
    /// A read of memory that is not RAM. The vCPU gets what is written to the slice.
    MemoryIn(&'v mut [u8]),
    /// A write to memory that is not RAM.
    MemoryOut,
    /// An `int3` while #BP exits are on. RIP still points to it.
    Breakpoint(Gva),
    /// A write to a protected page. It has not taken effect.
    ProtectedWrite,
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
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => Exit::PortIn(port, data),
        Ok(VcpuExit::IoOut(port, data)) => Exit::PortOut(port, data),
        Ok(VcpuExit::MmioRead(_, data)) => Exit::MemoryIn(data),
        Ok(VcpuExit::MmioWrite(..)) => Exit::MemoryOut,
        Ok(VcpuExit::Debug(debug)) if debug.exception == BP_VECTOR => Exit::Breakpoint(Gva(debug.pc)),
        Ok(VcpuExit::Intr) => Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => Exit::TripleFault,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Exit::Reset,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Exit::PowerOff,
        Ok(other) => Exit::Failed(format!("unexpected exit {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => Exit::Interrupted,
            // KVM_EXIT_MEMORY_FAULT on hosts since 6.8, a bare error before (KVM API 5).
            libc::EFAULT => Exit::ProtectedWrite,
            _ => Exit::Failed(format!("KVM_RUN: {error}")),
        },
    }
}
