//! Places in a plan.

use std::fmt;

use serde_path_to_error::{Path, Segment};

/// A place in a plan, as a JSON pointer (RFC 6901). The empty pointer is the whole plan.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pointer(String);

impl Pointer {
    /// Wraps a well-formed pointer.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The patch with this index, counted from 0.
    #[must_use]
    pub fn patch(index: usize) -> Self {
        Self(format!("/patches/{index}"))
    }

    /// Its text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn from_path(path: &Path) -> Self {
        let mut text = String::new();
        for segment in path {
            match segment {
                Segment::Seq { index } => text += &format!("/{index}"),
                Segment::Map { key } => text += &format!("/{}", key.replace('~', "~0").replace('/', "~1")),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        Self(text)
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
