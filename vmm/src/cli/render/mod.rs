//! Answers of the control socket, as pages for a terminal. One kind of answer a file.

use crate::cli::render::page::Page;

mod audit;
mod events;
mod inside;
pub(super) mod page;
mod patches;
mod targets;
mod tasks;
mod vm;

/// What can be shown on a terminal.
pub(super) trait Render {
    /// Writes it at the end of a page.
    fn render(&self, page: &mut Page);

    /// It alone.
    fn page(&self) -> Page {
        let mut page = Page::default();
        self.render(&mut page);
        page
    }
}
