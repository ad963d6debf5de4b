//! The monitor is killed at any moment of its programs: its audit log verifies, names what was in flight, and the
//! next monitor takes over its socket and its log.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vmm::api::client;
use vmm::audit::verify::{Verdict, verify};

use crate::lab::Lab;
use crate::patches::redirect_plan;
use crate::vm::{Method, Setup, Vm, audit_log};

/// Longest time until the monitor is killed.
const LONGEST: Duration = Duration::from_millis(400);
/// From so many moments on, some must have been in the middle of a program.
const MANY: usize = 30;

/// A patch, and what was asked for.
type Done = (String, &'static str);

/// What the client was told, and what it waits for.
#[derive(Default)]
struct Told {
    answered: BTreeSet<Done>,
    asked: Option<Done>,
}

/// Kills so many monitors.
///
/// # Errors
/// What the log does not say, or says wrongly.
pub fn killed(lab: &Lab, times: usize) -> Result<()> {
    let folder = TempDir::new()?;
    let (socket, log) = (folder.path().join("socket"), folder.path().join("audit"));
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let mut random = u64::try_from(seed & u128::from(u64::MAX))? | 1;
    let (mut in_flight, mut unanswered, mut answered) = (0, 0, 0);
    for round in 0..times {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let moment = LONGEST.mul_f64((random % 1000) as f64 / 1000.0) * lab.slow;
        let arguments = vec![audit_log(&log)];
        let setup = Setup { socket: Some(socket.clone()), arguments, ..Setup::cpus(2).lingering() };
        let vm = Vm::start(lab, &setup).with_context(|| format!("after {round} kills"))?;
        let told = Arc::new(Mutex::new(Told::default()));
        let client = {
            let (told, socket) = (told.clone(), socket.clone());
            std::thread::spawn(move || change_until_gone(&socket, round, &told))
        };
        std::thread::sleep(moment);
        // This kills it.
        drop(vm);
        let end = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        ensure!(socket.exists(), "it tidied up, so it was not killed");
        let told = std::mem::take(&mut *told.lock().unwrap_or_else(PoisonError::into_inner));
        let verdict = verify(BufReader::new(File::open(&log)?), None)?;
        let checked = check(&log, &verdict, &told);
        let (flying, written) = checked
            .with_context(|| format!("round {round}, killed after {moment:?}, {end:?}: {verdict:#?}"))?;
        in_flight += usize::from(flying);
        unanswered += usize::from(written);
        answered += told.answered.len();
    }
    println!(
        "{times} kills, {answered} changes answered; {in_flight} in the middle of a change, {unanswered} between \
         the last line and the answer"
    );
    ensure!(times < MANY || in_flight > 0, "no kill was in the middle of a change");
    let verdict = verify(BufReader::new(File::open(&log)?), None)?;
    ensure!(verdict.starts == times as u64 && verdict.ends == 0, "{verdict:#?}");
    Ok(())
}

/// Applies and reverts by one strategy after the other, until the monitor is gone.
fn change_until_gone(socket: &Path, round: usize, told: &Mutex<Told>) -> Result<()> {
    let lock = || told.lock().unwrap_or_else(PoisonError::into_inner);
    for number in 0.. {
        let strategy = ["breakpoint", "hold", "bypass", "inspect"][number % 4];
        let name = format!("r{round}-{number}");
        let plan = redirect_plan(&name, Some(strategy)).to_string().into_bytes();
        for (action, uri, body) in [
            ("apply", "/patches".to_owned(), plan),
            ("revert", format!("/patches/{name}/revert"), Vec::new()),
        ] {
            lock().asked = Some((name.clone(), action));
            let (status, answer) = client::request(socket, Method::POST, &uri, body)?;
            ensure!(status == 200, "{answer:#}");
            let mut told = lock();
            told.asked = None;
            told.answered.insert((name.clone(), action));
        }
    }
    Ok(())
}

/// Whether a change was in flight, and whether one was told to the log but not to the client.
fn check(log: &Path, verdict: &Verdict, told: &Told) -> Result<(bool, bool)> {
    ensure!(verdict.verified, "it does not verify");
    let text = std::fs::read_to_string(log)?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let (mut intents, mut outcomes) = (BTreeSet::new(), BTreeSet::new());
    let start = lines.iter().rposition(|line| line["event"] == "start").context("a start")?;
    for line in &lines[start..] {
        let action = if line["action"] == "apply" { "apply" } else { "revert" };
        let done = (line["patch"].as_str().unwrap_or_default().to_owned(), action);
        match line["event"].as_str() {
            Some("intent") => intents.insert(done),
            Some("outcome") => outcomes.insert(done),
            _ => false,
        };
    }
    ensure!(told.answered.is_subset(&outcomes), "an answer came before its line: {:?}", told.answered);
    ensure!(outcomes.is_subset(&intents), "an outcome without an intent");
    let flying: BTreeSet<Done> = intents.difference(&outcomes).cloned().collect();
    let listed = verdict.in_flight.iter().filter(|intent| !intent.is_over);
    let listed: Vec<_> = listed.map(|intent| intent.patch.clone().unwrap_or_default()).collect();
    let names: Vec<_> = flying.iter().map(|(name, _)| name.clone()).collect();
    ensure!(listed == names && names.len() <= 1, "in flight: {flying:?}, told: {listed:?}");
    let asked: BTreeSet<Done> = told.asked.iter().cloned().collect();
    ensure!(flying.is_subset(&asked), "in flight: {flying:?}, asked: {asked:?}");
    let unanswered = !asked.is_empty() && asked.is_subset(&outcomes);
    Ok((!flying.is_empty(), unanswered))
}
