//! `cargo overcommit`: live patching on an overcommitted host, measured against everything that
//! people use today.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use guest::provision::binaries::Monitor;
use guest::rig::Stream;
use overcommit::bars::bars;
use overcommit::cases::Form;
use overcommit::parts::{Effort, HOG, Part, parts};
use overcommit::plots;
use overcommit::record::{Head, Record, Spread};
use overcommit::report::Run;
use tests::lab::{self, Lab, Place};

/// Live patching on an overcommitted host, measured against what people use today.
#[derive(Debug, Parser)]
#[command(after_help = "\
Writes target/overcommit/report.md, report.json and plots. A run that was interrupted goes on where it was.

Examples:
  cargo overcommit                all hosts; hours
  cargo overcommit --quick        a few, in minutes
  cargo overcommit --smoke        one, everything twice: whether it works
  cargo overcommit --fresh        forget what was measured before
  cargo overcommit --only '8 vCPUs busy'   parts whose name begins so
  cargo overcommit --report       measure nothing; the reports again, of what was measured")]
struct Arguments {
    /// A few hosts only.
    #[arg(long)]
    quick: bool,
    /// One host, everything twice: whether it works. The figures mean little.
    #[arg(long, conflicts_with = "quick")]
    smoke: bool,
    /// Forget what was measured before.
    #[arg(long)]
    fresh: bool,
    /// Only parts whose name begins with this.
    #[arg(long)]
    only: Option<String>,
    /// Measure nothing; only make the reports again.
    #[arg(long, conflicts_with_all = ["fresh", "only"])]
    report: bool,
    /// Parts that are there already (used inside the rig).
    #[arg(long, hide = true)]
    done: Vec<String>,
    /// What keeps a CPU busy (used inside the rig).
    #[arg(hide = true, value_parser = [HOG])]
    role: Option<String>,
}

impl Arguments {
    fn form(&self) -> Form {
        match (self.quick, self.smoke) {
            (_, true) => Form::Smoke,
            (true, _) => Form::Quick,
            _ => Form::Whole,
        }
    }
}

/// Longest time for everything.
const DEADLINE: Duration = Duration::from_secs(12 * 3600);
/// How a record is marked on its way out of the rig.
const MARK: &str = "@record ";

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.role.is_some() {
        loop {
            std::hint::spin_loop();
        }
    }
    if let Some(lab) = Lab::inherited() {
        measure(&lab, &arguments, &mut |record| {
            println!("{MARK}{}", serde_json::to_string(&record)?);
            Ok(())
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    guest::provision::packages::ensure("the plots' letters", &[plots::FONT_PACKAGE])?;
    if arguments.report {
        return report(&records(&arguments)).map(|()| ExitCode::SUCCESS);
    }
    let mut place = lab::prepare(Monitor::Checked)?;
    let mut book = Book::open(records(&arguments), &arguments, &place)?;
    match &mut place {
        Place::Here(lab) => {
            let arguments = Arguments { done: book.done.clone(), ..arguments };
            measure(lab, &arguments, &mut |record| book.take(record))?;
        }
        Place::Rig(rigged) => {
            let mut inner: Vec<String> = std::env::args().skip(1).filter(|word| word != "--fresh").collect();
            inner.extend(book.done.iter().map(|part| format!("--done={part}")));
            let (mut line, mut result) = (Vec::new(), Ok(()));
            let code = rigged.run_self(inner, DEADLINE, |stream, bytes| {
                if stream != Stream::Stdout {
                    return lab::pass_on(stream, bytes);
                }
                for &byte in bytes {
                    line.push(byte);
                    if byte == b'\n' && result.is_ok() {
                        result = book.take_line(&String::from_utf8_lossy(&std::mem::take(&mut line)));
                    }
                }
            })?;
            result?;
            ensure!(code == 0, "it ended with exit code {code}; what was measured is kept");
        }
    }
    report(&book.path)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures the parts that are wanted and not there yet.
fn measure(lab: &Lab, arguments: &Arguments, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
    let wanted = |part: &Part| {
        let name = part.name();
        !arguments.done.contains(&name) && arguments.only.as_ref().is_none_or(|only| name.starts_with(only))
    };
    for part in parts(arguments.form()).iter().filter(|part| wanted(part)) {
        let started = Instant::now();
        sink(Record::Begun { part: part.name() })?;
        part.measure(lab, Effort::of(arguments.form()), sink).with_context(|| part.name())?;
        sink(Record::Done { part: part.name() })?;
        eprintln!("({:.0} s)", started.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Where what is measured is kept.
fn records(arguments: &Arguments) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    // This crate lies two folders below the workspace's.
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/"));
    let name = match arguments.form() {
        Form::Whole => "records.jsonl",
        Form::Quick => "quick.jsonl",
        Form::Smoke => "smoke.jsonl",
    };
    target.unwrap_or_else(|| workspace.join("target")).join("overcommit").join(name)
}

/// Where records are kept.
struct Book {
    path: PathBuf,
    file: File,
    done: Vec<String>,
}

impl Book {
    /// Opens the book of an earlier run if it was the same, or begins a new one.
    fn open(path: PathBuf, arguments: &Arguments, place: &Place) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let head = head(arguments.form() != Form::Whole, place)?;
        let (run, done) = Run::of(read(&path)?);
        let goes_on = !arguments.fresh && run.head.as_ref() == Some(&head);
        if !goes_on && run.head.is_some() {
            let why = if arguments.fresh { "as you ask" } else { "it was of another version or machine" };
            println!("Forgetting the run before: {why}.");
        }
        if !goes_on {
            File::create(&path).with_context(|| path.display().to_string())?;
        }
        let file = OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        let mut book = Self { path, file, done: if goes_on { done } else { Vec::new() } };
        if goes_on {
            println!("{} parts are there already.", book.done.len());
        } else {
            book.take(Record::Head(head))?;
        }
        Ok(book)
    }

    /// What came out of the rig: a record, or something for the reader.
    fn take_line(&mut self, line: &str) -> Result<()> {
        match line.strip_prefix(MARK) {
            Some(record) => self.take(serde_json::from_str(record)?),
            None => {
                print!("{line}");
                Ok(())
            }
        }
    }

    /// Keeps a record and shows it.
    fn take(&mut self, record: Record) -> Result<()> {
        match &record {
            Record::Begun { part } => println!("\n{part}"),
            Record::Cell(cell) => {
                let applied = cell.applied().map_or("no time it worked".to_owned(), in_words);
                let (work, method) = (cell.work.to_string(), cell.method.to_string());
                println!("  {work:<12} {method:<22} {applied} us, {} failed", cell.failures.len());
            }
            Record::Line(line) => {
                let values = Spread::of(line.values.iter().copied()).map_or("nothing".to_owned(), in_words);
                println!("  {}: {values} {}", line.name, line.unit);
            }
            Record::Head(_) | Record::Done { .. } => {}
        }
        writeln!(self.file, "{}", serde_json::to_string(&record)?)?;
        Ok(self.file.flush()?)
    }
}

/// Makes reports and plots of what there is.
fn report(records: &Path) -> Result<()> {
    let (run, _) = Run::of(read(records)?);
    ensure!(run.head.is_some(), "nothing was measured yet: {} is not there or empty", records.display());
    let folder = records.parent().unwrap_or(Path::new("."));
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    write("report.json", serde_json::to_string_pretty(&run.json())?)?;
    write("report.md", run.markdown())?;
    plots::draw(&run.cells, folder)?;
    println!();
    for bar in bars(&run.cells, &run.lines) {
        println!(
            "{:<6} {} ({}): {}",
            if bar.holds { "holds" } else { "MISSED" },
            bar.claim,
            bar.on,
            bar.found
        );
    }
    println!("\nSee {}.", folder.join("report.md").display());
    Ok(())
}

/// The records of a file. What was cut off by an interruption is left out.
fn read(path: &Path) -> Result<Vec<Record>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let lines = BufReader::new(file).lines().collect::<Result<Vec<_>, _>>()?;
    Ok(lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Where and by what is measured.
fn head(quick: bool, place: &Place) -> Result<Head> {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(arguments).output().ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let mut version = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "no git".to_owned());
    if git(&["status", "--porcelain"]).is_none_or(|changes| !changes.is_empty()) {
        // The binary tells one change from another.
        let program = std::env::current_exe()?;
        let built = fs::metadata(&program)?.modified()?.duration_since(std::time::UNIX_EPOCH)?;
        version += &format!(" and what is not committed (built {})", built.as_secs());
    }
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, m)| m);
    let place = match place {
        Place::Here(_) => "Real virtualization".to_owned(),
        Place::Rig(_) => "The rig: an emulated host (QEMU TCG with SVM, 2 CPUs, stock kernel, stock KVM), not run on silicon".to_owned(),
    };
    let machine = format!("{model}, {} CPUs", std::thread::available_parallelism()?);
    Ok(Head { version, quick, place, machine })
}

fn in_words(Spread { median, p90, p99, max, n }: Spread) -> String {
    format!("median {median}, p90 {p90}, p99 {p99}, max {max}, n {n}")
}
