//! `cargo soak fuzz`: runs the fuzz targets, one after the other, and writes down what they came to.
//!
//! The targets are built with the compiler's own instrumentation, so neither cargo-fuzz nor a nightly
//! toolchain is needed. Their seeds are made by tests. What a target grows from them stays in
//! `target/fuzz/corpus`, what made one fail in `target/fuzz/failed`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::kernels::today;

/// What can be chosen.
#[derive(Debug, Args)]
#[group(id = "fuzz")]
pub struct Options {
    /// How many minutes each target runs.
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
}

/// Crates with targets, and their targets: longest input in bytes.
const TARGETS: [(&str, &str, u32); 16] = [
    ("patcher", "plan", 4 << 10),
    ("patcher", "image", 64 << 10),
    ("patcher", "btf", 8 << 10),
    ("patcher", "kallsyms", 64 << 10),
    ("patcher", "compressed", 4 << 10),
    ("patcher", "object", 16 << 10),
    ("patcher", "live", 20 << 10),
    ("patcher", "resolve", 4 << 10),
    ("patcher", "relocate", 64),
    ("patcher", "store", 256),
    ("vmm", "breakpoint", 32 << 10),
    ("vmm", "paging", 32 << 10),
    ("vmm", "guard", 4 << 10),
    ("vmm", "ports", 1 << 10),
    ("vmm", "http", 4 << 10),
    ("vmm", "boot", 8 << 10),
];

/// Tests that write seeds: of which crate, which of its test binaries.
const SEEDS: [(&str, &[&str]); 3] =
    [("patcher", &["--test", "properties"]), ("vmm", &["--test", "fuzzed"]), ("vmm", &["--lib"])];

/// As cargo-fuzz builds them, without a sanitizer: there is no unsafe code in what these call.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks --cfg fuzzing";

/// Longest time for one input, in seconds, and most memory, in MiB.
const SLOWEST_S: u32 = 10;
const LARGEST_MIB: u32 = 2048;

/// Where the results are written.
const PAGE: &str = "docs/results/fuzzing.md";

/// What a target came to.
struct Run {
    executions: u64,
    seconds: f64,
    /// Edges of the program that were taken.
    coverage: u64,
    peak_mib: u64,
    failed: bool,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Runs the targets.
///
/// # Errors
/// When they can't be built or started.
pub fn soak(options: &Options) -> Result<ExitCode> {
    let chosen = |name: &str| options.target.as_deref().is_none_or(|only| only == name);
    let targets: Vec<_> = TARGETS.into_iter().filter(|(_, name, _)| chosen(name)).collect();
    ensure!(!targets.is_empty(), "there is no such target; there are {}", TARGETS.map(|t| t.1).join(", "));
    let folder = root().join("target/fuzz");
    let corpus = folder.join("corpus");
    for (package, which) in SEEDS {
        let test = ["test", "--quiet", "--package", package].into_iter().chain(which.iter().copied());
        let mut test = cargo(test.chain(["seed"]));
        run(test.env("FUZZ_CORPUS", &corpus).stdout(Stdio::null()))?;
    }
    for package in ["patcher", "vmm"] {
        let manifest = format!("{package}/fuzz/Cargo.toml");
        let build = ["build", "--quiet", "--release", "--bins", "--manifest-path", &manifest];
        run(cargo(build).env("RUSTFLAGS", FLAGS).env("CARGO_TARGET_DIR", &folder))?;
    }
    let mut runs = BTreeMap::new();
    for (_, name, longest) in targets {
        let result = fuzz(&folder, name, longest, options.minutes)?;
        println!(
            "{name}: {} inputs in {:.0} s, {} edges{}",
            result.executions,
            result.seconds,
            result.coverage,
            if result.failed { ", FAILED" } else { "" }
        );
        runs.insert(name, result);
    }
    let failed = runs.values().any(|run| run.failed);
    // A part of them does not replace the results of all.
    if options.target.is_none() {
        fs::write(root().join(PAGE), page(&runs, options.minutes)?)?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn cargo<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Runs one target on its seeds and what it made of them before.
fn fuzz(folder: &Path, name: &str, longest: u32, minutes: f64) -> Result<Run> {
    let corpus = folder.join("corpus").join(name);
    let failures = folder.join("failed");
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&failures)?;
    let binary = binary(folder, name)?;
    let started = Instant::now();
    let output = Command::new(binary)
        .arg(&corpus)
        .arg(format!("-artifact_prefix={}/{name}-", failures.display()))
        .arg(format!("-max_total_time={:.0}", minutes * 60.0))
        .arg(format!("-timeout={SLOWEST_S}"))
        .arg(format!("-rss_limit_mb={LARGEST_MIB}"))
        .arg(format!("-max_len={longest}"))
        .arg("-print_final_stats=1")
        .stdin(Stdio::null())
        .output()?;
    let seconds = started.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&output.stderr);
    let number = |line: Option<&str>| line.and_then(|text| text.split_whitespace().next()?.parse().ok());
    let last = |mark: &str| number(text.rfind(mark).and_then(|at| text.get(at + mark.len()..)));
    let failed = !output.status.success();
    if failed {
        eprintln!("{text}");
    }
    Ok(Run {
        executions: last("stat::number_of_executed_units:").unwrap_or(0),
        seconds,
        coverage: last(" cov:").unwrap_or(0),
        peak_mib: last("stat::peak_rss_mb:").unwrap_or(0),
        failed,
    })
}

/// Cargo puts it below a folder of the compiler's target if one is configured.
fn binary(folder: &Path, name: &str) -> Result<PathBuf> {
    let places = [folder.join("release"), folder.join("x86_64-unknown-linux-gnu/release")];
    match places.iter().map(|place| place.join(name)).find(|path| path.exists()) {
        Some(path) => Ok(path),
        None => bail!("{name} was not built in {}", folder.display()),
    }
}

fn page(runs: &BTreeMap<&str, Run>, minutes: f64) -> Result<String> {
    let mut page = format!(
        "# Fuzzing\n\n\
         {}: `cargo soak fuzz --minutes {minutes}`, one target after the other, each on one thread. An input fails\n\
         that panics, breaks a property, takes {SLOWEST_S} s or {LARGEST_MIB} MiB. Coverage is in edges of the\n\
         instrumented program, with the libraries in it. The targets and what each checks are in `patcher/fuzz` and\n\
         `vmm/fuzz`.\n\n\
         | target | inputs | a second | edges | most memory | result |\n|---|---|---|---|---|---|\n",
        today()?
    );
    for (_, name, _) in TARGETS {
        let Some(run) = runs.get(name) else { continue };
        let result = if run.failed { "**failed**" } else { "held" };
        let rate = run.executions as f64 / run.seconds;
        writeln!(
            page,
            "| {name} | {} | {rate:.0} | {} | {} MiB | {result} |",
            run.executions, run.coverage, run.peak_mib
        )?;
    }
    Ok(page)
}
