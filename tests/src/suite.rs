//! What each test of a suite costs, and a summary of that for the end of a run.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many tests the summary names.
const SLOWEST: usize = 10;
/// What the line begins with by which a test in the rig tells what it waited for.
const MARK: &str = "waited: ";

/// How much of why a test failed the summary tells, in lines and bytes: what is kept of a run's output may be its end only.
const REASON: (usize, usize) = (12, 600);

/// What the tests of a run cost, and why some failed.
#[derive(Debug, Default)]
pub struct Costs(Mutex<Vec<Cost>>, Mutex<Vec<String>>);

#[derive(Debug)]
struct Cost {
    test: &'static str,
    took: Duration,
    waited: String,
}

impl Costs {
    /// Runs a test, which returns what it waited for beside its own result.
    pub fn of<T>(&self, test: &'static str, run: impl FnOnce() -> (T, String)) -> T {
        let started = Instant::now();
        let (result, waited) = run();
        let cost = Cost { test, took: started.elapsed(), waited };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(cost);
        result
    }

    /// Keeps why a test failed for the summary, by the output of the process that ran it or the error.
    pub fn failed(&self, test: &'static str, output: &str) {
        let own = format!("---- {test} ----");
        let behind = output.rsplit_once(&own).map_or(output, |(_, behind)| behind);
        let lines = behind
            .trim()
            .lines()
            .take_while(|line| !line.starts_with("Stack backtrace") && *line != "failures:");
        let mut reason = lines.take(REASON.0).collect::<Vec<_>>().join("\n    ");
        reason.truncate(reason.floor_char_boundary(REASON.1));
        self.1.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{test}\n    {reason}"));
    }

    /// The slowest tests, and how long all took, each with what was waited for.
    pub fn summary(&self) -> String {
        let mut costs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        costs.sort_by_key(|cost| std::cmp::Reverse(cost.took));
        let total: Duration = costs.iter().map(|cost| cost.took).sum();
        let mut text = format!("{} tests in {:.0} s; the slowest:\n", costs.len(), total.as_secs_f64());
        for Cost { test, took, waited } in costs.iter().take(SLOWEST) {
            text += &format!("  {:>6.1} s  {test} ({waited})\n", took.as_secs_f64());
        }
        for failed in self.1.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            text += &format!("failed: {failed}\n");
        }
        text
    }
}

/// Whether a test in the rig passed, by the exit code and the output of the process that ran it: this
/// very test must have run, as a filter that matches nothing passes too, and a process that answers
/// late tells of the test before.
///
/// # Errors
/// With the output.
pub fn verdict(test: &str, code: i32, output: &str) -> Result<(), String> {
    let is_this = output.lines().any(|line| line.starts_with(&format!("test {test} ")));
    if code == 0 && is_this && output.contains("test result: ok. 1 passed; 0 failed") {
        Ok(())
    } else {
        Err(format!("exit code {code}\n{output}"))
    }
}

/// The line by which a test in the rig tells what it waited for.
#[must_use]
pub fn mark(waited: &str) -> String {
    format!("{MARK}{waited}")
}

/// What a test in the rig waited for, from what it printed.
#[must_use]
pub fn waited(output: &str) -> String {
    output.lines().rev().find_map(|line| line.strip_prefix(MARK)).unwrap_or("it did not say").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_very_test_passes() {
        let passed = "\nrunning 1 test\ntest a::b ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored";
        assert!(verdict("a::b", 0, passed).is_ok());
        assert!(verdict("a::b", 1, passed).is_err());
        assert!(verdict("a::c", 0, passed).is_err());
        assert!(verdict("a::b", 0, "running 0 tests\n\ntest result: ok. 0 passed; 0 failed").is_err());
    }

    #[test]
    fn the_summary_names_the_slowest_first_and_what_they_waited_for() {
        let costs = Costs::default();
        for number in 0..=SLOWEST {
            let test = ["quick", "slow"][usize::from(number == 3)];
            let output = format!("noise\n{}\ntest result", mark("1 boots"));
            costs.of(test, || {
                std::thread::sleep(Duration::from_millis(if test == "slow" { 50 } else { 1 }));
                ((), waited(&output))
            });
        }
        let summary = costs.summary();
        let lines: Vec<&str> = summary.lines().collect();
        assert_eq!(lines.len(), 1 + SLOWEST, "{summary}");
        assert!(lines[0].starts_with("11 tests in 0 s"), "{summary}");
        assert!(lines[1].ends_with("slow (1 boots)"), "{summary}");
    }

    #[test]
    fn the_summary_says_why_tests_failed() {
        let costs = Costs::default();
        let noise = "line\n".repeat(50);
        costs.failed(
            "a::b",
            &format!("{noise}failures:\n\n---- a::b ----\nno such file\n\nStack backtrace:\n  0: main\n"),
        );
        costs.failed("a::c", &format!("the host is gone: {}", "ä".repeat(400)));
        let summary = costs.summary();
        let (_, told) = summary.split_once("failed: a::b\n").expect("it is told");
        assert!(told.starts_with("    no such file\n") && !told.contains("main"), "{summary}");
        assert!(told.contains("failed: a::c\n    the host is gone: ä") && told.len() < 700, "{summary}");
    }
}
