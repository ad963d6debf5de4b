//! Kernels with any headers are loaded or refused: nothing panics, and what is loaded lies in the guest's RAM, with
//! the initrd behind what the kernel takes.

// It has more than is used here.
#[allow(dead_code)]
#[path = "../../patcher/tests/properties/miniature.rs"]
mod miniature;

use std::path::Path;

use patcher::addr::Gpa;
use vmm::boot::kernel::{Entry, Error, load};
use vmm::memory::GuestRam;

const MIB: u64 = 1 << 20;
const RAM: u64 = 96 * MIB;
const INITRD: [u8; 5000] = [7; 5000];

/// A sequence that is the same in every run (xorshift64*).
struct Sequence(u64);

impl Sequence {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("small")
    }

    /// A value at which arithmetic goes wrong, or any.
    fn hostile(&mut self) -> u64 {
        const EDGES: [u64; 12] =
            [0, 1, 0xfff, 0x1000, MIB - 1, MIB, RAM - 1, RAM, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX];
        match self.below(3) {
            0 => self.next(),
            1 => EDGES[self.below(EDGES.len())].wrapping_sub(self.next() & 1),
            _ => EDGES[self.below(EDGES.len())],
        }
    }
}

fn number(ram: &GuestRam, at: u64) -> u64 {
    let mut bytes = [0; 4];
    ram.read(Gpa(at), &mut bytes).expect("RAM");
    u32::from_le_bytes(bytes).into()
}

/// Loads `rounds` kernels with up to four hostile fields in `header`; returns how many were loaded.
fn load_many(kernel: &[u8], header: std::ops::Range<usize>, rounds: usize) -> usize {
    let ram = GuestRam::new(RAM).expect("RAM");
    let mut sequence = Sequence(0x9e37_79b9_7f4a_7c15);
    let path = Path::new("kernel");
    load(&ram, path, kernel, Some(&INITRD), "").expect("as it is, it is loaded");
    let mut loaded = 0;
    for _ in 0..rounds {
        let mut kernel = kernel.to_vec();
        for _ in 0..=sequence.below(4) {
            let size = [1, 2, 4, 8][sequence.below(4)];
            let at = header.start + sequence.below(header.len() - size);
            kernel[at..at + size].copy_from_slice(&sequence.hostile().to_le_bytes()[..size]);
        }
        let Ok(entry) = load(&ram, path, &kernel, Some(&INITRD), "") else { continue };
        loaded += 1;
        if let Entry::Long(_) = entry {
            // The zero page's `ramdisk_image` and `ramdisk_size` (Linux Documentation/arch/x86/boot.rst).
            let (at, size) = (number(&ram, 0x7000 + 0x218), number(&ram, 0x7000 + 0x21c));
            assert_eq!(size, INITRD.len() as u64);
            assert!(at >= MIB && at + size <= RAM, "the initrd is at {at:#x}");
            let mut initrd = INITRD;
            ram.read(Gpa(at), &mut initrd).expect("RAM");
            assert_eq!(initrd, INITRD);
        }
    }
    loaded
}

fn bzimage() -> Vec<u8> {
    let mut kernel = miniature::bzimage_of(&[0xcc; 4096]);
    // `code32_start`, `initrd_addr_max`, `pref_address` and `init_size`.
    kernel[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    kernel[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    kernel[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    kernel[0x260..0x264].copy_from_slice(&0x30_0000_u32.to_le_bytes());
    kernel
}

#[test]
fn any_setup_header_is_loaded_or_refused() {
    let loaded = load_many(&bzimage(), 0x1f1..0x268, 100_000);
    assert!(loaded > 10_000, "only {loaded} were loaded, so little was tried");
}

#[test]
fn any_program_headers_are_loaded_or_refused() {
    let kernel = miniature::elf(&[(miniature::BASE, vec![0xcc; 256]), (miniature::BASE + 4096, vec![1; 64])]);
    let loaded = load_many(&kernel, 0..64 + 2 * 56, 100_000);
    assert!(loaded > 10_000, "only {loaded} were loaded, so little was tried");
}

#[test]
fn a_kernel_that_wants_to_be_nowhere_is_told() {
    let ram = GuestRam::new(RAM).expect("RAM");
    let told = |fields: &[(usize, &[u8])]| {
        let mut kernel = bzimage();
        for (at, bytes) in fields {
            kernel[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        load(&ram, Path::new("kernel"), &kernel, Some(&INITRD), "")
    };
    let everything = [(0x258, &[0xff; 8][..])];
    assert!(matches!(told(&everything), Err(Error::TooSmall { what: "the unpacked kernel", .. })));
    for most in [[0, 0, 0, 0], [0xff, 0xf, 0, 0], [0xff, 0xff, 0x0f, 0x01]] {
        let result = told(&[(0x22c, &most)]);
        assert!(
            matches!(result, Err(Error::TooSmall { what: "the kernel with its initrd", .. })),
            "{result:?}"
        );
    }
    assert!(told(&[(0x22c, &[0xff; 4])]).is_ok());
}
