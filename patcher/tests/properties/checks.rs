//! Properties that hold for any input, shared by the property tests and the fuzz targets.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use std::collections::BTreeSet;

use patcher::addr::Gva;
use patcher::image::symbols::Symbols;
use patcher::image::{Contents, KernelFile, KernelImage, Loadable, unpack};
use patcher::insn;
use patcher::insn::store::{GeneralRegisters, Store};
use patcher::insn::written::{Bitness, written};
use patcher::linux::module_list::read_modules;
use patcher::linux::{GuestMemory, Kernel, Modules};
use patcher::object::replacement::{Return, Running};
use patcher::object::{Change, Layouts, Object, Outcome, Room, build, compare, match_image};
use patcher::plan::{MAX_DEADLINE_MS, MAX_PATCHES, MAX_SITE, Patch, Plan};
use patcher::resolve::{RunningGuest, resolve};

/// Reading a plan ends in a plan within its limits, or in reasons.
pub(crate) fn plan(json: &[u8]) {
    match Plan::parse(json) {
        Err(refused) => assert!(!refused.is_empty(), "refused without a reason"),
        Ok(plan) => {
            assert!((1..=MAX_PATCHES).contains(&plan.patches.len()));
            assert!((1..=MAX_DEADLINE_MS).contains(&plan.deadline_ms));
            for patch in &plan.patches {
                if let Patch::Raw { expect, replace, .. } = patch {
                    assert!(
                        (1..=MAX_SITE).contains(&expect.len()) && (1..=MAX_SITE).contains(&replace.len())
                    );
                }
            }
        }
    }
}

/// The address of the function with random text.
const FUNCTION: Gva = Gva(0xffff_ffff_8100_0000);

/// A function's text, and nothing else.
pub(crate) struct Function<'a>(pub(crate) &'a [u8]);

impl GuestMemory for Function<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        let from = at.offset_from(FUNCTION).ok_or(at)?;
        let bytes = self.0.get(from..from + into.len()).ok_or(at)?;
        into.copy_from_slice(bytes);
        Ok(())
    }
}

/// In any text, an accepted site begins and ends at instruction boundaries, no branch goes into it, and
/// its new code is whole instructions.
pub(crate) fn resolve_in(text: &[u8], offset: usize, length: usize, replace: &[u8]) {
    let expect = text.get(offset..offset + length).unwrap_or(&[]).to_vec();
    if expect.is_empty() || replace.is_empty() {
        return;
    }
    let end = FUNCTION.0 + text.len() as u64;
    let symbols = Symbols::new([(FUNCTION.0, b'T', "f"), (end, b'T', "g")].into_iter()).expect("two symbols");
    let image = KernelImage::from_parts("6.1".into(), symbols, FUNCTION);
    let json = serde_json::json!({ "version": 1, "name": "x", "patches": [
        { "at": format!("f+{offset:#x}"), "expect": insn::hex(&expect), "replace": insn::hex(replace) }] });
    let plan = Plan::parse(json.to_string().as_bytes()).expect("it is well-formed");
    let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
    let Ok(resolved) = resolve(&plan, RunningGuest { kernel, text: &Function(text), vcpus: 1 }, []) else {
        return;
    };
    let site = &resolved.sites[0];
    let insns: Vec<_> = insn::decode(text, FUNCTION).collect();
    let is_boundary = |at: Gva| insns.iter().any(|insn| insn.at == at || insn.at.plus(insn.len) == Some(at));
    assert!(is_boundary(site.at) && is_boundary(site.end()), "{resolved:?}");
    for insn in &insns {
        assert!(!insn.branch.is_some_and(|to| site.at < to && to < site.end()), "{insn:?} {resolved:?}");
    }
    assert_eq!(site.old, expect);
    assert_eq!(site.new.len(), expect.len());
    assert!(site.new.starts_with(replace));
    assert!(insn::count(&site.new, site.at).is_some(), "{resolved:?}");
    // Nothing shows that no task sleeps inside, so no boundary inside may be reachable.
    assert!(site.old_inside.is_empty() && site.new_inside.is_empty(), "{resolved:?}");
}

fn first(code: &[u8], at: Gva) -> Instruction {
    Decoder::with_ip(64, code, at.0, DecoderOptions::NONE).decode()
}

/// Where control leaves `code`, entered at `at`, if its conditions hold (`taken`) or not.
fn leaves(code: &[u8], at: Gva, taken: bool) -> u64 {
    let mut ip = at.0;
    for _ in 0..code.len() {
        let offset = usize::try_from(ip.wrapping_sub(at.0)).unwrap_or(usize::MAX);
        let Some(rest) = code.get(offset..).filter(|rest| !rest.is_empty()) else { return ip };
        let insn = first(rest, Gva(ip));
        ip = match insn.flow_control() {
            FlowControl::UnconditionalBranch => insn.near_branch_target(),
            FlowControl::ConditionalBranch if taken => insn.near_branch_target(),
            _ => insn.next_ip(),
        };
    }
    panic!("{} loops", insn::hex(code));
}

/// A relocated instruction is the same instruction with the same operand addresses and the same
/// successors.
pub(crate) fn relocation(code: &[u8], from: Gva, to: Gva) {
    // What the copy leads to is never in the memory of copies.
    const LONGEST: u64 = 64;
    let old = first(code, from);
    let in_copy = |at: u64| at.wrapping_sub(to.0) < LONGEST;
    if old.is_invalid() || in_copy(old.next_ip()) || in_copy(old.near_branch_target()) {
        return;
    }
    let code = &code[..old.len()];
    let Some(moved) = insn::relocate(code, from, to) else { return };
    let new = first(&moved, to);
    let back = insn::decode(&moved, to).last().expect("a jump back");
    assert_eq!(back.branch, Some(Gva(old.next_ip())), "it leads elsewhere");
    assert!(insn::count(&moved, to).is_some());
    match old.flow_control() {
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
            // The longer form may be several instructions.
            let conditional = old.flow_control() == FlowControl::ConditionalBranch;
            let untaken = if conditional { old.next_ip() } else { old.near_branch_target() };
            let moves = format!("{} -> {}", insn::hex(code), insn::hex(&moved));
            assert_eq!(leaves(&moved, to, true), old.near_branch_target(), "{moves}");
            assert_eq!(leaves(&moved, to, false), untaken, "{moves}");
            assert_eq!((old.mnemonic(), old.rflags_read()), (new.mnemonic(), new.rflags_read()), "{moves}");
        }
        flow => {
            if flow == FlowControl::Next {
                assert_eq!(leaves(&moved, to, false), old.next_ip());
            }
            assert_eq!(old.mnemonic(), new.mnemonic(), "{} -> {}", insn::hex(code), insn::hex(&moved));
            assert_eq!(old.op_count(), new.op_count());
            for i in 0..old.op_count() {
                assert_eq!(old.op_kind(i), new.op_kind(i));
                match old.op_kind(i) {
                    OpKind::Register => assert_eq!(old.op_register(i), new.op_register(i)),
                    OpKind::Memory if old.is_ip_rel_memory_operand() => {
                        assert_eq!(old.ip_rel_memory_address(), new.ip_rel_memory_address());
                    }
                    OpKind::Memory => {
                        assert_eq!(old.memory_base(), new.memory_base());
                        assert_eq!(old.memory_index(), new.memory_index());
                        assert_eq!(old.memory_index_scale(), new.memory_index_scale());
                        assert_eq!(old.memory_displacement64(), new.memory_displacement64());
                        assert_eq!(old.segment_prefix(), new.segment_prefix());
                    }
                    _ => assert_eq!(old.try_immediate(i).ok(), new.try_immediate(i).ok()),
                }
            }
            let prefixes =
                |insn: &Instruction| (insn.has_lock_prefix(), insn.has_rep_prefix(), insn.has_repne_prefix());
            assert_eq!(prefixes(&old), prefixes(&new));
        }
    }
}

/// Emulating a store changes the instruction pointer and the registers of string instructions, and no others;
/// it comes to an end after as many elements as RCX says.
pub(crate) fn store(input: &[u8]) {
    let Some((code, numbers)) = input.split_at_checked(insn::MAX_LENGTH) else { return };
    let mut words = numbers.chunks(8).map(|bytes| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    });
    let mut word = || words.next().unwrap_or(0);
    let general = [(); 16].map(|()| word());
    // Without TF, with which nothing is emulated.
    let before = GeneralRegisters { general, flags: word() & !0x100, rip: word(), fs: word(), gs: word() };
    for bitness in [Bitness::Bits16, Bitness::Bits32, Bitness::Bits64] {
        let _ = written(code, bitness, &before, [1, 2, 3, 4]);
    }
    let Some(store) = Store::decode(code, &before) else { return };
    assert!([1, 2, 4, 8].contains(&store.width));
    let mut after = before;
    store.step(&mut after);
    assert!(after.rip.wrapping_sub(before.rip) <= 15);
    // RCX, RSI and RDI of string instructions.
    let differ = |register: &usize| before.general[*register] != after.general[*register];
    for register in (0..16).filter(differ) {
        assert!([1, 6, 7].contains(&register), "{register} by {code:02x?}");
    }
    if after.rip == before.rip {
        assert!(before.general[1] > 1, "{code:02x?} goes on, but had one element left at most");
        assert_eq!(after.general[1], before.general[1] - 1);
    }
    assert_eq!((after.flags, after.fs, after.gs), (before.flags, before.fs, before.gs));
}

/// Decompressing ends: any bytes behind the magic number of the method that the first byte says, as a file
/// and as the payload of a bzImage.
pub(crate) fn compressed(input: &[u8]) {
    const MAGIC: [&[u8]; 8] = [
        b"\x1f\x8b\x08",
        b"BZh9",
        b"\x5d\0\0",
        b"\xfd7zXZ\0",
        b"\x89LZO\0\r\n\x1a\n",
        b"\x02\x21\x4c\x18",
        b"\x04\x22\x4d\x18",
        b"\x28\xb5\x2f\xfd",
    ];
    let Some((method, rest)) = input.split_first() else { return };
    let packed = [MAGIC[usize::from(*method & 7)], rest].concat();
    let told = |file: &[u8]| match unpack(file) {
        Ok(elf) => assert!(elf.starts_with(b"\x7fELF")),
        Err(error) => assert!(!error.to_string().is_empty()),
    };
    told(&packed);
    let mut file = vec![0; 2 * 512];
    file[0x1f1] = 1;
    file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    (file[0x211], file[0x236]) = (1, 1);
    file[0x24c..0x250].copy_from_slice(&u32::try_from(packed.len()).expect("small").to_le_bytes());
    told(&[file, packed].concat());
}

/// Reading any file ends, and the result can be listed.
pub(crate) fn image(file: &[u8]) {
    if let Ok(KernelFile::Vmlinux(elf)) = KernelFile::open(file)
        && let Ok(loadable) = Loadable::parse(&elf)
    {
        assert!(loadable.segments.iter().all(|segment| segment.bytes.len() as u64 <= segment.size));
    }
    let Ok(image) = KernelImage::parse(file) else { return };
    assert!(!image.symbols().is_empty());
    let keys = image.static_keys();
    assert_eq!(keys.is_empty(), image.tables().jump_entries.as_ref().is_none_or(Vec::is_empty));
    let _ = (image.static_calls(), image.tables().feature_counts());
    for (_, to) in image.landings().iter() {
        // A site may begin there, but not before it and end behind it.
        assert!(!image.symbols().is_at(to) && image.landings().inside(to, Gva(to.0 + 1)).is_none());
        assert!(image.landings().inside(Gva(to.0 - 1), Gva(to.0 + 1)).is_some());
    }
}

/// Guest memory in which every address maps to a byte of `memory`, or is unmapped if that byte is
/// `hole`: cyclic lists, overlapping tables, unterminated names.
pub(crate) struct Anywhere<'a> {
    hole: u8,
    memory: &'a [u8],
}

impl<'a> Anywhere<'a> {
    /// The first byte is the hole. `None` when there is no memory.
    pub(crate) fn new(input: &'a [u8]) -> Option<Self> {
        let (&hole, memory) = input.split_first()?;
        (!memory.is_empty()).then_some(Self { hole, memory })
    }
}

impl GuestMemory for Anywhere<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        for (i, byte) in into.iter_mut().enumerate() {
            let at = at.plus(i).ok_or(at)?;
            let index = usize::try_from(at.0 % (self.memory.len() as u64)).map_err(|_| at)?;
            *byte = *self.memory.get(index).filter(|byte| **byte != self.hole).ok_or(at)?;
        }
        Ok(())
    }
}

/// With any guest memory, modules are read or refused, targets are listed, and every kind of patch is
/// resolved or refused. Nothing hangs.
pub(crate) fn live(image: &KernelImage, input: &[u8]) {
    const PATCHES: [&str; 10] = [
        r#"{"static_key":"key","enable":true}"#,
        r#"{"static_key":"key","enable":false}"#,
        r#"{"static_call":"call","target":"none"}"#,
        r#"{"alternatives":"popcnt","enable":true}"#,
        r#"{"alternatives":"0*32+20","enable":false}"#,
        r#"{"smp_locks":false}"#,
        r#"{"paravirt":"spinlocks","to":"native"}"#,
        r#"{"redirect":"function","to":"f0"}"#,
        r#"{"redirect":"_text+0x10","to":"f0,1"}"#,
        r#"{"redirect":"mod-ule:f,1","to":"module:f,2","keep_fentry":true}"#,
    ];
    let Some(text) = Anywhere::new(input) else { return };
    let modules = read_modules(image, 0, &text);
    let guest = RunningGuest { kernel: Kernel { image, slide: 0, modules: &modules }, text: &text, vcpus: 1 };
    let _ = patcher::resolve::targets::list(guest);
    // What is there, of one instruction and of several, at the beginning of each module's text.
    let raw = |at: Gva, length: usize| {
        let mut found = vec![0; length];
        text.read(at, &mut found).ok()?;
        let (expect, replace) = (insn::hex(&found), insn::hex(&insn::nops(length)));
        Some(format!(r#"{{"at":"{at}","expect":"{expect}","replace":"{replace}"}}"#))
    };
    let starts = modules.known().iter().take(1).map(|module| module.text.start);
    let of_modules: Vec<String> = starts
        .flat_map(|start| {
            [1, 2, 5].into_iter().filter_map(move |length| raw(Gva(start.0.wrapping_add(5)), length))
        })
        .collect();
    for patch in PATCHES.into_iter().chain(of_modules.iter().map(String::as_str)) {
        let plan = format!(r#"{{"version":1,"name":"x","patches":[{patch}]}}"#);
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        if let Ok(resolved) = resolve(&plan, guest, []) {
            for site in &resolved.sites {
                let mut found = vec![0; site.old.len()];
                assert!(text.read(site.at, &mut found).is_ok() && found == site.old, "{resolved:?}");
                assert!(site.old.len() == site.new.len() && insn::count(&site.new, site.at).is_some());
            }
        }
    }
}

/// What is made of an object and itself, if anything, fits into fields, and stays in its room.
fn place(object: &Object<'_>, image: &KernelImage, contents: &Contents<'_>) {
    const START: u64 = 0xffff_ffff_fea0_0000;
    let Ok(replacement) = build(object, object, image, contents) else { return };
    let part = |number: u64| Gva(START + number * 0x20_0000)..Gva(START + (number + 1) * 0x20_0000);
    let room = Room { code: part(0), constants: part(1), data: part(2), bugs: None, description: None };
    let running = Running { slide: 0, returns: Some(Return::Plain), features: &BTreeSet::new() };
    let Ok(placed) = replacement.place(&room, running) else { return };
    for piece in &placed.pieces {
        let end = piece.at.plus(piece.bytes.len()).expect("an address");
        assert!(Gva(START) <= piece.at && end <= room.data.end, "{piece:x?}");
        assert!(!piece.is_code || end <= room.code.end, "{piece:x?}");
    }
}

/// Any file is read as an object or refused; compared with itself nothing is new or gone; what matches a kernel is
/// where a symbol is.
pub(crate) fn object(file: &[u8], vmlinux: &[u8], image: &KernelImage) {
    if let Ok(layouts) = Layouts::read(file) {
        assert_eq!(layouts.changes(&layouts), []);
    }
    let Ok(object) = Object::parse(file) else { return };
    if let Ok(found) = compare(&object, &object) {
        assert!(
            found
                .functions
                .values()
                .chain(found.data.values())
                .all(|change| { matches!(change, Change::Unchanged | Change::Changed) })
        );
    }
    let contents = Contents::parse(vmlinux).expect("a kernel");
    place(&object, image, &contents);
    let Ok(found) = match_image(&object, image, &contents) else { return };
    assert_eq!(found.functions.len(), object.functions().len());
    for (function, found) in object.functions().iter().zip(&found.functions) {
        let Outcome::Matches { at } = found.outcome else { continue };
        assert!(contents.bytes(at, found.size).is_some() && found.size <= function.bytes.len());
        assert!(image.symbols().is_at(at) || function.weak);
    }
}
