//! Spinlocks switched between native and paravirtual ones under contention.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::vm::{Vm, field};

/// Switches the spinlocks of a guest from paravirtual to native ones and back, so many times,
/// while every CPU contends for one of them. No sum may be lost, no error logged. Tells how
/// long that took, and what the guest got done with either kind.
///
/// # Errors
/// Anything unexpected.
pub fn switch(mut vm: Vm, times: usize) -> Result<String> {
    vm.ask("locks")?;
    let (mut to_native, mut to_kvm) = (Vec::new(), Vec::new());
    let (mut native, mut kvm) = (Rate::default(), Rate::default());
    for _ in 0..times {
        to_native.push(Times::of(&vm.apply(&plan("native", "native"))?)?);
        native.add(&mut vm)?;
        to_kvm.push(Times::of(&vm.revert("native")?)?);
        kvm.add(&mut vm)?;
    }
    let (_, outcome) = vm.ask("locks-end")?;
    let (added, sum) = (field(&outcome, "added")?, field(&outcome, "sum")?);
    ensure!(added == sum && added > 0, "updates were lost: {outcome}");
    ensure!(field(&outcome, "clashes")? == 0, "a descriptor was given twice: {outcome}");
    ensure!(native.added > 0 && kvm.added > 0, "no CPU got the lock: {native:?} {kvm:?}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()?;
    Ok(format!(
        "{times} times there and back, {sum} updates, none lost; updates a second: native {}, kvm {}\n  \
         to native: {}\n  to kvm:    {}",
        native.per_second(),
        kvm.per_second(),
        Times::spread(to_native),
        Times::spread(to_kvm)
    ))
}

/// A plan that switches the spinlocks.
#[must_use]
pub fn plan(name: &str, to: &str) -> Value {
    json!({ "version": 1, "name": name, "deadline_ms": 60_000,
        "patches": [{ "paravirt": "spinlocks", "to": to }] })
}

/// How long a switch took, in microseconds.
#[derive(Clone, Copy)]
struct Times {
    program: u64,
    stall: u64,
}

impl Times {
    fn of(report: &Value) -> Result<Self> {
        let time = |name: &str| report["timing"][name].as_u64().context("a time");
        Ok(Self { program: time("program_us")?, stall: time("longest_stall_us")? })
    }

    fn spread(all: Vec<Self>) -> String {
        let line = |name: &str, mut times: Vec<u64>| {
            times.sort_unstable();
            let at = |part: usize| times[(times.len() - 1) * part / 100];
            format!("{name} median {} p90 {} p99 {} max {} us", at(50), at(90), at(99), at(100))
        };
        let (program, stall) = all.iter().map(|times| (times.program, times.stall)).unzip();
        format!("{}, {}, n {}", line("program", program), line("longest stall", stall), all.len())
    }
}

/// How many updates there were in how much time.
#[derive(Debug, Default)]
struct Rate {
    added: u64,
    us: u64,
}

impl Rate {
    fn add(&mut self, vm: &mut Vm) -> Result<()> {
        let (_, said) = vm.ask("locks-in 100")?;
        self.added += field(&said, "added")?;
        self.us += field(&said, "us")?;
        Ok(())
    }

    fn per_second(&self) -> u64 {
        self.added * 1_000_000 / self.us.max(1)
    }
}
