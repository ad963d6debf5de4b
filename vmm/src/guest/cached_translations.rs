//! The kernel's memory with the translations of its large pages cached, as in a TLB: a page walk costs
//! four loads or five, and a program accesses many sites on few large pages.

use patcher::addr::Gva;
use patcher::linux::GuestMemory;
use patcher::program::step::Bytes;
use smallvec::smallvec;

use crate::guest::kernel::GuestKernel;
use crate::memory::paging::{self, LargePages, Mapping, Pieces};

/// The kernel's memory, read and written through cached translations.
#[derive(Debug)]
pub struct CachedTranslations<'k> {
    kernel: &'k GuestKernel,
    pages: LargePages,
}

impl<'k> CachedTranslations<'k> {
    /// With nothing cached yet.
    #[must_use]
    pub fn of(kernel: &'k GuestKernel) -> Self {
        Self { kernel, pages: LargePages::default() }
    }

    /// The kernel whose memory it is.
    #[must_use]
    pub fn kernel(&self) -> &'k GuestKernel {
        self.kernel
    }

    /// Empties the cache.
    pub fn forget(&self) {
        self.pages.forget();
    }

    fn translate(&self, at: Gva) -> Option<Mapping> {
        self.pages.translate(at, |at| self.kernel.translate(at))
    }

    /// The physical pieces of a range, all of them, or the first address that has none.
    pub(crate) fn pieces(&self, at: Gva, length: usize) -> Result<Pieces, Gva> {
        paging::pieces(at, length, |at| self.translate(at))
    }

    /// Whether memory holds these bytes; what else it holds, if not.
    ///
    /// # Errors
    /// The first address that is not mapped, or is not RAM.
    pub fn compare(&self, at: Gva, bytes: &[u8]) -> Result<Result<(), Vec<u8>>, Gva> {
        let mut found: Bytes = smallvec![0; bytes.len()];
        self.read(at, &mut found)?;
        Ok(if *found == *bytes { Ok(()) } else { Err(found.into_vec()) })
    }

    /// Replaces bytes within an aligned word ([`exchange`](crate::memory::GuestRam::exchange)).
    ///
    /// # Errors
    /// `Ok(Err(found))` when something else is there; the address when it is not mapped or
    /// not RAM. Nothing was written then.
    pub fn exchange(&self, at: Gva, old: &[u8], new: &[u8]) -> Result<Result<(), Vec<u8>>, Gva> {
        let mapping = self.translate(at).ok_or(at)?;
        self.kernel.ram().exchange(mapping.at, old, new).map_err(|_| at)
    }

    /// Writes guest memory. Nothing is written unless the whole range is mapped.
    ///
    /// # Errors
    /// The first address that is not mapped, or is not RAM.
    pub fn write(&self, at: Gva, bytes: &[u8]) -> Result<(), Gva> {
        for (piece, part) in paging::parts(self.pieces(at, bytes.len())?, bytes) {
            self.kernel.ram().write(piece, part).map_err(|_| at)?;
        }
        Ok(())
    }
}

impl GuestMemory for CachedTranslations<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        paging::read(self.kernel.ram(), at, into, |at| self.translate(at))
    }
}
