//! Offsets of what is read of tasks, from the kernel's BTF.

use crate::image::btf::{Btf, Scalar};

/// `struct task_struct` and what belongs to it (include/linux/sched.h, include/linux/sched/signal.h).
#[derive(Debug, Clone, Copy)]
pub struct TaskOffsets {
    /// `tasks`: the next process.
    pub tasks: u64,
    /// `thread_node`: the next thread of the process.
    pub thread_node: u64,
    /// `signal`: what the threads of a process share.
    pub signal: u64,
    /// `struct signal_struct`, `thread_head`: the list of the process's threads.
    pub thread_head: u64,
    /// `pid`: the number of the thread.
    pub pid: Scalar,
    /// `tgid`: the number of the process.
    pub tgid: Scalar,
    /// `comm`.
    pub comm: u64,
    /// `__state`; `state` before 5.14.
    pub state: Scalar,
    /// `exit_state`.
    pub exit_state: Scalar,
    /// `flags`.
    pub flags: Scalar,
    /// The CPU that it runs on or ran on last: in `thread_info` since 5.16.
    pub cpu: Scalar,
    /// `on_cpu`: not zero while the task runs. One byte in some kernels, with others behind it.
    pub on_cpu: Scalar,
    /// `nvcsw`: how often it gave up its CPU.
    pub nvcsw: Scalar,
    /// `nivcsw`: how often its CPU was taken from it.
    pub nivcsw: Scalar,
    /// `stack`: the lowest address of its stack, or zero.
    pub stack: u64,
    /// `thread.sp`: its stack pointer, while it does not run.
    pub sp: u64,
}

/// `struct inactive_task_frame` (arch/x86/include/asm/switch_to.h): what `thread.sp` points to.
#[derive(Debug, Clone, Copy)]
pub struct InactiveOffsets {
    /// `bp`.
    pub bp: u64,
    /// `ret_addr`, the last.
    pub return_address: u64,
}

impl TaskOffsets {
    pub(super) fn read(btf: &Btf<'_>) -> Option<Self> {
        let of = |name, member| btf.offset(name, member).map(u64::from);
        let task = |member| of("task_struct", member);
        let number = |member| btf.scalar("task_struct", member);
        let thread_info_cpu = || {
            let cpu = btf.scalar("thread_info", "cpu")?;
            Some(Scalar { offset: task("thread_info")?.checked_add(cpu.offset)?, ..cpu })
        };
        Some(Self {
            tasks: task("tasks")?,
            thread_node: task("thread_node")?,
            signal: task("signal")?,
            thread_head: of("signal_struct", "thread_head")?,
            pid: number("pid")?,
            tgid: number("tgid")?,
            comm: task("comm")?,
            state: number("__state").or_else(|| number("state"))?,
            exit_state: number("exit_state")?,
            flags: number("flags")?,
            cpu: number("cpu").or_else(thread_info_cpu)?,
            on_cpu: number("on_cpu")?,
            nvcsw: number("nvcsw")?,
            nivcsw: number("nivcsw")?,
            stack: task("stack")?,
            sp: task("thread")?.checked_add(of("thread_struct", "sp")?)?,
        })
    }
}

impl InactiveOffsets {
    pub(super) fn read(btf: &Btf<'_>) -> Option<Self> {
        let of = |member| btf.offset("inactive_task_frame", member).map(u64::from);
        Some(Self { bp: of("bp")?, return_address: of("ret_addr")? })
    }
}
