//! Addresses that every plan needs, looked up once when the image is read.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::offsets::Offsets;
use crate::image::symbols::Symbols;
use crate::image::tables::Tables;
use crate::insn;

/// Functions that compare or replace text, called with one of [`LOCKS`] held (Linux
/// arch/x86/kernel/{alternative,jump_label,static_call,ftrace}.c, kprobes/{core,opt}.c,
/// arch/x86/net/bpf_jit_comp.c; the last two take theirs inside).
const PATCHERS: [&str; 20] = [
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
    // The last two are called so since 6.16.
    "smp_text_poke_single",
    "smp_text_poke_batch_add",
    "__bpf_arch_text_poke",
    "alternatives_enable_smp",
];

/// The locks that are held from comparing to replacing: that of all text (kernel/extable.c), and those
/// of jump labels and static calls, which release the first in between
/// (kernel/{jump_label,static_call_inline}.c).
const LOCKS: [&str; 3] = ["text_mutex", "jump_label_mutex", "static_call_mutex"];

/// Functions that every system call passes, never with a spinlock held and always with interrupts
/// enabled; the first that a kernel has. On the way out (Linux kernel/entry/common.c; inlined since
/// 6.16), or on the way in: called only by the entry code, `do_syscall_64`, before the system call itself
/// (arch/x86/entry/{common,syscall_64}.c).
const SYSTEM_CALL: [&str; 2] = ["syscall_exit_to_user_mode", "x64_sys_call"];
/// As the latter, for system calls of 32 bits, if the kernel has them.
const SYSTEM_CALL_32: &str = "ia32_sys_call";
/// The same on the way to another task (kernel/sched/core.c).
const SWITCH: &str = "schedule";

/// Link-time addresses. What a kernel does not have is left out.
#[derive(Debug, Default)]
pub struct Landmarks {
    /// Where a vCPU can be stopped before it compares or replaces text.
    pub patchers: Vec<Gva>,
    /// Where a vCPU can be stopped without holding a spinlock: on the way of every system call, and to
    /// another task. Empty if not both are known.
    pub unlocked: Vec<Gva>,
    /// The words of the locks under which text is patched. Zero means free.
    pub locks: Vec<Gva>,
    /// Init memory, which is freed once the kernel is up.
    pub init: Option<Range<Gva>>,
    /// The table of kprobes.
    pub probes: Option<Gva>,
    /// The list of functions that livepatches replace.
    pub livepatches: Option<Gva>,
}

impl Landmarks {
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols, tables: &Tables, offsets: &Offsets) -> Self {
        let place = |name: &str| place(vmlinux, tables, symbols.only(name)?);
        let lock = |name: &str| symbols.only(name)?.plus(usize::try_from(offsets.mutex_owner?).ok()?);
        Self {
            patchers: PATCHERS.into_iter().filter_map(place).collect(),
            unlocked: unlocked(place).unwrap_or_default(),
            locks: LOCKS.into_iter().filter_map(lock).collect(),
            init: symbols.only("__init_begin").zip(symbols.only("__init_end")).map(|(from, to)| from..to),
            probes: symbols.only("kprobe_table"),
            livepatches: symbols.only("klp_ops"),
        }
    }
}

fn unlocked(place: impl Fn(&str) -> Option<Gva>) -> Option<Vec<Gva>> {
    let mut places = vec![SYSTEM_CALL.into_iter().find_map(&place)?, place(SWITCH)?];
    places.extend(place(SYSTEM_CALL_32));
    Some(places)
}

/// The first instruction of a function behind `endbr64`, which must stay whole, and behind the fentry
/// call. `None` if a static key's jump or a static call is there.
fn place(vmlinux: &Vmlinux<'_>, tables: &Tables, entry: Gva) -> Option<Gva> {
    let mut at = entry.plus(insn::marker(vmlinux.bytes(entry, insn::MARKER)?))?;
    if tables.is_fentry(at) {
        at = at.plus(insn::FENTRY)?;
    }
    (!tables.is_switched(at)).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_without_spinlocks_is_stopped_on_the_way_of_every_system_call_or_nowhere() {
        let found = |known: &[(&str, u64)]| {
            unlocked(|name| known.iter().find(|(known, _)| *known == name).map(|(_, at)| Gva(*at)))
        };
        let [exit, long, short, switch] =
            [("syscall_exit_to_user_mode", 1), ("x64_sys_call", 2), ("ia32_sys_call", 3), ("schedule", 4)];
        assert_eq!(found(&[exit, long, switch]), Some(vec![Gva(1), Gva(4)]));
        assert_eq!(found(&[long, short, switch]), Some(vec![Gva(2), Gva(4), Gva(3)]));
        for known in [&[short, switch][..], &[exit, long, short], &[switch]] {
            assert_eq!(found(known), None, "{known:?}");
        }
    }
}
