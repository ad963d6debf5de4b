//! Properties of plans, resolving, relocation and sessions, on random input. Cases that failed are
//! kept in `proptest-regressions` and run first.

mod capabilities;
mod checks;
mod cut;
mod files;
mod hostile;
mod miniature;
mod names;
mod objects;
mod occupants;
mod plan_names;
mod replacements;
mod sites;
mod sources;
mod task_lists;

use patcher::addr::Gva;
use patcher::image::{KernelImage, unpack};
use patcher::linux::Kernel;
use patcher::linux::module_list::read_modules;
use patcher::plan::Strategy;
use patcher::plan::refusal::Pointer;
use patcher::program::compile::{Host, compile};
use patcher::program::session::{End, Session};
use patcher::program::step::Step;
use patcher::program::step::StepError;
use patcher::resolve::ResolvedPlan;
use patcher::safety::blockers::Patchers;
use patcher::safety::slots::Arena;
use patcher::site::Site;
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

/// A plan in JSON with bytes inserted or removed.
fn nearly_a_plan() -> impl Generator<Value = Vec<u8>> {
    const PLAN: &str = r#"{"version":1,"name":"a","kernel":{"release":"6.1","build_id":"01fe"},"deadline_ms":5,"strategy":"hold",
        "atomic":true,"quiesced":{"preemptible":true,"outside":["f"]},"over":["b"],
        "patches":[{"redirect":"f","to":"g"},{"at":"f+0x14","expect":"0f1f","replace":"90"}]}"#;
    (0..PLAN.len(), 0..12_usize, prop::collection::vec(any::<u8>(), 0..12)).prop_map(|(at, removed, put)| {
        let mut json = PLAN.as_bytes().to_vec();
        let end = (at + removed).min(json.len());
        json.splice(at..end, put);
        json
    })
}

/// Disjoint sites: the gap before each, the old code and the new.
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
        tasks_outside: Vec::new(),
        old: Vec::new(),
        new: Vec::new(),
        brings: Vec::new(),
        counts: Vec::new(),
        left: None,
        sites: resolved,
        data: Vec::new(),
        blockers: Vec::new(),
        patchers: Patchers::default(),
        on_guest_write: None,
    };
    (plan, memory)
}

/// Performs a step on plain memory. With `part` it fails, and a write is done in part.
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
        Step::Open { at, byte } => memory[usize::try_from(at.0).expect("small")] = *byte,
        Step::Check { at, bytes } | Step::Store { at, old: bytes, .. } => {
            let found = memory[range(*at, bytes.len())].to_vec();
            if *found != **bytes {
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

#[test]
fn everything_is_read_from_the_miniature() {
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    assert_eq!((image.release(), image.text_base()), ("6.1.0-miniature", Gva(miniature::BASE)));
    assert_eq!(image.build_id(), Some(&[1, 2, 3, 4][..]));
    let tables = image.tables();
    let lengths = [
        tables.jump_entries.as_ref().map(Vec::len),
        tables.static_call_sites.as_ref().map(Vec::len),
        tables.alternatives.as_ref().map(Vec::len),
        tables.smp_locks.as_ref().map(Vec::len),
        tables.paravirt_sites.as_ref().map(Vec::len),
        tables.mcount_locations.as_ref().map(Vec::len),
        tables.orc_entries,
        tables.exceptions.as_ref().map(Vec::len),
    ];
    assert_eq!(lengths, [1, 1, 2, 1, 1, 1, 4, 1].map(Some));
    assert_eq!(tables.feature("popcnt"), Some(20));
    let keys = image.static_keys();
    assert_eq!((keys[0].name.as_str(), keys[0].initially, keys[0].entries), ("key", false, 1));
    let calls = image.static_calls();
    assert_eq!((calls[0].name.as_str(), calls[0].initially.as_deref()), ("call", Some("function")));
    assert!(image.offsets().capability == Some(16) && image.offsets().module.is_some());
    let offsets = format!("{:?}", image.offsets());
    assert!(!offsets.contains("None"), "the miniature lacks a structure: {offsets}");
    assert!(image.lock_ops().is_some() && image.orc().is_some_and(|orc| orc.table.count == 4));
}

/// Cutting down a kernel that is small enough loses nothing.
#[test]
fn a_kernel_cut_down_reads_the_same() {
    let file = miniature::vmlinux();
    let whole = KernelImage::parse(&file).expect("a kernel");
    let cut = KernelImage::parse(&cut::kernel(&file, &whole)).expect("a kernel");
    same_beginnings(&cut, &whole);
    assert_eq!(cut.tables().features, whole.tables().features);
    assert!(whole.offsets().module.is_some() && whole.lock_ops().is_some());
}

fn same_beginnings(cut: &KernelImage, whole: &KernelImage) {
    fn check<T: PartialEq + std::fmt::Debug>(cut: Option<&Vec<T>>, whole: Option<&Vec<T>>) {
        assert_eq!(cut.is_some(), whole.is_some());
        if let (Some(cut), Some(whole)) = (cut, whole) {
            assert!(!cut.is_empty());
            assert_eq!(cut[..], whole[..cut.len()]);
        }
    }
    let (a, b) = (cut.tables(), whole.tables());
    check(a.jump_entries.as_ref(), b.jump_entries.as_ref());
    check(a.static_call_sites.as_ref(), b.static_call_sites.as_ref());
    check(a.alternatives.as_ref(), b.alternatives.as_ref());
    check(a.smp_locks.as_ref(), b.smp_locks.as_ref());
    check(a.paravirt_sites.as_ref(), b.paravirt_sites.as_ref());
    assert_eq!(format!("{:?}", cut.offsets()), format!("{:?}", whole.offsets()));
    assert_eq!(cut.lock_ops().map(|ops| ops.pointers), whole.lock_ops().map(|ops| ops.pointers));
    assert_eq!((cut.release(), cut.build_id()), (whole.release(), whole.build_id()));
}

/// Exception tables of the kernel and of a module; any other address may fault.
#[test]
fn instructions_that_may_fault() {
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let entry = u32::try_from(miniature::MODULE_TEXT + 0x10 - miniature::MODULE_EXCEPTIONS).expect("near");
    let exceptions = [&entry.to_le_bytes()[..], &[0; 8]].concat();
    let memory = miniature::with_module(&image, &miniature::Sections { exceptions, ..Default::default() });
    let modules = read_modules(&image, 0, &checks::Anywhere::new(&memory).expect("memory"));
    assert_eq!(modules.all().map(<[_]>::len), Ok(1));
    let kernel = Kernel { image: &image, slide: 0, modules: &modules };
    let function = image.symbols().only("function").expect("it");
    assert!(kernel.may_fault(function) && !kernel.may_fault(Gva(function.0 + 1)));
    let of_module = |offset| kernel.may_fault(Gva(miniature::MODULE_TEXT + offset));
    assert!(of_module(0x10) && !of_module(0) && !of_module(0xfff) && of_module(0x1000));
}

/// The same symbols, however kallsyms writes them down.
#[test]
fn every_layout_of_kallsyms_is_read() {
    let names: Vec<String> = (0..1500).map(|number| format!("f{number}")).collect();
    let symbols = |layout| {
        let image = KernelImage::parse(&miniature::vmlinux_as(&names, layout)).expect("a kernel");
        let list = image.symbols().iter().map(|(at, kind, name)| (at, kind, name.to_owned()));
        list.collect::<Vec<_>>()
    };
    let first = symbols(miniature::Kallsyms::From5_10);
    assert!(first.len() > 1500);
    for layout in miniature::LATER {
        assert_eq!(symbols(layout), first, "{layout:?}");
    }
}

/// Jumps and calls of a module's init code are left out: that is freed, and may be something else now.
#[test]
fn what_was_init_code_does_not_count() {
    let key = |bits: u64| 0x100 | bits;
    let jump = |bits: u64| [&[0; 8][..], &key(bits).to_le_bytes()].concat();
    let call = |bits: u32| [0_u32.to_le_bytes(), (0x100 | bits).to_le_bytes()].concat();
    let jumps = [jump(0), jump(1), jump(2), jump(3)].concat();
    let calls = [call(0), call(1), call(2), call(3)].concat();
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let sections =
        miniature::Sections { jump_entries: jumps, static_call_sites: calls, ..Default::default() };
    let memory = miniature::with_module(&image, &sections);
    let modules = read_modules(&image, 0, &checks::Anywhere::new(&memory).expect("memory"));
    let [module] = modules.all().expect("a module") else { panic!("{modules:?}") };
    assert_eq!((module.jump_entries.len(), module.static_call_sites.len()), (2, 2));
}

/// Seeds for the fuzzer, written below the folder `FUZZ_CORPUS` if that is set: the miniature, plain
/// and in a bzImage; the kernel `FUZZ_KERNEL` cut down; as guest memory, the tables of the module
/// `FUZZ_MODULE`.
#[test]
fn seeds_for_the_fuzzer_are_kernels() {
    let small = miniature::vmlinux();
    let packed = miniature::bzimage(&small);
    let mut files = vec![("image", "bzimage".to_owned(), packed), ("image", "vmlinux".to_owned(), small)];
    let names: Vec<String> = (0..1500).map(|number| format!("f{number}")).collect();
    for layout in miniature::LATER {
        files.push(("image", format!("{layout:?}"), miniature::vmlinux_as(&names, layout)));
    }
    let named = |name| std::env::var_os(name).map(|path| std::fs::read(path).expect("a file"));
    if let Some(file) = named("FUZZ_KERNEL") {
        let real = KernelImage::parse(&file).expect("a kernel");
        let cut = cut::kernel(&unpack(&file).expect("a kernel"), &real);
        same_beginnings(&KernelImage::parse(&cut).expect("a kernel"), &real);
        files.push(("image", real.release().to_owned(), cut));
    }
    for (_, name, file) in &files {
        assert!(KernelImage::parse(file).is_ok(), "{name}");
    }
    let (file, [btf, kallsyms]) = (&files[1].2, [miniature::btf_in_file(), miniature::kallsyms_in_file()]);
    let parts = [("btf", file[btf].to_vec()), ("kallsyms", file[kallsyms].to_vec())];
    assert_eq!(miniature::overwritten(miniature::btf_in_file(), &parts[0].1), *file);
    files.extend(parts.map(|(kind, part)| (kind, "miniature".to_owned(), part)));
    files.extend(
        files::packed()
            .into_iter()
            .enumerate()
            .map(|(method, packed)| ("compressed", method.to_string(), packed)),
    );
    for (name, split) in [("plain", false), ("split", true)] {
        files.push(("object", name.to_owned(), objects::example().object(split)));
    }
    files.push(("store", "rep movsb".to_owned(), [&[0xf3, 0xa4][..], &[0; 13], &[7; 160]].concat()));
    if let Some(file) = named("FUZZ_MODULE") {
        let image = KernelImage::parse(&files[1].2).expect("a kernel");
        let memory = cut::module(&file, &image);
        let modules = read_modules(&image, 0, &checks::Anywhere::new(&memory).expect("memory"));
        let [module] = modules.all().expect("a module") else { panic!("{modules:?}") };
        assert!(!module.symbols.is_empty() && !module.jump_entries.is_empty(), "{module:?}");
        files.push(("live", "module".to_owned(), memory));
    }
    let Some(folder) = std::env::var_os("FUZZ_CORPUS") else { return };
    for (kind, name, file) in files {
        let folder = std::path::PathBuf::from(&folder).join(kind);
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(name), file).expect("written");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// A kernel with random bytes written over it, and perhaps truncated.
    #[test]
    fn broken_kernels_are_read_or_refused(
        breaks in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0..8_usize), 1..8),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut file = miniature::vmlinux();
        for (at, bytes, length) in breaks {
            let at = at.index(file.len() - length);
            file[at..at + length].copy_from_slice(&bytes.to_le_bytes()[..length]);
        }
        let length = cut.map_or(file.len(), |cut| cut.index(file.len()));
        checks::image(&file[..length]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// BTF, kallsyms and compressed data with random bytes written over them.
    #[test]
    fn broken_parts_are_read_or_refused(
        part in 0..10_usize,
        breaks in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 1..9_usize), 1..8),
    ) {
        let file = miniature::vmlinux();
        let mut packed = files::packed();
        let mut bytes = match part {
            8 => file[miniature::btf_in_file()].to_vec(),
            9 => file[miniature::kallsyms_in_file()].to_vec(),
            method => packed.swap_remove(method),
        };
        for (at, edit, length) in breaks {
            let at = at.index(bytes.len() - length);
            bytes[at..at + length].copy_from_slice(&edit.to_le_bytes()[..length]);
        }
        match part {
            8 => checks::image(&miniature::overwritten(miniature::btf_in_file(), &bytes)),
            9 => checks::image(&miniature::overwritten(miniature::kallsyms_in_file(), &bytes)),
            _ => checks::compressed(&bytes),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn guest_memory_may_hold_anything(memory in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], 1..400)) {
        checks::live(&KernelImage::parse(&miniature::vmlinux()).expect("a kernel"), &memory);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn plans_are_read_or_refused(json in prop_oneof![nearly_a_plan(), prop::collection::vec(any::<u8>(), 0..200)]) {
        checks::plan(&json);
    }

    #[test]
    fn stores_change_only_their_own_registers(
        prefixes in prop::collection::vec(prop::sample::select(vec![0x66, 0xf3, 0xf2, 0x48, 0x41, 0x67, 0x65]), 0..4),
        opcode in prop_oneof![prop::sample::select(vec![0x88, 0x89, 0xc6, 0xc7, 0xa4, 0xa5, 0xaa, 0xab]), any::<u8>()],
        rest in prop::collection::vec(any::<u8>(), 15),
        registers in prop::collection::vec(prop_oneof![0..3_u64, any::<u64>()], 20),
    ) {
        let mut input = [&prefixes[..], &[opcode], &rest[..]].concat();
        input.truncate(15);
        input.extend(registers.into_iter().flat_map(u64::to_le_bytes));
        checks::store(&input);
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
