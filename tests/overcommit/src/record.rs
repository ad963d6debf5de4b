//! What was measured, as it is kept in a file, a line each.

use serde::{Deserialize, Serialize};

use crate::cases::{Host, Method, Work};

/// One line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// What all other lines are worth: where and by what they were measured.
    Head(Head),
    /// A method at work on a host.
    Cell(Cell),
    /// Something else that was measured.
    Line(Line),
    /// What follows belongs to a part.
    Begun {
        /// Its name.
        part: String,
    },
    /// A part is complete.
    Done {
        /// Its name.
        part: String,
    },
}

/// Where and by what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The commit, and whether there was more than is committed.
    pub version: String,
    /// Whether it is the short form.
    pub quick: bool,
    /// What guests ran on.
    pub place: String,
    /// This machine's processor and how many of it.
    pub machine: String,
}

/// A method at work on a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// The host.
    pub host: Host,
    /// The work.
    pub work: Work,
    /// The method.
    pub method: Method,
    /// Each time that it worked.
    pub samples: Vec<Sample>,
    /// Each time that it did not, with the reason.
    pub failures: Vec<String>,
    /// What the guest's kernel complained about meanwhile.
    pub kernel_errors: Vec<String>,
}

/// One change, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Sample {
    /// From when the request was there until the change was in force: as the monitor saw it, or the
    /// guest's process if the guest did it.
    pub applied: u64,
    /// Until the monitor's client had the whole answer.
    pub client: Option<u64>,
    /// What the program took, which is behind the checks.
    pub program: Option<u64>,
    /// The longest time that the monitor kept a vCPU out of the guest.
    pub stall: Option<u64>,
    /// The longest time that a CPU of the workload made no call.
    pub gap: Option<u64>,
    /// The longest fence.
    pub fence: Option<u64>,
    /// Traps that were taken.
    pub traps: u64,
    /// How often the program was begun: more than once if the guest was patching itself.
    pub attempts: u64,
    /// Whether it was the way back, which needs fewer checks.
    pub back: bool,
}

/// Something that was measured many times.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// To which table it belongs.
    pub table: String,
    /// What it is.
    pub name: String,
    /// In which unit.
    pub unit: String,
    /// The values.
    pub values: Vec<u64>,
}

/// Percentiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// Half are below it.
    pub median: u64,
    /// Nine of ten are.
    pub p90: u64,
    /// 99 of 100 are.
    pub p99: u64,
    /// None is above it.
    pub max: u64,
    /// How many there are.
    pub n: usize,
}

impl Spread {
    /// Of these values, if there are any. The nearest rank: always a value that was measured.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut values: Vec<u64> = values.into_iter().collect();
        values.sort_unstable();
        let n = values.len();
        let at = |percent: usize| values[(n * percent).div_ceil(100).max(1) - 1];
        (n > 0).then(|| Self { median: at(50), p90: at(90), p99: at(99), max: at(100), n })
    }
}

impl Cell {
    /// From the request until it was in force.
    #[must_use]
    pub fn applied(&self) -> Option<Spread> {
        Spread::of(self.samples.iter().map(|sample| sample.applied))
    }

    /// The same, of the way there only.
    #[must_use]
    pub fn applied_there(&self) -> Option<Spread> {
        Spread::of(self.samples.iter().filter(|sample| !sample.back).map(|sample| sample.applied))
    }

    /// Something of each sample that has it.
    #[must_use]
    pub fn of(&self, what: fn(&Sample) -> Option<u64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let spread = Spread::of(1..=100).expect("values");
        assert_eq!((spread.median, spread.p90, spread.p99, spread.max, spread.n), (50, 90, 99, 100, 100));
        let few = Spread::of([7, 3, 5]).expect("values");
        assert_eq!((few.median, few.p90, few.max), (5, 7, 7));
        assert_eq!(Spread::of([]), None);
    }
}
