//! Keeps the law of the house: a room uses only rooms below it, and no two files use each other,
//! not even in a circle of several.
//!
//! Every path that begins with `crate`, `self` or `super` counts as an arrow, in `use` items and
//! anywhere else, macros included; documentation links and unit tests do not.

mod arrows;
mod law;
mod writers;

use std::path::Path;

use arrows::{Arrow, Source};
use law::{GUEST, Law, MODEL, MONITOR, PATCHER};

fn root() -> &'static Path {
    // This crate's folder lies right below the workspace's.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

#[test]
fn rooms_use_only_rooms_below_them() {
    // The last column is how many arrows there are at least: fewer mean that they are not read.
    for (folder, law, least) in [
        ("patcher/src", &PATCHER, 101),
        ("vmm/src", &MONITOR, 101),
        ("patcher/model/src", &MODEL, 30),
        ("guest/src", &GUEST, 21),
    ] {
        let sources = arrows::read(&root().join(folder)).expect(folder);
        let arrows = arrows::of(&sources);
        assert!(arrows.len() >= least, "{folder}: only {} arrows were found", arrows.len());
        let wrong = law.violations(&sources, &arrows);
        assert!(wrong.is_empty(), "{folder}:\n  {}", wrong.join("\n  "));
    }
}

/// `patcher` uses no other crate of ours, `vmm` only `patcher`, `guest` none.
#[test]
fn crates_use_only_crates_below_them() {
    let crates: [(&str, &[&str]); 6] = [
        ("patcher", &[]),
        ("patcher/model", &["patcher"]),
        ("guest", &[]),
        ("vmm", &["patcher"]),
        ("tests", &["patcher", "vmm", "guest"]),
        ("tests/overcommit", &["patcher", "vmm", "guest", "tests"]),
    ];
    let ours = ["patcher", "model", "guest", "vmm", "tests", "overcommit"];
    for (folder, allowed) in crates {
        let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).expect(folder);
        let dependencies = manifest.split("[dependencies]").nth(1).expect("it has dependencies");
        let used = dependencies.lines().filter_map(|line| line.split(['.', ' ']).next());
        for name in used.filter(|name| ours.contains(name)) {
            assert!(allowed.contains(&name), "{folder} uses {name}");
        }
    }
}

fn made_up(files: &[(&str, &str)]) -> (Vec<Source>, Vec<Arrow>) {
    let source = |(path, text): &(&str, &str)| Source::parse(path, text).expect(path);
    let sources: Vec<Source> = files.iter().map(source).collect();
    let arrows = arrows::of(&sources);
    (sources, arrows)
}

const LAW: Law = Law(&[&["low"], &["left", "right"], &["high"]]);

#[test]
fn an_arrow_that_runs_up_is_found() {
    let (sources, arrows) = made_up(&[
        ("lib.rs", "mod low; mod high;"),
        ("low.rs", "fn f() { println!(\"{}\", crate::high::g()) }"),
        ("high.rs", "use crate::low::f; #[cfg(test)] mod tests { use super::*; }"),
    ]);
    let wrong = LAW.violations(&sources, &arrows);
    assert_eq!(
        wrong,
        ["low.rs uses high.rs: `low` is below `high`", "a circle: low.rs -> high.rs -> low.rs"]
    );
}

#[test]
fn neighbours_that_use_each_other_are_found() {
    let (sources, arrows) = made_up(&[
        ("left/mod.rs", "pub mod a;"),
        ("left/a.rs", "use crate::{right::R, low};"),
        ("right.rs", ""),
        ("low.rs", ""),
    ]);
    let wrong = LAW.violations(&sources, &arrows);
    assert_eq!(wrong, ["left/a.rs uses right.rs: `left` and `right` are neighbours"]);
}

#[test]
fn a_circle_inside_a_room_is_found() {
    let (sources, arrows) = made_up(&[
        ("low/mod.rs", "mod a; mod b; mod c;"),
        ("low/a.rs", "use super::b::{self, B};"),
        ("low/b.rs", "use crate::low::c::C;"),
        ("low/c.rs", "impl crate::low::a::A for C {}"),
    ]);
    assert_eq!(LAW.violations(&sources, &arrows), ["a circle: low/a.rs -> low/b.rs -> low/c.rs -> low/a.rs"]);
}

#[test]
fn a_file_that_uses_what_its_folder_re_exports_of_another_makes_a_circle() {
    let (sources, arrows) = made_up(&[
        ("low/mod.rs", "mod a; mod b; pub use a::A;"),
        ("low/a.rs", "use crate::low::b::B;"),
        ("low/b.rs", "use crate::low::A;"),
    ]);
    assert_eq!(
        LAW.violations(&sources, &arrows),
        ["a circle: low/mod.rs -> low/a.rs -> low/b.rs -> low/mod.rs"]
    );
}

#[test]
fn a_file_in_no_room_is_found() {
    let (sources, arrows) = made_up(&[("attic.rs", "")]);
    assert_eq!(LAW.violations(&sources, &arrows), ["attic.rs is in no room of the law"]);
}
