//! New code refers to the same things as the object, wherever the linker put them; what can't be brought into a
//! running kernel is refused.

use patcher::addr::Gva;
use patcher::image::{Contents, KernelImage};
use patcher::insn;
use patcher::object::replacement::{Placed, PlacedPiece, Return, Running};
use patcher::object::{BUG_ENTRY, BugTable, Object, Obstacle, Replacement, Room, Unfit, build};
use proptest::prelude::*;

use crate::miniature;
use crate::sources::{ABSOLUTE, CALL, FAR, Kind, Linked, NEAR, Part, SIGNED, Source};

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
    let bugs = BugTable { at: Gva(PAGES + 0x3000), count: Gva(PAGES + 0x4000), used: 3, most: 5 };
    Room { code: part(0), constants: part(1), data: part(2), bugs: Some(bugs) }
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
    let running = Running { slide: SLIDE, returns: Some(Return::Plain) };
    replacement.place(&room(), running).expect("room")
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
        "a static key",
        |after| {
            let fields = [(0, NEAR, "main", 11), (4, NEAR, "main", 21), (8, FAR, "counter", 0)];
            after.parts.push(Part::new("", "__jump_table", Kind::Label, &[0; 16], &fields));
        },
        |unfit| matches!(unfit, Unfit::Told { function, .. } if function == "main"),
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
    assert_eq!(placed.bugs, Some((Gva(PAGES + 0x4000), 3, 5)));
    for (index, line, function, behind) in [(0, 2, "main", 11), (1, 3, "fresh", 5)] {
        let start = index * BUG_ENTRY;
        let (code, file) = (said(table, start, Some(start)), said(table, start + 4, Some(start + 4)));
        assert_eq!((code, file), (piece(&placed, function).at.0 + behind, strings.at.0 + 4), "{function}");
        assert_eq!(table.bytes[start + 8..start + 12], [line, 0, 1, 9]);
    }
    // There is room for two.
    let running = Running { slide: SLIDE, returns: Some(Return::Plain) };
    assert!(replacement.place(&placed.left, running).is_err());
    assert!(replacement.place(&Room { bugs: None, ..room() }, running).is_err(), "there is no table");
}

proptest! {
    /// Whatever bytes an object has: it is refused, or what it brings lies in the room, each piece by itself, and
    /// decodes.
    #[test]
    fn a_damaged_object_is_refused_or_stays_in_its_room(
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let (before, after) = (before(), after());
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
        let running = Running { slide: SLIDE, returns: Some(Return::Plain) };
        let Ok(placed) = replacement.place(&room(), running) else { return Ok(()) };
        let room = room();
        let mut ends: Vec<(Gva, Gva)> = Vec::new();
        for piece in &placed.pieces {
            let end = piece.at.plus(piece.bytes.len()).expect("an address");
            if piece.name == "__bug_table" {
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
