//! Guest memory with a limit on how much of it is read for one purpose.
//!
//! The guest writes what is read here: its lists may be circles, its counts may be anything, and every
//! element may lie on another page. Each walk has a limit of its own, which says what is wrong with the
//! guest; this one holds for all walks together, so that no guest keeps the thread busy that changes it.

use crate::addr::Gva;
use crate::budget::Budget;
use crate::linux::memory::GuestMemory;

/// What may be spent on a plan, from reading the modules to the last site, in units of [`Budget`]. Reading
/// costs a unit, and one more for each 64 bytes. A guest with 200 modules of 1,000 symbols each
/// takes some 300,000.
pub const INSPECTION: u64 = 1 << 21;
/// A page walk takes about as long as copying so many bytes.
const BYTES_A_UNIT: usize = 64;

/// Guest memory that is read within a budget.
pub struct Bounded<'m> {
    memory: &'m dyn GuestMemory,
    budget: Budget,
}

impl<'m> Bounded<'m> {
    /// Memory from which so many units may be read.
    #[must_use]
    pub fn new(memory: &'m dyn GuestMemory, units: u64) -> Self {
        Self { memory, budget: Budget::new(units) }
    }

    /// How many units are left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.budget.left()
    }
}

impl GuestMemory for Bounded<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        self.budget.spend(1 + into.len() / BYTES_A_UNIT).ok_or(at)?;
        self.memory.read(at, into)
    }

    fn is_exhausted(&self) -> bool {
        self.budget.is_exhausted()
    }
}
