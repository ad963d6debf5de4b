//! Loaded modules, as data. [`crate::linux::module_list`] reads them from the running guest.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::landings::Landings;
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
    /// Where execution arrives by its tables. What its code leads to is found when a site needs it.
    pub landings: Landings,
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
    /// [`Refusal::MissingCapability`]; [`Refusal::BadModules`] when the guest's list is
    /// inconsistent.
    pub fn all(&self) -> Result<&[Module], Refusal> {
        self.unknown.clone().map_or(Ok(&self.loaded), Err)
    }
}
