//! Offsets of members of the kernel's structures, from its BTF.

use crate::image::btf::Btf;
use crate::image::scan_offsets::ScanOffsets;
use crate::image::task_offsets::{InactiveOffsets, TaskOffsets};
use crate::image::tree_offsets::TreeOffsets;

/// Offsets in bytes. `None` where the kernel has no BTF, or no such member.
#[derive(Debug, Clone, Default)]
pub struct Offsets {
    /// `struct cpuinfo_x86`, `x86_capability`: the CPU features, a bit each.
    pub capability: Option<u64>,
    /// `struct mutex`, `owner`: the owning task, or zero. With `PREEMPT_RT` that of the `struct
    /// rt_mutex_base` inside, whose bit 0 is a flag (kernel/locking/rtmutex_common.h).
    pub mutex_owner: Option<u64>,
    /// `struct task_struct`, `comm`: the task's name.
    pub task_comm: Option<u64>,
    /// `struct kprobe`.
    pub probe: Option<ProbeOffsets>,
    /// `struct klp_ops` and `struct klp_func`.
    pub livepatch: Option<LivepatchOffsets>,
    /// `struct module`.
    pub module: Option<ModuleOffsets>,
    /// Of `struct module`, what its table of bugs needs.
    pub bugs: Option<BugOffsets>,
    /// The tree of modules by the addresses of their code, and a module's node in it.
    pub tree: Option<TreeOffsets>,
    /// `struct task_struct`.
    pub task: Option<TaskOffsets>,
    /// `struct inactive_task_frame`.
    pub inactive: Option<InactiveOffsets>,
    /// What a search of all stacks reads besides.
    pub scan: Option<ScanOffsets>,
}

/// `struct kprobe` (include/linux/kprobes.h).
#[derive(Debug, Clone, Copy)]
pub struct ProbeOffsets {
    /// `hlist`: the next in its bucket.
    pub node: u64,
    /// `addr`.
    pub address: u64,
}

/// The structures of the guest's own livepatches (include/linux/livepatch.h,
/// kernel/livepatch/patch.h).
#[derive(Debug, Clone, Copy)]
pub struct LivepatchOffsets {
    /// `struct klp_ops`, `node`: the next function.
    pub node: u64,
    /// `struct klp_ops`, `func_stack`: its replacements.
    pub stack: u64,
    /// `struct klp_func`, `stack_node`.
    pub stack_node: u64,
    /// `struct klp_func`, `old_func`: the start of the replaced function.
    pub old: u64,
    /// `struct klp_func`, `old_size`.
    pub old_size: u64,
}

/// `struct module` and what belongs to it (include/linux/module.h).
#[derive(Debug, Clone, Copy)]
pub struct ModuleOffsets {
    /// `list`.
    pub list: u64,
    /// `name`.
    pub name: u64,
    /// `state`.
    pub state: u64,
    /// `kallsyms`.
    pub kallsyms: u64,
    /// `jump_entries`, `num_jump_entries`.
    pub jump_entries: (u64, u64),
    /// `static_call_sites`, `num_static_call_sites`.
    pub static_call_sites: (u64, u64),
    /// `extable`, `num_exentries`.
    pub exceptions: (u64, u64),
    /// `struct mod_arch_specific`: `num_orcs`, `orc_unwind_ip`, `orc_unwind`; of a kernel with ORC.
    pub orc: Option<(u64, u64, u64)>,
    /// Address and size of the module's text: since 6.4 in the first `struct module_memory`, before in
    /// `core_layout`.
    pub text: (u64, u64),
    /// `struct mod_kallsyms`: `symtab`, `num_symtab`, `strtab`, `typetab`.
    pub symbols: (u64, u64, u64, u64),
}

/// `struct module` as its table of bugs (`BUG`, `WARN`) needs it (include/linux/module.h, lib/bug.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BugOffsets {
    /// `bug_list`: the next, and the previous behind it.
    pub node: u64,
    /// `bug_table`.
    pub table: u64,
    /// `num_bugs`.
    pub count: u64,
}

impl Offsets {
    pub(super) fn read(btf: &Btf<'_>) -> Self {
        Self {
            capability: btf.offset("cpuinfo_x86", "x86_capability").map(u64::from),
            mutex_owner: btf.offset("mutex", "owner").or_else(|| rt_mutex_owner(btf)).map(u64::from),
            task_comm: btf.offset("task_struct", "comm").map(u64::from),
            probe: ProbeOffsets::read(btf),
            livepatch: LivepatchOffsets::read(btf),
            module: ModuleOffsets::read(btf),
            bugs: BugOffsets::read(btf),
            tree: TreeOffsets::read(btf),
            task: TaskOffsets::read(btf),
            inactive: InactiveOffsets::read(btf),
            scan: ScanOffsets::read(btf),
        }
    }
}

/// Where the owner of a `struct mutex` is with `PREEMPT_RT` (include/linux/mutex.h, since 5.15).
fn rt_mutex_owner(btf: &Btf<'_>) -> Option<u32> {
    btf.offset("mutex", "rtmutex")?.checked_add(btf.offset("rt_mutex_base", "owner")?)
}

impl ProbeOffsets {
    fn read(btf: &Btf<'_>) -> Option<Self> {
        let of = |member| btf.offset("kprobe", member).map(u64::from);
        Some(Self { node: of("hlist")?, address: of("addr")? })
    }
}

impl LivepatchOffsets {
    fn read(btf: &Btf<'_>) -> Option<Self> {
        let ops = |member| btf.offset("klp_ops", member).map(u64::from);
        let func = |member| btf.offset("klp_func", member).map(u64::from);
        Some(Self {
            node: ops("node")?,
            stack: ops("func_stack")?,
            stack_node: func("stack_node")?,
            old: func("old_func")?,
            old_size: func("old_size")?,
        })
    }
}

impl ModuleOffsets {
    fn read(btf: &Btf<'_>) -> Option<Self> {
        let of = |name, member| btf.offset(name, member).map(u64::from);
        let module = |member| of("module", member);
        let kallsyms = |member| of("mod_kallsyms", member);
        let text = match module("mem") {
            Some(memory) => (memory + of("module_memory", "base")?, memory + of("module_memory", "size")?),
            None => {
                let layout = module("core_layout")?;
                (layout + of("module_layout", "base")?, layout + of("module_layout", "text_size")?)
            }
        };
        Some(Self {
            list: module("list")?,
            name: module("name")?,
            state: module("state")?,
            kallsyms: module("kallsyms")?,
            jump_entries: (module("jump_entries")?, module("num_jump_entries")?),
            static_call_sites: (module("static_call_sites")?, module("num_static_call_sites")?),
            exceptions: (module("extable")?, module("num_exentries")?),
            orc: orc(btf),
            text,
            symbols: (
                kallsyms("symtab")?,
                kallsyms("num_symtab")?,
                kallsyms("strtab")?,
                kallsyms("typetab")?,
            ),
        })
    }
}

impl BugOffsets {
    /// With the layout of an entry that new code's objects have: two distances of 4 bytes, the line, the flags
    /// (include/asm-generic/bug.h, `CONFIG_GENERIC_BUG_RELATIVE_POINTERS` and `CONFIG_DEBUG_BUGVERBOSE`).
    fn read(btf: &Btf<'_>) -> Option<Self> {
        const ENTRY: [(&str, u32); 4] = [("bug_addr_disp", 0), ("file_disp", 4), ("line", 8), ("flags", 10)];
        let of = |member| btf.offset("module", member).map(u64::from);
        let is_known = ENTRY.into_iter().all(|(member, at)| btf.offset("bug_entry", member) == Some(at));
        Some(Self { node: of("bug_list")?, table: of("bug_table")?, count: of("num_bugs")? })
            .filter(|_| is_known)
    }
}

/// Where a module's ORC table is (arch/x86/include/asm/module.h).
fn orc(btf: &Btf<'_>) -> Option<(u64, u64, u64)> {
    let start = btf.offset("module", "arch")?;
    let of = |member| Some(u64::from(start.checked_add(btf.offset("mod_arch_specific", member)?)?));
    Some((of("num_orcs")?, of("orc_unwind_ip")?, of("orc_unwind")?))
}
