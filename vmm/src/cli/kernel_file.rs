//! `vmm kernel`: what a kernel image says of itself, without a guest.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use patcher::addr::Gva;
use patcher::image::{KernelImage, Tables};
use patcher::insn;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::cli::args::{KernelCommand, KernelFile, Table};

/// Why there is nothing to print.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no kernel, or a broken one.
    #[error("{path}: {source}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: patcher::image::Error,
    },
    /// Standard output is gone.
    #[error("standard output: {0}")]
    Output(#[from] std::io::Error),
}

impl Error {
    /// Whether the reader of the output went away, as `head` does.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }
}

/// Runs one of the commands.
///
/// # Errors
/// See [`Error`].
pub fn run(command: &KernelCommand) -> Result<(), Error> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    match command {
        KernelCommand::Info { file } => {
            let image = read(&file.kernel)?;
            let info = Info::new(&image);
            if file.json { print_json(&mut out, &info)? } else { info.print(&mut out)? }
        }
        KernelCommand::Symbols { file, pattern } => {
            let image = read(&file.kernel)?;
            let chosen = image.symbols().iter().filter(|(.., name)| matches(pattern.as_deref(), name));
            if file.json {
                let line = |(at, kind, name)| json!({ "at": at, "kind": char::from(kind), "name": name });
                print_json(&mut out, &chosen.map(line).collect::<Vec<_>>())?;
            } else {
                for (at, kind, name) in chosen {
                    writeln!(out, "{:016x} {} {name}", at.0, char::from(kind))?;
                }
            }
        }
        KernelCommand::Tables { file, table } => {
            let image = read(&file.kernel)?;
            print_rows(&mut out, file, table_rows(&image, *table))?;
        }
        KernelCommand::Keys { file, pattern } => {
            let image = read(&file.kernel)?;
            let keys = image.static_keys().into_iter().filter(|key| matches(pattern.as_deref(), &key.name));
            let row = |key: patcher::image::StaticKey| {
                vec![
                    ("name", json!(key.name)),
                    ("at", json!(key.at)),
                    ("initially", json!(key.initially)),
                    ("entries", json!(key.entries)),
                ]
            };
            print_rows(&mut out, file, Some(keys.map(row).collect()))?;
        }
        KernelCommand::Calls { file, pattern } => {
            let image = read(&file.kernel)?;
            let calls =
                image.static_calls().into_iter().filter(|call| matches(pattern.as_deref(), &call.name));
            let row = |call: patcher::image::StaticCall| {
                vec![
                    ("name", json!(call.name)),
                    ("key", json!(call.key)),
                    ("trampoline", json!(call.trampoline)),
                    ("initially", json!(call.initially)),
                    ("sites", json!(call.sites)),
                ]
            };
            print_rows(&mut out, file, Some(calls.map(row).collect()))?;
        }
        KernelCommand::Features { file, pattern } => {
            let image = read(&file.kernel)?;
            let features = image
                .tables()
                .feature_counts()
                .into_iter()
                .filter(|(name, _)| matches(pattern.as_deref(), name));
            let row =
                |(name, alternatives)| vec![("name", json!(name)), ("alternatives", json!(alternatives))];
            print_rows(&mut out, file, Some(features.map(row).collect()))?;
        }
    }
    Ok(out.flush()?)
}

fn read(path: &Path) -> Result<KernelImage, Error> {
    let file = std::fs::read(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    KernelImage::parse(&file).map_err(|source| Error::Kernel { path: path.to_owned(), source })
}

fn matches(pattern: Option<&str>, name: &str) -> bool {
    pattern.is_none_or(|pattern| name.contains(pattern))
}

fn print_json(out: &mut impl Write, value: &impl Serialize) -> Result<(), Error> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(std::io::Error::from)?;
    Ok(writeln!(out)?)
}

/// A line of a table: its fields by name, in the order in which they are shown.
type Row = Vec<(&'static str, Value)>;

/// Prints rows with the same fields: as JSON, or one a line under a heading.
fn print_rows(out: &mut impl Write, file: &KernelFile, rows: Option<Vec<Row>>) -> Result<(), Error> {
    if file.json {
        let object = |row: Row| row.into_iter().map(|(name, value)| (name.to_owned(), value));
        let objects: Option<Vec<Map<String, Value>>> =
            rows.map(|rows| rows.into_iter().map(|row| object(row).collect()).collect());
        return print_json(out, &objects);
    }
    let Some(rows) = rows else { return Ok(writeln!(out, "this kernel has no such table")?) };
    let Some(first) = rows.first() else { return Ok(writeln!(out, "none")?) };
    let heading = first.iter().map(|(name, _)| (*name).to_owned()).collect();
    let cell = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let lines: Vec<Vec<String>> = std::iter::once(heading)
        .chain(rows.iter().map(|row| row.iter().map(|(_, value)| cell(value)).collect()))
        .collect();
    let width =
        |column: usize| lines.iter().filter_map(|line| Some(line.get(column)?.len())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..first.len()).map(width).collect();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// What there is, in numbers. `null` where this kernel has none.
#[derive(Debug, Serialize)]
struct Info {
    release: String,
    build_id: Option<String>,
    compression: Option<&'static str>,
    text_base: Gva,
    symbols: usize,
    jump_entries: Option<usize>,
    static_keys: usize,
    static_call_sites: Option<usize>,
    static_calls: usize,
    alternatives: Option<usize>,
    smp_locks: Option<usize>,
    paravirt_sites: Option<usize>,
    mcount_locations: Option<usize>,
    orc_entries: Option<usize>,
    exceptions: Option<usize>,
}

impl Info {
    fn new(image: &KernelImage) -> Self {
        let tables: &Tables = image.tables();
        Self {
            release: image.release().to_owned(),
            build_id: image.build_id().map(insn::hex),
            compression: image.compression(),
            text_base: image.text_base(),
            symbols: image.symbols().len(),
            jump_entries: tables.jump_entries.as_ref().map(Vec::len),
            static_keys: image.static_keys().len(),
            static_call_sites: tables.static_call_sites.as_ref().map(Vec::len),
            static_calls: image.static_calls().len(),
            alternatives: tables.alternatives.as_ref().map(Vec::len),
            smp_locks: tables.smp_locks.as_ref().map(Vec::len),
            paravirt_sites: tables.paravirt_sites.as_ref().map(Vec::len),
            mcount_locations: tables.mcount_locations.as_ref().map(Vec::len),
            orc_entries: tables.orc_entries,
            exceptions: tables.exceptions.as_ref().map(Vec::len),
        }
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "Linux {} at {}", self.release, self.text_base)?;
        writeln!(out, "  build id           {}", self.build_id.as_deref().unwrap_or("none"))?;
        writeln!(out, "  compression        {}", self.compression.unwrap_or("none: this is a vmlinux"))?;
        for (what, count) in [
            ("symbols", Some(self.symbols)),
            ("static keys", Some(self.static_keys)),
            ("jump entries", self.jump_entries),
            ("static calls", Some(self.static_calls)),
            ("static call sites", self.static_call_sites),
            ("alternatives", self.alternatives),
            ("SMP locks", self.smp_locks),
            ("paravirt sites", self.paravirt_sites),
            ("mcount locations", self.mcount_locations),
            ("ORC entries", self.orc_entries),
            ("exceptions", self.exceptions),
        ] {
            let count = count.map_or_else(|| "none".to_owned(), |count| count.to_string());
            writeln!(out, "  {what:<18} {count}")?;
        }
        Ok(())
    }
}

fn table_rows(image: &KernelImage, table: Table) -> Option<Vec<Row>> {
    let tables = image.tables();
    let place = |at: Gva| image.symbols().describe(at);
    match table {
        Table::JumpEntries => Some(
            tables
                .jump_entries
                .as_ref()?
                .iter()
                .map(|entry| {
                    vec![
                        ("at", json!(entry.code)),
                        ("code", json!(place(entry.code))),
                        ("target", json!(place(entry.target))),
                        ("key", json!(place(entry.key))),
                        ("branch", json!(entry.branch)),
                    ]
                })
                .collect(),
        ),
        Table::StaticCallSites => Some(
            tables
                .static_call_sites
                .as_ref()?
                .iter()
                .map(|site| {
                    vec![
                        ("at", json!(site.code)),
                        ("code", json!(place(site.code))),
                        ("key", json!(place(site.key))),
                        ("tail", json!(site.tail)),
                    ]
                })
                .collect(),
        ),
        Table::Alternatives => Some(
            tables
                .alternatives
                .as_ref()?
                .iter()
                .map(|alternative| {
                    vec![
                        ("at", json!(alternative.at)),
                        ("code", json!(place(alternative.at))),
                        ("feature", json!(tables.feature_name(alternative.feature))),
                        ("inverted", json!(alternative.inverted)),
                        ("original", json!(insn::hex(&alternative.original))),
                        ("replacement", json!(insn::hex(&alternative.replacement))),
                    ]
                })
                .collect(),
        ),
        Table::SmpLocks => Some(
            tables
                .smp_locks
                .as_ref()?
                .iter()
                .map(|at| vec![("at", json!(at)), ("code", json!(place(*at)))])
                .collect(),
        ),
        Table::ParavirtSites => Some(
            tables
                .paravirt_sites
                .as_ref()?
                .iter()
                .map(|site| {
                    vec![
                        ("at", json!(site.at)),
                        ("code", json!(place(site.at))),
                        ("operation", json!(site.operation)),
                        ("len", json!(site.len)),
                    ]
                })
                .collect(),
        ),
        Table::Exceptions => Some(
            tables
                .exceptions
                .as_ref()?
                .iter()
                .map(|at| vec![("at", json!(at)), ("code", json!(place(*at)))])
                .collect(),
        ),
    }
}
