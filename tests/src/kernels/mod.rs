//! `cargo soak kernels`: every stock kernel of the corpus in turn, or one of your own, patched by every strategy and in
//! every way that its guest could object to.
//!
//! Each kernel has a host of its own if that is emulated: what breaks the host costs one row.

mod parts;
mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use guest::provision::binaries::Monitor;
use guest::provision::corpus::{self, Stock};
use guest::rig::Stream;

use self::table::{Cell, Part, Row};
use crate::lab::{self, Lab, Place};
use crate::vm::Setup;

/// The campaign's options.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Only kernels whose release, or boot options, contain this.
    #[arg(long)]
    pub only: Option<String>,
    /// How many times each change is made.
    #[arg(long, default_value_t = 60)]
    pub rounds: usize,
    /// Keeps the rows in this file, a JSON object a line, and shows those that it has already.
    #[arg(long)]
    pub rows: Option<PathBuf>,
    /// A kernel image of your own, instead of the stock kernels.
    #[arg(long)]
    pub image: Option<PathBuf>,
}

/// Longest time for one kernel.
const DEADLINE: Duration = Duration::from_secs(3600);
/// Where the kernel is in an emulated host.
const IMAGE: &str = "guest/bzImage-corpus";
/// What the line begins with by which the inner process tells its row.
const MARK: &str = "@row ";

/// Goes through the corpus.
///
/// # Errors
/// When the corpus can't be provided, or no kernel is chosen. What fails on a kernel is in its row.
pub fn soak(options: &Options) -> Result<ExitCode> {
    if let Some(lab) = Lab::inherited() {
        let image = options.image.as_ref().context("no image")?;
        println!("{MARK}{}", serde_json::to_string(&row(&lab, image, options.rounds)?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let kernels = match &options.image {
        Some(image) => vec![Stock { release: image.display().to_string(), bzimage: image.clone() }],
        None => corpus::kernels()?,
    };
    let is_wanted = |kernel: &&Stock| options.only.as_ref().is_none_or(|part| kernel.release.contains(part));
    let kernels: Vec<&Stock> = kernels.iter().filter(is_wanted).collect();
    ensure!(!kernels.is_empty(), "the corpus has no such kernel");
    let count = kernels.len();
    let mut rows = options.rows.as_deref().map(table::kept).transpose()?.unwrap_or_default();
    let mut failed = 0;
    for (number, kernel) in (1..).zip(kernels) {
        println!("{} ({number} of {count}):", kernel.release);
        let started = Instant::now();
        let mut row = on(kernel, options.rounds).unwrap_or_else(|error| Row {
            release: kernel.release.clone(),
            date: String::new(),
            rounds: options.rounds,
            boots: 0,
            seconds: started.elapsed().as_secs(),
            cells: vec![(Part::Boot, Cell::failed(format!("{error:#}")))],
        });
        row.date = today()?;
        failed += usize::from(row.has_failed());
        if let Some(path) = &options.rows {
            table::keep(path, &row)?;
        }
        table::put(&mut rows, row);
    }
    println!("\n{}\n{} kernels passed, {failed} failed", table::markdown(&rows), count - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the parts on one kernel, here or in a host made for it.
fn on(kernel: &Stock, rounds: usize) -> Result<Row> {
    match lab::prepare_with(Monitor::Checked, &[(IMAGE, &kernel.bzimage)])? {
        Place::Here(lab) => row(&lab, &kernel.bzimage, rounds),
        Place::Rig(mut rigged) => {
            let arguments = ["kernels", "--image", &format!("/{IMAGE}"), "--rounds", &rounds.to_string()];
            let (mut output, mut shown) = (Vec::new(), 0);
            let code = rigged.run_self(arguments.map(str::to_owned), DEADLINE, |stream, bytes| {
                if stream == Stream::Stderr {
                    return lab::pass_on(stream, bytes);
                }
                output.extend_from_slice(bytes);
                while let Some(length) = output[shown..].iter().position(|byte| *byte == b'\n') {
                    let line = &output[shown..=shown + length];
                    shown += line.len();
                    if !line.starts_with(MARK.as_bytes()) {
                        lab::pass_on(stream, line);
                    }
                }
            })?;
            let output = String::from_utf8_lossy(&output);
            match output.lines().find_map(|line| line.strip_prefix(MARK)) {
                Some(row) => Ok(serde_json::from_str(row)?),
                None => bail!("exit code {code}\n{output}"),
            }
        }
    }
}

/// Runs the parts where guests can run.
fn row(lab: &Lab, image: &Path, rounds: usize) -> Result<Row> {
    let setup = Setup { kernel: Some(image.to_owned()), ..Setup::cpus(4) };
    let started = Instant::now();
    let release = parts::release(lab, &setup)?;
    let (mut boots, mut cells) = (1, Vec::new());
    for (part, guests, run) in parts::PARTS {
        println!("  {part:?}:");
        boots += guests;
        let cell = run(lab, &setup, rounds).unwrap_or_else(|error| {
            let text = format!("{error:#}");
            println!("{text}");
            Cell::failed(text)
        });
        println!("    {}", cell.line());
        cells.push((part, cell));
    }
    Ok(Row { release, date: String::new(), rounds, boots, seconds: started.elapsed().as_secs(), cells })
}

/// The day, in UTC.
pub(crate) fn today() -> Result<String> {
    let output = Command::new("date").args(["-u", "+%F"]).output().context("date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
