//! How lines are linked: each has the number and the digest of the one before, and says what lies between.

use patcher::insn::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::audit::record::{Event, is_zero};
use crate::host::escape;

/// What the first line has for the digest of the one before it.
pub(super) const NOTHING: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Longest line, its end included.
pub(super) const MOST_LINE: usize = 64 << 10;

/// The SHA-256 of bytes, in hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The digest of what several places hold.
#[derive(Default)]
pub struct Sum(Sha256);

impl Sum {
    /// Adds a place: its address and length, 8 bytes each, the lowest first, and its bytes.
    pub fn add(&mut self, at: u64, bytes: &[u8]) {
        self.0.update(at.to_le_bytes());
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// The digest, in hex.
    #[must_use]
    pub fn digest(self) -> String {
        hex(&self.0.finalize())
    }
}

/// Bytes between two lines, which a write left that was not finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Torn {
    /// How many.
    pub(super) bytes: u64,
    /// Their SHA-256.
    pub(super) sha256: String,
}

/// Where a chain ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The number of the next line.
    pub next: u64,
    /// The digest of the last.
    pub digest: String,
}

impl Default for Head {
    fn default() -> Self {
        Self { next: 0, digest: NOTHING.to_owned() }
    }
}

/// A line to be written.
#[derive(Serialize)]
pub(super) struct Line<'l> {
    pub(super) number: u64,
    pub(super) previous: &'l str,
    pub(super) time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) torn: Option<&'l Torn>,
    /// How many outcomes could not be written before this one, and never were.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) lost: u64,
    #[serde(flatten)]
    pub(super) event: &'l Event,
}

impl Line<'_> {
    /// As it is written, without its end.
    pub(super) fn text(&self) -> String {
        // These types hold nothing that JSON can't express.
        escape::json(serde_json::to_string(self).unwrap_or_default())
    }
}

/// What a reader needs of a line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Link {
    pub(super) number: u64,
    pub(super) previous: String,
    pub(super) time: String,
    pub(super) torn: Option<Torn>,
    #[serde(default)]
    pub(super) lost: u64,
    pub(super) event: Kind,
    pub(super) request: Option<u64>,
    pub(super) action: Option<String>,
    pub(super) patch: Option<String>,
}

/// Which event a line tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Start,
    Intent,
    Outcome,
    End,
}

impl Link {
    /// Reads a line; `None` if it is none.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }
}
