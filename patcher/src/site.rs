//! Sites: ranges of the kernel's text, with the bytes before and after.

use serde::Serialize;

use crate::addr::Gva;
use crate::insn;
use crate::plan::refusal::{Pointer, Refusal, Refused};

/// A range of text to change. `old` and `new` have the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// The patch of the plan that it belongs to.
    pub pointer: Pointer,
    /// Its first byte.
    pub at: Gva,
    /// The same address as `function+0xoffset`.
    pub symbol: String,
    /// What is there now.
    pub old: Vec<u8>,
    /// What will be there.
    pub new: Vec<u8>,
    /// Reachable instruction boundaries inside the old code.
    pub old_inside: Vec<Gva>,
    /// Reachable instruction boundaries inside the new code.
    pub new_inside: Vec<Gva>,
    /// Whether the instruction at `at` is in the kernel's exception table.
    pub may_fault: bool,
}

impl Site {
    /// The site with old and new exchanged.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            old: self.new.clone(),
            new: self.old.clone(),
            old_inside: self.new_inside.clone(),
            new_inside: self.old_inside.clone(),
            ..self.clone()
        }
    }

    /// Whether one atomic store can change it: it lies within eight aligned bytes and is one
    /// instruction before and after.
    #[must_use]
    pub fn is_one_store(&self) -> bool {
        let word = |at: Gva| at.0 / 8;
        word(self.at) == word(Gva(self.end().0 - 1))
            && self.old_inside.is_empty()
            && self.new_inside.is_empty()
    }

    /// The first byte behind it.
    #[must_use]
    pub fn end(&self) -> Gva {
        Gva(self.at.0.saturating_add(self.old.len() as u64))
    }

    /// Whether the sites share a byte.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.at < other.end() && other.at < self.end()
    }
}

impl Serialize for Site {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut fields = serializer.serialize_struct("Site", 6)?;
        fields.serialize_field("at", &self.at)?;
        fields.serialize_field("symbol", &self.symbol)?;
        fields.serialize_field("old", &insn::hex(&self.old))?;
        fields.serialize_field("new", &insn::hex(&self.new))?;
        fields.serialize_field("old_code", &insn::disassemble(&self.old, self.at))?;
        fields.serialize_field("new_code", &insn::disassemble(&self.new, self.at))?;
        fields.end()
    }
}

/// Refuses sites that share a byte with another site, of this plan or of an applied patch. A site may
/// lie inside a site of a patch that `over` names.
pub(crate) fn overlaps<'t>(
    over: &[String],
    sites: &'t [Site],
    taken: &[(&'t str, &'t Site)],
) -> Vec<Refused> {
    let mut by_address: Vec<(&str, &Site)> =
        sites.iter().map(|site| (OWN, site)).chain(taken.iter().copied()).collect();
    by_address.sort_by_key(|(_, site)| site.at);
    let longest = by_address.iter().map(|(_, site)| site.old.len() as u64).max().unwrap_or(0);
    let may_lie = |site: &Site, whose: &str, other: &Site| {
        over.iter().any(|name| name == whose) && other.at <= site.at && site.end() <= other.end()
    };
    let mut refused = Vec::new();
    for site in sites {
        let from = by_address.partition_point(|(_, other)| other.at.0.saturating_add(longest) <= site.at.0);
        let near = by_address[from..].iter().take_while(|(_, other)| other.at < site.end());
        // Of two sites of this plan, the later one is refused.
        let earlier = |other: &Site| (other.at, &other.pointer) < (site.at, &site.pointer);
        let clash = near.copied().find(|(whose, other)| {
            let counts = if *whose == OWN { earlier(other) } else { !may_lie(site, whose, other) };
            !std::ptr::eq(*other, site) && counts && site.overlaps(other)
        });
        if let Some((whose, other)) = clash {
            let refusal = Refusal::OverlappingSites { at: site.at, other: other.at, whose: whose.to_owned() };
            refused.push(refusal.at(site.pointer.clone()));
        }
    }
    refused
}

/// The name of the plan being resolved in a refusal.
pub(crate) const OWN: &str = "this plan";
