//! A fact about an image: something that a capability relies on, and how it is found.

use crate::addr::Gva;
use crate::image::btf::Btf;
use crate::image::elf::Vmlinux;
use crate::image::landmarks::place;
use crate::image::lock_ops::LockOps;
use crate::image::preempt_count::{CountLayout, raised_by};
use crate::image::symbols::{Found, Symbols};
use crate::image::tables::Tables;

/// Something that an image has or has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// A symbol, once.
    Symbol(&'static str),
    /// The same of a kernel without that symbol: what it stands for came later.
    Without(&'static str),
    /// A function that compares or replaces text, with room for a blocker at its entry.
    Patcher(&'static str),
    /// A mutex that is held while text is compared and replaced.
    Lock(&'static str),
    /// A member of a structure, in the BTF.
    Member(&'static str, &'static str),
    /// A section of the ELF file.
    Section(&'static str),
    /// A table of the kernel's own patch sites.
    Table(Table),
    /// The version banner.
    Banner,
    /// A banner that names the preemption model, which no boot option changes.
    FixedPreemption,
    /// Per-CPU variables are linked in a way that is known ([`crate::linux::Kernel::per_cpu`]).
    PerCpuLinked,
    /// A function that counts interrupts in the preempt count, in a known layout.
    CountsInterrupts(&'static str),
    /// A function that raises the preempt count: taking a spinlock does.
    CountsSpinlocks(&'static str),
    /// The operations of `pv_ops` could be read.
    LockOps,
    /// A kernel without a table.
    NoTable(Table),
    /// A kernel without alternatives that replace a call through a pointer by a direct one.
    NoDirectCalls,
}

/// A table of [`Tables`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// `__jump_table`.
    JumpEntries,
    /// `.static_call_sites`.
    StaticCallSites,
    /// `.altinstructions`.
    Alternatives,
    /// `.smp_locks`.
    SmpLocks,
    /// `.parainstructions`.
    Paravirt,
    /// `__mcount_loc`.
    Mcount,
    /// `__ex_table`.
    Exceptions,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::JumpEntries => "__jump_table",
            Self::StaticCallSites => ".static_call_sites",
            Self::Alternatives => ".altinstructions",
            Self::SmpLocks => ".smp_locks",
            Self::Paravirt => ".parainstructions",
            Self::Mcount => "__mcount_loc",
            Self::Exceptions => "__ex_table",
        }
    }

    fn is_in(self, tables: &Tables) -> bool {
        match self {
            Self::JumpEntries => tables.jump_entries.is_some(),
            Self::StaticCallSites => tables.static_call_sites.is_some(),
            Self::Alternatives => tables.alternatives.is_some(),
            Self::SmpLocks => tables.smp_locks.is_some(),
            Self::Paravirt => tables.paravirt_sites.is_some(),
            Self::Mcount => tables.mcount_locations.is_some(),
            Self::Exceptions => tables.exceptions.is_some(),
        }
    }
}

/// What facts are looked up in.
pub(in crate::image) struct Evidence<'a> {
    pub(in crate::image) vmlinux: &'a Vmlinux<'a>,
    pub(in crate::image) symbols: &'a Symbols,
    pub(in crate::image) tables: &'a Tables,
    pub(in crate::image) btf: Option<&'a Btf<'a>>,
    pub(in crate::image) banner: Option<&'a str>,
    pub(in crate::image) lock_ops: Option<&'a LockOps>,
    pub(in crate::image) count: Option<CountLayout>,
    pub(in crate::image) text_base: Gva,
}

impl Evidence<'_> {
    pub(super) fn has(&self, fact: Fact) -> bool {
        let only = |name| self.symbols.only(name);
        match fact {
            Fact::Symbol(name) | Fact::Lock(name) => only(name).is_some(),
            Fact::Without(name) => self.symbols.find(name) == Found::None,
            Fact::Patcher(name) => {
                only(name).and_then(|entry| place(self.vmlinux, self.tables, entry)).is_some()
            }
            Fact::Member(name, member) => self.btf.is_some_and(|btf| btf.offset(name, member).is_some()),
            Fact::Section(name) => self.vmlinux.section(name).is_some(),
            Fact::Table(table) => table.is_in(self.tables),
            Fact::Banner => self.banner.is_some(),
            Fact::FixedPreemption => self.banner.is_some_and(|banner| !banner.contains("PREEMPT_DYNAMIC")),
            Fact::PerCpuLinked => {
                only("__per_cpu_start").is_some_and(|start| start == Gva(0) || start >= self.text_base)
            }
            Fact::CountsInterrupts(_) => self.count.is_some(),
            Fact::CountsSpinlocks(name) => {
                raised_by(self.vmlinux, self.symbols, name).is_some_and(|raise| raise.by == Some(1))
            }
            Fact::LockOps => self.lock_ops.is_some(),
            Fact::NoTable(table) => !table.is_in(self.tables),
            Fact::NoDirectCalls => !self.tables.alternatives.iter().flatten().any(|entry| entry.direct_call),
        }
    }

    /// Why a fact is missing.
    pub(super) fn why_not(&self, fact: Fact) -> String {
        let symbol = |name: &str| match self.symbols.find(name) {
            Found::None => format!("the image has no symbol {name}"),
            Found::One(_) => format!("{name} is not as expected"),
            Found::Several(_) => format!("several symbols of the image are named {name}"),
        };
        match fact {
            Fact::Symbol(name) | Fact::Lock(name) => symbol(name),
            Fact::Without(name) => format!("the image has {name}"),
            Fact::Patcher(name) if self.symbols.only(name).is_some() => {
                format!("a static key or a static call switches the first instruction of {name}")
            }
            Fact::Patcher(name) => symbol(name),
            Fact::Member(name, member) if self.btf.is_some() => {
                format!("the image's BTF has no member {member} of struct {name}")
            }
            Fact::Member(name, member) => {
                format!("the image has no BTF that describes the member {member} of struct {name}")
            }
            Fact::Section(name) => format!("the image has no section {name}"),
            Fact::Table(table) => format!("the image's table {} was not found", table.name()),
            Fact::Banner => "the image has no version banner".to_owned(),
            Fact::FixedPreemption => "the preemption model is chosen at boot".to_owned(),
            Fact::PerCpuLinked => "its per-CPU data is linked in a way that is not known".to_owned(),
            Fact::CountsInterrupts(name) if self.symbols.only(name).is_some() => {
                format!("{name} does not count interrupts in a way that is known")
            }
            Fact::CountsSpinlocks(name) if self.symbols.only(name).is_some() => {
                format!("{name} does not raise the preempt count (CONFIG_PREEMPT_COUNT is not set)")
            }
            Fact::CountsInterrupts(name) | Fact::CountsSpinlocks(name) => symbol(name),
            Fact::LockOps => "the operations of pv_ops could not be read".to_owned(),
            Fact::NoTable(table) => format!("the image has a table {}", table.name()),
            Fact::NoDirectCalls => "the image has alternatives with direct calls".to_owned(),
        }
    }
}
