//! Text for a terminal: styled pieces, lines of them, and tables.
//!
//! A guest chooses the names of its tasks, modules and symbols, so every piece is escaped when it
//! is made: nothing that a page prints moves the cursor or changes colours, but the styles here.

use std::fmt::{self, Display, Write};

use anstyle::{AnsiColor, Style};
use tabled::builder::Builder;
use tabled::settings::{Color, Padding, Style as Borders};

use crate::host::escape;

/// Text in one style.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    style: Style,
    text: String,
}

impl Span {
    fn new(style: Style, text: impl Display) -> Self {
        Self { style, text: escape::line(&text.to_string()) }
    }
}

impl Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { style, text } = self;
        write!(f, "{style}{text}{style:#}")
    }
}

/// Text as it is.
pub(crate) fn plain(text: impl Display) -> Span {
    Span::new(Style::new(), text)
}

/// Names and headings.
pub(crate) fn bold(text: impl Display) -> Span {
    Span::new(Style::new().bold(), text)
}

/// What went wrong, and what is taken away.
pub(crate) fn red(text: impl Display) -> Span {
    Span::new(AnsiColor::Red.on_default(), text)
}

/// What went well, and what is added.
pub(crate) fn green(text: impl Display) -> Span {
    Span::new(AnsiColor::Green.on_default(), text)
}

/// Lines of text.
#[derive(Debug, Default)]
pub(crate) struct Page(String);

impl Page {
    /// Adds a line.
    pub(crate) fn line(&mut self, spans: impl IntoIterator<Item = Span>) {
        for span in spans {
            // Writing to a string does not fail.
            let _ = write!(self.0, "{span}");
        }
        self.0.push('\n');
    }

    /// Adds a table: its columns are as wide as their widest cell.
    pub(crate) fn table<const N: usize>(&mut self, rows: impl IntoIterator<Item = [Span; N]>) {
        self.rows(rows.into_iter().map(Vec::from));
    }

    /// The same, with as many columns as the rows have.
    pub(crate) fn rows(&mut self, rows: impl IntoIterator<Item = Vec<Span>>) {
        let rows: Vec<Vec<Span>> = rows.into_iter().collect();
        let texts = rows.iter().map(|row| row.iter().map(|span| span.text.as_str()));
        let mut table = texts.collect::<Builder>().build();
        table.with(Borders::empty()).with(Padding::new(0, 2, 0, 0));
        for (y, row) in rows.iter().enumerate() {
            for (x, Span { style, .. }) in row.iter().enumerate().filter(|(_, span)| !span.style.is_plain()) {
                table
                    .modify((y, x), Color::new(style.render().to_string(), style.render_reset().to_string()));
            }
        }
        for line in table.to_string().lines() {
            self.0 += line.trim_end();
            self.0.push('\n');
        }
    }

    /// The text, with the escape sequences of its styles.
    pub(crate) fn styled(&self) -> &str {
        &self.0
    }

    /// The text alone.
    #[cfg(test)]
    pub(crate) fn text(&self) -> String {
        anstream::adapter::strip_str(&self.0).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_escaped() {
        let mut page = Page::default();
        page.line([red("a\x1b[2Jb\n\u{7f}\u{9b}31m\u{202e}"), plain(" gr\u{fc}n")]);
        assert_eq!(page.text(), "a\\x1b[2Jb\\x0a\\x7f\\x9b31m\\u{202e} gr\u{fc}n\n");
        assert_eq!(page.styled().matches('\x1b').count(), 2, "{:?}", page.styled());
    }

    #[test]
    fn columns_of_a_table_are_aligned_whatever_their_colours() {
        let mut page = Page::default();
        page.table([[bold("name"), plain("state")], [plain("a-long-name"), green("applied")]]);
        assert_eq!(page.text(), "name         state\na-long-name  applied\n");
    }
}
