//! Return addresses that tracers keep for a task, with a trampoline's address in their place on the stack.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::profile::Capability;
use crate::image::scan_offsets::ScanOffsets;
use crate::linux::memory::{read_u64, read_words};
use crate::linux::tasks::TaskReader;
use crate::linux::view::{Kernel, missing};
use crate::plan::refusal::Refusal;

/// The trampoline of the function graph tracer.
pub(super) const GRAPH: &str = "return_to_handler";
/// Those of return probes, by their names since 5.18, since 5.15, and before.
pub(super) const HOOKS: [&str; 3] =
    ["arch_rethook_trampoline", "__kretprobe_trampoline", "kretprobe_trampoline"];
/// The memory of `ret_stack`: a page since 6.11, and less before (kernel/trace/fgraph.c, `SHADOW_STACK_SIZE`,
/// `FTRACE_RETFUNC_DEPTH`).
const RET_STACK: u64 = 1 << 12;
/// No less than an entry of `ret_stack` takes (include/linux/ftrace.h, `struct ftrace_ret_stack`). Since 6.11
/// `curr_ret_stack` counts words, which are shorter.
const ENTRY: u64 = 64;
/// Most return probes that a task is in. One may be in a function of every level of its stack.
const MOST_HOOKS: usize = 1 << 12;

/// Offsets of what a search of stacks reads.
///
/// # Errors
/// [`Refusal::MissingCapability`].
pub fn scan_offsets(kernel: &Kernel<'_>) -> Result<ScanOffsets, Refusal> {
    kernel.image.profile().require(Capability::StackCheck).map_err(missing)?;
    kernel.image.offsets().scan.ok_or(Refusal::UnknownLayout { what: "struct task_struct" })
}

/// The functions that stand on a stack in place of a return address.
///
/// # Errors
/// [`Refusal::MissingCapability`].
pub fn trampolines(kernel: &Kernel<'_>) -> Result<Vec<Range<Gva>>, Refusal> {
    scan_offsets(kernel)?;
    let found = HOOKS.iter().filter_map(|name| kernel.symbol(name).ok());
    let range = |at| {
        let function = kernel.function_at(at).filter(|function| function.start == at);
        function.map(|function| function.start..function.end).ok_or(Refusal::NotText { at })
    };
    [kernel.symbol(GRAPH)?].into_iter().chain(found).map(range).collect()
}

impl TaskReader<'_> {
    /// The return addresses that tracers keep for a task. `ret_stack` is taken whole as far as it may be in
    /// use, whatever its entries are: each of its words counts.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`], [`Refusal::Unmapped`]; [`Refusal::BadTasks`] when a list does not end.
    pub fn hidden_addresses(&self, task: Gva) -> Result<Vec<u64>, Refusal> {
        let offsets = scan_offsets(self.kernel())?;
        let mut found = Vec::new();
        let ret_stack = self.word(task, offsets.ret_stack)?;
        // -1 while there is none, before 6.11: no words, or all that there can be.
        let used = self.number(task, offsets.curr_ret_stack)?.saturating_add(1).saturating_mul(ENTRY);
        let used = RET_STACK.min(used);
        if ret_stack != 0 {
            found = read_words(self.memory(), Gva(ret_stack), usize::try_from(used).unwrap_or(0))?;
        }
        // `struct llist_head` and `struct llist_node` both begin with the pointer to the next.
        let mut node = self.word(task, offsets.hooks)?;
        let mut count = 0;
        while node != 0 {
            count += 1;
            if count > MOST_HOOKS {
                return Err(Refusal::BadTasks { why: "a task's list of return probes does not end" });
            }
            let hook = Gva(node.wrapping_sub(offsets.hook_node));
            found.push(self.word(hook, offsets.hook_address)?);
            node = read_u64(self.memory(), Gva(node))?;
        }
        Ok(found)
    }
}
