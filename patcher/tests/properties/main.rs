//! Properties of plans, resolving, relocation and sessions, on random input. Cases that once
//! failed are kept in `proptest-regressions` and tried first.

mod checks;

use patcher::addr::Gva;
use patcher::arena::Arena;
use patcher::compile::{Host, compile};
use patcher::plan::Strategy;
use patcher::program::Step;
use patcher::refusal::Pointer;
use patcher::resolve::{ResolvedPlan, Site};
use patcher::session::{End, Session};
use patcher::target::StepError;
use proptest::prelude::*;
use proptest::strategy::Strategy as Generator;

fn strategy() -> impl Generator<Value = Strategy> {
    prop::sample::select(vec![
        Strategy::Auto,
        Strategy::Store,
        Strategy::Breakpoint,
        Strategy::Bypass,
        Strategy::Hold,
        Strategy::Inspect,
    ])
}

/// JSON that is nearly a plan: one with something put in or taken out.
fn nearly_a_plan() -> impl Generator<Value = Vec<u8>> {
    const PLAN: &str = r#"{"version":1,"name":"a","kernel":{"release":"6.1"},"deadline_ms":5,"strategy":"hold",
        "atomic":true,"quiesced":{"preemptible":true,"outside":["f"]},"over":["b"],
        "patches":[{"redirect":"f","to":"g"},{"at":"f+0x14","expect":"0f1f","replace":"90"}]}"#;
    (0..PLAN.len(), 0..12_usize, prop::collection::vec(any::<u8>(), 0..12)).prop_map(|(at, removed, put)| {
        let mut json = PLAN.as_bytes().to_vec();
        let end = (at + removed).min(json.len());
        json.splice(at..end, put);
        json
    })
}

/// Sites that do not touch, in text of 64 bytes, and what their code becomes.
fn sites() -> impl Generator<Value = Vec<(usize, Vec<u8>, Vec<u8>)>> {
    let site = (0..3_usize, 1..8_usize).prop_flat_map(|(gap, length)| {
        let bytes = || prop::collection::vec(any::<u8>(), length);
        (Just(gap), bytes(), bytes())
    });
    prop::collection::vec(site, 1..6)
}

const ARENA: usize = 64;

fn plan(strategy: Strategy, sites: &[(usize, Vec<u8>, Vec<u8>)]) -> (ResolvedPlan, Vec<u8>) {
    let mut memory = vec![0x90; ARENA + 128];
    let mut at = 0;
    let mut resolved = Vec::new();
    for (gap, old, new) in sites {
        at += gap;
        memory[at..at + old.len()].copy_from_slice(old);
        resolved.push(Site {
            pointer: Pointer::new(""),
            at: Gva(at as u64),
            symbol: String::new(),
            old: old.clone(),
            new: new.clone(),
            old_inside: Vec::new(),
            new_inside: Vec::new(),
            may_fault: false,
        });
        at += old.len();
    }
    let plan = ResolvedPlan {
        name: "x".into(),
        strategy,
        atomic: false,
        deadline_ms: 1,
        preemptible: false,
        unlocked: false,
        outside: Vec::new(),
        sites: resolved,
        data: Vec::new(),
        doors: Vec::new(),
    };
    (plan, memory)
}

/// Does a step on plain memory; `part` of a write that fails is done.
fn perform(memory: &mut [u8], step: &Step, part: Option<usize>) -> Result<(), StepError> {
    let range = |at: Gva, length: usize| {
        let from = usize::try_from(at.0).expect("small");
        from..from + length
    };
    match step {
        Step::Write { at, bytes } => {
            let done = part.map_or(bytes.len(), |part| part % (bytes.len() + 1));
            memory[range(*at, done)].copy_from_slice(&bytes[..done]);
        }
        Step::Check { at, bytes } | Step::Store { at, old: bytes, .. } => {
            let found = memory[range(*at, bytes.len())].to_vec();
            if found != *bytes {
                return Err(StepError::Mismatch { found });
            }
            if let (Step::Store { at, new, .. }, None) = (step, part) {
                memory[range(*at, new.len())].copy_from_slice(new);
            }
        }
        _ => {}
    }
    part.map_or(Ok(()), |_| Err(StepError::Deadline))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn plans_are_read_or_refused(json in prop_oneof![nearly_a_plan(), prop::collection::vec(any::<u8>(), 0..200)]) {
        checks::plan(&json);
    }

    #[test]
    fn accepted_sites_are_whole_instructions(
        text in prop::collection::vec(any::<u8>(), 16..64),
        offset in 0..32_usize,
        length in 1..9_usize,
        replace in prop::collection::vec(any::<u8>(), 1..9),
    ) {
        checks::resolve_in(&text, offset, length, &replace);
    }

    #[test]
    fn relocated_instructions_are_the_same(
        code in prop::collection::vec(any::<u8>(), 15),
        from in 0..0x4000_0000_u64,
        to in 0..0x4000_0000_u64,
    ) {
        const KERNEL: u64 = 0xffff_ffff_8000_0000;
        checks::relocation(&code, Gva(KERNEL + from), Gva(KERNEL + to));
    }

    /// Whatever fails and however far it got: all new, all old, or held.
    #[test]
    fn sessions_end_all_old_all_new_or_held(
        strategy in strategy(),
        sites in sites(),
        outcomes in prop::collection::vec(prop::option::weighted(0.1, any::<usize>()), 0..80),
    ) {
        let (plan, before) = plan(strategy, &sites);
        let mut arena = Arena::new(Gva(ARENA as u64), 128);
        let Ok(program) = compile(&plan, Host { stores_are_whole: false }, &mut arena) else { return Ok(()) };
        let (mut memory, mut session) = (before.clone(), Session::new(&program));
        let (mut outcomes, mut steps) = (outcomes.into_iter(), Vec::new());
        let end = loop {
            match session.next() {
                Err(end) => break end.clone(),
                Ok(step) => {
                    let step = step.clone();
                    let part = outcomes.next().flatten().filter(|_| !step.is_closing());
                    let result = perform(&mut memory, &step, part);
                    steps.push(step);
                    session.outcome(result);
                }
            }
        };
        let text = &memory[..ARENA];
        let mut after = before.clone();
        for site in &plan.sites {
            let from = usize::try_from(site.at.0).expect("small");
            after[from..from + site.new.len()].copy_from_slice(&site.new);
        }
        match end {
            End::Applied => prop_assert_eq!(text, &after[..ARENA]),
            End::RolledBack { .. } => prop_assert_eq!(text, &before[..ARENA]),
            End::Held { .. } => prop_assert_eq!(steps.last(), Some(&Step::Hold)),
        }
        if !matches!(end, End::Held { .. }) {
            let last = |wanted: &Step| steps.iter().rposition(|step| step == wanted);
            let stopped = steps.iter().rposition(|step| matches!(step, Step::Hold | Step::Inspect(_)));
            prop_assert!(stopped <= last(&Step::Release), "left held");
            let published = steps.iter().rposition(|step| matches!(step, Step::Publish(_)));
            prop_assert!(published <= last(&Step::Withdraw) && published <= last(&Step::Disarm), "left trapped");
        }
    }
}
