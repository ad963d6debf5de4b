//! Loaded modules, as data. [`crate::linux::module_list`] reads them from the running guest.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::landings::{Landings, is_cold};
use crate::image::symbols::Symbols;
use crate::image::tables::{JumpEntry, StaticCallSite};
use crate::plan::refusal::Refusal;

/// A live module. Addresses are those in the guest.
#[derive(Debug)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Its text.
    pub text: Range<Gva>,
    /// Its symbols.
    pub symbols: Symbols,
    /// Jumps that static keys switch.
    pub jump_entries: Vec<JumpEntry>,
    /// Calls that can be retargeted.
    pub static_call_sites: Vec<StaticCallSite>,
    /// The instructions that may fault, sorted.
    pub exceptions: Vec<Gva>,
    /// Where execution arrives by its tables.
    pub landings: Landings,
}

/// Most bytes of `.cold` parts that a module may have. Those of kvm, which has most, are 61 KB.
const MOST_COLD_BYTES: u64 = 4 << 20;

impl Module {
    /// The parts of its functions that the compiler moved away.
    ///
    /// # Errors
    /// [`Refusal::BadModules`] when they are larger than any module's.
    pub(crate) fn cold_parts(&self) -> Result<Vec<Range<Gva>>, Refusal> {
        let cold = self.symbols.iter().filter(|(start, _, name)| is_cold(name) && self.text.contains(start));
        let mut starts: Vec<Gva> = cold.map(|(start, ..)| start).collect();
        // In the order of addresses, so aliases are neighbours.
        starts.dedup();
        let end = |start| self.symbols.after(start).map_or(self.text.end, |end| end.min(self.text.end));
        let parts: Vec<Range<Gva>> = starts.into_iter().map(|start| start..end(start)).collect();
        let size: u64 = parts.iter().map(|part| part.end.0 - part.start.0).sum();
        if size > MOST_COLD_BYTES {
            return Err(Refusal::BadModules { why: "their .cold parts claim to be very large" });
        }
        Ok(parts)
    }
}

/// The modules of a guest, or why they are not known.
#[derive(Debug)]
pub struct Modules {
    loaded: Vec<Module>,
    unknown: Option<Refusal>,
}

impl Modules {
    /// No modules.
    pub const NONE: Self = Self { loaded: Vec::new(), unknown: None };

    /// The result of reading them from the guest.
    #[must_use]
    pub fn new(read: Result<Vec<Module>, Refusal>) -> Self {
        match read {
            Ok(loaded) => Self { loaded, unknown: None },
            Err(refusal) => Self { loaded: Vec::new(), unknown: Some(refusal) },
        }
    }

    /// The modules that are known.
    #[must_use]
    pub fn known(&self) -> &[Module] {
        &self.loaded
    }

    /// All of them.
    ///
    /// # Errors
    /// [`Refusal::UnknownLayout`] without BTF; [`Refusal::BadModules`] when the guest's list is
    /// inconsistent.
    pub fn all(&self) -> Result<&[Module], Refusal> {
        self.unknown.clone().map_or(Ok(&self.loaded), Err)
    }
}
