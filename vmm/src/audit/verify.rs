//! Verifies a log: every line follows from the one before it.
//!
//! What a chain without an anchor can't show: that lines were cut off its end, or that all of it was written
//! anew. For that the digest of the last line is compared with one that was kept elsewhere.

use std::io::{self, BufRead, Read};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::audit::chain::{Head, Kind, Link, MOST_LINE, sha256};

/// Most entries that are listed of a kind.
const MOST_LISTED: usize = 256;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Whether every line follows from the one before, and the last is the expected one.
    pub verified: bool,
    /// Where it breaks first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken: Option<Broken>,
    /// How many lines were verified.
    pub lines: u64,
    /// The digest of the last of them; with a copy of it kept elsewhere, a log that was cut shows.
    pub last: String,
    /// When it was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_time: Option<String>,
    /// How often the monitor was started.
    pub starts: u64,
    /// How many of these runs end with a line that says so; the others were killed, or the last still runs.
    pub ends: u64,
    /// How many outcomes there are.
    pub outcomes: u64,
    /// How many outcomes the monitor could never write.
    pub lost: u64,
    /// Changes that were begun and whose outcome is not known.
    pub in_flight: Vec<InFlight>,
    /// Writes that a crash or a full disk tore; the next line says so, or nothing follows.
    pub torn: Vec<TornPlace>,
}

/// Where a chain breaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Broken {
    /// The line of the file, counted from 1.
    pub line: u64,
    /// Why.
    pub why: String,
}

/// A change without an outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InFlight {
    /// The number of the line that says that it was begun.
    pub number: u64,
    /// What for.
    pub action: String,
    /// Of which patch.
    pub patch: Option<String>,
    /// Whether the run of the monitor that began it is over, so that there will be none.
    pub is_over: bool,
}

/// Bytes of a write that was torn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TornPlace {
    /// The line of the file that they begin in, counted from 1.
    pub line: u64,
    /// How many.
    pub bytes: u64,
}

/// Verifies a log.
///
/// # Errors
/// What reading returned.
pub fn verify(log: impl BufRead, expected_last: Option<&str>) -> io::Result<Verdict> {
    let mut verifier = Verifier::default();
    let broken = verifier.read(log)?;
    let Verifier { head, mut verdict, begun, .. } = verifier;
    for (_, intent) in begun {
        push(&mut verdict.in_flight, intent);
    }
    let is_expected = |wanted: &str| wanted.eq_ignore_ascii_case(&head.digest);
    verdict.broken = broken.or_else(|| {
        let wanted = expected_last.filter(|wanted| !is_expected(wanted))?;
        let why = format!(
            "the last line's digest is {}, not {wanted}: lines are missing, or were added",
            head.digest
        );
        Some(Broken { line: verifier.line, why })
    });
    verdict.verified = verdict.broken.is_none();
    verdict.last = head.digest;
    Ok(verdict)
}

#[derive(Default)]
struct Verifier {
    head: Head,
    verdict: Verdict,
    /// The changes of this run without an outcome yet, by request.
    begun: Vec<(u64, InFlight)>,
    /// The line of the file that is being read.
    line: u64,
    gap: Option<Gap>,
}

/// What lies between two lines and is none.
struct Gap {
    line: u64,
    bytes: u64,
    digest: Sha256,
    /// The end of its last line, which belongs to it only if more follows.
    ends: bool,
}

impl Verifier {
    fn read(&mut self, mut log: impl BufRead) -> io::Result<Option<Broken>> {
        let mut text = Vec::new();
        loop {
            text.clear();
            // What is longer is no line.
            let length = (&mut log).take(MOST_LINE as u64 + 1).read_until(b'\n', &mut text)?;
            if length == 0 {
                break;
            }
            let is_ended = text.last() == Some(&b'\n');
            if is_ended {
                text.pop();
            }
            self.line += 1;
            match Link::read(&text) {
                Some(link) => {
                    if let Err(why) = self.take(link, &text) {
                        return Ok(Some(Broken { line: self.line, why }));
                    }
                }
                None => self.skip(&text, is_ended),
            }
        }
        match self.gap.take() {
            Some(gap) if gap.ends => {
                let why =
                    format!("{} bytes are no line, and no later line says that a write was torn", gap.bytes);
                Ok(Some(Broken { line: gap.line, why }))
            }
            Some(gap) => {
                push(&mut self.verdict.torn, TornPlace { line: gap.line, bytes: gap.bytes });
                Ok(None)
            }
            None => Ok(None),
        }
    }

    fn skip(&mut self, text: &[u8], is_ended: bool) {
        let line = self.line;
        let gap = self.gap.get_or_insert_with(|| Gap { line, bytes: 0, digest: Sha256::new(), ends: false });
        if gap.ends {
            gap.digest.update(b"\n");
            gap.bytes += 1;
        }
        gap.digest.update(text);
        gap.bytes += text.len() as u64;
        gap.ends = is_ended;
    }

    fn take(&mut self, link: Link, text: &[u8]) -> Result<(), String> {
        if link.number > self.head.next {
            return Err(format!("lines {} to {} are missing", self.head.next, link.number - 1));
        }
        if link.number < self.head.next {
            return Err(format!("line {} is there again, or out of order", link.number));
        }
        if link.previous != self.head.digest {
            return Err(match link.number.checked_sub(1) {
                Some(edited) => {
                    format!("line {edited} is not the one that line {} follows: it was edited", link.number)
                }
                None => "the first line does not begin a log".to_owned(),
            });
        }
        match (self.gap.take(), &link.torn) {
            (None, None) => {}
            (Some(gap), Some(torn)) => {
                let digest = patcher::insn::hex(&gap.digest.finalize());
                if (gap.bytes, digest.as_str()) != (torn.bytes, torn.sha256.as_str()) {
                    let what = "the bytes before it are not those that it calls torn";
                    return Err(format!("line {}: {what}: they were edited", link.number));
                }
                push(&mut self.verdict.torn, TornPlace { line: gap.line, bytes: gap.bytes });
            }
            (Some(gap), None) => {
                return Err(format!(
                    "{} bytes before line {} are no line: they were added",
                    gap.bytes, link.number
                ));
            }
            (None, Some(_)) => {
                return Err(format!("line {} tells of torn bytes before it, which are missing", link.number));
            }
        }
        self.head = Head { next: link.number + 1, digest: sha256(text) };
        self.count(link);
        Ok(())
    }

    fn count(&mut self, link: Link) {
        let verdict = &mut self.verdict;
        verdict.lines += 1;
        verdict.lost += link.lost;
        verdict.last_time = Some(link.time);
        match link.event {
            Kind::Start => {
                verdict.starts += 1;
                self.end_run();
            }
            Kind::End => {
                verdict.ends += 1;
                self.end_run();
            }
            Kind::Intent => {
                let (number, request) = (link.number, link.request.unwrap_or(0));
                let action = link.action.unwrap_or_default();
                // Of a request that is tried several times, the first counts.
                if !self.begun.iter().any(|(begun, _)| *begun == request) {
                    let intent = InFlight { number, action, patch: link.patch, is_over: false };
                    push(&mut self.begun, (request, intent));
                }
            }
            Kind::Outcome => {
                verdict.outcomes += 1;
                let request = link.request.unwrap_or(0);
                self.begun.retain(|(begun, _)| *begun != request);
            }
        }
    }

    /// What was begun and has no outcome yet has none any more.
    fn end_run(&mut self) {
        for (_, intent) in self.begun.drain(..) {
            push(&mut self.verdict.in_flight, InFlight { is_over: true, ..intent });
        }
    }
}

fn push<T>(list: &mut Vec<T>, entry: T) {
    if list.len() < MOST_LISTED {
        list.push(entry);
    }
}
