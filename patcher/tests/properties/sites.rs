//! Where a site may lie: what its function, the kernel's tables and `.cold` parts lead to.

use std::collections::BTreeSet;

use patcher::addr::Gva;
use patcher::image::{KernelImage, Symbols};
use patcher::insn;
use patcher::linux::module_list::{read_complete_modules, read_modules};
use patcher::linux::{Kernel, Modules};
use patcher::plan::Plan;
use patcher::resolve::{RunningGuest, resolve};

use crate::{checks, miniature};

/// A function is not decoded for an instruction that the kernel replaces itself, but for all others.
#[test]
fn places_that_the_kernel_patches_itself() {
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let place = |name: &str| image.symbols().only(name).expect("it").0;
    let mut memory = vec![0; 1 << 16];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).expect("64 bits") % memory.len();
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    // nop5, two jumps into what follows, call, mov, and what is no instruction.
    let code =
        [0x0f, 0x1f, 0x44, 0, 0, 0xeb, 0x05, 0x90, 0xeb, 0x06, 0xe8, 0, 0, 0, 0, 0xc6, 0x07, 0, 0x06, 0x06];
    put(place("function"), &code);
    put(place("klp_ops"), &place("klp_ops").to_le_bytes());
    memory.insert(0, 0xa5);
    let text = checks::Anywhere::new(&memory).expect("memory");
    let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
    // One instruction, other than the present one.
    let replacement = |length| [&[0x3e], &insn::nops(length - 1)[..]].concat();
    let codes = |offset: usize, length: usize| {
        let plan = format!(
            r#"{{"version":1,"name":"x","patches":[{{"at":"function+{offset:#x}","expect":"{}","replace":"{}"}}]}}"#,
            insn::hex(&code[offset..offset + length]),
            insn::hex(&replacement(length))
        );
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        match resolve(&plan, RunningGuest { kernel, text: &text, vcpus: 1 }, []) {
            Ok(_) => Vec::new(),
            Err(refused) => refused.iter().map(|refused| refused.refusal.code()).collect(),
        }
    };
    assert_eq!(codes(0, 5), [""; 0], "the tracer's");
    assert_eq!(codes(10, 5), [""; 0], "a static call, whatever branches to its inside");
    assert_eq!(codes(10, 8), ["branch_into_site"], "it and more");
    assert_eq!(codes(15, 3), ["branch_into_site"]);
    assert_eq!(codes(6, 2), ["inside_instruction"]);
    assert_eq!(codes(18, 2), ["undecodable"]);
}

/// Where execution arrives by the kernel's tables, its data or another function is no inside of a site:
/// by the miniature's static key (+10), its exception's fixup (+25), and its `.cold` part (+22); and in
/// `tail` by a branch (+2), an address in an instruction (+3), a table of pointers (+4), and an alternative
/// that is not in place (+5).
#[test]
fn no_site_has_inside_what_tables_or_cold_parts_lead_to() {
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let function = image.symbols().only("function").expect("it");
    let tail = image.symbols().only("tail").expect("it");
    let landings: Vec<Gva> = image.landings().iter().map(|(_, to)| to).collect();
    let of =
        |function: Gva, offsets: &[u64]| offsets.iter().map(|by| Gva(function.0 + by)).collect::<Vec<_>>();
    assert_eq!(landings, [of(function, &[10, 22, 25]), of(tail, &[2, 3, 4, 5])].concat());
    let kernel = Kernel { image: &image, slide: 0x20_0000, modules: &Modules::NONE };
    let live = |offset: u64| Gva(function.0 + 0x20_0000 + offset);
    let inside = |at, end| kernel.landing_inside(live(at), live(end)).map(|(_, to)| to);
    for landing in [10, 22, 25] {
        assert_eq!(inside(landing - 1, landing + 1), Some(live(landing)));
        assert_eq!(inside(landing, landing + 1), None, "a site may begin there");
        assert_eq!(inside(landing - 1, landing), None, "and end there");
    }
    // nop5, two nops of one byte and so on, all of them instructions of one byte.
    let mut memory = vec![0x90; 1 << 16];
    let mut put = |name: &str, bytes: &[u8]| {
        let at = usize::try_from(image.symbols().only(name).expect("it").0).expect("64 bits") % (1 << 16);
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put("function", &[0x0f, 0x1f, 0x44, 0, 0]);
    let livepatches = image.symbols().only("klp_ops").expect("it").0.to_le_bytes();
    put("klp_ops", &[livepatches, livepatches].concat());
    put("kprobe_table", &[0; 512]);
    put("text_mutex", &[0; 32]);
    memory.insert(0, 0xa5);
    let text = checks::Anywhere::new(&memory).expect("memory");
    let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
    let codes = |offset: u64, length: usize| -> Vec<&str> {
        let (old, new) = ("90".repeat(length), format!("f8{}", "90".repeat(length - 1)));
        let plan = format!(
            r#"{{"version":1,"name":"x","strategy":"inspect","patches":[{{"at":"function+{offset:#x}","expect":"{old}","replace":"{new}"}}]}}"#
        );
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        let resolved = resolve(&plan, RunningGuest { kernel, text: &text, vcpus: 1 }, []);
        resolved.map_or_else(|all| all.iter().map(|refused| refused.refusal.code()).collect(), |_| Vec::new())
    };
    for (offset, length) in [(9, 2), (8, 5), (21, 2), (22, 4), (24, 2)] {
        assert_eq!(codes(offset, length), ["branch_into_site"], "+{offset}, {length} bytes");
    }
    for (offset, length) in [(10, 1), (9, 1), (22, 1), (25, 1)] {
        assert_eq!(codes(offset, length), [""; 0], "+{offset}, {length} bytes");
    }
    let from_function = |at: Gva| at.offset_from(function).expect("behind") as u64;
    // Nothing leads into the `.cold` part, behind its symbol.
    let cold = image.symbols().only("function.cold").expect("it");
    assert_eq!(image.landings().inside(cold, Gva(cold.0 + 8)), None);
    for offset in [2, 3, 4, 5] {
        assert_eq!(codes(from_function(tail) + offset - 1, 2), ["branch_into_site"], "tail+{offset}");
        assert_eq!(codes(from_function(tail) + offset, 1), [""; 0], "tail+{offset}");
    }
}

/// Several instructions are refused where calls may go behind the first: behind `endbr64`, and in the padding
/// before functions. Where the kernel calls from a NOP now and then, a task may come back behind it.
#[test]
fn sites_that_calls_may_enter_behind_the_first_instruction() {
    const F: u64 = 0xffff_ffff_8100_0000;
    let names = [(F, b'T', "f"), (F + 0x20, b't', "__pfx_g"), (F + 0x30, b'T', "g"), (F + 0x40, b'T', "h")];
    let image = KernelImage::from_parts("x".into(), Symbols::new(names.into_iter()).expect("few"), Gva(F));
    let mut code = vec![0x90; 0x50];
    code[..4].copy_from_slice(&[0xf3, 0x0f, 0x1e, 0xfa]);
    let text = checks::Function(&code);
    let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
    let refused = |at: &str, expect: &str| {
        let replace = "f8".repeat(expect.len() / 2);
        let plan = format!(
            r#"{{"version":1,"name":"x","patches":[{{"at":"{at}","expect":"{expect}","replace":"{replace}"}}]}}"#
        );
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        let all =
            resolve(&plan, RunningGuest { kernel, text: &text, vcpus: 1 }, []).err().unwrap_or_default();
        all.iter().map(ToString::to_string).collect::<String>()
    };
    assert!(refused("f", "f30f1efa90").contains("behind the marker of indirect branches"));
    assert!(refused("__pfx_g+0x4", "9090").contains("the padding before a function"));
    for other in ["g", "f+0x4"] {
        let why = refused(other, "9090");
        // Nothing is known of this kernel.
        assert!(why.contains("[missing_capability]"), "{other}: {why}");
    }

    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let kernel = Kernel { image: &image, slide: 0x20_0000, modules: &Modules::NONE };
    let function = image.symbols().only("function").expect("it").0 + 0x20_0000;
    let may_call: Vec<u64> = (0..26).filter(|offset| kernel.may_call(Gva(function + offset))).collect();
    assert_eq!(may_call, [0, 10], "the fentry call and the static call, not the static key's jump");
}

/// A symbol of the miniature's module: the place of its name, and its own from where the text begins.
fn module_symbol(name: u32, at: u64) -> Vec<u8> {
    let section = [2, 0, 1, 0];
    [&name.to_le_bytes()[..], &section, &(miniature::MODULE_TEXT + at).to_le_bytes(), &[0; 8]].concat()
}

/// Writes to memory that [`miniature::with_module`] made, behind the byte that stands for a hole.
fn put(memory: &mut [u8], at: u64, bytes: &[u8]) {
    let at = 1 + usize::try_from(at).expect("64 bits") % (memory.len() - 1);
    memory[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Makes the guest's list of livepatches in such memory an empty one.
fn without_livepatches(image: &KernelImage, memory: &mut [u8]) {
    let head = image.symbols().only("klp_ops").expect("it").0;
    put(memory, head, &[head.to_le_bytes(), head.to_le_bytes()].concat());
}

/// A branch from the `.cold` part of a module's function, whose last part ends with the module's text.
#[test]
fn cold_parts_of_modules_count() {
    const F: u64 = 0x400;
    const COLD: u64 = 0x500;
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let symbols = [module_symbol(0, F), module_symbol(2, COLD)].concat();
    let sections = miniature::Sections { symbols, names: b"f\0f.cold\0".to_vec(), ..Default::default() };
    let mut memory = miniature::with_module(&image, &sections);
    without_livepatches(&image, &mut memory);
    put(&mut memory, F, &[0x90; 0x100]);
    let distance = u32::try_from(COLD + 5 - (F + 0x11)).expect("near");
    put(&mut memory, COLD, &[&[0xe9][..], &distance.wrapping_neg().to_le_bytes()].concat());
    let text = checks::Anywhere::new(&memory).expect("memory");
    let modules = read_modules(&image, 0, &text);
    let [module] = modules.all().expect("a module") else { panic!("{modules:?}") };
    assert_eq!(module.symbols.iter().map(|(.., name)| name).collect::<Vec<_>>(), ["f", "f.cold"]);
    let kernel = Kernel { image: &image, slide: 0, modules: &modules };
    let codes = |at: u64, expect: &str, replace: &str| {
        let plan = format!(
            r#"{{"version":1,"name":"x","patches":[{{"at":"module:f+{at:#x}","expect":"{expect}","replace":"{replace}"}}]}}"#
        );
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        let resolved = resolve(&plan, RunningGuest { kernel, text: &text, vcpus: 1 }, []);
        resolved.map_or_else(|all| all.iter().map(|refused| refused.refusal.code()).collect(), |_| Vec::new())
    };
    assert_eq!(codes(0x10, "9090", "6690"), ["branch_into_site"]);
    assert_eq!(codes(0x11, "90", "f8"), [""; 0], "it may begin there");
    assert_eq!(codes(0x10, "90", "f8"), [""; 0], "and end there");
}

/// Which modules are read: those that are live, and of the others those that are known to be complete.
#[test]
fn modules_are_read_once_they_are_complete() {
    const MODULE: u64 = 0x4_0000;
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    // A section, then a function. None of the states is the byte that stands for a hole.
    let symbols = [module_symbol(0, 0x400), module_symbol(1, 0x400)].concat();
    let sections =
        miniature::Sections { symbols, names: b"\0f\0\x01\x02\x03".to_vec(), ..Default::default() };
    let mut memory = miniature::with_module(&image, &sections);
    let state = MODULE + image.offsets().module.expect("offsets").state;
    let known = BTreeSet::from([Gva(MODULE)]);
    let names = BTreeSet::from(["module".to_owned(), "other".to_owned()]);
    let mut read = |value: u8, complete: &BTreeSet<Gva>| {
        put(&mut memory, state, &[value]);
        let text = checks::Anywhere::new(&memory).expect("memory");
        let modules = read_complete_modules(&image, 0, &text, complete);
        let functions =
            modules.known().iter().flat_map(|module| module.symbols.iter().map(|(.., name)| name));
        let functions = functions.map(str::to_owned).collect::<Vec<_>>();
        let missing = modules.missing(&names).map(|missing| missing.join(" "));
        (functions.join(" "), missing.map_err(|refusal| refusal.code()))
    };
    let found = |functions: &str, missing: &str| (functions.to_owned(), Ok(missing.to_owned()));
    assert_eq!(read(0, &BTreeSet::new()), found("f", "other"), "live");
    assert_eq!(read(1, &known), found("f", "other"), "complete, and its init was not run yet");
    assert_eq!(read(1, &BTreeSet::new()), (String::new(), Err("busy")), "its init may be running");
    assert_eq!(read(2, &known), found("f", "other"), "its exit is behind it");
    assert_eq!(read(2, &BTreeSet::new()), found("", "module other"), "it goes");
    for complete in [&known, &BTreeSet::new()] {
        assert_eq!(read(3, complete), found("", "module other"), "not formed");
    }
}

/// A redirect of a module's function leaves the fentry call to the tracer, if the plan or the tracer says
/// so; another call at the entry is the function's own.
#[test]
fn redirects_in_modules_keep_the_fentry_call() {
    const F: u64 = 0x400;
    let image = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let symbols = [module_symbol(0, F), module_symbol(2, F + 0x40), module_symbol(4, F + 0x80)].concat();
    let sections = miniature::Sections { symbols, names: b"f\0g\0h\0".to_vec(), ..Default::default() };
    let begins = |first: &[u8], keep_fentry: bool| {
        let mut memory = miniature::with_module(&image, &sections);
        without_livepatches(&image, &mut memory);
        // mov eax, 1
        put(&mut memory, F, &[first, &[0xb8, 1, 0, 0, 0], &[0x90; 64]].concat());
        let text = checks::Anywhere::new(&memory).expect("memory");
        let modules = read_modules(&image, 0, &text);
        let kernel = Kernel { image: &image, slide: 0, modules: &modules };
        let plan = format!(
            r#"{{"version":1,"name":"x","patches":[{{"redirect":"module:f","to":"module:h","keep_fentry":{keep_fentry}}}]}}"#
        );
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        let resolved = resolve(&plan, RunningGuest { kernel, text: &text, vcpus: 1 }, []).expect("it fits");
        resolved.sites[0].at.0 - miniature::MODULE_TEXT - F
    };
    let nop = [0x0f, 0x1f, 0x44, 0, 0];
    assert_eq!((begins(&nop, false), begins(&nop, true)), (0, 5));
    let call = |to: u64| [&[0xe8][..], &u32::try_from(to - 5).expect("near").to_le_bytes()].concat();
    let (trampoline, other) = (call(0x10_0000), call(0x40));
    assert_eq!((begins(&trampoline, false), begins(&trampoline, true)), (5, 5), "the tracer is in use");
    assert_eq!((begins(&other, false), begins(&other, true)), (0, 0), "a call of g");
}
