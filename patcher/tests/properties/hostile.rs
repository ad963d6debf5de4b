//! Kernel files and guest memory that are made to keep their readers busy: each is refused, within the
//! budget. Without it, most of these take minutes or for ever.

use std::collections::BTreeMap;

use patcher::addr::Gva;
use patcher::image::{Error, KernelFile, KernelImage, Loadable};
use patcher::linux::kprobes::probes;
use patcher::linux::livepatches::livepatched;
use patcher::linux::module_list::read_modules;
use patcher::linux::{Bounded, GuestMemory, Kernel, Modules};
use patcher::plan::Plan;
use patcher::plan::refusal::Refusal;
use patcher::resolve::{RunningGuest, resolve, targets};

use crate::miniature::{self, BASE};

/// The token table of kallsyms with every token a single character, aligned to 8 bytes, and its index.
fn tokens() -> Vec<u8> {
    let all = miniature::kallsyms(miniature::Kallsyms::From5_10, BASE, BASE, &[(BASE, b'T', "_text".into())]);
    // One offset and its padding, base, count, the names and the marker, each to a multiple of 8.
    all[8 + 8 + 8 + 8 + 8..].to_vec()
}

#[test]
fn counts_of_symbols_that_all_lead_far() {
    // Each word is a plausible count of symbols, and a name of seven bytes before the next.
    let counts = 0x1_0107_u64.to_le_bytes().repeat(32 << 10);
    let file = miniature::elf(&[(BASE, [counts, tokens()].concat())]);
    assert!(file.len() < 300 << 10);
    assert_eq!(KernelImage::parse(&file).unwrap_err(), Error::TooMuchWork);
}

#[test]
fn digits_that_all_might_be_in_a_table_of_tokens() {
    let digits: Vec<u8> = (b'0'..=b'9').flat_map(|digit| [digit, 0]).collect();
    let long = [vec![b'x'; 100], vec![0]].concat();
    let piece = [digits, long.repeat(20)].concat();
    let file = miniature::elf(&[(BASE, piece.repeat((64 << 20) / piece.len()))]);
    assert_eq!(KernelImage::parse(&file).unwrap_err(), Error::TooMuchWork);
}

/// A file of 256 KiB, of which 4,000 segments have all the rest each.
#[test]
fn segments_that_share_their_bytes() {
    const COUNT: u16 = 4000;
    let mut file = miniature::elf(&vec![(BASE, Vec::new()); COUNT.into()]);
    let (start, size) = (file.len() as u64, 32_u64 << 10);
    file.resize(file.len() + (32 << 10), 0);
    for segment in 0..usize::from(COUNT) {
        for (field, value) in [(8, start), (32, size), (40, size)] {
            let at = 64 + 56 * segment + field;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    let says = |error: Error, what: &str| assert!(error.to_string().contains(what), "{error}");
    says(KernelImage::parse(&file).unwrap_err(), "share their bytes");
    // A loader would copy all of them.
    assert!(matches!(KernelFile::open(&file), Ok(KernelFile::Vmlinux(_))));
    says(Loadable::parse(&file).unwrap_err(), "two of its segments are loaded to");
}

#[test]
fn sections_whose_names_do_not_end() {
    const SECTIONS: u16 = 4000;
    let mut file = miniature::vmlinux();
    let (at, names, size) = (file.len() as u64, file.len() as u64 + 64 * u64::from(SECTIONS), 32_u64 << 20);
    for section in 0..u64::from(SECTIONS) {
        let mut header = vec![0; 64];
        header[4] = u8::from(section > 0);
        header[24..32].copy_from_slice(&names.to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        file.extend(header);
    }
    file.resize(file.len() + (32 << 20), b'x');
    file[40..48].copy_from_slice(&at.to_le_bytes());
    file[60..62].copy_from_slice(&SECTIONS.to_le_bytes());
    file[62] = 1;
    // Read to their ends, the names would be 128 GiB.
    assert!(KernelImage::parse(&file).is_ok());
}

/// Guest memory of words; what is not set is zero.
#[derive(Default)]
struct Words(BTreeMap<u64, u64>);

impl Words {
    fn set(&mut self, at: u64, word: u64) {
        self.0.insert(at, word);
    }
}

impl GuestMemory for Words {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        into.fill(0);
        let end = at.plus(into.len()).ok_or(at)?;
        for (start, word) in self.0.range(at.0.saturating_sub(7)..end.0) {
            for (place, byte) in (*start..).zip(word.to_le_bytes()) {
                let offset = Gva(place).offset_from(at);
                if let Some(there) = offset.and_then(|offset| into.get_mut(offset)) {
                    *there = byte;
                }
            }
        }
        Ok(())
    }
}

fn image() -> KernelImage {
    KernelImage::parse(&miniature::vmlinux()).expect("a kernel")
}

fn symbol(image: &KernelImage, name: &str) -> u64 {
    image.symbols().only(name).expect("it").0
}

#[test]
fn livepatches_whose_stacks_are_empty_in_a_circle() {
    let (image, mut memory) = (image(), Words::default());
    let offsets = image.offsets().livepatch.expect("offsets");
    const NODE: u64 = 0x10_0000;
    let stack = NODE - offsets.node + offsets.stack;
    memory.set(symbol(&image, "klp_ops"), NODE);
    memory.set(NODE, NODE);
    memory.set(stack, stack);
    let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
    assert_eq!(livepatched(&kernel, &memory), Err(Refusal::BadLivepatches));
    // The list as it should be.
    memory.set(NODE, symbol(&image, "klp_ops"));
    assert_eq!(livepatched(&kernel, &memory), Ok(Vec::new()));
}

#[test]
fn one_budget_is_shared_by_all_walks() {
    let (image, mut memory) = (image(), Words::default());
    let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
    // One probe that is its own next.
    memory.set(symbol(&image, "kprobe_table"), 0x10_0000);
    memory.set(0x10_0000, 0x10_0000);
    let few = Bounded::new(&memory, 10 + 1 + 512 / 64);
    assert_eq!(probes(&kernel, &few), Err(Refusal::TooMuchToRead));
    assert_eq!(livepatched(&kernel, &few), Err(Refusal::TooMuchToRead), "nothing is left");
    let list = symbol(&image, "klp_ops");
    memory.set(list, list);
    assert_eq!(livepatched(&kernel, &Bounded::new(&memory, 1)), Ok(Vec::new()));
}

const MODULE: u64 = 0x10_0000;
const KALLSYMS: u64 = 0x20_0000;
const SYMBOLS: u64 = 0x30_0000;
const NAMES: u64 = 0x40_0000;
const KINDS: u64 = 0x50_0000;
const TEXT: u64 = 0x10_0000_0000;

/// Where the module of a number is, with its tables.
fn place(index: u64) -> u64 {
    MODULE + 0x1000_0000 * index
}

/// So many modules, each with so many functions `a`, `b` and so on, so far from each other.
fn modules(image: &KernelImage, count: u64, functions: u64, size: u64) -> Words {
    let (offsets, mut memory) = (image.offsets().module.expect("offsets"), Words::default());
    let (symtab, number, strtab, typetab) = offsets.symbols;
    let head = symbol(image, "modules");
    memory.set(head, place(0) + offsets.list);
    for index in 0..count {
        let next = if index + 1 == count { head } else { place(index + 1) + offsets.list };
        let at = |table: u64| table - MODULE + place(index);
        memory.set(place(index) + offsets.list, next);
        memory.set(place(index) + offsets.name, u64::from(b'a') + index % 26);
        memory.set(place(index) + offsets.text.0, TEXT + place(index));
        memory.set(place(index) + offsets.text.1, functions * size);
        memory.set(place(index) + offsets.kallsyms, at(KALLSYMS));
        let tables = [(symtab, at(SYMBOLS)), (number, functions), (strtab, at(NAMES)), (typetab, at(KINDS))];
        for (offset, value) in tables {
            memory.set(at(KALLSYMS) + offset, value);
        }
        for function in 0..functions {
            // The name's offset, and section 1.
            memory.set(at(SYMBOLS) + 24 * function, (0x100 + 8 * function) | 1 << 48);
            memory.set(at(SYMBOLS) + 24 * function + 8, TEXT + place(index) + size * function);
            memory.set(at(NAMES) + 0x100 + 8 * function, u64::from(b'a') + function % 26);
            memory.set(at(KINDS) + (function & !7), u64::from_le_bytes([b't'; 8]));
        }
    }
    memory
}

#[test]
fn modules_that_take_too_long_to_read_refuse_every_plan() {
    let image = image();
    let memory = modules(&image, 900, 700, 64);
    let modules = read_modules(&image, 0, &memory);
    let why = modules.all().expect_err("too much").to_string();
    assert!(why.contains("very large"), "{why}");
    let kernel = Kernel { image: &image, slide: 0, modules: &modules };
    let guest = RunningGuest { kernel, text: &memory, vcpus: 1 };
    assert_eq!(targets::list(guest).map_err(|refusal| refusal.code()), Err("bad_modules"));
    let plan = r#"{"version":1,"name":"x","patches":[{"static_key":"key","enable":true}]}"#;
    let plan = Plan::parse(plan.as_bytes()).expect("well-formed");
    let codes = resolve(&plan, guest, []).expect_err("refused");
    assert_eq!(codes[0].refusal.code(), "bad_modules");
}

#[test]
fn a_plan_whose_functions_take_too_long_to_read_is_refused() {
    let image = image();
    let mut memory = modules(&image, 9, 26, 1 << 20);
    let list = symbol(&image, "klp_ops");
    memory.set(list, list);
    let modules = read_modules(&image, 0, &memory);
    assert_eq!(modules.all().map(<[_]>::len), Ok(9));
    let kernel = Kernel { image: &image, slide: 0, modules: &modules };
    let guest = RunningGuest { kernel, text: &memory, vcpus: 1 };
    let codes = |modules: u8| {
        let names = (b'a'..b'a' + modules)
            .flat_map(|module| (b'a'..=b'z').map(move |name| [module, name].map(char::from)));
        let patch = |[module, name]: [char; 2]| {
            format!(r#"{{"at":"{module}:{name}","expect":"0000","replace":"6690"}}"#)
        };
        let patches: Vec<String> = names.map(patch).collect();
        let plan = format!(r#"{{"version":1,"name":"x","patches":[{}]}}"#, patches.join(","));
        let plan = Plan::parse(plan.as_bytes()).expect("well-formed");
        let refused = resolve(&plan, guest, []).err().unwrap_or_default();
        refused.iter().map(|refused| refused.refusal.code()).collect::<Vec<_>>()
    };
    assert_eq!(codes(1), Vec::<&str>::new(), "26 functions of 1 MiB");
    assert_eq!(codes(9), ["too_much_to_read"]);
}
