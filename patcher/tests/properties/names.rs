//! Every name of the kernel's that the code looks up is declared by a capability, so that a kernel without
//! it is refused, or is listed here with what is done without it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use patcher::image::profile::{Capability, Fact};

/// Names that no capability relies on, and what is done where they are missing.
const UNDECLARED: [(&str, &str); 20] = [
    ("_end", "the end of the last segment"),
    ("_etext", "the end of the section .text"),
    ("linux_banner", "the banner is found by its text"),
    ("__static_call_return0", "a call of it is compared as a call, and is not the same"),
    ("__static_call_return", "a conditional tail call that is to call nothing is refused"),
    ("__jump_label_patch", "its callers are blocked"),
    ("__static_call_transform", "its callers are blocked"),
    ("its_return_thunk", "no return thunk is that one"),
    ("__x86_indirect_thunk_rax", "a kernel without retpolines"),
    ("ia32_sys_call", "a kernel without system calls of 32 bits"),
    ("do_init_module", "plans that concern modules are refused (modules_unseen)"),
    ("free_module", "plans that concern modules are refused (modules_unseen)"),
    ("machine_kexec", "a kernel without kexec"),
    ("kexec_in_progress", "vCPUs are asked which kernel they run"),
    ("panic_cpu", "vCPUs are asked which kernel they run"),
    ("__preempt_count", "declared as what counts interrupts and spinlocks"),
    ("irq_enter_rcu", "declared as what counts interrupts and spinlocks"),
    ("queued_spin_lock_slowpath", "a member of struct pv_lock_ops"),
    ("queued_spin_unlock", "a member of struct pv_lock_ops"),
    ("vcpu_is_preempted", "a member of struct pv_lock_ops"),
];

/// How names are looked up.
const CALLS: [&str; 7] = ["symbol(", "only(", "per_cpu(", "offset(", "bit_field(", "scalar(", "raised_by("];
/// Files all of whose text literals are names.
const LISTS: [&str; 4] =
    ["image/offsets.rs", "image/task_offsets.rs", "image/lock_ops.rs", "image/landmarks.rs"];

fn declared() -> BTreeSet<&'static str> {
    let parts = || Capability::ALL.into_iter().flat_map(Capability::parts);
    let facts = parts().flat_map(|part| part.facts).copied().flatten().copied().flatten();
    facts
        .flat_map(|fact| match *fact {
            Fact::Symbol(name)
            | Fact::Patcher(name)
            | Fact::Lock(name)
            | Fact::CountsInterrupts(name)
            | Fact::CountsSpinlocks(name) => vec![name],
            Fact::Member(name, member) => vec![name, member],
            _ => Vec::new(),
        })
        .collect()
}

/// The text literals of a piece of code that are identifiers.
fn literals(code: &str) -> impl Iterator<Item = &str> {
    let is_name = |text: &&str| {
        !text.is_empty()
            && text.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
            && !text.starts_with(char::is_numeric)
    };
    code.split('"').skip(1).step_by(2).filter(is_name)
}

fn look_ups(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() && !path.ends_with("profile") {
            look_ups(&path, found);
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let source = fs::read_to_string(&path).expect("source");
        let shipped = source.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = shipped.lines().filter(|line| !line.trim_start().starts_with("//"));
        let code: String = lines.collect::<Vec<_>>().join("\n");
        let place = path.display().to_string();
        let mut add = |name: &str| found.push((place.clone(), name.to_owned()));
        if LISTS.iter().any(|list| path.ends_with(list)) {
            literals(&code).for_each(&mut add);
        }
        for call in CALLS {
            for arguments in code.split(call).skip(1) {
                let arguments = arguments.split(')').next().unwrap_or_default();
                literals(arguments).for_each(&mut add);
            }
        }
    }
}

#[test]
fn every_name_that_is_looked_up_is_declared() {
    let mut found = Vec::new();
    for folder in ["src", "../vmm/src"] {
        look_ups(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut found);
    }
    let declared = declared();
    let looked_up: BTreeSet<&str> = found.iter().map(|(_, name)| name.as_str()).collect();
    assert!(looked_up.len() > 60, "the look-ups were not found: {looked_up:?}");
    let excused = |name: &str| UNDECLARED.iter().any(|(known, _)| *known == name);
    let forgotten: Vec<&(String, String)> =
        found.iter().filter(|(_, name)| !declared.contains(name.as_str()) && !excused(name)).collect();
    assert!(forgotten.is_empty(), "declare these in a capability: {forgotten:?}");
    for (name, _) in UNDECLARED {
        assert!(looked_up.contains(name), "{name} is not looked up any more");
    }
}
