//! Lists of `struct list_head` that the guest changes while they are read (Linux include/linux/list.h,
//! include/linux/rculist.h).
//!
//! A member that was taken out still points on, but nothing points back to it. So a step counts only if
//! the next member points back, before it is read and after. Where it does not, the reader goes back a member
//! and tries again: in the end it stands on one that is still in the list, at the latest on the head. A list that
//! leads into itself anywhere but at its head has a member to which two lead and that points back to one.

use std::cell::Cell;

use crate::addr::Gva;
use crate::linux::memory::{GuestMemory, read_u64};
use crate::plan::refusal::Refusal;

/// Why a list is not read to its end.
const NOT_LINKED: &str = "their lists are inconsistent, or change faster than they are read";

/// How often a reader may try again.
pub(super) struct Retries(Cell<u32>);

impl Default for Retries {
    /// For all lists together.
    fn default() -> Self {
        Self(Cell::new(4096))
    }
}

impl Retries {
    /// For a list that may be gone.
    pub(super) fn few() -> Self {
        Self(Cell::new(4))
    }

    fn again(&self) -> Result<(), Refusal> {
        let left = self.0.get().checked_sub(1).ok_or(Refusal::BadTasks { why: NOT_LINKED })?;
        self.0.set(left);
        Ok(())
    }
}

/// Whether an address can be one of a structure of the kernel's: in the upper half of the address space, with four
/// levels of page tables or five, and aligned.
pub(super) fn is_pointer(at: Gva) -> bool {
    at.0 >> 56 == 0xff && at.0.is_multiple_of(8)
}

/// How lists are read.
#[derive(Clone, Copy)]
pub(super) struct LinkedList<'a> {
    pub(super) memory: &'a dyn GuestMemory,
    pub(super) retries: &'a Retries,
    /// Most members.
    pub(super) most: usize,
    /// Most members of all lists together.
    pub(super) limit: usize,
}

impl LinkedList<'_> {
    /// More than the most.
    pub(super) fn too_many(&self) -> Refusal {
        Refusal::TooManyTasks { limit: self.limit, what: "tasks in the guest" }
    }

    /// What `read` makes of each member of the list from `head`. It is given where the member's `struct
    /// list_head` is, and returns `None` if that is no member any more.
    ///
    /// # Errors
    /// [`Refusal::BadTasks`], and what `read` returned.
    pub(super) fn members<T>(
        &self,
        head: Gva,
        mut read: impl FnMut(Gva) -> Result<Option<T>, Refusal>,
    ) -> Result<Vec<T>, Refusal> {
        let mut found: Vec<(Gva, T)> = Vec::new();
        loop {
            let at = found.last().map_or(head, |(node, _)| *node);
            let Some(next) = self.step(at)? else {
                self.retries.again()?;
                found.pop();
                continue;
            };
            if next == head {
                return Ok(found.into_iter().map(|(_, member)| member).collect());
            }
            if found.len() == self.most {
                return Err(self.too_many());
            }
            let member = match read(next) {
                Err(Refusal::Unmapped { .. }) => None,
                other => other?,
            };
            // Whether it was one still once it was read, the step from it tells.
            match member {
                Some(member) => found.push((next, member)),
                None => self.retries.again()?,
            }
        }
    }

    /// The member behind `at`, if it points back.
    fn step(&self, at: Gva) -> Result<Option<Gva>, Refusal> {
        let word = |at: Gva| match read_u64(self.memory, at) {
            Ok(word) => Ok(Some(Gva(word)).filter(|at| is_pointer(*at))),
            Err(Refusal::Unmapped { .. }) => Ok(None),
            Err(other) => Err(other),
        };
        let Some(next) = word(at).map(|next| next.filter(|_| is_pointer(at)))? else { return Ok(None) };
        // `prev` is behind `next`.
        let back = word(Gva(next.0.wrapping_add(8)))?;
        Ok(Some(next).filter(|_| back == Some(at)))
    }
}
