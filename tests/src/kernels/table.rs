//! What became of each part on each kernel, as a table.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A part of the campaign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    /// The monitor did not come as far as the first part.
    Boot,
    /// Flips by every strategy.
    Strategies,
    /// Whose writes the text guard sees.
    Writers,
    /// The guest switches the same key meanwhile.
    Toggling,
    /// The same change in a twin.
    Oracle,
    /// Native spinlocks and back.
    Spinlocks,
}

/// What became of a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cell {
    outcome: Outcome,
    /// What was counted, or why not.
    text: String,
    /// What of it was refused.
    refused: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Passed,
    Refused,
    Failed,
}

impl Cell {
    pub(super) fn passed(text: String) -> Self {
        Self { outcome: Outcome::Passed, text, refused: Vec::new() }
    }

    pub(super) fn refused(text: String) -> Self {
        Self { outcome: Outcome::Refused, text, refused: Vec::new() }
    }

    pub(super) fn failed(text: String) -> Self {
        Self { outcome: Outcome::Failed, text, refused: Vec::new() }
    }

    pub(super) fn with(mut self, refused: Vec<String>) -> Self {
        self.refused = refused;
        self
    }

    /// For one line: a failure by its first line only.
    pub(super) fn line(&self) -> String {
        let first = self.text.lines().next().unwrap_or_default();
        let rest = self.refused.iter().map(|refused| format!("; refused: {refused}"));
        let head = match self.outcome {
            Outcome::Passed => String::new(),
            Outcome::Refused => "refused: ".to_owned(),
            Outcome::Failed => "**failed**: ".to_owned(),
        };
        head + first + &rest.collect::<String>()
    }
}

/// A kernel of the campaign.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row {
    /// What `uname -r` says.
    pub(super) release: String,
    /// The day, in UTC.
    pub(super) date: String,
    /// How many times each change was made.
    pub(super) rounds: usize,
    /// How many guests were started.
    pub(super) boots: u32,
    /// How long all took.
    pub(super) seconds: u64,
    /// What became of each part.
    pub(super) cells: Vec<(Part, Cell)>,
}

impl Row {
    /// Whether a part failed.
    pub(super) fn has_failed(&self) -> bool {
        self.cells.iter().any(|(_, cell)| cell.outcome == Outcome::Failed)
    }

    fn line(&self) -> String {
        let Self { release, date, rounds, boots, seconds, .. } = self;
        let parts = [Part::Strategies, Part::Writers, Part::Toggling, Part::Oracle, Part::Spinlocks];
        let cell = |part| self.cells.iter().find(|(of, _)| *of == part).map(|(_, cell)| cell.line());
        let not_run = || self.cells.iter().find(|(of, _)| *of == Part::Boot).map(|(_, cell)| cell.line());
        let cells: Vec<String> =
            parts.map(|part| cell(part).or_else(not_run).unwrap_or_else(|| "not run".into())).into();
        let cells = cells.iter().map(|cell| cell.replace('|', "\\|")).collect::<Vec<_>>().join(" | ");
        format!("| {release} | {date} | {rounds} | {boots} | {cells} | {seconds} |")
    }
}

const HEAD: &str = "\
| kernel | date | rounds | boots | flips under load | writers of guarded text | the guest switches the same key | \
the oracle | spinlocks | s |
|---|---|---|---|---|---|---|---|---|---|
";

/// The table, in markdown.
pub(super) fn markdown(rows: &[Row]) -> String {
    let lines = rows.iter().map(|row| row.line() + "\n");
    HEAD.to_owned() + &lines.collect::<String>()
}

/// The rows that were kept in a file, none if there is none.
///
/// # Errors
/// When it has something else in it.
pub(super) fn kept(path: &Path) -> Result<Vec<Row>> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut rows: Vec<Row> = Vec::new();
    for line in text.lines() {
        let row: Row = serde_json::from_str(line).with_context(|| line.to_owned())?;
        put(&mut rows, row);
    }
    Ok(rows)
}

/// Adds a row, in place of an older one of the same kernel.
pub(super) fn put(rows: &mut Vec<Row>, row: Row) {
    rows.retain(|old| old.release != row.release);
    rows.push(row);
}

/// Keeps a row at the file's end.
///
/// # Errors
/// When it can't be written.
pub(super) fn keep(path: &Path, row: &Row) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    Ok(writeln!(file, "{}", serde_json::to_string(row)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_kept_and_shown_with_what_was_refused_and_what_failed() {
        let row = Row {
            release: "6.1".into(),
            date: "2026-11-28".into(),
            rounds: 60,
            boots: 2,
            seconds: 3,
            cells: vec![
                (Part::Strategies, Cell::passed("12 by hold".into()).with(vec!["inspect: `a` (b|c)".into()])),
                (Part::Toggling, Cell::failed("it broke\nbadly".into())),
                (Part::Spinlocks, Cell::refused("`busy` (why)".into())),
            ],
        };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rows");
        assert!(kept(&path).expect("none").is_empty());
        keep(&path, &row).expect("kept");
        let [again] = &kept(&path).expect("it")[..] else { panic!("one row") };
        assert!(again.has_failed());
        assert_eq!(
            markdown(std::slice::from_ref(again)).strip_prefix(HEAD),
            Some(
                "| 6.1 | 2026-11-28 | 60 | 2 | 12 by hold; refused: inspect: `a` (b\\|c) | not run | \
                 **failed**: it broke | not run | refused: `busy` (why) | 3 |\n"
            )
        );
    }
}
