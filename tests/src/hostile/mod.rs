//! A guest that is the enemy (`guest::inside::hostile`), while plans are applied and reverted.

mod ending;
mod plans;
mod stage;
mod watch;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::plans::Plans;
use self::stage::Stage;
use self::watch::{Usage, Watch};
use crate::guard::guarded;
use crate::lab::Lab;
use crate::oracle::differences;
use crate::vm::{Setup, Vm, field};

/// What is seen at the first is no growth: buffers and histories fill up to their limits.
const WARM_UP: Duration = Duration::from_secs(15);
/// How much more memory of its own the monitor may have at the end, in KiB.
const GROWTH_KIB: u64 = 2048;
/// How many connections may just be served.
const SERVED: usize = 2;
/// For the rig, where the CPUs are emulated, and shared with all that attacks.
const SLOWEST_ANSWER: Duration = Duration::from_secs(5);

/// Every attack from ring 3 at once, with those from ring 0 beside them in turn, for so long, on both kernels, side
/// by side, all text guarded; garbage runs in place of the kernel in the end.
///
/// # Errors
/// Anything unexpected.
pub fn everything(lab: &Lab, time: Duration) -> Result<()> {
    for line in side_by_side(lab, |setup| attacked(lab, setup, time))? {
        println!("\n{line}");
    }
    Ok(())
}

fn attacked(lab: &Lab, setup: &Setup, time: Duration) -> Result<String> {
    let (ring0, ring3): (Vec<&str>, Vec<&str>) = NAMES.iter().partition(|name| name.starts_with("ring0-"));
    let mut attacked = Attacked::start(lab, setup)?;
    let share = time / u32::try_from(ring0.len())?;
    for one in &ring0 {
        let attacks = [&ring3[..], &[*one]].concat();
        attacked = attacked.by(&attacks, share).with_context(|| format!("with {one}"))?;
        println!("{}: {one} and all from ring 3: {}", attacked.stage.release, attacked.seen);
    }
    attacked.end(lab)
}

fn hostile(kernel: &Path) -> Setup {
    // A flooded console keeps a CPU in the kernel's printk for longer than the usual 21 s in the rig, where each byte
    // is an exit of an emulated guest. Longer than this nothing may take.
    let command_line = "nokaslr rcupdate.rcu_cpu_stall_timeout=120".into();
    guarded(Setup { kernel: Some(kernel.to_owned()), command_line, ..Setup::cpus(2) })
}

/// Each attack alone, for so long, on both kernels, side by side.
///
/// # Errors
/// With all that failed.
pub fn each(lab: &Lab, time: Duration) -> Result<()> {
    side_by_side(lab, |setup| in_turn(lab, setup, time)).map(drop)
}

/// The same on one kernel.
///
/// # Errors
/// As [`each`].
pub fn each_on(lab: &Lab, kernel: &Path, time: Duration) -> Result<()> {
    in_turn(lab, &hostile(kernel), time)
}

fn in_turn(lab: &Lab, setup: &Setup, time: Duration) -> Result<()> {
    let (mut failed, mut vm) = (Vec::new(), None);
    for name in NAMES {
        let attacked = match vm.take() {
            Some(vm) => vm,
            None => Attacked::start(lab, setup)?,
        };
        let release = attacked.stage.release.clone();
        match attacked.by(&[name], time) {
            Ok(attacked) => {
                println!("\n{release}: {name}: ok: {}", attacked.seen);
                vm = Some(attacked);
            }
            Err(error) => failed.push(format!("{release}: {name}: {error:?}")),
        }
    }
    ensure!(failed.is_empty(), "these attacks succeed:\n{}", failed.join("\n"));
    println!("\n{}", vm.context("no attack")?.end(lab)?);
    Ok(())
}

/// The attacks that there are.
const NAMES: &[&str] = guest::inside::hostile::NAMES;

fn side_by_side<T: Send>(lab: &Lab, run: impl Fn(&Setup) -> Result<T> + Sync) -> Result<Vec<T>> {
    let setups = [&lab.kernel, &lab.later_kernel].map(|kernel| hostile(kernel));
    std::thread::scope(|scope| {
        let run = &run;
        let runs: Vec<_> = setups.iter().map(|setup| scope.spawn(move || run(setup))).collect();
        let joined = runs.into_iter().map(|run| run.join().ok().context("a thread panicked")?);
        joined.collect()
    })
}

/// A VM whose guest attacks, and what was seen of that.
struct Attacked {
    vm: Vm,
    stage: Stage,
    seen: String,
}

impl Attacked {
    fn start(lab: &Lab, setup: &Setup) -> Result<Self> {
        let mut vm = Vm::start(lab, setup)?;
        let stage = Stage::prepare(&mut vm, setup)?;
        vm.hammer("getppid", 0, 1)?;
        Ok(Self { vm, stage, seen: String::new() })
    }

    /// Some attacks for so long, while plans are applied and reverted.
    fn by(mut self, attacks: &[&str], time: Duration) -> Result<Self> {
        let (vm, stage) = (&mut self.vm, &self.stage);
        let before = stage.text(vm)?;
        vm.ask(&format!("hostile {:#x} {}", stage.target, attacks.join(" ")))?;
        let mut plans = Plans::new(vm, stage)?;
        let watch = Watch::start(vm.socket());
        let started = Instant::now();
        let mut warm = None;
        while started.elapsed() < time || warm.is_none() {
            plans.round(vm)?;
            if warm.is_none() && started.elapsed() >= WARM_UP.min(time / 3) {
                warm = Some(Usage::of(vm)?);
            }
            if plans.rounds() % 20 == 0 {
                vm.count()?;
            }
        }
        let answers = watch.end()?;
        let (warm, now) = (warm.context("it was not warm")?, Usage::of(vm)?);
        let (lines, _) = vm.ask("hostile-end")?;
        let seen: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("@hostile ")).collect();
        ensure!(seen.len() == attacks.len(), "{seen:#?}");
        for line in &seen {
            let is_right = line.contains(" exit-status:-0 ") && field(line, "wrong")? == 0;
            ensure!(is_right && field(line, "done")? > 0, "{seen:#?}");
        }
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        let differ = differences(&before, &stage.text(vm)?);
        let places: Vec<String> = differ.iter().take(20).map(|at| stage.describe(*at)).collect();
        ensure!(differ.is_empty(), "{} bytes of text are not what they were: {places:?}", differ.len());
        ensure!(now.resident_kib < warm.resident_kib + GROWTH_KIB, "memory grows: {warm:?}, {now:?}");
        ensure!(now.descriptors <= warm.descriptors + SERVED, "descriptors grow: {warm:?}, {now:?}");
        ensure!(answers.p99 < SLOWEST_ANSWER, "{answers:?}");
        self.seen =
            format!("{answers:?}; {warm:?}, {now:?}; {}; attacks:\n  {}", plans.summary(), seen.join("\n  "));
        Ok(self)
    }

    fn end(self, lab: &Lab) -> Result<String> {
        watch::nothing_reaches_a_terminal(lab, &self.vm)?;
        let ending = ending::garbage(self.vm)?;
        Ok(format!("{}: {}\n  garbage in place of the kernel: {ending}", self.stage.release, self.seen))
    }
}
