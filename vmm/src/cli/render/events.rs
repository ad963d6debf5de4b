//! Events, one a line.

use crate::api::view::StreamLine;
use crate::api::wire::{EventList, Missed};
use crate::cli::render::Render;
use crate::cli::render::page::{Page, Span, bold, plain, red};
use crate::guest::events::{Event, Kind, Who};

impl Render for EventList {
    fn render(&self, page: &mut Page) {
        if self.events.is_empty() {
            page.line([plain("no events")]);
        }
        self.events.iter().for_each(|event| event.render(page));
    }
}

impl Render for StreamLine {
    fn render(&self, page: &mut Page) {
        match self {
            Self::Event(event) => event.render(page),
            Self::Missed(Missed { missed }) => {
                page.line([red(format_args!("({missed} events were missed)"))]);
            }
            Self::Error(error) => error.render(page),
        }
    }
}

impl Render for Event {
    fn render(&self, page: &mut Page) {
        let time = plain(format_args!("{:>6}.{:03} s  ", self.time_ms / 1000, self.time_ms % 1000));
        let patch = self.patch.as_ref().map(|patch| plain(format_args!("patch {patch}: ")));
        let dropped =
            (self.suppressed > 0).then(|| plain(format_args!(" (and {} more before)", self.suppressed)));
        let spans = [Some(time), Some(kind(self.kind)), patch, self.who.as_ref().map(who)];
        page.line(spans.into_iter().chain([Some(plain(&self.what)), dropped]).flatten());
    }
}

/// What kind of event, in red if somebody should look into it.
fn kind(kind: Kind) -> Span {
    let name = match kind {
        Kind::Patch => "patch",
        Kind::Trap => "trap",
        Kind::GuestWrite => "guest write",
        Kind::UnexpectedWrite => "unexpected write",
        Kind::Conflict => "conflict",
        Kind::Unguarded => "unguarded",
        Kind::PatchLost => "patch lost",
    };
    let name = format!("{name:<16} ");
    match kind {
        Kind::Patch | Kind::Trap | Kind::GuestWrite => bold(name),
        Kind::UnexpectedWrite | Kind::Conflict | Kind::Unguarded | Kind::PatchLost => red(name),
    }
}

fn who(who: &Who) -> Span {
    let place = who.symbol.clone().unwrap_or_else(|| who.rip.to_string());
    let task = who.task.as_ref().map(|task| format!(" ({task})")).unwrap_or_default();
    plain(format_args!("vCPU {} at {place}{task} ", who.vcpu))
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;

    use super::*;

    #[test]
    fn a_task_cannot_write_to_the_terminal() {
        let who = Who { vcpu: 1, rip: Gva(0x10), symbol: None, task: Some("\x1b]0;x\x07\rsh".to_owned()) };
        let event = Event {
            number: 0,
            time_ms: 1234,
            kind: Kind::Trap,
            who: Some(who),
            patch: Some("flip".to_owned()),
            what: "waits".to_owned(),
            suppressed: 2,
        };
        let expected = "     1.234 s  trap             patch flip: vCPU 1 at 0x10 (\\x1b]0;x\\x07\\x0dsh) \
                        waits (and 2 more before)\n";
        assert_eq!(event.page().text(), expected);
    }
}
