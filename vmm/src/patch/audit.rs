//! What the controller tells the audit log: a request begins, a change is about to be made, the request ends.
//!
//! ```text
//!   begin ─▶ intend: on disk, or the change is refused ─▶ bytes of the guest change ─▶ end: on disk ─▶ answer
//! ```
//!
//! Nothing is written while vCPUs are held: `intend` comes before a program, `end` after it. What the monitor
//! does by itself, because of what the guest does, has its own lines, at a bounded rate: beyond it they are
//! counted.

use std::time::{Duration, Instant};

use patcher::plan::refusal::{Refusal, Refused};
use patcher::resolve::ResolvedPlan;
use patcher::resolve::expand::Datum;
use patcher::site::Site;

use crate::api::command::{Answer, Command};
use crate::api::wire::{AuditInfo, PatchState, Report};
use crate::audit::chain::{Sum, sha256};
use crate::audit::log::AuditLog;
use crate::audit::record::{
    Change, Event, MOST_NAME, MOST_SITES, Outcome, PlanDigest, Request, SiteDigest, Who, short, shorter,
};
use crate::guest::kernel::GuestKernel;
use crate::patch::engine::Engine;

/// How many requests of the monitor's own are listed at once.
const BURST: u32 = 64;
/// How long it takes until one more is.
const REFILL: Duration = Duration::from_secs(10);
/// Most codes of refusals that are listed.
const MOST_CODES: usize = 16;

/// The audit log, if there is one, and the request in hand.
pub(super) struct Audit {
    log: Option<AuditLog>,
    requests: u64,
    current: Option<Current>,
    /// How many requests of the monitor's own may be listed now.
    tokens: u32,
    filled: Instant,
    unlisted: u64,
    /// The VM has ended: nothing is changed any more.
    has_ended: bool,
}

struct Current {
    request: Request,
    /// Whether a change was begun.
    has_begun: bool,
    is_listed: bool,
}

impl Audit {
    pub(super) fn new(log: Option<AuditLog>) -> Self {
        Self {
            log,
            requests: 0,
            current: None,
            tokens: BURST,
            filled: Instant::now(),
            unlisted: 0,
            has_ended: false,
        }
    }

    /// A request begins.
    pub(super) fn begin(&mut self, who: Who, action: &'static str, patch: Option<&str>, plan: Option<&[u8]>) {
        let Some(_) = &self.log else { return };
        self.requests += 1;
        let is_listed = who != Who::Monitor || self.take_token();
        let plan = plan.map(|json| PlanDigest { bytes: json.len(), sha256: sha256(json) });
        let request = Request { request: self.requests, who, action, patch: patch.map(short), plan };
        self.current = Some(Current { request, has_begun: false, is_listed });
    }

    /// The request's plan has this name.
    pub(super) fn named(&mut self, patch: &str) {
        if let Some(current) = &mut self.current {
            current.request.patch = Some(short(patch));
        }
    }

    /// Says that the guest is about to be changed.
    pub(super) fn intend(&mut self, change: Option<Change>) -> Result<(), Refusal> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let unwritable = |why: String| Refusal::AuditUnwritable { why };
        if self.has_ended {
            return Err(unwritable("the VM ends".to_owned()));
        }
        let Some(current) = &mut self.current else {
            return Err(unwritable("nobody asked for this change".to_owned()));
        };
        if current.is_listed {
            let (request, change) = (current.request.clone(), change.map(Box::new));
            log.append(&Event::Intent { request, change }).map_err(|error| unwritable(error.to_string()))?;
        } else if !log.is_writable() {
            return Err(unwritable("earlier lines could not be written".to_owned()));
        }
        current.has_begun = true;
        Ok(())
    }

    /// The request is done. A request of the monitor's own that changed nothing is not told.
    ///
    /// # Errors
    /// Why that is not on disk, if the guest was changed.
    pub(super) fn end(&mut self, outcome: Outcome) -> Result<(), String> {
        let (Some(log), Some(current)) = (&mut self.log, self.current.take()) else { return Ok(()) };
        if !current.is_listed {
            self.unlisted += u64::from(current.has_begun);
            return Ok(());
        }
        let has_begun = current.has_begun;
        if !has_begun && current.request.who == Who::Monitor {
            return Ok(());
        }
        let unlisted = std::mem::take(&mut self.unlisted);
        let event = Event::Outcome { request: current.request, outcome, unlisted };
        if has_begun {
            log.append_or_owe(event).map_err(|error| error.to_string())
        } else {
            // The guest is as it was, and a log that can't be written is counted.
            if log.append(&event).is_err() {
                self.unlisted = unlisted;
            }
            Ok(())
        }
    }

    /// Tells what became of a patch without the monitor's doing.
    pub(super) fn tell(&mut self, action: &'static str, patch: &str, outcome: Outcome) {
        let in_hand = self.current.take();
        self.begin(Who::Monitor, action, Some(patch), None);
        if let Some(current) = &mut self.current {
            current.has_begun = true;
        }
        // What can't be written now is owed.
        let _ = self.end(outcome);
        self.current = in_hand;
    }

    /// Whether a request is in hand.
    fn is_busy(&self) -> bool {
        self.current.is_some()
    }

    /// The VM has ended. Nothing is changed after this.
    pub(super) fn finish(&mut self, ending: &str) {
        self.has_ended = true;
        if let Some(log) = &mut self.log
            && let Err(error) = log.append(&Event::End { ending: short(ending) })
        {
            tracing::error!("the audit log: its last line can't be written: {error}");
        }
    }

    pub(super) fn info(&self) -> Option<AuditInfo> {
        let log = self.log.as_ref()?;
        let head = log.head();
        Some(AuditInfo { lines: head.next, last: head.digest.clone(), failures: log.failures() })
    }

    fn take_token(&mut self) -> bool {
        let new = self.filled.elapsed().as_nanos() / REFILL.as_nanos();
        if let Ok(new @ 1..) = u32::try_from(new) {
            self.tokens = BURST.min(self.tokens.saturating_add(new));
            self.filled = Instant::now();
        }
        let taken = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        taken
    }
}

impl Engine {
    /// Does what a client asked for, and has it told before the answer.
    pub(super) fn audited(
        &mut self,
        who: Who,
        command: Command,
        obey: impl FnOnce(&mut Self, Command) -> Answer,
    ) -> Answer {
        let (action, patch, plan) = match &command {
            Command::Pause { .. } => ("pause", None, None),
            Command::Resume => ("resume", None, None),
            Command::RemoveArena => ("remove_arena", None, None),
            Command::Apply(json) => ("apply", None, Some(json.as_slice())),
            Command::Revert(name) => ("revert", Some(name.as_str()), None),
            Command::Info
            | Command::Vcpus
            | Command::Check(_)
            | Command::Explain(_)
            | Command::Targets
            | Command::List
            | Command::Show(_) => return obey(self, command),
        };
        self.audit.begin(who, action, patch, plan);
        let answer = obey(self, command);
        match self.audit.end(outcome(&answer)) {
            Ok(()) => answer,
            Err(why) => Answer::Unaudited { answer: Box::new(answer), why },
        }
    }

    /// Does what the monitor does by itself: within a request, as a part of it.
    pub(super) fn by_itself<T>(
        &mut self,
        action: &'static str,
        patch: &str,
        act: impl FnOnce(&mut Self) -> T,
        outcome: impl FnOnce(&T) -> Outcome,
    ) -> T {
        if self.audit.is_busy() {
            return act(self);
        }
        self.audit.begin(Who::Monitor, action, Some(patch), None);
        let result = act(self);
        if let Err(why) = self.audit.end(outcome(&result)) {
            tracing::error!("the audit log: the outcome of {action} {patch} can't be written yet: {why}");
        }
        result
    }
}

/// What is to be changed, as the log has it.
pub(super) fn change(kernel: &GuestKernel, strategy: String, sites: &[Site], data: &[Datum]) -> Change {
    let image = &kernel.kernel().image;
    let (mut before, mut after) = (Sum::default(), Sum::default());
    let pieces = sites.iter().map(|site| (site.at, &site.old, &site.new));
    for (at, old, new) in pieces.chain(data.iter().map(|datum| (datum.at, &datum.old, &datum.new))) {
        before.add(at.0, old);
        after.add(at.0, new);
    }
    let digest = |site: &Site| SiteDigest {
        at: site.at.to_string(),
        symbol: shorter(&site.symbol, MOST_NAME),
        before: sha256(&site.old),
        after: sha256(&site.new),
    };
    Change {
        release: short(image.release()),
        build_id: image.build_id().map(patcher::insn::hex).map(|id| short(&id)),
        strategy,
        count: sites.len(),
        data: data.len(),
        before: before.digest(),
        after: after.digest(),
        sites: sites.iter().take(MOST_SITES).map(digest).collect(),
    }
}

/// The same of a plan.
pub(super) fn change_by(
    kernel: &GuestKernel,
    plan: &ResolvedPlan,
    strategy: impl serde::Serialize,
) -> Change {
    change(kernel, word(&strategy), &plan.sites, &plan.data)
}

/// What a report says.
pub(super) fn of_report(report: &Report) -> Outcome {
    Outcome {
        state: word(&report.state),
        failure: report.failure.as_deref().map(short),
        total_us: Some(report.timing.total_us),
        longest_stall_us: Some(report.timing.longest_stall_us),
        ..Outcome::default()
    }
}

/// What became of a plan.
pub(super) fn of_reported(result: &Result<Report, Vec<Refused>>) -> Outcome {
    match result {
        Ok(report) => of_report(report),
        Err(refused) => of_refused(refused),
    }
}

fn of_refused(refused: &[Refused]) -> Outcome {
    let codes = refused.iter().take(MOST_CODES).map(|refused| refused.refusal.code()).collect();
    Outcome { state: "refused".to_owned(), codes, ..Outcome::default() }
}

/// That something is in a state now, and why.
pub(super) fn of_state(state: PatchState, why: &str) -> Outcome {
    Outcome { state: word(&state), failure: Some(short(why)), ..Outcome::default() }
}

/// That something was done, or why not.
pub(super) fn of_result<T, E: ToString>(result: &Result<T, E>) -> Outcome {
    match result {
        Ok(_) => Outcome { state: "done".to_owned(), ..Outcome::default() },
        Err(error) => failed(&error.to_string()),
    }
}

pub(super) fn failed(why: &str) -> Outcome {
    Outcome { state: "failed".to_owned(), failure: Some(short(why)), ..Outcome::default() }
}

fn outcome(answer: &Answer) -> Outcome {
    match answer {
        Answer::Report(report) => of_report(report),
        Answer::Refused(refusals) => of_refused(&refusals.refusals),
        Answer::Failed(why) => failed(why),
        Answer::Done(took) => Outcome {
            state: "done".to_owned(),
            total_us: Some(u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            ..Outcome::default()
        },
        _ => Outcome { state: "done".to_owned(), ..Outcome::default() },
    }
}

/// A word of the control socket's JSON.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    value.as_ref().and_then(|value| value.as_str()).unwrap_or_default().to_owned()
}
