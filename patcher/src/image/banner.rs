//! The version banner (Linux init/version-timestamp.c, `linux_banner`): "Linux version RELEASE (...) #1 SMP
//! ...". It is found by its symbol or, where kallsyms lacks data symbols, by its text.

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;

const BEGINS: &[u8] = b"Linux version ";
/// Longest banner, in bytes.
const LONGEST: usize = 512;

/// The version banner.
#[derive(Debug, Clone)]
pub struct Banner {
    /// Its link-time address.
    pub at: Gva,
    /// Its line, without the line break.
    text: String,
}

impl Banner {
    /// `release` is known of a bzImage from its header.
    pub(super) fn find(vmlinux: &Vmlinux<'_>, symbols: &Symbols, release: Option<&str>) -> Option<Self> {
        let named = symbols.only("linux_banner").and_then(|at| Self::at(vmlinux, at, release));
        named.or_else(|| {
            let mut places = vmlinux.segments().flat_map(|segment| {
                let starts = memchr::memmem::find_iter(segment.bytes, BEGINS);
                starts.filter_map(move |offset| segment.at.plus(offset))
            });
            places.find_map(|at| Self::at(vmlinux, at, release))
        })
    }

    /// One with that text.
    #[cfg(test)]
    pub(super) fn of(text: &str) -> Self {
        Self { at: Gva(0), text: text.to_owned() }
    }

    fn at(vmlinux: &Vmlinux<'_>, at: Gva, release: Option<&str>) -> Option<Self> {
        let longest = (1..=LONGEST).rev().find_map(|length| vmlinux.bytes(at, length))?;
        let line = &longest[..longest.iter().position(|byte| *byte == b'\n')?];
        let text = std::str::from_utf8(line).ok()?.to_owned();
        let banner = Self { at, text };
        let found = banner.release()?;
        let is_number = found.starts_with(|first: char| first.is_ascii_digit());
        (is_number && release.is_none_or(|release| release == found)).then_some(banner)
    }

    /// Its text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The kernel release in it.
    #[must_use]
    pub fn release(&self) -> Option<&str> {
        self.text.strip_prefix("Linux version ")?.split_once(" (").map(|(release, _)| release)
    }
}
