//! Sessions on plain memory: each step fails in turn, and memory is compared afterwards.

use patcher::addr::Gva;
use patcher::insn::INT3;
use patcher::plan::Strategy;
use patcher::plan::refusal::Pointer;
use patcher::program::compile::{Host, compile};
use patcher::program::session::End;
use patcher::program::step::StepError;
use patcher::program::step::{Program, Step};
use patcher::program::target::{Target, drive};
use patcher::resolve::ResolvedPlan;
use patcher::resolve::expand::Datum;
use patcher::safety::blockers::Patchers;
use patcher::safety::slots::Arena;
use patcher::site::Site;

/// Memory that counts steps and fails the chosen ones.
struct Memory {
    bytes: Vec<u8>,
    steps: Vec<Step>,
    fail_at: Option<usize>,
    fail_undo_at: Option<usize>,
    failed: bool,
    expire_at: Option<usize>,
}

impl Memory {
    fn new(text: &[u8]) -> Self {
        let mut bytes = text.to_vec();
        bytes.resize(ARENA.1 + usize::try_from(ARENA.0.0).expect("small"), 0);
        Self { bytes, steps: Vec::new(), fail_at: None, fail_undo_at: None, failed: false, expire_at: None }
    }

    fn text(&self) -> &[u8] {
        &self.bytes[..OLD.len()]
    }

    fn slice(&mut self, at: Gva, len: usize) -> &mut [u8] {
        let from = usize::try_from(at.0).expect("small");
        &mut self.bytes[from..from + len]
    }
}

impl Target for Memory {
    fn perform(&mut self, step: &Step) -> Result<(), StepError> {
        let index = self.steps.len();
        self.steps.push(step.clone());
        let chosen = if self.failed { self.fail_undo_at } else { self.fail_at };
        let injected = Err(StepError::Host { what: "injected".into() });
        if chosen == Some(index) && !step.is_closing() {
            self.failed = true;
            if let Step::Write { at, bytes } = step {
                // A failed write may be half done.
                let half = bytes.len() / 2;
                self.slice(*at, half).copy_from_slice(&bytes[..half]);
            }
            return injected;
        }
        match step {
            Step::Write { at, bytes } => self.slice(*at, bytes.len()).copy_from_slice(bytes),
            Step::Open { at, byte } => self.slice(*at, 1)[0] = *byte,
            Step::Store { at, old, new } => {
                let found = self.slice(*at, old.len()).to_vec();
                if *found != **old {
                    self.failed = true;
                    return Err(StepError::Mismatch { found });
                }
                self.slice(*at, new.len()).copy_from_slice(new);
            }
            Step::Check { at, bytes } => {
                let found = self.slice(*at, bytes.len()).to_vec();
                if *found != **bytes {
                    self.failed = true;
                    return Err(StepError::Mismatch { found });
                }
            }
            _ => {}
        }
        // A closing step is done, whatever its outcome.
        if chosen == Some(index) { injected } else { Ok(()) }
    }

    fn expired(&self) -> bool {
        self.expire_at.is_some_and(|at| self.steps.len() >= at)
    }
}

/// Three sites, and a word of data behind them.
const OLD: &[u8] = &[0x55, 0x0f, 0x1f, 0x44, 0, 0, 0x90, 0xc3, 0x31, 0xc0, 0, 0, 0, 0, 0, 0];
const NEW: &[u8] = &[0x55, 0xe9, 1, 2, 3, 4, 0x90, 0x90, 0x29, 0xc0, 0, 0, 1, 0, 0, 0];
const WORD: std::ops::Range<usize> = 12..16;

fn plan(strategy: Strategy) -> ResolvedPlan {
    let site = |at: usize, len: usize| Site {
        pointer: Pointer::new(""),
        at: Gva(at as u64),
        symbol: String::new(),
        old: OLD[at..at + len].to_vec(),
        new: NEW[at..at + len].to_vec(),
        old_inside: Vec::new(),
        new_inside: Vec::new(),
        may_fault: false,
    };
    ResolvedPlan {
        name: "test".into(),
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
        sites: vec![site(1, 5), site(7, 1), site(8, 2)],
        data: vec![Datum { at: Gva(WORD.start as u64), old: OLD[WORD].to_vec(), new: NEW[WORD].to_vec() }],
        blockers: vec![(Gva(0), OLD[0])],
        patchers: Patchers { blockers: vec![(Gva(0), OLD[0])], locks: vec![LOCK], busy: false },
        on_guest_write: None,
    }
}

/// Eight bytes that are zero.
const LOCK: Gva = Gva(0x30);

const STRATEGIES: [Strategy; 5] =
    [Strategy::Store, Strategy::Breakpoint, Strategy::Bypass, Strategy::Hold, Strategy::Inspect];
/// Address and size of the arena.
const ARENA: (Gva, usize) = (Gva(0x40), 0x40);

fn compiled(plan: &ResolvedPlan) -> Program {
    compile(plan, Host { stores_are_whole: false }, &mut Arena::new(ARENA.0, ARENA.1)).expect("it fits")
}

#[test]
fn a_program_applies_and_its_reverse_restores() {
    for strategy in STRATEGIES {
        let mut memory = Memory::new(OLD);
        assert_eq!(drive(&compiled(&plan(strategy)), &mut memory), End::Applied);
        assert_eq!(memory.text(), NEW, "{strategy:?}");
        assert_eq!(drive(&compiled(&plan(strategy).reversed()), &mut memory), End::Applied);
        assert_eq!(memory.text(), OLD, "{strategy:?}");
    }
}

#[test]
fn whichever_step_fails_every_byte_is_as_it_was() {
    for strategy in STRATEGIES {
        let program = compiled(&plan(strategy));
        for (fail_at, reversible) in program.steps.iter().enumerate() {
            let mut memory = Memory::new(OLD);
            memory.fail_at = Some(fail_at);
            let end = drive(&program, &mut memory);
            let place = format!("{strategy:?}, step {fail_at}: {}", reversible.step);
            if reversible.step.is_closing() {
                assert_eq!((end, memory.text()), (End::Applied, NEW), "{place}");
            } else {
                assert!(matches!(end, End::RolledBack { .. }), "{place}: {end:?}");
                assert_eq!(memory.text(), OLD, "{place}");
            }
        }
    }
}

fn last_write(program: &Program) -> usize {
    let writes = |step: &Step| matches!(step, Step::Write { .. } | Step::Store { .. });
    program.steps.iter().rposition(|reversible| writes(&reversible.step)).expect("a write")
}

#[test]
fn if_undoing_fails_too_the_guest_is_left_held() {
    for strategy in STRATEGIES {
        let program = compiled(&plan(strategy));
        let fail_at = last_write(&program);
        let mut whole = Memory::new(OLD);
        whole.fail_at = Some(fail_at);
        drive(&program, &mut whole);
        for (fail_undo_at, step) in whole.steps.iter().enumerate().skip(fail_at + 1) {
            if step.is_closing() {
                continue;
            }
            let mut memory = Memory::new(OLD);
            (memory.fail_at, memory.fail_undo_at) = (Some(fail_at), Some(fail_undo_at));
            let end = drive(&program, &mut memory);
            assert!(matches!(end, End::Held { .. }), "{strategy:?} {fail_undo_at} {end:?}");
            assert_eq!(memory.steps.last(), Some(&Step::Hold));
        }
    }
}

#[test]
fn foreign_bytes_are_never_overwritten() {
    for strategy in STRATEGIES {
        for at in [1, 5, 7, 9, 12] {
            let mut foreign = OLD.to_vec();
            foreign[at] ^= 0xff;
            let mut memory = Memory::new(&foreign);
            let end = drive(&compiled(&plan(strategy)), &mut memory);
            assert!(matches!(end, End::RolledBack { .. }), "{strategy:?} {at} {end:?}");
            assert_eq!(memory.text(), foreign);
        }
    }
}

#[test]
fn a_deadline_rolls_back_wherever_it_strikes() {
    for strategy in STRATEGIES {
        let program = compiled(&plan(strategy));
        for expire_at in 0..=last_write(&program) {
            let mut memory = Memory::new(OLD);
            memory.expire_at = Some(expire_at);
            let end = drive(&program, &mut memory);
            let End::RolledBack { failure } = end else { panic!("{end:?}") };
            assert_eq!(failure.error, StepError::Deadline);
            assert_eq!(memory.text(), OLD, "{strategy:?} {expire_at}");
        }
    }
}

#[test]
fn breakpoint_needs_four_fences_whatever_the_number_of_sites() {
    let program = compiled(&plan(Strategy::Breakpoint));
    assert_eq!(program.fences(), 4);
    // Between two writes to the same byte there is always a fence, and a tail is only
    // written while its head is int3.
    let mut memory = Memory::new(OLD);
    for reversible in &program.steps {
        if let Step::Write { at, bytes } = &reversible.step
            && bytes.len() > 1
        {
            let head = memory.slice(Gva(at.0 - 1), 1)[0];
            assert_eq!(head, INT3);
        }
        memory.perform(&reversible.step).expect("performed");
    }
}

#[test]
fn a_single_byte_site_needs_no_fence_for_a_tail() {
    let mut one = plan(Strategy::Breakpoint);
    one.sites.remove(2);
    one.sites.remove(0);
    assert_eq!(compiled(&one).fences(), 3);
}
