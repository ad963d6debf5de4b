//! A fact about an image: something that a capability relies on, and how it is found.

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
    /// Spinlocks spin. With `PREEMPT_RT` most sleep, and `rt_spin_lock` takes them (kernel/locking/spinlock_rt.c, since
    /// 5.15; before, in the patches for it, rtmutex.c).
    SpinlocksSpin,
    /// The operations of `pv_ops` could be read.
    LockOps,
    /// Every entry of the ORC table makes sense.
    OrcDecodes,
    /// A kernel without a table.
    NoTable(Table),
    /// A kernel without alternatives that replace a call through a pointer by a direct one.
    NoDirectCalls,
}

/// A table of [`Tables`](crate::image::tables::Tables).
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
    /// `.orc_unwind_ip`.
    OrcIps,
}

impl Table {
    /// Its section's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::JumpEntries => "__jump_table",
            Self::StaticCallSites => ".static_call_sites",
            Self::Alternatives => ".altinstructions",
            Self::SmpLocks => ".smp_locks",
            Self::Paravirt => ".parainstructions",
            Self::Mcount => "__mcount_loc",
            Self::Exceptions => "__ex_table",
            Self::OrcIps => ".orc_unwind_ip",
        }
    }
}
