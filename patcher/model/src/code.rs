//! The instructions that a vCPU may legally execute.

use std::fmt;

use patcher::addr::Gva;
use patcher::insn;
use patcher::program::step::Program;
use patcher::safety::interior;

/// Which code an instruction belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Version {
    /// A site's old code.
    Old,
    /// A site's new code.
    New,
    /// The copy of a site's old instruction in an arena slot.
    Slot,
    /// Code that the program does not change.
    Unchanged,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Old => "old",
            Self::New => "new",
            Self::Slot => "slot's",
            Self::Unchanged => "unchanged",
        })
    }
}

/// An instruction that is legal at some address.
#[derive(Debug, Clone)]
pub(crate) struct LegalInsn {
    pub(crate) version: Version,
    pub(crate) code: Vec<u8>,
    /// The next instruction of the same site, if there is one.
    pub(crate) next: Option<Gva>,
}

/// The instructions that are legal at `rip`.
pub(crate) fn legal_at(program: &Program, rip: Gva) -> Vec<LegalInsn> {
    let mut legal = Vec::new();
    for site in &program.sites {
        for (version, code) in [(Version::Old, &site.old), (Version::New, &site.new)] {
            let starts = [vec![site.at], interior::boundaries(code, site.at)].concat();
            for insn in insn::decode(code, site.at).filter(|insn| insn.at == rip && starts.contains(&rip)) {
                let offset = rip.offset_from(site.at).unwrap_or(0);
                let next = rip.plus(insn.len).filter(|next| !insn.ends && starts.contains(next));
                legal.push(LegalInsn { version, code: code[offset..offset + insn.len].to_vec(), next });
            }
        }
    }
    if let Some(slot) = program.copies.iter().find(|slot| slot.at == rip) {
        legal.push(LegalInsn { version: Version::Slot, code: slot.code.clone(), next: None });
    }
    if let Some((_, byte)) = program.blockers.iter().find(|(at, _)| *at == rip) {
        legal.push(LegalInsn { version: Version::Unchanged, code: vec![*byte], next: None });
    }
    legal
}
