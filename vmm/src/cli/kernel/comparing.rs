//! `vmm kernel compare`: what differs between two objects of one source file.

use std::collections::BTreeMap;

use patcher::object::layouts::Unknown;
use patcher::object::{Change, Comparison, Layouts};
use serde::Serialize;

use crate::cli::render::page::{Page, bold, green, plain, red};

/// What was found, as JSON has it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    replaceable: bool,
    functions: BTreeMap<String, &'static str>,
    data: BTreeMap<String, &'static str>,
    obstacles: Vec<String>,
    /// Whether the structures of both could be compared: an object may have no debug information.
    layouts_compared: bool,
}

fn word(change: Change) -> &'static str {
    match change {
        Change::Unchanged => "unchanged",
        Change::Changed => "changed",
        Change::New => "new",
        Change::Gone => "gone",
    }
}

impl Report {
    pub(super) fn new(found: &Comparison, layouts: Result<(Layouts, Layouts), Unknown>) -> Self {
        let mut obstacles: Vec<String> = found.obstacles.iter().map(ToString::to_string).collect();
        let layouts_compared = layouts.is_ok();
        if let Ok((before, after)) = layouts {
            obstacles.extend(before.changes(&after).iter().map(ToString::to_string));
        }
        let words = |all: &BTreeMap<String, Change>| {
            all.iter().map(|(name, change)| (name.clone(), word(*change))).collect()
        };
        Self {
            replaceable: obstacles.is_empty(),
            functions: words(&found.functions),
            data: words(&found.data),
            obstacles,
            layouts_compared,
        }
    }

    /// Whether replacing functions is all that it takes.
    pub(super) fn is_replaceable(&self) -> bool {
        self.replaceable
    }

    /// The same for a terminal: what differs, and a summary.
    pub(super) fn page(&self) -> Page {
        let mut page = Page::default();
        let rows = |kind: &'static str, all: &BTreeMap<String, &'static str>| {
            let differ = all.iter().filter(|(_, change)| **change != "unchanged");
            differ.map(|(name, change)| [plain(kind), plain(name), plain(change)]).collect::<Vec<_>>()
        };
        let rows = [rows("function", &self.functions), rows("data", &self.data)].concat();
        if !rows.is_empty() {
            page.table([["kind", "name", "change"].map(bold)].into_iter().chain(rows));
        }
        let same = self.functions.values().filter(|change| **change == "unchanged").count();
        page.line([plain(format_args!("{same} of {} functions are unchanged", self.functions.len()))]);
        for obstacle in &self.obstacles {
            page.line([red(obstacle)]);
        }
        if !self.layouts_compared {
            page.line([red(
                "the layouts of structures were not compared: an object has no debug information",
            )]);
        }
        if self.replaceable {
            page.line([green("nothing but functions needs to be replaced")]);
        }
        page
    }
}
