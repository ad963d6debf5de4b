//! What the rig's host (L1) and the machine it is emulated on say to each other over a
//! serial line.
//!
//! Down: one [`Request`] a line, as JSON. Up: frames of a tag byte, a little-endian `u32`
//! length and the payload, so that a program's output passes unchanged.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// A program to run in the rig's host. One at a time.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Environment variables to add.
    pub env: Vec<(String, String)>,
}

/// What comes back.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// The host is up and waits for a request.
    Ready,
    /// A piece of the program's standard output.
    Stdout(Vec<u8>),
    /// A piece of the program's standard error.
    Stderr(Vec<u8>),
    /// The program ended with this exit code (128 + n where signal n killed it).
    Exit(i32),
    /// The host could not do what was asked.
    Error(String),
}

/// No frame is longer; more means that the line lost a byte.
const MAX_PAYLOAD: usize = 1 << 16;

impl Frame {
    /// Writes the frame.
    ///
    /// # Errors
    /// Whatever the writer returns.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (tag, payload): (u8, &[u8]) = match self {
            Self::Ready => (b'r', &[]),
            Self::Stdout(bytes) => (b'o', bytes),
            Self::Stderr(bytes) => (b'e', bytes),
            Self::Exit(code) => (b'x', &code.to_le_bytes()),
            Self::Error(text) => (b'!', text.as_bytes()),
        };
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut bytes = vec![tag];
        bytes.extend(length.to_le_bytes());
        bytes.extend(payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads the next frame.
    ///
    /// # Errors
    /// `InvalidData` when the bytes are no frame; whatever the reader returns.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let [tag, length @ ..] = head;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(bad(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        match tag {
            b'r' => Ok(Self::Ready),
            b'o' => Ok(Self::Stdout(payload)),
            b'e' => Ok(Self::Stderr(payload)),
            b'x' => {
                let code = payload.try_into().map_err(|_| bad("a short exit frame".into()))?;
                Ok(Self::Exit(i32::from_le_bytes(code)))
            }
            b'!' => Ok(Self::Error(String::from_utf8_lossy(&payload).into_owned())),
            other => Err(bad(format!("a frame with tag {other:#04x}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_sent() {
        let frames = [
            Frame::Ready,
            Frame::Stdout(b"\x00\xff".to_vec()),
            Frame::Stderr(Vec::new()),
            Frame::Exit(-1),
            Frame::Error("no".into()),
        ];
        let mut line = Vec::new();
        for frame in &frames {
            frame.write(&mut line).expect("written");
        }
        let mut reader = &line[..];
        for frame in &frames {
            assert_eq!(&Frame::read(&mut reader).expect("read"), frame);
        }
        assert!(Frame::read(&mut &b"?\0\0\0\0"[..]).is_err());
        assert!(Frame::read(&mut &b"o\xff\xff\xff\xff"[..]).is_err());
    }
}
