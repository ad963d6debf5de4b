//! The guard with real mappings: what the state says is what `/proc/self/maps` says.

use std::sync::Arc;

use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::plan::write_policy::Policy;

use crate::guest::events::Kind;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::memory::paging::Piece;
use crate::memory::{GuestRam, PAGE};
use crate::text_guard::guard::Guard;
use crate::text_guard::guest_write::{Attempt, Lift, Write};
use crate::text_guard::pages::Reasons;
use crate::text_guard::watch_list::GuestWrites;
use crate::text_guard::watched::Watched;

const PAGES: u64 = 32;

fn guard() -> Guard {
    Guard::new(Arc::new(GuestRam::new(PAGES * PAGE).expect("RAM")), Arc::default())
}

/// A site of five bytes, whose page is guarded.
fn site(patch: &str, at: u64) -> Watched {
    Watched {
        patch: patch.into(),
        at: Gva(0),
        policy: Policy::Yield,
        pieces: vec![(Gpa(at), 5)],
        is_guarded: true,
    }
}

fn attempt(guard: &Guard, pieces: &[Piece], bytes: &[u8]) -> Attempt {
    let registers = VcpuRegisters::default();
    let write = Write { vcpu: VcpuId(0), registers: &registers, at: Some(Gva(0)), pieces, bytes };
    guard.attempt(&write).expect("RAM")
}

const DONE: Attempt = Attempt::Done { notify: false };

fn holds(guard: &Guard, at: u64, bytes: &[u8]) -> bool {
    let mut found = vec![0; bytes.len()];
    guard.ram.read(Gpa(at), &mut found).expect("RAM");
    found == bytes
}

#[test]
fn a_write_to_a_guarded_page_is_done_or_left_to_the_vcpu() {
    let guard = guard();
    let at = (Gpa(PAGE), 1);
    assert_eq!(attempt(&guard, &[at], &[7]), Attempt::NotGuarded);
    assert!(holds(&guard, PAGE, &[0]));
    guard.guard_text(&(Gpa(PAGE)..Gpa(3 * PAGE))).expect("guarded");
    assert_eq!(attempt(&guard, &[at], &[7]), DONE);
    assert!(holds(&guard, PAGE, &[7]));
    // One of its pages is enough.
    assert_eq!(attempt(&guard, &[(Gpa(3 * PAGE - 1), 1), (Gpa(4 * PAGE), 2)], &[1, 2, 3]), DONE);
    assert!(holds(&guard, 3 * PAGE - 1, &[1]) && holds(&guard, 4 * PAGE, &[2, 3]));
    assert_eq!((guard.guarded_pages(), guard.stopped_writes()), (2, 2));
    assert!(guard.events().since(0).iter().all(|event| event.kind == Kind::UnexpectedWrite));
}

#[test]
fn a_write_to_what_a_program_changes_waits_for_its_end() {
    let guard = guard();
    for held in [false, true] {
        guard.guard_text(&(Gpa(0)..Gpa(PAGE))).expect("guarded");
        let scope = guard.begin(vec![(Gpa(100), 5), (Gpa(2 * PAGE), 5)], held).expect("guarded");
        assert_eq!(attempt(&guard, &[(Gpa(104), 1)], &[7]), Attempt::InFlight);
        assert_eq!(attempt(&guard, &[(Gpa(98), 4)], &[7; 4]), Attempt::InFlight);
        assert_eq!(attempt(&guard, &[(Gpa(105), 1)], &[7]), DONE, "beside it");
        let elsewhere = attempt(&guard, &[(Gpa(2 * PAGE + 1), 1)], &[7]);
        assert_eq!(elsewhere, if held { Attempt::NotGuarded } else { Attempt::InFlight });
        assert!(holds(&guard, 98, &[0; 6]));
        std::thread::scope(|threads| {
            let waiter = threads.spawn(|| guard.wait_for_program());
            while !guard.has_waiting_vcpu() {
                std::thread::yield_now();
            }
            drop(scope);
            waiter.join().expect("it ended");
        });
        assert!(!guard.has_waiting_vcpu());
        assert_eq!(attempt(&guard, &[(Gpa(104), 1)], &[0]), DONE);
        assert_eq!(attempt(&guard, &[(Gpa(2 * PAGE), 1)], &[7]), Attempt::NotGuarded);
    }
}

#[test]
fn what_lies_between_a_programs_pages_stays_writable_and_what_was_guarded_stays_so() {
    let guard = guard();
    guard.guard_text(&(Gpa(8 * PAGE)..Gpa(10 * PAGE))).expect("guarded");
    let is_guarded = |page: u64| guard.lock().state.pages.reasons(page * PAGE).intersects(Reasons::GUARDED);
    let far: Vec<Piece> = (0..6).map(|i| (Gpa(4 * i * PAGE + 9), 1)).collect();
    let scope = guard.begin(far, false).expect("guarded");
    let guarded: Vec<u64> = (0..PAGES).filter(|page| is_guarded(*page)).collect();
    assert_eq!(guarded, [0, 4, 8, 9, 12, 16, 20]);
    assert!(may_write(&guard, 5));
    drop(scope);
    let left: Vec<u64> = (0..PAGES).filter(|page| is_guarded(*page)).collect();
    assert_eq!(left, [8, 9]);
    let scope = guard.begin(vec![(Gpa(0), 1), (Gpa(4 * PAGE), 1)], false).expect("guarded");
    assert!(is_guarded(0) && is_guarded(4) && !is_guarded(1));
    drop(scope);
    assert!(guard.begin(vec![(Gpa(0), 1), (Gpa(2 * PAGES * PAGE), 1)], false).is_err());
    assert!(!is_guarded(0), "nothing stays of what failed");
}

#[test]
fn the_first_write_since_the_last_look_notifies() {
    let guard = guard();
    guard.guard_text(&(Gpa(0)..Gpa(PAGE))).expect("guarded");
    guard.lock().watch(site("p", 100)).expect("guarded");
    let notifies = |at: u64| match attempt(&guard, &[(Gpa(at), 1)], &[7]) {
        Attempt::Done { notify } => notify,
        other => panic!("{other:?}"),
    };
    assert_eq!(guard.take_guest_writes(), GuestWrites::default());
    for _ in 0..2 {
        assert_eq!([notifies(50), notifies(104), notifies(50)], [true, false, false]);
        assert_eq!(guard.take_guest_writes(), GuestWrites { near_site: true, patches: vec!["p".into()] });
    }
    assert_eq!([notifies(104), notifies(104)], [true, false]);
}

#[test]
fn text_is_protected_ahead_until_the_guest_writes_to_it() {
    let guard = guard();
    assert!(!guard.is_text_known());
    guard.set_text(&(Gpa(4 * PAGE)..Gpa(20 * PAGE)));
    let protected = || (0..PAGES).filter(|page| !may_write(&guard, *page)).collect::<Vec<_>>();
    assert!(guard.is_text_known() && protected().is_empty());
    guard.preprotect_text().expect("protected");
    assert_eq!((protected(), guard.preprotected_pages(), guard.guarded_pages()), ((4..20).collect(), 16, 0));
    // Other memory does not matter.
    assert_eq!(attempt(&guard, &[(Gpa(20 * PAGE), 1)], &[7]), Attempt::NotGuarded);
    assert_eq!(guard.preprotected_pages(), 16);
    // A program finds it as it wants it, and leaves it so.
    let scope = guard.begin(vec![(Gpa(5 * PAGE), 1), (Gpa(25 * PAGE), 1)], false).expect("guarded");
    assert_eq!(attempt(&guard, &[(Gpa(5 * PAGE), 1)], &[7]), Attempt::InFlight);
    assert_eq!(attempt(&guard, &[(Gpa(5 * PAGE + 1), 1)], &[7]), DONE);
    assert!(protected().contains(&25));
    drop(scope);
    assert_eq!(protected(), (4..20).collect::<Vec<_>>());
    // The guest's first write opens it; that is its own business, and told to nobody.
    let told = guard.events().since(0).len();
    assert_eq!(attempt(&guard, &[(Gpa(6 * PAGE), 1)], &[7]), Attempt::NotGuarded);
    assert_eq!((protected().len(), guard.preprotected_pages(), guard.stopped_writes()), (0, 0, 1));
    assert_eq!(guard.events().since(0).len(), told);
    // It must rest before it is protected again, unless a program comes.
    guard.preprotect_text().expect("nothing to do");
    assert!(protected().is_empty());
    drop(guard.begin(vec![(Gpa(5 * PAGE), 1)], false).expect("guarded"));
    assert_eq!(protected(), (4..20).collect::<Vec<_>>());
    // The guest writes while a program goes on: all but the program's own page is open.
    let scope = guard.begin(vec![(Gpa(5 * PAGE), 1)], false).expect("guarded");
    assert_eq!(attempt(&guard, &[(Gpa(6 * PAGE), 1)], &[7]), Attempt::NotGuarded);
    assert_eq!(protected(), [5]);
    drop(scope);
    assert!(protected().is_empty());
}

/// Whether mapping A of a page is writable, as the system has it.
fn may_write(guard: &Guard, page: u64) -> bool {
    let at = guard.ram.slots()[0].host + page * PAGE;
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let hex = |number: &str| u64::from_str_radix(number, 16).expect("a number");
    let found = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        (hex(start)..hex(end)).contains(&at).then(|| rest.as_bytes()[1] == b'w')
    });
    found.expect("it is mapped")
}

/// Everything that changes protection, in any order: what the guest can't write to is what
/// the guard knows to be protected, and no page stays so for nothing.
#[test]
fn what_is_protected_is_known_to_be() {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    for round in 0..20 {
        let guard = guard();
        if round % 3 == 0 {
            guard.guard_text(&(Gpa(5 * PAGE)..Gpa(9 * PAGE))).expect("guarded");
        }
        let mut watched: Vec<String> = Vec::new();
        let mut scope = None;
        for step in 0..60 {
            let page = below(PAGES);
            let action = below(9);
            match action {
                0 if !guard.is_text_known() => guard.set_text(&(Gpa(3 * PAGE)..Gpa(17 * PAGE))),
                1 => guard.preprotect_text().expect("protected"),
                3 if scope.is_none() => {
                    let pieces = (0..1 + below(6)).map(|_| (Gpa(below(PAGES) * PAGE), 1)).collect();
                    scope = Some(guard.begin(pieces, below(4) == 0).expect("guarded"));
                }
                4 => scope = None,
                5 => {
                    let site = site(&step.to_string(), page * PAGE);
                    guard.lock().watch(site).expect("guarded");
                    watched.push(step.to_string());
                }
                6 => {
                    let Some(patch) = watched.pop() else { continue };
                    guard.forget(&patch);
                }
                7 => {
                    let lift = guard.lift(VcpuId(0), &VcpuRegisters::default(), Gpa(page * PAGE));
                    assert!(lift == Lift::InFlight || may_write(&guard, page), "round {round}, step {step}");
                }
                _ => {
                    let attempt = attempt(&guard, &[(Gpa(page * PAGE), 1)], &[7]);
                    let may = may_write(&guard, page);
                    assert_eq!(attempt == Attempt::NotGuarded, may, "round {round}, step {step}");
                }
            }
            for page in 0..PAGES {
                let known = !guard.lock().state.pages.reasons(page * PAGE).is_empty();
                assert_eq!(
                    known,
                    !may_write(&guard, page),
                    "round {round}, step {step}: {action} page {page}"
                );
            }
        }
    }
}

#[test]
fn a_page_that_is_given_up_is_guarded_no_more() {
    let guard = guard();
    guard.guard_text(&(Gpa(0)..Gpa(2 * PAGE))).expect("guarded");
    let lift = || guard.lift(VcpuId(1), &VcpuRegisters::default(), Gpa(PAGE + 5));
    let scope = guard.begin(vec![(Gpa(PAGE), 1)], false).expect("guarded");
    assert_eq!(lift(), Lift::InFlight);
    drop(scope);
    assert_eq!((lift(), lift()), (Lift::Lifted, Lift::NotGuarded));
    assert_eq!(attempt(&guard, &[(Gpa(PAGE), 1)], &[7]), Attempt::NotGuarded);
    assert_eq!(attempt(&guard, &[(Gpa(0), 1)], &[7]), DONE);
    assert_eq!(guard.guarded_pages(), 1);
    assert_eq!(guard.events().since(0)[0].kind, Kind::Unguarded);
}

#[test]
fn all_pages_but_the_gates_are_given_up_where_nothing_tells_which() {
    let guard = guard();
    guard.set_text(&(Gpa(4 * PAGE)..Gpa(6 * PAGE)));
    guard.preprotect_text().expect("protected");
    guard.close_init_gate(Gpa(20 * PAGE)).expect("closed");
    guard.lock().watch(Watched { policy: Policy::Deny, ..site("p", 100) }).expect("guarded");
    let give_up = || guard.give_up_all(VcpuId(1), &VcpuRegisters::default());
    let scope = guard.begin(vec![(Gpa(8 * PAGE), 1)], false).expect("guarded");
    assert_eq!(give_up(), Lift::InFlight);
    drop(scope);
    assert!(guard.is_protected(Gpa(100)) && guard.is_protected(Gpa(4 * PAGE)));
    assert_eq!(give_up(), Lift::Lifted);
    let protected: Vec<u64> = (0..PAGES).filter(|page| !may_write(&guard, *page)).collect();
    assert_eq!(protected, [20]);
    let told = guard.events().since(0);
    assert_eq!((told[0].kind, told[0].patch.as_deref()), (Kind::Unguarded, Some("p")));
    assert_eq!(guard.take_guest_writes().patches, vec!["p".into()], "it is compared with what is there");
    assert_eq!(give_up(), Lift::NotGuarded);
    guard.preprotect_text().expect("it has not rested");
    assert!(may_write(&guard, 4));
}

#[test]
fn a_patch_whose_page_was_given_up_does_not_keep_it_guarded_for_others() {
    let guard = guard();
    guard.lock().watch(site("a", 100)).expect("guarded");
    assert_eq!(guard.lift(VcpuId(0), &VcpuRegisters::default(), Gpa(0)), Lift::Lifted);
    guard.lock().watch(site("b", 200)).expect("guarded");
    guard.forget("a");
    assert_eq!((guard.guarded_pages(), may_write(&guard, 0)), (1, false), "`b` is still there");
    guard.lock().watch(site("a", 100)).expect("guarded");
    assert_eq!(guard.lift(VcpuId(0), &VcpuRegisters::default(), Gpa(0)), Lift::Lifted);
    guard.lock().watch(site("c", 300)).expect("guarded");
    guard.forget("c");
    assert_eq!((guard.guarded_pages(), may_write(&guard, 0)), (0, true), "`a` and `b` were given up");
}
