//! The workload in a guest: every CPU hammers a system call and looks at each result.

use anyhow::{Result, ensure};

use crate::vm::{Vm, field};

/// What one CPU of the workload saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Results of the first kind.
    pub first: u64,
    /// Results of the second kind.
    pub second: u64,
    /// Other results, also of calls that began earlier; any is a failure.
    pub other: u64,
}

impl Vm {
    /// Makes every CPU hammer a system call.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn hammer(&mut self, call: &str, first: i64, second: i64) -> Result<()> {
        self.ask(&format!("hammer {call} {first} {second}")).map(drop)
    }

    /// What every CPU saw in calls that began after this one. Fails if a CPU made no call or
    /// saw an unexpected result.
    ///
    /// # Errors
    /// As [`Vm::ask`], and on anything unexpected.
    pub fn count(&mut self) -> Result<Vec<Seen>> {
        let (lines, _) = self.ask("count")?;
        let seen: Vec<Seen> = lines
            .iter()
            .filter_map(|line| line.strip_prefix("@count "))
            .map(|line| {
                let field = |name| field(line, name);
                Ok(Seen { first: field("first")?, second: field("second")?, other: field("other")? })
            })
            .collect::<Result<_>>()?;
        for (cpu, seen) in seen.iter().enumerate() {
            ensure!(seen.other == 0, "CPU {cpu} saw unexpected results: {seen:?}");
            ensure!(seen.first + seen.second > 0, "CPU {cpu} made no call");
        }
        Ok(seen)
    }

    /// Fails unless every CPU sees only results of the first kind (or the second).
    ///
    /// # Errors
    /// With what they saw.
    pub fn expect_all(&mut self, second: bool) -> Result<()> {
        let seen = self.count()?;
        let wrong = |seen: &Seen| if second { seen.first } else { seen.second };
        ensure!(seen.iter().all(|seen| wrong(seen) == 0), "expected second = {second} only, saw {seen:?}");
        Ok(())
    }
}
