//! Standard output: pages for terminals, JSON for programs.

use std::io::{self, Write};

use anstream::ColorChoice;
use serde::Serialize;

use crate::cli::render::page::Page;
use crate::host::escape;

/// Prints a page. Its colours stay if standard output is a terminal that has them and `NO_COLOR`
/// is not set.
pub(super) fn print(page: &Page) -> io::Result<()> {
    write(&mut anstream::stdout().lock(), page.styled().as_bytes())
}

/// Whether standard output has colours. A thread in the sandbox can't find out.
pub(super) fn colours() -> ColorChoice {
    anstream::AutoStream::choice(&io::stdout())
}

/// The same page to another writer, for the reader of standard output, which has these colours.
pub(super) fn print_to(output: &mut impl Write, choice: ColorChoice, page: &Page) -> io::Result<()> {
    let mut text = anstream::AutoStream::new(Vec::new(), choice);
    text.write_all(page.styled().as_bytes())?;
    output.write_all(&text.into_inner())
}

/// Prints JSON that came from elsewhere, with what a terminal would obey escaped.
pub(super) fn print_raw(json: &[u8]) -> io::Result<()> {
    let mut text = escape::json(String::from_utf8_lossy(json).into_owned());
    if !text.ends_with('\n') {
        text.push('\n');
    }
    write(&mut io::stdout().lock(), text.as_bytes())
}

/// Prints a value as JSON.
pub(super) fn print_json(value: &impl Serialize) -> io::Result<()> {
    print_raw(&serde_json::to_vec_pretty(value)?)
}

fn write(out: &mut impl Write, text: &[u8]) -> io::Result<()> {
    out.write_all(text)?;
    out.flush()
}
