//! Addresses that every plan needs, looked up once when the image is read.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::offsets::Offsets;
use crate::image::profile::{Capability, Fact};
use crate::image::symbols::Symbols;
use crate::image::tables::Tables;
use crate::insn;
use crate::insn::push::{self, Push, first_push};

/// Parts of the functions in the profile's declaration ([`Capability::PatchingLocks`]), where the compiler
/// made functions of their own of them.
const PARTS_OF_PATCHERS: [&str; 2] = ["__jump_label_patch", "__static_call_transform"];

/// Functions that every system call passes, never with a spinlock held and always with interrupts
/// enabled; the first that a kernel has. On the way out (Linux kernel/entry/common.c; inlined since
/// 6.16), or on the way in: called only by the entry code, `do_syscall_64`, before the system call itself
/// (arch/x86/entry/{common,syscall_64}.c).
const SYSTEM_CALL: [&str; 2] = ["syscall_exit_to_user_mode", "x64_sys_call"];
/// As the latter, for system calls of 32 bits, if the kernel has them.
const SYSTEM_CALL_32: &str = "ia32_sys_call";
/// The same on the way to another task (kernel/sched/core.c).
const SWITCH: &str = "schedule";

/// The functions that every module passes, with its `struct module` as their argument: when it is
/// complete and its init is about to run, and before its memory is freed (Linux kernel/module/main.c).
const MODULE_DOORS: [&str; 2] = ["do_init_module", "free_module"];

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
    /// The list of modules that have a table of bugs, and the word of the lock under which it is changed: zero means
    /// free.
    pub bugs: Option<(Gva, Gva)>,
    /// The tree of modules by the addresses of their code, and the word of the lock under which it is changed.
    pub module_tree: Option<(Gva, Gva)>,
    /// Where a vCPU can be stopped that is about to run a module's init, and one that is about to free a
    /// module; RDI is the address of its `struct module` there.
    pub module_doors: Option<[Push; 2]>,
}

impl Landmarks {
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols, tables: &Tables, offsets: &Offsets) -> Self {
        let place = |name: &str| place(vmlinux, tables, symbols.only(name)?);
        let lock = |name: &str| symbols.only(name)?.plus(usize::try_from(offsets.mutex_owner?).ok()?);
        Self {
            patchers: declared(patcher).chain(PARTS_OF_PATCHERS).filter_map(place).collect(),
            unlocked: unlocked(place).unwrap_or_default(),
            locks: declared(mutex).filter_map(lock).collect(),
            init: init(vmlinux, symbols),
            probes: symbols.only("kprobe_table"),
            livepatches: symbols.only("klp_ops"),
            bugs: symbols.only("module_bug_list").zip(lock("module_mutex")),
            module_tree: symbols.only("mod_tree").zip(lock("module_mutex")),
            module_doors: module_doors(vmlinux, symbols, tables),
        }
    }
}

/// The names in facts of one kind that the kernel's own patching is declared by.
fn declared(name: fn(Fact) -> Option<&'static str>) -> impl Iterator<Item = &'static str> {
    let facts = Capability::PatchingLocks.parts().iter().flat_map(|part| part.facts);
    facts.flat_map(|choices| choices.iter().copied().flatten()).filter_map(move |fact| name(*fact))
}

fn patcher(fact: Fact) -> Option<&'static str> {
    if let Fact::Patcher(name) = fact { Some(name) } else { None }
}

fn mutex(fact: Fact) -> Option<&'static str> {
    if let Fact::Lock(name) = fact { Some(name) } else { None }
}

/// Between the linker script's symbols, or else the sections in between (Linux
/// arch/x86/kernel/vmlinux.lds.S).
fn init(vmlinux: &Vmlinux<'_>, symbols: &Symbols) -> Option<Range<Gva>> {
    let marked = symbols.only("__init_begin").zip(symbols.only("__init_end"));
    marked.map(|(start, end)| start..end).or_else(|| vmlinux.sections_from_to(&[".init.text", ".exit.text"]))
}

fn module_doors(vmlinux: &Vmlinux<'_>, symbols: &Symbols, tables: &Tables) -> Option<[Push; 2]> {
    let door = |name: &str| {
        let from = place(vmlinux, tables, symbols.only(name)?)?;
        let push = first_push(vmlinux.bytes(from, push::REACH)?, from)?;
        (!tables.is_switched(push.at)).then_some(push)
    };
    let [comes, goes] = MODULE_DOORS.map(door);
    Some([comes?, goes?])
}

fn unlocked(place: impl Fn(&str) -> Option<Gva>) -> Option<Vec<Gva>> {
    let mut places = vec![SYSTEM_CALL.into_iter().find_map(&place)?, place(SWITCH)?];
    places.extend(place(SYSTEM_CALL_32));
    Some(places)
}

/// The first instruction of a function behind `endbr64`, which must stay whole, and behind the fentry
/// call. `None` if a static key's jump or a static call is there.
pub(super) fn place(vmlinux: &Vmlinux<'_>, tables: &Tables, entry: Gva) -> Option<Gva> {
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
