//! Doors: where vCPUs are kept while a program is at its sites, by an `int3` that is not at a
//! site. Who comes by waits until the traps are withdrawn.
//!
//! The guest's kernel patches itself, too: it takes locks, compares what is there with what it
//! expects, and replaces it; where it finds something else it panics. So a program keeps away
//! everybody who is about to compare, and begins only when nobody has the locks: who comes for
//! them afterwards comes to a door before he looks.

use crate::addr::Gva;
use crate::insn::{self, INT3};
use crate::kernel::live::read;
use crate::kernel::{Kernel, Text};
use crate::resolve::Site;

/// An instruction that vCPUs come by, and its first byte.
pub type Door = (Gva, u8);

/// Functions that are never called with a spinlock held: on the way out of a system call, and
/// on the way to another task (Linux kernel/entry/common.c, kernel/sched/core.c).
const UNLOCKED: [&str; 2] = ["syscall_exit_to_user_mode", "schedule"];

/// Functions that compare or replace text, called with one of [`LOCKS`] held (Linux
/// arch/x86/kernel/{alternative,jump_label,static_call,ftrace}.c, kprobes/{core,opt}.c,
/// arch/x86/net/bpf_jit_comp.c; the last two take theirs inside).
const PATCHERS: [&str; 18] = [
    "__jump_label_patch",
    "arch_jump_label_transform",
    "arch_jump_label_transform_queue",
    "__static_call_transform",
    "arch_static_call_transform",
    "ftrace_replace_code",
    "ftrace_make_call",
    "ftrace_make_nop",
    "arch_arm_kprobe",
    "arch_disarm_kprobe",
    "arch_optimize_kprobes",
    "arch_unoptimize_kprobe",
    "arch_unoptimize_kprobes",
    "text_poke",
    "text_poke_bp",
    "text_poke_queue",
    "__bpf_arch_text_poke",
    "alternatives_enable_smp",
];

/// What is held from comparing to replacing: that of all text (kernel/extable.c), and those of
/// jumps and calls, which let go of the first in between (kernel/{jump_label,static_call_inline}.c).
const LOCKS: [&str; 3] = ["text_mutex", "jump_label_mutex", "static_call_mutex"];

/// How the guest's kernel patches itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Patchers {
    /// Where it is about to look at text.
    pub doors: Vec<Door>,
    /// The words that are zero while nobody has its locks.
    pub locks: Vec<Gva>,
}

impl Patchers {
    /// Those that this kernel has. None if it does not describe its mutexes.
    pub(crate) fn of(kernel: &Kernel<'_>, text: &dyn Text, sites: &[Site]) -> Self {
        let locks = locks(kernel);
        if locks.is_empty() {
            return Self::default();
        }
        let door = |name: &str| door(kernel, text, sites, name);
        Self { doors: PATCHERS.into_iter().filter_map(door).collect(), locks }
    }
}

/// The words that are zero while a guest's kernel does not patch itself.
#[must_use]
pub fn locks(kernel: &Kernel<'_>) -> Vec<Gva> {
    let Some(owner) = kernel.image.offsets().mutex_owner else { return Vec::new() };
    let lock = |name: &str| Some(Gva(kernel.symbol(name).ok()?.0.wrapping_add(owner)));
    LOCKS.into_iter().filter_map(lock).collect()
}

/// Where nobody has a spinlock.
pub(crate) fn unlocked(kernel: &Kernel<'_>, text: &dyn Text, sites: &[Site]) -> Vec<Door> {
    UNLOCKED.into_iter().filter_map(|name| door(kernel, text, sites, name)).collect()
}

/// The first instruction of a function behind the marker for indirect branches, which must be
/// whole, and the place for the tracer. `None` if a static key's jump or a static call, a site,
/// or somebody's `int3` is there.
fn door(kernel: &Kernel<'_>, text: &dyn Text, sites: &[Site], name: &str) -> Option<Door> {
    const LOOK: usize = 64;
    let entry = kernel.symbol(name).ok()?;
    let code = read(text, entry, LOOK).ok()?;
    let marker = insn::marker(&code);
    let at = insn::decode(&code[marker..], entry.plus(marker)?).find(|insn| !kernel.is_fentry(insn.at))?.at;
    let byte = code[at.offset_from(entry)?];
    let taken = byte == INT3
        || kernel.image.tables().is_switched(kernel.linked(at))
        || sites.iter().any(|site| site.at <= at && at < site.end());
    (!taken).then_some((at, byte))
}
