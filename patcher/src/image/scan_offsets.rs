//! Offsets of what a search of stacks reads besides the tasks themselves, from the kernel's BTF.

use crate::image::btf::{Btf, Scalar};

/// What tells that a task moved, where tracers keep return addresses, where kprobes keep copies of
/// instructions, and how many tasks a run queue has.
#[derive(Debug, Clone, Copy)]
pub struct ScanOffsets {
    /// `struct task_struct`, `start_time` (include/linux/sched.h).
    pub start_time: u64,
    /// `on_rq`: 1 while it is on a run queue.
    pub on_rq: Scalar,
    /// `ret_stack`: return addresses that the function graph tracer keeps.
    pub ret_stack: u64,
    /// `curr_ret_stack`: how many there are.
    pub curr_ret_stack: Scalar,
    /// `rethooks`, or `kretprobe_instances` before 5.18: a list of the return addresses that return probes keep.
    pub hooks: u64,
    /// `llist` of a member of that list.
    pub hook_node: u64,
    /// Its `ret_addr`.
    pub hook_address: u64,
    /// `struct kprobe_insn_cache`, `pages` (include/linux/kprobes.h).
    pub slot_pages: u64,
    /// `struct kprobe_insn_page`, `list` (kernel/kprobes.c).
    pub slot_node: u64,
    /// Its `insns`: the page.
    pub slot_page: u64,
    /// `struct rq`, `nr_running` (kernel/sched/sched.h).
    pub nr_running: Scalar,
}

impl ScanOffsets {
    pub(super) fn read(btf: &Btf<'_>) -> Option<Self> {
        let of = |name, member| btf.offset(name, member).map(u64::from);
        let task = |member| of("task_struct", member);
        let hooks = |list, node| Some((task(list)?, of(node, "llist")?, of(node, "ret_addr")?));
        let (hooks, hook_node, hook_address) = hooks("rethooks", "rethook_node")
            .or_else(|| hooks("kretprobe_instances", "kretprobe_instance"))?;
        Some(Self {
            start_time: task("start_time")?,
            on_rq: btf.scalar("task_struct", "on_rq")?,
            ret_stack: task("ret_stack")?,
            curr_ret_stack: btf.scalar("task_struct", "curr_ret_stack")?,
            hooks,
            hook_node,
            hook_address,
            slot_pages: of("kprobe_insn_cache", "pages")?,
            slot_node: of("kprobe_insn_page", "list")?,
            slot_page: of("kprobe_insn_page", "insns")?,
            nr_running: btf.scalar("rq", "nr_running")?,
        })
    }
}
