//! A kernel that lacks a name is refused to the plans that need it, and to no other. The names are those of
//! the declarations by which the profile itself is read.

use std::collections::{BTreeSet, HashSet};

use patcher::addr::Gva;
use patcher::image::KernelImage;
use patcher::image::profile::{Capability, Fact, State, Table};
use patcher::linux::module_list::read_modules;
use patcher::linux::{GuestMemory, Kernel, Modules as PatcherModules};
use patcher::plan::Plan;
use patcher::plan::refusal::Refusal;
use patcher::resolve::{RunningGuest, resolve};

use crate::miniature::{self, Name};

use Capability::{
    Alternatives, CpuFeatures, ExceptionTable, InitSections, Kprobes, Livepatches, LockPrefixes, Modules,
    PatchingLocks, PerCpu, PreemptCount, PreemptModel, ReturnThunks, Spinlocks, StackCheck, StaticCalls,
    StaticKeys, Tasks,
};

/// Plans that the miniature accepts, and what each needs.
const PLANS: [(&str, &[Capability]); 13] = [
    (r#""patches":[{"at":"f1","expect":"c3","replace":"90"}]"#, &[Kprobes, Livepatches, PatchingLocks]),
    (r#""patches":[{"redirect":"function","to":"f0"}]"#, &[Kprobes, Livepatches, PatchingLocks]),
    (
        r#""patches":[{"static_key":"key","enable":false}]"#,
        &[Kprobes, PatchingLocks, StaticKeys, InitSections, Modules],
    ),
    (
        r#""patches":[{"static_call":"call","target":"f0"}]"#,
        &[Kprobes, PatchingLocks, StaticCalls, InitSections, Modules, CpuFeatures, ReturnThunks],
    ),
    (
        r#""patches":[{"alternatives":"popcnt","enable":true}]"#,
        &[
            Kprobes,
            PatchingLocks,
            Alternatives,
            CpuFeatures,
            InitSections,
            StaticKeys,
            ExceptionTable,
            PreemptModel,
            PerCpu,
        ],
    ),
    (r#""patches":[{"smp_locks":false}]"#, &[Kprobes, PatchingLocks, LockPrefixes]),
    (
        r#""patches":[{"paravirt":"spinlocks","to":"kvm"}]"#,
        &[
            Kprobes,
            PatchingLocks,
            Spinlocks,
            Alternatives,
            CpuFeatures,
            InitSections,
            PreemptCount,
            PerCpu,
            Modules,
            StaticKeys,
            ExceptionTable,
            PreemptModel,
        ],
    ),
    (
        r#""patches":[{"at":"pair","expect":"9090","replace":"6690"}]"#,
        &[Kprobes, Livepatches, PatchingLocks, StaticKeys, ExceptionTable, PreemptModel, PerCpu],
    ),
    (
        r#""strategy":"bypass","patches":[{"at":"f1","expect":"c3","replace":"90"}]"#,
        &[Kprobes, Livepatches, PatchingLocks, ExceptionTable],
    ),
    (
        r#""quiesced":{"preemptible":true},"patches":[{"at":"f1","expect":"c3","replace":"90"}]"#,
        &[Kprobes, Livepatches, PatchingLocks, PerCpu, PreemptCount],
    ),
    (
        r#""quiesced":{"outside":["f2"]},"patches":[{"at":"f1","expect":"c3","replace":"90"}]"#,
        &[Kprobes, Livepatches, PatchingLocks, PerCpu],
    ),
    (
        r#""quiesced":{"tasks_outside":["f2"]},"patches":[{"at":"f1","expect":"c3","replace":"90"}]"#,
        &[Kprobes, Livepatches, PatchingLocks, PerCpu, Tasks, StackCheck],
    ),
    (
        r#""on_guest_write":"deny","patches":[{"at":"f1","expect":"c3","replace":"90"}]"#,
        &[Kprobes, Livepatches, PatchingLocks, PerCpu],
    ),
];

/// A guest that runs the miniature, as it is after boot.
pub(crate) struct Booted<'a> {
    image: &'a KernelImage,
    text: Vec<u8>,
}

impl<'a> Booted<'a> {
    /// `whole` has every name.
    pub(crate) fn new(image: &'a KernelImage, file: &[u8], whole: &KernelImage) -> Self {
        let at = |name: &str| whole.symbols().only(name).expect("it is in the whole miniature");
        // Behind the file's and the only segment's header.
        let mut booted = Self { image, text: file[64 + 56..].to_vec() };
        booted.put(at("key"), &[1]);
        let (function, trampoline) = (at("function"), at("__SCT__call"));
        for (site, opcode) in [(Gva(function.0 + 10), 0xe8), (trampoline, 0xe9)] {
            let distance = function.0.wrapping_sub(site.0 + 5).to_le_bytes();
            booted.put(site, &[&[opcode][..], &distance[..4]].concat());
        }
        booted.put(at("modules"), &at("modules").0.to_le_bytes());
        booted
    }

    pub(crate) fn put(&mut self, at: Gva, bytes: &[u8]) {
        let from = at.offset_from(Gva(miniature::BASE)).expect("in the image");
        self.text[from..from + bytes.len()].copy_from_slice(bytes);
    }

    /// The capabilities for want of which a plan is refused; `Err` with other reasons.
    fn lacks(&self, plan: &str) -> Result<BTreeSet<&'static str>, String> {
        self.lacks_beside(&read_modules(self.image, 0, self), plan)
    }

    /// The same, with these modules.
    fn lacks_beside(&self, modules: &PatcherModules, plan: &str) -> Result<BTreeSet<&'static str>, String> {
        let kernel = Kernel { image: self.image, slide: 0, modules };
        let plan = format!(r#"{{"version":1,"name":"x",{plan}}}"#);
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        match resolve(&plan, RunningGuest { kernel, text: self, vcpus: 1 }, []) {
            Ok(_) => Ok(BTreeSet::new()),
            Err(refused) => refused
                .iter()
                .map(|refused| match &refused.refusal {
                    Refusal::MissingCapability { capability, .. } => Ok(*capability),
                    _ => Err(refused.to_string()),
                })
                .collect(),
        }
    }
}

impl GuestMemory for Booted<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        let from = at.offset_from(Gva(miniature::BASE)).ok_or(at)?;
        into.copy_from_slice(self.text.get(from..from + into.len()).ok_or(at)?);
        Ok(())
    }
}

/// The name by which a fact is found. `None` if it is not found by one.
fn name(fact: Fact) -> Option<Name> {
    match fact {
        Fact::Symbol(name)
        | Fact::Patcher(name)
        | Fact::Lock(name)
        | Fact::CountsInterrupts(name)
        | Fact::CountsSpinlocks(name) => Some(Name::Symbol(name)),
        Fact::Member(name, member) => Some(Name::Member(name, member)),
        Fact::Table(table) => Some(Name::Symbol(match table {
            Table::JumpEntries => "__start___jump_table",
            Table::StaticCallSites => "__start_static_call_sites",
            Table::Alternatives => "__alt_instructions",
            Table::SmpLocks => "__smp_locks",
            Table::Paravirt => "__parainstructions",
            Table::Mcount => "__start_mcount_loc",
            Table::Exceptions => "__start___ex_table",
            Table::OrcIps => "__start_orc_unwind_ip",
        })),
        // Without a banner there is no release, and the file is refused. The others say what other facts
        // look like.
        Fact::Banner
        | Fact::Section(_)
        | Fact::Without(_)
        | Fact::NoTable(_)
        | Fact::NoDirectCalls
        | Fact::FixedPreemption
        | Fact::PerCpuLinked
        | Fact::SpinlocksSpin
        | Fact::LockOps
        | Fact::OrcDecodes => None,
    }
}

/// The names that a capability relies on.
fn names(capability: Capability) -> HashSet<Name> {
    let facts = capability.parts().iter().flat_map(|part| part.facts).copied().flatten().copied().flatten();
    facts.filter_map(|fact| name(*fact)).collect()
}

fn missing(image: &KernelImage) -> BTreeSet<Capability> {
    let is_missing = |(_, state): &(Capability, &State)| matches!(state, State::Missing { .. });
    image.profile().iter().filter(is_missing).map(|(capability, _)| capability).collect()
}

/// Leaves out each name that a capability relies on, one at a time.
#[test]
fn a_missing_name_is_refused_to_the_plans_that_need_it_and_to_no_other() {
    let mut tried: HashSet<Name> = HashSet::new();
    // The first three go together.
    let newest = &miniature::OLDER[3..];
    for other_kernels in [&miniature::OLDER[..], &miniature::NEWER, newest] {
        let file = miniature::vmlinux_without(other_kernels);
        let whole = KernelImage::parse(&file).expect("a kernel");
        assert_eq!(missing(&whole), BTreeSet::new(), "{:?}", whole.profile());
        // Text: 3; jump labels: 2; static calls: 1; ftrace: 3; kprobes: 5; BPF: 1; lock prefixes: 1.
        assert_eq!((whole.landmarks().patchers.len(), whole.landmarks().locks.len()), (16, 3));
        for (plan, _) in PLANS {
            assert_eq!(Booted::new(&whole, &file, &whole).lacks(plan), Ok(BTreeSet::new()), "{plan}");
        }
        let all: HashSet<Name> = Capability::ALL.into_iter().flat_map(names).collect();
        for name in all.into_iter().filter(|name| !other_kernels.contains(name)) {
            let file = miniature::vmlinux_without(&[other_kernels, &[name]].concat());
            let image = KernelImage::parse(&file).expect("a kernel");
            if file == miniature::vmlinux_without(other_kernels) {
                continue;
            }
            tried.insert(name);
            let concerned: BTreeSet<Capability> =
                Capability::ALL.into_iter().filter(|capability| names(*capability).contains(&name)).collect();
            assert_eq!(missing(&image), concerned, "without {name:?}");
            for (plan, needs) in PLANS {
                let lacks = Booted::new(&image, &file, &whole).lacks(plan);
                let lacks = lacks.unwrap_or_else(|other| panic!("without {name:?}: {plan}: {other}"));
                let needed: BTreeSet<&str> =
                    concerned.iter().filter(|one| needs.contains(one)).map(|one| one.name()).collect();
                assert!(lacks.is_subset(&needed), "without {name:?}: {plan}: {lacks:?}");
                assert_eq!(lacks.is_empty(), needed.is_empty(), "without {name:?}: {plan}: {needed:?}");
            }
        }
    }
    let untried: Vec<Name> =
        Capability::ALL.into_iter().flat_map(names).filter(|name| !tried.contains(name)).collect();
    assert_eq!(untried, [], "no miniature has them");
}

/// With `PREEMPT_RT`.
#[test]
fn sleeping_spinlocks_are_not_switched() {
    const SPINLOCKS: &str = r#""patches":[{"paravirt":"spinlocks","to":"kvm"}]"#;
    let others: Vec<Name> =
        miniature::OLDER.into_iter().filter(|name| *name != Name::Symbol("rt_spin_lock")).collect();
    let file = miniature::vmlinux_without(&others);
    let image = KernelImage::parse(&file).expect("a kernel");
    assert_eq!(missing(&image), BTreeSet::from([Spinlocks]));
    for (plan, _) in PLANS {
        let lacks = Booted::new(&image, &file, &image).lacks(plan);
        let expected = if plan == SPINLOCKS { BTreeSet::from([Spinlocks.name()]) } else { BTreeSet::new() };
        assert_eq!(lacks, Ok(expected), "{plan}");
    }
}

/// While a module is loaded, what it has of sites is not known: plans that need to know of modules wait, others
/// do not.
#[test]
fn plans_that_depend_on_modules_wait_for_one_that_is_coming() {
    let file = miniature::vmlinux_without(&miniature::OLDER);
    let image = KernelImage::parse(&file).expect("a kernel");
    let booted = Booted::new(&image, &file, &image);
    let coming = PatcherModules::new(Ok((Vec::new(), vec!["late".to_owned()])));
    for (plan, needs) in PLANS {
        let lacks = booted.lacks_beside(&coming, plan);
        if needs.contains(&Modules) {
            let why = lacks.expect_err(plan);
            assert!(why.contains("loading the module late") && why.contains("[busy]"), "{plan}: {why}");
        } else {
            assert_eq!(lacks, Ok(BTreeSet::new()), "{plan}");
        }
    }
}

/// A kernel without data symbols and BTF, and without what could change the site: it is patched. With a sign of
/// what could, it is not.
#[test]
fn a_kernel_without_data_symbols_is_patched_where_it_does_not_patch_itself() {
    let absent = [
        "static_key_enable",
        "arch_jump_label_transform",
        "arch_jump_label_transform_queue",
        "__static_call_update",
        "arch_static_call_transform",
        "ftrace_replace_code",
        "ftrace_make_call",
        "ftrace_make_nop",
        "register_kprobe",
        "kprobe_int3_handler",
        "arch_arm_kprobe",
        "arch_disarm_kprobe",
        "alternatives_enable_smp",
        "klp_enable_patch",
        "load_module",
    ];
    let whole = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let lacks = |sign: Option<&'static str>, plan: &str| {
        let left_out = absent.into_iter().filter(|name| Some(*name) != sign).map(Name::Symbol);
        let left_out: Vec<Name> = left_out.chain(miniature::OLDER).chain([miniature::ALL_DATA]).collect();
        let file = miniature::vmlinux_without(&left_out);
        let image = KernelImage::parse(&file).expect("a kernel");
        assert_eq!(image.release(), "6.1.0-miniature");
        assert!(missing(&image).contains(&PatchingLocks), "{:?}", image.profile());
        Booted::new(&image, &file, &whole).lacks(plan).expect("no other reason")
    };
    let (raw, _) = PLANS[0];
    let redirect = r#""patches":[{"redirect":"function","to":"f0"}]"#;
    assert_eq!(lacks(None, raw), BTreeSet::new());
    assert_eq!(lacks(None, redirect), BTreeSet::new());
    assert_eq!(
        lacks(None, r#""patches":[{"at":"pair","expect":"9090","replace":"6690"}]"#),
        ["exception_table"].into()
    );
    assert_eq!(lacks(Some("register_kprobe"), raw), ["kprobes"].into());
    assert_eq!(lacks(Some("klp_enable_patch"), raw), ["livepatches"].into());
    for sign in
        ["static_key_enable", "arch_static_call_transform", "ftrace_make_nop", "alternatives_enable_smp"]
    {
        assert_eq!(lacks(Some(sign), raw), ["patching_locks"].into(), "{sign}");
    }
    assert_eq!(lacks(None, r#""patches":[{"static_key":"f0","enable":true}]"#), ["static_keys"].into());
}
