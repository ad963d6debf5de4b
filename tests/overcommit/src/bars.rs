//! What must hold: ratios between figures of the same run.

use serde::Serialize;

use crate::cases::{HOGS, Host, Method, VCPUS, Work};
use crate::parts::{AT_REST, CALLS, EXITS, RESTING};
use crate::record::{Cell, Line, Sample, Spread};

/// How many CPUs the host has.
const HOST_CPUS: u8 = 2;

/// A bar, and what was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bar {
    /// What must hold.
    pub claim: &'static str,
    /// Where it was looked at.
    pub on: String,
    /// The figures.
    pub found: String,
    /// Whether it holds.
    pub holds: bool,
}

/// Every bar that these cells have figures for.
#[must_use]
pub fn bars(cells: &[Cell], lines: &[Line]) -> Vec<Bar> {
    let mut bars = Vec::new();
    flat(cells, &mut bars);
    for vcpus in VCPUS {
        for vms in [1, 2] {
            faster(cells, Host { vcpus, busy: true, hogs: HOGS, vms }, &mut bars);
        }
    }
    for cell in cells
        .iter()
        .filter(|cell| cell.work == Work::Key && cell.method == Method::Breakpoint && cell.host.busy)
    {
        key(cells, cell, &mut bars);
    }
    for cell in cells.iter().filter(|cell| cell.work == Work::ManySites) {
        let one = find(cells, cell.host, Work::OneSite, cell.method);
        ratio(
            "4,096 sites take at most 20 times as long as one",
            format!("{}: {}, medians of the way there", cell.host, cell.method),
            (
                cell.applied_there().map(|spread| spread.median),
                one.and_then(Cell::applied_there).map(|spread| spread.median),
            ),
            |many, one| many <= 20 * one,
            &mut bars,
        );
    }
    at_rest(lines, &mut bars);
    firecracker(cells, lines, &mut bars);
    bars
}

/// A committed patch is executed by the guest alone.
fn at_rest(lines: &[Line], bars: &mut Vec<Bar>) {
    /// A strategy that left the guest at each hit would be a thousand times above it.
    const NOISE: f64 = 0.001;
    let median = |name: &str, unit: &str| {
        let line =
            lines.iter().find(|line| line.table == AT_REST && line.name == name && line.unit == unit)?;
        Spread::of(line.values.iter().copied()).map(|spread| spread.median as f64)
    };
    let [unpatched, _, patched] = RESTING;
    let figures = || Some((median(unpatched, EXITS)?, median(patched, EXITS)?, median(patched, CALLS)?));
    if let Some((before, after, calls)) = figures() {
        let per_hit = (after - before).max(0.0) / calls;
        bars.push(Bar {
            claim: "a committed patch takes no exit when it is hit",
            on: "2 vCPUs busy".into(),
            found: format!(
                "{per_hit:.6} exits more per call ({before} and {after} exits/s, {calls} calls/s)"
            ),
            holds: per_hit < NOISE,
        });
    }
}

fn find(cells: &[Cell], host: Host, work: Work, method: Method) -> Option<&Cell> {
    cells.iter().find(|cell| (cell.host, cell.work, cell.method) == (host, work, method))
}

fn ratio(
    claim: &'static str,
    on: String,
    figures: (Option<u64>, Option<u64>),
    holds: fn(u64, u64) -> bool,
    bars: &mut Vec<Bar>,
) {
    if let (Some(one), Some(other)) = figures {
        bars.push(Bar { claim, on, found: format!("{one} us and {other} us"), holds: holds(one, other) });
    }
}

/// Neither holds nor fences depend on the number of vCPUs. A fence waits for one interrupt if a vCPU
/// runs on the host's other CPU, and for nothing otherwise, which is a matter of luck: all programs of
/// few sites count.
fn flat(cells: &[Cell], bars: &mut Vec<Bar>) {
    let host = |vcpus| Host { vcpus, busy: true, hogs: HOGS, vms: 1 };
    let [few, .., many] = VCPUS.map(host);
    let at_most_twice = |many, few| many <= 2 * few;
    let hold = |host| Some(find(cells, host, Work::OneSite, Method::Hold)?.applied()?.p90);
    let fence = |host| {
        let cells = cells.iter().filter(|cell| cell.host == host && cell.work != Work::ManySites);
        Some(Spread::of(cells.flat_map(|cell| &cell.samples).filter_map(|sample| sample.fence))?.p90)
    };
    for (claim, figures) in [
        ("hold is flat: p90 with 32 vCPUs at most twice that with 2", (hold(many), hold(few))),
        (
            "fences are flat: p90 of programs' longest with 32 vCPUs at most twice that with 2",
            (fence(many), fence(few)),
        ),
    ] {
        ratio(claim, format!("busy, {HOGS} hogs"), figures, at_most_twice, bars);
    }
}

/// A hold does not wait for preempted vCPUs; others do.
fn faster(cells: &[Cell], host: Host, bars: &mut Vec<Bar>) {
    let p90 = |method| find(cells, host, Work::OneSite, method)?.applied().map(|spread: Spread| spread.p90);
    ratio(
        "hold: p90 at least 10 times below that of a signal-and-wait pause",
        host.to_string(),
        (p90(Method::Hold), p90(Method::Pause)),
        |hold, pause| 10 * hold <= pause,
        bars,
    );
    ratio(
        "hold: p90 at least 20 times below that of the guest's stop_machine",
        host.to_string(),
        (p90(Method::Hold), p90(Method::StopMachine)),
        |hold, stop| 20 * hold <= stop,
        bars,
    );
}

/// A key with many sites.
fn key(cells: &[Cell], ours: &Cell, bars: &mut Vec<Bar>) {
    let theirs = find(cells, ours.host, Work::Key, Method::TextPoke);
    let median = |cell: &Cell| cell.applied_there().map(|spread| spread.median);
    ratio(
        "breakpoint on the many-site key at least 10 times faster than the guest's own text_poke",
        format!("{}, medians of the way there", ours.host),
        (median(ours), theirs.and_then(median)),
        |ours, theirs| 10 * ours <= theirs,
        bars,
    );
    if ours.host.vcpus > HOST_CPUS || ours.host.hogs > 0 {
        // A vCPU that came out for a moment may find that the host has given its CPU away: that is
        // the host's time slice, not ours.
        return;
    }
    let without_traps = || ours.samples.iter().filter(|sample| sample.traps == 0);
    let longest = |what: fn(&Sample) -> Option<u64>| without_traps().filter_map(what).max();
    ratio(
        "no vCPU that hits no site stalls longer than one fence",
        format!("{}, {} changes without a trap", ours.host, without_traps().count()),
        (longest(|sample| sample.stall), longest(|sample| sample.fence)),
        |stall, fence| stall <= fence,
        bars,
    );
}

/// Firecracker 1.17 on the same rig.
fn firecracker(cells: &[Cell], lines: &[Line], bars: &mut Vec<Bar>) {
    for (vcpus, limit_ms) in [("4 vCPUs: from start", 3500), ("8 vCPUs: from start", 4000)] {
        let line = lines.iter().find(|line| line.name.starts_with(vcpus));
        if let Some(median) = line.and_then(|line| Spread::of(line.values.iter().copied())).map(|s| s.median)
        {
            bars.push(Bar {
                claim: "a guest is up sooner than with Firecracker 1.17 (3.5 s, 4.0 s)",
                on: vcpus.split(':').next().unwrap_or(vcpus).to_owned(),
                found: format!("{median} ms"),
                holds: median < limit_ms,
            });
        }
    }
    let host = Host { vcpus: 8, busy: true, hogs: HOGS, vms: 1 };
    if let Some(pause) = find(cells, host, Work::OneSite, Method::HurriedPause).and_then(Cell::applied) {
        bars.push(Bar {
            claim: "pausing is faster than with Firecracker 1.17 (median 11.6 ms, p90 15.5 ms)",
            on: host.to_string(),
            found: format!("median {} us, p90 {} us", pause.median, pause.p90),
            holds: pause.median < 11_600 && pause.p90 < 15_500,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(vcpus: u8, work: Work, method: Method, applied: u64) -> Cell {
        let host = Host { vcpus, busy: true, hogs: HOGS, vms: 1 };
        let fence = matches!(method, Method::Hold | Method::Breakpoint).then_some(applied);
        let sample = Sample { applied, stall: Some(5), fence, ..Sample::default() };
        Cell {
            host,
            work,
            method,
            samples: vec![sample; 30],
            failures: Vec::new(),
            kernel_errors: Vec::new(),
        }
    }

    #[test]
    fn bars_hold_or_not() {
        use Method::{Breakpoint, Hold, Pause, StopMachine, TextPoke};
        let cells = |slow: u64| {
            vec![
                cell(2, Work::OneSite, Hold, 100),
                cell(32, Work::OneSite, Hold, 200 + slow),
                cell(32, Work::OneSite, Pause, 2000),
                cell(32, Work::OneSite, StopMachine, 4000),
                cell(32, Work::ManySites, Hold, 4000),
                cell(8, Work::Key, Breakpoint, 100 + slow),
                cell(8, Work::Key, TextPoke, 1000),
            ]
        };
        let mut calm = cell(2, Work::Key, Breakpoint, 5);
        calm.host.hogs = 0;
        let stalls = |calm: &Cell| bars(std::slice::from_ref(calm), &[])[0].holds;
        assert!(stalls(&calm));
        calm.samples[7].stall = Some(6);
        assert!(!stalls(&calm));
        let line = |name: &str, unit: &str, value| Line {
            table: AT_REST.into(),
            name: name.into(),
            unit: unit.into(),
            values: vec![value],
        };
        let rest = |exits| {
            let lines = [
                line(RESTING[0], EXITS, 1000),
                line(RESTING[2], EXITS, exits),
                line(RESTING[2], CALLS, 1_000_000),
            ];
            bars(&[], &lines)[0].holds
        };
        assert_eq!([rest(900), rest(1900), rest(2001)], [true, true, false]);
        let verdicts = |slow| bars(&cells(slow), &[]).iter().map(|bar| bar.holds).collect::<Vec<_>>();
        assert_eq!(verdicts(0), [true; 6]);
        assert_eq!(verdicts(1), [false, false, false, false, false, true]);
    }
}
