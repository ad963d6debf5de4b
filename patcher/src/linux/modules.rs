//! Loaded modules, as data. [`crate::linux::module_list`] reads them from the running guest.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::addr::Gva;
use crate::image::landings::Landings;
use crate::image::orc::OrcTable;
use crate::image::symbols::Symbols;
use crate::image::tables::{JumpEntry, StaticCallSite};
use crate::linux::bounded::INSPECTION;
use crate::plan::refusal::Refusal;

/// A module that is live, or complete and about to be. Addresses are those in the guest.
#[derive(Debug)]
pub struct Module {
    /// Its `struct module`.
    pub at: Gva,
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
    /// Its ORC table, if it has one.
    pub orc: Option<OrcTable>,
    /// Where execution arrives by its tables. What its code leads to is found when a site needs it.
    pub landings: Landings,
}

/// The modules of a guest, or why they are not known.
#[derive(Debug)]
pub struct Modules {
    loaded: Vec<Module>,
    coming: Vec<String>,
    unknown: Option<Refusal>,
    /// What reading them left of the budget for a plan.
    left: u64,
}

impl Modules {
    /// No modules.
    pub const NONE: Self = Self { loaded: Vec::new(), coming: Vec::new(), unknown: None, left: INSPECTION };

    /// The result of reading them from the guest: the modules, and the names of those whose init may be
    /// running.
    #[must_use]
    pub fn new(read: Result<(Vec<Module>, Vec<String>), Refusal>) -> Self {
        match read {
            Ok((loaded, coming)) => Self { loaded, coming, ..Self::NONE },
            Err(refusal) => Self { unknown: Some(refusal), ..Self::NONE },
        }
    }

    /// The same, which left so much of the budget for a plan.
    pub(super) fn with_left(self, left: u64) -> Self {
        Self { left, ..self }
    }

    /// How much of the guest's memory may still be read for a plan, in units of
    /// [`Budget`](crate::budget::Budget).
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Those of these names that no module has that is known.
    ///
    /// # Errors
    /// As [`Modules::all`]; [`Refusal::Busy`] when one of them is being loaded.
    pub fn missing<'n>(&self, names: &'n BTreeSet<String>) -> Result<Vec<&'n str>, Refusal> {
        let loaded = self.all()?;
        let missing = names.iter().filter(|name| !loaded.iter().any(|module| module.name == **name));
        let missing: Vec<&str> = missing.map(String::as_str).collect();
        match missing.iter().find(|name| self.coming.iter().any(|coming| coming == *name)) {
            Some(name) => {
                let why = "the guest is loading the module".to_owned();
                Err(Refusal::Busy { name: (*name).to_owned(), why })
            }
            None => Ok(missing),
        }
    }

    /// Nothing, if no module is being loaded: what such a module has of sites is not known, and its
    /// notifiers may have run already.
    ///
    /// # Errors
    /// [`Refusal::Busy`] for `name`, which the guest would switch in that module, too.
    pub(crate) fn none_is_coming(&self, name: &str) -> Result<(), Refusal> {
        self.coming.first().map_or(Ok(()), |module| {
            let why = format!("the guest is loading the module {module}, which may depend on it");
            Err(Refusal::Busy { name: name.to_owned(), why })
        })
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
