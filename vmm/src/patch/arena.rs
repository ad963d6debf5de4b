//! Maps the arena into the guest's kernel, without the guest's help.
//!
//! The kernel's image lies in a gigabyte of its own, in a page directory that every process
//! shares (Linux arch/x86/kernel/head_64.S, `level2_kernel_pgt`). At boot it clears the
//! entries around its image (arch/x86/mm/init_64.c, `cleanup_highmap`) and never looks at
//! them again. One of them, the nearest free one, is made to map the arena as one large
//! page: read, execute, kernel only. No TLB has an entry that was not present, so none needs to
//! be flushed. From there every byte of the kernel is within reach of a rel32.
//!
//! It is unmapped only on request, and once it is shown that no task can be in a copy or come
//! back to one. `docs/arena.md` has the argument and the limits.

use patcher::addr::{Gpa, Gva};
use patcher::safety::slots::Arena;

use crate::guest::kernel::GuestKernel;
use crate::memory::layout::{ARENA, ARENA_SIZE};

/// Present, accessed, dirty, large; neither writable nor for user space, and executable
/// (SDM volume 3, table 4-18).
pub(super) const READ_EXECUTE: u64 = 1 | 1 << 5 | 1 << 6 | 1 << 7;
/// The most that the kernel's own gigabyte has.
const ENTRIES: u64 = 512;

/// The arena of one guest: what is in it, and where it is, or will be, mapped.
#[derive(Debug, Clone)]
pub struct GuestArena {
    /// Which of its bytes are copies.
    pub slots: Arena,
    entry: Gpa,
    mapped: bool,
}

impl GuestArena {
    /// Finds a place for it. The guest is unchanged.
    ///
    /// # Errors
    /// Why there is none.
    pub fn place(kernel: &GuestKernel) -> Result<Self, String> {
        let (base, entry) = find(kernel)?;
        let size = usize::try_from(ARENA_SIZE).map_err(|error| error.to_string())?;
        Ok(Self { slots: Arena::new(base, size), entry, mapped: false })
    }

    /// Maps it, if it is not mapped yet.
    ///
    /// # Errors
    /// When the place was taken since it was found; the guest is unchanged then.
    pub fn map(&mut self, kernel: &GuestKernel) -> Result<(), String> {
        if !self.mapped {
            kernel.replace_entry(self.entry, 0, ARENA | READ_EXECUTE)?;
            self.mapped = true;
        }
        Ok(())
    }

    /// Whether the guest can see it.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// Unmaps it. No vCPU may be in the guest, and none may come back to a copy; afterwards
    /// their TLBs must be flushed ([`crate::kvm::Vm::remake_slot`]).
    ///
    /// # Errors
    /// When the guest changed the entry meanwhile; it is as the guest left it then.
    pub fn unmap(&mut self, kernel: &GuestKernel) -> Result<(), String> {
        if self.mapped {
            kernel.replace_entry(self.entry, ARENA | READ_EXECUTE, 0)?;
            self.mapped = false;
        }
        Ok(())
    }
}

fn find(kernel: &GuestKernel) -> Result<(Gva, Gpa), String> {
    let end = kernel.kernel().live(kernel.kernel().image.end());
    let gigabyte = end.0 >> 30;
    let above = (1..ENTRIES).map(|i| (end.0 & !(ARENA_SIZE - 1)) + i * ARENA_SIZE);
    let below = (1..ENTRIES).map(|i| (kernel.base().0 & !(ARENA_SIZE - 1)).wrapping_sub(i * ARENA_SIZE));
    let place = above.chain(below).filter(|place| place >> 30 == gigabyte).find_map(|place| {
        let entry = kernel.directory_entry(Gva(place))?;
        (entry.1 == 0).then_some((Gva(place), entry.0))
    });
    place.ok_or_else(|| "the kernel's page directory has no free entry for the arena".to_owned())
}
