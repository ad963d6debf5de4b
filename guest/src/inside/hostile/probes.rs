//! Ports, virtualization inside, and kernels that are none.
//!
//! Unsafe code: instructions that must fault, port input, and the `kexec_load` system call.
//! Invariant: faults are expected; input from these ports changes nothing that anybody needs.
#![allow(unsafe_code)]

use std::arch::x86_64::__cpuid;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::system::{RebootCommand, reboot};

use super::signals::caught;
use super::stage::Stage;

/// Virtualization is not offered, and its instructions fault.
pub(super) fn nested(stage: &Arc<Stage>) -> io::Result<()> {
    while stage.goes_on() {
        stage.expect(__cpuid(1).ecx & 1 << 5 == 0, || "VMX is offered".into());
        stage.expect(__cpuid(0x8000_0001).ecx & 1 << 2 == 0, || "SVM is offered".into());
        // SAFETY: each faults in ring 3.
        let each = unsafe {
            [
                caught!(["vmrun"] in("rax") 0_u64),
                caught!(["vmload"] in("rax") 0_u64),
                caught!(["vmxoff"]),
                caught!(["vmlaunch"]),
                caught!(["vmxon [rsp]"]),
            ]
        };
        stage.expect(each.iter().all(|(signals, _)| *signals == 1), || format!("{each:x?}"));
        stage.done();
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Input from every port but the console's.
pub(super) fn ports(stage: &Arc<Stage>) -> io::Result<()> {
    const CONSOLE: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
    // SAFETY: rights of this thread only.
    if unsafe { libc::syscall(libc::SYS_iopl, 3) } != 0 {
        return Err(io::Error::last_os_error());
    }
    while stage.goes_on() {
        for port in (0..=u16::MAX).filter(|port| !CONSOLE.contains(port)).step_by(7) {
            // SAFETY: input has no effect on anything that is used here. It may fault: the rig's emulator
            // allows none to ring 3 once the monitor has set the task register (QEMU 10.0, `helper_check_io`).
            let _ = unsafe { caught!(["in al, dx"] in("dx") port, out("al") _) };
            if port % 256 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        stage.done();
    }
    Ok(())
}

/// `struct kexec_segment` (include/uapi/linux/kexec.h).
#[repr(C)]
struct Segment {
    buffer: *const u8,
    buffer_size: usize,
    at: usize,
    size: usize,
}

fn load(entry: u64, segments: &[Segment]) -> i64 {
    // SAFETY: the segments and what they point to live until the call returns.
    unsafe { libc::syscall(libc::SYS_kexec_load, entry, segments.len(), segments.as_ptr(), 0) }
}

fn garbage(bytes: &[u8], at: usize) -> Segment {
    Segment { buffer: bytes.as_ptr(), buffer_size: bytes.len(), at, size: bytes.len() }
}

/// Kernels that are none are loaded and dropped. That this is refused or not is the guest's affair.
pub(super) fn kexec(stage: &Arc<Stage>) -> io::Result<()> {
    let bytes = vec![0xff; 1 << 16];
    while stage.goes_on() {
        for at in [0, 0x1000, 1 << 20, 16 << 20, 1 << 40, usize::MAX & !0xfff] {
            load(u64::MAX, &[garbage(&bytes, at)]);
            load(at as u64, &[]);
        }
        stage.done();
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Runs garbage in place of the kernel. Does not return if that is possible.
///
/// # Errors
/// What the system said.
pub fn run_garbage() -> io::Result<()> {
    /// Behind the first MiB, where no guest's firmware lies.
    const AT: usize = 32 << 20;
    // Stores through every register, then what is no instruction.
    let bytes = [[0x48, 0x89, 0x00, 0x0f, 0x0b, 0xcc, 0xf4, 0xff]; 1 << 9].concat();
    if load(AT as u64, &[garbage(&bytes, AT)]) != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(reboot(RebootCommand::Kexec)?)
}
