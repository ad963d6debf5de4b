//! A kernel in miniature: an ELF file of some 40 KiB with kallsyms, every table, BTF and notes in
//! Linux's layout. Everything that is read from a real kernel can be read from it. Property tests,
//! fuzz targets and documentation examples use it.

use std::ops::Range;
use std::sync::LazyLock;

use patcher::image::KernelImage;

/// Where its text is linked.
pub(crate) const BASE: u64 = 0xffff_ffff_8100_0000;
/// kallsyms with fewer symbols are not recognized.
const FILLERS: usize = 1100;

/// Where the preempt count is, behind `BASE`.
const COUNT: u64 = 0x3000;

struct Builder {
    bytes: Vec<u8>,
    symbols: Vec<(u64, u8, String)>,
}

impl Builder {
    fn here(&self) -> u64 {
        BASE + self.bytes.len() as u64
    }

    fn mark(&mut self, name: &str, kind: u8) -> u64 {
        self.symbols.push((self.here(), kind, name.to_owned()));
        self.here()
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
    }

    fn put(&mut self, name: &str, kind: u8, bytes: &[u8]) -> u64 {
        self.align();
        let at = self.mark(name, kind);
        self.bytes.extend(bytes);
        at
    }

    /// A table between two symbols, of one entry that is made from where it is.
    fn table(&mut self, start: &str, stop: &str, entry: impl Fn(u64) -> Vec<u8>) {
        self.align();
        let bytes = entry(self.mark(start, b'D'));
        self.bytes.extend(bytes);
        self.mark(stop, b'D');
    }
}

fn near(from: u64, to: u64) -> [u8; 4] {
    let distance = to.wrapping_sub(from).cast_signed();
    i32::try_from(distance).expect("near").to_le_bytes()
}

fn far(from: u64, to: u64) -> [u8; 8] {
    to.wrapping_sub(from).to_le_bytes()
}

/// A structure: name, size, members with their offsets.
type Structure = (&'static str, u32, &'static [(&'static str, u32)]);

/// The structures whose members are looked up.
pub(crate) const STRUCTURES: [Structure; 30] = [
    ("cpuinfo_x86", 256, &[("x86_capability", 16)]),
    (
        "module",
        256,
        &[
            ("state", 0),
            ("list", 8),
            ("name", 24),
            ("mem", 80),
            ("core_layout", 80),
            ("kallsyms", 160),
            ("jump_entries", 168),
            ("num_jump_entries", 176),
            ("static_call_sites", 184),
            ("num_static_call_sites", 192),
            ("extable", 200),
            ("num_exentries", 208),
            ("num_bugs", 212),
            ("arch", 216),
            ("bug_list", 232),
            ("bug_table", 248),
        ],
    ),
    ("bug_entry", 12, &[("bug_addr_disp", 0), ("file_disp", 4), ("line", 8), ("flags", 10)]),
    ("mutex", 32, &[("owner", 0), ("rtmutex", 0)]),
    ("rt_mutex_base", 32, &[("owner", 24)]),
    ("module_layout", 88, &[("base", 0), ("text_size", 8), ("size", 12), ("mtn", 32)]),
    ("exception_table_entry", 12, &[("insn", 0), ("fixup", 4), ("data", 8)]),
    ("mod_tree_root", 40, &[("root", 0), ("addr_min", 24), ("addr_max", 32)]),
    ("latch_tree_root", 24, &[("seq", 0), ("tree", 8)]),
    ("latch_tree_node", 48, &[("node", 0)]),
    ("mod_tree_node", 56, &[("mod", 0), ("node", 8)]),
    ("rb_node", 24, &[("__rb_parent_color", 0), ("rb_right", 8), ("rb_left", 16)]),
    (
        "task_struct",
        192,
        &[
            ("thread_info", 0),
            ("cpu", 8),
            ("comm", 16),
            ("__state", 32),
            ("state", 32),
            ("flags", 36),
            ("stack", 40),
            ("on_cpu", 48),
            ("exit_state", 52),
            ("tasks", 56),
            ("pid", 72),
            ("tgid", 76),
            ("signal", 80),
            ("thread_node", 88),
            ("nvcsw", 104),
            ("nivcsw", 112),
            ("thread", 120),
            ("start_time", 152),
            ("on_rq", 160),
            ("curr_ret_stack", 164),
            ("ret_stack", 168),
            ("rethooks", 176),
            ("kretprobe_instances", 176),
        ],
    ),
    ("rethook_node", 48, &[("llist", 16), ("ret_addr", 32)]),
    ("kretprobe_instance", 48, &[("llist", 16), ("ret_addr", 32)]),
    ("kprobe_insn_cache", 64, &[("pages", 40)]),
    ("kprobe_insn_page", 48, &[("list", 0), ("insns", 16)]),
    ("rq", 64, &[("nr_running", 4)]),
    ("thread_info", 16, &[("cpu", 8)]),
    ("thread_struct", 32, &[("sp", 8)]),
    ("signal_struct", 64, &[("thread_head", 16)]),
    ("inactive_task_frame", 56, &[("bp", 40), ("ret_addr", 48)]),
    ("mod_arch_specific", 24, &[("num_orcs", 0), ("orc_unwind_ip", 8), ("orc_unwind", 16)]),
    ("kprobe", 64, &[("hlist", 0), ("addr", 40)]),
    ("klp_ops", 64, &[("node", 0), ("func_stack", 16)]),
    ("klp_func", 64, &[("old_func", 16), ("old_size", 24), ("stack_node", 40)]),
    ("module_memory", 88, &[("base", 0), ("size", 8), ("mtn", 32)]),
    ("mod_kallsyms", 32, &[("symtab", 0), ("num_symtab", 8), ("strtab", 16), ("typetab", 24)]),
    ("paravirt_patch_template", 64, &[("lock", 16)]),
    (
        "pv_lock_ops",
        40,
        &[
            ("queued_spin_lock_slowpath", 0),
            ("queued_spin_unlock", 8),
            ("wait", 16),
            ("kick", 24),
            ("vcpu_is_preempted", 32),
        ],
    ),
];

/// Whether entries of ORC have a bit for the end of the stack, as up to 6.3.
fn has_end(left_out: &[Name]) -> bool {
    !left_out.contains(&Name::Member("orc_entry", "end"))
}

/// `struct orc_entry`: each member with its offset and size in bits; 0 is the size of what is no bit-field.
fn orc_entry(left_out: &[Name]) -> Vec<(&'static str, u32, u32)> {
    let end = has_end(left_out);
    let fields = [
        ("sp_offset", 0, 0),
        ("bp_offset", 16, 0),
        ("sp_reg", 32, 4),
        ("bp_reg", 36, 4),
        ("type", 40, if end { 2 } else { 3 }),
        (if end { "end" } else { "signal" }, if end { 42 } else { 43 }, 1),
    ];
    let is_left_out = |name: &str| {
        left_out.iter().any(|one| matches!(one, Name::Member("orc_entry", member) if *member == name))
    };
    fields
        .into_iter()
        .map(|(name, offset, size)| (if is_left_out(name) { "other" } else { name }, offset, size))
        .collect()
}

/// `Documentation/bpf/btf.rst`. Members that are to be left out get another name.
fn btf(left_out: &[Name]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut text = |name: &str| {
        let at = u32::try_from(strings.len()).expect("small");
        strings.extend(name.bytes().chain([0]));
        at
    };
    let mut types: Vec<u32> = vec![text("int"), 1 << 24, 4, 32];
    for (name, size, members) in STRUCTURES {
        types.extend([text(name), 4 << 24 | u32::try_from(members.len()).expect("few"), size]);
        for (member, offset) in members {
            let left_out = left_out.contains(&Name::Member(name, member));
            types.extend([text(if left_out { "other" } else { member }), 1, 8 * offset]);
        }
    }
    let fields = orc_entry(left_out);
    types.extend([text("orc_entry"), 1 << 31 | 4 << 24 | u32::try_from(fields.len()).expect("few"), 6]);
    for (member, offset, size) in fields {
        types.extend([text(member), 1, size << 24 | offset]);
    }
    let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("small");
    let mut btf = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, length(&types), length(&types), length(&strings)] {
        btf.extend(word.to_le_bytes());
    }
    [btf, types, strings].concat()
}

/// Which kernel's kallsyms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kallsyms {
    /// Up to 6.3: offsets and base first, every table aligned to 8.
    From5_10,
    /// From 6.4 on: offsets and base last. `0` is `CONFIG_KALLSYMS_ABSOLUTE_PERCPU` (up to 6.14).
    From6_4 { absolute_percpu: bool },
    /// From 7.0 on: no base, every offset from its own place, every table aligned to 4.
    From7_0,
}

/// Those after the first.
pub(crate) const LATER: [Kallsyms; 3] = [
    Kallsyms::From6_4 { absolute_percpu: true },
    Kallsyms::From6_4 { absolute_percpu: false },
    Kallsyms::From7_0,
];

/// kallsyms that is linked at `linked`, every token a single character, of symbols from `base` on.
pub(crate) fn kallsyms(layout: Kallsyms, linked: u64, base: u64, symbols: &[(u64, u8, String)]) -> Vec<u8> {
    let align = if layout == Kallsyms::From7_0 { 4 } else { 8 };
    let mut all = symbols.to_vec();
    all.sort_by_key(|(at, ..)| *at);
    let near = |at: u64| u32::try_from(at - base).expect("near");
    let based = |encode: &dyn Fn(u64) -> u32| {
        let mut out: Vec<u8> = all.iter().flat_map(|(at, ..)| encode(*at).to_le_bytes()).collect();
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend(base.to_le_bytes());
        out
    };
    let mut out = Vec::new();
    if layout == Kallsyms::From5_10 {
        out = based(&|at| !near(at));
    }
    out.extend(u32::try_from(all.len()).expect("few").to_le_bytes());
    out.resize(out.len().next_multiple_of(align), 0);
    let (names_at, mut marks) = (out.len(), Vec::new());
    for (index, (_, kind, name)) in all.iter().enumerate() {
        if index.is_multiple_of(256) {
            marks.push(u32::try_from(out.len() - names_at).expect("small"));
        }
        out.push(u8::try_from(name.len() + 1).expect("short"));
        out.push(*kind);
        out.extend(name.bytes());
    }
    out.resize(out.len().next_multiple_of(align), 0);
    out.extend(marks.iter().flat_map(|mark| mark.to_le_bytes()));
    out.resize(out.len().next_multiple_of(align), 0);
    let (tokens_at, mut index) = (out.len(), Vec::new());
    for token in 0..=u8::MAX {
        index.extend(u16::try_from(out.len() - tokens_at).expect("small").to_le_bytes());
        out.extend([Some(token).filter(|token| *token != 0), Some(0)].into_iter().flatten());
    }
    out.resize(out.len().next_multiple_of(align), 0);
    out.extend(index);
    out.resize(out.len().next_multiple_of(align), 0);
    match layout {
        Kallsyms::From5_10 => {}
        Kallsyms::From6_4 { absolute_percpu: true } => out.extend(based(&|at| !near(at))),
        Kallsyms::From6_4 { absolute_percpu: false } => out.extend(based(&near)),
        Kallsyms::From7_0 => {
            for (at, ..) in &all {
                let place = linked + out.len() as u64;
                let distance = i32::try_from(at.cast_signed() - place.cast_signed()).expect("near");
                out.extend(distance.to_le_bytes());
            }
        }
    }
    out
}

/// A name that an image may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Name {
    Symbol(&'static str),
    /// Of a structure in the BTF.
    Member(&'static str, &'static str),
}

/// Stands for an alternative with a direct call, and for the table's newer layout.
pub(crate) const DIRECT_CALL: Name = Name::Symbol("a direct call");

/// Stands for all symbols of data and the BTF, which has no section here.
pub(crate) const ALL_DATA: Name = Name::Symbol("data");

/// Names that other kernels have instead of those of the miniature: of 6.1 with `PREEMPT_RT`.
pub(crate) const OLDER: [Name; 28] = [
    DIRECT_CALL,
    Name::Symbol("nop_func"),
    Name::Symbol("BUG_func"),
    Name::Symbol("text_poke_bp"),
    Name::Symbol("text_poke_queue"),
    Name::Symbol("pcpu_hot"),
    Name::Symbol("__x86_return_thunk"),
    Name::Member("module", "core_layout"),
    Name::Member("module_layout", "base"),
    Name::Member("module_layout", "text_size"),
    Name::Member("module_layout", "size"),
    Name::Member("module_layout", "mtn"),
    Name::Member("mutex", "rtmutex"),
    Name::Member("rt_mutex_base", "owner"),
    Name::Symbol("rt_spin_lock"),
    Name::Symbol("x64_sys_call"),
    Name::Symbol("pv_ops_lock"),
    Name::Symbol("__SCK__queued_spin_lock_slowpath"),
    Name::Symbol("__SCK__queued_spin_unlock"),
    Name::Member("task_struct", "state"),
    Name::Member("task_struct", "cpu"),
    Name::Symbol("__start_init_task"),
    Name::Symbol("__end_init_task"),
    Name::Member("orc_entry", "end"),
    Name::Symbol("__kretprobe_trampoline"),
    Name::Member("task_struct", "kretprobe_instances"),
    Name::Member("kretprobe_instance", "llist"),
    Name::Member("kretprobe_instance", "ret_addr"),
];
/// Those that the miniature has instead.
pub(crate) const NEWER: [Name; 30] = [
    Name::Symbol("rt_spin_lock"),
    Name::Symbol("pv_ops"),
    Name::Member("paravirt_patch_template", "lock"),
    Name::Member("pv_lock_ops", "queued_spin_lock_slowpath"),
    Name::Member("pv_lock_ops", "queued_spin_unlock"),
    Name::Symbol("syscall_exit_to_user_mode"),
    Name::Symbol("smp_text_poke_single"),
    Name::Symbol("smp_text_poke_batch_add"),
    DIRECT_CALL,
    Name::Symbol("nop_func"),
    Name::Symbol("BUG_func"),
    Name::Symbol("__preempt_count"),
    Name::Symbol("current_task"),
    Name::Symbol("x86_return_thunk"),
    Name::Symbol("srso_return_thunk"),
    Name::Member("module", "mem"),
    Name::Member("module_memory", "base"),
    Name::Member("module_memory", "size"),
    Name::Member("module_memory", "mtn"),
    Name::Member("mutex", "owner"),
    Name::Member("task_struct", "__state"),
    Name::Member("task_struct", "thread_info"),
    Name::Member("thread_info", "cpu"),
    Name::Symbol("__start_init_stack"),
    Name::Symbol("__end_init_stack"),
    Name::Member("orc_entry", "signal"),
    Name::Symbol("arch_rethook_trampoline"),
    Name::Member("task_struct", "rethooks"),
    Name::Member("rethook_node", "llist"),
    Name::Member("rethook_node", "ret_addr"),
];

fn fillers() -> Vec<String> {
    (0..FILLERS).map(|number| format!("f{number}")).collect()
}

/// The file, with made-up functions.
pub(crate) fn vmlinux() -> Vec<u8> {
    vmlinux_with(&fillers())
}

/// The file without some names.
pub(crate) fn vmlinux_without(left_out: &[Name]) -> Vec<u8> {
    build(&fillers(), Kallsyms::From5_10, left_out)
}

/// The file, with functions of these names besides its own.
pub(crate) fn vmlinux_with(names: &[String]) -> Vec<u8> {
    vmlinux_as(names, Kallsyms::From5_10)
}

/// The same with the kallsyms of some kernel.
pub(crate) fn vmlinux_as(names: &[String], layout: Kallsyms) -> Vec<u8> {
    build(names, layout, &OLDER)
}

/// Functions by which the kernel patches itself, and what else the profile looks for in text.
const FUNCTIONS: [&str; 45] = [
    "rt_spin_lock",
    "syscall_exit_to_user_mode",
    "x64_sys_call",
    "schedule",
    "entry_SYSCALL_64",
    "text_poke",
    "text_poke_bp",
    "text_poke_queue",
    "smp_text_poke_single",
    "smp_text_poke_batch_add",
    "static_key_enable",
    "arch_jump_label_transform",
    "arch_jump_label_transform_queue",
    "__static_call_update",
    "arch_static_call_transform",
    "ftrace_replace_code",
    "ftrace_make_call",
    "ftrace_make_nop",
    "register_kprobe",
    "kprobe_int3_handler",
    "arch_arm_kprobe",
    "arch_disarm_kprobe",
    "arch_optimize_kprobes",
    "arch_unoptimize_kprobe",
    "arch_unoptimize_kprobes",
    "__bpf_arch_text_poke",
    "do_jit",
    "alternatives_enable_smp",
    "__x86_return_thunk",
    "srso_return_thunk",
    "retbleed_untrain_ret",
    "klp_enable_patch",
    "module_bug_finalize",
    "nop_func",
    "BUG_func",
    "load_module",
    "_paravirt_nop",
    "__pv_queued_spin_lock_slowpath",
    "kvm_wait",
    "kvm_kick_cpu",
    "unwind_module_init",
    "ret_from_fork_asm",
    "return_to_handler",
    "arch_rethook_trampoline",
    "__kretprobe_trampoline",
];

fn build(names: &[String], layout: Kallsyms, left_out: &[Name]) -> Vec<u8> {
    let mut k = Builder { bytes: Vec::new(), symbols: Vec::new() };
    k.mark("_text", b'T');
    k.bytes.push(0xcc);
    // nop5, jmp +0, call, mov byte [rdi],0 and its padding, lock inc, ret.
    let function = k.put(
        "function",
        b'T',
        &[
            0x0f, 0x1f, 0x44, 0, 0, 0xe9, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0xc6, 0x07, 0, 0x0f, 0x1f, 0x40, 0,
            0xf0, 0xff, 0x00, 0xc3,
        ],
    );
    k.put("__SCT__call", b'T', &[0xe9, 0, 0, 0, 0, 0x0f, 0xb9, 0xcc]);
    // It leads back to the lock prefix.
    let cold = k.mark("function.cold", b't');
    k.bytes.push(0xe9);
    k.bytes.extend(near(cold + 5, function + 22));
    k.bytes.extend([0x90; 3]);
    for name in names {
        k.mark(name, b't');
        k.bytes.push(0xc3);
    }
    for name in FUNCTIONS {
        k.put(name, b'T', &[0x90, 0xc3]);
    }
    // Two instructions.
    k.put("pair", b'T', &[0x90, 0x90, 0xc3]);
    let native = k.put("native_unlock", b'T', &[0x90, 0xc3]);
    k.put("__raw_callee_save___pv_queued_spin_unlock", b'T', &[0x90, 0xc3]);
    k.put("__raw_callee_save___kvm_vcpu_is_preempted", b'T', &[0x90, 0xc3]);
    k.align();
    let unlocker = k.here();
    k.put("unlocker", b'T', &[&[0xe8][..], &near(unlocker + 5, native), &[0x66, 0x90, 0xc3]].concat());
    // call *[rip]; ret.
    let caller = k.put("caller", b'T', &[0xff, 0x15, 0, 0, 0, 0, 0xc3]);
    // inc dword gs:[count]; ret; and add dword gs:[count], 0x10000; ret.
    let (count, hot) = (BASE + COUNT, left_out.contains(&Name::Symbol("__preempt_count")));
    k.align();
    let spin = k.here();
    k.put("_raw_spin_lock", b'T', &[&[0x65, 0xff, 0x05][..], &near(spin + 7, count), &[0xc3]].concat());
    k.align();
    let irq = k.here();
    let adds = [&[0x65, 0x81, 0x05][..], &near(irq + 11, count), &0x1_0000_u32.to_le_bytes(), &[0xc3]];
    k.put("irq_enter_rcu", b'T', &adds.concat());
    // NOPs that are entered in the middle, and a function that branches and points there.
    let tail = k.put("tail", b'T', &[&[0x90; 7][..], &[0x0f, 0x1f, 0x44, 0, 0], &[0xc3]].concat());
    k.align();
    let shares = k.here();
    let lea = [&[0x48, 0x8d, 0x05][..], &near(shares + 12, tail + 3)].concat();
    k.put("shares", b'T', &[&[0xe9][..], &near(shares + 5, tail + 2), &lea, &[0xc3]].concat());
    let replacement = k.put("__alt_replacement", b't', &[0x0f, 0x01, 0xcb]);
    k.put("_etext", b'T', &[]);
    k.align();
    let jump = k.here();
    k.put("__alt_jump", b't', &[&[0xe9][..], &near(jump + 5, tail + 5)].concat());
    k.put("jump_table", b'd', &[(tail + 4).to_le_bytes(), tail.to_le_bytes()].concat());
    // The preempt count is at a fixed place.
    k.bytes.resize(usize::try_from(COUNT).expect("small"), 0);
    k.symbols.push((
        count - if hot { 8 } else { 0 },
        b'D',
        if hot { "pcpu_hot" } else { "__preempt_count" }.to_owned(),
    ));
    k.bytes.extend([0; 8]);
    for name in
        ["__per_cpu_start", "current_task", "idle_threads", "runqueues", "init_top_pgt", "x86_return_thunk"]
    {
        k.put(name, b'D', &[0; 16]);
    }
    for name in ["__per_cpu_offset", "preempt_dynamic_mode", "__init_begin", "__init_end"] {
        k.put(name, b'D', &[0; 16]);
    }
    k.put("pv_lock_hash", b'D', &[1; 8]);
    for name in ["__setup_start", "__setup_end", "jump_label_mutex", "static_call_mutex"] {
        k.put(name, b'D', &[0; 32]);
    }
    k.put("linux_banner", b'D', b"Linux version 6.1.0-miniature (x) #1 SMP PREEMPT_DYNAMIC\n\0");
    let name = k.put("feature_name", b'd', b"popcnt\0");
    let flags: Vec<u8> = (0..32_u64).flat_map(|i| (if i == 20 { name } else { 0 }).to_le_bytes()).collect();
    k.put("x86_cap_flags", b'D', &flags);
    k.put("x86_power_flags", b'D', &[0; 8]);
    let key = k.put("key", b'D', &[0; 16]);
    let call = k.put("__SCK__call", b'D', &[function.to_le_bytes(), [0; 8]].concat());
    k.put("modules", b'D', &[0; 16]);
    k.put("init_task", b'D', &[0; 192]);
    k.put("__cpu_possible_mask", b'D', &[3, 0, 0, 0, 0, 0, 0, 0]);
    // Only how far they are apart is of interest.
    for (start, end) in [("__start_init_stack", "__end_init_stack"), ("__start_init_task", "__end_init_task")]
    {
        k.symbols.extend(
            [start, end]
                .into_iter()
                .zip([0x10_0000, 0x10_4000])
                .map(|(name, at)| (BASE + at, b'D', name.to_owned())),
        );
    }
    k.put("text_mutex", b'D', &[0; 32]);
    k.put("kprobe_table", b'd', &[0; 512]);
    k.put("kprobe_insn_slots", b'd', &[0; 64]);
    k.put("kprobe_optinsn_slots", b'd', &[0; 64]);
    k.align();
    let livepatches = k.here().to_le_bytes();
    k.put("klp_ops", b'd', &[livepatches, livepatches].concat());
    k.put("page_offset_base", b'd', &[0; 8]);
    k.put("module_bug_list", b'd', &[0; 16]);
    k.put("mod_tree", b'd', &[0; 40]);
    k.put("module_mutex", b'd', &[0; 32]);
    k.put("boot_cpu_data", b'D', &[0; 256]);
    for name in ["pv_ops", "pv_ops_lock"] {
        k.put(name, b'D', &native.to_le_bytes().repeat(8));
    }
    for name in ["__SCK__queued_spin_lock_slowpath", "__SCK__queued_spin_unlock"] {
        k.put(name, b'D', &[native.to_le_bytes(), [0; 8]].concat());
    }
    k.table("__start___jump_table", "__stop___jump_table", move |at| {
        [&near(at, function)[..], &near(at + 4, function + 10), &far(at + 8, key | 3)].concat()
    });
    k.table("__start_static_call_sites", "__stop_static_call_sites", move |at| {
        [near(at, function + 10), near(at + 4, call)].concat()
    });
    let direct = !left_out.contains(&DIRECT_CALL);
    k.table("__alt_instructions", "__alt_instructions_end", move |at| {
        let entry = |at, code, by, feature: &[u8]| [&near(at, code)[..], &near(at + 4, by), feature].concat();
        if direct {
            let always = [117, 0, 2, 0, 6, 0];
            [
                entry(at, function + 15, replacement, &[20, 0, 0, 0, 7, 3]),
                entry(at + 14, tail + 7, jump, &[21, 0, 0, 0, 5, 5]),
                entry(at + 28, caller, replacement, &always),
            ]
            .concat()
        } else {
            let first = entry(at, function + 15, replacement, &[20, 0, 7, 3]);
            [first, entry(at + 12, tail + 7, jump, &[21, 0, 5, 5])].concat()
        }
    });
    k.table("__smp_locks", "__smp_locks_end", move |at| near(at, function + 22).to_vec());
    // Without the padding at its end, as in 5.10.
    k.table("__parainstructions", "__parainstructions_end", move |_| {
        [&unlocker.to_le_bytes()[..], &[3, 7]].concat()
    });
    k.table("__start_mcount_loc", "__stop_mcount_loc", move |_| function.to_le_bytes().to_vec());
    // A task begins at `ret_from_fork_asm`; every other function has an empty frame.
    let begin = k.symbols.iter().find(|(.., name)| name == "ret_from_fork_asm").map_or(BASE, |(at, ..)| *at);
    k.table("__start_orc_unwind_ip", "__stop_orc_unwind_ip", |at| {
        [near(at, BASE), near(at + 4, begin), near(at + 8, begin + 2), near(at + 12, begin + 3)].concat()
    });
    let [call, end] = if has_end(left_out) { [0, 4] } else { [2, 1] };
    k.table("__start_orc_unwind", "__stop_orc_unwind", |_| {
        let saved = [16, 0, 0xf0, 0xff, 0x15, call];
        [[8, 0, 0, 0, 5, call], [0, 0, 0, 0, 0, end], saved, [8, 0, 0, 0, 5, call]].concat()
    });
    k.table("__start___ex_table", "__stop___ex_table", move |at| {
        [&near(at, function)[..], &near(at + 4, function + 25), &[0; 4]].concat()
    });
    k.table("__start_notes", "__stop_notes", |_| {
        [&[4, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0][..], b"GNU\0", &[1, 2, 3, 4]].concat()
    });
    k.table("__start_BTF", "__stop_BTF", |_| btf(left_out));
    k.align();
    k.mark("_end", b'B');
    let linked = k.here();
    let is_left_out =
        |name: &str| left_out.iter().any(|one| matches!(one, Name::Symbol(left) if *left == name));
    let has_data = !left_out.contains(&ALL_DATA);
    k.symbols.retain(|(_, kind, name)| !is_left_out(name) && (has_data || matches!(kind, b't' | b'T')));
    k.bytes.extend(kallsyms(layout, linked, BASE, &k.symbols));
    elf(&[(BASE, k.bytes)])
}

/// The file, and where its BTF and its kallsyms are in it; made once.
static PARTS: LazyLock<(Vec<u8>, Range<usize>, Range<usize>)> = LazyLock::new(|| {
    let (file, btf) = (vmlinux(), btf(&OLDER));
    let start = file.windows(btf.len()).position(|bytes| bytes == btf).expect("its BTF");
    let btf = start..start + btf.len();
    let kallsyms = btf.end.next_multiple_of(8)..file.len();
    (file, btf, kallsyms)
});

/// Where the file's BTF is.
pub(crate) fn btf_in_file() -> Range<usize> {
    PARTS.1.clone()
}

/// Where the file's kallsyms is: behind its BTF.
pub(crate) fn kallsyms_in_file() -> Range<usize> {
    PARTS.2.clone()
}

/// The file with other bytes where a part of it begins, as far as there is room.
pub(crate) fn overwritten(part: Range<usize>, bytes: &[u8]) -> Vec<u8> {
    let mut file = PARTS.0.clone();
    let end = (part.start + bytes.len()).min(file.len());
    file[part.start..end].copy_from_slice(&bytes[..end - part.start]);
    file
}

/// A module's tables as the guest has them, each of less than 1 KiB but the jumps.
#[derive(Default)]
pub(crate) struct Sections {
    pub(crate) symbols: Vec<u8>,
    pub(crate) names: Vec<u8>,
    pub(crate) jump_entries: Vec<u8>,
    pub(crate) static_call_sites: Vec<u8>,
    pub(crate) exceptions: Vec<u8>,
}

/// Where its text is in the guest.
pub(crate) const MODULE_TEXT: u64 = 0x1000_0000;
/// Where the type letters of its symbols are.
const MODULE_KINDS: u64 = 0x4_1800;
/// Where its exception table is.
pub(crate) const MODULE_EXCEPTIONS: u64 = 0x4_2c00;

/// Guest memory of 16 KiB, which is at every multiple of that, behind the byte that stands for
/// a hole in it: the list of modules of the miniature has one, with these tables.
pub(crate) fn with_module(image: &KernelImage, sections: &Sections) -> Vec<u8> {
    const SIZE: usize = 0x4000;
    const MODULE: u64 = 0x4_0000;
    const KALLSYMS: u64 = 0x4_0200;
    const SYMBOLS: u64 = 0x4_1000;
    const NAMES: u64 = 0x4_1c00;
    const JUMPS: u64 = 0x4_2000;
    const CALLS: u64 = 0x4_2800;
    let mut memory = vec![0; SIZE];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).expect("64 bits") % SIZE;
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let head = image.symbols().only("modules").expect("the list").0;
    let offsets = image.offsets().module.expect("offsets");
    let symbols = (offsets.symbols.0 + KALLSYMS - MODULE, offsets.symbols.1 + KALLSYMS - MODULE);
    for (at, pointer) in [
        (head, MODULE + offsets.list),
        (MODULE + offsets.list, head),
        (MODULE + offsets.text.0, MODULE_TEXT),
        (MODULE + offsets.text.1, 0x1000),
        (MODULE + offsets.kallsyms, KALLSYMS),
        (KALLSYMS + offsets.symbols.2, NAMES),
        (KALLSYMS + offsets.symbols.3, MODULE_KINDS),
    ] {
        put(at, &pointer.to_le_bytes());
    }
    for ((pointer, count), at, table, entry) in [
        (symbols, SYMBOLS, &sections.symbols, 24),
        (offsets.jump_entries, JUMPS, &sections.jump_entries, 16),
        (offsets.static_call_sites, CALLS, &sections.static_call_sites, 8),
        (offsets.exceptions, MODULE_EXCEPTIONS, &sections.exceptions, 12),
    ] {
        put(MODULE + pointer, &at.to_le_bytes());
        put(MODULE + count, &u32::try_from(table.len() / entry).expect("few").to_le_bytes());
        put(at, table);
    }
    put(MODULE + offsets.name, b"module\0");
    put(MODULE_KINDS, &[b't'; 64]);
    put(NAMES, &sections.names);
    let hole = (1..=u8::MAX).find(|byte| !memory.contains(byte)).unwrap_or(u8::MAX);
    [vec![hole], memory].concat()
}

/// A bzImage of it, compressed with LZ4, every block as it is (lib/decompress_unlz4.c).
pub(crate) fn bzimage(vmlinux: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    let size = u32::try_from(vmlinux.len()).expect("small").to_le_bytes();
    // One sequence of literals only: a token, the rest of the length in bytes of 255.
    let mut block = vec![0xf0];
    let mut left = vmlinux.len() - 15;
    while left >= 255 {
        block.push(255);
        left -= 255;
    }
    block.push(u8::try_from(left).expect("less than 255"));
    block.extend(vmlinux);
    payload.extend(u32::try_from(block.len()).expect("small").to_le_bytes());
    payload.extend(block);
    payload.extend(size);
    bzimage_of(&payload)
}

/// A bzImage with this payload, of boot protocol 2.15 with a 64-bit entry (Linux
/// Documentation/arch/x86/boot.rst).
pub(crate) fn bzimage_of(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2 * 512];
    file[0x1f1] = 1;
    file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    (file[0x211], file[0x236]) = (1, 1);
    file[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).expect("small").to_le_bytes());
    file.extend(payload);
    file
}

/// Where the image is mapped (Linux `__START_KERNEL_map`): physical addresses are relative to it.
const MAP: u64 = 0xffff_ffff_8000_0000;

/// An ELF file with these segments, readable and executable, which is entered where the first begins.
pub(crate) fn elf(segments: &[(u64, Vec<u8>)]) -> Vec<u8> {
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [segments[0].0.wrapping_sub(MAP), HEADER as u64, 0] {
        file.extend(word.to_le_bytes());
    }
    let [low, high] = u16::try_from(segments.len()).expect("few").to_le_bytes();
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, low, high, 64, 0, 0, 0, 0, 0]);
    let mut offset = (HEADER + segments.len() * SEGMENT) as u64;
    for (at, bytes) in segments {
        let size = bytes.len() as u64;
        file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        for word in [offset, *at, at.wrapping_sub(MAP), size, size, 1] {
            file.extend(word.to_le_bytes());
        }
        offset += size;
    }
    file.extend(segments.iter().flat_map(|(_, bytes)| bytes));
    file
}
