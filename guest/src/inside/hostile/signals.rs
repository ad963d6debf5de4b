//! Faults that are expected. Code that expects one has [`MAGIC`] in R12 and where to go on in
//! R14; it finds in R13 how many signals there were, and in R15 where the last one was taken.
//!
//! Unsafe code: a signal handler. Invariant: it changes nothing but registers of code that expects it.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::ptr;

use libc::{REG_R12, REG_R13, REG_R14, REG_R15, REG_RIP, SIGBUS, SIGILL, SIGSEGV, SIGTRAP};

pub(super) const MAGIC: i64 = 0x6d61_6769_6361_6c21;

/// Catches them in this process.
pub(super) fn catch() -> io::Result<()> {
    for signal in [SIGSEGV, SIGBUS, SIGILL, SIGTRAP] {
        // SAFETY: all fields are valid as zero, and the handler has the type that SA_SIGINFO asks for.
        let failed = unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &raw const action, ptr::null_mut()) != 0
        };
        if failed {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn handle(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a context that is the handler's to change.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let index = |register: i32| usize::try_from(register).unwrap_or(0);
    if registers[index(REG_R12)] != MAGIC {
        // SAFETY: no handler is left, so the fault comes again and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    registers[index(REG_R13)] += 1;
    registers[index(REG_R15)] = registers[index(REG_RIP)];
    if signal != SIGTRAP {
        registers[index(REG_RIP)] = registers[index(REG_R14)];
    }
}

/// Executes instructions that may be interrupted by signals; a fault ends them. Returns how many signals
/// there were, and where the last was taken.
macro_rules! caught {
    ([$($code:literal),+] $($operands:tt)*) => {{
        let (signals, at): (i64, u64);
        std::arch::asm!(
            "lea r14, [rip + 77f]", $($code,)+ "77:",
            in("r12") $crate::inside::hostile::signals::MAGIC,
            inout("r13") 0_i64 => signals,
            inout("r15") 0_u64 => at,
            out("r14") _,
            $($operands)*
        );
        (signals, at)
    }};
}
pub(super) use caught;
