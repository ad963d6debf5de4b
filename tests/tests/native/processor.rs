//! Executes single instructions on the processor itself, in a child process that can do nothing else.
//!
//! The child's memory is shared with this process: the instructions and the registers before, and after
//! each what became of the registers and of a window of memory. Once it begins, seccomp in strict mode
//! leaves it no system call but `exit`, and an alarm ends what does not end.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::io::Error;
use std::mem::size_of;
use std::ptr;

/// Where the instruction is executed.
pub(crate) const CODE: u64 = 0x2000_0000;
/// The memory that instructions write to, at the same addresses here and in the child.
pub(crate) const WINDOW: u64 = 0x2001_0000;
/// Its size, in bytes: some pages.
pub(crate) const SIZE: usize = 4 * 4096;
/// Longest code, in bytes.
pub(crate) const LONGEST: usize = 15;
/// The base of GS in the child.
pub(crate) const GS: u64 = 0x3000;
/// Time for all instructions, in seconds.
const PATIENCE: u32 = 60;

/// Registers, in the order in which `store_native_run` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub(crate) general: [u64; 16],
    pub(crate) flags: u64,
}

/// An instruction and its outcome.
#[derive(Clone, Copy)]
#[repr(C)]
struct Slot {
    code: [u8; LONGEST],
    length: u8,
    registers: Registers,
    /// How many bytes of the window changed, up to as many as there is room for.
    count: u32,
    changed: [(u16, u8); MOST_CHANGED],
}

/// Most bytes that one instruction changes.
const MOST_CHANGED: usize = 512;

/// What the parent and the child share, before the slots.
#[repr(C)]
struct Head {
    /// How many instructions are done.
    done: u64,
}

/// What an instruction did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) registers: Registers,
    /// The bytes of the window that changed: offset and value.
    pub(crate) changed: Vec<(usize, u8)>,
}

// `store_native_run(registers)`: loads the registers, jumps to CODE, and stores them once the code has
// come to `store_native_end`. Everything is addressed relative to RIP or by a fixed address, so that all
// registers can be the instruction's.
global_asm!(
    ".pushsection .bss.store_native, \"aw\", @nobits",
    ".balign 16",
    "2: .skip 8 * 20", // the registers, then the caller's RSP at 136 and the pointer at 144
    ".skip 4096",
    "3:", // the top of a stack of this code's own
    ".popsection",
    ".pushsection .text.store_native, \"ax\", @progbits",
    ".global store_native_run",
    ".global store_native_end",
    "store_native_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + 2b + 136], rsp",
    "mov [rip + 2b + 144], rdi",
    "push qword ptr [rdi + 128]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rsp, [rdi + 32]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "jmp qword ptr [rip + 4f]",
    "4: .quad {code}",
    "store_native_end:",
    "mov [rip + 2b], rax",
    "mov [rip + 2b + 8], rcx",
    "mov [rip + 2b + 16], rdx",
    "mov [rip + 2b + 24], rbx",
    "mov [rip + 2b + 32], rsp",
    "mov [rip + 2b + 40], rbp",
    "mov [rip + 2b + 48], rsi",
    "mov [rip + 2b + 56], rdi",
    "lea rsp, [rip + 3b]",
    "pushfq",
    "pop qword ptr [rip + 2b + 128]",
    "mov rsp, [rip + 2b + 136]",
    "cld",
    "mov [rip + 2b + 64], r8",
    "mov [rip + 2b + 72], r9",
    "mov [rip + 2b + 80], r10",
    "mov [rip + 2b + 88], r11",
    "mov [rip + 2b + 96], r12",
    "mov [rip + 2b + 104], r13",
    "mov [rip + 2b + 112], r14",
    "mov [rip + 2b + 120], r15",
    "mov rdi, [rip + 2b + 144]",
    "lea rsi, [rip + 2b]",
    "mov rcx, 17",
    "rep movsq",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
    code = const CODE,
);

unsafe extern "C" {
    fn store_native_run(registers: *mut Registers);
    fn store_native_end();
}

/// The byte that the window has at an offset before each instruction: differs from its neighbours.
pub(crate) fn background(offset: usize) -> u8 {
    (offset.wrapping_mul(0x9d) >> 1).to_le_bytes()[0] ^ offset.to_le_bytes()[1]
}

/// The base of FS of this thread, which the child has, too.
pub(crate) fn fs() -> u64 {
    let mut base = 0_u64;
    // SAFETY: arch_prctl(ARCH_GET_FS) writes one word to the address that it is given.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1003, &raw mut base) };
    assert_eq!(result, 0, "arch_prctl: {}", Error::last_os_error());
    base
}

/// Anonymous memory, at an address if that is not 0.
fn map(at: u64, size: usize, protection: i32, sharing: i32) -> *mut u8 {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let flags = sharing | libc::MAP_ANONYMOUS | fixed;
    // SAFETY: without an address the kernel chooses free memory; MAP_FIXED_NOREPLACE fails where memory is
    // mapped already.
    let found = unsafe { libc::mmap(at as *mut libc::c_void, size, protection, flags, -1, 0) };
    assert_ne!(found, libc::MAP_FAILED, "mmap: {}", Error::last_os_error());
    found.cast()
}

/// Executes each instruction once, with the window as [`background`] says. Called once in a process, on
/// one thread.
///
/// # Errors
/// The number of the first instruction that raises an exception or does not end, and the signal.
pub(crate) fn execute(all: &[(Vec<u8>, Registers)]) -> Result<Vec<Outcome>, (usize, i32)> {
    let (read, write) = (libc::PROT_READ, libc::PROT_WRITE);
    let size = size_of::<Head>() + all.len() * size_of::<Slot>();
    let head = map(0, size, read | write, libc::MAP_SHARED).cast::<Head>();
    // SAFETY: the mapping is private to this function and of that size; pages are zero, which is a valid
    // `Head` and `Slot`, and both have an alignment of 8 at most, as has their place in it.
    let slots = unsafe { std::slice::from_raw_parts_mut(head.add(1).cast::<Slot>(), all.len()) };
    for (slot, (code, registers)) in slots.iter_mut().zip(all) {
        assert!(code.len() <= LONGEST);
        slot.code[..code.len()].copy_from_slice(code);
        slot.length = u8::try_from(code.len()).expect("short");
        slot.registers = *registers;
    }
    let window = map(WINDOW, SIZE, read | write, libc::MAP_PRIVATE);
    let code = map(CODE, 4096, read | write | libc::PROT_EXEC, libc::MAP_PRIVATE);
    // SAFETY: fork has no conditions. The child calls nothing that takes a lock or allocates: it is on this
    // thread alone, and other threads may have held any lock.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", Error::last_os_error());
    if child == 0 {
        // SAFETY: `head`, `slots`, `window` and `code` are mapped, with the sizes that `run` uses, and in this
        // process nothing else refers to them.
        unsafe { run(head, slots, window, code) };
    }
    let mut status = 0;
    // SAFETY: `status` is a valid place for an int.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child, "waitpid: {}", Error::last_os_error());
    // SAFETY: the child, the only other that wrote there, has ended.
    let done = unsafe { (*head).done };
    if libc::WIFSIGNALED(status) {
        return Err((usize::try_from(done).expect("a count"), libc::WTERMSIG(status)));
    }
    assert_eq!((status, done), (0, all.len() as u64), "the child ended early");
    let outcome = |slot: &Slot| {
        let count = slot.count as usize;
        assert!(count <= MOST_CHANGED, "{count} bytes changed");
        let changed = slot.changed[..count].iter().map(|(offset, byte)| (usize::from(*offset), *byte));
        Outcome { registers: slot.registers, changed: changed.collect() }
    };
    Ok(slots.iter().map(outcome).collect())
}

/// The child.
///
/// # Safety
/// `window` is [`SIZE`] bytes, `code` a page that can be written and executed, and nothing else uses these
/// or `head` and `slots` in this process, which has just been forked and has this thread only.
unsafe fn run(head: *mut Head, slots: &mut [Slot], window: *mut u8, code: *mut u8) -> ! {
    // SAFETY: system calls that take no memory of this process, or (ARCH_SET_GS) a number; no Rust code on
    // x86-64 Linux uses GS.
    unsafe {
        // The default action of each ends the process, though the test's own handlers were inherited.
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGALRM]
        {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::alarm(PATIENCE);
        let set = libc::syscall(libc::SYS_arch_prctl, 0x1001, GS);
        if set != 0 || libc::prctl(libc::PR_SET_SECCOMP, 1) != 0 {
            libc::_exit(1);
        }
    }
    // jmp [rip + 0], and where to.
    let mut jump = [0xff, 0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    jump[6..].copy_from_slice(&(store_native_end as *const () as u64).to_le_bytes());
    for slot in slots {
        let length = usize::from(slot.length);
        // SAFETY: the code and the jump have less than a page, and the window has SIZE bytes. What is executed
        // is one instruction and the jump to `store_native_end`, which is in the function that is called: it
        // keeps what the ABI says. Should the instruction raise an exception, or go on for ever, the kernel
        // ends this process; should it write anywhere but to the window, this process and the slots, which
        // the parent only compares, are all there is.
        unsafe {
            for offset in 0..SIZE {
                window.add(offset).write_volatile(background(offset));
            }
            ptr::copy_nonoverlapping(slot.code.as_ptr(), code, length);
            ptr::copy_nonoverlapping(jump.as_ptr(), code.add(length), jump.len());
            store_native_run(&raw mut slot.registers);
            slot.count = 0;
            for offset in 0..SIZE {
                let byte = window.add(offset).read_volatile();
                if byte != background(offset) {
                    if let Some(place) = slot.changed.get_mut(slot.count as usize) {
                        *place = (u16::try_from(offset).unwrap_or(u16::MAX), byte);
                    }
                    slot.count += 1;
                }
            }
            (*head).done += 1;
        }
    }
    // SAFETY: `exit`, the one system call that is left, ends this thread, and with it the process. `_exit`
    // calls `exit_group`, which strict seccomp kills for.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!()
}
