//! Promise: who changed the guest, when and how is on disk before it is answered, and what can't be told there is
//! not done.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;
use tempfile::TempDir;
use tests::killed;
use tests::lab::Lab;
use tests::memory::guest_memory;
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm, audit_log};
use vmm::audit::chain::sha256;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("audit::who_changed_what_is_told", who),
    ("audit::what_cannot_be_told_is_not_done", unwritable),
    ("audit::a_killed_monitor_leaves_a_log_that_verifies", |lab| killed::killed(lab, 5)),
];

fn with_log(log: &Path) -> Setup {
    Setup { arguments: vec![audit_log(log)], ..Setup::cpus(2) }
}

fn lines(log: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(log)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// The exit code of `vmm audit verify`, and what it prints.
fn verified(lab: &Lab, log: &Path, more: &[&str]) -> Result<(Option<i32>, Value)> {
    let output = Command::new(&lab.vmm).args(["audit", "verify", "--json"]).args(more).arg(log).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let verdict = serde_json::from_str(&text).with_context(|| format!("{text} {output:?}"))?;
    Ok((output.status.code(), verdict))
}

fn who(lab: &Lab) -> Result<()> {
    let folder = TempDir::new()?;
    let (log, plan_file) = (folder.path().join("audit"), folder.path().join("plan.json"));
    let at_init = serde_json::json!({ "version": 1, "name": "early", "patches": [
        { "redirect": "__x64_sys_getpgrp", "to": "__x64_sys_getpid" }] });
    let early = folder.path().join("early.json");
    std::fs::write(&early, at_init.to_string())?;
    let mut setup = with_log(&log);
    setup.arguments.extend(["--patch".to_owned(), early.display().to_string()]);
    let vm = Vm::start(lab, &setup)?;
    // One log is not for two monitors.
    let second = Command::new(&lab.vmm)
        .arg("--kernel")
        .arg(&lab.kernel)
        .arg(audit_log(&log))
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(second.status.code() == Some(2) && said.contains("another monitor writes"), "{second:?}");

    let plan = redirect_plan("told", None).to_string();
    std::fs::write(&plan_file, &plan)?;
    let client = Command::new(&lab.vmm)
        .args(["patch", "apply", "--socket"])
        .arg(vm.socket())
        .arg(&plan_file)
        .stdout(Stdio::null())
        .spawn()?;
    let pid = client.id();
    ensure!(client.wait_with_output()?.status.success(), "the plan was not applied");
    let told = lines(&log)?;
    let (intent, outcome) = (&told[told.len() - 2], &told[told.len() - 1]);
    let program = std::fs::canonicalize(&lab.vmm)?;
    for line in [intent, outcome] {
        let who = &line["who"];
        ensure!(who["pid"] == pid && who["executable"] == program.display().to_string(), "{line:#}");
        ensure!(who["uid"] == rustix::process::getuid().as_raw(), "{line:#}");
        ensure!(line["patch"] == "told" && line["plan"]["sha256"] == sha256(plan.as_bytes()), "{line:#}");
    }
    ensure!(intent["event"] == "intent" && outcome["event"] == "outcome", "{intent:#} {outcome:#}");
    ensure!(outcome["state"] == "applied", "{outcome:#}");
    let site = &intent["change"]["sites"][0];
    ensure!(
        site["symbol"] == "__x64_sys_getppid" && site["before"] == sha256(&[0x0f, 0x1f, 0x44, 0, 0]),
        "{intent:#}"
    );
    ensure!(intent["change"]["build_id"].is_string() && site["after"] != site["before"], "{intent:#}");

    vm.request(Method::PUT, "/vm/pause", b"")?;
    vm.request(Method::PUT, "/vm/resume", b"")?;
    vm.revert("told")?;
    let (status, _) = vm.request(Method::POST, "/patches", b"{")?;
    ensure!(status == 400, "{status}");
    // What changes nothing is not told.
    vm.request(Method::POST, "/patches/check", plan.as_bytes())?;
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    vm.power_off()?;
    let told = lines(&log)?;
    let events: Vec<String> = told
        .iter()
        .map(|line| {
            let word = |name: &str| line[name].as_str().unwrap_or("-").to_owned();
            format!("{} {} {}", word("event"), word("action"), word("state"))
        })
        .collect();
    let expected = [
        "start - -",
        "intent apply -",
        "outcome apply applied",
        "intent apply -",
        "outcome apply applied",
        "intent pause -",
        "outcome pause done",
        "intent resume -",
        "outcome resume done",
        "intent revert -",
        "outcome revert reverted",
        "outcome apply refused",
        "end - -",
    ];
    ensure!(events == expected, "{events:#?}");
    ensure!(told[1]["who"] == "monitor" && told[1]["patch"] == "early", "{:#}", told[1]);
    ensure!(told[11]["codes"][0] == "plan_malformed", "{:#}", told[11]);
    let kernel = sha256(&std::fs::read(&lab.kernel)?);
    ensure!(told[0]["kernel_sha256"] == kernel, "{:#}", told[0]);
    ensure!(info["audit"]["lines"] == 12 && info["audit"]["failures"] == 0, "{info:#}");

    let (code, verdict) = verified(lab, &log, &[])?;
    ensure!(code == Some(0) && verdict["verified"] == true && verdict["lines"] == 13, "{verdict:#}");
    let last = verdict["last"].as_str().context("a digest")?;
    ensure!(verified(lab, &log, &["--expect-last", last])?.0 == Some(0));
    let text = std::fs::read_to_string(&log)?;
    let cut = text.trim_end().rsplit_once('\n').context("lines")?.0.to_owned() + "\n";
    std::fs::write(&log, cut)?;
    ensure!(verified(lab, &log, &[])?.0 == Some(0), "a cut end does not show by itself");
    ensure!(verified(lab, &log, &["--expect-last", last])?.0 == Some(6), "a cut end");
    std::fs::write(&log, text.replacen("\"uid\":0", "\"uid\":1", 1))?;
    let (code, verdict) = verified(lab, &log, &[])?;
    ensure!(
        code == Some(6) && verdict["broken"]["why"].as_str().is_some_and(|why| why.contains("edited")),
        "{verdict:#}"
    );
    Ok(())
}

/// The log may not grow, as on a full disk.
fn unwritable(lab: &Lab) -> Result<()> {
    let folder = TempDir::new()?;
    let log = folder.path().join("audit");
    let mut vm = Vm::start(lab, &with_log(&log))?;
    let pid = Pid::from_raw(i32::try_from(vm.pid())?);
    let limit = |bytes: Option<u64>| prlimit(pid, Resource::Fsize, Rlimit { current: bytes, maximum: None });
    let size = || -> Result<u64> { Ok(log.metadata()?.len()) };
    let plan = |name: &str| redirect_plan(name, Some("hold")).to_string().into_bytes();
    vm.request(Method::PUT, "/vm/pause", b"")?;
    let before = guest_memory(&vm)?;
    // No room, and then room for half a line.
    for more in [0, 100] {
        limit(Some(size()? + more))?;
        for (method, uri, body) in [
            (Method::POST, "/patches", plan("untold")),
            (Method::PUT, "/vm/resume", Vec::new()),
            (Method::PUT, "/vm/pause", Vec::new()),
        ] {
            let (status, answer) = vm.request(method, uri, &body)?;
            ensure!(
                status == 409 && answer["refusals"][0]["code"] == "audit_unwritable",
                "{uri}: {status} {answer:#}"
            );
        }
    }
    ensure!(guest_memory(&vm)? == before, "guest memory has changed");
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(info["state"] == "paused" && info["audit"]["failures"].as_u64() >= Some(6), "{info:#}");
    let (status, _) = vm.request(Method::GET, "/patches", b"")?;
    ensure!(status == 200, "reading needs no line: {status}");

    limit(None)?;
    let (status, answer) = vm.request(Method::PUT, "/vm/resume", b"")?;
    ensure!(status == 200, "{answer:#}");
    let from = size()?;
    vm.apply(&redirect_plan("known", Some("hold")))?;
    let text = std::fs::read_to_string(&log)?;
    let intent = text[usize::try_from(from)?..].lines().next().context("a line")?.len() as u64;
    vm.revert("known")?;

    // Room for what is about to be done, and not for its outcome.
    limit(Some(size()? + intent + 20))?;
    let (status, answer) = vm.request(Method::POST, "/patches", &plan("owed1"))?;
    ensure!(
        status == 500 && answer["state"] == "applied" && answer["audit_error"].is_string(),
        "{status} {answer:#}"
    );
    let (status, answer) = vm.request(Method::POST, "/patches/owed1/revert", b"")?;
    ensure!(status == 409 && answer["refusals"][0]["code"] == "audit_unwritable", "{status} {answer:#}");
    limit(None)?;
    vm.revert("owed1")?;
    let told = lines_of(&log)?;
    let outcomes = told.iter().filter(|line| line["event"] == "outcome" && line["patch"] == "owed1");
    ensure!(outcomes.count() == 2, "{told:#?}");
    vm.ask("cat /proc/uptime")?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()?;
    let (code, verdict) = verified(lab, &log, &[])?;
    ensure!(code == Some(0) && verdict["in_flight"] == serde_json::json!([]), "{verdict:#}");
    ensure!(verdict["torn"].as_array().is_some_and(|torn| torn.len() == 2), "{verdict:#}");
    Ok(())
}

/// The lines that are whole.
fn lines_of(log: &Path) -> Result<Vec<Value>> {
    Ok(std::fs::read_to_string(log)?.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}
