//! Promises about what is read from images alone, for a stock kernel of every series that the
//! distribution offers, none of which is started: symbols and tables are those that other readers find.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use guest::provision::corpus::{self, Stock};
use guest::provision::readers::{Readers, Reading};
use patcher::image::profile::{Capability, State};
use patcher::image::{KernelImage, Tables};

/// A table: the linker script's symbols around it, its section, the sizes that an entry has had,
/// and how many entries our reader found.
type Table = (&'static str, &'static str, &'static str, &'static [u64], Option<usize>);

fn found(tables: &Tables) -> [Table; 8] {
    [
        (
            "__start___jump_table",
            "__stop___jump_table",
            "__jump_table",
            &[16],
            tables.jump_entries.as_ref().map(Vec::len),
        ),
        (
            "__start_static_call_sites",
            "__stop_static_call_sites",
            ".static_call_sites",
            &[8],
            tables.static_call_sites.as_ref().map(Vec::len),
        ),
        // Up to 6.2 it had a length of padding, up to 5.10 of another size.
        (
            "__alt_instructions",
            "__alt_instructions_end",
            ".altinstructions",
            &[12, 13, 14],
            tables.alternatives.as_ref().map(Vec::len),
        ),
        ("__smp_locks", "__smp_locks_end", ".smp_locks", &[4], tables.smp_locks.as_ref().map(Vec::len)),
        (
            "__parainstructions",
            "__parainstructions_end",
            ".parainstructions",
            &[16],
            tables.paravirt_sites.as_ref().map(Vec::len),
        ),
        (
            "__start_mcount_loc",
            "__stop_mcount_loc",
            "__mcount_loc",
            &[8],
            tables.mcount_locations.as_ref().map(Vec::len),
        ),
        ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", ".orc_unwind_ip", &[4], tables.orc_entries),
        (
            "__start___ex_table",
            "__stop___ex_table",
            "__ex_table",
            &[12],
            tables.exceptions.as_ref().map(Vec::len),
        ),
    ]
}

#[test]
fn every_kernel_is_read_as_another_reader_reads_it() {
    let kernels = corpus::kernels().expect("the corpus");
    let readers = Readers::new().expect("other readers");
    // Two images of 60 MB uncompressed at a time.
    let next = AtomicUsize::new(0);
    let mut outcomes: Vec<(usize, Result<String>)> = thread::scope(|scope| {
        let some = || {
            let mut outcomes = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(kernel) = kernels.get(number) else { return outcomes };
                outcomes.push((number, compare(kernel, &readers)));
            }
        };
        let threads = [scope.spawn(some), scope.spawn(some)];
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    outcomes.sort_by_key(|(number, _)| *number);
    let mut wrong = Vec::new();
    for ((_, outcome), kernel) in outcomes.into_iter().zip(&kernels) {
        match outcome {
            Ok(line) => println!("{}: {line}", kernel.release),
            Err(error) => wrong.push(format!("{}: {error:#}", kernel.release)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn compare(kernel: &Stock, readers: &Readers) -> Result<String> {
    let reading = readers.read(kernel)?;
    let image = KernelImage::parse(&std::fs::read(&kernel.bzimage)?)?;
    ensure!(image.release() == kernel.release, "it is {}", image.release());
    let symbols = symbols(&image, &reading)?;
    let spans = Spans::new(&reading)?;
    let mut line = format!("{symbols} symbols");
    for (start, stop, section, sizes, count) in found(image.tables()) {
        let bytes = spans.bytes(start, stop, section)?;
        // In 5.10 the last of these has no padding.
        let bytes = if section == ".parainstructions" { bytes.next_multiple_of(16) } else { bytes };
        let entries = count.unwrap_or(0) as u64;
        ensure!(
            sizes.iter().any(|size| size * entries == bytes),
            "{section}: {bytes} bytes, and {entries} entries are found"
        );
        line += &format!(", {section} {entries}");
    }
    for capability in [Capability::Tasks, Capability::Orc] {
        let state = image.profile().state(capability);
        ensure!(*state == State::Supported, "{}: {state:?}", capability.name());
    }
    let decoded = image.orc().map(|orc| orc.table.count as usize);
    ensure!(decoded == image.tables().orc_entries, "{decoded:?} ORC entries decode");
    Ok(line)
}

/// Fails unless both find the very same symbols; returns how many.
fn symbols(image: &KernelImage, reading: &Reading) -> Result<usize> {
    let mut theirs = Vec::new();
    for line in reading.symbols.lines() {
        let mut words = line.splitn(3, ' ');
        let (at, kind, name) = (words.next(), words.next(), words.next());
        let at = u64::from_str_radix(at.unwrap_or_default(), 16);
        theirs.push((
            at.with_context(|| line.to_owned())?,
            kind.context("a type")?.to_owned(),
            name.context("a name")?,
        ));
    }
    let mut ours: Vec<_> =
        image.symbols().iter().map(|(at, kind, name)| (at.0, char::from(kind).to_string(), name)).collect();
    theirs.sort_unstable();
    ours.sort_unstable();
    ensure!(ours.len() > 50_000, "only {} symbols", ours.len());
    if let Some((ours, theirs)) = ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs) {
        anyhow::bail!("a symbol is {ours:x?}, and another reader finds {theirs:x?}");
    }
    ensure!(ours.len() == theirs.len(), "{} symbols, and another reader finds {}", ours.len(), theirs.len());
    Ok(ours.len())
}

/// Where things begin and end, by other readers.
struct Spans<'a> {
    symbols: HashMap<&'a str, u64>,
    sections: HashMap<&'a str, u64>,
}

impl<'a> Spans<'a> {
    fn new(reading: &'a Reading) -> Result<Self> {
        let symbol = |line: &'a str| {
            let (at, name) = line.split_once(' ')?;
            Some((name.split_once(' ')?.1, u64::from_str_radix(at, 16).ok()?))
        };
        // `[Nr] Name Type Address Off Size ...`, and the brackets may have a blank inside.
        let section = |line: &'a str| {
            let mut words = line.trim().strip_prefix('[')?.split_once(']')?.1.split_whitespace();
            Some((words.next()?, u64::from_str_radix(words.nth(3)?, 16).ok()?))
        };
        let sections: HashMap<_, _> = reading.sections.lines().filter_map(section).collect();
        ensure!(sections.contains_key(".text"), "no sections:\n{}", reading.sections);
        Ok(Self { symbols: reading.symbols.lines().filter_map(symbol).collect(), sections })
    }

    /// How many bytes a table has: 0 if there is none.
    fn bytes(&self, start: &str, stop: &str, section: &str) -> Result<u64> {
        let between = self.symbols.get(stop).zip(self.symbols.get(start)).map(|(stop, start)| stop - start);
        let alone = self.sections.get(section).copied();
        ensure!(
            between.is_none() || alone.is_none() || between == alone,
            "{section}: {between:?} bytes between {start} and {stop}, {alone:?} in the section"
        );
        Ok(between.or(alone).unwrap_or(0))
    }
}
