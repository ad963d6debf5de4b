//! What the sections of a kernel's objects are for, by their names (include/asm-generic/vmlinux.lds.h,
//! arch/x86/kernel/vmlinux.lds.S).

/// The table of alternatives by CPU feature.
pub(super) const ALTERNATIVES: &str = ".altinstructions";
/// The code that an alternative may put in another's place.
pub(super) const REPLACEMENTS: &str = ".altinstr_replacement";

/// The table of static branches.
pub(super) const JUMPS: &str = "__jump_table";
/// The table of where code goes on behind a fault.
pub(super) const FAULTS: &str = "__ex_table";
/// The table of what the kernel says where code warns or stops it.
pub(super) const BUGS: &str = "__bug_table";

/// The tables of where stack frames end, by address: the addresses, and what belongs to them.
pub(super) const FRAME_ADDRESSES: &str = ".orc_unwind_ip";
/// What belongs to them.
pub(super) const FRAMES: &str = ".orc_unwind";

/// What a section is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Code or data that stays while the kernel runs.
    Resident,
    /// Code or data that is only used while the kernel starts.
    Init,
    /// Not in the kernel's memory.
    Discarded,
    /// Data that each CPU has.
    PerCpu,
    /// A table whose entries say more of a place in code than its bytes do, with so many fields each that refer to
    /// something, the place first.
    Table(usize),
    /// A table that follows from the code, and code that a table refers to.
    Derived,
    /// Symbols for modules.
    Export,
    Unknown,
}

/// The compiler's table of the room before each function (`-fpatchable-function-entry`), which x86 finds without it
/// (`HAVE_DYNAMIC_FTRACE_NO_PATCHABLE`).
const PATCHABLE: &str = "__patchable_function_entries";

/// Whether a section is a table of places where the kernel writes a constant into its code while it starts (from 6.12
/// on, arch/x86/include/asm/runtime-const.h). Until then other constants are there.
pub(super) fn is_runtime_constant(name: &str) -> bool {
    name.starts_with("runtime_ptr_") || name.starts_with("runtime_shift_")
}

/// What a section is for. `-ffunction-sections` and `-fdata-sections` add a name to its name.
pub(super) fn purpose(name: &str) -> Purpose {
    let is = |known: &&str| {
        let rest = name.strip_prefix(*known);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let any = |names: &[&str]| names.iter().any(is);
    if any(&[".init", ".initcall", ".ref", ".meminit", ".cpuinit"]) || name.starts_with(".initcall") {
        Purpose::Init
    } else if any(&[".exit", ".exitcall", ".discard", ".modinfo", ".comment", ".note"]) || name == PATCHABLE {
        Purpose::Discarded
    } else if is_runtime_constant(name) {
        Purpose::Table(1)
    } else if name.starts_with(".data..percpu") {
        Purpose::PerCpu
    } else if any(&[
        ".text", ".noinstr", ".sched", ".cpuidle", ".entry", ".kprobes", ".rodata", ".data", ".bss",
    ]) {
        Purpose::Resident
    } else if name.starts_with("___ksymtab") || name.starts_with("__ksymtab") || name == ".export_symbol" {
        Purpose::Export
    } else {
        match name {
            JUMPS => Purpose::Table(3),
            BUGS | FAULTS | ALTERNATIVES | ".static_call_sites" => Purpose::Table(2),
            ".parainstructions" => Purpose::Table(1),
            REPLACEMENTS
            | ".altinstr_aux"
            | ".smp_locks"
            | ".retpoline_sites"
            | ".return_sites"
            | ".call_sites"
            | ".ibt_endbr_seal"
            | "__mcount_loc"
            | FRAMES
            | FRAME_ADDRESSES
            | ".orc_header"
            | ".static_call_tramp_key" => Purpose::Derived,
            _ => Purpose::Unknown,
        }
    }
}
