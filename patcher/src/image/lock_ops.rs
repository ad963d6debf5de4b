//! The paravirtual operations of spinlocks (Linux arch/x86/include/asm/paravirt_types.h,
//! `struct pv_lock_ops`): their pointers, and their targets on bare metal.

use crate::addr::Gva;
use crate::image::btf::Btf;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;

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
    /// `pv_ops`.
    pub table: Gva,
    /// The operations' pointers.
    pub pointers: [Gva; OPERATIONS.len()],
    /// Their targets in the image: those for bare metal.
    pub native: [Gva; OPERATIONS.len()],
}

impl LockOps {
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols, btf: &Btf<'_>) -> Option<Self> {
        let table = symbols.only("pv_ops")?;
        let lock = u64::from(btf.offset("paravirt_patch_template", "lock")?);
        let (mut pointers, mut native) = ([Gva(0); OPERATIONS.len()], [Gva(0); OPERATIONS.len()]);
        for (index, name) in OPERATIONS.into_iter().enumerate() {
            let at = Gva(table.0.wrapping_add(lock + u64::from(btf.offset("pv_lock_ops", name)?)));
            pointers[index] = at;
            native[index] = Gva(u64::from_le_bytes(vmlinux.bytes(at, 8)?.try_into().ok()?));
        }
        Some(Self { table, pointers, native })
    }
}
