//! `vmm kernel match`: whether an object belongs to a kernel.

use patcher::addr::Gva;
use patcher::object::matching::BUILD_MISMATCH;
use patcher::object::outcome::{Binding, PieceMatch};
use patcher::object::{Difference, Match, Outcome};
use serde::Serialize;

use crate::cli::render::page::{Page, bold, green, plain, red};

/// What matching found, as JSON has it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    release: String,
    belongs: bool,
    /// `build_mismatch` if it does not.
    code: Option<&'static str>,
    matched: usize,
    functions: Vec<Piece>,
    data: Vec<Piece>,
    bindings: Vec<Bound>,
}

#[derive(Debug, Serialize)]
struct Piece {
    name: String,
    section: String,
    size: usize,
    outcome: &'static str,
    /// Where it is; several places if nothing tells which.
    at: Vec<Gva>,
    difference: Option<String>,
}

#[derive(Debug, Serialize)]
struct Bound {
    name: String,
    at: Gva,
    known: bool,
}

impl Piece {
    fn new(piece: &PieceMatch) -> Self {
        let (outcome, at, difference) = match &piece.outcome {
            Outcome::Matches { at } => ("matches", vec![*at], None),
            Outcome::Overridden { at } => ("overridden", vec![*at], None),
            Outcome::Discarded => ("discarded", vec![], None),
            Outcome::Unreferenced => ("unreferenced", vec![], None),
            Outcome::Ambiguous { at } => ("ambiguous", at.clone(), None),
            Outcome::Mismatch(difference @ Difference::Missing) => ("missing", vec![], Some(difference)),
            Outcome::Mismatch(difference) => ("differs", vec![], Some(difference)),
        };
        let difference = difference.map(Difference::to_string);
        let (name, section) = (piece.name.clone(), piece.section.clone());
        Self { name, section, size: piece.size, outcome, at, difference }
    }

    /// Why it needs to be shown; `None` if it is as it should be.
    fn remark(&self) -> Option<String> {
        match (self.outcome, &self.difference) {
            ("matches", _) => None,
            (_, Some(difference)) => Some(difference.clone()),
            ("overridden", _) => Some("weak here; the image has another object's".to_owned()),
            ("discarded", _) => Some("the kernel's build discards its section".to_owned()),
            ("unreferenced", _) => Some("nothing tells where it is; it was not compared".to_owned()),
            _ => {
                let at: Vec<String> = self.at.iter().take(4).map(Gva::to_string).collect();
                Some(format!("it may be at {}, and nothing tells which is this object's", at.join(", ")))
            }
        }
    }
}

impl Report {
    /// What was found in the kernel of this release.
    pub(super) fn new(release: &str, found: &Match) -> Self {
        let bound =
            |Binding { name, at, known }: &Binding| Bound { name: name.clone(), at: *at, known: *known };
        let belongs = found.belongs();
        Self {
            release: release.to_owned(),
            belongs,
            code: (!belongs).then_some(BUILD_MISMATCH),
            matched: found
                .functions
                .iter()
                .filter(|function| matches!(function.outcome, Outcome::Matches { .. }))
                .count(),
            functions: found.functions.iter().map(Piece::new).collect(),
            data: found.data.iter().map(Piece::new).collect(),
            bindings: found.bindings.iter().map(bound).collect(),
        }
    }

    /// Whether the object belongs to the kernel.
    pub(super) fn belongs(&self) -> bool {
        self.belongs
    }

    /// The same for a terminal: what does not match, and a summary.
    pub(super) fn page(&self) -> Page {
        let mut page = Page::default();
        let rows: Vec<_> = self
            .functions
            .iter()
            .chain(&self.data)
            .filter_map(|piece| {
                let is_wrong = matches!(piece.outcome, "missing" | "differs" | "ambiguous");
                let outcome = if is_wrong { red(piece.outcome) } else { plain(piece.outcome) };
                Some([plain(&piece.name), plain(&piece.section), outcome, plain(piece.remark()?)])
            })
            .collect();
        if !rows.is_empty() {
            page.table([["name", "section", "outcome", "why"].map(bold)].into_iter().chain(rows));
        }
        let all = self.functions.len();
        let known = self.bindings.iter().filter(|binding| binding.known).count();
        page.line([plain(format_args!(
            "{} of {all} functions match; {} addresses are bound, {known} of them known to the image's symbols",
            self.matched,
            self.bindings.len(),
        ))]);
        page.line([if self.belongs {
            green(format_args!("the object belongs to Linux {}", self.release))
        } else {
            red(format_args!(
                "{BUILD_MISMATCH}: the object was not built of the source, configuration and compiler of Linux {}",
                self.release
            ))
        }]);
        page
    }
}
