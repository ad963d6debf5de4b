//! Who writes what a person reads: a few files of the monitor, which escape what a guest or a client named. So that
//! is not left to whoever adds a message.

use std::path::{Path, PathBuf};

/// Words by which Rust code reaches standard output or standard error.
const OUTPUTS: [&str; 9] =
    ["stdout(", "stderr(", "println!", "print!(", "eprint", "dbg!", "STDOUT", "STDERR", "/dev/tty"];
/// Those that may: pages and JSON, messages, the log, and the guest's console, which is passed on as it is. The trap
/// says numbers and names of the monitor's own.
const MAY_WRITE: [&str; 5] =
    ["cli/output.rs", "host/stderr.rs", "host/log.rs", "host/sandbox/trap.rs", "cli/run.rs"];
/// Words by which a value becomes JSON text.
const JSON: [&str; 3] = ["serde_json::to_string", "serde_json::to_vec", "serde_json::to_writer"];
/// Those that may: each escapes it, or hands it to `cli/output.rs`.
const MAY_MAKE_JSON: [&str; 5] =
    ["api/reply.rs", "api/event_stream.rs", "audit/chain.rs", "cli/output.rs", "cli/run.rs"];
/// Where one makes JSON, there the other must be.
const ESCAPE: &str = "escape::json(";

/// The lines of a file that are code of the monitor, and not of its unit tests.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

/// What is wrong with a file, each in a sentence.
fn violations(path: &str, text: &str) -> Vec<String> {
    let names = |words: &[&'static str]| {
        code(text).find_map(|line| words.iter().copied().find(|word| line.contains(word)))
    };
    let mut wrong = Vec::new();
    if let Some(word) = names(&OUTPUTS).filter(|_| !MAY_WRITE.contains(&path)) {
        wrong.push(format!("{path} writes to a terminal by `{word}`: use `complain`, `tracing` or a page"));
    }
    if let Some(word) = names(&JSON) {
        if !MAY_MAKE_JSON.contains(&path) {
            wrong.push(format!("{path} makes JSON by `{word}`: use `reply::json` or `output::print_json`"));
        } else if names(&[ESCAPE]).is_none() {
            wrong.push(format!("{path} makes JSON and does not escape it"));
        }
    }
    wrong
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

#[test]
fn only_what_escapes_writes_to_people() {
    let root = super::root().join("vmm/src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 100, "only {} files were found", files.len());
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for file in files {
        let path = file.strip_prefix(&root).expect("below it").display().to_string();
        let text = std::fs::read_to_string(&file).expect("a file");
        seen += usize::from(MAY_WRITE.contains(&path.as_str()) || MAY_MAKE_JSON.contains(&path.as_str()));
        wrong.extend(violations(&path, &text));
    }
    assert_eq!(seen, 8, "each file of the lists is there");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_file_that_writes_by_itself_is_found() {
    let told = "fn f() {\n    println!(\"{}\", task.comm);\n}";
    assert_eq!(violations("vcpu/mod.rs", told).len(), 1);
    assert!(violations("cli/output.rs", told).is_empty());
    let tests = format!("#[cfg(test)]\nmod tests {{\n{told}\n}}");
    assert!(violations("vcpu/mod.rs", &tests).is_empty());
    let json = "serde_json::to_string(&event)";
    assert_eq!(violations("api/routes.rs", json).len(), 1);
    assert_eq!(violations("api/reply.rs", json).len(), 1);
    assert!(violations("api/reply.rs", "escape::json(serde_json::to_string(&event))").is_empty());
}
