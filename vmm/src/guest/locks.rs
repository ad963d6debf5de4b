//! The locks under which the guest's kernel patches itself (`text_mutex` and its like): each is a
//! word that is zero while the lock is free.

use patcher::addr::Gva;
use patcher::linux::memory::read_u64;

use crate::guest::kernel::GuestKernel;

/// Whether these locks of the guest's are free.
pub(crate) fn are_free(kernel: &GuestKernel, locks: &[Gva]) -> bool {
    locks.iter().all(|lock| read_u64(kernel, *lock) == Ok(0))
}
