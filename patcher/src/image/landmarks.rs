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

/// Functions that are never called with a spinlock held: on the way out of a system call, and
/// on the way to another task (Linux kernel/entry/common.c, kernel/sched/core.c).
const UNLOCKED: [&str; 2] = ["syscall_exit_to_user_mode", "schedule"];

/// The functions that every module passes, with its `struct module` as their argument: when it is
/// complete and its init is about to run, and before its memory is freed (Linux kernel/module/main.c).
const MODULE_DOORS: [&str; 2] = ["do_init_module", "free_module"];

/// Link-time addresses. What a kernel does not have is left out.
#[derive(Debug, Default)]
pub struct Landmarks {
    /// Where a vCPU can be stopped before it compares or replaces text.
    pub patchers: Vec<Gva>,
    /// Where a vCPU can be stopped without holding a spinlock.
    pub unlocked: Vec<Gva>,
    /// The words of the locks under which text is patched. Zero means free.
    pub locks: Vec<Gva>,
    /// Init memory, which is freed once the kernel is up.
    pub init: Option<Range<Gva>>,
    /// The table of kprobes.
    pub probes: Option<Gva>,
    /// The list of functions that livepatches replace.
    pub livepatches: Option<Gva>,
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
            unlocked: UNLOCKED.into_iter().filter_map(place).collect(),
            locks: declared(mutex).filter_map(lock).collect(),
            init: init(vmlinux, symbols),
            probes: symbols.only("kprobe_table"),
            livepatches: symbols.only("klp_ops"),
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

/// The first instruction of a function behind `endbr64`, which must stay whole, and behind the fentry
/// call. `None` if a static key's jump or a static call is there.
pub(super) fn place(vmlinux: &Vmlinux<'_>, tables: &Tables, entry: Gva) -> Option<Gva> {
    let mut at = entry.plus(insn::marker(vmlinux.bytes(entry, insn::MARKER)?))?;
    if tables.is_fentry(at) {
        at = at.plus(insn::FENTRY)?;
    }
    (!tables.is_switched(at)).then_some(at)
}
