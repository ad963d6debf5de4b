//! The kernel image as a whole.

use std::ops::Range;

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::banner::Banner;
use crate::image::btf::Btf;
use crate::image::call_forms::CallForms;
use crate::image::elf::{MOST_LOADED, Vmlinux};
use crate::image::error::Error;
use crate::image::evidence::Evidence;
use crate::image::landings::Landings;
use crate::image::landmarks::Landmarks;
use crate::image::lock_ops::LockOps;
use crate::image::offsets::Offsets;
use crate::image::orc::Orc;
use crate::image::preempt_count::CountLayout;
use crate::image::profile::Profile;
use crate::image::symbols::Symbols;
use crate::image::tables::Tables;
use crate::image::{bzimage, kallsyms, notes, payload, search};

/// What may be spent on reading a kernel, in units of [`Budget`]: so much for any, and so much more for each
/// byte of it.
const WORK: u64 = 1 << 24;
const WORK_A_BYTE: u64 = 4;

/// What is known of a kernel from its image alone. Addresses are link-time addresses.
#[derive(Debug)]
pub struct KernelImage {
    release: String,
    /// The linker's build ID, and where it is.
    build_id: Option<(Gva, Vec<u8>)>,
    compression: Option<&'static str>,
    symbols: Symbols,
    tables: Tables,
    offsets: Offsets,
    lock_ops: Option<LockOps>,
    orc: Option<Orc>,
    call_forms: CallForms,
    landmarks: Landmarks,
    landings: Landings,
    profile: Profile,
    banner: Option<Banner>,
    count: Option<CountLayout>,
    text_base: Gva,
    text_end: Option<Gva>,
    end: Gva,
    data: Option<Range<Gva>>,
}

impl KernelImage {
    /// Reads a bzImage or a vmlinux, which may be compressed.
    ///
    /// ```
    /// use patcher::image::{Error, KernelImage, unpack};
    ///
    /// # #[path = "../../tests/properties/miniature.rs"] mod miniature;
    /// # fn main() {
    /// # let bzimage = miniature::bzimage(&miniature::vmlinux());
    /// // `bzimage` holds the file: here a miniature kernel, compressed with LZ4.
    /// let image = KernelImage::parse(&bzimage).expect("a kernel");
    /// assert_eq!((image.release(), image.compression()), ("6.1.0-miniature", Some("lz4")));
    /// assert!(image.symbols().only("function").is_some());
    /// assert_eq!(image.static_keys()[0].name, "key");
    ///
    /// let vmlinux = unpack(&bzimage).expect("it decompresses");
    /// assert!(vmlinux.starts_with(b"\x7fELF"));
    /// assert_eq!(KernelImage::parse(b"#!/bin/sh").unwrap_err(), Error::Foreign);
    /// # }
    /// ```
    ///
    /// Time and memory are bounded by the size of the file, and by that of the kernel in it: what is not
    /// read within a budget is refused.
    ///
    /// # Errors
    /// [`Error`], which tells what is wrong with the file.
    pub fn parse(file: &[u8]) -> Result<Self, Error> {
        let unpacked = payload::extract(file)?;
        let size = unpacked.as_ref().map_or(file.len(), |(_, vmlinux)| vmlinux.len()) as u64;
        let budget = Budget::new(WORK + WORK_A_BYTE * size.min(MOST_LOADED));
        let image = Self::read(file, unpacked, &budget);
        // What was read with an exhausted budget may lack anything.
        if budget.is_exhausted() { Err(Error::TooMuchWork) } else { image }
    }

    fn read(file: &[u8], unpacked: Option<(&'static str, Vec<u8>)>, budget: &Budget) -> Result<Self, Error> {
        let vmlinux = Vmlinux::parse(unpacked.as_ref().map_or(file, |(_, vmlinux)| vmlinux), budget)?;
        let text_base = vmlinux.text_base().ok_or(Error::Elf { what: "no executable segment".into() })?;
        let found = vmlinux
            .segments()
            .find_map(|segment| {
                kallsyms::read(segment.bytes, segment.at, |address| address == text_base.0, budget)
            })
            .ok_or(Error::NoSymbols)?;
        let symbols = Symbols::new(found.symbols()).ok_or(Error::NoSymbols)?;
        drop(found);
        let release = bzimage::release(file);
        let banner = Banner::find(&vmlinux, &symbols, release);
        let release =
            release.or(banner.as_ref().and_then(Banner::release)).ok_or(Error::NoRelease)?.to_owned();
        let btf = types(&symbols, &vmlinux);
        let mut tables = Tables::read(&vmlinux, &symbols, (search::jump_table, search::static_calls));
        let offsets = btf.as_ref().map(Offsets::read).unwrap_or_default();
        let fixups = std::mem::take(&mut tables.fixups);
        let landings = Landings::of_image(&vmlinux, &symbols, &tables, fixups);
        let lock_ops = btf.as_ref().and_then(|btf| LockOps::read(&vmlinux, &symbols, btf));
        let orc = btf.as_ref().and_then(|btf| Orc::read(&vmlinux, &symbols, btf));
        let count = CountLayout::read(&vmlinux, &symbols);
        let evidence = Evidence {
            vmlinux: &vmlinux,
            symbols: &symbols,
            tables: &tables,
            btf: btf.as_ref(),
            banner: banner.as_ref().map(Banner::text),
            lock_ops: lock_ops.as_ref(),
            orc: orc.is_some(),
            count,
            text_base,
        };
        let profile = Profile::of(|fact| evidence.has(fact), |fact| evidence.why_not(fact));
        let section_end = |name| vmlinux.section(name).and_then(|text| text.at.plus(text.bytes.len()));
        Ok(Self {
            release,
            profile,
            banner,
            count,
            text_end: symbols.only("_etext").or_else(|| section_end(".text")),
            end: symbols.only("_end").unwrap_or_else(|| vmlinux.end()),
            data: vmlinux.section(".data").and_then(|data| Some(data.at..data.at.plus(data.bytes.len())?)),
            build_id: build_id(&symbols, &vmlinux),
            compression: unpacked.as_ref().map(|(method, _)| *method),
            landmarks: Landmarks::read(&vmlinux, &symbols, &tables, &offsets),
            landings: landings.ok_or(Error::Elf { what: "its code is larger than a kernel's".into() })?,
            tables,
            offsets,
            call_forms: CallForms::read(&vmlinux, &symbols),
            lock_ops,
            orc,
            symbols,
            text_base,
        })
    }

    /// An image with these symbols and without tables.
    #[must_use]
    pub fn from_parts(release: String, symbols: Symbols, text_base: Gva) -> Self {
        Self {
            release,
            build_id: None,
            compression: None,
            text_end: symbols.only("_etext"),
            end: symbols.only("_end").unwrap_or(text_base),
            symbols,
            tables: Tables::default(),
            offsets: Offsets::default(),
            lock_ops: None,
            orc: None,
            call_forms: CallForms::default(),
            landmarks: Landmarks::default(),
            landings: Landings::default(),
            profile: Profile::default(),
            banner: None,
            count: None,
            text_base,
            data: None,
        }
    }

    /// The same image with these, and with every capability.
    #[cfg(test)]
    pub(crate) fn with(self, offsets: Offsets, call_forms: CallForms) -> Self {
        Self { offsets, call_forms, profile: Profile::whole(), ..self }
    }

    /// The same image with this banner.
    #[cfg(test)]
    pub(crate) fn with_banner(self, banner: &str) -> Self {
        Self { banner: Some(Banner::of(banner)), ..self }
    }

    /// The kernel release, as `uname -r` reports it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The linker's build ID, if there is one.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_ref().map(|(_, id)| id.as_slice())
    }

    /// The same with its link-time address: a running kernel has it, too.
    #[must_use]
    pub fn build_id_in_memory(&self) -> Option<(Gva, &[u8])> {
        self.build_id.as_ref().map(|(at, id)| (*at, id.as_slice()))
    }

    /// How the vmlinux is compressed; `None` if the file is a plain vmlinux.
    #[must_use]
    pub fn compression(&self) -> Option<&'static str> {
        self.compression
    }

    /// Its symbols.
    #[must_use]
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// Its tables of patch sites.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Offsets of members of its structures.
    #[must_use]
    pub fn offsets(&self) -> &Offsets {
        &self.offsets
    }

    /// The paravirtual operations of its spinlocks, if it has them.
    #[must_use]
    pub fn lock_ops(&self) -> Option<&LockOps> {
        self.lock_ops.as_ref()
    }

    /// Its ORC table, if it has one that makes sense.
    #[must_use]
    pub fn orc(&self) -> Option<&Orc> {
        self.orc.as_ref()
    }

    /// The static calls that it has its own code for.
    #[must_use]
    pub fn call_forms(&self) -> &CallForms {
        &self.call_forms
    }

    /// Where execution arrives other than by a function's own branches.
    #[must_use]
    pub fn landings(&self) -> &Landings {
        &self.landings
    }

    /// Addresses that every plan needs.
    #[must_use]
    pub fn landmarks(&self) -> &Landmarks {
        &self.landmarks
    }

    /// Which capabilities it has, and why not.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Its version banner, if there is one.
    #[must_use]
    pub fn banner(&self) -> Option<&Banner> {
        self.banner.as_ref()
    }

    /// Where the bits of its preempt count are, if that is known.
    #[must_use]
    pub fn count_layout(&self) -> Option<CountLayout> {
        self.count
    }

    /// Whether an address is in the kernel's text, or in its init sections. Since 6.16 the type letters do
    /// not tell: data symbols have those of text, too.
    #[must_use]
    pub fn is_text(&self, at: Gva) -> bool {
        let is_init = self.landmarks.init.as_ref().is_some_and(|init| init.contains(&at));
        is_init || self.text_end.is_none_or(|end| (self.text_base..end).contains(&at))
    }

    /// The end of its text, which begins at [`KernelImage::text_base`]; without its init sections. `None`
    /// if that is not known.
    #[must_use]
    pub fn text_end(&self) -> Option<Gva> {
        self.text_end
    }

    /// The end of the image in memory.
    #[must_use]
    pub fn end(&self) -> Gva {
        self.end
    }

    /// Its section `.data`, if the file has its sections.
    #[must_use]
    pub fn data(&self) -> Option<Range<Gva>> {
        self.data.clone()
    }

    /// The link-time address of `_text`.
    #[must_use]
    pub fn text_base(&self) -> Gva {
        self.text_base
    }
}

fn types<'a>(symbols: &Symbols, vmlinux: &Vmlinux<'a>) -> Option<Btf<'a>> {
    Btf::parse(vmlinux.table(symbols, ("__start_BTF", "__stop_BTF"), ".BTF")?.bytes, vmlinux.budget())
}

/// The description of the note `NT_GNU_BUILD_ID`.
fn build_id(symbols: &Symbols, vmlinux: &Vmlinux<'_>) -> Option<(Gva, Vec<u8>)> {
    const BUILD_ID: u32 = 3;
    /// In bytes; those of a linker are a hash.
    const LONGEST: usize = 64;
    let table = vmlinux.table(symbols, ("__start_notes", "__stop_notes"), ".notes")?;
    let (behind, id) = notes::find(table.bytes, b"GNU\0", BUILD_ID)?;
    if id.len() > LONGEST {
        return None;
    }
    Some((table.at.plus(behind)?, id.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn foreign_and_truncated_files_are_told_apart() {
        assert_eq!(KernelImage::parse(b"").unwrap_err(), Error::Empty);
        assert_eq!(KernelImage::parse(&[0; 4096]).unwrap_err(), Error::Foreign);
        let elf = KernelImage::parse(b"\x7fELF\x02\x01\x01").unwrap_err();
        assert_eq!(elf, Error::Truncated { what: "vmlinux", bytes: 7, stated: 64 });
    }
    /// The kernels that whole-VM tests have fetched, in `*/boot/vmlinuz-*`, and those of the corpus, in
    /// `*/vmlinuz`.
    fn kernels() -> impl Iterator<Item = PathBuf> {
        let entries = |folder: PathBuf| {
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
        };
        let cache = Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cache/vmm-rig");
        let files =
            entries(cache).flat_map(move |package| entries(package.join("boot")).chain(entries(package)));
        files.filter(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz"))
        })
    }

    #[test]
    fn real_kernels_need_a_quarter_of_the_budget_at_most() {
        for path in kernels() {
            let file = std::fs::read(&path).expect("a file");
            let unpacked = payload::extract(&file).expect("a kernel");
            let size = unpacked.as_ref().map_or(file.len(), |(_, vmlinux)| vmlinux.len()) as u64;
            let all = WORK + WORK_A_BYTE * size;
            let budget = Budget::new(all);
            KernelImage::read(&file, unpacked, &budget).expect("a kernel");
            let spent = all - budget.left();
            assert!(!budget.is_exhausted() && spent <= all / 4, "{} needs {spent} of {all}", path.display());
        }
    }
}
