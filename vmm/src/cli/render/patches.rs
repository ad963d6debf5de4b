//! Plans and patches: what fits, what a program did or would do, what was refused.

use std::fmt::Display;

use patcher::plan::Strategy;

use crate::api::view::{Failure, FailureKind, Fits, Program, Refusals, Report, Site};
use crate::api::wire::{ApiError, PatchState, PatchSummary};
use crate::cli::render::Render;
use crate::cli::render::page::{Page, Span, bold, green, plain, red};

impl Render for Failure {
    fn render(&self, page: &mut Page) {
        match &self.kind {
            FailureKind::Done(done) => done.render(page),
            FailureKind::Report(report) => report.render(page),
            FailureKind::Refused(refusals) => refusals.render(page),
            FailureKind::Error(error) => error.render(page),
        }
        if let Some(why) = &self.audit_error {
            page.line([red(format_args!("the audit log does not say so yet: {why}"))]);
        }
    }
}

impl Render for ApiError {
    fn render(&self, page: &mut Page) {
        page.line([red(&self.error)]);
    }
}

impl Render for Refusals {
    fn render(&self, page: &mut Page) {
        page.line([red("refused"), plain(": nothing was written")]);
        for refusal in &self.refusals {
            let place = if refusal.pointer.is_empty() { "the plan" } else { &refusal.pointer };
            let message = format_args!(" at {place}: {}", refusal.message);
            page.line([plain("  "), bold(&refusal.code), plain(message)]);
        }
    }
}

impl Render for Report {
    fn render(&self, page: &mut Page) {
        page.line([bold(&self.name), plain(": "), state(self.state)]);
        if let Some(failure) = &self.failure {
            page.line([plain("  "), plain(failure)]);
        }
        if self.superseded > 0 {
            page.line([plain(format_args!(
                "  {} sites were replaced by the guest and are left to it",
                self.superseded
            ))]);
        }
        sites(page, &self.sites);
        if self.state == PatchState::Staged {
            return page.line([plain("  "), how(self.strategy, &self.reason)]);
        }
        if matches!(self.state, PatchState::Pending | PatchState::Refused) {
            return page.line([plain(format_args!("  {}, to be applied before its init runs", self.reason))]);
        }
        let timing = &self.timing;
        page.line([plain("  "), how(self.strategy, &self.reason)]);
        page.line([plain(format_args!(
            "  {} us in all, {} us of them the program; {} fences, the longest {} us",
            timing.total_us, timing.program_us, timing.fences, timing.longest_fence_us
        ))]);
        page.line([plain(format_args!(
            "  longest stall of a vCPU {} us; {} traps",
            timing.longest_stall_us, self.traps
        ))]);
    }
}

impl Render for Fits {
    fn render(&self, page: &mut Page) {
        page.line([green("the plan fits")]);
        sites(page, &self.sites);
        page.line([plain("  "), how(self.strategy, &self.reason)]);
    }
}

impl Render for Program {
    fn render(&self, page: &mut Page) {
        sites(page, &self.sites);
        for piece in &self.brings {
            let what = format_args!(" ({}, {} bytes)", piece.kind, piece.bytes);
            page.line([plain("  "), bold(&piece.name), plain(format_args!(" at {}", piece.at)), plain(what)]);
            for line in &piece.code {
                page.line([plain("      "), green(line)]);
            }
        }
        let fences = plain(format_args!(", {} fences", self.fences));
        page.line([plain("  "), how(self.strategy, &self.reason), fences]);
        for (number, step) in (1..).zip(&self.steps) {
            page.line([plain(format_args!("  {number:>4}  {step}"))]);
        }
    }
}

impl Render for Vec<PatchSummary> {
    fn render(&self, page: &mut Page) {
        if self.is_empty() {
            return page.line([plain("no patches")]);
        }
        let heading = ["name", "state", "strategy", "sites"].map(bold);
        let row = |patch: &PatchSummary| {
            let strategy = name(patch.strategy);
            [bold(&patch.name), state(patch.state), plain(strategy), plain(patch.sites)]
        };
        page.table([heading].into_iter().chain(self.iter().map(row)));
        for PatchSummary { name, modules, .. } in self.iter().filter(|patch| !patch.modules.is_empty()) {
            page.line([plain(format_args!("{name}: waits for {} whenever loaded", modules.join(", ")))]);
        }
        for PatchSummary { name, livepatched, .. } in self.iter().filter(|patch| patch.livepatched > 0) {
            page.line([plain(format_args!(
                "{name}: {livepatched} of its sites are not executed: the guest livepatches their functions"
            ))]);
        }
    }
}

fn state(state: PatchState) -> Span {
    match state {
        PatchState::Applied => green("applied"),
        PatchState::Reverted => green("reverted"),
        PatchState::Superseded => green("superseded"),
        PatchState::Lost => red("lost"),
        PatchState::RolledBack => red("rolled_back"),
        PatchState::Held => red("held"),
        PatchState::Pending => bold("pending"),
        PatchState::Staged => bold("staged"),
        PatchState::Refused => red("refused"),
    }
}

fn how(strategy: Strategy, reason: impl Display) -> Span {
    plain(format_args!("strategy {} ({reason})", name(strategy)))
}

/// The strategy as plans write it.
fn name(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Auto => "auto",
        Strategy::Store => "store",
        Strategy::Breakpoint => "breakpoint",
        Strategy::Bypass => "bypass",
        Strategy::Hold => "hold",
        Strategy::Inspect => "inspect",
    }
}

fn sites(page: &mut Page, sites: &[Site]) {
    for site in sites {
        page.line([plain("  "), bold(&site.symbol)]);
        for line in &site.old_code {
            page.line([plain("  "), red(format_args!("- {line}"))]);
        }
        for line in &site.new_code {
            page.line([plain("  "), green(format_args!("+ {line}"))]);
        }
    }
}
