//! Lists of things that have the same fields: a table with a heading, or JSON objects.

use std::io;

use serde_json::{Map, Value};

use crate::cli::output;
use crate::cli::render::page::{Page, bold, plain};

/// A line: its fields by name, in the order in which they are shown.
pub(super) type Row = Vec<(&'static str, Value)>;

/// Prints rows; `None` if this kernel has no such table.
pub(super) fn print(json: bool, rows: Option<Vec<Row>>) -> io::Result<()> {
    if json {
        let object = |row: Row| row.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let objects: Option<Vec<Map<String, Value>>> =
            rows.map(|rows| rows.into_iter().map(object).collect());
        return output::print_json(&objects);
    }
    output::print(&page(rows.as_deref()))
}

fn page(rows: Option<&[Row]>) -> Page {
    let mut page = Page::default();
    match rows {
        None => page.line([plain("this kernel has no such table")]),
        Some([]) => page.line([plain("none")]),
        Some(rows @ [first, ..]) => {
            let heading = first.iter().map(|(name, _)| bold(name)).collect();
            let cells = rows.iter().map(|row| row.iter().map(|(_, value)| plain(cell(value))).collect());
            page.rows([heading].into_iter().chain(cells));
        }
    }
    page
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}
