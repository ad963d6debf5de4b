//! Whether an ELF file is a whole x86-64 program that is linked as a kernel is.

use object::Endianness;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};

use crate::image::error::Error;

/// `EI_CLASS` and `EI_DATA` of a 64-bit little-endian file.
const CLASS_AND_DATA: [u8; 2] = [2, 1];
/// Kernel code is linked in the upper half of the address space.
const UPPER_HALF: u64 = 1 << 63;

/// The header of a file that begins as an ELF file does.
///
/// # Errors
/// What it is instead; or by how much it is truncated.
pub(super) fn check(file: &[u8]) -> Result<(&FileHeader64<Endianness>, Endianness), Error> {
    let truncated = |stated| Error::Truncated { what: "vmlinux", bytes: file.len() as u64, stated };
    let bad = |e: object::Error| Error::Elf { what: e.to_string() };
    let other = |what: &'static str| Err(Error::Other(what.into()));
    let Some(start) = file.first_chunk::<64>() else { return Err(truncated(64)) };
    if start[4..6] != CLASS_AND_DATA {
        return other(match start[4..6] {
            [1, 1] if start[18] == 3 => "a 32-bit x86 ELF file; guests are x86-64",
            [1, _] => "a 32-bit ELF file; guests are x86-64",
            _ => "a big-endian ELF file; guests are x86-64",
        });
    }
    let header = FileHeader64::<Endianness>::parse(file).map_err(bad)?;
    let endian = header.endian().map_err(bad)?;
    if header.e_machine(endian) != elf::EM_X86_64 {
        let machine = match header.e_machine(endian) {
            elf::EM_AARCH64 => "arm64".to_owned(),
            elf::EM_RISCV => "RISC-V".to_owned(),
            elf::EM_LOONGARCH => "LoongArch".to_owned(),
            elf::EM_PPC64 => "PowerPC".to_owned(),
            other => format!("another machine (e_machine {})", other.0),
        };
        return Err(Error::Other(format!("an ELF file for {machine}; guests are x86-64").into()));
    }
    match header.e_type(endian) {
        elf::ET_EXEC => {}
        elf::ET_REL => {
            return other(
                "an object file, such as a kernel module (.ko); give the kernel that the module is for",
            );
        }
        elf::ET_DYN => return other("a shared library or a position-independent program, no kernel"),
        elf::ET_CORE => return other("a core dump, no kernel"),
        _ => return other("an ELF file that is no executable (e_type is not ET_EXEC)"),
    }
    let stated = size_by_headers(file, header, endian).map_err(bad)?;
    if stated > file.len() as u64 {
        return Err(truncated(stated));
    }
    let segments = header.program_headers(endian, file).map_err(bad)?;
    let code =
        segments.iter().find(|s| s.p_type(endian) == elf::PT_LOAD && s.p_flags(endian).contains(elf::PF_X));
    match code.map(|segment| segment.p_vaddr(endian)) {
        None => Err(Error::Elf { what: "no executable segment".into() }),
        Some(at) if at < UPPER_HALF => Err(Error::Other(
            format!("a program, no kernel: its code is linked at {at:#x}, a kernel's in the upper half")
                .into(),
        )),
        Some(_) => Ok((header, endian)),
    }
}

/// Where the last segment, the last section, or one of their tables ends in the file; as far as the
/// tables can be read, if they can't.
fn size_by_headers(
    file: &[u8],
    header: &FileHeader64<Endianness>,
    endian: Endianness,
) -> Result<u64, object::Error> {
    let table = |at: u64, count: u16, size: u16| match at {
        0 => 0,
        at => at.saturating_add(u64::from(count) * u64::from(size)),
    };
    let tables = table(header.e_phoff(endian), header.e_phnum(endian), header.e_phentsize(endian))
        .max(table(header.e_shoff(endian), header.e_shnum(endian), header.e_shentsize(endian)));
    if tables > file.len() as u64 {
        return Ok(tables);
    }
    let segments = header.program_headers(endian, file)?.iter();
    let segments = segments.map(|s| s.p_offset(endian).saturating_add(s.p_filesz(endian)));
    let sections = header.section_headers(endian, file)?.iter();
    let sections = sections.filter_map(|section| {
        let (offset, size) = section.file_range(endian)?;
        Some(offset.saturating_add(size))
    });
    Ok(segments.chain(sections).max().unwrap_or(0).max(tables))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header, one executable segment of 16 bytes, a section table of one empty entry.
    fn file() -> Vec<u8> {
        let mut file = vec![0; 64 + 56 + 16 + 64];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &[2, 0, 62, 0, 1]);
        put(32, &[64]);
        put(40, &[136]);
        put(52, &[64, 0, 56, 0, 1, 0, 64, 0, 1, 0]);
        put(64, &[1, 0, 0, 0, 5, 0, 0, 0, 120]);
        put(80, &0xffff_ffff_8100_0000_u64.to_le_bytes());
        put(96, &[16, 0, 0, 0, 0, 0, 0, 0, 16]);
        file
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        assert!(check(&file()).is_ok());
        for (at, bytes, says) in [
            (4, &[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3][..], "32-bit x86"),
            (4, &[1], "32-bit"),
            (5, &[2], "big-endian"),
            (18, &[183], "for arm64"),
            (18, &[243], "for RISC-V"),
            (18, &[40], "e_machine 40"),
            (16, &[1], "kernel module (.ko)"),
            (16, &[3], "position-independent"),
            (16, &[4], "core dump"),
            (80, &0x40_1000_u64.to_le_bytes(), "linked at 0x401000"),
            (68, &[4], "no executable segment"),
        ] {
            let mut file = file();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            let error = check(&file).expect_err(says).to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
    }

    #[test]
    fn a_truncated_one_is_told_with_both_sizes() {
        let whole = file();
        for (bytes, stated) in [(199, 200), (130, 200), (100, 200), (63, 64)] {
            let error = Error::Truncated { what: "vmlinux", bytes, stated };
            let bytes = usize::try_from(bytes).expect("small");
            assert_eq!(check(&whole[..bytes]).map(|_| ()), Err(error));
        }
        // A section that lies behind the table of sections.
        let mut behind = whole.clone();
        (behind[136 + 4], behind[136 + 24], behind[136 + 32]) = (1, 190, 11);
        let error = Error::Truncated { what: "vmlinux", bytes: 200, stated: 201 };
        assert_eq!(check(&behind).map(|_| ()), Err(error));
        // Without a section table, only the segment is missed.
        let mut stripped = whole[..136].to_vec();
        stripped[40] = 0;
        stripped[60] = 0;
        assert!(check(&stripped).is_ok());
        let error = Error::Truncated { what: "vmlinux", bytes: 135, stated: 136 };
        assert_eq!(check(&stripped[..135]).map(|_| ()), Err(error));
    }
}
