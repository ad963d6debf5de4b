//! Small scenarios: a few sites, and the programs that change them.

use model::scenario::{GuestActivity, Scenario};
use patcher::addr::Gva;
use patcher::plan::Strategy;
use patcher::plan::refusal::Pointer;
use patcher::program::compile::{Host, compile};
use patcher::program::step::Program;
use patcher::resolve::ResolvedPlan;
use patcher::safety::blockers::Patchers;
use patcher::safety::interior::boundaries;
use patcher::safety::slots::Arena;
use patcher::site::Site;

/// Where the text begins; the sites lie in its first sixteen bytes.
pub(crate) const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
const ARENA: Gva = Gva(0xffff_ffff_8200_0000);
const ARENA_SIZE: usize = 32;

/// A site at an offset into the text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    pub(crate) offset: usize,
    pub(crate) old: &'static [u8],
    pub(crate) new: &'static [u8],
}

/// `nopl 0(rax,rax)` becomes a jump, as a static key does, within one aligned word.
pub(crate) const KEY: Change =
    Change { offset: 1, old: &[0x0f, 0x1f, 0x44, 0, 0], new: &[0xe9, 0x11, 0x22, 0, 0] };
/// `xor eax, eax` becomes `mov eax, ecx`: the monitor can emulate neither.
pub(crate) const ZERO: Change = Change { offset: 8, old: &[0x31, 0xc0], new: &[0x89, 0xc8] };
/// `clc` becomes `stc`: one byte.
pub(crate) const FLAG: Change = Change { offset: 11, old: &[0xf8], new: &[0xf9] };
/// A call changes its target, across two aligned words.
pub(crate) const CALL: Change = Change { offset: 5, old: &[0xe8, 1, 0, 0, 0], new: &[0xe8, 2, 0, 3, 0] };
/// Three instructions become one.
pub(crate) const SEVERAL: Change =
    Change { offset: 8, old: &[0x31, 0xc0, 0xff, 0xc0, 0x90], new: &[0xb8, 1, 0, 0, 0] };

pub(crate) fn reversed(change: Change) -> Change {
    Change { old: change.new, new: change.old, ..change }
}

pub(crate) fn plan(strategy: Strategy, changes: &[Change]) -> ResolvedPlan {
    let site = |change: &Change| {
        let at = Gva(TEXT.0 + change.offset as u64);
        Site {
            pointer: Pointer::new(""),
            at,
            symbol: String::new(),
            old: change.old.to_vec(),
            new: change.new.to_vec(),
            old_inside: boundaries(change.old, at),
            new_inside: boundaries(change.new, at),
            may_fault: false,
        }
    };
    ResolvedPlan {
        name: "model".into(),
        strategy,
        atomic: false,
        deadline_ms: 1,
        preemptible: false,
        unlocked: false,
        outside: Vec::new(),
        tasks_outside: Vec::new(),
        old: Vec::new(),
        new: Vec::new(),
        brings: Vec::new(),
        counts: Vec::new(),
        left: None,
        sites: changes.iter().map(site).collect(),
        data: Vec::new(),
        blockers: Vec::new(),
        patchers: Patchers::default(),
        on_guest_write: None,
    }
}

pub(crate) fn program(strategy: Strategy, changes: &[Change]) -> Program {
    compiled(&plan(strategy, changes))
}

fn compiled(plan: &ResolvedPlan) -> Program {
    let host = Host { stores_are_whole: true };
    compile(plan, host, &mut Arena::new(ARENA, ARENA_SIZE)).expect("it fits")
}

/// Where the blocker goes: an instruction of one byte that the program does not change.
const BLOCKER: (Gva, u8) = (Gva(TEXT.0 + 14), 0x90);

/// A program by inspection, with a blocker.
pub(crate) fn with_blocker(changes: &[Change]) -> Program {
    compiled(&ResolvedPlan { blockers: vec![BLOCKER], unlocked: true, ..plan(Strategy::Inspect, changes) })
}

/// The word of the guest's lock.
pub(crate) const LOCK: Gva = Gva(0xffff_ffff_8300_0000);

/// A program in a guest that patches itself.
pub(crate) fn self_patching(strategy: Strategy, changes: &[Change]) -> Program {
    let patchers = Patchers { blockers: vec![BLOCKER], locks: vec![LOCK], busy: false };
    compiled(&ResolvedPlan { patchers, ..plan(strategy, changes) })
}

/// The same, when the guest's patching kept an earlier attempt out.
pub(crate) fn among_busy_patchers(strategy: Strategy, changes: &[Change]) -> Program {
    let patchers = Patchers { blockers: vec![BLOCKER], locks: vec![LOCK], busy: true };
    compiled(&ResolvedPlan { patchers, ..plan(strategy, changes) })
}

/// Makes the guest patch itself.
pub(crate) fn patches_itself(scenario: &mut Scenario<'_>) {
    scenario.guest = GuestActivity::PatchesText { lock: LOCK, blocker: BLOCKER.0 };
}

/// A program in a memory that holds the old bytes of its sites.
pub(crate) fn scenario(program: &Program) -> Scenario<'_> {
    let mut text = vec![0x90; 16];
    for site in &program.sites {
        let from = site.at.offset_from(TEXT).expect("in the text");
        text[from..from + site.old.len()].copy_from_slice(&site.old);
    }
    let mut memory = vec![(TEXT, text)];
    if !program.copies.is_empty() {
        memory.push((ARENA, vec![0; ARENA_SIZE]));
    }
    if !program.locks.is_empty() {
        memory.push((LOCK, vec![0; 8]));
    }
    Scenario::new(program, memory)
}
