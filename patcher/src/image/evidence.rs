//! Looks up in an image what its profile relies on.

use crate::addr::Gva;
use crate::image::btf::Btf;
use crate::image::elf::Vmlinux;
use crate::image::landmarks::place;
use crate::image::lock_ops::LockOps;
use crate::image::preempt_count::{CountLayout, raised_by};
use crate::image::profile::{Fact, Table};
use crate::image::symbols::{Found, Symbols};
use crate::image::tables::Tables;

/// What takes a spinlock that sleeps.
const RT_SPIN_LOCK: &str = "rt_spin_lock";

/// What facts are looked up in.
pub(super) struct Evidence<'a> {
    pub(super) vmlinux: &'a Vmlinux<'a>,
    pub(super) symbols: &'a Symbols,
    pub(super) tables: &'a Tables,
    pub(super) btf: Option<&'a Btf<'a>>,
    pub(super) banner: Option<&'a str>,
    pub(super) lock_ops: Option<&'a LockOps>,
    /// Whether its ORC table decodes.
    pub(super) orc: bool,
    pub(super) count: Option<CountLayout>,
    pub(super) text_base: Gva,
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
            Fact::Table(table) => has_table(self.tables, table),
            Fact::Banner => self.banner.is_some(),
            Fact::FixedPreemption => self.banner.is_some_and(|banner| !banner.contains("PREEMPT_DYNAMIC")),
            Fact::PerCpuLinked => {
                only("__per_cpu_start").is_some_and(|start| start == Gva(0) || start >= self.text_base)
            }
            Fact::CountsInterrupts(_) => self.count.is_some(),
            Fact::CountsSpinlocks(name) => {
                raised_by(self.vmlinux, self.symbols, name).is_some_and(|raise| raise.by == Some(1))
            }
            Fact::SpinlocksSpin => self.symbols.find(RT_SPIN_LOCK) == Found::None,
            Fact::LockOps => self.lock_ops.is_some(),
            Fact::OrcDecodes => self.orc,
            Fact::NoTable(table) => !has_table(self.tables, table),
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
            Fact::SpinlocksSpin => {
                format!("most of its spinlocks are sleeping locks ({RT_SPIN_LOCK}, CONFIG_PREEMPT_RT)")
            }
            Fact::LockOps => "the operations of pv_ops could not be read".to_owned(),
            Fact::OrcDecodes => "its ORC table is not of a layout that is known".to_owned(),
            Fact::NoTable(table) => format!("the image has a table {}", table.name()),
            Fact::NoDirectCalls => "the image has alternatives with direct calls".to_owned(),
        }
    }
}

fn has_table(tables: &Tables, table: Table) -> bool {
    match table {
        Table::JumpEntries => tables.jump_entries.is_some(),
        Table::StaticCallSites => tables.static_call_sites.is_some(),
        Table::Alternatives => tables.alternatives.is_some(),
        Table::SmpLocks => tables.smp_locks.is_some(),
        Table::Paravirt => tables.paravirt_sites.is_some(),
        Table::Mcount => tables.mcount_locations.is_some(),
        Table::Exceptions => tables.exceptions.is_some(),
        Table::OrcIps => tables.orc_entries.is_some(),
    }
}
