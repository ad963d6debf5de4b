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

use patcher::plan::refusal::Refusal;

use crate::api::wire::AuditInfo;
use crate::audit::chain::sha256;
use crate::audit::log::AuditLog;
use crate::audit::record::{Change, Event, Outcome, PlanDigest, Request, Who, short};

/// How many requests of the monitor's own are listed at once.
const BURST: u32 = 64;
/// How long it takes until one more is.
const REFILL: Duration = Duration::from_secs(10);

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

    /// Says that something is about to be done to the guest that changes no text by a plan.
    pub(super) fn intend(&mut self) -> Result<(), Refusal> {
        self.intend_to(|| None)
    }

    /// Says that the guest's text is about to be changed so.
    pub(super) fn intend_change(&mut self, change: impl FnOnce() -> Change) -> Result<(), Refusal> {
        self.intend_to(|| Some(change()))
    }

    fn intend_to(&mut self, change: impl FnOnce() -> Option<Change>) -> Result<(), Refusal> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let unwritable = |why: String| Refusal::AuditUnwritable { why };
        if self.has_ended {
            return Err(unwritable("the VM ends".to_owned()));
        }
        let Some(current) = &mut self.current else {
            return Err(unwritable("nobody asked for this change".to_owned()));
        };
        if current.is_listed {
            let (request, change) = (current.request.clone(), change().map(Box::new));
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
    pub(super) fn is_busy(&self) -> bool {
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    fn lines(log: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(log).expect("it is there");
        text.lines().map(|line| serde_json::from_str(line).expect("it is JSON")).collect()
    }

    fn done() -> Outcome {
        Outcome { state: "done".to_owned(), ..Outcome::default() }
    }

    #[test]
    fn what_a_guest_causes_is_told_at_a_bounded_rate_and_counted() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let mut audit = Audit::new(Some(AuditLog::open(&path).expect("it is free")));
        let times = u64::from(BURST) + 100;
        for _ in 0..times {
            audit.begin(Who::Monitor, "put_back", Some("p"), None);
            audit.intend().expect("there is room");
            audit.end(done()).expect("there is room");
        }
        // What changed nothing is not told at all.
        audit.begin(Who::Monitor, "put_back", Some("p"), None);
        audit.end(done()).expect("there is room");
        let told = lines(&path);
        assert_eq!(told.len(), 2 * BURST as usize);
        assert!(told.iter().all(|line| line["unlisted"].is_null()));

        // A client's request is always told, and so is what becomes of a patch meanwhile.
        let peer = crate::host::peer::Peer { uid: 1, gid: 2, pid: 3, executable: None };
        audit.begin(Who::Client(peer), "apply", None, Some(b"{}"));
        audit.named("q");
        audit.tokens = 1;
        audit.tell("lose", "p", done());
        audit.intend().expect("there is room");
        audit.end(done()).expect("there is room");
        let told = lines(&path);
        let last: Vec<_> = told[2 * BURST as usize..].iter().collect();
        let words = |line: &Value| (line["event"].clone(), line["action"].clone(), line["patch"].clone());
        let expected = [("outcome", "lose", "p"), ("intent", "apply", "q"), ("outcome", "apply", "q")];
        assert_eq!(last.len(), expected.len());
        for (line, (event, action, patch)) in last.iter().zip(expected) {
            assert_eq!(words(line), (event.into(), action.into(), patch.into()));
        }
        assert_eq!(last[0]["unlisted"], 100);
        assert_eq!(last[2]["plan"]["sha256"], sha256(b"{}"));
    }

    #[test]
    fn nothing_is_changed_unasked_or_after_the_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let mut audit = Audit::new(Some(AuditLog::open(&path).expect("it is free")));
        assert!(matches!(audit.intend(), Err(Refusal::AuditUnwritable { .. })), "nobody asked");
        audit.begin(Who::Monitor, "put_back", None, None);
        audit.finish("Stopped");
        assert!(matches!(audit.intend(), Err(Refusal::AuditUnwritable { .. })), "the VM has ended");
        assert_eq!(lines(&path).len(), 1);

        let mut none = Audit::new(None);
        none.begin(Who::Monitor, "put_back", None, None);
        none.intend().expect("without a log nothing is refused");
    }
}
