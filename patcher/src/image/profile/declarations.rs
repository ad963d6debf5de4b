//! What each capability relies on.

use crate::image::profile::fact::Fact::{
    self, Banner, CountsInterrupts, CountsSpinlocks, FixedPreemption, Lock, Member, NoDirectCalls, NoTable,
    OrcDecodes, Patcher, PerCpuLinked, Section, Symbol, Table as Tabled, Without,
};
use crate::image::profile::fact::Table::{
    Alternatives, Exceptions, JumpEntries, Mcount, OrcIps, Paravirt, SmpLocks, StaticCallSites,
};

/// What can be done with a kernel, or must be known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capability {
    /// The kernel is found in a running guest.
    Location,
    /// Code that is freed after boot is told from other code.
    InitSections,
    /// A CPU's own data: whether it serves an interrupt, which task it runs.
    PerCpu,
    /// A task that holds a spinlock has a preempt count.
    PreemptCount,
    /// Whether tasks are preempted in kernel mode.
    PreemptModel,
    /// Which instructions may fault, and where execution goes on then.
    ExceptionTable,
    /// How the kernel's own patching is kept away.
    PatchingLocks,
    /// The function tracer's sites.
    FunctionTracer,
    /// Static keys.
    StaticKeys,
    /// Static calls.
    StaticCalls,
    /// The thunk that returns jump to.
    ReturnThunks,
    /// Which CPU features the kernel sees.
    CpuFeatures,
    /// Code that is chosen by CPU features.
    Alternatives,
    /// Lock prefixes.
    LockPrefixes,
    /// Paravirtual spinlocks.
    Spinlocks,
    /// Loaded modules.
    Modules,
    /// Kprobes that the guest has registered.
    Kprobes,
    /// Functions that the guest's own livepatches replace.
    Livepatches,
    /// The names of tasks, for events.
    TaskNames,
    /// All tasks, and where their stacks are.
    Tasks,
    /// Where the frames of a stack end.
    Orc,
    /// Whether a task stands in a function: what its stack does not tell.
    StackCheck,
    /// Where the kernel looks for what a place in a module's code warns of.
    BugTables,
    /// Where the kernel looks up what an address in a module's code is: the fixups of its faults, its stack frames, its names.
    ModuleTree,
    /// Where the kernel maps all memory, which tells whether pages can be kept from being executed.
    DirectMapping,
    /// The place where a guest that is about to start init can be made to wait.
    InitGate,
}

/// A part of what a capability relies on. Of each of `facts` one choice must be found as a whole: kernels
/// differ in names. If the part has signs (`shown_by`), it counts only where one of them is found:
/// otherwise the kernel does not have what it is about. A capability none of whose parts counts is absent.
#[derive(Debug)]
pub struct Part {
    /// What shows that the kernel has it.
    pub shown_by: &'static [Fact],
    /// What must be found.
    pub facts: &'static [&'static [&'static [Fact]]],
}

/// A part that counts for every kernel.
const fn always(facts: &'static [&'static [&'static [Fact]]]) -> Part {
    Part { shown_by: &[], facts }
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::Location,
        Self::InitSections,
        Self::PerCpu,
        Self::PreemptCount,
        Self::PreemptModel,
        Self::ExceptionTable,
        Self::PatchingLocks,
        Self::FunctionTracer,
        Self::StaticKeys,
        Self::StaticCalls,
        Self::ReturnThunks,
        Self::CpuFeatures,
        Self::Alternatives,
        Self::LockPrefixes,
        Self::Spinlocks,
        Self::Modules,
        Self::Kprobes,
        Self::Livepatches,
        Self::TaskNames,
        Self::Tasks,
        Self::Orc,
        Self::StackCheck,
        Self::BugTables,
        Self::ModuleTree,
        Self::DirectMapping,
        Self::InitGate,
    ];

    /// Its name in refusals and in `vmm kernel info`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Location => "location",
            Self::InitSections => "init_sections",
            Self::PerCpu => "per_cpu",
            Self::PreemptCount => "preempt_count",
            Self::PreemptModel => "preempt_model",
            Self::ExceptionTable => "exception_table",
            Self::PatchingLocks => "patching_locks",
            Self::FunctionTracer => "function_tracer",
            Self::StaticKeys => "static_keys",
            Self::StaticCalls => "static_calls",
            Self::ReturnThunks => "return_thunks",
            Self::CpuFeatures => "cpu_features",
            Self::Alternatives => "alternatives",
            Self::LockPrefixes => "lock_prefixes",
            Self::Spinlocks => "spinlocks",
            Self::Modules => "modules",
            Self::Kprobes => "kprobes",
            Self::Livepatches => "livepatches",
            Self::TaskNames => "task_names",
            Self::Tasks => "tasks",
            Self::Orc => "orc",
            Self::StackCheck => "stack_check",
            Self::BugTables => "bug_tables",
            Self::ModuleTree => "module_tree",
            Self::DirectMapping => "direct_mapping",
            Self::InitGate => "init_gate",
        }
    }

    /// What a kernel has none of if it is absent.
    pub(super) const fn what(self) -> &'static str {
        match self {
            Self::PatchingLocks => "code that patches text",
            Self::FunctionTracer => "function tracer",
            Self::StaticKeys => "static keys",
            Self::StaticCalls => "static calls",
            Self::ReturnThunks => "return thunks",
            Self::LockPrefixes => "list of its lock prefixes",
            Self::Spinlocks => "paravirtual spinlocks",
            Self::Modules => "modules",
            Self::Kprobes => "kprobes",
            Self::Livepatches => "livepatches",
            Self::Orc => "ORC table",
            Self::BugTables => "modules with tables of bugs",
            Self::ModuleTree => "tree of modules by their addresses",
            other => other.name(),
        }
    }

    /// What it relies on.
    #[must_use]
    pub const fn parts(self) -> &'static [Part] {
        match self {
            Self::Location => LOCATION,
            Self::InitSections => INIT_SECTIONS,
            Self::PerCpu => PER_CPU,
            Self::PreemptCount => PREEMPT_COUNT,
            Self::PreemptModel => PREEMPT_MODEL,
            Self::ExceptionTable => EXCEPTION_TABLE,
            Self::PatchingLocks => PATCHING_LOCKS,
            Self::FunctionTracer => FUNCTION_TRACER,
            Self::StaticKeys => STATIC_KEYS,
            Self::StaticCalls => STATIC_CALLS,
            Self::ReturnThunks => RETURN_THUNKS,
            Self::CpuFeatures => CPU_FEATURES,
            Self::Alternatives => ALTERNATIVES,
            Self::LockPrefixes => LOCK_PREFIXES,
            Self::Spinlocks => SPINLOCKS,
            Self::Modules => MODULES,
            Self::Kprobes => KPROBES,
            Self::Livepatches => LIVEPATCHES,
            Self::TaskNames => TASK_NAMES,
            Self::Tasks => TASKS,
            Self::Orc => ORC,
            Self::StackCheck => STACK_CHECK,
            Self::BugTables => BUG_TABLES,
            Self::ModuleTree => MODULE_TREE,
            Self::DirectMapping => DIRECT_MAPPING,
            Self::InitGate => INIT_GATE,
        }
    }
}

/// What shows that a kernel has static keys.
const SIGNS_OF_JUMP_LABELS: &[Fact] = &[
    Tabled(JumpEntries),
    Symbol("static_key_enable"),
    Symbol("arch_jump_label_transform"),
    Symbol("arch_jump_label_transform_queue"),
    Lock("jump_label_mutex"),
];
/// What shows that a kernel has static calls.
const SIGNS_OF_CALLS: &[Fact] = &[
    Tabled(StaticCallSites),
    Symbol("__static_call_update"),
    Symbol("arch_static_call_transform"),
    Lock("static_call_mutex"),
];
/// What shows that a kernel has the function tracer.
const SIGNS_OF_TRACER: &[Fact] =
    &[Tabled(Mcount), Symbol("ftrace_replace_code"), Symbol("ftrace_make_call"), Symbol("ftrace_make_nop")];
/// What shows that a kernel has ORC.
const SIGNS_OF_ORC: &[Fact] = &[Tabled(OrcIps), Symbol("__start_orc_unwind"), Symbol("__stop_orc_unwind")];
/// What shows that a kernel has kprobes.
const SIGNS_OF_PROBES: &[Fact] = &[
    Symbol("kprobe_table"),
    Symbol("register_kprobe"),
    Symbol("kprobe_int3_handler"),
    Symbol("arch_arm_kprobe"),
    Symbol("arch_disarm_kprobe"),
];

/// arch/x86/entry/entry_64.S; arch/x86/kernel/head_64.S, in `.data`; init/version-timestamp.c.
const LOCATION: &[Part] = &[always(&[
    &[&[Symbol("entry_SYSCALL_64")]],
    &[&[Symbol("init_top_pgt")], &[Section(".data")]],
    &[&[Banner]],
])];

/// include/asm-generic/vmlinux.lds.h.
const INIT_SECTIONS: &[Part] =
    &[always(&[&[&[Symbol("__init_begin"), Symbol("__init_end")], &[Section(".init.text")]]])];

/// arch/x86/kernel/setup_percpu.c, arch/x86/kernel/cpu/common.c, kernel/smpboot.c, kernel/softirq.c.
/// `pcpu_hot` has the task and the count from 6.2 to 6.14.
const PER_CPU: &[Part] = &[always(&[
    &[&[Symbol("__per_cpu_start"), PerCpuLinked]],
    &[&[Symbol("__per_cpu_offset")]],
    &[&[Symbol("pcpu_hot")], &[Symbol("__preempt_count"), Symbol("current_task")]],
    &[&[Symbol("idle_threads")]],
    &[&[CountsInterrupts("irq_enter_rcu")]],
])];

/// kernel/locking/spinlock.c.
const PREEMPT_COUNT: &[Part] = &[always(&[
    &[&[Symbol("pcpu_hot")], &[Symbol("__preempt_count")]],
    &[&[CountsSpinlocks("_raw_spin_lock")]],
])];

/// The banner names the model (scripts/mkcompile_h, init/Makefile: `UTS_VERSION`); with
/// `PREEMPT_DYNAMIC` it is chosen at boot (kernel/sched/core.c).
const PREEMPT_MODEL: &[Part] =
    &[always(&[&[&[Banner, FixedPreemption], &[Banner, Symbol("preempt_dynamic_mode")]]])];

const EXCEPTION_TABLE: &[Part] = &[always(&[&[&[Tabled(Exceptions)]]])];

/// Who compares and replaces text: arch/x86/kernel/{alternative,jump_label,static_call,ftrace}.c,
/// arch/x86/kernel/kprobes/{core,opt}.c, arch/x86/net/bpf_jit_comp.c. The locks: kernel/extable.c,
/// kernel/{jump_label,static_call_inline}.c. A patcher holds one of them from comparing to replacing; jump
/// labels and static calls release `text_mutex` in between.
const PATCHING_LOCKS: &[Part] = &[
    Part {
        shown_by: &[
            Lock("text_mutex"),
            Patcher("text_poke"),
            Patcher("text_poke_bp"),
            Patcher("smp_text_poke_single"),
            Symbol("register_kprobe"),
            Symbol("static_key_enable"),
            Symbol("__static_call_update"),
            Tabled(JumpEntries),
            Tabled(StaticCallSites),
            Tabled(Mcount),
        ],
        facts: &[
            &[&[Lock("text_mutex")]],
            // With PREEMPT_RT a mutex has an rtmutex (include/linux/mutex.h, since 5.15).
            &[&[Member("mutex", "owner")], &[Member("mutex", "rtmutex"), Member("rt_mutex_base", "owner")]],
            &[&[Patcher("text_poke")]],
            // Called so since 6.16.
            &[
                &[Patcher("text_poke_bp"), Patcher("text_poke_queue")],
                &[Patcher("smp_text_poke_single"), Patcher("smp_text_poke_batch_add")],
            ],
        ],
    },
    Part {
        shown_by: SIGNS_OF_JUMP_LABELS,
        facts: &[
            &[&[Lock("jump_label_mutex")]],
            &[&[Patcher("arch_jump_label_transform")]],
            &[&[Patcher("arch_jump_label_transform_queue")]],
        ],
    },
    Part {
        shown_by: SIGNS_OF_CALLS,
        facts: &[&[&[Lock("static_call_mutex")]], &[&[Patcher("arch_static_call_transform")]]],
    },
    Part {
        shown_by: SIGNS_OF_TRACER,
        facts: &[
            &[&[Patcher("ftrace_replace_code")]],
            &[&[Patcher("ftrace_make_call")]],
            &[&[Patcher("ftrace_make_nop")]],
        ],
    },
    Part {
        shown_by: SIGNS_OF_PROBES,
        facts: &[&[&[Patcher("arch_arm_kprobe")]], &[&[Patcher("arch_disarm_kprobe")]]],
    },
    // CONFIG_OPTPROBES.
    Part {
        shown_by: &[
            Symbol("arch_optimize_kprobes"),
            Symbol("arch_unoptimize_kprobe"),
            Symbol("arch_unoptimize_kprobes"),
        ],
        facts: &[
            &[&[Patcher("arch_optimize_kprobes")]],
            &[&[Patcher("arch_unoptimize_kprobe")]],
            &[&[Patcher("arch_unoptimize_kprobes")]],
        ],
    },
    // CONFIG_BPF_JIT.
    Part {
        shown_by: &[Symbol("__bpf_arch_text_poke"), Symbol("do_jit"), Symbol("emit_bpf_dispatcher")],
        facts: &[&[&[Patcher("__bpf_arch_text_poke")]]],
    },
    // When a second CPU appears (up to 7.2).
    Part {
        shown_by: &[Tabled(SmpLocks), Symbol("alternatives_enable_smp")],
        facts: &[&[&[Patcher("alternatives_enable_smp")]]],
    },
];

const FUNCTION_TRACER: &[Part] = &[Part { shown_by: SIGNS_OF_TRACER, facts: &[&[&[Tabled(Mcount)]]] }];

const STATIC_KEYS: &[Part] = &[Part { shown_by: SIGNS_OF_JUMP_LABELS, facts: &[&[&[Tabled(JumpEntries)]]] }];

const STATIC_CALLS: &[Part] = &[Part { shown_by: SIGNS_OF_CALLS, facts: &[&[&[Tabled(StaticCallSites)]]] }];

/// arch/x86/lib/retpoline.S (since 5.19). Which thunk is used is chosen at boot since there are several:
/// `x86_return_thunk` points to it (arch/x86/kernel/cpu/bugs.c, since 6.5).
const RETURN_THUNKS: &[Part] = &[Part {
    shown_by: &[
        Symbol("x86_return_thunk"),
        Symbol("__x86_return_thunk"),
        Symbol("zen_untrain_ret"),
        Symbol("retbleed_untrain_ret"),
        Section(".return_sites"),
    ],
    facts: &[&[
        &[Symbol("x86_return_thunk")],
        &[
            Symbol("__x86_return_thunk"),
            Without("srso_return_thunk"),
            Without("its_return_thunk"),
            Without("retbleed_return_thunk"),
        ],
    ]],
}];

/// arch/x86/include/asm/processor.h.
const CPU_FEATURES: &[Part] =
    &[always(&[&[&[Symbol("boot_cpu_data")]], &[&[Member("cpuinfo_x86", "x86_capability")]]])];

/// arch/x86/kernel/alternative.c. Direct calls of nothing (since 6.8).
const ALTERNATIVES: &[Part] = &[always(&[
    &[&[Tabled(Alternatives)]],
    &[&[Symbol("x86_cap_flags")]],
    &[&[Symbol("nop_func"), Symbol("BUG_func")], &[NoDirectCalls]],
])];

const LOCK_PREFIXES: &[Part] = &[Part {
    shown_by: &[Tabled(SmpLocks), Symbol("alternatives_enable_smp")],
    facts: &[&[&[Tabled(SmpLocks)]]],
}];

/// arch/x86/kernel/kvm.c, arch/x86/kernel/paravirt.c, kernel/locking/qspinlock_paravirt.h.
const SPINLOCKS: &[Part] = &[Part {
    shown_by: &[
        Symbol("pv_lock_hash"),
        Symbol("__pv_queued_spin_lock_slowpath"),
        Symbol("__raw_callee_save___pv_queued_spin_unlock"),
        Symbol("kvm_wait"),
        Symbol("kvm_kick_cpu"),
    ],
    facts: &[
        // Since 7.0 in a variable of their own, since 7.3 two of them are static calls.
        &[&[Symbol("pv_ops"), Member("paravirt_patch_template", "lock")], &[Symbol("pv_ops_lock")]],
        &[
            &[Member("pv_lock_ops", "queued_spin_lock_slowpath")],
            &[Symbol("__SCK__queued_spin_lock_slowpath")],
        ],
        &[&[Member("pv_lock_ops", "queued_spin_unlock")], &[Symbol("__SCK__queued_spin_unlock")]],
        &[&[Member("pv_lock_ops", "wait")]],
        &[&[Member("pv_lock_ops", "kick")]],
        &[&[Member("pv_lock_ops", "vcpu_is_preempted")]],
        &[&[Fact::SpinlocksSpin]],
        &[&[Fact::LockOps]],
        &[&[Symbol("__pv_queued_spin_lock_slowpath")]],
        &[&[Symbol("__raw_callee_save___pv_queued_spin_unlock")]],
        &[&[Symbol("kvm_wait")]],
        &[&[Symbol("kvm_kick_cpu")]],
        &[&[Symbol("__raw_callee_save___kvm_vcpu_is_preempted")]],
        // kernel/entry/common.c; inlined since 6.16. arch/x86/entry/{common,syscall_64}.c (since 6.8).
        &[&[Patcher("syscall_exit_to_user_mode")], &[Patcher("x64_sys_call")]],
        &[&[Patcher("schedule")]],
        &[&[Symbol("pv_lock_hash")]],
        // Up to 6.7 there is a table of calls through `pv_ops`, and calls of this are left out.
        &[&[Symbol("_paravirt_nop")], &[NoTable(Paravirt)]],
    ],
}];

/// kernel/module/main.c, include/linux/module.h. The text is in `mem` since 6.4.
const MODULES: &[Part] = &[Part {
    shown_by: &[
        Symbol("modules"),
        Symbol("load_module"),
        Symbol("do_init_module"),
        Symbol("free_module"),
        Symbol("module_mutex"),
    ],
    facts: &[
        &[&[Symbol("modules")]],
        &[&[Member("module", "list")]],
        &[&[Member("module", "name")]],
        &[&[Member("module", "state")]],
        &[&[Member("module", "kallsyms")]],
        &[&[Member("module", "jump_entries")]],
        &[&[Member("module", "num_jump_entries")]],
        &[&[Member("module", "static_call_sites")]],
        &[&[Member("module", "num_static_call_sites")]],
        &[&[Member("module", "extable")]],
        &[&[Member("module", "num_exentries")]],
        &[
            &[Member("module", "mem"), Member("module_memory", "base"), Member("module_memory", "size")],
            &[
                Member("module", "core_layout"),
                Member("module_layout", "base"),
                Member("module_layout", "text_size"),
            ],
        ],
        &[&[Member("mod_kallsyms", "symtab")]],
        &[&[Member("mod_kallsyms", "num_symtab")]],
        &[&[Member("mod_kallsyms", "strtab")]],
        &[&[Member("mod_kallsyms", "typetab")]],
    ],
}];

/// kernel/kprobes.c, include/linux/kprobes.h.
const KPROBES: &[Part] = &[Part {
    shown_by: SIGNS_OF_PROBES,
    facts: &[&[&[Symbol("kprobe_table")]], &[&[Member("kprobe", "hlist")]], &[&[Member("kprobe", "addr")]]],
}];

/// kernel/livepatch/{core,patch}.c, include/linux/livepatch.h.
const LIVEPATCHES: &[Part] = &[Part {
    shown_by: &[Symbol("klp_ops"), Symbol("klp_enable_patch"), Symbol("klp_patches")],
    facts: &[
        &[&[Symbol("klp_ops")]],
        &[&[Member("klp_ops", "node")]],
        &[&[Member("klp_ops", "func_stack")]],
        &[&[Member("klp_func", "stack_node")]],
        &[&[Member("klp_func", "old_func")]],
        &[&[Member("klp_func", "old_size")]],
    ],
}];

/// kernel/module/tree_lookup.c, kernel/module/kallsyms.c, arch/x86/include/asm/extable.h; `module_layout` up to 6.3.
const MODULE_TREE: &[Part] = &[Part {
    shown_by: &[Symbol("mod_tree"), Symbol("load_module")],
    facts: &[
        &[&[Symbol("mod_tree")]],
        &[&[Lock("module_mutex")]],
        &[&[Member("mod_tree_root", "root")]],
        &[&[Member("mod_tree_root", "addr_min")]],
        &[&[Member("mod_tree_root", "addr_max")]],
        &[&[Member("latch_tree_root", "seq")]],
        &[&[Member("latch_tree_root", "tree")]],
        &[&[Member("latch_tree_node", "node")]],
        &[&[Member("mod_tree_node", "mod")]],
        &[&[Member("mod_tree_node", "node")]],
        &[&[Member("rb_node", "__rb_parent_color")]],
        &[&[Member("rb_node", "rb_right")]],
        &[&[Member("rb_node", "rb_left")]],
        &[
            &[
                Member("module", "mem"),
                Member("module_memory", "base"),
                Member("module_memory", "size"),
                Member("module_memory", "mtn"),
            ],
            &[
                Member("module", "core_layout"),
                Member("module_layout", "base"),
                Member("module_layout", "size"),
                Member("module_layout", "text_size"),
                Member("module_layout", "mtn"),
            ],
        ],
        &[&[Member("module", "name")]],
        &[&[Member("module", "kallsyms")]],
        &[&[Member("module", "extable")]],
        &[&[Member("module", "num_exentries")]],
        &[&[Member("mod_kallsyms", "symtab")]],
        &[&[Member("mod_kallsyms", "num_symtab")]],
        &[&[Member("mod_kallsyms", "strtab")]],
        &[&[Member("mod_kallsyms", "typetab")]],
        &[&[Member("exception_table_entry", "insn")]],
        &[&[Member("exception_table_entry", "fixup")]],
        &[&[Member("exception_table_entry", "data")]],
    ],
}];

/// lib/bug.c, include/linux/module.h, include/asm-generic/bug.h.
const BUG_TABLES: &[Part] = &[Part {
    shown_by: &[Symbol("module_bug_list"), Symbol("module_bug_finalize")],
    facts: &[
        &[&[Symbol("module_bug_list")]],
        &[&[Lock("module_mutex")]],
        &[&[Member("module", "bug_list")]],
        &[&[Member("module", "bug_table")]],
        &[&[Member("module", "num_bugs")]],
        &[&[Member("bug_entry", "bug_addr_disp")]],
        &[&[Member("bug_entry", "file_disp")]],
        &[&[Member("bug_entry", "line")]],
        &[&[Member("bug_entry", "flags")]],
    ],
}];

/// arch/x86/include/asm/page_64.h.
const DIRECT_MAPPING: &[Part] = &[always(&[&[&[Symbol("page_offset_base")]]])];

/// include/linux/sched.h.
const TASK_NAMES: &[Part] = &[always(&[&[&[Member("task_struct", "comm")]]])];

/// What hides that a task stands in a function, and what tells that one moved. The names of what return probes
/// keep are those since 5.18 (include/linux/rethook.h), and those of 5.11 to 5.17 (include/linux/kprobes.h);
/// before, they were in a hash table.
const STACK_CHECK: &[Part] = &[always(&[
    &[&[Symbol("return_to_handler")]],
    &[&[Symbol("kprobe_insn_slots")]],
    &[&[Symbol("kprobe_optinsn_slots")]],
    &[&[Symbol("runqueues")]],
    &[&[Member("task_struct", "start_time")]],
    &[&[Member("task_struct", "on_rq")]],
    &[&[Member("task_struct", "ret_stack")]],
    &[&[Member("task_struct", "curr_ret_stack")]],
    &[&[Member("kprobe_insn_cache", "pages")]],
    &[&[Member("kprobe_insn_page", "list")]],
    &[&[Member("kprobe_insn_page", "insns")]],
    &[&[Member("rq", "nr_running")]],
    &[
        &[
            Symbol("arch_rethook_trampoline"),
            Member("task_struct", "rethooks"),
            Member("rethook_node", "llist"),
            Member("rethook_node", "ret_addr"),
        ],
        &[
            Symbol("__kretprobe_trampoline"),
            Member("task_struct", "kretprobe_instances"),
            Member("kretprobe_instance", "llist"),
            Member("kretprobe_instance", "ret_addr"),
        ],
    ],
])];

/// include/linux/sched.h, include/linux/sched/signal.h, kernel/smpboot.c, kernel/cpu.c; the boot CPU's first stack
/// (include/asm-generic/vmlinux.lds.h, named so since 6.9), which says how long a stack is.
const TASKS: &[Part] = &[always(&[
    &[&[Symbol("init_task")]],
    &[&[Symbol("__per_cpu_start"), PerCpuLinked]],
    &[&[Symbol("__per_cpu_offset")]],
    &[&[Symbol("__cpu_possible_mask")]],
    &[&[Symbol("idle_threads")]],
    &[
        &[Symbol("__start_init_stack"), Symbol("__end_init_stack")],
        &[Symbol("__start_init_task"), Symbol("__end_init_task")],
    ],
    &[&[Member("task_struct", "tasks")]],
    &[&[Member("task_struct", "thread_node")]],
    &[&[Member("task_struct", "signal")]],
    &[&[Member("signal_struct", "thread_head")]],
    &[&[Member("task_struct", "pid")]],
    &[&[Member("task_struct", "tgid")]],
    &[&[Member("task_struct", "comm")]],
    // Called so since 5.14.
    &[&[Member("task_struct", "__state")], &[Member("task_struct", "state")]],
    &[&[Member("task_struct", "exit_state")]],
    &[&[Member("task_struct", "flags")]],
    // There since 5.16.
    &[&[Member("task_struct", "thread_info"), Member("thread_info", "cpu")], &[Member("task_struct", "cpu")]],
    &[&[Member("task_struct", "on_cpu")]],
    &[&[Member("task_struct", "nvcsw")]],
    &[&[Member("task_struct", "nivcsw")]],
    &[&[Member("task_struct", "stack")]],
    &[&[Member("task_struct", "thread")]],
    &[&[Member("thread_struct", "sp")]],
])];

/// arch/x86/kernel/unwind_orc.c, arch/x86/include/asm/{orc_types,switch_to,module}.h. The end of a stack is a
/// type of its own since 6.4; what was interrupted is marked since 6.3.
const ORC: &[Part] = &[
    Part {
        shown_by: SIGNS_OF_ORC,
        facts: &[
            &[&[Tabled(OrcIps)]],
            &[&[Member("orc_entry", "sp_offset")]],
            &[&[Member("orc_entry", "bp_offset")]],
            &[&[Member("orc_entry", "sp_reg")]],
            &[&[Member("orc_entry", "bp_reg")]],
            &[&[Member("orc_entry", "type")]],
            &[&[Member("orc_entry", "end")], &[Member("orc_entry", "signal")]],
            &[&[Symbol("__start_orc_unwind"), OrcDecodes], &[Section(".orc_unwind"), OrcDecodes]],
            &[&[Symbol("__stop_orc_unwind")], &[Section(".orc_unwind")]],
            &[&[Member("inactive_task_frame", "bp")]],
            &[&[Member("inactive_task_frame", "ret_addr")]],
        ],
    },
    // With CONFIG_MODULES.
    Part {
        shown_by: &[Symbol("unwind_module_init")],
        facts: &[
            &[&[Member("module", "arch")]],
            &[&[Member("mod_arch_specific", "num_orcs")]],
            &[&[Member("mod_arch_specific", "orc_unwind_ip")]],
            &[&[Member("mod_arch_specific", "orc_unwind")]],
        ],
    },
];

/// init/main.c.
const INIT_GATE: &[Part] = &[always(&[&[&[Symbol("__setup_start")]], &[&[Symbol("__setup_end")]]])];
