//! The arena: guest memory that the monitor owns, for copies of instructions.
//!
//! This is its bookkeeping; the monitor maps the memory. A copy never changes, because a task that
//! was preempted in it may resume at any time. The arena as a whole may go once no task can be in a
//! copy. A site that is patched again gets the same copy, so only new sites take room.

use std::collections::HashMap;
use std::ops::Range;

use crate::addr::Gva;
use crate::insn;

/// Copies begin at multiples of this, in bytes.
const ALIGN: usize = 16;

/// The copies that were made, and the room that is left.
#[derive(Debug, Clone)]
pub struct Arena {
    base: Gva,
    size: usize,
    used: usize,
    copies: HashMap<(Gva, Vec<u8>), Slot>,
}

/// A copy of an instruction, followed by a jump back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Where it is.
    pub at: Gva,
    /// The relocated instruction and a jump to the one behind the original.
    pub code: Vec<u8>,
}

/// Why no copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoSlot {
    /// The instruction can't be executed elsewhere.
    Unmovable,
    /// The arena is full.
    Full,
}

impl Arena {
    /// An empty arena of `size` bytes at `base`.
    #[must_use]
    pub fn new(base: Gva, size: usize) -> Self {
        Self { base, size, used: 0, copies: HashMap::new() }
    }

    /// All of it, used or not.
    #[must_use]
    pub fn range(&self) -> Range<Gva> {
        self.base..Gva(self.base.0.saturating_add(self.size as u64))
    }

    /// How many bytes are in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Provides a copy of the instruction `old`, which is at `at`.
    ///
    /// # Errors
    /// [`NoSlot`]; the arena is unchanged then.
    pub fn copy(&mut self, at: Gva, old: &[u8]) -> Result<Slot, NoSlot> {
        let key = (at, old.to_vec());
        if let Some(copy) = self.copies.get(&key) {
            return Ok(copy.clone());
        }
        let to = self.base.plus(self.used).ok_or(NoSlot::Full)?;
        let code = insn::relocate(old, at, to).ok_or(NoSlot::Unmovable)?;
        let used = (self.used + code.len()).next_multiple_of(ALIGN);
        if used > self.size {
            return Err(NoSlot::Full);
        }
        self.used = used;
        let copy = Slot { at: to, code };
        self.copies.insert(key, copy.clone());
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITE: Gva = Gva(0xffff_ffff_8100_0000);
    const XOR: &[u8] = &[0x31, 0xc0];

    #[test]
    fn the_same_site_gets_the_same_copy_and_a_full_arena_says_so() {
        let mut arena = Arena::new(Gva(0xffff_ffff_a000_0000), 2 * ALIGN);
        let first = arena.copy(SITE, XOR).expect("room");
        assert_eq!(arena.copy(SITE, XOR), Ok(first.clone()));
        let second = arena.copy(Gva(SITE.0 + 2), XOR).expect("room");
        assert_ne!(first.at, second.at);
        assert_eq!(arena.used(), 2 * ALIGN);
        assert_eq!(arena.copy(Gva(SITE.0 + 4), XOR), Err(NoSlot::Full));
        assert_eq!(arena.copy(SITE, &[0x0f, 0x0b]), Err(NoSlot::Unmovable), "ud2");
        assert_eq!(arena.used(), 2 * ALIGN);
    }
}
