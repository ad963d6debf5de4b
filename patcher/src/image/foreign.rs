//! Files that are no kernel for x86-64, but are given for one: known by their first bytes, so that the
//! error says what the file is and what to give instead.

use crate::image::error::Error;

/// Where a PE file says where its header is (Microsoft PE format, "MS-DOS Stub").
const PE_OFFSET: usize = 0x3c;
/// A section header of a PE file, which begins with its name (Microsoft PE format, "Section Table").
const PE_SECTION: usize = 40;

/// What is known by bytes at an offset.
const KNOWN: [(usize, &[u8], &str); 11] = [
    (0, b"070701", INITRD),
    (0, b"070702", INITRD),
    (0, b"070707", INITRD),
    // Linux Documentation/arch/arm64/booting.rst and Documentation/arch/riscv/boot-image-header.rst.
    (56, b"ARMd", "an arm64 kernel (Image); the guest's processor is an x86-64"),
    (56, b"RSC\x05", "a RISC-V kernel (Image); the guest's processor is an x86-64"),
    // Linux drivers/firmware/efi/libstub/zboot-header.S.
    (4, b"zimg", "a compressed EFI kernel (vmlinuz.efi) of another architecture"),
    (0, b"!<arch>\n", "an archive, such as a Debian package; unpack it, and give the vmlinuz in it"),
    (0, b"\xed\xab\xee\xdb", "an RPM package; unpack it, and give the vmlinuz in it"),
    (0, b"QFI\xfb", "a disk image (qcow2); give the kernel that is in it"),
    (0, b"hsqs", "a file system (squashfs); give the kernel that is in it"),
    (0x8001, b"CD001", "a disc image (ISO 9660); give the kernel that is in it"),
];

const INITRD: &str = "an initial RAM file system (a cpio archive), no kernel; --initrd takes it";

/// Why a file that is neither a bzImage, nor ELF, nor compressed can't be used.
pub(super) fn why(file: &[u8]) -> Error {
    if file.is_empty() {
        return Error::Empty;
    }
    let known =
        KNOWN.iter().find(|(at, magic, _)| file.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    let known = known.map(|(.., what)| *what).or_else(|| efi(file)).or_else(|| boot_sector(file));
    known.map_or(Error::Foreign, |what| Error::Other(what.into()))
}

/// An EFI program, and whether it is one with a kernel inside (systemd's unified kernel images,
/// UAPI.5): a bzImage with an EFI stub is none of these, because it has `HdrS`.
fn efi(file: &[u8]) -> Option<&'static str> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?).into());
    let header = u32::from_le_bytes(*file.strip_prefix(b"MZ").and(file.get(PE_OFFSET..))?.first_chunk()?);
    let header = usize::try_from(header).ok()?;
    file.get(header..)?.strip_prefix(b"PE\0\0")?;
    let (count, optional): (usize, usize) = (u16_at(header + 6)?, u16_at(header + 20)?);
    let sections = file.get(header + 24 + optional..)?.chunks_exact(PE_SECTION).take(count);
    Some(if sections.into_iter().any(|section| section.starts_with(b".linux\0")) {
        "a unified kernel image (an EFI program); give the kernel in it: \
         objcopy -O binary --only-section=.linux FILE bzImage"
    } else {
        "an EFI program, no kernel; firmware runs it, and this machine has none"
    })
}

/// The PC's boot sector ends with this; Linux had no `HdrS` in it before protocol 2.00 (Linux
/// Documentation/arch/x86/boot.rst).
fn boot_sector(file: &[u8]) -> Option<&'static str> {
    (file.get(0x1fe..0x200)? == [0x55, 0xaa])
        .then_some("a boot sector, such as a disk image begins with; give the kernel's own file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_named() {
        let pe = |section: &[u8; 8]| {
            let mut file = vec![0; 0x80];
            file[..2].copy_from_slice(b"MZ");
            file[PE_OFFSET] = 0x40;
            file[0x40..0x44].copy_from_slice(b"PE\0\0");
            file[0x46] = 1;
            file[0x58..0x60].copy_from_slice(section);
            file
        };
        let with = |at: usize, bytes: &[u8]| {
            let mut file = vec![0; at];
            file.extend(bytes);
            file
        };
        for (file, says) in [
            (b"070701".to_vec(), "--initrd"),
            (with(56, b"ARMd"), "arm64"),
            (with(56, b"RSC\x05"), "RISC-V"),
            (b"MZ\0\0zimg".to_vec(), "vmlinuz.efi"),
            (b"!<arch>\ndebian-binary".to_vec(), "Debian package"),
            (with(0x1fe, &[0x55, 0xaa]), "a boot sector"),
            (with(0x8001, b"CD001"), "ISO 9660"),
            (pe(b".linux\0\0"), "unified kernel image"),
            (pe(b".text\0\0\0"), "an EFI program, no kernel"),
        ] {
            let error = why(&file);
            assert!(matches!(&error, Error::Other(what) if what.contains(says)), "{says}: {error}");
        }
        assert_eq!(why(b""), Error::Empty);
        for file in [&b"#!/bin/sh"[..], b"MZ", b"M", &pe(b".linux\0\0")[..0x42], &[0; 4096]] {
            assert!(matches!(why(file), Error::Foreign), "{file:02x?}");
        }
    }
}
