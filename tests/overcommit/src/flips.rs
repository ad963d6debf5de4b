//! One method doing one kind of work, so many times, in a guest that runs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest::provision::livepatch;
use serde_json::{Value, json};

use crate::cases::{Host, MANY, Method, Work};
use crate::parts::Effort;
use crate::record::{Cell, Sample};
use tests::campaigns::many_sites::entries_plan;
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::test_function::{self, BEGIN, FUNCTION, PATCH};
use tests::vm::{self, SCHEDSTATS, Vm, field};

/// The file by which a guest switches its clock source, with `stop_machine`
/// (kernel/time/timekeeping.c, `timekeeping_notify`).
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
const CLOCKS: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";

/// So many changes there and back are made in any case.
const FEWEST: usize = 2;

/// A guest that is patched.
pub(super) struct Bench<'l> {
    lab: &'l Lab,
    host: Host,
    pub(super) vm: Vm,
    /// The plan of thousands of sites, once it was made.
    many: Option<Value>,
}

/// A change and the way back.
enum Flip {
    /// By a plan of ours.
    Plan(Value),
    /// By commands to the guest, which say how long they took.
    Guest([String; 2]),
    /// By pausing, as this asks for, and resuming.
    Pause(&'static str),
}

impl<'l> Bench<'l> {
    pub(super) fn new(lab: &'l Lab, host: Host, vm: Vm) -> Self {
        Self { lab, host, vm, many: None }
    }

    /// Does the work so many times, and looks what it does to the guest.
    pub(super) fn cell(&mut self, work: Work, method: Method, effort: Effort) -> Result<Cell> {
        let mut cell = Cell {
            host: self.host,
            work,
            method,
            samples: Vec::new(),
            failures: Vec::new(),
            kernel_errors: Vec::new(),
        };
        self.vm.kernel_errors()?;
        let flip = self.flip(work, method)?;
        self.gap()?;
        let started = Instant::now();
        let is_enough = |cell: &Cell| {
            let done = cell.samples.len() + cell.failures.len();
            let is_late = || effort.patience.is_some_and(|patience| started.elapsed() > patience);
            done >= effort.times || done >= FEWEST && is_late()
        };
        while !is_enough(&cell) {
            for direction in 0..2 {
                match self.once(&flip, direction)? {
                    Ok(sample) => {
                        cell.samples.push(Sample { gap: self.gap()?, back: direction == 1, ..sample });
                    }
                    Err(failure) => {
                        cell.failures.push(failure);
                        if direction == 0 {
                            // Something of it may be there.
                            let _ = self.once(&flip, 1)?;
                            self.gap()?;
                            break;
                        }
                    }
                }
            }
        }
        if method == Method::Store {
            self.vm.revert("lead")?;
            self.vm.revert(PATCH)?;
        }
        cell.kernel_errors = self.vm.kernel_errors()?;
        Ok(cell)
    }

    fn flip(&mut self, work: Work, method: Method) -> Result<Flip> {
        let strategy = method.to_string();
        Ok(match (work, method) {
            (_, Method::Pause) => Flip::Pause("/vm/pause?hurry=false"),
            (_, Method::HurriedPause) => Flip::Pause("/vm/pause"),
            (_, Method::TextPoke) => {
                Flip::Guest(["1", "0"].map(|value| format!("timed write {SCHEDSTATS} {value}")))
            }
            (_, Method::StopMachine) => {
                let (lines, _) = self.vm.ask(&format!("cat {CLOCKS}"))?;
                let clocks: Vec<&str> = lines.iter().flat_map(|line| line.split_whitespace()).collect();
                let [now, other, ..] = clocks[..] else {
                    anyhow::bail!("the guest has no two clock sources to switch between: {clocks:?}");
                };
                Flip::Guest([other, now].map(|clock| format!("timed write {CLOCK} {clock}")))
            }
            (_, Method::Livepatch) => {
                let (lines, _) = self.vm.ask("cat /proc/sys/kernel/osrelease")?;
                let module = format!("/modules/{}/{}.ko", lines.concat().trim(), livepatch::NAME);
                Flip::Guest([format!("livepatch {module}"), "livepatch-end".into()])
            }
            (Work::OneSite, Method::Store) => Flip::Plan(self.lay_site_for_a_store()?),
            (Work::OneSite, _) => Flip::Plan(redirect_plan("flip", Some(&strategy))),
            (Work::Key, _) => Flip::Plan(json!({ "version": 1, "name": "flip", "strategy": strategy,
                "deadline_ms": 60_000, "patches": [{ "static_key": "sched_schedstats", "enable": true }] })),
            (Work::ManySites, _) => {
                if self.many.is_none() {
                    self.many = Some(entries_plan(&self.vm, self.lab, MANY)?);
                }
                let mut plan = self.many.clone().context("a plan")?;
                (plan["name"], plan["strategy"]) = (json!("flip"), json!(strategy));
                Flip::Plan(plan)
            }
        })
    }

    /// An emulator shows a store as a whole only if it changes one byte, so the workload is led to
    /// a function that has such a site.
    fn lay_site_for_a_store(&mut self) -> Result<Value> {
        // xor eax, eax; clc (or stc); adc eax, 0; ret
        test_function::replace(&self.vm, |_, room| {
            let mut code = vec![0x31, 0xc0, 0xf8, 0x83, 0xd0, 0x00, 0xc3];
            code.resize(room, 0x90);
            Ok(code)
        })?;
        self.vm.apply(&json!({ "version": 1, "name": "lead", "deadline_ms": 60_000,
            "patches": [{ "redirect": "__x64_sys_getppid", "to": FUNCTION }] }))?;
        Ok(json!({ "version": 1, "name": "flip", "strategy": "store", "over": [PATCH], "deadline_ms": 60_000,
            "patches": [{ "at": format!("{FUNCTION}+{:#x}", BEGIN + 2), "expect": "f8", "replace": "f9" }] }))
    }

    /// One change, there or back; why it failed, if it did.
    fn once(&mut self, flip: &Flip, direction: usize) -> Result<Result<Sample, String>> {
        let started = Instant::now();
        Ok(match flip {
            Flip::Plan(plan) => {
                let (uri, body, wanted) = match direction {
                    0 => ("/patches", plan.to_string(), "applied"),
                    _ => ("/patches/flip/revert", String::new(), "reverted"),
                };
                let (_, report) = self.vm.request(vm::Method::POST, uri, body.as_bytes())?;
                let client = micros(started.elapsed());
                if report["state"] == wanted { Ok(sample(client, &report)) } else { Err(report.to_string()) }
            }
            Flip::Guest(commands) => match self.vm.ask(&commands[direction]) {
                Ok((_, answer)) => Ok(Sample { applied: field(&answer, "us")?, ..Sample::default() }),
                Err(error) => Err(error.to_string()),
            },
            Flip::Pause(uri) => {
                let (status, answer) = self.vm.request(vm::Method::PUT, uri, b"")?;
                let client = Some(micros(started.elapsed()));
                self.vm.request(vm::Method::PUT, "/vm/resume", b"")?;
                // Who was stopped first stood until all were, and were let go.
                let stall = Some(micros(started.elapsed()));
                match answer["took_us"].as_u64() {
                    Some(applied) => Ok(Sample { applied, client, stall, ..Sample::default() }),
                    None => Err(format!("{status}: {answer}")),
                }
            }
        })
    }

    /// How long a CPU of the workload stood still since this was last asked.
    fn gap(&mut self) -> Result<Option<u64>> {
        if !self.host.busy {
            return Ok(None);
        }
        let (_, answer) = self.vm.ask("gap")?;
        let cpus = field(&answer, "cpus")?;
        ensure!(cpus == u64::from(self.host.vcpus), "{cpus} CPUs work");
        field(&answer, "us").map(Some)
    }
}

fn sample(client: u64, report: &Value) -> Sample {
    let timing = &report["timing"];
    Sample {
        applied: timing["total_us"].as_u64().unwrap_or(client),
        client: Some(client),
        program: timing["program_us"].as_u64(),
        stall: timing["longest_stall_us"].as_u64(),
        gap: None,
        back: false,
        fence: timing["longest_fence_us"].as_u64(),
        traps: report["traps"].as_u64().unwrap_or(0),
        attempts: timing["attempts"].as_u64().unwrap_or(0),
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
