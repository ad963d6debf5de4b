//! The doors of the gate for modules, as the controller knows them: what their `int3`s stand for, which
//! plans do not see and may not change.

use std::collections::BTreeSet;

use patcher::addr::Gva;
use patcher::insn::INT3;
use patcher::insn::push::Push;
use patcher::linux::GuestMemory;
use patcher::plan::refusal::Pointer;
use patcher::site::Site;

use crate::guest::cached_translations::CachedTranslations;

/// Longest `push` of a register, in bytes.
pub(super) const LONGEST: usize = 2;
/// Whose sites the doors are, in refusals.
const OWN_NAME: &str = "where the monitor notices modules";

/// What the controller knows of the gate.
#[derive(Default)]
pub(super) struct Gate {
    /// What the `int3`s stand for, and their first bytes; empty while the gate is open.
    pub(super) doors: Vec<(Push, u8)>,
    /// Modules that have come to the first door and not to the second one yet.
    pub(super) complete: BTreeSet<Gva>,
}

/// Guest memory as it is without the `int3`s of the doors.
pub(super) struct WithoutDoors<'m> {
    pub(super) memory: &'m CachedTranslations<'m>,
    pub(super) gate: &'m Gate,
}

impl GuestMemory for WithoutDoors<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        self.memory.read(at, into)?;
        for (door, byte) in &self.gate.doors {
            let there = door.at.offset_from(at).and_then(|offset| into.get_mut(offset));
            if let Some(now) = there.filter(|now| **now == INT3) {
                *now = *byte;
            }
        }
        Ok(())
    }
}

impl Gate {
    pub(super) fn is_closed(&self) -> bool {
        !self.doors.is_empty()
    }

    /// The doors as sites that no plan may change.
    pub(super) fn sites(&self) -> Vec<(&'static str, Site)> {
        let size = |door: &Push| door.next.offset_from(door.at).unwrap_or(LONGEST);
        let site = |(door, byte): &(Push, u8)| Site {
            pointer: Pointer::new(""),
            at: door.at,
            symbol: String::new(),
            old: vec![*byte; size(door)],
            new: vec![INT3; size(door)],
            old_inside: Vec::new(),
            new_inside: Vec::new(),
            may_fault: false,
        };
        self.doors.iter().map(|door| (OWN_NAME, site(door))).collect()
    }
}
