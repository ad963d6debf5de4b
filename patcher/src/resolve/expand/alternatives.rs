//! Alternatives: code that the kernel chose at boot by CPU features (Linux
//! arch/x86/kernel/alternative.c, `apply_alternatives`).
//!
//! Of the entries for one site, the last whose condition is met wins; entries before it have no effect.
//! The kernel's padding differs between versions, so code is compared without padding.

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::image::choice::ALWAYS;
use crate::image::tables::Alternative;
use crate::insn;
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u64};
use crate::plan::refusal::Refusal;
use crate::resolve::expand::expansion::{Code, Expansion};
use crate::resolve::expand::{fixed_features, rewrite};

/// Makes the code what it would be on a CPU with the feature, or on one without it.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    name: &str,
    enable: bool,
) -> Result<Expansion, Refusal> {
    let unknown = || Refusal::UnknownFeature { name: name.to_owned() };
    let feature = kernel.image.tables().feature(name).ok_or_else(unknown)?;
    if let Some(with) = fixed_features::goes_with(kernel.image.tables(), feature) {
        return Err(Refusal::FeatureFixed { name: name.to_owned(), with });
    }
    let all = alt_sites(kernel);
    let concerned: Vec<&AltSite<'_>> =
        all.values().filter(|site| site.entries.iter().any(|entry| entry.feature == feature)).collect();
    if concerned.is_empty() {
        return Err(unknown());
    }
    let with = |present| Overrides { features: vec![(feature, present)], pointers: Vec::new() };
    let (before, after) = (with(!enable), with(enable));
    let mut code = Vec::new();
    for site in concerned.into_iter().filter(|site| !kernel.is_init(site.at)) {
        let there = read(text, site.at, site.length)?;
        let wanted = site.code(kernel, text, &after)?;
        if same(&there, &wanted, site.at) {
            continue;
        }
        let expected = site.code(kernel, text, &before)?;
        if !same(&there, &expected, site.at) {
            return Err(Refusal::ExpectMismatch { at: site.at, expected, found: there });
        }
        code.push(Code { at: site.at, old: there, new: wanted });
    }
    if code.is_empty() {
        return Err(Refusal::NothingToDo { at: kernel.live(kernel.image.text_base()) });
    }
    Ok(Expansion { code, ..Expansion::default() })
}

/// What the choice of code depends on, where it differs from the guest's present state.
#[derive(Debug, Default)]
pub(crate) struct Overrides {
    /// Features, and whether the CPU has them.
    pub(crate) features: Vec<(u16, bool)>,
    /// Pointers that are called through, and their targets.
    pub(crate) pointers: Vec<(Gva, Gva)>,
}

impl Overrides {
    /// The overridden target of a pointer.
    pub(crate) fn target(&self, pointer: Gva) -> Option<Gva> {
        self.pointers.iter().find(|(at, _)| *at == pointer).map(|(_, target)| *target)
    }
}

/// A site with all its entries, in the table's order.
#[derive(Debug)]
pub(crate) struct AltSite<'a> {
    pub(crate) at: Gva,
    pub(crate) length: usize,
    entries: Vec<&'a Alternative>,
}

/// All sites of alternatives, by their address in the guest.
pub(crate) fn alt_sites<'a>(kernel: &Kernel<'a>) -> BTreeMap<Gva, AltSite<'a>> {
    let mut sites: BTreeMap<Gva, AltSite<'a>> = BTreeMap::new();
    for entry in kernel.image.tables().alternatives.iter().flatten() {
        let at = kernel.live(entry.at);
        let site = sites.entry(at).or_insert(AltSite { at, length: 0, entries: Vec::new() });
        site.length = site.length.max(entry.original.len());
        site.entries.push(entry);
    }
    sites
}

impl<'a> AltSite<'a> {
    /// A site that no alternative is for.
    pub(crate) fn empty(at: Gva) -> Self {
        Self { at, length: 0, entries: Vec::new() }
    }

    /// A site of one alternative.
    #[cfg(test)]
    pub(crate) fn of(entry: &'a Alternative) -> Self {
        Self { at: entry.at, length: entry.original.len(), entries: vec![entry] }
    }

    /// The entry that wins, if any does.
    pub(crate) fn chosen(
        &self,
        kernel: &Kernel<'_>,
        text: &dyn GuestMemory,
        overrides: &Overrides,
    ) -> Result<Option<&'a Alternative>, Refusal> {
        let mut chosen = None;
        for entry in &self.entries {
            let said = overrides.features.iter().find(|(feature, _)| *feature == entry.feature);
            let present = match (said, entry.feature) {
                (Some((_, present)), _) => *present,
                (None, ALWAYS) => true,
                (None, feature) => kernel.has_feature(text, feature)?,
            };
            if present != entry.inverted {
                chosen = Some(*entry);
            }
        }
        Ok(chosen)
    }

    /// What the kernel would put here.
    fn code(
        &self,
        kernel: &Kernel<'_>,
        text: &dyn GuestMemory,
        overrides: &Overrides,
    ) -> Result<Vec<u8>, Refusal> {
        match self.chosen(kernel, text, overrides)? {
            Some(entry) => self.code_of(kernel, text, entry, overrides),
            None => self.original(text),
        }
    }

    /// The code as it was linked.
    pub(crate) fn original(&self, text: &dyn GuestMemory) -> Result<Vec<u8>, Refusal> {
        let longest = self.entries.iter().map(|entry| &entry.original).max_by_key(|code| code.len());
        match longest {
            Some(code) => Ok(code.clone()),
            // Nothing records the original, so the present code counts as it.
            None => read(text, self.at, self.length),
        }
    }

    /// What an entry comes to.
    pub(crate) fn code_of(
        &self,
        kernel: &Kernel<'_>,
        text: &dyn GuestMemory,
        entry: &Alternative,
        overrides: &Overrides,
    ) -> Result<Vec<u8>, Refusal> {
        let mut code = if entry.direct_call {
            direct_call(kernel, text, self.at, entry, overrides)?
        } else {
            let from = kernel.live(entry.replacement_at);
            let moved = rewrite::moved(&entry.replacement, from, self.at);
            moved.ok_or(Refusal::ReplacementUndecodable { bytes: entry.replacement.clone() })?
        };
        code.extend(insn::nops(self.length.saturating_sub(code.len())));
        Ok(code)
    }

    /// The features that its code depends on.
    pub(crate) fn features(&self) -> impl Iterator<Item = u16> {
        self.entries.iter().map(|entry| entry.feature).filter(|feature| *feature != ALWAYS)
    }

    /// The pointer that is called through, if one is.
    pub(crate) fn called_through(&self) -> Option<Gva> {
        let entry = self.entries.iter().find(|entry| entry.direct_call)?;
        rewrite::called_through(&entry.original, self.at)
    }
}

/// `call *pointer` in the original becomes a call of what the pointer points to, or nothing
/// (`alt_replace_call`).
fn direct_call(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    at: Gva,
    entry: &Alternative,
    overrides: &Overrides,
) -> Result<Vec<u8>, Refusal> {
    let undecodable = || Refusal::ReplacementUndecodable { bytes: entry.original.clone() };
    let pointer = rewrite::called_through(&entry.original, at).ok_or_else(undecodable)?;
    let target = match overrides.target(pointer) {
        Some(target) => target,
        None => Gva(read_u64(text, pointer)?),
    };
    if kernel.symbol("nop_func") == Ok(target) {
        return Ok(Vec::new());
    }
    let target = if target == Gva(0) { kernel.symbol("BUG_func")? } else { target };
    Ok(insn::call_rel32(at, target).ok_or(Refusal::OutOfReach { at, to: target })?.to_vec())
}

/// Whether two pieces of code do the same, padding apart.
pub(crate) fn same(a: &[u8], b: &[u8], at: Gva) -> bool {
    a == b || rewrite::without_padding(a, at) == rewrite::without_padding(b, at)
}
