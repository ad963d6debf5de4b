//! New code refers to the same things as the object, wherever the linker put them; what can't be brought into a
//! running kernel is refused.

use std::collections::BTreeSet;

use patcher::addr::Gva;
use patcher::image::{Contents, KernelImage};
use patcher::insn;
use patcher::linux::Kernel;
use patcher::linux::module_list::read_modules;
use patcher::object::replacement::{Placed, PlacedPiece, Return, Running, Unplaceable};
use patcher::object::{
    BUG_ENTRY, Description, FAULT_ENTRY, FRAME_ENTRY, FUNCTION_ENTRY, Object, Obstacle, Replacement, Room,
    Table, Unfit, build,
};
use patcher::plan::Plan;
use patcher::resolve::{RunningGuest, Supplies, resolve_with};
use proptest::prelude::*;

use crate::capabilities::Booted;
use crate::miniature;
use crate::sources::{ABSOLUTE, CALL, FAR, Kind, Linked, NEAR, Part, SIGNED, Source, UNSIGNED};

const SLIDE: u64 = 0x20_0000;
const PAGES: u64 = 0xffff_ffff_fee0_0000;
const LEFT: u64 = 0xffff_ffff_8200_0000;
const RIGHT: u64 = LEFT + 0x100;
const PER_CPU: u64 = 0x1_2340;
const ELSEWHERE: [(&str, u64); 5] = [
    ("left", LEFT),
    ("right", RIGHT),
    ("per_cpu", PER_CPU),
    ("__x86_return_thunk", LEFT + 0x200),
    ("_end", 0xffff_ffff_8300_0000),
];
/// What is told of new code.
const TABLES: [&str; 6] =
    ["__bug_table", "__ex_table", ".orc_unwind_ip", ".orc_unwind", ".symtab", ".strtab"];
/// `call __fentry__` has become a NOP.
const ENTRY: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

fn code(instructions: &[&[u8]]) -> Vec<u8> {
    instructions.concat()
}

/// Functions of a file before a change: `main` calls `helper`, both use what they share.
fn before() -> Source {
    Source {
        parts: vec![
            Part::function(
                "main",
                &code(&[&ENTRY, &[0xe8, 0, 0, 0, 0], &[0x8b, 0x05, 0, 0, 0, 0], &[0xe9, 0, 0, 0, 0]]),
                &[(6, CALL, "helper", -4), (12, NEAR, "counter", -4), (17, CALL, "__x86_return_thunk", -4)],
            )
            .global(),
            Part::function(
                "helper",
                &code(&[&ENTRY, &[0x48, 0xc7, 0xc0, 0, 0, 0, 0], &[0xe8, 0, 0, 0, 0], &[0xe9, 0, 0, 0, 0]]),
                &[(8, SIGNED, "table", 0), (13, CALL, "left", -4), (18, CALL, "__x86_return_thunk", -4)],
            ),
            Part::function("user", &code(&[&[0xe8, 0, 0, 0, 0], &[0xc3]]), &[(1, CALL, "main", -4)]).global(),
            Part::new("counter", ".data", Kind::Data, &[7, 0, 0, 0], &[]),
            // It is freed once the kernel is up, and something else is there then.
            Part::new(
                "start",
                ".init.text",
                Kind::Function,
                &[0xe9, 0, 0, 0, 0],
                &[(1, CALL, "__x86_return_thunk", -4)],
            ),
            Part::new("table", ".data", Kind::Data, &[0; 8], &[(0, ABSOLUTE, "helper", 0)]),
            // The number of a type; a preprocessor has counted 7 uses of its counter before it.
            Part::new("__BTF_ID__struct__type__7", ".BTF_ids", Kind::Data, &[0; 4], &[]),
            Part::new("ops", ".data", Kind::Data, &[0; 8], &[(0, ABSOLUTE, "__BTF_ID__struct__type__7", 0)]),
        ],
        strings: vec!["old".into()],
    }
}

/// The same with `main` changed: it has a new function, a new string and new variables, and a piece for errors.
fn after() -> Source {
    let mut source = before();
    source.parts[0] = Part::function(
        "main",
        &code(&[
            &ENTRY,
            &[0x0f, 0x85, 0, 0, 0, 0],             // jne main.cold
            &[0xe8, 0, 0, 0, 0],                   // call fresh
            &[0xe8, 0, 0, 0, 0],                   // call helper
            &[0x8b, 0x05, 0, 0, 0, 0],             // mov eax, [counter]
            &[0x65, 0x8b, 0x04, 0x25, 0, 0, 0, 0], // mov eax, gs:[per_cpu]
            &[0xc7, 0x05, 0, 0, 0, 0, 1, 0, 0, 0], // mov dword [state], 1
            &[0x48, 0xc7, 0xc7, 0, 0, 0, 0],       // mov rdi, string
            &[0x48, 0xc7, 0xc6, 0, 0, 0, 0],       // mov rsi, main
            &[0xe9, 0, 0, 0, 0],                   // jmp __x86_return_thunk
        ]),
        &[
            (7, NEAR, "main.cold", -4),
            (12, CALL, "fresh", -4),
            (17, CALL, "helper", -4),
            (23, NEAR, "counter", -4),
            (31, SIGNED, "per_cpu", 0),
            (37, NEAR, "state", -8),
            (48, SIGNED, ".LC1", 0),
            (55, SIGNED, "main", 0),
            (60, CALL, "__x86_return_thunk", -4),
        ],
    )
    .global();
    source.parts.extend([
        Part::new(
            "main.cold",
            ".text.unlikely",
            Kind::Function,
            &code(&[&[0xe8, 0, 0, 0, 0], &[0xe9, 0, 0, 0, 0]]),
            &[(1, CALL, "right", -4), (6, NEAR, "main", 11 - 4)],
        ),
        Part::function("fresh", &code(&[&[0xe8, 0, 0, 0, 0], &[0xc3]]), &[(1, CALL, "main", -4)]),
        Part::new("state", ".bss", Kind::Data, &[0; 16], &[]),
        Part::new("names", ".data", Kind::Data, &[0; 8], &[(0, ABSOLUTE, ".LC1", 0)]),
    ]);
    source.parts[8].fields[0].to = "right".into();
    source.parts[6].name = "__BTF_ID__struct__type__9".into();
    source.parts[7].fields[0].to = "__BTF_ID__struct__type__9".into();
    source.strings.push("new".into());
    source
}

fn room() -> Room {
    let part = |number: u64| Gva(PAGES + number * 0x1000)..Gva(PAGES + (number + 1) * 0x1000);
    let table = |number: u64, used, most| Table {
        at: Gva(PAGES + 0x3000 + number * 0x1000),
        count: Gva(PAGES + 0x9000 + number * 8),
        used,
        most,
    };
    let names = part(8);
    let description = Description {
        faults: table(1, 2, 6),
        frames: Some((table(2, 1, 40), Gva(PAGES + 0x6000))),
        functions: table(4, 1, 8),
        names: (names.start, Gva(names.start.0 + 1)..names.end),
    };
    let bugs = Some(table(0, 3, 5));
    Room { code: part(0), constants: part(1), data: part(2), bugs, description: Some(description) }
}

fn built(before: &Source, after: &Source, linked: &Linked) -> Result<Replacement, Vec<Unfit>> {
    let (image, file) = linked.image();
    built_in(&before.object(true), &after.object(true), &image, &file)
}

fn built_in(
    before: &[u8],
    after: &[u8],
    image: &KernelImage,
    file: &[u8],
) -> Result<Replacement, Vec<Unfit>> {
    let contents = Contents::parse(file).expect("a kernel");
    let (before, after) =
        (Object::parse(before).expect("an object"), Object::parse(after).expect("an object"));
    build(&before, &after, image, &contents)
}

fn placed(replacement: &Replacement) -> Placed {
    placed_with(replacement, &[])
}

fn placed_with(replacement: &Replacement, features: &[u16]) -> Placed {
    running(replacement, Some(Return::Plain), features).expect("room")
}

fn running(
    replacement: &Replacement,
    returns: Option<Return>,
    features: &[u16],
) -> Result<Placed, Unplaceable> {
    let features: BTreeSet<u16> = features.iter().copied().collect();
    replacement.place(&room(), Running { slide: SLIDE, returns, features: &features })
}

fn piece<'p>(placed: &'p Placed, name: &str) -> &'p PlacedPiece {
    placed.pieces.iter().find(|piece| piece.name == name).unwrap_or_else(|| panic!("no {name}: {placed:x?}"))
}

/// The address that four bytes of a piece say, as a number or as the distance from `end`.
fn said(piece: &PlacedPiece, offset: usize, end: Option<usize>) -> u64 {
    let field: [u8; 4] = piece.bytes[offset..offset + 4].try_into().expect("four bytes");
    let base = end.map_or(0, |end| piece.at.0 + end as u64);
    base.wrapping_add(i64::from(i32::from_le_bytes(field)).cast_unsigned())
}

#[test]
fn new_code_refers_to_the_same_things_as_its_object() {
    let (before, after) = (before(), after());
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let old = |name: &str| miniature::BASE + linked.offset(name) as u64 + SLIDE;
    let replacement = built(&before, &after, &linked).expect("it can be replaced");
    let placed = placed(&replacement);
    let main = piece(&placed, "main");
    assert_eq!(placed.functions, [("main".to_owned(), Gva(old("main")), main.at)]);
    let (cold, fresh) = (piece(&placed, "main.cold"), piece(&placed, "fresh"));
    let (state, strings) = (piece(&placed, "state"), piece(&placed, ".rodata.str1.1"));
    let mut names: Vec<&str> = placed.pieces.iter().map(|piece| piece.name.as_str()).collect();
    names.sort_unstable();
    names.retain(|name| !TABLES.contains(name));
    assert_eq!(names, [".rodata.str1.1", "fresh", "main", "main.cold", "state"], "nothing else goes along");
    for (what, said, expected) in [
        ("its cold piece", said(main, 7, Some(11)), cold.at.0),
        ("a new function", said(main, 12, Some(16)), fresh.at.0),
        ("an unchanged function", said(main, 17, Some(21)), old("helper")),
        ("an unchanged variable", said(main, 23, Some(27)), old("counter")),
        ("a variable of each CPU", said(main, 31, None), PER_CPU),
        ("a new variable", said(main, 37, Some(45)), state.at.0),
        ("a new string", said(main, 48, None), strings.at.0 + 4),
        ("its own address", said(main, 55, None), main.at.0),
        ("another object's", said(cold, 1, Some(5)), RIGHT + SLIDE),
        ("the place behind the branch", said(cold, 6, Some(10)), main.at.0 + 11),
        ("the new function", said(fresh, 1, Some(5)), main.at.0),
    ] {
        assert_eq!(said, expected, "{what}: {said:#x}, not {expected:#x}");
    }
    assert_eq!(main.bytes[59..64], [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
    assert_eq!((&strings.bytes[4..8], &state.bytes[..]), (&b"new\0"[..], &[0; 16][..]));
    assert!([main, cold, fresh].iter().all(|piece| piece.is_code));
    // Returns of the old functions: the jumps at the end of each.
    let returns: Vec<u64> = replacement.returns().iter().map(|at| at.0 + SLIDE).collect();
    assert_eq!(returns, [old("main") + 16, old("helper") + 17]);
}

/// A loop that counts down ends at the place before an array.
#[test]
fn a_place_before_an_array_is_of_that_array() {
    let (before, mut after) = (before(), after());
    after.parts[9].bytes = code(&[&[0x48, 0xc7, 0xc7, 0, 0, 0, 0], &[0xc3]]);
    after.parts[9].fields = Part::function("", &[], &[(3, SIGNED, ".rodata.array", -8)]).fields;
    after.parts.push(Part::new("array", ".rodata", Kind::Data, &[1; 16], &[]));
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let placed = placed(&built(&before, &after, &linked).expect("it can be replaced"));
    assert_eq!(said(piece(&placed, "fresh"), 3, None), piece(&placed, "array").at.0 - 8);
}

/// A table may keep an address after the patch is reverted.
#[test]
fn the_address_of_a_replaced_function_is_the_old_one() {
    let (before, mut after) = (before(), after());
    after.parts[9].bytes = code(&[&[0x48, 0xc7, 0xc7, 0, 0, 0, 0], &[0xc3]]);
    after.parts[9].fields = Part::function("", &[], &[(3, SIGNED, "main", 0)]).fields;
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let placed = placed(&built(&before, &after, &linked).expect("it can be replaced"));
    let expected = miniature::BASE + linked.offset("main") as u64 + SLIDE;
    assert_eq!(said(piece(&placed, "fresh"), 3, None), expected);
}

/// With IBT an indirect branch may lead only to `endbr64`, which the compiler leaves out where no address is taken, and
/// the kernel overwrites where it sees none taken.
#[test]
fn an_address_is_taken_only_of_what_may_be_entered_so() {
    const MARKED: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    let outer = |name: &str, start: [u8; 4]| Part::function(name, &code(&[&start, &[0xc3]]), &[]).global();
    let others =
        Source { parts: vec![outer("marked", MARKED), outer("unmarked", [0x90; 4])], ..Source::default() };
    let taking = |name: &str| {
        let mut source = after();
        source.parts[9].bytes = code(&[&[0x48, 0xc7, 0xc7, 0, 0, 0, 0], &[0xc3]]);
        source.parts[9].fields = Part::function("", &[], &[(3, SIGNED, name, 0)]).fields;
        source
    };
    let before = before();
    let linked = Linked::new(&[&others, &before], &ELSEWHERE);
    for (name, expected) in [("marked", true), ("unmarked", false), ("helper", false)] {
        let replacement = built(&before, &taking(name), &linked).expect("it can be replaced");
        let at = Gva(miniature::BASE + linked.offset(name) as u64);
        assert_eq!(replacement.taken().contains(&at), expected, "{name}: {:?}", replacement.taken());
    }
    let mut source = taking("helper");
    source.parts[1].bytes[..5].copy_from_slice(&code(&[&MARKED, &[0x90]]));
    let unfit = built(&before, &source, &linked).expect_err("the kernel's has no mark");
    assert!(
        matches!(&unfit[..], [Unfit::Unresolved { from, symbol, .. }] if from == "fresh" && symbol == "helper"),
        "{unfit:?}"
    );
}

#[test]
fn a_function_whose_cold_piece_changes_is_replaced() {
    let before = after();
    let mut changed = before.clone();
    changed.parts[8].fields[0].to = "left".into();
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let placed = placed(&built(&before, &changed, &linked).expect("it can be replaced"));
    assert_eq!(placed.functions.len(), 1);
    let (main, cold) = (piece(&placed, "main"), piece(&placed, "main.cold"));
    assert_eq!(said(main, 7, Some(11)), cold.at.0, "new code goes to the new piece");
    assert_eq!(said(cold, 6, Some(10)), main.at.0 + 11, "and back");
    assert_eq!(said(cold, 1, Some(5)), LEFT + SLIDE);
}

#[test]
fn what_can_not_be_replaced_is_refused() {
    type Edit = fn(&mut Source);
    let refused = |name: &str, edit: Edit, is_expected: fn(&Unfit) -> bool| {
        let (before, mut after) = (before(), after());
        edit(&mut after);
        let linked = Linked::new(&[&before], &ELSEWHERE);
        let unfit = built(&before, &after, &linked).expect_err(name);
        assert!(unfit.iter().any(is_expected), "{name}: {unfit:?}");
    };
    refused(
        "a symbol that the kernel does not have",
        |after| after.parts[8].fields[0].to = "nowhere".into(),
        |unfit| matches!(unfit, Unfit::Unresolved { symbol, .. } if symbol == "nowhere"),
    );
    refused(
        "an exception table of another layout",
        |after| {
            let fields = [(0, NEAR, "main", 21), (8, NEAR, "main", 27)];
            after.parts.push(Part::new("", "__ex_table", Kind::Label, &[0; 12], &fields));
        },
        |unfit| matches!(unfit, Unfit::Unresolved { symbol, .. } if symbol == "__ex_table"),
    );
    refused(
        "a static branch in the middle of an instruction",
        |after| after.parts.push(static_branch(12, 21, "counter", 0)),
        |unfit| matches!(unfit, Unfit::StaticBranch { function, .. } if function == "main"),
    );
    refused(
        "two static branches at one place",
        |after| after.parts.extend([static_branch(11, 21, "counter", 0), static_branch(11, 21, "state", 0)]),
        |unfit| matches!(unfit, Unfit::StaticBranch { function, .. } if function == "main"),
    );
    refused(
        "a static branch of another layout",
        |after| {
            after.parts.push(static_branch(11, 21, "counter", 0));
            after.parts.last_mut().expect("it").fields.swap(1, 2);
            let fields = &mut after.parts.last_mut().expect("it").fields;
            (fields[1].offset, fields[2].offset) = (4, 12);
        },
        |unfit| matches!(unfit, Unfit::StaticBranch { function, .. } if function == "main"),
    );
    refused(
        "a table of bugs of another layout",
        |after| {
            let fields = [(0, NEAR, "main", 11), (8, NEAR, ".LC1", 0)];
            after.parts.push(Part::new("", "__bug_table", Kind::Label, &[0; 12], &fields));
        },
        |unfit| matches!(unfit, Unfit::Unresolved { symbol, .. } if symbol == "__bug_table"),
    );
    refused(
        "a constant that the kernel writes into its code",
        |after| {
            let entry = Part::new("", "runtime_ptr_limit", Kind::Label, &[0; 4], &[(0, NEAR, "main", 33)]);
            after.parts.push(entry);
        },
        |unfit| matches!(unfit, Unfit::RuntimeConstant { function, .. } if function == "main"),
    );
    refused(
        "an initial value",
        |after| after.parts[3].bytes[0] = 8,
        |unfit| matches!(unfit, Unfit::Obstacle(Obstacle::DataChanged { name }) if name == "counter"),
    );
    refused(
        "code where nothing may leave",
        |after| after.parts[9].section = ".noinstr.text".into(),
        |unfit| matches!(unfit, Unfit::NotLeft { function, .. } if function == "fresh"),
    );
    refused(
        "code for the start",
        |after| after.parts[9].section = ".init.text".into(),
        |unfit| matches!(unfit, Unfit::Obstacle(Obstacle::InitChanged { name }) if name == "fresh"),
    );
    refused(
        "a return that is no jump",
        |after| after.parts[0].bytes[59] = 0xe8,
        |unfit| matches!(unfit, Unfit::Unresolved { symbol, .. } if symbol == "__x86_return_thunk"),
    );
    let (before, after) = (before(), after());
    let linked = Linked::new(&[&before], &ELSEWHERE);
    assert_eq!(built(&before, &before, &linked), Err(vec![Unfit::Unchanged]));
    let mut other = Linked::new(&[&before], &ELSEWHERE);
    let byte = other.offset("helper");
    other.bytes[byte] ^= 1;
    let unfit = built(&before, &after, &other).expect_err("another kernel");
    assert!(matches!(&unfit[..], [Unfit::BuildMismatch { name, .. }] if name == "helper"), "{unfit:?}");
    // In one section, the assembler knows where a call goes without a relocation.
    let mut shared = before.clone();
    shared.parts[0].bytes[6..10].copy_from_slice(&[0x16, 0, 0, 0]);
    shared.parts[0].fields.remove(0);
    shared.parts[0].bytes[10] = 0x03;
    let (image, file) = linked.image();
    let unfit =
        built_in(&before.object(true), &shared.object(false), &image, &file).expect_err("it is shared");
    assert!(unfit.iter().any(|unfit| matches!(unfit, Unfit::Shared { .. })), "{unfit:?}");
}

/// An entry of the table of static branches: a branch at `place` of `main` to `target`.
fn static_branch(place: i64, target: i64, key: &str, flags: i64) -> Part {
    let fields = [(0, NEAR, "main", place), (4, NEAR, "main", target), (8, FAR, key, flags)];
    Part::new("", "__jump_table", Kind::Label, &[0; 16], &fields)
}

/// Where the call of `fresh` is in `main`, there is a branch by a key: its own code, with what follows.
fn with_static_branch(branch: &[u8], key: &str, flags: i64) -> Source {
    let mut source = after();
    let main = &mut source.parts[0];
    main.bytes.splice(11..16, branch.iter().copied());
    main.fields.retain(|field| field.offset != 12);
    source.parts.push(static_branch(11, 21, key, flags));
    source
}

/// A key of the kernel's, and one of the new code's own. Bit 1 of the flags is the build's.
#[test]
fn a_static_branch_tests_its_key() {
    let before = before();
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let old = |name: &str| miniature::BASE + linked.offset(name) as u64 + SLIDE;
    let nop = [0x0f, 0x1f, 0x44, 0, 0];
    // jmp main+21, and what the compiler may have behind it.
    let short = [0xeb, 8, 0x90, 0x90, 0x90];
    for (branch, key, flags, condition) in [
        (nop, "counter", 0, 0x8f),
        (nop, "state", 1, 0x8e),
        (short, "state", 2, 0x8f),
        (short, "counter", 3, 0x8e),
    ] {
        let replacement = built(&before, &with_static_branch(&branch, key, flags), &linked);
        let placed = placed(&replacement.expect("it can be replaced"));
        let main = piece(&placed, "main");
        let expected = if key == "state" { piece(&placed, key).at.0 } else { old(key) };
        assert_eq!(main.bytes[11..13], [0x83, 0x3d], "cmp dword [rip+disp32], imm8");
        assert_eq!((said(main, 13, Some(18)), main.bytes[17]), (expected, 0));
        assert_eq!(main.bytes[18..20], [0x0f, condition]);
        // Both branches are 13 bytes long by now, and what is behind them lies as much farther on.
        let moved = if branch == nop { 13 - 5 } else { 13 - 2 };
        assert_eq!(said(main, 20, Some(24)), main.at.0 + 21 + moved as u64, "where the branch goes");
        assert_eq!(main.bytes[24..24 + moved - 8], [0x90; 3][..moved - 8]);
        assert_eq!(said(main, 17 + moved, Some(21 + moved)), old("helper"), "what is behind");
        assert_eq!(said(main, 55 + moved, None), main.at.0, "its own address");
        let cold = piece(&placed, "main.cold");
        assert_eq!(said(cold, 6, Some(10)), main.at.0 + 11, "the branch, from the cold piece");
        assert_eq!(said(main, 7, Some(11)), cold.at.0, "and to that");
    }
    // From the cold piece to behind the branch, and to the middle of it.
    for (to, expected) in [(13, Some(24)), (14, Some(25)), (12, None)] {
        let mut source = with_static_branch(&short, "counter", 0);
        source.parts[8].fields[1].addend = to - 4;
        let replacement = built(&before, &source, &linked);
        let came = replacement.map(|replacement| {
            let placed = placed(&replacement);
            said(piece(&placed, "main.cold"), 6, Some(10)) - piece(&placed, "main").at.0
        });
        assert_eq!(came.ok(), expected, "{to}");
    }
}

/// CPU features.
const FIRST: u16 = 5;
const SECOND: u16 = 9 * 32 + 1;
const ALWAYS: u16 = 3 * 32 + 21;
/// Flags of an entry.
const INVERTED: u16 = 1;
const DIRECT_CALL: u16 = 2;
/// In code that `alternative` makes: `call left`, with a NOP of three bytes in place of three of one.
const PLACE: usize = 5;
const PLACE_LENGTH: u8 = 8;

/// Entries of the table of alternatives: place, feature, flags, length of the place, and the replacement, each in a
/// section of its own of which they say so.
type Alternative<'a> = (usize, u16, u16, u8, &'a [u8]);

/// `main` after the change, with entries as 6.1 has them: a call, a place that alternatives are for, a return.
fn alternatives(entries: &[Alternative<'_>]) -> Source {
    let mut source = after();
    let main = &mut source.parts[0];
    main.bytes = code(&[&ENTRY, &[0xe8, 0, 0, 0, 0, 0x90, 0x90, 0x90], &[0xe9, 0, 0, 0, 0]]);
    main.fields = Part::function(
        "",
        &[],
        &[(PLACE + 1, CALL, "left", -4), (PLACE + 9, CALL, "__x86_return_thunk", -4)],
    )
    .fields;
    let mut start = 0_i64;
    for (place, feature, flags, length, replacement) in entries {
        let bytes = [&[0; 8][..], &(feature | flags << 15).to_le_bytes(), &[*length, len(replacement)]];
        entry(&mut source, *place, &bytes.concat(), start);
        start += i64::from(len(replacement));
    }
    let all: Vec<u8> = entries.iter().flat_map(|(.., replacement)| replacement.iter().copied()).collect();
    source.parts.push(Part::new("", ".altinstr_replacement", Kind::Label, &all, &[]));
    source
}

fn len(bytes: &[u8]) -> u8 {
    u8::try_from(bytes.len()).expect("short")
}

/// Adds an entry whose replacement is at `start` of their section.
fn entry(source: &mut Source, place: usize, bytes: &[u8], start: i64) {
    let place = i64::try_from(place).expect("small");
    let fields = [(0, NEAR, "main", place), (4, NEAR, ".altinstr_replacement", start)];
    source.parts.push(Part::new("", ".altinstructions", Kind::Label, bytes, &fields));
}

/// Adds a field to the replacements.
fn refer(source: &mut Source, offset: usize, to: &str, addend: i64) {
    let fields = Part::function("", &[], &[(offset, CALL, to, addend)]).fields;
    source.parts.last_mut().expect("the replacements").fields.extend(fields);
}

fn replaced(after: &Source) -> Result<Replacement, Vec<Unfit>> {
    let before = before();
    built(&before, after, &Linked::new(&[&before], &ELSEWHERE))
}

/// What `main` holds where alternatives are for on a CPU with these features.
fn chosen(after: &Source, features: &[u16]) -> Vec<u8> {
    let placed = placed_with(&replaced(after).expect("it can be replaced"), features);
    let main = piece(&placed, "main");
    assert_eq!(main.bytes[..PLACE], ENTRY);
    let end = PLACE + usize::from(PLACE_LENGTH);
    assert_eq!(main.bytes[end..], [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
    main.bytes[PLACE..end].to_vec()
}

/// Where a call at the first byte of a place leads.
fn called(after: &Source, features: &[u16]) -> Option<Gva> {
    let placed = placed_with(&replaced(after).expect("it can be replaced"), features);
    let main = piece(&placed, "main");
    let at = main.at.plus(PLACE).expect("an address");
    insn::decode(&main.bytes[PLACE..], at).next().expect("an instruction").branch
}

/// `popcnt rax, rdi`.
const COUNT: [u8; 5] = [0xf3, 0x48, 0x0f, 0xb8, 0xc7];
/// `stac`.
const SHORT: [u8; 3] = [0x0f, 0x01, 0xcb];
const NOPS_3: [u8; 3] = [0x0f, 0x1f, 0x00];
const NOPS_8: [u8; 8] = [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];

#[test]
fn alternatives_are_those_of_the_running_cpu() {
    let source = alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &COUNT)]);
    assert_eq!(replaced(&source).expect("fit").features(), [FIRST].into());
    assert_eq!(chosen(&source, &[FIRST]), [&COUNT[..], &NOPS_3].concat());
    for others in [&[][..], &[SECOND]] {
        assert_eq!(called(&source, others), Some(Gva(LEFT + SLIDE)), "its own code");
        assert_eq!(chosen(&source, others)[5..], NOPS_3, "padded by one NOP");
    }
    let inverted = alternatives(&[(PLACE, FIRST, INVERTED, PLACE_LENGTH, &COUNT)]);
    assert_eq!(called(&inverted, &[FIRST]), Some(Gva(LEFT + SLIDE)));
    assert_eq!(chosen(&inverted, &[])[..5], COUNT);
    let nothing = alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &[])]);
    assert_eq!(chosen(&nothing, &[FIRST]), NOPS_8);
}

#[test]
fn of_several_alternatives_the_last_that_applies_is_taken() {
    let source =
        alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &COUNT), (PLACE, SECOND, 0, PLACE_LENGTH, &SHORT)]);
    let short = [&SHORT[..], &[0x0f, 0x1f, 0x44, 0, 0]].concat();
    assert_eq!(called(&source, &[]), Some(Gva(LEFT + SLIDE)));
    assert_eq!(chosen(&source, &[FIRST])[..5], COUNT);
    assert_eq!((chosen(&source, &[SECOND]), chosen(&source, &[FIRST, SECOND])), (short.clone(), short));
    // The second is nested in the first's place, which goes with it as a whole.
    let nested = alternatives(&[
        (PLACE, FIRST, 0, PLACE_LENGTH, &[0x31, 0xc0, 0x31, 0xc9, 0x31, 0xd2, 0x31, 0xdb]),
        (PLACE, SECOND, 0, 5, &SHORT),
    ]);
    assert_eq!(chosen(&nested, &[FIRST, SECOND])[3..], [0x0f, 0x1f, 0x44, 0, 0]);
}

#[test]
fn what_replaces_code_leads_where_its_object_says() {
    // call right; jne +1, to the NOPs behind it; nop
    let mut source = alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &[0xe8, 0, 0, 0, 0, 0x75, 0x01, 0x90])]);
    refer(&mut source, 1, "right", -4);
    assert_eq!(called(&source, &[FIRST]), Some(Gva(RIGHT + SLIDE)));
    assert_eq!(chosen(&source, &[FIRST])[5..], [0x75, 0x01, 0x90]);
    // What only a replacement uses goes along.
    let mut source = alternatives(&[
        (PLACE, SECOND, 0, PLACE_LENGTH, &SHORT),
        (PLACE, FIRST, 0, PLACE_LENGTH, &[0xe8, 0, 0, 0, 0]),
    ]);
    refer(&mut source, 4, "fresh", -4);
    let placed = placed_with(&replaced(&source).expect("fit"), &[FIRST]);
    assert_eq!(said(piece(&placed, "main"), PLACE + 1, Some(PLACE + 5)), piece(&placed, "fresh").at.0);
    // A return: that of the guest's kernel.
    let mut source = alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &[0xe9, 0, 0, 0, 0])]);
    refer(&mut source, 1, "__x86_return_thunk", -4);
    assert_eq!(chosen(&source, &[FIRST]), [0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0x0f, 0x1f, 0x00]);
}

/// As `_static_cpu_has` has it (Linux arch/x86/include/asm/cpufeature.h): until the kernel has chosen, its code tests
/// the feature elsewhere.
#[test]
fn code_that_tests_a_feature_becomes_a_jump_or_nothing() {
    let test = |entries: &[Alternative<'_>]| {
        let mut source = alternatives(entries);
        // jmp .altinstr_aux
        source.parts[0].bytes[PLACE] = 0xe9;
        source.parts[0].fields[0].to = ".altinstr_aux".into();
        refer(&mut source, 1, "main", 13 - 4);
        source.parts.push(Part::new("", ".altinstr_aux", Kind::Label, &[0xe9, 0, 0, 0, 0], &[]));
        source
    };
    let no: Alternative<'_> = (PLACE, ALWAYS, 0, PLACE_LENGTH, &[0xe9, 0, 0, 0, 0]);
    let source = test(&[no, (PLACE, FIRST, 0, PLACE_LENGTH, &[])]);
    assert_eq!(replaced(&source).expect("fit").features(), [FIRST].into());
    let placed = placed_with(&replaced(&source).expect("fit"), &[]);
    let main = piece(&placed, "main");
    assert_eq!(said(main, PLACE + 1, Some(PLACE + 5)), main.at.0 + 13);
    assert_eq!(chosen(&source, &[FIRST]), NOPS_8);
    // It would go on where nothing is.
    let may_stay = (PLACE, FIRST, 0, PLACE_LENGTH, &[0xe9, 0, 0, 0, 0][..]);
    let never = (PLACE, ALWAYS, INVERTED, PLACE_LENGTH, &[0xe9, 0, 0, 0, 0][..]);
    for entries in [[may_stay], [never]] {
        let unfit = replaced(&test(&entries)).expect_err("it may stay");
        assert!(
            matches!(&unfit[..], [Unfit::Unresolved { symbol, .. }] if symbol == ".altinstr_aux"),
            "{unfit:?}"
        );
    }
}

/// What is replaced does not count: how the kernel returns, and whether a field can hold its address.
#[test]
fn what_is_replaced_is_not_written() {
    let source = alternatives(&[(PLACE + 8, FIRST, 0, 5, &SHORT)]);
    let replacement = replaced(&source).expect("fit");
    let placed = running(&replacement, None, &[FIRST]).expect("no return is left in main");
    assert_eq!(piece(&placed, "main").bytes[PLACE + 8..], [0x0f, 0x01, 0xcb, 0x66, 0x90]);
    let error = running(&replacement, None, &[]).expect_err("there is one");
    assert!(matches!(error, Unplaceable::NoReturn { .. }), "{error}");
    let mut source = alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &COUNT)]);
    // mov eax, an address of 32 bits
    (source.parts[0].bytes[PLACE], source.parts[0].fields[0].form) = (0xb8, UNSIGNED);
    assert_eq!(chosen(&source, &[FIRST])[..5], COUNT);
    let error = running(&replaced(&source).expect("fit"), Some(Return::Plain), &[]);
    let error = error.expect_err("the kernel lies higher");
    assert!(matches!(error, Unplaceable::OutOfRange { offset: 6, .. }), "{error}");
}

#[test]
fn entries_of_every_layout_are_read_and_no_others() {
    let with = |rest: &[u8]| {
        let mut source = alternatives(&[]);
        let last = source.parts.len() - 1;
        source.parts[last].bytes = COUNT.to_vec();
        entry(&mut source, PLACE, &[&[0; 8], rest].concat(), 0);
        source
    };
    let [low, high] = FIRST.to_le_bytes();
    for rest in [&[low, high, 8, 5][..], &[low, high, 8, 5, 0], &[low, high, 0, 0, 8, 5]] {
        assert_eq!(chosen(&with(rest), &[FIRST])[..5], COUNT, "{rest:x?}");
    }
    let inverted = u8::try_from(INVERTED).expect("small");
    assert_eq!(chosen(&with(&[low, high, inverted, 0, 8, 5]), &[])[..5], COUNT);
    // Its target follows from what the pointer holds.
    let direct = replaced(&with(&[low, high, u8::try_from(DIRECT_CALL).expect("small"), 0, 8, 5]));
    let direct = direct.expect("fit for a CPU without the feature");
    assert!(running(&direct, Some(Return::Plain), &[]).is_ok());
    let error = running(&direct, Some(Return::Plain), &[FIRST]).expect_err("a direct call");
    assert!(matches!(error, Unplaceable::DirectCall { offset: PLACE, .. }), "{error}");
    let unknown = "its entry is not as in any known kernel";
    for rest in [&[low, high, 8][..], &[low, high, 8, 5, 0, 0, 0], &[low, high, 4, 0, 8, 5]] {
        assert_eq!(why(&with(rest)), unknown, "{rest:x?}");
    }
    let mut elsewhere = with(&[low, high, 0, 0, 8, 5]);
    elsewhere.parts.last_mut().expect("the entry").fields[1].offset = 6;
    assert_eq!(why(&elsewhere), unknown);
}

/// Why an alternative can't be applied.
fn why(after: &Source) -> &'static str {
    let unfit = replaced(after).expect_err("it is refused");
    let why = unfit.iter().find_map(|unfit| match unfit {
        Unfit::Alternative { function, why } if function == "main" => Some(*why),
        _ => None,
    });
    why.unwrap_or_else(|| panic!("{unfit:?}"))
}

#[test]
fn an_alternative_that_does_not_fit_its_place_is_refused() {
    let one = |place, length, replacement| why(&alternatives(&[(place, FIRST, 0, length, replacement)]));
    assert_eq!(one(PLACE, 4, &COUNT), "its replacement is longer than its place");
    assert_eq!(one(PLACE, 14, &COUNT), "its place goes beyond the function's end");
    assert_eq!(one(PLACE + 8, u8::MAX, &[]), "its place goes beyond the function's end");
    for (place, length) in [(PLACE + 1, 4), (PLACE, 4), (PLACE, 12)] {
        assert_eq!(one(place, length, &[]), "its place begins or ends in the middle of an instruction");
    }
    assert_eq!(one(PLACE, PLACE_LENGTH, &[0xeb, 0x01]), "its replacement branches into another");
    let overlapping = alternatives(&[(PLACE + 5, FIRST, 0, 2, &[]), (PLACE, SECOND, 0, 6, &[])]);
    assert_eq!(why(&overlapping), "its place is a part of another's");
    let mut beyond = alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &COUNT)]);
    beyond.parts.last_mut().expect("the replacements").bytes.pop();
    let unfit = replaced(&beyond).expect_err("its replacement is cut off");
    assert!(unfit.contains(&Unfit::Obstacle(Obstacle::Tables)), "{unfit:?}");
    let unfit = replaced(&alternatives(&[(PLACE, FIRST, 0, PLACE_LENGTH, &[0xe8, 0, 0])]));
    let unfit = unfit.expect_err("its replacement is no instruction");
    assert!(unfit.contains(&Unfit::Obstacle(Obstacle::Tables)), "{unfit:?}");
    // A function that stays has its own already.
    let mut of_another = alternatives(&[(PLACE, FIRST, 0, 3, &COUNT)]);
    let entry = of_another.parts.iter_mut().find(|part| part.section == ".altinstructions");
    entry.expect("an entry").fields[0].to = "user".into();
    let found = replaced(&of_another);
    assert!(found.is_err(), "{found:?}");
}

/// The bits are those of the guest's `boot_cpu_data`.
#[test]
fn features_are_those_of_the_running_kernel() {
    let file = miniature::vmlinux();
    let image = KernelImage::parse(&file).expect("a kernel");
    // It can be told that it is chosen: that is refused.
    let refused = |feature: u16, present: &[u16]| {
        let mut source = alternatives(&[]);
        source.parts.last_mut().expect("the replacements").bytes = COUNT.to_vec();
        let rest = [&feature.to_le_bytes()[..], &[2, 0, PLACE_LENGTH, len(&COUNT)]];
        entry(&mut source, PLACE, &[&[0; 8], &rest.concat()[..]].concat(), 0);
        let replacement = replaced(&source).expect("fit");
        let mut guest = Booted::new(&image, &file, &image);
        for at in replacement.returns() {
            guest.put(*at, &[0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
        }
        let words = image.symbols().only("boot_cpu_data").expect("a symbol").plus(16).expect("an address");
        for feature in present {
            let byte = words.plus(usize::from(feature / 8)).expect("an address");
            guest.put(byte, &[1 << (feature % 8)]);
        }
        let plan = br#"{"version":1,"name":"x","patches":[{"object":{"before":{"base64":""},"after":{"base64":""}}}]}"#;
        let plan = Plan::parse(plan).expect("well-formed");
        let supplies = Supplies { replacements: [(0, replacement)].into(), room: Some(room()) };
        let modules = read_modules(&image, 0, &guest);
        let kernel = Kernel { image: &image, slide: 0, modules: &modules };
        let resolved = resolve_with(&plan, &supplies, RunningGuest { kernel, text: &guest, vcpus: 1 }, []);
        resolved.err().unwrap_or_default().iter().map(ToString::to_string).collect::<Vec<_>>().concat()
    };
    let chosen = |feature, present: &[u16]| refused(feature, present).contains("calls through a pointer");
    for feature in [FIRST, SECOND] {
        assert!(chosen(feature, &[feature]) && !chosen(feature, &[feature + 1, feature - 1]), "{feature}");
    }
    assert!(chosen(ALWAYS, &[]));
}

/// A WARN in new code, one in code that stays, and one in a new function.
#[test]
fn warnings_of_new_code_are_added_to_the_guests_table() {
    let entry = |line: u8, function: &str, at| {
        let bytes = [0, 0, 0, 0, 0, 0, 0, 0, line, 0, 1, 9];
        Part::new("", "__bug_table", Kind::Label, &bytes, &[(0, NEAR, function, at), (4, NEAR, ".LC1", 0)])
    };
    let (mut before, mut after) = (before(), after());
    before.strings.push("new".into());
    before.parts.push(entry(1, "helper", 5));
    after.parts.extend([entry(1, "helper", 5), entry(2, "main", 11), entry(3, "fresh", 5)]);
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let replacement = built(&before, &after, &linked).expect("it can be replaced");
    assert!(replacement.has_bugs());
    let placed = placed(&replacement);
    let (table, strings) = (piece(&placed, "__bug_table"), piece(&placed, ".rodata.str1.1"));
    assert_eq!(
        (table.at, table.bytes.len(), table.is_code),
        (Gva(PAGES + 0x3000 + 36), 2 * BUG_ENTRY, false)
    );
    assert_eq!(placed.counts[0], (Gva(PAGES + 0x9000), 3, 5));
    for (index, line, function, behind) in [(0, 2, "main", 11), (1, 3, "fresh", 5)] {
        let start = index * BUG_ENTRY;
        let (code, file) = (said(table, start, Some(start)), said(table, start + 4, Some(start + 4)));
        assert_eq!((code, file), (piece(&placed, function).at.0 + behind, strings.at.0 + 4), "{function}");
        assert_eq!(table.bytes[start + 8..start + 12], [line, 0, 1, 9]);
    }
    // There is room for two.
    let running = Running { slide: SLIDE, returns: Some(Return::Plain), features: &BTreeSet::new() };
    assert!(replacement.place(&placed.left, running).is_err());
    assert!(replacement.place(&Room { bugs: None, ..room() }, running).is_err(), "there is no table");
}

/// Entries of the exception table for `helper`, `main` and `fresh`, and of the ORC tables for `main` and another function.
fn with_tables(branch: Option<&[u8]>) -> (Source, Source) {
    let fault = |function: &str, at, fixup: &str, behind| {
        let bytes = [0, 0, 0, 0, 0, 0, 0, 0, 3, 1, 2, 0];
        Part::new("", "__ex_table", Kind::Label, &bytes, &[(0, NEAR, function, at), (4, NEAR, fixup, behind)])
    };
    let mut before = before();
    before.parts.push(fault("helper", 5, "helper", 12));
    let mut after = branch.map_or_else(after, |branch| with_static_branch(branch, "counter", 0));
    after.parts.extend([
        fault("helper", 5, "helper", 12),
        fault("fresh", 5, "main.cold", 5),
        fault("main", 21, "main", 27),
    ]);
    let rows = [("main", 0, 1), ("main", 5, 2), ("main", 27, 3), ("helper", 5, 4)];
    let fields: Vec<_> = (0..).zip(rows).map(|(row, (of, at, _))| (4 * row, NEAR, of, at)).collect();
    after.parts.push(Part::new("", ".orc_unwind_ip", Kind::Label, &[0; 16], &fields));
    let entries: Vec<u8> = rows.iter().flat_map(|(.., entry)| [*entry; 6]).collect();
    after.parts.push(Part::new("", ".orc_unwind", Kind::Label, &entries, &[]));
    (before, after)
}

/// What the guest's kernel looks up by an address is told of new code, in the order of the addresses, behind what was told before.
#[test]
fn the_guests_kernel_is_told_of_new_code() {
    // A static branch of two bytes, which moves what is behind it on.
    for (branch, moved) in [(None, 0), (Some([0xeb, 8, 0x90, 0x90, 0x90]), 11)] {
        let (before, after) = with_tables(branch.as_ref().map(|branch| &branch[..]));
        let linked = Linked::new(&[&before], &ELSEWHERE);
        let replacement = built(&before, &after, &linked).expect("it can be replaced");
        assert!(replacement.has_faults());
        let placed = placed(&replacement);
        let start = |name: &str| piece(&placed, name).at.0;
        let end = |name: &str| start(name) + piece(&placed, name).bytes.len() as u64;
        let counts: Vec<_> =
            placed.counts.iter().map(|(at, before, after)| (at.0 - PAGES, before, after)).collect();
        let functions = if branch.is_none() { 3 } else { 2 };
        let has_fresh = branch.is_none();
        let faults = if has_fresh { 2 } else { 1 };
        let frames = if has_fresh { 4 + 2 + 2 } else { 4 + 2 };
        assert_eq!(
            counts,
            [(0x9008, &2, &(2 + faults)), (0x9010, &1, &(1 + frames)), (0x9020, &1, &(1 + functions))]
        );
        // Faults, by the address of the instruction.
        let table = piece(&placed, "__ex_table");
        assert_eq!(table.at.0, PAGES + 0x4000 + 2 * FAULT_ENTRY as u64);
        let mut expected = vec![(start("main") + 21 + moved, start("main") + 27 + moved)];
        if has_fresh {
            expected.push((start("fresh") + 5, start("main.cold") + 5));
        }
        expected.sort_unstable();
        for (row, (code, fixup)) in expected.into_iter().enumerate() {
            let at = row * FAULT_ENTRY;
            assert_eq!((said(table, at, Some(at)), said(table, at + 4, Some(at + 4))), (code, fixup));
            assert_eq!(table.bytes[at + 8..at + 12], [3, 1, 2, 0]);
        }
        // Frames: what is known of `main`, and that nothing is of the others and behind each.
        let (addresses, entries) = (piece(&placed, ".orc_unwind_ip"), piece(&placed, ".orc_unwind"));
        assert_eq!((addresses.at.0, entries.at.0), (PAGES + 0x5000 + 4, PAGES + 0x6000 + FRAME_ENTRY as u64));
        let mut expected = vec![
            (start("main"), 1),
            (start("main") + 5, 2),
            (start("main") + 27 + moved, 3),
            (end("main"), 0),
        ];
        for name in ["main.cold", "fresh"].into_iter().filter(|name| has_fresh || *name != "fresh") {
            expected.extend([(start(name), 0), (end(name), 0)]);
        }
        expected.sort_by_key(|(at, _)| *at);
        let found: Vec<(u64, u8)> = entries
            .bytes
            .chunks(FRAME_ENTRY)
            .enumerate()
            .map(|(row, entry)| {
                assert!(entry.iter().all(|byte| *byte == entry[0]), "{entry:?}");
                (said(addresses, 4 * row, Some(4 * row)), entry[0])
            })
            .collect();
        assert_eq!(found, expected);
        // Functions: name, section, address, size.
        let (symbols, names) = (piece(&placed, ".symtab"), piece(&placed, ".strtab"));
        assert_eq!((symbols.at.0, names.at.0), (PAGES + 0x7000 + FUNCTION_ENTRY as u64, PAGES + 0x8000 + 1));
        for symbol in symbols.bytes.chunks(FUNCTION_ENTRY) {
            let word = |at: usize| u64::from_le_bytes(symbol[at..at + 8].try_into().expect("eight bytes"));
            let offset = u32::from_le_bytes(symbol[..4].try_into().expect("four bytes")) as usize - 1;
            let name = names.bytes[offset..].split(|byte| *byte == 0).next().expect("a name");
            let name = std::str::from_utf8(name).expect("text");
            assert_eq!(symbol[6..8], [1, 0], "it is defined");
            assert_eq!((word(8), word(8) + word(16)), (start(name), end(name)), "{name}");
        }
        let next = replacement.place(
            &placed.left,
            Running { slide: SLIDE, returns: Some(Return::Plain), features: &BTreeSet::new() },
        );
        let next = next.expect("room");
        let again = piece(&next, "__ex_table");
        assert_eq!(again.at.0, table.at.0 + table.bytes.len() as u64, "behind what was told before");
        assert!(said(again, 0, Some(0)) > said(table, 0, Some(0)), "in the order of the addresses");
        let nobody = Room { description: None, ..room() };
        let running = Running { slide: SLIDE, returns: Some(Return::Plain), features: &BTreeSet::new() };
        assert!(replacement.place(&nobody, running).is_err(), "faults can't be told");
    }
}

/// A table may lead to code that nothing else leads to, of which tables say more.
#[test]
fn what_only_a_table_leads_to_is_told_of_too() {
    let (before, mut after) = (before(), after());
    let entry = |table: &str, bytes: &[u8], fields: [(usize, u32, &str, i64); 2]| {
        Part::new("", table, Kind::Label, bytes, &fields)
    };
    after.parts.extend([
        entry("__ex_table", &[0; 12], [(0, NEAR, "fresh", 0), (4, NEAR, "fresh.cold", 0)]),
        entry("__ex_table", &[0; 12], [(0, NEAR, "later", 0), (4, NEAR, "later", 2)]),
        entry("__bug_table", &[0; 12], [(0, NEAR, "later", 0), (4, NEAR, ".LC1", 0)]),
        Part::new(
            "fresh.cold",
            ".text.unlikely",
            Kind::Function,
            &[0xe8, 0, 0, 0, 0, 0xc3],
            &[(1, CALL, "later", -4)],
        ),
        Part::function("later", &[0x0f, 0x0b, 0xc3], &[]),
    ]);
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let placed = placed(&built(&before, &after, &linked).expect("it can be replaced"));
    let later = piece(&placed, "later").at.0;
    assert_eq!(said(piece(&placed, "fresh.cold"), 1, Some(5)), later);
    assert_eq!(said(piece(&placed, "__bug_table"), 0, Some(0)), later);
    assert_eq!(piece(&placed, "__ex_table").bytes.len(), 2 * FAULT_ENTRY);
}

/// objtool leaves a row out that is as the one before, also where the next function of the section begins.
#[test]
fn a_functions_first_frame_may_be_that_of_the_one_before() {
    let (before, mut after) = (before(), after());
    let linked = Linked::new(&[&before], &ELSEWHERE);
    let (image, file) = linked.image();
    after.parts[9].bytes = code(&[&[0xe8, 0, 0, 0, 0], &[0xe8, 0, 0, 0, 0], &[0xc3]]);
    after.parts[9].fields = Part::function("", &[], &[(1, CALL, "main", -4), (6, CALL, "late", -4)]).fields;
    after.parts.push(Part::function("late", &[0x90, 0xc3], &[]));
    after.parts.push(Part::new("", ".orc_unwind_ip", Kind::Label, &[0; 4], &[(0, NEAR, "fresh", 0)]));
    after.parts.push(Part::new("", ".orc_unwind", Kind::Label, &[7; 6], &[]));
    // All functions are in one section.
    let replacement = built_in(&before.object(true), &after.object(false), &image, &file);
    let placed = placed(&replacement.expect("it can be replaced"));
    let (addresses, entries) = (piece(&placed, ".orc_unwind_ip"), piece(&placed, ".orc_unwind"));
    let known = |at: u64| {
        let row =
            (0..addresses.bytes.len() / 4).rev().find(|row| said(addresses, 4 * row, Some(4 * row)) <= at);
        entries.bytes[row.expect("a row") * FRAME_ENTRY]
    };
    let (fresh, late) = (piece(&placed, "fresh").at.0, piece(&placed, "late").at.0);
    assert_eq!((known(fresh), known(fresh + 10), known(late), known(late + 1)), (7, 7, 7, 7));
    assert_eq!((known(late + 2), known(piece(&placed, "main").at.0)), (0, 0));
}

proptest! {
    /// Whatever bytes an object has: it is refused, or what it brings lies in the room, each piece by itself, and
    /// decodes.
    #[test]
    fn a_damaged_object_is_refused_or_stays_in_its_room(
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        has_alternatives: bool,
    ) {
        let entries: [Alternative<'_>; 2] =
            [(PLACE, FIRST, 0, PLACE_LENGTH, &COUNT), (PLACE + 8, SECOND, INVERTED, 5, &SHORT)];
        let (before, after) = (before(), if has_alternatives { alternatives(&entries) } else { after() });
        let linked = Linked::new(&[&before], &ELSEWHERE);
        let (image, file) = linked.image();
        let mut damaged = after.object(true);
        for (at, byte) in damage {
            *at.get_mut(&mut damaged) = byte;
        }
        let Ok(parsed) = Object::parse(&damaged) else { return Ok(()) };
        let contents = Contents::parse(&file).expect("a kernel");
        let original = before.object(true);
        let original = Object::parse(&original).expect("an object");
        let Ok(replacement) = build(&original, &parsed, &image, &contents) else { return Ok(()) };
        let Ok(placed) = running(&replacement, Some(Return::Plain), &[FIRST]) else { return Ok(()) };
        let room = room();
        let mut ends: Vec<(Gva, Gva)> = Vec::new();
        for piece in &placed.pieces {
            let end = piece.at.plus(piece.bytes.len()).expect("an address");
            if TABLES.contains(&piece.name.as_str()) && piece.at >= room.data.end {
                continue;
            }
            let part = if piece.is_code { &room.code } else if piece.at < room.data.start { &room.constants } else { &room.data };
            prop_assert!(part.start <= piece.at && end <= part.end, "{piece:x?}");
            let decoded: usize = insn::decode(&piece.bytes, piece.at).map(|insn| insn.len).sum();
            prop_assert!(!piece.is_code || decoded == piece.bytes.len(), "{piece:x?}");
            ends.push((piece.at, end));
        }
        ends.sort_unstable();
        prop_assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ends:x?}");
        for (_, old, new) in &placed.functions {
            prop_assert!(image.symbols().is_at(Gva(old.0 - SLIDE)) && room.code.contains(new));
        }
    }
}
