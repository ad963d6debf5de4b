//! Where a task may stand that is inside a function of a running guest.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::Symbols;
use crate::linux::memory::GuestMemory;
use crate::linux::{Kernel, kprobes, tracers};
use crate::object::replacement::PlacedPiece;
use crate::plan::refusal::Refusal;
use crate::safety::stack_check::OldCode;

/// What a compiler calls pieces of a function that it moved out of it: behind the function's name and one of
/// these comes a number, or nothing.
const PIECES: [&str; 2] = [".cold", ".part"];

/// A function with its pieces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// As it was asked for.
    pub name: String,
    /// From its first byte to that of the next symbol.
    pub code: Range<Gva>,
    /// Its `.cold` and `.part` pieces: all of that name, if there are several functions of one name.
    pub pieces: Vec<Range<Gva>>,
}

impl Place {
    /// A function by its name, as a plan writes it.
    ///
    /// # Errors
    /// As [`Kernel::symbol`]; [`Refusal::NotText`] if a symbol is no function.
    pub fn find(kernel: &Kernel<'_>, name: &str) -> Result<Self, Refusal> {
        Self::of(kernel, kernel.symbol(name)?, name)
    }

    /// The function that begins at an address.
    ///
    /// # Errors
    /// [`Refusal::NotText`] if none does.
    pub(crate) fn of(kernel: &Kernel<'_>, at: Gva, name: &str) -> Result<Self, Refusal> {
        let function = kernel.function_at(at).filter(|function| function.start == at);
        let function = function.ok_or(Refusal::NotText { at })?;
        let code = function.start..function.end;
        let module = kernel.module_at(at);
        let (symbols, slide) = match module {
            Some(module) => (&module.symbols, 0),
            None => (kernel.image.symbols(), kernel.slide),
        };
        let live = |at: Gva| Gva(at.0.wrapping_add(slide));
        let range = |at: Gva| kernel.function_at(live(at)).map(|piece| live(at)..piece.end);
        let pieces = pieces(symbols, function.name).filter_map(range).collect();
        Ok(Self { name: name.to_owned(), code, pieces })
    }
}

impl Place {
    /// Code of the monitor's that no symbol covers. A task that is about to execute its first instruction is inside:
    /// nothing leads it away from there.
    pub(crate) fn of_new_code(piece: &PlacedPiece) -> Self {
        let end = piece.at.plus(piece.bytes.len()).unwrap_or(piece.at);
        Self { name: format!("{} (new)", piece.name), code: piece.at..piece.at, pieces: vec![piece.at..end] }
    }
}

/// Where the pieces of functions of this name begin.
fn pieces<'s>(symbols: &'s Symbols, name: &'s str) -> impl Iterator<Item = Gva> + 's {
    symbols.iter().filter(move |(.., symbol)| is_piece(symbol, name)).map(|(at, ..)| at)
}

fn is_piece(symbol: &str, name: &str) -> bool {
    let Some(rest) = symbol.strip_prefix(name) else { return false };
    PIECES
        .iter()
        .any(|piece| rest.strip_prefix(piece).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

impl OldCode {
    /// These functions, and what hides in this guest that a task stands in them: `copies` is where the monitor has
    /// copies of instructions.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`], and what reading the guest's lists of kprobes returns.
    pub fn of(
        kernel: &Kernel<'_>,
        memory: &dyn GuestMemory,
        places: &[Place],
        copies: Option<Range<Gva>>,
    ) -> Result<Self, Refusal> {
        Ok(Self {
            functions: places.iter().map(|place| place.code.clone()).collect(),
            pieces: places.iter().flat_map(|place| place.pieces.clone()).collect(),
            slots: kprobes::slots(kernel, memory)?.into_iter().chain(copies).collect(),
            trampolines: tracers::trampolines(kernel)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_told_by_their_names() {
        for (symbol, expected) in [
            ("f", false),
            ("f.cold", true),
            ("f.cold.3", true),
            ("f.part.0", true),
            ("f.part.0.cold", true),
            ("f.colder", false),
            ("f.constprop.0", false),
            ("g.cold", false),
            ("ff.cold", false),
        ] {
            assert_eq!(is_piece(symbol, "f"), expected, "{symbol}");
        }
    }
}
