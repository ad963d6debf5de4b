//! Documents stand alone and are true: what they link to and name exists, every test that a promise
//! names exists, and nothing cites a file that the repository does not have.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::{Attribute, Item};

/// The header of the table of promises.
const PROMISES: &str = "| promise | test |";
/// Folders that a repository path begins with, from the workspace's root or from a crate's.
const TOP: [&str; 7] = ["patcher", "vmm", "guest", "tests", "docs", ".ci", ".cargo"];
const IN_A_CRATE: [&str; 3] = ["src", "docs", "fuzz"];
/// Notes that the authors have and the repository does not.
const FOREIGN: [&str; 10] = [
    "../shared",
    "shared/seeds",
    "HOUSE.md",
    "DESIGN.md",
    "KERNELS.md",
    "FUNCTIONS.md",
    "RIG.md",
    "PEERS.md",
    "STYLE.md",
    "seed 00",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// The repository's files with an ending, sorted.
fn files(ending: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root().to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() && name != "target" && name != ".git" {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn documents() -> Vec<(PathBuf, String)> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a document");
        (path, text)
    };
    files("md").into_iter().map(read).collect()
}

/// The words in a document's inline code.
fn code_words(text: &str) -> Vec<&str> {
    let mut is_block = false;
    let mut words = Vec::new();
    for line in text.lines() {
        is_block ^= line.trim_start().starts_with("```");
        if !is_block {
            words.extend(line.split('`').skip(1).step_by(2).flat_map(str::split_whitespace));
        }
    }
    words
}

/// The links of a document that lead nowhere.
fn dead_links(document: &Path, text: &str) -> Vec<String> {
    let folder = document.parent().expect("a folder");
    let is_dead = |link: &&str| {
        let path = link.split('#').next().unwrap_or("");
        let is_relative = !path.is_empty() && !link.contains("://") && !link.starts_with("mailto:");
        is_relative && !folder.join(path).exists()
    };
    let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    links.filter(is_dead).map(str::to_owned).collect()
}

/// The repository paths in a document's inline code that are not there.
fn dead_paths(document: &Path, text: &str) -> Vec<String> {
    let mut bases: Vec<&Path> = document.ancestors().skip(1).collect();
    bases.retain(|base| base.starts_with(root()));
    let is_dead = |word: &&str| {
        let path = word.trim_end_matches(['.', ',', ';', ':', ')', '/']).trim_start_matches('(');
        let is_plain = path.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
        let Some((first, _)) = path.split_once('/').filter(|_| is_plain) else { return false };
        (TOP.contains(&first) || IN_A_CRATE.contains(&first))
            && !bases.iter().any(|base| base.join(path).exists())
    };
    code_words(text).into_iter().filter(is_dead).map(str::to_owned).collect()
}

/// The full names of all tests: of the whole-VM suite, and test functions with their modules.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in files("rs") {
        let text = fs::read_to_string(&path).expect("a source");
        if path.starts_with(root().join("tests/tests/vm")) {
            let is_name = |name: &&str| {
                name.contains("::") && name.chars().all(|c| c.is_ascii_alphanumeric() || "_:".contains(c))
            };
            let strings = text.lines().flat_map(|line| line.split('"').skip(1).step_by(2));
            names.extend(strings.filter(is_name).map(str::to_owned));
        }
        let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let below_root = path.strip_prefix(root()).expect("below the root").with_extension("");
        let module: Vec<String> = below_root.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        collect(&file.items, &module.join("::"), &mut names);
    }
    names
}

fn collect(items: &[Item], module: &str, names: &mut BTreeSet<String>) {
    let is_test = |attribute: &Attribute| attribute.path().is_ident("test");
    for item in items {
        match item {
            Item::Fn(item) if item.attrs.iter().any(is_test) => {
                names.insert(format!("{module}::{}", item.sig.ident));
            }
            Item::Mod(item) => {
                let within = item.content.as_ref().map_or(&[][..], |(_, items)| items);
                collect(within, &format!("{module}::{}", item.ident), names);
            }
            // `proptest!` holds functions.
            Item::Macro(item) => {
                let tokens = item.mac.tokens.to_token_stream().to_string();
                let after = |rest: &str| rest.split([' ', '(']).next().map(str::to_owned);
                let found = tokens.split("fn ").skip(1).filter_map(after);
                names.extend(found.map(|name| format!("{module}::{name}")));
            }
            _ => {}
        }
    }
}

/// Whether a test has this name, whole or its last parts; `*` stands for anything within a part.
fn is_named(test: &str, name: &str) -> bool {
    let (test, name): (Vec<&str>, Vec<&str>) = (test.split("::").collect(), name.split("::").collect());
    // A module of unit tests may be left out.
    let without: Vec<&str> = test.iter().copied().filter(|part| *part != "tests").collect();
    [test, without].iter().any(|test| {
        let last = test.len().checked_sub(name.len()).map(|from| &test[from..]);
        last.is_some_and(|last| last.iter().zip(&name).all(|(part, pattern)| fits(part, pattern)))
    })
}

fn fits(part: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => part == pattern,
        Some((start, rest)) => part.strip_prefix(start).is_some_and(|part| {
            (0..=part.len()).any(|at| part.is_char_boundary(at) && fits(&part[at..], rest))
        }),
    }
}

#[test]
fn links_and_paths_lead_somewhere() {
    let documents = documents();
    assert!(documents.len() > 15, "only {} documents", documents.len());
    let mut dead = Vec::new();
    for (path, text) in &documents {
        let found = dead_links(path, text).into_iter().chain(dead_paths(path, text));
        dead.extend(found.map(|what| format!("{}: {what}", path.display())));
    }
    assert!(dead.is_empty(), "these are not there:\n  {}", dead.join("\n  "));
}

#[test]
fn every_test_that_a_promise_names_exists() {
    let tests = tests();
    let (mut named, mut missing) = (0, Vec::new());
    for (path, text) in documents() {
        let Some((_, table)) = text.split_once(PROMISES) else { continue };
        for row in table.lines().skip(1).take_while(|line| line.starts_with('|')) {
            let cell = row.trim_end_matches('|').rsplit('|').next().unwrap_or("");
            for name in code_words(cell).into_iter().filter(|word| word.contains("::")) {
                named += 1;
                if !tests.iter().any(|test| is_named(test, name)) {
                    missing.push(format!("{}: {name}", path.display()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "no such test:\n  {}", missing.join("\n  "));
    assert!(named > 30, "only {named} tests are named under {PROMISES:?}");
}

#[test]
fn nothing_cites_what_the_repository_does_not_have() {
    let mut cited = Vec::new();
    for (path, text) in documents() {
        let found = FOREIGN.iter().filter(|name| text.contains(*name));
        cited.extend(found.map(|name| format!("{}: {name}", path.display())));
    }
    assert!(cited.is_empty(), "cited, but not in the repository:\n  {}", cited.join("\n  "));
}

#[test]
fn names_fit_whole_or_by_their_last_parts() {
    let test = "vmm::src::sync::rendezvous::tests::a_kick_is_seen";
    for (name, fits) in [
        ("rendezvous::a_kick_is_seen", true),
        ("rendezvous::tests::a_*_seen", true),
        ("sync::a_kick_is_seen", false),
        ("rendezvous::a_kick", false),
        ("flips::*", false),
    ] {
        assert_eq!(is_named(test, name), fits, "{name}");
    }
    assert!(is_named("flips::hold_300_times_on_4_vcpus", "flips::*_300_times_*"));
}

#[test]
fn what_is_not_there_is_found() {
    let document = root().join("patcher/docs/made-up.md");
    let text =
        "[a](limits.md#x) [b](gone.md) [c](https://x.y/z) `src/lib.rs` `patcher/src/gone.rs`, `fs/file.c`";
    assert_eq!(dead_links(&document, text), ["gone.md"]);
    assert_eq!(dead_paths(&document, text), ["patcher/src/gone.rs"]);
}
