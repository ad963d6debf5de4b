//! What a log shows of what was done to it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::chain::MOST_LINE;
use super::log::{AuditLog, Error};
use super::record::{
    Change, Event, MOST_NAME, MOST_SITES, Outcome, Request, SiteDigest, Start, Who, short, shorter,
};
use super::verify::{Verdict, verify};
use crate::host::peer::Peer;

fn start() -> Event {
    Event::Start(Box::new(Start {
        version: "0",
        pid: 1,
        uid: 2,
        arguments: vec!["vmm".to_owned(), "\u{1b}\n\u{202e}".to_owned()],
        kernel: "k".to_owned(),
        kernel_sha256: String::new(),
        boot_id: None,
    }))
}

fn request(number: u64) -> Request {
    let who = Who::Client(Peer { uid: 1, gid: 2, pid: 3, executable: Some("/bin/\u{9b}31mx\n".to_owned()) });
    Request { request: number, who, action: "apply", patch: Some("p".to_owned()), plan: None }
}

fn intent(number: u64) -> Event {
    Event::Intent { request: request(number), change: None }
}

fn outcome(number: u64) -> Event {
    let outcome = Outcome { state: "applied".to_owned(), ..Outcome::default() };
    Event::Outcome { request: request(number), outcome, unlisted: 0 }
}

fn ended() -> Event {
    Event::End { ending: "Stopped".to_owned() }
}

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    (folder, path)
}

fn write(path: &Path, events: &[Event]) -> AuditLog {
    let mut log = AuditLog::open(path).expect("it opens");
    events.iter().for_each(|event| log.append(event).expect("there is room"));
    log
}

/// A log of two runs with two changes each, the last of which has no outcome.
fn log() -> (TempDir, PathBuf) {
    let (folder, path) = folder();
    drop(write(&path, &[start(), intent(1), outcome(1), intent(2), outcome(2), ended()]));
    drop(write(&path, &[start(), intent(1), outcome(1), intent(2)]));
    (folder, path)
}

fn verdict(text: &[u8]) -> Verdict {
    verify(text, None).expect("it is in memory")
}

fn why(text: &[u8]) -> (u64, String) {
    let broken = verdict(text).broken.expect("it is broken");
    (broken.line, broken.why)
}

#[test]
fn a_log_goes_on_over_runs_and_names_what_was_in_flight() {
    let (_folder, path) = log();
    let text = fs::read(&path).expect("it is there");
    assert_eq!(path.metadata().expect("it is there").permissions().mode() & 0o777, 0o600);
    assert!(!text.iter().any(|byte| byte.is_ascii_control() && *byte != b'\n'), "escaped");
    let found = verdict(&text);
    assert!(found.verified, "{found:?}");
    assert_eq!((found.lines, found.starts, found.ends, found.outcomes), (10, 2, 1, 3));
    assert_eq!(found.in_flight.len(), 1);
    assert_eq!((found.in_flight[0].number, found.in_flight[0].is_over), (9, false));
    drop(write(&path, &[start()]));
    let text = fs::read(&path).expect("it is there");
    assert!(verdict(&text).in_flight[0].is_over);
    let last = verdict(&text).last;
    assert!(verify(&text[..], Some(&last)).expect("read").verified);
    assert!(verdict(b"").verified, "nothing is a log, too");

    let (_folder, path) = folder();
    drop(write(&path, &[start(), intent(1), intent(2), intent(2), outcome(1)]));
    let in_flight = verdict(&fs::read(&path).expect("it is there")).in_flight;
    assert_eq!(in_flight.iter().map(|intent| intent.number).collect::<Vec<_>>(), [2]);
}

#[test]
fn every_kind_of_tampering_shows() {
    let (_folder, path) = log();
    let text = fs::read_to_string(&path).expect("it is there");
    let last = verdict(text.as_bytes()).last;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let all = lines.len();
    for at in 0..all {
        // A byte of the text, which stays JSON.
        let edited = lines[at].replacen("\"time\":\"2", "\"time\":\"3", 1);
        let mut with = lines.clone();
        with[at] = &edited;
        let found = verify(with.concat().as_bytes(), Some(&last)).expect("read").broken.expect("edited");
        // The last line is held by nothing but the expected digest.
        assert_eq!(found.line, (at + 2).min(all) as u64, "{found:?}");

        let mut without = lines.clone();
        without.remove(at);
        if at < all - 1 {
            let missing = (at as u64 + 1, format!("lines {at} to {at} are missing"));
            assert_eq!(why(without.concat().as_bytes()), missing);
        }
        let found = verify(without.concat().as_bytes(), Some(&last)).expect("read").broken.expect("cut");
        assert_eq!(found.line, (at + 1).min(all - 1) as u64, "{found:?}");

        let mut twice = lines.clone();
        twice.insert(at, lines[at]);
        let expected = (at as u64 + 2, format!("line {at} is there again, or out of order"));
        assert_eq!(why(twice.concat().as_bytes()), expected);

        let mut with_more = lines.clone();
        with_more.insert(at, "something\n");
        let (line, found) = why(with_more.concat().as_bytes());
        assert!(line == at as u64 + 2 && found.contains("were added"), "{line} {found}");
    }
    for at in 1..all {
        let mut swapped = lines.clone();
        swapped.swap(at - 1, at);
        assert_eq!(why(swapped.concat().as_bytes()).0, at as u64);
    }
    // Cut at its end: only the digest tells.
    let cut = lines[..all - 1].concat();
    assert!(verdict(cut.as_bytes()).verified);
    assert!(!verify(cut.as_bytes(), Some(&last)).expect("read").verified);
    assert_eq!(why((text + "something\n").as_bytes()).0, all as u64 + 1);
}

/// What a write that stopped anywhere leaves.
#[test]
fn a_torn_line_is_told_from_a_cut_one() {
    let (_folder, path) = log();
    let whole = fs::read(&path).expect("it is there");
    let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').expect("lines") + 1;
    for end in last..=whole.len() {
        fs::write(&path, &whole[..end]).expect("written");
        let found = verdict(&whole[..end]);
        let torn = u64::try_from(end - last).expect("short");
        // A line that lacks nothing but its end is one.
        let is_whole = end + 1 >= whole.len();
        assert!(found.verified && found.lines == if is_whole { 10 } else { 9 }, "{end}: {found:?}");
        let is_torn = torn > 0 && !is_whole;
        assert_eq!(found.torn.first().map(|torn| torn.bytes), is_torn.then_some(torn));

        drop(write(&path, &[start(), intent(1)]));
        let after = fs::read(&path).expect("it is there");
        assert!(after.starts_with(&whole[..end]), "nothing is rewritten");
        let found = verdict(&after);
        assert!(found.verified, "{end}: {found:?}");
        assert_eq!(found.torn.first().map(|torn| torn.bytes), is_torn.then_some(torn));
        assert_eq!(found.in_flight.len(), if is_whole { 2 } else { 1 });
        if is_torn {
            let mut edited = after.clone();
            edited[last] ^= 1;
            assert!(why(&edited).1.contains("were edited"), "{end}");
            let mut without = after.clone();
            without.drain(last..=end);
            assert!(why(&without).1.contains("are missing"), "{end}");
        }
        // Torn once more.
        let mut file = fs::File::options().append(true).open(&path).expect("it is there");
        file.write_all(b"\n{\"numb").expect("written");
        drop(write(&path, &[start()]));
        let found = verdict(&fs::read(&path).expect("it is there"));
        assert!(found.verified, "{end}: {found:?}");
    }
}

#[test]
fn the_first_line_may_be_torn_too() {
    let (_folder, path) = folder();
    drop(write(&path, &[start()]));
    let whole = fs::read(&path).expect("it is there");
    for end in 0..whole.len() {
        fs::write(&path, &whole[..end]).expect("written");
        drop(write(&path, &[start()]));
        let found = verdict(&fs::read(&path).expect("it is there"));
        assert!(found.verified, "{end}: {found:?}");
    }
}

#[test]
fn what_is_no_log_is_left_alone() {
    let (folder, path) = folder();
    fs::write(&path, "mine\n").expect("written");
    assert!(matches!(AuditLog::open(&path), Err(Error::Foreign)));
    assert_eq!(fs::read(&path).expect("it is there"), b"mine\n");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).expect("it is ours");
    assert!(matches!(AuditLog::open(&path), Err(Error::Open { mode: 0o620, .. })));
    let link = folder.path().join("link");
    let other = folder.path().join("log2");
    drop(AuditLog::open(&other).expect("it is free"));
    std::os::unix::fs::symlink(&other, &link).expect("a link");
    assert!(matches!(AuditLog::open(&link), Err(Error::Io(_))));
    assert!(matches!(AuditLog::open(folder.path()), Err(Error::Io(_))));
    assert!(matches!(AuditLog::open(Path::new("/dev/null")), Err(Error::NoFile)));
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    assert!(matches!(AuditLog::open(&pipe), Err(Error::NoFile)), "and it does not wait for a reader");
    let log = folder.path().join("log3");
    let first = AuditLog::open(&log).expect("it is free");
    assert!(matches!(AuditLog::open(&log), Err(Error::Taken)));
    drop(first);
    AuditLog::open(&log).expect("it is free again");
}

#[test]
fn the_longest_line_has_room() {
    let (_folder, path) = folder();
    // What is escaped longest.
    let long = short(&"\u{1}".repeat(5000));
    let site = || SiteDigest {
        at: "0xffffffffffffffff".to_owned(),
        symbol: shorter(&"\u{1}".repeat(5000), MOST_NAME),
        before: "0".repeat(64),
        after: "0".repeat(64),
    };
    let change = Change {
        release: long.clone(),
        build_id: Some("0".repeat(64)),
        strategy: "breakpoint".to_owned(),
        count: usize::MAX,
        data: usize::MAX,
        before: "0".repeat(64),
        after: "0".repeat(64),
        sites: (0..MOST_SITES).map(|_| site()).collect(),
    };
    let who = Who::Client(Peer { uid: 1, gid: 2, pid: 3, executable: Some(long.clone()) });
    let request = Request { request: 1, who, action: "apply", patch: Some(long), plan: None };
    let event = Event::Intent { request, change: Some(Box::new(change)) };
    let mut log = write(&path, &[event]);
    assert!(path.metadata().expect("it is there").len() < MOST_LINE as u64);
    let before = fs::read(&path).expect("it is there");
    let too_long = Event::End { ending: "x".repeat(MOST_LINE) };
    assert!(log.append(&too_long).is_err());
    assert_eq!(fs::read(&path).expect("it is there"), before, "a line that is too long is not begun");
    log.append(&ended()).expect("the next has room");
    assert!(verdict(&fs::read(&path).expect("it is there")).verified);
}
