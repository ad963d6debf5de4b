//! What became of an audit log.

use crate::audit::verify::Verdict;
use crate::cli::render::Render;
use crate::cli::render::page::{Page, bold, green, plain, red};

impl Render for Verdict {
    fn render(&self, page: &mut Page) {
        let Self { lines, starts, ends, outcomes, .. } = self;
        match &self.broken {
            None => page.line([green("verified"), plain(format_args!(": {lines} lines"))]),
            Some(broken) => {
                page.line([
                    red("tampered with"),
                    plain(format_args!(" at line {}: {}", broken.line, broken.why)),
                ]);
                page.line([plain(format_args!("  {lines} lines before that are verified"))]);
            }
        }
        let runs = format_args!("  {starts} starts of the monitor, {ends} ends; {outcomes} outcomes");
        page.line([plain(runs)]);
        if self.lost > 0 {
            page.line([red(format_args!("  {} outcomes could never be written", self.lost))]);
        }
        for torn in &self.torn {
            let bytes = torn.bytes;
            page.line([plain(format_args!("  line {}: {bytes} bytes of a write that was torn", torn.line))]);
        }
        for intent in &self.in_flight {
            let what = match &intent.patch {
                Some(patch) => format!("{} {patch}", intent.action),
                None => intent.action.clone(),
            };
            let how =
                if intent.is_over { "was in flight when the monitor ended" } else { "has no outcome yet" };
            page.line([
                plain(format_args!("  line number {}: ", intent.number)),
                bold(what),
                plain(format_args!(" {how}")),
            ]);
        }
        page.line([plain("  last: "), bold(&self.last)]);
        let time = self.last_time.as_deref().unwrap_or("never");
        page.line([plain(format_args!(
            "  written {time}; whether lines were cut off after it shows with --expect-last"
        ))]);
    }
}
