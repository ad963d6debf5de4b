//! From records to a report for people, and one for programs.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::json;

use crate::bars::bars;
use crate::cases::Host;
use crate::record::{Cell, Head, Line, Record, Sample, Spread};

const LEGEND: &str = "\
Times are in microseconds unless a unit is given; percentiles are values that were measured. *Applied* is from when the
request was there until the change was in force: as the monitor sees it, or, for the guest's own methods, the process in
the guest that asks for it. Half of the changes are the way there, half the way back, which needs fewer checks. *Client*: until the client that asked the monitor had its whole answer. *Program*: without the checks
before it. *Stall*: the longest time that the monitor kept a vCPU from running. *Gap*: the longest time that a CPU of the
workload made no call, for whatever reason, the host's scheduler included. *Begun anew*: because the guest was patching
itself. Failures stay in the table.
";

/// All records of a run, sorted.
#[derive(Debug, Default)]
pub struct Run {
    /// Where and by what.
    pub head: Option<Head>,
    /// Methods at work.
    pub cells: Vec<Cell>,
    /// Everything else.
    pub lines: Vec<Line>,
}

impl Run {
    /// Takes what belongs to parts that are complete.
    #[must_use]
    pub fn of(records: impl IntoIterator<Item = Record>) -> (Self, Vec<String>) {
        let (mut run, mut done) = (Self::default(), Vec::new());
        let (mut cells, mut lines) = (Vec::new(), Vec::new());
        for record in records {
            match record {
                Record::Head(head) => run.head = Some(head),
                Record::Cell(cell) => cells.push(cell),
                Record::Line(line) => lines.push(line),
                Record::Done { part } => {
                    done.push(part);
                    run.cells.append(&mut cells);
                    run.lines.append(&mut lines);
                }
                Record::Begun { .. } => {
                    cells.clear();
                    lines.clear();
                }
            }
        }
        (run, done)
    }

    /// The report for programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        json!({ "head": self.head, "bars": bars(&self.cells, &self.lines), "cells": self.cells, "lines": self.lines })
    }

    /// The report for people.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "# Patching on an overcommitted host\n")?;
        if let Some(head) = &self.head {
            writeln!(out, "{}. Machine: {}. Version: {}.", head.place, head.machine, head.version)?;
            let form = if head.quick { " --quick" } else { "" };
            writeln!(out, "To reproduce: `cargo overcommit{form} --fresh`.\n")?;
        }
        writeln!(out, "{LEGEND}")?;
        writeln!(out, "## What must hold\n")?;
        writeln!(out, "| | claim | where | found |\n|---|---|---|---|")?;
        for bar in bars(&self.cells, &self.lines) {
            let mark = if bar.holds { "holds" } else { "**missed**" };
            writeln!(out, "| {mark} | {} | {} | {} |", bar.claim, bar.on, bar.found)?;
        }
        writeln!(
            out,
            "\n## By host\n\n![latencies](latency.svg) ![stalls](stall.svg) ![vCPUs](vcpus.svg) ![sites](sites.svg)"
        )?;
        let mut by_host: BTreeMap<Host, Vec<&Cell>> = BTreeMap::new();
        for cell in &self.cells {
            by_host.entry(cell.host).or_default().push(cell);
        }
        for (host, cells) in by_host {
            writeln!(out, "\n### {host}\n")?;
            writeln!(
                out,
                "| work | method | applied median | p90 | p99 | max | n | there median | failed | client p90 | program p90 | stall p90 | stall max | gap median | gap max | traps | begun anew | kernel errors |"
            )?;
            writeln!(out, "|{}", "---|".repeat(18))?;
            for cell in cells {
                row(out, cell)?;
            }
        }
        self.tables(out)?;
        let failures: Vec<_> = self
            .cells
            .iter()
            .flat_map(|cell| {
                let lines = cell.failures.iter().chain(&cell.kernel_errors);
                lines.map(move |line| {
                    format!("- {}, {} by {}: {}", cell.host, cell.work, cell.method, shortened(line))
                })
            })
            .collect();
        if !failures.is_empty() {
            writeln!(
                out,
                "\n## Failures and what guests' kernels complained about\n\n{}",
                failures.join("\n")
            )?;
        }
        writeln!(out, "\nNot measured: QEMU's gdbstub (the rig's QEMU is built to emulate, not to use KVM).")
    }

    fn tables(&self, out: &mut String) -> std::fmt::Result {
        let mut tables: Vec<&str> = Vec::new();
        for line in &self.lines {
            if !tables.contains(&line.table.as_str()) {
                tables.push(&line.table);
            }
        }
        for table in tables {
            writeln!(
                out,
                "\n## {table}\n\n| | unit | median | p90 | p99 | max | n |\n|---|---|---|---|---|---|---|"
            )?;
            for line in self.lines.iter().filter(|line| line.table == table) {
                match Spread::of(line.values.iter().copied()) {
                    Some(Spread { median, p90, p99, max, n }) => {
                        writeln!(
                            out,
                            "| {} | {} | {median} | {p90} | {p99} | {max} | {n} |",
                            line.name, line.unit
                        )?;
                    }
                    None => writeln!(out, "| {} | {} | | | | | 0 |", line.name, line.unit)?,
                }
            }
        }
        Ok(())
    }
}

fn row(out: &mut String, cell: &Cell) -> std::fmt::Result {
    let text = |value: Option<u64>| value.map_or(String::new(), |value| value.to_string());
    let applied = cell.applied();
    let of = |what: fn(&Sample) -> Option<u64>| cell.of(what);
    let (client, stall, gap) = (of(|s| s.client), of(|s| s.stall), of(|s| s.gap));
    let traps: u64 = cell.samples.iter().map(|sample| sample.traps).sum();
    let anew: u64 = cell.samples.iter().map(|sample| sample.attempts.saturating_sub(1)).sum();
    writeln!(
        out,
        "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {traps} | {anew} | {} |",
        cell.work,
        cell.method,
        text(applied.map(|s| s.median)),
        text(applied.map(|s| s.p90)),
        text(applied.map(|s| s.p99)),
        text(applied.map(|s| s.max)),
        cell.samples.len(),
        text(cell.applied_there().map(|s| s.median)),
        cell.failures.len(),
        text(client.map(|s| s.p90)),
        text(of(|s| s.program).map(|s| s.p90)),
        text(stall.map(|s| s.p90)),
        text(stall.map(|s| s.max)),
        text(gap.map(|s| s.median)),
        text(gap.map(|s| s.max)),
        cell.kernel_errors.len(),
    )
}

/// A failure's report may be long.
fn shortened(text: &str) -> String {
    const MOST: usize = 200;
    let line: String = text.chars().take(MOST).map(|c| if c == '\n' { ' ' } else { c }).collect();
    if text.chars().count() > MOST { line + " ..." } else { line }
}
