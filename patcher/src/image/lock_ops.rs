//! The paravirtual operations of spinlocks (Linux `struct pv_lock_ops`): their pointers, and their
//! targets on bare metal. They are a member of `pv_ops` (arch/x86/include/asm/paravirt_types.h), or a
//! variable of their own, `pv_ops_lock` (since 7.0). Some are static calls instead (since 7.3), whose
//! key holds the pointer.

use crate::addr::Gva;
use crate::image::btf::Btf;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;
use crate::image::tables::CALL_KEY;

/// The operations, in the order of [`LockOps::native`].
pub const OPERATIONS: [&str; 5] =
    ["queued_spin_lock_slowpath", "queued_spin_unlock", "wait", "kick", "vcpu_is_preempted"];
/// `queued_spin_unlock`.
pub(crate) const UNLOCK: usize = 1;
/// `vcpu_is_preempted`.
pub(crate) const IS_PREEMPTED: usize = 4;

/// Link-time addresses of the operations.
#[derive(Debug, Clone)]
pub struct LockOps {
    /// `pv_ops`, or `pv_ops_lock`.
    pub table: Gva,
    /// Which operations are static calls of the same name.
    pub static_calls: [bool; OPERATIONS.len()],
    /// The operations' pointers.
    pub pointers: [Gva; OPERATIONS.len()],
    /// Their targets in the image: those for bare metal.
    pub native: [Gva; OPERATIONS.len()],
}

impl LockOps {
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols, btf: &Btf<'_>) -> Option<Self> {
        let (table, lock) = match symbols.only("pv_ops_lock") {
            Some(table) => (table, 0),
            None => (symbols.only("pv_ops")?, btf.offset("paravirt_patch_template", "lock")?.into()),
        };
        let (mut pointers, mut native) = ([Gva(0); OPERATIONS.len()], [Gva(0); OPERATIONS.len()]);
        let mut static_calls = [false; OPERATIONS.len()];
        for (index, name) in OPERATIONS.into_iter().enumerate() {
            let member = btf.offset("pv_lock_ops", name).map(u64::from);
            static_calls[index] = member.is_none();
            let at = match member {
                Some(member) => Gva(table.0.wrapping_add(lock + member)),
                None => symbols.only(&format!("{CALL_KEY}{name}"))?,
            };
            pointers[index] = at;
            native[index] = Gva(u64::from_le_bytes(vmlinux.bytes(at, 8)?.try_into().ok()?));
        }
        Some(Self { table, static_calls, pointers, native })
    }
}
