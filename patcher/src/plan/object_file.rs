//! A relocatable object that a plan brings.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The content of a relocatable object. In JSON, `{"base64": "..."}` (RFC 4648, section 4).
#[derive(Clone, PartialEq, Eq)]
pub struct ObjectFile(pub Vec<u8>);

/// What an object may be in JSON.
#[derive(Deserialize)]
#[serde(untagged)]
enum Raw {
    Content(Content),
    Name(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    base64: String,
}

impl<'de> Deserialize<'de> for ObjectFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Raw::deserialize(deserializer) {
            Ok(Raw::Content(Content { base64 })) => {
                let content = STANDARD.decode(base64);
                content
                    .map(Self)
                    .map_err(|error| D::Error::custom(format!("an object is not Base64: {error}")))
            }
            Ok(Raw::Name(name)) => Err(D::Error::custom(format!(
                "{name:?} is a file's name, and the monitor opens no files: `vmm patch` and `--patch` put its content \
                 in; others write {{\"base64\": \"...\"}}"
            ))),
            Err(_) => Err(D::Error::custom("an object is {\"base64\": \"...\"}")),
        }
    }
}

impl Serialize for ObjectFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Content { base64: STANDARD.encode(&self.0) }.serialize(serializer)
    }
}

impl fmt::Debug for ObjectFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of {} bytes", self.0.len())
    }
}
