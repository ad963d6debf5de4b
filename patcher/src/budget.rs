//! A limit on the work that data can cause which nobody vouches for: a kernel file, a guest's memory.
//!
//! Whatever reads such data shares one budget with all the others that do so for the same purpose, and
//! spends about a unit a step. Once it is exhausted it stays so: every reader fails, and who gave out the
//! budget refuses the whole, since what was read until then may be incomplete.

use std::cell::Cell;

/// How much work may still be done.
#[derive(Debug)]
pub struct Budget {
    /// `None` once more was asked for than was left.
    left: Cell<Option<u64>>,
}

impl Budget {
    /// A budget of so many units.
    #[must_use]
    pub fn new(units: u64) -> Self {
        Self { left: Cell::new(Some(units)) }
    }

    /// Takes units out of it.
    ///
    /// ```
    /// use patcher::budget::Budget;
    ///
    /// let budget = Budget::new(3);
    /// assert_eq!(budget.spend(2), Some(()));
    /// assert_eq!(budget.spend(2), None);
    /// // One unit would be left, but the reader that needed two has failed.
    /// assert_eq!(budget.spend(1), None);
    /// assert!(budget.is_exhausted());
    /// ```
    ///
    /// Returns `None` if so many are not left, and for ever after.
    pub fn spend(&self, units: usize) -> Option<()> {
        let left = self.left.get().and_then(|left| left.checked_sub(u64::try_from(units).ok()?));
        self.left.set(left);
        left.map(|_| ())
    }

    /// Whether more was asked for than there was.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.left.get().is_none()
    }

    /// How many units are left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.get().unwrap_or(0)
    }
}
