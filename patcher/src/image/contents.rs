//! What the kernel's memory holds before its first instruction, by link-time address.

use crate::addr::Gva;
use crate::image::elf;
use crate::image::error::Error;

/// The bytes of an image as its file has them: no table of patch sites has been applied yet.
#[derive(Debug)]
pub struct Contents<'a> {
    segments: Vec<(Gva, &'a [u8])>,
}

impl<'a> Contents<'a> {
    /// Reads an uncompressed vmlinux, which [`unpack`](crate::image::unpack) gives.
    ///
    /// # Errors
    /// When it is no kernel, or is truncated or damaged.
    pub fn parse(vmlinux: &'a [u8]) -> Result<Self, Error> {
        let mut segments: Vec<_> =
            elf::segments(vmlinux)?.iter().map(|segment| (segment.at, segment.bytes)).collect();
        segments.sort_by_key(|(at, _)| *at);
        Ok(Self { segments })
    }

    /// What the file has from an address on, up to the segment's end; `None` if it has nothing there, or zeros
    /// that are not in the file.
    #[must_use]
    pub fn from(&self, at: Gva) -> Option<&'a [u8]> {
        let after = self.segments.partition_point(|(start, _)| *start <= at);
        let (start, bytes) = self.segments[..after].last()?;
        bytes.get(at.offset_from(*start)?..).filter(|rest| !rest.is_empty())
    }

    /// `size` bytes at an address.
    #[must_use]
    pub fn bytes(&self, at: Gva, size: usize) -> Option<&'a [u8]> {
        self.from(at)?.get(..size)
    }
}
