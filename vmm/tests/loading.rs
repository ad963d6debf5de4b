//! What is in the guest's memory when the first vCPU enters a vmlinux: its segments, and what tells it
//! of its command line, its initrd, its memory and its ACPI tables, by either boot protocol.

use std::path::Path;

use patcher::addr::Gpa;
use vmm::boot::kernel::{Entry, load};
use vmm::memory::GuestRam;

const MIB: u64 = 1 << 20;
const RAM: u64 = 128 * MIB;
const CODE: [u8; 16] = [0x90; 16];
const INITRD: &[u8] = b"070701 and so on";
const COMMAND_LINE: &str = "console=ttyS0";

/// A vmlinux with code at 16 MiB, entered there, and this note.
fn vmlinux(note: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [16 * MIB, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let length = note.len() as u64;
    for (kind, offset, bytes, size) in [(1, 176, 16, 64), (4, 192, length, length)] {
        file.extend([kind, 0, 0, 0, 5, 0, 0, 0]);
        for word in [offset, 0xffff_ffff_8100_0000, 16 * MIB, bytes, size, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(CODE);
    file.extend(note);
    file
}

fn number(ram: &GuestRam, at: u64, size: usize) -> u64 {
    let mut bytes = [0; 8];
    ram.read(Gpa(at), &mut bytes[..size]).expect("RAM");
    u64::from_le_bytes(bytes)
}

fn text(ram: &GuestRam, at: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    ram.read(Gpa(at), &mut bytes).expect("RAM");
    bytes
}

fn loaded(note: &[u8]) -> (GuestRam, Entry) {
    let ram = GuestRam::new(RAM).expect("RAM");
    let entry =
        load(&ram, Path::new("vmlinux"), &vmlinux(note), Some(INITRD), COMMAND_LINE).expect("it is loaded");
    assert_eq!(text(&ram, 16 * MIB, 20), [&CODE[..], &[0; 4]].concat());
    (ram, entry)
}

/// What both protocols tell: the places of the initrd and of the command line, and the memory map as
/// address, size and type.
fn check(ram: &GuestRam, initrd: (u64, u64), command_line: u64, rsdp: u64, map: &[(u64, u64, u64)]) {
    assert_eq!(text(ram, initrd.0, INITRD.len()), INITRD);
    assert_eq!(initrd, (RAM - 4096, INITRD.len() as u64));
    assert_eq!(text(ram, command_line, COMMAND_LINE.len() + 1), [COMMAND_LINE.as_bytes(), &[0]].concat());
    assert_eq!(rsdp, 0xe_0000);
    assert_eq!(map, [(0, 0x9_fc00, 1), (0xe_0000, 0x2_0000, 2), (MIB, RAM - MIB, 1)]);
}

/// Offsets: Linux Documentation/arch/x86/zero-page.rst and boot.rst.
#[test]
fn a_kernel_without_pvh_gets_the_zero_page() {
    const ZERO_PAGE: u64 = 0x7000;
    let (ram, entry) = loaded(&[]);
    assert_eq!(entry, Entry::Long(16 * MIB));
    let field = |offset, size| number(&ram, ZERO_PAGE + offset, size);
    assert_eq!(text(&ram, ZERO_PAGE + 0x202, 6), b"HdrS\x0c\x02");
    assert_eq!(field(0x210, 1), 0xff);
    let entries = (0..field(0x1e8, 1)).map(|index| 0x2d0 + 20 * index);
    let map: Vec<_> = entries.map(|at| (field(at, 8), field(at + 8, 8), field(at + 16, 4))).collect();
    check(&ram, (field(0x218, 4), field(0x21c, 4)), field(0x228, 4), field(0x70, 8), &map);
}

/// Offsets: Xen xen/include/public/arch-x86/hvm/start_info.h.
#[test]
fn a_kernel_with_pvh_gets_the_start_info() {
    const START_INFO: u64 = 0x6000;
    let note = [&[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &(16 * MIB + 8).to_le_bytes()].concat();
    let (ram, entry) = loaded(&note);
    assert_eq!(entry, Entry::Pvh(16 * MIB + 8));
    let field = |offset, size| number(&ram, START_INFO + offset, size);
    assert_eq!((field(0, 4), field(4, 4), field(12, 4)), (0x336e_c578, 1, 1));
    let module = field(16, 8);
    let initrd = (number(&ram, module, 8), number(&ram, module + 8, 8));
    let entries = (0..field(48, 4)).map(|index| field(40, 8) + 24 * index);
    let map: Vec<_> =
        entries.map(|at| (number(&ram, at, 8), number(&ram, at + 8, 8), number(&ram, at + 16, 4))).collect();
    check(&ram, initrd, field(24, 8), field(32, 8), &map);
}

#[test]
fn what_does_not_fit_is_told() {
    let ram = GuestRam::new(RAM).expect("RAM");
    let kernel = vmlinux(&[]);
    let told = |initrd: &[u8]| {
        load(&ram, Path::new("vmlinux"), &kernel, Some(initrd), "").map_err(|e| e.to_string())
    };
    let most = usize::try_from(RAM - 16 * MIB - 4096).expect("small");
    assert!(told(&vec![0; most]).is_ok());
    let says = "the kernel with its initrd needs 129 MiB of memory, the guest has 128 MiB where it can be";
    assert_eq!(told(&vec![0; most + 1]), Err(says.to_owned()));
}
