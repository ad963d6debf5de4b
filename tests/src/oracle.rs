//! The oracle: the same change made from outside in one VM, and by the guest itself in its
//! twin. Afterwards both have the same text, and the guest can go on from there.

use anyhow::{Context, Result, ensure};
use patcher::addr::Gva;
use patcher::image::{Found, KernelImage};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::targets::both_kernels;
use crate::vm::{SCHEDSTATS, Setup, Vm, read_guest_memory};

/// Something that a guest can switch, and a plan that does the same.
struct Switch {
    patches: Value,
    /// The file that switches it, and what to write there.
    path: String,
    to_new: String,
    to_old: String,
    /// The words of data that go with it: the kernel's own.
    words: Vec<String>,
    /// Whether the guest counts itself as one of several users, and so takes off only itself.
    counted: bool,
}

const FEATURES: &str = "/sys/kernel/debug/sched/features";

/// Switches that every guest has.
fn switches(features: &str) -> Vec<Switch> {
    let key = |name: &str, path: &str, enable: bool, (to_new, to_old): (&str, &str)| Switch {
        patches: json!([{ "static_key": name, "enable": enable }]),
        path: path.to_owned(),
        to_new: to_new.to_owned(),
        to_old: to_old.to_owned(),
        words: vec![name.to_owned()],
        counted: false,
    };
    let mut switches = vec![
        key("sched_schedstats", SCHEDSTATS, true, ("1", "0")),
        Switch {
            counted: true,
            ..key("bpf_stats_enabled_key", "/proc/sys/kernel/bpf_stats_enabled", true, ("1", "0"))
        },
        key("delayacct_key", "/proc/sys/kernel/task_delayacct", true, ("1", "0")),
        key("vm_numa_stat_key", "/proc/sys/vm/numa_stat", false, ("0", "1")),
    ];
    // The keys of the scheduler's features are an array in the order of this list.
    for (index, feature) in features.split_whitespace().enumerate() {
        let name = if index == 0 {
            "sched_feat_keys".to_owned()
        } else {
            format!("sched_feat_keys+{:#x}", 16 * index)
        };
        let plain = feature.strip_prefix("NO_").unwrap_or(feature);
        let (on, off) = (plain.to_owned(), format!("NO_{plain}"));
        let enable = plain != feature;
        let (to_new, to_old) = if enable { (on, off) } else { (off, on) };
        switches.push(key(&name, FEATURES, enable, (&to_new, &to_old)));
    }
    // A tracepoint is a key and a call of what listens to it.
    switches.push(Switch {
        patches: json!([
            { "static_key": "__tracepoint_sched_process_exit+0x8", "enable": true },
            { "static_call": "tp_func_sched_process_exit",
              "target": "trace_event_raw_event_sched_process_template" },
        ]),
        path: "/sys/kernel/tracing/events/sched/sched_process_exit/enable".into(),
        to_new: "1".into(),
        to_old: "0".into(),
        words: vec!["__tracepoint_sched_process_exit+0x8".into(), "__SCK__tp_func_sched_process_exit".into()],
        counted: false,
    });
    // A call that returns 0 instead of being made.
    switches.push(Switch {
        patches: json!([{ "static_call": "might_resched", "target": "__static_call_return0" }]),
        path: "/sys/kernel/debug/sched/preempt".into(),
        to_new: "none".into(),
        to_old: "voluntary".into(),
        words: vec!["__SCK__might_resched".into()],
        counted: false,
    });
    switches
}

/// What is compared: where it is in guest memory.
pub(crate) struct Places {
    image: KernelImage,
    text: Vec<u8>,
}

/// Where a kernel is loaded without KASLR (`CONFIG_PHYSICAL_START`).
const PHYSICAL_START: u64 = 16 << 20;

impl Places {
    pub(crate) fn new(setup: &Setup) -> Result<Self> {
        let kernel = setup.kernel.as_ref().context("a kernel")?;
        Ok(Self { image: KernelImage::parse(&std::fs::read(kernel)?)?, text: Vec::new() })
    }

    pub(crate) fn physical(&self, at: Gva) -> u64 {
        at.0 - self.image.text_base().0 + PHYSICAL_START
    }

    fn symbol(&self, name: &str) -> Result<Gva> {
        let (symbol, offset) = name.split_once("+0x").unwrap_or((name, "0"));
        match self.image.symbols().find(symbol) {
            Found::One(at) => Ok(Gva(at.0 + u64::from_str_radix(offset, 16)?)),
            other => Err(anyhow::anyhow!("{symbol}: {other:?}")),
        }
    }

    pub(crate) fn text(&self, vm: &Vm) -> Result<Vec<u8>> {
        let (start, end) = (self.symbol("_text")?, self.symbol("_etext")?);
        read_guest_memory(vm, self.physical(start), usize::try_from(end.0 - start.0)?)
    }

    /// Fails unless both have the same text and the same words of data. Returns how many bytes
    /// of text are not what they were when this was last asked.
    fn compare(&mut self, twins: &[&Vm; 2], words: &[String]) -> Result<usize> {
        let [outside, inside] = [self.text(twins[0])?, self.text(twins[1])?];
        let differ = differences(&outside, &inside);
        let places: Vec<String> = differ
            .iter()
            .take(20)
            .filter_map(|at| self.image.symbols().describe(Gva(self.image.text_base().0 + *at as u64)))
            .collect();
        ensure!(differ.is_empty(), "the twins differ in {} bytes: {places:?}", differ.len());
        for name in words {
            let at = self.physical(self.symbol(name)?);
            let [a, b] = [read_guest_memory(twins[0], at, 8)?, read_guest_memory(twins[1], at, 8)?];
            ensure!(a == b, "{name} is {a:02x?} from outside, {b:02x?} from inside");
        }
        let changed = differences(&outside, &self.text).len();
        self.text = outside;
        Ok(changed)
    }
}

/// Starts twins, each with something on its kernel's command line. Where the kernel lies is known.
fn start_twins(lab: &Lab, setup: &Setup, command_lines: [&str; 2]) -> Result<[Vm; 2]> {
    let twin = |command_line| {
        let command_line = format!("nokaslr {command_line}");
        Setup { command_line, memory_mib: 192, ..setup.clone() }
    };
    Vm::start_all(lab, &command_lines.map(twin))
}

/// Where two texts differ.
fn differences(a: &[u8], b: &[u8]) -> Vec<usize> {
    const BLOCK: usize = 4096;
    let blocks = a.chunks(BLOCK).zip(b.chunks(BLOCK)).enumerate().filter(|(_, (a, b))| a != b);
    let within = |(block, (a, b)): (usize, (&[u8], &[u8]))| -> Vec<usize> {
        (0..a.len()).filter(|at| a[*at] != b[*at]).map(|at| block * BLOCK + at).collect()
    };
    blocks.flat_map(within).collect()
}

/// Switches every lock prefix off in a guest with one vCPU that kept them, and on in a twin
/// that the kernel itself took them from: each becomes what the other was.
///
/// # Errors
/// The first difference.
pub fn lock_prefixes(lab: &Lab) -> Result<()> {
    for setup in both_kernels(lab, 1) {
        let [mut locked, mut unlocked] = start_twins(lab, &setup, ["noreplace-smp", ""])?;
        let mut places = Places::new(&setup)?;
        let switch = |vm: &Vm, on: bool| {
            let plan = json!({ "version": 1, "name": "locks", "deadline_ms": 60_000, "patches": [{ "smp_locks": on }] });
            let report = vm.apply(&plan)?;
            ensure!(report["strategy"] == "hold", "{}", report["strategy"]);
            report["sites"].as_array().map(Vec::len).context("sites")
        };
        for vm in [&mut locked, &mut unlocked] {
            vm.ask("locks")?;
        }
        let before = places.text(&locked)?;
        let sites = switch(&locked, false)?;
        places.compare(&[&locked, &unlocked], &[]).context("off")?;
        locked.revert("locks")?;
        ensure!(places.text(&locked)? == before, "reverting did not restore the text");
        ensure!(switch(&unlocked, true)? == sites, "there were {sites} to switch off");
        places.compare(&[&locked, &unlocked], &[]).context("on")?;
        ensure!(differences(&before, &places.text).is_empty(), "on, but not as before");
        for mut vm in [locked, unlocked] {
            let (_, outcome) = vm.ask("locks-end")?;
            ensure!(outcome.ends_with("clashes=0"), "{outcome}");
            vm.expect_no_kernel_errors()?;
            vm.power_off()?;
        }
        let listed = places.image.tables().smp_locks.as_ref().map_or(0, Vec::len);
        println!("{}: {sites} lock prefixes off and on again, of {listed} entries", places.image.release());
        ensure!(sites > 1000, "only {sites} lock prefixes");
    }
    Ok(())
}

/// Undoes the alternatives for a feature in a guest whose processor has it, and uses them in a
/// twin whose kernel was told at boot that it has not: each becomes what the other was.
///
/// # Errors
/// The first difference.
pub fn alternatives(lab: &Lab) -> Result<()> {
    /// `X86_FEATURE_POPCNT`: the instruction, or a function that counts the bits.
    const FEATURE: (&str, &str) = ("popcnt", "clearcpuid=151");
    for setup in both_kernels(lab, 1) {
        let [mut with, mut without] = start_twins(lab, &setup, ["", FEATURE.1])?;
        let mut places = Places::new(&setup)?;
        let plan = |enable: bool| {
            json!({ "version": 1, "name": "feature", "deadline_ms": 60_000,
                "patches": [{ "alternatives": FEATURE.0, "enable": enable }] })
        };
        for vm in [&mut with, &mut without] {
            vm.hammer("getcwd", 1, -1)?;
        }
        let before = places.text(&with)?;
        let report = with.apply(&plan(false))?;
        let sites = report["sites"].as_array().map_or(0, Vec::len);
        places.compare(&[&with, &without], &[]).context("undone")?;
        with.expect_all(false)?;
        with.revert("feature")?;
        ensure!(places.text(&with)? == before, "reverting did not restore the text");
        without.apply(&plan(true))?;
        places.compare(&[&with, &without], &[]).context("used")?;
        without.expect_all(false)?;
        println!("{}: {sites} alternatives for {}", places.image.release(), FEATURE.0);
        ensure!(sites > 20, "only {sites} alternatives");
        for mut vm in [with, without] {
            vm.expect_no_kernel_errors()?;
            vm.power_off()?;
        }
    }
    Ok(())
}

/// Runs the oracle on both kernels.
///
/// # Errors
/// The first difference.
pub fn twins(lab: &Lab) -> Result<()> {
    for setup in both_kernels(lab, 1) {
        compare(lab, &setup)?;
    }
    Ok(())
}

fn compare(lab: &Lab, setup: &Setup) -> Result<()> {
    let [mut outside, mut inside] = start_twins(lab, setup, ["", ""])?;
    for vm in [&mut outside, &mut inside] {
        vm.ask("mount debugfs /sys/kernel/debug")?;
        vm.mount_tracing()?;
        // With events this would switch others on.
        vm.ask("write /sys/kernel/tracing/options/record-cmd 0")?;
        // What was set before returns became jumps to a thunk is not what would be set now.
        vm.ask("write /sys/kernel/debug/sched/preempt voluntary")?;
        vm.expect_no_kernel_errors()?;
    }
    let mut places = Places::new(setup)?;
    places.compare(&[&outside, &inside], &[])?;
    let (features, _) = outside.ask(&format!("cat {FEATURES}"))?;
    let keys: Vec<String> = places.image.static_keys().into_iter().map(|key| key.name).collect();
    // Some features are looked at in another way.
    let has_jumps = |switch: &Switch| {
        switch.patches[0]["static_key"].as_str().is_none_or(|key| keys.iter().any(|name| name == key))
    };
    let switches: Vec<Switch> = switches(&features.concat()).into_iter().filter(has_jumps).collect();
    let mut changed = 0;
    for (number, switch) in switches.iter().enumerate() {
        let write = |value: &str| format!("write {} {value}", switch.path);
        let name = format!("oracle-{number}");
        let plan = json!({ "version": 1, "name": name, "deadline_ms": 60_000, "patches": switch.patches });
        outside.apply(&plan)?;
        inside.ask(&write(&switch.to_new))?;
        let bytes = places
            .compare(&[&outside, &inside], &switch.words)
            .with_context(|| switch.patches.to_string())?;
        ensure!(bytes > 0, "{} changed nothing", switch.patches);
        changed += bytes;
        // From here the guest goes on by itself, there and back.
        // What it remembers of its own doing is not so yet, though.
        outside.ask(&write(&switch.to_new))?;
        if switch.counted {
            outside.ask(&write(&switch.to_old))?;
        } else {
            for value in [&switch.to_old, &switch.to_new] {
                outside.ask(&write(value))?;
                inside.ask(&write(value))?;
                places
                    .compare(&[&outside, &inside], &switch.words)
                    .with_context(|| switch.patches.to_string())?;
            }
        }
        places.compare(&[&outside, &inside], &switch.words).with_context(|| switch.patches.to_string())?;
        outside.revert(&name)?;
        inside.ask(&write(&switch.to_old))?;
        places.compare(&[&outside, &inside], &switch.words).with_context(|| switch.patches.to_string())?;
    }
    outside.expect_no_kernel_errors()?;
    inside.expect_no_kernel_errors()?;
    println!("{}: {} switches, {changed} bytes of text", places.image.release(), switches.len());
    ensure!(switches.len() >= 22, "only {} switches", switches.len());
    outside.power_off()?;
    inside.power_off()
}
