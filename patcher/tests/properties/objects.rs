//! Matching objects with an image: what belongs matches, and nothing else does.

use std::sync::LazyLock;

use patcher::addr::Gva;
use patcher::image::{Contents, KernelImage};
use patcher::object::outcome::PieceMatch;
use patcher::object::{Change, Difference, Match, Object, Obstacle, Outcome, match_image};
use proptest::prelude::*;
use proptest::strategy::Strategy as Generator;

use crate::sources::{ABSOLUTE, CALL, FAR, Kind, Linked, NEAR, Part, SIGNED, STRINGS, Source};
use crate::{checks, miniature};

/// The miniature, and what is read of it; made once.
static MINIATURE: LazyLock<(Vec<u8>, KernelImage)> = LazyLock::new(|| {
    let file = miniature::vmlinux();
    let image = KernelImage::parse(&file).expect("a kernel");
    (file, image)
});

const ELSEWHERE: [(&str, u64); 3] =
    [("left", 0xffff_ffff_8200_0000), ("right", 0xffff_ffff_8200_0100), ("per_cpu", 0x1_2340)];

/// A file that refers to everything in every way.
pub(crate) fn example() -> Source {
    Source {
        parts: vec![
            Part::function(
                "alpha",
                &[&[0x0f, 0x1f, 0x44, 0, 0, 0xe8][..], &[0; 4], &[0x48, 0xc7, 0xc7], &[0; 4], &[0xc3]]
                    .concat(),
                &[(6, CALL, "beta", -4), (13, SIGNED, ".LC1", 0)],
            )
            .global(),
            Part::function(
                "beta",
                &[&[0x8b, 0x05][..], &[0; 4], &[0x03, 0x05], &[0; 4], &[0xe8], &[0; 4], &[0xc3]].concat(),
                &[(2, NEAR, "counter", -4), (8, NEAR, ".bss", 12), (13, CALL, "left", -4)],
            ),
            Part::new(
                "beta.cold",
                ".text.unlikely",
                Kind::Function,
                &[&[0x65, 0x8b, 0x04, 0x25][..], &[0; 4], &[0xe9], &[0; 4]].concat(),
                &[(4, SIGNED, "per_cpu", 0), (9, NEAR, ".text", 0x20 + 6 - 4)],
            ),
            Part::new("counter", ".data", Kind::Data, &[7, 0, 0, 0], &[]),
            Part::new(
                "table",
                ".rodata",
                Kind::Data,
                &[0; 16],
                &[(0, ABSOLUTE, "beta", 0), (8, ABSOLUTE, ".LC0", 1)],
            ),
            Part::new("state", ".bss", Kind::Data, &[0; 32], &[]),
        ],
        strings: ["one".into(), "two".into()].into(),
    }
}

/// The fields of sections refer to places in one section; with `split` there are several.
fn splittable() -> Source {
    let mut source = example();
    source.parts[1].fields[1].to = "state".into();
    (source.parts[2].fields[1].to, source.parts[2].fields[1].addend) = ("beta".into(), 2);
    source
}

fn outcome<'a>(found: &'a Match, name: &str) -> &'a Outcome {
    let is = |piece: &&PieceMatch| piece.name == name;
    &found.pieces().find(is).unwrap_or_else(|| panic!("no {name}: {found:?}")).outcome
}

#[test]
fn an_object_matches_the_image_it_is_linked_into() {
    let others =
        Source { parts: vec![Part::function("beta", &[0x90, 0xc3], &[])], strings: vec!["two".into()] };
    for (source, split) in [(example(), false), (splittable(), false), (splittable(), true)] {
        let linked = Linked::new(&[&others, &source], &ELSEWHERE);
        let found = linked.matched(&source.object(split));
        assert!(found.belongs(), "{found:?}");
        assert!(found.pieces().all(|piece| matches!(piece.outcome, Outcome::Matches { .. })), "{found:?}");
        assert_eq!((found.functions.len(), found.data.len()), (3, 2));
        let at = |name: &str| {
            found.bindings.iter().find(|binding| binding.name == name).map(|b| (b.at.0, b.known))
        };
        assert_eq!((at("left"), at("per_cpu")), (Some((ELSEWHERE[0].1, true)), Some((0x1_2340, true))));
    }
}

/// Any bit of the image that an object determines: code, data, what fields say, strings.
#[test]
fn every_bit_that_differs_is_found() {
    for (source, split) in [(example(), false), (splittable(), true)] {
        let (file, mut linked) = (source.object(split), Linked::new(&[&source], &ELSEWHERE));
        let mut checked = 0;
        for part in source.parts.iter().filter(|part| part.section != ".bss") {
            let start = linked.offset(&part.name);
            for offset in 0..part.bytes.len() {
                for bit in 0..8 {
                    linked.bytes[start + offset] ^= 1 << bit;
                    let found = linked.matched(&file);
                    assert!(!found.belongs(), "{}+{offset:#x} bit {bit}", part.name);
                    let is_field = |offset: usize| {
                        let length = |form| if form == ABSOLUTE { 8 } else { 4 };
                        part.fields
                            .iter()
                            .any(|one| (one.offset..one.offset + length(one.form)).contains(&offset))
                    };
                    // A last jump that becomes a short one is read as that, and leads elsewhere.
                    let is_jump = linked.bytes[start + offset] == 0xeb;
                    if part.kind == Kind::Function && !is_field(offset) && !is_jump {
                        let told = outcome(&found, &part.name);
                        let Outcome::Mismatch(Difference::Bytes { offset: from, expected, found, at }) = told
                        else {
                            panic!("{}+{offset:#x}: {told:?}", part.name);
                        };
                        assert!(*from <= offset && offset - from < expected.len() && expected != found);
                        assert_eq!(at.0, miniature::BASE + (start + from) as u64);
                    }
                    linked.bytes[start + offset] ^= 1 << bit;
                    checked += 1;
                }
            }
        }
        assert!(checked > 500 && linked.matched(&file).belongs());
    }
}

#[test]
fn a_call_that_leads_elsewhere_is_found() {
    let source = example();
    let mut linked = Linked::new(&[&source], &ELSEWHERE);
    let field = linked.offset("beta") + 13;
    linked.put(field, CALL, ELSEWHERE[1].1 - 4);
    let found = linked.matched(&source.object(false));
    let Outcome::Mismatch(difference) = outcome(&found, "beta") else { panic!("{found:?}") };
    assert_eq!(
        difference.to_string(),
        "+0xd refers to left; that is at 0xffffffff82000000, and the image's field says 0xffffffff82000100"
    );
}

/// Without a symbol that tells where it is, each must say the same of a thing.
#[test]
fn references_must_agree() {
    let call = |name: &str| Part::function(name, &[0xe8, 0, 0, 0, 0, 0xc3], &[(1, CALL, "unknown", -4)]);
    let source = Source { parts: ["a", "b", "c"].map(call).into(), strings: Vec::new() };
    let mut linked = Linked::new(&[&source], &[("unknown", ELSEWHERE[0].1)]);
    linked.symbols.retain(|(_, _, name)| name != "unknown");
    let found = linked.matched(&source.object(true));
    let is_bound = |known| found.bindings.iter().any(|one| one.name == "unknown" && one.known == known);
    assert!(found.belongs() && is_bound(false) && !is_bound(true), "{found:?}");
    let field = linked.offset("b") + 1;
    linked.put(field, CALL, ELSEWHERE[1].1 - 4);
    let found = linked.matched(&source.object(true));
    let wrong: Vec<&str> =
        found.pieces().filter(|p| !matches!(p.outcome, Outcome::Matches { .. })).map(|p| &*p.name).collect();
    assert!(!found.belongs() && wrong == ["b"], "{found:?}");
}

/// Static functions of one name, equal byte by byte: told apart by what they call, by who calls them, by their
/// place in the section, and by their neighbours.
#[test]
fn static_functions_of_one_name_are_told_apart() {
    let twin = |calls: &str| Part::function("twin", &[0xe8, 0, 0, 0, 0, 0xc3], &[(1, CALL, calls, -4)]);
    let user =
        |name: &str, byte: u8| Part::function(name, &[byte, 0xe9, 0, 0, 0, 0], &[(2, CALL, "twin", -4)]);
    let alone = |name: &str, byte: u8| Part::function(name, &[byte, 0xc3], &[]);
    let file = |parts: [Part; 3]| Source { parts: parts.into(), strings: Vec::new() };
    // What differs, the object, and whether nothing would tell if it were not contiguous.
    for (first, second) in [
        (
            file([twin("left"), alone("a", 0x90), alone("x", 0x91)]),
            file([twin("right"), alone("b", 0x92), alone("y", 0x93)]),
        ),
        (
            file([twin("left"), user("a", 0x90), alone("x", 0x91)]),
            file([twin("left"), user("b", 0x92), alone("y", 0x93)]),
        ),
        (
            file([twin("left"), alone("a", 0x90), alone("x", 0x91)]),
            file([twin("left"), alone("b", 0x92), alone("y", 0x93)]),
        ),
        (
            file([alone("a", 0x90), alone("x", 0x91), twin("left")]),
            file([alone("b", 0x92), alone("y", 0x93), twin("left")]),
        ),
    ] {
        let linked = Linked::new(&[&first, &second], &ELSEWHERE);
        let places: Vec<u64> =
            linked.symbols.iter().filter(|(_, _, name)| name == "twin").map(|(at, ..)| *at).collect();
        for (source, at) in [(&first, places[0]), (&second, places[1])] {
            for split in [false, true] {
                let found = linked.matched(&source.object(split));
                assert!(found.belongs(), "{found:?}");
                assert_eq!(*outcome(&found, "twin"), Outcome::Matches { at: Gva(at) });
            }
        }
    }
    // Alone in its object, nothing tells.
    let only = Source { parts: vec![twin("left")], strings: Vec::new() };
    let found = Linked::new(&[&only, &only], &ELSEWHERE).matched(&only.object(false));
    assert!(
        matches!(outcome(&found, "twin"), Outcome::Ambiguous { at } if at.len() == 2) && !found.belongs()
    );
}

/// A weak definition that lost has no name in the image, which has another file's instead.
#[test]
fn weak_definitions_that_lost_are_told() {
    let source = Source {
        parts: vec![
            Part::function("before", &[0x90, 0xc3], &[]),
            Part::function("hook", &[0x91, 0x90, 0xc3], &[]).weak(),
            Part::function("caller", &[0xe8, 0, 0, 0, 0, 0xc3], &[(1, CALL, "hook", -4)]),
        ],
        strings: Vec::new(),
    };
    let strong =
        Source { parts: vec![Part::function("hook", &[0x92, 0xc3], &[]).global()], strings: Vec::new() };
    let also_weak =
        Source { parts: vec![Part::function("hook", &[0x92, 0xc3], &[]).weak()], strings: Vec::new() };
    for other in [&strong, &also_weak] {
        let mut linked = Linked::new(&[other, &source], &ELSEWHERE);
        let at = Gva(miniature::BASE + linked.offset("hook") as u64);
        for split in [false, true] {
            let found = linked.matched(&source.object(split));
            assert!(found.belongs(), "{found:?}");
            assert_eq!(*outcome(&found, "hook"), Outcome::Overridden { at });
        }
        // Of two weak ones, the loser is compared: it is behind the function before it.
        let hook = linked.offset("before") + 16;
        linked.bytes[hook] ^= 1;
        assert_eq!(linked.matched(&source.object(false)).belongs(), std::ptr::eq(other, &strong));
    }
    let found = Linked::new(&[&source], &ELSEWHERE).matched(&source.object(false));
    assert!(matches!(outcome(&found, "hook"), Outcome::Matches { .. }), "{found:?}");
}

/// With `-ffunction-sections` a last jump is long in the object and may be short in the image.
#[test]
fn a_short_last_jump_is_the_same_jump() {
    let jump = Part::function("jump", &[0x90, 0xe9, 0, 0, 0, 0], &[(2, CALL, "next", -4)]);
    let next = Part::function("next", &[0x91, 0xc3], &[]);
    let source = Source { parts: vec![jump, next], strings: Vec::new() };
    let mut linked = Linked::new(&[&source], &ELSEWHERE);
    let at = linked.offset("jump");
    linked.bytes[at + 1..at + 6].copy_from_slice(&[0xeb, 13, 0xcc, 0xcc, 0xcc]);
    let found = linked.matched(&source.object(true));
    assert!(found.belongs(), "{found:?}");
    assert_eq!(found.functions[0].size, 3, "in the image");
    linked.bytes[at + 2] = 14;
    assert!(!linked.matched(&source.object(true)).belongs(), "it leads to another place");
}

/// What objtool replaces, in an object that it was not run on.
#[test]
fn what_the_build_replaces_is_compared_by_its_tables() {
    let file = miniature::vmlinux();
    let (image, contents) =
        (KernelImage::parse(&file).expect("a kernel"), Contents::parse(&file).expect("a kernel"));
    let function = image.symbols().only("function").expect("it");
    let bytes = contents.bytes(function, 26).expect("its bytes").to_vec();
    let matched = |start: [u8; 5], fields: &[(usize, u32, &str, i64)]| {
        let code = [&start[..], &bytes[5..]].concat();
        let source = Source { parts: vec![Part::function("function", &code, fields)], strings: Vec::new() };
        let object = source.object(false);
        let object = Object::parse(&object).expect("an object");
        match_image(&object, &image, &contents).expect("within the budget").belongs()
    };
    assert!(matched([0x0f, 0x1f, 0x44, 0, 0], &[]), "replaced already");
    // The table of jumps says that it leads to function+10.
    assert!(matched([0xe9, 5, 0, 0, 0], &[]));
    assert!(!matched([0xe9, 6, 0, 0, 0], &[]));
    assert!(!matched([0xe8, 5, 0, 0, 0], &[]));
    assert!(matched([0xe9, 0, 0, 0, 0], &[(1, NEAR, ".text", 6)]));
    assert!(!matched([0xe9, 0, 0, 0, 0], &[(1, NEAR, ".text", 7)]), "its own section is elsewhere then");
    assert!(matched([0xe8, 0, 0, 0, 0], &[(1, CALL, "__fentry__", -4)]));
    assert!(!matched([0xe8, 0, 0, 0, 0], &[(1, CALL, "other", -4)]));
    // No table has a fentry call at the entry of `pair`.
    let pair = Part::function(
        "tail",
        &[&[0x90; 7][..], &[0xe8, 0, 0, 0, 0, 0xc3]].concat(),
        &[(8, CALL, "__fentry__", -4)],
    );
    let object = Source { parts: vec![pair], strings: Vec::new() }.object(false);
    let object = Object::parse(&object).expect("an object");
    assert!(!match_image(&object, &image, &contents).expect("within the budget").belongs());
}

#[test]
fn what_the_image_lacks_is_told() {
    let mut source = example();
    source.parts.push(Part::new("leave", ".exit.text", Kind::Function, &[0xc3], &[]));
    let mut linked = Linked::new(&[&source], &ELSEWHERE);
    let found = linked.matched(&source.object(false));
    assert!(matches!(outcome(&found, "leave"), Outcome::Discarded) && found.belongs(), "{found:?}");
    linked.symbols.retain(|(_, _, name)| name != "beta.cold");
    let found = linked.matched(&source.object(false));
    assert_eq!(*outcome(&found, "beta.cold"), Outcome::Mismatch(Difference::Missing));
    assert!(!found.belongs());
}

#[test]
fn what_is_no_object_is_named() {
    let good = example().object(false);
    let error = |file: &[u8]| Object::parse(file).expect_err("no object").to_string();
    assert!(error(b"#!/bin/sh").contains("does not begin as an ELF file"));
    assert!(error(&miniature::vmlinux()).contains("linked already"));
    let with = |at: usize, byte: u8| {
        let mut file = good.clone();
        file[at] = byte;
        error(&file)
    };
    assert!(with(18, 0xb7).contains("another machine"));
    // Of the first relocation, its kind: 9 is R_X86_64_GOTPCREL.
    let needle = [6_u64.to_le_bytes(), [4, 0, 0, 0, 3, 0, 0, 0]].concat();
    let at = good.windows(16).position(|window| window == needle);
    let at =
        at.or_else(|| good.windows(9).position(|window| window == [6, 0, 0, 0, 0, 0, 0, 0, 4])).expect("it");
    assert_eq!(
        with(at + 8, 9),
        "section .text+0x6 has a relocation of type 9; R_X86_64_64, PC32, PLT32, 32, 32S and PC64 are known, as a \
         kernel's code needs"
    );
    assert!(with(at, 0xff).contains("a relocation at 0xff is not in it"));
    assert!(good.windows(STRINGS.len()).any(|window| window == STRINGS.as_bytes()));
}

/// A function of random code that refers to anything.
fn function(number: usize, of: usize) -> impl Generator<Value = Part> {
    let field = (any::<bool>(), 0..3_usize, 0..of + 4, -8..8_i64);
    (prop::collection::vec(any::<u8>(), 4..48), prop::collection::vec(field, 0..5), any::<bool>()).prop_map(
        move |(bytes, fields, global)| {
            let mut part = Part::function(&format!("f{number}"), &bytes, &[]);
            let mut at = 0;
            for (wide, form, to, addend) in fields {
                let form = if wide { ABSOLUTE } else { [NEAR, CALL, SIGNED][form] };
                let length = if wide { 8 } else { 4 };
                if at + length > bytes.len() {
                    break;
                }
                let to = match to {
                    0 => "left".to_owned(),
                    1 => "counter".to_owned(),
                    2 => ".LC0".to_owned(),
                    3 => "state".to_owned(),
                    other => format!("f{}", other - 4),
                };
                part.fields.push(crate::sources::Field { offset: at, form, to, addend });
                at += length + usize::from(bytes[0] & 3);
            }
            Part { global, ..part }
        },
    )
}

fn source() -> impl Generator<Value = Source> {
    (1..6_usize).prop_flat_map(|of| {
        (0..of).map(|number| function(number, of)).collect::<Vec<_>>().prop_map(|mut parts| {
            parts.push(Part::new("counter", ".data", Kind::Data, &[1, 2, 3, 4], &[]));
            parts.push(Part::new("state", ".bss", Kind::Data, &[0; 8], &[]));
            Source { parts, strings: vec!["a string".into()] }
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_object_matches_the_image_it_is_linked_into(source in source(), split in any::<bool>()) {
        let found = Linked::new(&[&example(), &source], &ELSEWHERE).matched(&source.object(split));
        prop_assert!(found.belongs(), "{found:?}");
    }

    /// Nothing that differs from the image is taken for it: any byte of any function.
    #[test]
    fn any_byte_that_differs_is_found(
        source in source(),
        split in any::<bool>(),
        (function, at, bits) in (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1..=255_u8),
    ) {
        let mut linked = Linked::new(&[&source], &ELSEWHERE);
        let functions: Vec<&Part> = source.parts.iter().filter(|part| part.kind == Kind::Function).collect();
        let part = functions[function.index(functions.len())];
        let at = linked.offset(&part.name) + at.index(part.bytes.len());
        linked.bytes[at] ^= bits;
        prop_assert!(!linked.matched(&source.object(split)).belongs());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// Objects with random bytes written over them, and perhaps truncated.
    #[test]
    fn broken_objects_are_read_or_refused(
        split in any::<bool>(),
        breaks in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 1..9_usize), 1..8),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut file = example().object(split);
        for (at, edit, length) in breaks {
            let at = at.index(file.len() - length);
            file[at..at + length].copy_from_slice(&edit.to_le_bytes()[..length]);
        }
        let length = cut.map_or(file.len(), |cut| cut.index(file.len()));
        checks::object(&file[..length], &MINIATURE.0, &MINIATURE.1);
    }
}

fn compared(before: &Source, after: &Source) -> patcher::object::Comparison {
    let (before, after) = (before.object(true), after.object(true));
    let object = |file| Object::parse(file).expect("an object");
    patcher::object::compare(&object(&before), &object(&after)).expect("within the budget")
}

fn changes(found: &patcher::object::Comparison) -> Vec<(&str, Change)> {
    let all = found.functions.iter().chain(&found.data);
    all.filter(|(_, change)| **change != Change::Unchanged).map(|(name, change)| (&**name, *change)).collect()
}

#[test]
fn what_differs_between_two_objects_is_told() {
    let before = splittable();
    let found = compared(&before, &before);
    assert!(changes(&found).is_empty() && found.obstacles.is_empty(), "{found:?}");
    // Every function and variable once, each byte of it, and each field.
    for (index, part) in before.parts.iter().enumerate().filter(|(_, part)| part.section != ".bss") {
        let mut after = before.clone();
        for offset in 0..part.bytes.len() {
            let length = |form| if form == ABSOLUTE { 8 } else { 4 };
            let mut fields = part.fields.iter();
            if fields.any(|one| (one.offset..one.offset + length(one.form)).contains(&offset)) {
                continue;
            }
            after.parts[index].bytes[offset] ^= 1;
            let found = compared(&before, &after);
            assert_eq!(changes(&found), [(&*part.name, Change::Changed)], "+{offset:#x}");
            assert_eq!(found.obstacles.is_empty(), part.kind == Kind::Function, "{found:?}");
            after = before.clone();
        }
        for field in 0..part.fields.len() {
            after.parts[index].fields[field].addend += 1;
            let found = compared(&before, &after);
            assert_eq!(changes(&found), [(&*part.name, Change::Changed)], "{:?}", part.fields[field]);
            after = before.clone();
            after.parts[index].fields[field].to = "right".into();
            assert_eq!(changes(&compared(&before, &after)), [(&*part.name, Change::Changed)]);
            after = before.clone();
        }
    }
    // The strings' text, not their place.
    let mut after = before.clone();
    after.strings.insert(0, "zero".into());
    for field in after.parts.iter_mut().flat_map(|part| &mut part.fields) {
        field.to = field.to.replace(".LC1", ".LC2").replace(".LC0", ".LC1");
    }
    assert!(changes(&compared(&before, &after)).is_empty());
    after.strings[2] = "2".into();
    assert_eq!(changes(&compared(&before, &after)), [("alpha", Change::Changed)]);
    let mut after = before.clone();
    after.parts[0].name = "omega".into();
    assert_eq!(changes(&compared(&before, &after)), [("alpha", Change::Gone), ("omega", Change::New)]);
    let mut after = before.clone();
    after.parts.push(Part::new("extra", "__param", Kind::Data, &[1; 8], &[]));
    let found = compared(&before, &after);
    assert!(
        found.obstacles.contains(&Obstacle::UnknownSection { section: "__param.extra".into() }),
        "{found:?}"
    );
}

/// A line number is a constant that a known function takes.
#[test]
fn line_numbers_are_no_change() {
    let code = |line: u8, between: &[u8]| {
        let bytes = [&[0xba, line, 1, 0, 0][..], between, &[0xe8, 0, 0, 0, 0, 0xc3]].concat();
        (bytes, 6 + between.len())
    };
    let source = |callee: &str, line: u8, between: &[u8]| {
        let (bytes, field) = code(line, between);
        Source { parts: vec![Part::function("f", &bytes, &[(field, CALL, callee, -4)])], strings: Vec::new() }
    };
    let is_same = |callee: &str, between: &[u8]| {
        changes(&compared(&source(callee, 10, between), &source(callee, 13, between))).is_empty()
    };
    assert!(is_same("__ext4_error", &[]) && is_same("__ext4_error", &[0x31, 0xf6]), "xor esi, esi");
    assert!(!is_same("other", &[]), "its argument is no line");
    assert!(!is_same("__might_sleep", &[]), "in another register");
    assert!(!is_same("__ext4_error", &[0x89, 0xd0]), "mov eax, edx");
    assert!(!is_same("__ext4_error", &[0x74, 0x00]), "je");
}

/// Static variables are renumbered by a compiler; each stays the one that its users use.
#[test]
fn static_variables_keep_their_identity() {
    let user =
        |name: &str, of: &str| Part::function(name, &[0x8b, 0x05, 0, 0, 0, 0, 0xc3], &[(2, NEAR, of, -4)]);
    let once = |name: &str| Part::new(name, ".data", Kind::Data, &[0; 4], &[]);
    let source = |parts: &[Part]| Source { parts: parts.into(), strings: Vec::new() };
    let before = source(&[user("a", "once.1"), user("b", "once.2"), once("once.1"), once("once.2")]);
    let after = source(&[user("a", "once.7"), user("b", "once.8"), once("once.7"), once("once.8")]);
    let found = compared(&before, &after);
    assert!(changes(&found).is_empty() && found.obstacles.is_empty(), "{found:?}");
    let shared = source(&[user("a", "once.7"), user("b", "once.7"), once("once.7"), once("once.8")]);
    assert_eq!(changes(&compared(&before, &shared))[0], ("b", Change::Changed), "it uses the other's now");
}

/// What tables say of a function is a part of it: code that is equal may have another static key.
#[test]
fn what_tables_say_of_a_function_counts() {
    let table = |name: &str, bytes: &[u8], fields: &[(usize, u32, &str, i64)]| {
        Part::new("entry", name, Kind::Label, bytes, fields)
    };
    let source = |change: &dyn Fn(&mut Vec<Part>)| {
        let near = (0, NEAR, "f", 0);
        let mut parts = vec![
            Part::function("f", &[0x0f, 0x1f, 0x44, 0, 0, 0x0f, 0x0b, 0xc3], &[]),
            Part::function("g", &[0x90, 0xc3], &[]),
            table("__jump_table", &[0; 16], &[near, (4, NEAR, "f", 7), (8, FAR, "left", 2)]),
            table(
                "__bug_table",
                &[0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 9, 0],
                &[(0, NEAR, "f", 5), (4, NEAR, ".LC0", 4)],
            ),
            table("__ex_table", &[0; 12], &[near, (4, NEAR, "f", 7)]),
            // The first is of `f`, two bytes long, the second of `g`.
            table(
                ".altinstructions",
                &[0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 2, 2],
                &[(0, NEAR, "f", 5), (4, NEAR, ".altinstr_replacement", 0)],
            ),
            table(
                ".altinstructions",
                &[0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 1, 1],
                &[(0, NEAR, "g", 0), (4, NEAR, ".altinstr_replacement", 2)],
            ),
            table(".altinstr_replacement", &[0x66, 0x90, 0x90], &[]),
            table("runtime_shift_bits", &[0; 4], &[(0, NEAR, "f", 3)]),
            // Of the room before functions, which no code refers to.
            table("__patchable_function_entries", &[0; 8], &[(0, ABSOLUTE, ".text", 0)]),
        ];
        change(&mut parts);
        Source { parts, strings: vec!["file.c".into()] }
    };
    let before = source(&|_| {});
    let changed = |change: &dyn Fn(&mut Vec<Part>)| {
        let found = compared(&before, &source(change));
        assert!(found.obstacles.is_empty(), "{found:?}");
        changes(&found).iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>()
    };
    assert!(changed(&|_| {}).is_empty());
    assert_eq!(changed(&|parts| parts[2].fields[2].to = "right".into()), ["f"], "another key");
    assert_eq!(changed(&|parts| parts[2].fields[2].addend = 3), ["f"], "another branch");
    assert!(changed(&|parts| parts[3].bytes[8] = 8).is_empty(), "another line");
    assert_eq!(changed(&|parts| parts[3].bytes[10] = 8), ["f"], "another kind of warning");
    assert_eq!(changed(&|parts| parts[4].fields[1].addend = 6), ["f"], "another fixup");
    assert_eq!(changed(&|parts| _ = parts.remove(4)), ["f"], "no fixup");
    assert_eq!(changed(&|parts| _ = parts.remove(5)), ["f"], "no alternative, the last of its entries");
    assert_eq!(changed(&|parts| parts[5].bytes[8] = 4), ["f"], "another feature");
    assert_eq!(changed(&|parts| parts[7].bytes[2] = 0xc3), ["g"], "another replacement");
    assert_eq!(changed(&|parts| parts[7].bytes[..2].copy_from_slice(&[0x90, 0x90])), ["f"]);
    assert_eq!(changed(&|parts| parts[8].fields[0].addend = 2), ["f"], "another constant is the kernel's");
    assert_eq!(changed(&|parts| parts[8].section = "runtime_shift_other".into()), ["f"]);
    assert_eq!(changed(&|parts| _ = parts.remove(8)), ["f"], "none is");
    assert!(changed(&|parts| parts[9].fields[0].addend = 8).is_empty());
    // A jump has three fields.
    let odd = source(&|parts| _ = parts[2].fields.pop());
    assert!(compared(&before, &odd).obstacles.contains(&Obstacle::Tables));
}

/// A compiler writes a place as a distance from the instruction's end, of a section's symbol or of the variable's.
#[test]
fn one_place_has_one_name() {
    let variables = ["w", "x"].map(|name| Part::new(name, ".data", Kind::Data, &[1; 16], &[]));
    // cmp dword [rip + x], 7; ret
    let user =
        |to: &str, addend| Part::function("f", &[0x83, 0x3d, 0, 0, 0, 0, 7, 0xc3], &[(2, NEAR, to, addend)]);
    let object = |to: &str, addend| {
        let parts = [&[user(to, addend)][..], &variables].concat();
        Source { parts, strings: Vec::new() }.object(false)
    };
    let is_same = |one: &[u8], other: &[u8]| {
        let (one, other) = (Object::parse(one).expect("an object"), Object::parse(other).expect("an object"));
        changes(&patcher::object::compare(&one, &other).expect("within the budget")).is_empty()
    };
    assert!(is_same(&object("x", -5), &object(".data", 16 - 5)));
    assert!(!is_same(&object("x", -5), &object(".data", 16 - 4)));
    assert!(!is_same(&object("w", -5), &object(".data", 16 - 5)));
}

#[test]
fn names_that_are_not_unique_are_an_obstacle() {
    let twice = Part::function("f", &[0x90, 0xc3], &[]);
    let source = Source { parts: vec![twice.clone(), twice], strings: Vec::new() };
    let found = compared(&source, &source);
    assert_eq!(changes(&found), [("f", Change::Changed)]);
    assert_eq!(found.obstacles, [Obstacle::SeveralOfOneName { name: "f".into() }].into());
}

/// Functions that share all their bytes, and so many that each pair would have to be looked at.
#[test]
fn an_object_that_keeps_its_readers_busy_is_refused() {
    // An image of many functions of one name, and an object of as many, all of which overlap.
    let code: Vec<u8> = vec![0x90; 4096];
    let one = Source { parts: vec![Part::function("f", &code, &[])], strings: Vec::new() };
    let mut file = one.object(false);
    let entry = file.windows(8).position(|window| window == 4096_u64.to_le_bytes()).expect("its size");
    assert!(Object::parse(&file).is_ok());
    // Larger than its section.
    file[entry] = 1;
    let error = Object::parse(&file).map(|_| ()).expect_err("it is too large").to_string();
    assert!(error.contains("0x1001 bytes at 0x0 of section"), "{error}");
    let many = Source { parts: vec![Part::function("f", &code, &[]); 8], strings: Vec::new() };
    let file = many.object(false);
    let object = Object::parse(&file).expect("an object");
    let linked = Linked::new(
        &[&Source { parts: vec![Part::function("f", &code, &[]); 2000], strings: Vec::new() }],
        &[],
    );
    let (image, vmlinux) = linked.image();
    let contents = Contents::parse(&vmlinux).expect("a kernel");
    assert_eq!(match_image(&object, &image, &contents).err(), Some(patcher::object::Error::TooMuchWork));
}
