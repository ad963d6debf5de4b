//! Inputs from which others are made: each is as it should be.

use crate::checks;

/// A fuzz target: its name, what it checks, its seeds.
type Target = (&'static str, fn(&[u8]), Vec<Vec<u8>>);

/// Those of the targets whose checks are in `checks`.
pub(crate) fn all() -> [Target; 3] {
    [("paging", checks::paging, paging()), ("ports", checks::ports, ports()), ("boot", checks::boot, boot())]
}

/// Four levels and five, each table with an entry for the next one, a large page and a small one, and what is
/// no page.
pub(crate) fn paging() -> Vec<Vec<u8>> {
    let address = |indices: [u64; 4]| indices.iter().fold(0, |sum, index| sum << 9 | index) << 12;
    [4_u8, 5]
        .map(|levels| {
            let mut tables = vec![0_u64; 6 * 512];
            let mut put = |table: u64, index: u64, entry| {
                tables[usize::try_from(table * 512 + index).expect("small")] = entry;
            };
            put(0, 1, 0x1003);
            put(1, 1, 0x2003);
            put(2, 1, 0x3003);
            put(3, 1, 0x4003);
            put(4, 1, 0x5003);
            put(3, 2, 0x4000_0000_4020_0083);
            put(2, 2, 0x4000_0000_8000_0083);
            put(3, 511, 0x8000_0000_0000_0001);
            // PS, where it is reserved.
            put(0, 2, 0x1083);
            put(1, 2, 0x2083);
            let top = if levels == 5 { 1 << 48 } else { 0 };
            let addresses = [[1, 1, 1, 1], [1, 1, 2, 7], [1, 2, 3, 4], [2, 1, 1, 1]];
            let numbers = addresses.map(|indices| address(indices) + top + 0xff8);
            let words = numbers.into_iter().chain(tables).flat_map(u64::to_le_bytes);
            std::iter::once(levels & 1).chain(words).collect()
        })
        .to_vec()
}

/// Bytes sent, looped back and read, every device written to, and every width.
pub(crate) fn ports() -> Vec<Vec<u8>> {
    let uart = |register: u8, value: u8| [register << 3, value, 1];
    let sent: Vec<u8> = b"hello".iter().flat_map(|byte| uart(0, *byte)).collect();
    let looped = [uart(4, 0x10), uart(0, b'x'), [0, 0, 0], uart(4, 0), uart(3, 0x80), uart(0, 1)].concat();
    let power = vec![1 | 4 << 3, 0xff, 1 | 4 << 3, 0xfe, 2, 1, 3, 0x21, 0x83, 1, 0xc2, 1, 5, 1, 6, 0];
    vec![[sent.clone(), looped, sent].concat(), power]
}

/// A bzImage without a kernel in it, and a vmlinux without code.
pub(crate) fn boot() -> Vec<Vec<u8>> {
    let mut file = vec![0; 1024 + 0x400];
    file[0x1f1] = 1;
    file[0x1f4] = 0x40;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    (file[0x211], file[0x236], file[0x24d]) = (1, 1, 4);
    file[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x100_0000_u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [120_u64, 0xffff_ffff_8100_0000, 0x100_0000, 16, 64, 4] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0x90; 16]);
    let initrd = [1];
    vec![[&initrd[..], &file].concat(), [&initrd[..], &elf].concat()]
}
