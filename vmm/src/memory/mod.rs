//! Guest RAM: one [file](ram_file), mapped twice.
//!
//! KVM runs the guest on the guest view; the monitor reads and writes through the monitor view.
//! So a page can be write-protected for the guest (`mprotect` of the guest view) and still be
//! patched. Both views ask for transparent huge pages: a guest touches most of its first 100 MiB
//! while it boots, and the first touch of each page is an exit (in the rig, boot and power-off take
//! 2.3 s with huge pages, 4.5 s without). Neither is in a core dump of the monitor (`MADV_DONTDUMP`).
//!
//! Unsafe code: `mprotect` of the guest view, `madvise` of both. Invariants:
//! - Both calls get a page-aligned range inside one mapping that the caller owns.
//! - No code of this process reads or writes the guest view, or holds a reference into it; only KVM
//!   does. So `mprotect` can't fault this process, and KVM turns a write to a protected page into an
//!   exit.
//! - `MADV_HUGEPAGE` and `MADV_DONTDUMP` change no content and no protection (madvise(2)).
#![allow(unsafe_code)]

pub mod access;
pub mod layout;
pub mod paging;
pub mod ram_file;

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use patcher::addr::Gpa;
use rustix::mm::{Advice, MprotectFlags, madvise, mprotect};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion, VolatileMemory,
};

use crate::memory::layout::{
    ARENA, ARENA_SIZE, CODE_PAGES, DATA_PAGES, DEVICE_GAP, DEVICE_GAP_END, MONITORS, PAGES_SIZE, READ_ONLY,
};

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;
/// The same as a `usize`.
pub const PAGE_SIZE: usize = 4096;

/// Why guest RAM could not be created or accessed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be created, sized or duplicated.
    #[error("guest memory of {bytes} bytes: {source}")]
    File {
        /// The size.
        bytes: u64,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file could not be mapped.
    #[error("mapping guest memory: {0}")]
    Map(MmapRegionError),
    /// The memory can't be kept out of core dumps.
    #[error("keeping guest memory out of core dumps: {0}")]
    Dumped(std::io::Error),
    /// The regions do not form an address space.
    #[error("arranging guest memory: {0}")]
    Arrange(String),
    /// No RAM at this address.
    #[error("guest-physical {at:#x}: {source}", at = .at.0)]
    Access {
        /// The address.
        at: Gpa,
        /// vm-memory's error.
        source: GuestMemoryError,
    },
    /// The protection of a page could not be changed.
    #[error("protecting guest-physical {at:#x}: {source}", at = .at.0)]
    Protect {
        /// The first page.
        at: Gpa,
        /// The system's error.
        source: std::io::Error,
    },
}

/// A KVM memory slot (KVM API, `KVM_SET_USER_MEMORY_REGION`).
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Guest-physical start.
    pub guest: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Start in the guest view.
    pub host: u64,
    /// Whether the guest can't write to it.
    pub read_only: bool,
}

/// A guest-physical range and where its content is in the file.
#[derive(Debug, Clone, Copy)]
struct Backing {
    guest: u64,
    file_offset: u64,
    bytes: u64,
}

/// The guest's memory.
#[derive(Debug)]
pub struct GuestRam {
    guest_view: GuestMemoryMmap,
    monitor_view: GuestMemoryMmap,
}

impl GuestRam {
    /// Creates `bytes` of zeroed RAM, split around the device gap below 4 GiB, and the monitor's
    /// memory.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Map`] or [`Error::Arrange`].
    pub fn new(bytes: u64) -> Result<Self, Error> {
        let size = bytes + (MONITORS.end - MONITORS.start);
        let (file, _) = ram_file::zeroed(size).map_err(|source| Error::File { bytes: size, source })?;
        let low = bytes.min(DEVICE_GAP);
        let mut parts = vec![
            Backing { guest: 0, file_offset: 0, bytes: low },
            Backing { guest: ARENA, file_offset: bytes, bytes: ARENA_SIZE },
            // Not with the arena, whose slot is remade.
            Backing {
                guest: CODE_PAGES,
                file_offset: bytes + (CODE_PAGES - ARENA),
                bytes: DATA_PAGES - CODE_PAGES,
            },
            Backing { guest: DATA_PAGES, file_offset: bytes + (DATA_PAGES - ARENA), bytes: PAGES_SIZE },
        ];
        if bytes > low {
            parts.push(Backing { guest: DEVICE_GAP_END, file_offset: low, bytes: bytes - low });
        }
        Ok(Self { guest_view: map(&file, &parts)?, monitor_view: map(&file, &parts)? })
    }

    /// The memory slots for KVM: RAM and the monitor's memory.
    pub fn slots(&self) -> Vec<Slot> {
        self.guest_view
            .iter()
            .map(|region| Slot {
                guest: region.start_addr().0,
                bytes: region.len(),
                host: region.as_ptr() as u64,
                read_only: READ_ONLY.contains(&region.start_addr().0),
            })
            .collect()
    }

    /// The RAM that the guest's memory map lists, so without the monitor's: start and size in bytes
    /// of each region.
    pub fn usable_ram(&self) -> impl Iterator<Item = (u64, u64)> {
        let regions = self.monitor_view.iter().map(|region| (region.start_addr().0, region.len()));
        regions.filter(|(start, _)| !MONITORS.contains(start))
    }

    /// The monitor's view, for loaders.
    pub fn monitor_view(&self) -> &GuestMemoryMmap {
        &self.monitor_view
    }

    /// Reads RAM.
    ///
    /// # Errors
    /// [`Error::Access`] when a byte of the range is not RAM.
    pub fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), Error> {
        self.monitor_view.read_slice(into, GuestAddress(at.0)).map_err(|source| Error::Access { at, source })
    }

    /// Writes RAM. A range of 1, 2, 4 or 8 bytes that is aligned to its size is written with
    /// one store; any other range byte by byte, in no guaranteed order.
    ///
    /// # Errors
    /// [`Error::Access`] when a byte of the range is not RAM; bytes before it may have been
    /// written.
    pub fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), Error> {
        let to = GuestAddress(at.0);
        let memory = &self.monitor_view;
        let done = match *bytes {
            [a] => memory.store(a, to, Ordering::SeqCst),
            [a, b] if at.0.is_multiple_of(2) => {
                memory.store(u16::from_le_bytes([a, b]), to, Ordering::SeqCst)
            }
            [a, b, c, d] if at.0.is_multiple_of(4) => {
                memory.store(u32::from_le_bytes([a, b, c, d]), to, Ordering::SeqCst)
            }
            [a, b, c, d, e, f, g, h] if at.0.is_multiple_of(8) => {
                memory.store(u64::from_le_bytes([a, b, c, d, e, f, g, h]), to, Ordering::SeqCst)
            }
            _ => memory.write_slice(bytes, to),
        };
        done.map_err(|source| Error::Access { at, source })
    }

    /// Replaces `old` by `new` with one atomic access to the aligned eight bytes that hold them;
    /// the other bytes keep their value. `old` and `new` have the same length.
    ///
    /// # Errors
    /// [`Error::Access`] when the word is not RAM or the range crosses into the next word. The inner
    /// error holds the bytes found instead of `old`; nothing was written then.
    pub fn exchange(&self, at: Gpa, old: &[u8], new: &[u8]) -> Result<Result<(), Vec<u8>>, Error> {
        let access = |source| Error::Access { at, source };
        let (word, from) = (at.0 & !7, usize::try_from(at.0 & 7).unwrap_or(0));
        let slice = self.monitor_view.get_slice(GuestAddress(word), 8).map_err(access)?;
        let cell = slice.get_atomic_ref::<AtomicU64>(0).map_err(|e| access(e.into()))?;
        loop {
            let there = cell.load(Ordering::SeqCst);
            let mut bytes = there.to_le_bytes();
            let Some(part) = bytes.get_mut(from..from + new.len()) else {
                return Err(access(GuestMemoryError::InvalidBackendAddress));
            };
            if part != old {
                return Ok(Err(part.to_vec()));
            }
            part.copy_from_slice(new);
            let stored = u64::from_le_bytes(bytes);
            // On failure another writer changed the word: compare again.
            if cell.compare_exchange(there, stored, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                return Ok(Ok(()));
            }
        }
    }

    /// Writes up to eight bytes as a processor would: with one access if an aligned word of eight
    /// bytes holds them all, else with one access a word, the lower word first.
    ///
    /// # Errors
    /// [`Error::Access`] when a byte of the range is not RAM; bytes before it may have been
    /// written.
    pub fn store(&self, at: Gpa, bytes: &[u8]) -> Result<(), Error> {
        let access = |source| Error::Access { at, source };
        let (word, from) = (at.0 & !7, usize::try_from(at.0 & 7).unwrap_or(0));
        let (here, behind) = bytes.split_at(bytes.len().min(8 - from));
        let slice = self.monitor_view.get_slice(GuestAddress(word), 8).map_err(access)?;
        let cell = slice.get_atomic_ref::<AtomicU64>(0).map_err(|e| access(e.into()))?;
        let with_bytes = |there: u64| {
            let mut word = there.to_le_bytes();
            word[from..from + here.len()].copy_from_slice(here);
            Some(u64::from_le_bytes(word))
        };
        // It can't fail: `with_bytes` never returns `None`.
        let _ = cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, with_bytes);
        if behind.is_empty() { Ok(()) } else { self.store(Gpa(word + 8), behind) }
    }

    /// Reads an aligned 64-bit word, such as a page-table entry, with one load.
    ///
    /// # Errors
    /// [`Error::Access`] when it is not in RAM or not aligned.
    pub fn load_u64(&self, at: Gpa) -> Result<u64, Error> {
        self.monitor_view
            .load(GuestAddress(at.0), Ordering::SeqCst)
            .map_err(|source| Error::Access { at, source })
    }

    /// Makes pages read-only for the guest, or writable again. The monitor's own writes are not
    /// affected. A guest's write to a read-only page makes `KVM_RUN` fail with `EFAULT` before the
    /// write takes effect; the next `KVM_RUN` repeats it. When this returns, no vCPU writes to the
    /// pages through an old translation: the MMU notifier makes KVM flush the vCPUs' TLBs.
    ///
    /// # Errors
    /// [`Error::Access`] when the pages are not in one region; [`Error::Protect`] when `mprotect`
    /// fails.
    pub fn write_protect(&self, pages: &Range<Gpa>, protected: bool) -> Result<(), Error> {
        let (start, end) = (pages.start.0 & !(PAGE - 1), pages.end.0.next_multiple_of(PAGE));
        let at = Gpa(start);
        let nowhere =
            || Error::Access { at, source: GuestMemoryError::InvalidGuestAddress(GuestAddress(start)) };
        let size = usize::try_from(end.saturating_sub(start)).map_err(|_| nowhere())?;
        let region = self.guest_view.find_region(GuestAddress(start)).ok_or_else(nowhere)?;
        if end > region.start_addr().0 + region.len() {
            return Err(nowhere());
        }
        let host = self
            .guest_view
            .get_host_address(GuestAddress(start))
            .map_err(|source| Error::Access { at, source })?;
        let access = if protected { MprotectFlags::READ } else { MprotectFlags::READ | MprotectFlags::WRITE };
        // SAFETY:
        // - `host` is page-aligned, as regions are; the check above keeps `size` bytes from there
        //   inside this region's mapping, which lives as long as `self`.
        // - Only KVM accesses the guest view (module invariant).
        let done = unsafe { mprotect(host.cast(), size, access) };
        done.map_err(|error| Error::Protect { at, source: error.into() })
    }

    /// Whether a byte is RAM or the monitor's.
    #[must_use]
    pub fn contains(&self, at: Gpa) -> bool {
        self.monitor_view.address_in_range(GuestAddress(at.0))
    }

    /// Whether the guest may write there: to RAM, and of the monitor's memory to the pages for data.
    #[must_use]
    pub fn takes_guest_writes(&self, at: Gpa) -> bool {
        self.contains(at) && !READ_ONLY.contains(&at.0)
    }
}

fn map(file: &File, parts: &[Backing]) -> Result<GuestMemoryMmap, Error> {
    let mut regions = Vec::new();
    for &Backing { guest, file_offset, bytes } in parts {
        let file = file.try_clone().map_err(|source| Error::File { bytes, source })?;
        let size = usize::try_from(bytes).map_err(|e| Error::Arrange(e.to_string()))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, file_offset), size).map_err(Error::Map)?;
        // SAFETY: the range is the whole of the mapping just made, which outlives the call; the
        // advice changes no content and no protection.
        // Where the host has no huge pages it fails, and costs speed only.
        let _ = unsafe { madvise(mapping.as_ptr().cast(), size, Advice::LinuxHugepage) };
        // SAFETY: as above.
        let undumped = unsafe { madvise(mapping.as_ptr().cast(), size, Advice::LinuxDontDump) };
        undumped.map_err(|error| Error::Dumped(error.into()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or_else(|| Error::Arrange(format!("{bytes:#x} bytes at {guest:#x} do not fit")))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| Error::Arrange(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::CONSTANT_PAGES;

    #[test]
    fn ram_is_split_around_the_device_gap_and_both_ends_work() {
        let ram = GuestRam::new(DEVICE_GAP + 2 * PAGE).expect("RAM");
        let slots = ram.slots();
        let found: Vec<_> = slots.iter().map(|slot| (slot.guest, slot.bytes, slot.read_only)).collect();
        let expected = [
            (0, DEVICE_GAP, false),
            (ARENA, ARENA_SIZE, true),
            (CODE_PAGES, 2 * PAGES_SIZE, true),
            (DATA_PAGES, PAGES_SIZE, false),
            (DEVICE_GAP_END, 2 * PAGE, false),
        ];
        assert_eq!(found, expected);
        let usable: Vec<_> = ram.usable_ram().collect();
        assert_eq!(usable, [(0, DEVICE_GAP), (DEVICE_GAP_END, 2 * PAGE)]);
        let last = Gpa(DEVICE_GAP_END + 2 * PAGE - 8);
        ram.write(last, &0x1122_3344_5566_7788_u64.to_le_bytes()).expect("written");
        assert_eq!(ram.load_u64(last).expect("read"), 0x1122_3344_5566_7788);
        assert!(matches!(ram.write(Gpa(DEVICE_GAP), &[0]), Err(Error::Access { .. })));
        assert!(matches!(ram.write(Gpa(DEVICE_GAP_END + 2 * PAGE - 1), &[0, 0]), Err(Error::Access { .. })));
    }

    #[test]
    fn no_two_regions_share_memory() {
        let ram = GuestRam::new(DEVICE_GAP + 2 * PAGE).expect("RAM");
        let ends = |slot: &Slot| [slot.guest, slot.guest + slot.bytes - 8];
        let words: Vec<u64> = ram.slots().iter().flat_map(ends).collect();
        for at in &words {
            ram.write(Gpa(*at), &at.to_le_bytes()).expect("written");
        }
        for at in words {
            assert_eq!(ram.load_u64(Gpa(at)).expect("read"), at);
        }
    }

    #[test]
    fn the_guest_writes_to_ram_and_to_pages_for_data() {
        let ram = GuestRam::new(16 * PAGE).expect("RAM");
        for may in [0, 16 * PAGE - 1, DATA_PAGES, MONITORS.end - 1] {
            assert!(ram.takes_guest_writes(Gpa(may)), "{may:#x}");
        }
        for not in [ARENA, CODE_PAGES - 1, CODE_PAGES, CONSTANT_PAGES - 1, CONSTANT_PAGES, DATA_PAGES - 1] {
            assert!(ram.contains(Gpa(not)) && !ram.takes_guest_writes(Gpa(not)), "{not:#x}");
        }
        for nowhere in [16 * PAGE, ARENA - 1, MONITORS.end, DEVICE_GAP_END] {
            assert!(!ram.takes_guest_writes(Gpa(nowhere)), "{nowhere:#x}");
        }
    }

    /// The flags are those of `/proc/self/smaps` (proc_pid_smaps(5), `VmFlags`).
    #[test]
    fn core_dumps_have_no_guest_memory() {
        let ram = GuestRam::new(4 * PAGE).expect("RAM");
        ram.write_protect(&(Gpa(PAGE)..Gpa(2 * PAGE)), true).expect("protected");
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("procfs");
        // Each mapping's line, and those about it; the last one has the flags. The system joins mappings that follow
        // each other in the file and in memory, so they need not begin where a region does.
        let mut mappings: Vec<(Range<usize>, &str)> = Vec::new();
        let mut lines = maps.lines();
        while let Some((start, rest)) = lines.next().and_then(|line| line.split_once('-')) {
            let end = rest.split(' ').next().expect("its end");
            let address = |text| usize::from_str_radix(text, 16).expect("an address");
            let flags = lines.find(|line| line.starts_with("VmFlags:")).expect("flags");
            mappings.push((address(start)..address(end), flags));
        }
        // Other tests map guest memory, too, and may be about to.
        let of_ram = |region: &GuestRegionMmap| {
            let (start, length) = (region.as_ptr() as usize, usize::try_from(region.len()).expect("64 bits"));
            let mut at = start;
            for (range, flags) in &mappings {
                if range.contains(&at) && at < start + length {
                    assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
                    at = range.end;
                }
            }
            assert!(at >= start + length, "{at:#x} is not mapped");
        };
        ram.guest_view.iter().chain(ram.monitor_view.iter()).for_each(of_ram);
    }

    #[test]
    fn an_exchange_replaces_what_it_expects_and_nothing_else() {
        let ram = GuestRam::new(4 * PAGE).expect("RAM");
        ram.write(Gpa(0), &[1, 2, 3, 4, 5, 6, 7, 8]).expect("written");
        assert_eq!(ram.exchange(Gpa(3), &[4, 5], &[40, 50]).expect("RAM"), Ok(()));
        assert_eq!(ram.exchange(Gpa(3), &[4, 5], &[0, 0]).expect("RAM"), Err(vec![40, 50]));
        let mut seen = [0; 8];
        ram.read(Gpa(0), &mut seen).expect("read");
        assert_eq!(seen, [1, 2, 3, 40, 50, 6, 7, 8]);
        assert!(ram.exchange(Gpa(7), &[8, 0], &[0, 0]).is_err(), "across two words");
    }

    #[test]
    fn a_protected_page_takes_the_monitors_writes_and_both_views_agree() {
        let ram = GuestRam::new(4 * PAGE).expect("RAM");
        ram.write_protect(&(Gpa(PAGE + 5)..Gpa(PAGE + 6)), true).expect("protected");
        ram.write(Gpa(PAGE), &[1, 2, 3]).expect("written");
        let mut seen = [0; 3];
        ram.guest_view.read_slice(&mut seen, GuestAddress(PAGE)).expect("read");
        assert_eq!(seen, [1, 2, 3]);
        ram.write_protect(&(Gpa(0)..Gpa(4 * PAGE)), false).expect("unprotected");
        ram.guest_view.write_slice(&[9], GuestAddress(PAGE)).expect("written");
        for wrong in [Gpa(3 * PAGE)..Gpa(5 * PAGE), Gpa(4 * PAGE)..Gpa(5 * PAGE)] {
            assert!(matches!(ram.write_protect(&wrong, true), Err(Error::Access { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn a_store_changes_its_bytes_and_no_others() {
        let ram = GuestRam::new(PAGE).expect("RAM");
        for (at, length) in [(0, 8), (3, 1), (3, 4), (6, 2), (5, 8), (7, 2)] {
            ram.write(Gpa(0), &[0xee; 16]).expect("written");
            let bytes: Vec<u8> = (1..=length).collect();
            ram.store(Gpa(at), &bytes).expect("stored");
            let mut seen = [0; 16];
            ram.read(Gpa(0), &mut seen).expect("read");
            let mut expected = [0xee; 16];
            let from = usize::try_from(at).expect("small");
            expected[from..from + bytes.len()].copy_from_slice(&bytes);
            assert_eq!(seen, expected, "{length} at {at}");
        }
        assert!(ram.store(Gpa(PAGE - 1), &[1, 2]).is_err());
    }
}
