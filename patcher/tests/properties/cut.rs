//! Real kernels cut down to some 100 KiB: the beginning of every table, the code and the names that
//! its entries refer to, and the structures whose members are looked up, all at their real addresses.
//! And the beginning of a real module's tables, as guest memory.

use std::collections::BTreeMap;

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSegment};
use patcher::image::KernelImage;

use crate::miniature::{self, STRUCTURES};

/// Bytes kept of each table: a whole number of entries of 4, 8, 12, 14 and 16 bytes.
const TABLE: u64 = 1344;
/// Bytes of code kept for a table's entry.
const CODE: u64 = 16;
/// kallsyms with fewer symbols are not recognized.
const SYMBOLS: usize = 1100;
/// A length of one byte in kallsyms.
const LONGEST: usize = 120;

const TABLES: [(&str, &str); 9] = [
    ("__start___jump_table", "__stop___jump_table"),
    ("__start_static_call_sites", "__stop_static_call_sites"),
    ("__alt_instructions", "__alt_instructions_end"),
    ("__smp_locks", "__smp_locks_end"),
    ("__parainstructions", "__parainstructions_end"),
    ("__start_mcount_loc", "__stop_mcount_loc"),
    ("__start_orc_unwind_ip", "__stop_orc_unwind_ip"),
    ("__start___ex_table", "__stop___ex_table"),
    ("__start_notes", "__stop_notes"),
];

/// Other objects that are read, and how many bytes of each.
const OBJECTS: [(&str, u64); 5] = [
    ("linux_banner", 256),
    ("x86_cap_flags", 32 * 32 * 8),
    ("modules", 16),
    ("boot_cpu_data", 512),
    ("pv_ops", 1024),
];

type Elf<'a> = ElfFile64<'a, Endianness>;

fn bytes<'a>(elf: &Elf<'a>, at: u64, size: u64) -> Option<&'a [u8]> {
    elf.segments().find_map(|segment| segment.data_range(at, size).ok()?)
}

/// The kernel `vmlinux`, which `image` was read from, cut down.
pub(crate) fn kernel(vmlinux: &[u8], image: &KernelImage) -> Vec<u8> {
    let elf = Elf::parse(vmlinux).expect("an ELF file");
    let tables = image.tables();
    let first = image.text_base().0;
    let mut moved: BTreeMap<&str, u64> = BTreeMap::new();
    let mut ranges = vec![(first, CODE)];
    let find = |name: &str| image.symbols().only(name).map(|at| at.0);
    for (start, stop) in TABLES {
        let (Some(at), Some(end)) = (find(start), find(stop)) else { continue };
        let size = TABLE.min(end - at);
        moved.insert(stop, at + size);
        ranges.push((at, size));
    }
    for (name, size) in OBJECTS {
        ranges.extend(find(name).map(|at| (at, size)));
    }
    if let (Some(flags), Some(names)) = (find("x86_cap_flags"), find("x86_power_flags")) {
        let pointers = bytes(&elf, flags, names - flags).expect("the features' names").chunks_exact(8);
        let pointers = pointers.map(|pointer| u64::from_le_bytes(pointer.try_into().expect("eight")));
        ranges.extend(pointers.filter(|pointer| *pointer != 0).map(|pointer| (pointer, 32)));
    }
    let stay = usize::try_from(TABLE).expect("small");
    for entry in tables.jump_entries.iter().flatten().take(stay / 16) {
        ranges.extend([(entry.code.0, CODE), (entry.key.0, CODE)]);
    }
    for site in tables.static_call_sites.iter().flatten().take(stay / 8) {
        ranges.extend([(site.code.0, CODE), (site.key.0, CODE)]);
    }
    for alternative in tables.alternatives.iter().flatten().take(stay / 12) {
        ranges.push((alternative.at.0, alternative.original.len() as u64));
        ranges.push((alternative.replacement_at.0, alternative.replacement.len() as u64));
    }
    ranges.extend(tables.smp_locks.iter().flatten().take(stay / 4).map(|at| (at.0, CODE)));
    ranges.extend(tables.paravirt_sites.iter().flatten().take(stay / 16).map(|site| (site.at.0, CODE)));
    let mut segments = merged(&elf, ranges);

    let end = image.symbols().iter().map(|(at, ..)| at.0).max().expect("symbols") + (1 << 21);
    let mut symbols: Vec<(u64, u8, String)> = Vec::new();
    let mut others = SYMBOLS;
    for (at, kind, name) in image.symbols().iter().filter(|(at, ..)| at.0 >= first) {
        let at = moved.get(name).copied().unwrap_or(at.0);
        let needed = moved.contains_key(name)
            || name == "x86_power_flags"
            || segments.iter().any(|(start, bytes)| (*start..start + bytes.len() as u64).contains(&at));
        others -= usize::from(!needed && others > 0);
        if (needed || others > 0) && name.len() < LONGEST {
            symbols.push((at, kind, name.to_owned()));
        }
    }
    if let (Some(start), Some(stop)) = (find("__start_BTF"), find("__stop_BTF")) {
        let btf = btf(bytes(&elf, start, stop - start).expect("BTF"));
        symbols.retain(|(.., name)| name != "__stop_BTF" && name != "__start_BTF");
        symbols.push((end, b'D', "__start_BTF".to_owned()));
        symbols.push((end + btf.len() as u64, b'D', "__stop_BTF".to_owned()));
        segments.push((end, btf));
    }
    let linked = end + (1 << 21);
    segments.push((linked, miniature::kallsyms(miniature::Kallsyms::From5_10, linked, first, &symbols)));
    miniature::elf(&segments)
}

/// The bytes of these ranges, as far as the file has them.
fn merged(elf: &Elf<'_>, mut ranges: Vec<(u64, u64)>) -> Vec<(u64, Vec<u8>)> {
    ranges.sort_unstable();
    let mut whole: Vec<(u64, u64)> = Vec::new();
    for (at, size) in ranges.into_iter().filter(|(at, size)| bytes(elf, *at, *size).is_some()) {
        match whole.last_mut() {
            Some((start, length)) if at <= *start + *length + 64 => {
                *length = (*length).max(at + size - *start)
            }
            _ => whole.push((at, size)),
        }
    }
    let bytes = |(at, size)| Some((at, bytes(elf, at, size)?.to_vec()));
    whole.into_iter().filter_map(bytes).collect()
}

/// BTF of those structures alone that the readers look at, and of their anonymous members;
/// every other type is the first one (Documentation/bpf/btf.rst).
fn btf(real: &[u8]) -> Vec<u8> {
    let word = |at: usize| u32::from_le_bytes(real[at..at + 4].try_into().expect("four"));
    let part = |at: usize| (word(4) + word(at)) as usize..(word(4) + word(at) + word(at + 4)) as usize;
    let (types, strings) = (part(8), part(16));
    let text = |at: u32| {
        let text = &real[strings.start + at as usize..];
        std::str::from_utf8(text.split(|byte| *byte == 0).next().expect("a name")).expect("a name")
    };
    // Type 0 is void and is not in the list.
    let mut all = Vec::new();
    all.push(0..0);
    let mut at = types.start;
    while at < types.end {
        let (info, start) = (word(at + 4), at);
        let count = info as usize & 0xffff;
        at += 12
            + match info >> 24 & 0x1f {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => 12 * count,
                6 | 13 => 8 * count,
                _ => 0,
            };
        all.push(start..at);
    }
    let is_structure =
        |id: usize| !all[id].is_empty() && matches!(word(all[id].start + 4) >> 24 & 0x1f, 4 | 5);
    let wanted =
        |name: &str| STRUCTURES.iter().any(|(wanted, ..)| *wanted == name) || name == "module_layout";
    let mut kept: Vec<usize> =
        (1..all.len()).filter(|id| is_structure(*id) && wanted(text(word(all[*id].start)))).collect();
    let members = |id: usize| all[id].clone().skip(12).step_by(12);
    let mut seen = 0;
    while let Some(id) = kept.get(seen) {
        let anonymous = |at: usize| text(word(at)).is_empty().then(|| word(at + 4) as usize);
        let inner: Vec<usize> = members(*id).filter_map(anonymous).filter(|id| is_structure(*id)).collect();
        kept.extend(inner.into_iter().filter(|id| !kept.contains(id)).collect::<Vec<_>>());
        seen += 1;
    }
    let mut names = vec![0];
    let mut name = |at: u32| {
        let start = if text(at).is_empty() { 0 } else { names.len() };
        if start > 0 {
            names.extend(text(at).bytes().chain([0]));
        }
        u32::try_from(start).expect("small")
    };
    let mut out: Vec<u32> = vec![0, 1 << 24, 4, 32];
    for id in &kept {
        let start = all[*id].start;
        out.extend([name(word(start)), word(start + 4), word(start + 8)]);
        for member in members(*id) {
            let ty = kept.iter().position(|id| *id == word(member + 4) as usize);
            let ty = ty.map_or(1, |index| u32::try_from(index + 2).expect("small"));
            out.extend([name(word(member)), ty, word(member + 8)]);
        }
    }
    let types: Vec<u8> = out.iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("small");
    let mut btf = real[..4].to_vec();
    for word in [24, 0, length(&types), length(&types), length(&names)] {
        btf.extend(word.to_le_bytes());
    }
    [btf, types, names].concat()
}

/// Guest memory in which the list of modules of the miniature `image` has one, with the first
/// symbols, names, jumps, calls and exceptions of the file `ko`.
pub(crate) fn module(ko: &[u8], image: &KernelImage) -> Vec<u8> {
    let elf = Elf::parse(ko).expect("an ELF file");
    let section = |name: &str, keep: usize| {
        let data = elf.section_by_name(name).and_then(|section| section.data().ok()).unwrap_or_default();
        data[..keep.min(data.len())].to_vec()
    };
    let sections = miniature::Sections {
        symbols: section(".symtab", 24 * 32),
        names: section(".strtab", 0x3ff),
        jump_entries: section("__jump_table", 16 * 96),
        static_call_sites: section(".static_call_sites", 8 * 96),
        exceptions: section("__ex_table", 12 * 32),
    };
    miniature::with_module(image, &sections)
}
