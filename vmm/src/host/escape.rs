//! Text of which a guest or a client chose a part, before it reaches a person.
//!
//! A guest names its tasks, modules and symbols, a client its executable. What a terminal would obey, or what
//! would make text look like other text, is escaped where output leaves the process: pages
//! (`cli::render::page`), messages on standard error ([`stderr`](crate::host::stderr)), log entries
//! ([`log`](crate::host::log)), and JSON. The guest's console is passed on as it is.

use std::fmt::Write;

/// Whether a character is not shown as it is: control characters (C0, DEL, C1), separators of lines, and the
/// characters of format, invisible or changing the direction of text (Unicode 16, categories Cc, Zl, Zp, Cf).
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{600}'..='\u{605}'
                | '\u{61c}'
                | '\u{6dd}'
                | '\u{70f}'
                | '\u{890}'..='\u{891}'
                | '\u{8e2}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{110bd}'
                | '\u{110cd}'
                | '\u{13430}'..='\u{1343f}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// Text for a terminal, on one line: what is hidden as `\x1b` or `\u{202e}`.
#[must_use]
pub fn line(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        // Writing to a string does not fail.
        let _ = match c {
            c if c.is_control() => write!(escaped, "\\x{:02x}", u32::from(c)),
            c if is_hidden(c) => write!(escaped, "{}", c.escape_unicode()),
            c => escaped.write_char(c),
        };
    }
    escaped
}

/// JSON with what is hidden as `\u202e`. JSON must escape C0 only (RFC 8259, section 7); every other hidden
/// character of it is within a string.
#[must_use]
pub fn json(text: String) -> String {
    let hides = |c: &char| is_hidden(*c) && !c.is_ascii_whitespace();
    if !text.chars().any(|c| hides(&c)) {
        return text;
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if hides(&c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string does not fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\x1b[2J\r\n\t\u{7f}\u{9b}31m\u{85}\u{202e}\u{2028}\u{200b}\u{e0041}g\u{fc}n";

    #[test]
    fn nothing_hidden_is_left() {
        let shown = "a\\x1b[2J\\x0d\\x0a\\x09\\x7f\\x9b31m\\x85\\u{202e}\\u{2028}\\u{200b}\\u{e0041}g\u{fc}n";
        assert_eq!(line(HOSTILE), shown);
        assert!(!line(HOSTILE).chars().any(is_hidden));
    }

    #[test]
    fn json_says_the_same_and_hides_nothing() {
        let value = serde_json::json!({ HOSTILE: [HOSTILE, 1] });
        for text in [value.to_string(), serde_json::to_string_pretty(&value).expect("it is JSON")] {
            let escaped = json(text);
            assert!(!escaped.chars().any(|c| is_hidden(c) && c != '\n'), "{escaped:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).expect("it is JSON"), value);
        }
    }
}
