//! A search through real kernels: no accepted site has in its inside a place that execution may arrive at
//! by the kernel's tables, its data, or another function. The places are collected here by a second way,
//! from the file. `docs/kernel.md` publishes the counts.
//!
//! The kernels are those that the whole-VM tests have fetched (`~/.cache/vmm-rig`), or the files that
//! `LANDINGS_KERNELS` names, separated by colons.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSegment};
use patcher::addr::Gva;
use patcher::image::{KernelImage, unpack};
use patcher::linux::{GuestMemory, Kernel, Modules};
use patcher::plan::{MAX_PATCHES, Patch, Plan, Strategy};
use patcher::resolve::{RunningGuest, resolve};

/// Bytes before a place in which sites begin.
const BEFORE: u64 = 16;
/// How many ends behind a place are tried for each beginning.
const ENDS: usize = 2;

fn kernels() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("LANDINGS_KERNELS") {
        return std::env::split_paths(&named).collect();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let entries = |folder: PathBuf| {
        let paths = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        paths.collect::<Vec<_>>()
    };
    let name =
        |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut found = Vec::new();
    for folder in cache.map(|cache| entries(cache.join("vmm-rig"))).into_iter().flatten() {
        if name(&folder).starts_with("kernel-") {
            found.extend(
                entries(folder.join("boot")).into_iter().filter(|path| name(path).starts_with("vmlinuz-")),
            );
            let modules =
                entries(folder.join("usr/lib/modules")).into_iter().map(|path| path.join("vmlinuz"));
            found.extend(modules.filter(|path| path.exists()));
        }
    }
    found.sort();
    found
}

/// The file as the memory of a guest that KASLR has not moved, whose functions are not traced and whose
/// kernel does not preempt tasks in kernel mode.
struct Memory {
    segments: Vec<(u64, Vec<u8>)>,
}

impl Memory {
    fn new(vmlinux: &[u8], image: &KernelImage) -> Self {
        let elf = ElfFile64::<Endianness>::parse(vmlinux).expect("an ELF file");
        let segments = elf.segments().map(|segment| {
            let mut bytes = segment.data().expect("its bytes").to_vec();
            bytes.resize(usize::try_from(segment.size()).expect("64 bits"), 0);
            (segment.address(), bytes)
        });
        let mut memory = Self { segments: segments.collect() };
        for at in image.tables().mcount_locations.iter().flatten() {
            memory.put(at.0, &[0x0f, 0x1f, 0x44, 0, 0]);
        }
        if let Some(mode) = image.symbols().only("preempt_dynamic_mode") {
            memory.put(mode.0, &1_u32.to_le_bytes());
        }
        memory
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let segment = |(start, all): &&mut (u64, Vec<u8>)| (*start..*start + all.len() as u64).contains(&at);
        // The entries of weak functions that were overridden are 0.
        let Some((start, all)) = self.segments.iter_mut().find(segment) else { return };
        let from = usize::try_from(at - *start).expect("64 bits");
        all[from..from + bytes.len()].copy_from_slice(bytes);
    }

    fn bytes(&self, at: u64, size: usize) -> Option<&[u8]> {
        self.segments.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(at.checked_sub(*start)?).ok()?;
            bytes.get(from..from.checked_add(size)?)
        })
    }
}

impl GuestMemory for Memory {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        into.copy_from_slice(self.bytes(at.0, into.len()).ok_or(at)?);
        Ok(())
    }
}

/// The functions of the kernel's text, each from its symbol to the next.
fn functions(image: &KernelImage) -> Vec<(u64, u64)> {
    let end = image.symbols().only("_etext").expect("the text's end").0;
    let all: BTreeSet<u64> = image.symbols().iter().map(|(at, ..)| at.0).collect();
    let starts: Vec<u64> = all.range(image.text_base().0..=end).copied().collect();
    starts.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Every place inside a function that something leads to, with what it is that does.
fn places(image: &KernelImage, memory: &Memory, functions: &[(u64, u64)]) -> BTreeMap<u64, &'static str> {
    let mut found: BTreeMap<u64, &'static str> = BTreeMap::new();
    let inside = |to: u64| {
        let function =
            functions.partition_point(|(start, _)| *start <= to).checked_sub(1).map(|at| functions[at]);
        function.filter(|(start, end)| *start < to && to < *end).is_some()
    };
    let mut add = |to: u64, what| {
        if inside(to) {
            found.entry(to).or_insert(what);
        }
    };
    let tables = image.tables();
    tables.jump_entries.iter().flatten().for_each(|entry| add(entry.target.0, "static key"));
    let table = |start: &str, stop: &str| {
        let (start, stop) = (image.symbols().only(start)?.0, image.symbols().only(stop)?.0);
        Some((start, memory.bytes(start, usize::try_from(stop - start).ok()?)?))
    };
    let (at, exceptions) = table("__start___ex_table", "__stop___ex_table").expect("exceptions");
    for (entry, at) in exceptions.as_chunks::<12>().0.iter().zip((at..).step_by(12)) {
        let distance = i32::from_le_bytes(entry[4..8].try_into().expect("four bytes"));
        add((at + 4).wrapping_add_signed(distance.into()), "exception");
    }
    let mut code = Instruction::default();
    for entry in tables.alternatives.iter().flatten() {
        for (bytes, start) in [(&entry.original, entry.at.0), (&entry.replacement, entry.replacement_at.0)] {
            let mut decoder = Decoder::with_ip(64, bytes, start, DecoderOptions::NONE);
            while decoder.can_decode() {
                decoder.decode_out(&mut code);
                let to = code.near_branch_target();
                if to != 0 && to.wrapping_sub(start) >= bytes.len() as u64 {
                    add(to, "alternative");
                }
            }
        }
    }
    for &(start, end) in functions {
        let bytes = memory.bytes(start, usize::try_from(end - start).expect("64 bits")).expect("text");
        let mut decoder = Decoder::with_ip(64, bytes, start, DecoderOptions::NONE);
        while decoder.can_decode() {
            decoder.decode_out(&mut code);
            // Behind what is no instruction nothing is known, and no site is accepted.
            if code.is_invalid() {
                break;
            }
            let to = code.near_branch_target();
            if to != 0 && !(start..end).contains(&to) {
                add(to, "another function");
            }
            // What `iretq` goes to: sync_core().
            if code.op_count() > 0
                && code.op0_kind() == OpKind::Immediate32to64
                && code.mnemonic() == iced_x86::Mnemonic::Push
            {
                add(code.immediate(0), "pushed address");
            }
        }
    }
    for (at, kind, name) in image.symbols().iter() {
        if name.starts_with("jumptable") && kind != b't' {
            let end = image.symbols().after(at).expect("a next symbol");
            let words = memory.bytes(at.0, end.offset_from(at).expect("behind")).expect("data").as_chunks().0;
            words.iter().for_each(|word| add(u64::from_le_bytes(*word), "jump table"));
        }
    }
    found
}

/// The instructions' beginnings and ends in a function.
fn boundaries(memory: &Memory, (start, end): (u64, u64)) -> Vec<u64> {
    let bytes = memory.bytes(start, usize::try_from(end - start).expect("64 bits")).expect("text");
    patcher::insn::decode(bytes, Gva(start))
        .flat_map(|insn| [insn.at.0, insn.at.0 + insn.len as u64])
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

fn plan(strategy: Strategy, patches: Vec<Patch>) -> Plan {
    Plan {
        strategy,
        patches,
        ..Plan::parse(br#"{"version":1,"name":"x","patches":[{"smp_locks":true}]}"#).expect("a plan")
    }
}

/// How many of these patches are refused, by code; and those that are accepted.
fn judge(
    guest: RunningGuest<'_>,
    patches: &[Patch],
    codes: &mut BTreeMap<&'static str, usize>,
) -> Vec<Patch> {
    let mut accepted = Vec::new();
    for patches in patches.chunks(MAX_PATCHES) {
        let refused = resolve(&plan(Strategy::Auto, patches.to_vec()), guest, []).err().unwrap_or_default();
        let mut of_each: BTreeMap<&str, &'static str> = BTreeMap::new();
        for refused in &refused {
            // Those that overlap another one of the plan were accepted.
            if refused.refusal.code() != "overlapping_sites" {
                of_each.entry(refused.pointer.as_str()).or_insert(refused.refusal.code());
            }
        }
        for (index, patch) in patches.iter().enumerate() {
            match of_each.get(format!("/patches/{index}").as_str()) {
                Some(code) => *codes.entry(code).or_default() += 1,
                None => accepted.push(patch.clone()),
            }
        }
    }
    accepted
}

#[test]
fn no_accepted_site_has_inside_what_something_leads_to() {
    let kernels = kernels();
    if kernels.is_empty() {
        eprintln!("no kernel was fetched yet; `cargo test -p tests --test vm` does");
    }
    for path in kernels {
        let file = std::fs::read(&path).expect("a kernel");
        let image = KernelImage::parse(&file).expect("a kernel");
        let memory = Memory::new(&unpack(&file).expect("a kernel"), &image);
        let functions = functions(&image);
        let places = places(&image, &memory, &functions);
        let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        let guest = RunningGuest { kernel, text: &memory, vcpus: 1 };

        let (mut patches, mut kinds) = (Vec::new(), BTreeMap::<&str, usize>::new());
        let mut decoded = ((0, 0), Vec::new());
        for (&place, kind) in &places {
            *kinds.entry(kind).or_default() += 1;
            let function = functions[functions.partition_point(|(start, _)| *start <= place) - 1];
            if decoded.0 != function {
                decoded = (function, boundaries(&memory, function));
            }
            let (before, behind) = decoded.1.split_at(decoded.1.partition_point(|at| *at < place));
            let behind = behind.iter().filter(|at| **at > place).take(ENDS);
            for (&from, &to) in before
                .iter()
                .filter(|at| **at + BEFORE >= place)
                .flat_map(|from| behind.clone().map(move |to| (from, to)))
            {
                let expect =
                    memory.bytes(from, usize::try_from(to - from).expect("small")).expect("text").to_vec();
                // Other than what is there, and of the same length.
                let replace = [
                    &[if expect[0] == 0xf8 { 0xf9 } else { 0xf8 }],
                    &patcher::insn::nops(expect.len() - 1)[..],
                ]
                .concat();
                let at = image.symbols().from_first(Gva(from)).expect("behind _text");
                patches.push(Patch::Raw { at, expect, replace });
            }
        }
        let mut codes = BTreeMap::new();
        let accepted = judge(guest, &patches, &mut codes);
        println!("{}: {} places {kinds:?}", image.release(), places.len());
        println!("  {} sites around them, {} accepted, refused {codes:?}", patches.len(), accepted.len());
        assert!(
            places.len() > 5000 && patches.len() > 20_000,
            "{} places, {} sites",
            places.len(),
            patches.len()
        );
        assert!(
            accepted.is_empty(),
            "{} sites are accepted: {:?}",
            accepted.len(),
            &accepted[..accepted.len().min(5)]
        );

        // Two places of each function: of the fentry call, and behind it.
        let text = |at: u64| image.symbols().from_first(Gva(at)).expect("behind _text");
        let to = text(functions[functions.len() / 2].0);
        for keep_fentry in [false, true] {
            let redirect =
                |(from, _): &(u64, u64)| Patch::Redirect { from: text(*from), to: to.clone(), keep_fentry };
            let traced =
                |(start, _): &&(u64, u64)| [0, 4].iter().any(|skip| kernel.is_fentry(Gva(start + skip)));
            let patches: Vec<Patch> = functions.iter().filter(traced).map(redirect).collect();
            let mut codes = BTreeMap::new();
            let accepted = judge(guest, &patches, &mut codes);
            let mut several = 0;
            for patches in accepted.chunks(MAX_PATCHES) {
                let resolved =
                    resolve(&plan(Strategy::Auto, patches.to_vec()), guest, []).expect("each was accepted");
                for site in &resolved.sites {
                    let inside = places.range(site.at.0 + 1..site.end().0).next();
                    assert!(inside.is_none(), "{inside:?} in {site:?}");
                    several += usize::from(!site.old_inside.is_empty());
                }
            }
            println!(
                "  {} redirects, keep_fentry {keep_fentry}: {} accepted, {several} of them of several instructions, refused {codes:?}",
                patches.len(),
                accepted.len()
            );
            assert!(accepted.len() > 10_000, "{codes:?}");
        }
    }
}
