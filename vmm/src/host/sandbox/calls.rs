//! Which system calls each thread may make, and why. What is not listed ends the process.
//!
//! Every list is the group [`EVERY_THREAD`] with what the thread does of its own. A group whose calls a VM can run
//! without says so (`is_rare`); a test finds calls of the others that no thread makes.

use libc::{
    MADV_DONTNEED, PROT_EXEC, SIGABRT, SYS_accept4, SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep,
    SYS_close, SYS_epoll_ctl, SYS_epoll_wait, SYS_exit, SYS_exit_group, SYS_fcntl, SYS_fdatasync, SYS_futex,
    SYS_geteuid, SYS_getpgrp, SYS_getpid, SYS_getrandom, SYS_getsockopt, SYS_gettid, SYS_ioctl, SYS_lstat,
    SYS_madvise, SYS_membarrier, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_open, SYS_openat,
    SYS_openat2, SYS_pread64, SYS_read, SYS_readlink, SYS_recvfrom, SYS_restart_syscall, SYS_rt_sigaction,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_getscheduler,
    SYS_sched_setscheduler, SYS_sched_yield, SYS_sendto, SYS_shutdown, SYS_sigaltstack, SYS_statx,
    SYS_tgkill, SYS_unlink, SYS_write, SYS_writev, TCSETS, TCSETS2, TIOCGPGRP,
};

use super::kvm_calls as kvm;
use crate::host::kick_signal::KICK;
use crate::host::thread::Thread;

/// A system call that is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// With which arguments.
    pub when: When,
}

/// Which arguments a call may have.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// Any.
    Always,
    /// The argument of this index is one of these values.
    Is(u8, &'static [u64]),
    /// The argument of this index has none of these bits.
    Lacks(u8, u64),
    /// The first argument is this process, and the third is one of these signals.
    ToItself(&'static [u64]),
}

/// Calls that are allowed for the same reason.
#[derive(Debug)]
pub struct Group {
    /// What they are for.
    pub why: &'static str,
    /// Whether a VM can run from start to end without them.
    pub is_rare: bool,
    /// The calls.
    pub calls: &'static [Call],
}

/// Calls that fail with `EACCES` in every thread, so that the C library goes on without: its allocator looks at
/// `/proc/sys/vm/overcommit_memory` and `/sys/devices/system/cpu` (glibc, malloc/arena.c, sysdeps/unix/sysv/linux).
pub const REFUSED: [i64; 3] = [SYS_open, SYS_openat, SYS_openat2];

const fn any(number: i64) -> Call {
    Call { number, when: When::Always }
}

const fn only(number: i64, argument: u8, values: &'static [u64]) -> Call {
    Call { number, when: When::Is(argument, values) }
}

/// What every thread does.
pub const EVERY_THREAD: &[Group] = &[
    Group {
        why: "to wait for other threads, and to sleep",
        is_rare: false,
        calls: &[any(SYS_futex), any(SYS_clock_nanosleep)],
    },
    Group {
        why: "memory of its own, never executable",
        is_rare: false,
        calls: &[
            Call { number: SYS_mmap, when: When::Lacks(2, PROT_EXEC as u64) },
            Call { number: SYS_mprotect, when: When::Lacks(2, PROT_EXEC as u64) },
            any(SYS_munmap),
            any(SYS_mremap),
            any(SYS_brk),
            only(SYS_madvise, 2, &[MADV_DONTNEED as u64]),
        ],
    },
    Group {
        why: "the allocator counts CPUs, and hash tables have a random key",
        is_rare: false,
        calls: &[any(SYS_sched_getaffinity), any(SYS_getrandom)],
    },
    Group {
        why: "to return from a signal's handler, and to end",
        is_rare: false,
        calls: &[
            any(SYS_rt_sigreturn),
            any(SYS_rt_sigprocmask),
            any(SYS_sigaltstack),
            any(SYS_exit),
            any(SYS_exit_group),
        ],
    },
    Group { why: "to close descriptors", is_rare: false, calls: &[any(SYS_close)] },
    Group {
        why: "builds with debug assertions look whether what they close is open",
        is_rare: true,
        calls: &[only(SYS_fcntl, 1, &[libc::F_GETFD as u64])],
    },
    Group {
        why: "a clock that the processor can't read without the kernel (vdso(7)), a lock that spins, and a sleep that \
              was interrupted by SIGSTOP or a debugger",
        is_rare: true,
        calls: &[any(SYS_clock_gettime), any(SYS_sched_yield), any(SYS_restart_syscall)],
    },
    Group {
        why: "a panic, or a call that is not allowed: says so, restores the terminal, aborts",
        is_rare: true,
        calls: &[
            any(SYS_write),
            only(SYS_ioctl, 1, &[TIOCGPGRP, TCSETS, TCSETS2]),
            any(SYS_getpgrp),
            any(SYS_getpid),
            any(SYS_gettid),
            only(SYS_rt_sigaction, 0, &[SIGABRT as u64]),
            Call { number: SYS_tgkill, when: When::ToItself(&[SIGABRT as u64]) },
        ],
    },
];

/// What a thread does of its own.
#[must_use]
pub const fn of(thread: Thread) -> &'static [Group] {
    match thread {
        Thread::Writer => WRITER,
        Thread::Symbols => &[],
        Thread::Vcpu => VCPU,
        Thread::Controller => CONTROLLER,
        Thread::Api => API,
        Thread::Namer => NAMER,
        Thread::Events => EVENTS,
    }
}

const WRITER: &[Group] = &[Group {
    why: "its output, of which it has the only descriptor",
    is_rare: false,
    calls: &[any(SYS_write)],
}];

const VCPU: &[Group] = &[
    Group {
        why: "the guest, and its registers",
        is_rare: false,
        calls: &[only(
            SYS_ioctl,
            1,
            &[
                kvm::RUN,
                kvm::GET_REGS,
                kvm::SET_REGS,
                kvm::GET_SREGS,
                kvm::GET_MSRS,
                kvm::GET_MP_STATE,
                kvm::SET_GUEST_DEBUG,
            ],
        )],
    },
    Group {
        why: "a breakpoint in user mode loads segments, a long stall tells the guest's watchdog, and what KVM was about \
              to deliver is looked at and delivered",
        is_rare: true,
        calls: &[only(
            SYS_ioctl,
            1,
            &[kvm::SET_SREGS, kvm::KVMCLOCK_CTRL, kvm::GET_VCPU_EVENTS, kvm::SET_VCPU_EVENTS],
        )],
    },
    Group { why: "interrupts, and to wake the event loop", is_rare: false, calls: &[any(SYS_write)] },
];

const CONTROLLER: &[Group] = &[
    Group {
        why: "fences: kicks and membarrier; vCPUs that are waited for go first",
        is_rare: false,
        calls: &[
            any(SYS_getpid),
            Call { number: SYS_tgkill, when: When::ToItself(&[KICK as u64]) },
            any(SYS_membarrier),
            any(SYS_sched_getscheduler),
            any(SYS_sched_setscheduler),
        ],
    },
    Group { why: "to wake the threads that it answers", is_rare: false, calls: &[any(SYS_write)] },
    Group {
        why: "the audit log is on disk before what it tells is done",
        is_rare: true,
        calls: &[any(SYS_fdatasync), any(SYS_statx), any(SYS_pread64)],
    },
    Group {
        why: "the arena is taken out of the guest's memory, and put back",
        is_rare: true,
        calls: &[only(SYS_ioctl, 1, &[kvm::SET_USER_MEMORY_REGION])],
    },
];

const API: &[Group] = &[
    Group {
        why: "connections of clients, and who they are",
        is_rare: false,
        calls: &[
            any(SYS_epoll_wait),
            any(SYS_epoll_ctl),
            any(SYS_accept4),
            any(SYS_getsockopt),
            any(SYS_recvfrom),
            any(SYS_writev),
            any(SYS_shutdown),
        ],
    },
    Group { why: "to wake and be woken", is_rare: false, calls: &[any(SYS_write)] },
    Group {
        why: "answers in one piece; the wake-up counter when it is full; a listener that is taken over",
        is_rare: true,
        calls: &[
            any(SYS_sendto),
            any(SYS_read),
            any(SYS_geteuid),
            only(SYS_fcntl, 1, &[libc::F_GETFL as u64, libc::F_SETFL as u64]),
        ],
    },
];

/// It keeps CAP_SYS_PTRACE and enters no Landlock domain: else it could look at processes only that have no more than it
/// has (Linux kernel/ptrace.c, `__ptrace_may_access`; security/landlock/task.c, `hook_ptrace_access_check`).
const NAMER: &[Group] = &[Group {
    why: "which program a client is, for the audit log",
    is_rare: true,
    calls: &[any(SYS_readlink)],
}];

const EVENTS: &[Group] = &[
    Group {
        why: "standard input, signals, and the end of the VM",
        is_rare: false,
        calls: &[
            any(SYS_epoll_wait),
            any(SYS_epoll_ctl),
            any(SYS_read),
            any(SYS_recvfrom),
            any(SYS_sendto),
            any(SYS_write),
        ],
    },
    Group {
        why: "the end: vCPUs are kicked, the socket's path is removed",
        is_rare: false,
        calls: &[
            any(SYS_getpid),
            Call { number: SYS_tgkill, when: When::ToItself(&[KICK as u64]) },
            any(SYS_statx),
            any(SYS_unlink),
        ],
    },
    Group {
        why: "the end without membarrier, or on a system without statx",
        is_rare: true,
        calls: &[any(SYS_membarrier), any(SYS_lstat)],
    },
];
