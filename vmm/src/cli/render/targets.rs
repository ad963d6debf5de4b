//! What there is to patch, by name.

use std::fmt::Display;

use crate::api::view::{CallTarget, FeatureTarget, KeyTarget, SpinlockTarget, Targets};
use crate::cli::render::Render;
use crate::cli::render::page::{Page, Span, bold, plain};

impl Render for Targets {
    fn render(&self, page: &mut Page) {
        section(page, "static keys", &self.static_keys, |KeyTarget { name, users, entries }| {
            [plain(name), count(*users, "users"), count(entries, "jumps")]
        });
        section(page, "static calls", &self.static_calls, |CallTarget { name, target, sites }| {
            [plain(name), plain(target), count(sites, "calls")]
        });
        let feature = |FeatureTarget { name, present, alternatives }: &FeatureTarget| {
            let present = match present {
                Some(true) => "present",
                Some(false) => "absent",
                None => "unknown",
            };
            [plain(name), plain(present), count(alternatives, "alternatives")]
        };
        section(page, "alternatives, by CPU feature", &self.features, feature);
        section(page, "spinlocks", &self.spinlocks, |SpinlockTarget { operation, target }| {
            [plain(operation), plain(target), plain("")]
        });
    }
}

/// A table under a heading, if it has rows.
fn section<T>(page: &mut Page, heading: &str, targets: &[T], row: impl Fn(&T) -> [Span; 3]) {
    if targets.is_empty() {
        return;
    }
    page.line([bold(heading)]);
    page.table(targets.iter().map(|target| {
        let [name, second, third] = row(target);
        [plain(""), name, second, third]
    }));
}

fn count(count: impl Display, what: &str) -> Span {
    plain(format_args!("{count} {what}"))
}
