//! The guest's spinlocks, switched between the native ones and those that call the host while they
//! wait (Linux arch/x86/kernel/kvm.c, `kvm_spinlock_init`).
//!
//! Lock and unlock belong together: only a paravirtual unlock wakes a waiter that halted. So all
//! operations change at once, while no vCPU holds a spinlock or waits for one. A free lock looks the
//! same to both.
//!
//! What a site holds follows from the pointers in `pv_ops`, as at boot: a direct call of the pointer's
//! target. On bare metal, `unlock` and `vcpu_is_preempted` are inlined by an alternative, whose feature
//! stands for the pointer (arch/x86/kernel/paravirt.c, `paravirt_set_cap`). An operation that is a static
//! call is retargeted as one.
//!
//! No task is preempted where spinlocks are taken, waited for or released: preemption, or interrupts,
//! are disabled there (include/linux/spinlock_api_smp.h). `vcpu_is_preempted` alone is called without, by
//! a waiter for a sleeping lock (kernel/locking/rtmutex.c, `rtmutex_spin_on_owner`). On a kernel that
//! preempts tasks in kernel mode it therefore stays a call of the same length, of either target.

use crate::addr::Gva;
use crate::image::lock_ops::{IS_PREEMPTED, LockOps, OPERATIONS, UNLOCK};
use crate::image::tables::ParavirtSite;
use crate::insn;
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u32, read_u64};
use crate::plan::Spinlocks;
use crate::plan::refusal::Refusal;
use crate::resolve::expand::alternatives::{AltSite, Overrides, alt_sites, same};
use crate::resolve::expand::call_thunk::through_thunk;
use crate::resolve::expand::expansion::{Code, Datum, Expansion, Needs};
use crate::resolve::expand::rewrite::without_padding;
use crate::resolve::expand::static_call;
use crate::safety::interior::{PREEMPTED, preempts};

/// The targets that KVM's guest support installs.
const KVM: [&str; OPERATIONS.len()] = [
    "__pv_queued_spin_lock_slowpath",
    "__raw_callee_save___pv_queued_spin_unlock",
    "kvm_wait",
    "kvm_kick_cpu",
    "__raw_callee_save___kvm_vcpu_is_preempted",
];

pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    to: Spinlocks,
) -> Result<Expansion, Refusal> {
    let ops = kernel.image.lock_ops().ok_or(Refusal::UnknownLayout { what: "struct pv_lock_ops" })?;
    let busy = |why: &str| Refusal::Busy { name: "spinlocks".into(), why: why.into() };
    if kernel.image.landmarks().unlocked.is_empty() {
        return Err(busy(
            "the guest's kernel has no known function that every system call passes without a spinlock",
        ));
    }
    let mut wanted = ops.native.map(|at| kernel.live(at));
    if to == Spinlocks::Kvm {
        for (target, name) in wanted.iter_mut().zip(KVM) {
            *target = kernel.symbol(name)?;
        }
        // Without the table the first waiter would write to address 0 and up.
        if read_u64(text, kernel.symbol("pv_lock_hash")?)? == 0 {
            return Err(busy("the guest booted without paravirtual ones and has no table of waiters"));
        }
    }
    let mut present = wanted;
    for (target, pointer) in present.iter_mut().zip(ops.pointers) {
        *target = Gva(read_u64(text, kernel.live(pointer))?);
    }
    if present == wanted {
        return Err(Refusal::NothingToDo { at: kernel.live(ops.table) });
    }
    kernel.modules.none_is_coming("spinlocks")?;
    // The tables hold the kernel's own sites only; those of a module are dropped after loading.
    if let Some(module) = caller_in_modules(kernel, text, &[present, wanted].concat())? {
        return Err(busy(&format!("the module {module} does without the kernel's lock functions")));
    }
    if let Some(index) = (0..OPERATIONS.len()).find(|&index| !is_known(kernel, ops, index, present[index])) {
        let (name, target) = (OPERATIONS[index], present[index]);
        return Err(busy(&format!("{name} goes to {target}, which is neither the native one nor KVM's")));
    }
    let preempts = preempts(*kernel, text);
    let calls = lock_calls(kernel, ops);
    let stays_a_call = |index: usize| preempts && index == IS_PREEMPTED;
    let is_native = |index: usize| wanted[index] == kernel.live(ops.native[index]);
    let before = Overrides { features: Vec::new(), pointers: pointers(kernel, ops, present) };
    let after = Overrides {
        features: features(&calls)?
            .into_iter()
            .map(|(index, feature)| (feature, stays_a_call(index) || !is_native(index)))
            .collect(),
        pointers: pointers(kernel, ops, wanted),
    };
    let mut code = Vec::new();
    for index in (0..OPERATIONS.len()).filter(|&index| ops.static_calls[index]) {
        let call = kernel.static_call(OPERATIONS[index])?;
        code.extend(static_call::retarget(kernel, text, call, present[index], wanted[index])?);
    }
    for call in calls {
        if kernel.is_init(call.site.at) {
            continue;
        }
        let at = call.site.at;
        let old = call.code(kernel, text, &before)?;
        let there = read(text, at, old.len())?;
        let expected = through_thunk(kernel, text, &old, at);
        if ![&old, &expected].into_iter().any(|old| same(&there, old, at)) {
            return Err(Refusal::ExpectMismatch { at, expected, found: there });
        }
        let new = through_thunk(kernel, text, &call.code(kernel, text, &after)?, at);
        if !same(&there, &new, at) {
            let changed = Code { at, old: there, new };
            if stays_a_call(call.operation) {
                keeps_its_length(&changed)?;
            }
            code.push(changed);
        }
    }
    let mut data: Vec<Datum> = Vec::new();
    for index in 0..OPERATIONS.len() {
        if present[index] != wanted[index] {
            let word = |to: Gva| to.0.to_le_bytes().to_vec();
            let at = kernel.live(ops.pointers[index]);
            data.push(Datum { at, old: word(present[index]), new: word(wanted[index]) });
        }
    }
    data.extend(feature_words(kernel, text, &after)?);
    Ok(Expansion { code, data, needs: Needs::Unlocked, ..Expansion::default() })
}

/// A module that calls one of the targets itself. On preemptible kernels modules call
/// `_raw_spin_lock` and the like instead.
fn caller_in_modules<'a>(
    kernel: &Kernel<'a>,
    text: &dyn GuestMemory,
    targets: &[Gva],
) -> Result<Option<&'a str>, Refusal> {
    for module in kernel.modules.all()? {
        let start = module.text.start;
        let size = module.text.end.offset_from(start).unwrap_or(0);
        let bytes = read(text, start, size)?;
        // Bytes that look like such a call by chance are taken for one.
        let calls = |(at, code): (u64, &[u8])| {
            let distance = code[1..].first_chunk().map(|bytes| i32::from_le_bytes(*bytes))?;
            let next = start.0.wrapping_add(at + 5);
            (code[0] == insn::CALL).then(|| Gva(next.wrapping_add_signed(distance.into())))
        };
        if (0..).zip(bytes.windows(5)).filter_map(calls).any(|to| targets.contains(&to)) {
            return Ok(Some(&module.name));
        }
    }
    Ok(None)
}

/// The pointers of the operations with these targets.
fn pointers(kernel: &Kernel<'_>, ops: &LockOps, targets: [Gva; OPERATIONS.len()]) -> Vec<(Gva, Gva)> {
    ops.pointers.iter().map(|at| kernel.live(*at)).zip(targets).collect()
}

/// Refuses code whose first instruction changes its length, or is followed by others than NOPs: a task
/// may be preempted behind it.
fn keeps_its_length(code: &Code) -> Result<(), Refusal> {
    let first = |bytes: &[u8]| insn::decode(bytes, code.at).next().map(|insn| insn.len);
    let end = first(&code.old).filter(|end| first(&code.new) == Some(*end));
    let rest = |bytes: &[u8]| {
        end.and_then(|end| bytes.get(end..)).is_some_and(|rest| without_padding(rest, code.at).is_empty())
    };
    if rest(&code.old) && rest(&code.new) {
        return Ok(());
    }
    let inside = code.at.plus(first(&code.old).unwrap_or(0)).unwrap_or(code.at);
    Err(Refusal::InteriorReachable { at: code.at, inside, why: PREEMPTED })
}

/// Whether an operation's target is the native one or KVM's. Tracing and other hypervisors have their
/// own (kernel/locking/qspinlock.c and arch/x86/kernel/paravirt-spinlocks.c, 7.3, `contended_release`).
fn is_known(kernel: &Kernel<'_>, ops: &LockOps, index: usize, target: Gva) -> bool {
    target == kernel.live(ops.native[index]) || kernel.symbol(KVM[index]) == Ok(target)
}

/// The operations for which a feature stands in the alternatives at their sites: `unlock` and
/// `vcpu_is_preempted` (`X86_FEATURE_PVUNLOCK`, `X86_FEATURE_VCPUPREEMPT`), as far as the kernel has
/// these.
fn features(calls: &[LockCall<'_>]) -> Result<Vec<(usize, u16)>, Refusal> {
    let mut found: Vec<(usize, u16)> = Vec::new();
    for call in calls {
        for pair in call.site.features().map(|feature| (call.operation, feature)) {
            if found.contains(&pair) {
                continue;
            }
            if found.iter().any(|(operation, feature)| *operation == pair.0 || *feature == pair.1) {
                return Err(Refusal::UnknownLayout { what: "one feature for each lock operation" });
            }
            found.push(pair);
        }
    }
    Ok(found)
}

/// The feature that stands for `unlock`. `None` also if it can't be told: then no plan switches it.
pub(super) fn unlock_feature(kernel: &Kernel<'_>) -> Option<u16> {
    let ops = kernel.image.lock_ops()?;
    let features = features(&lock_calls(kernel, ops)).ok()?;
    features.iter().find(|(operation, _)| *operation == UNLOCK).map(|(_, feature)| *feature)
}

/// Updates the kernel's record of the features, which modules are patched by when they are loaded.
fn feature_words(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    after: &Overrides,
) -> Result<Vec<Datum>, Refusal> {
    let mut words: Vec<(Gva, u32, u32)> = Vec::new();
    for (feature, present) in &after.features {
        let at = kernel.feature_word(*feature)?;
        if words.iter().all(|(word, ..)| *word != at) {
            let old = read_u32(text, at)?;
            words.push((at, old, old));
        }
        for (_, _, new) in words.iter_mut().filter(|(word, ..)| *word == at) {
            let bit = 1 << (feature % 32);
            *new = if *present { *new | bit } else { *new & !bit };
        }
    }
    let bytes = |word: u32| word.to_le_bytes().to_vec();
    let changed = words.into_iter().filter(|(_, old, new)| old != new);
    Ok(changed.map(|(at, old, new)| Datum { at, old: bytes(old), new: bytes(new) }).collect())
}

/// A call of one of the operations.
struct LockCall<'a> {
    site: AltSite<'a>,
    /// Its index in [`OPERATIONS`].
    operation: usize,
    /// The operation's pointer, if the site is in `.parainstructions` (up to 6.7).
    pointer: Option<Gva>,
}

impl LockCall<'_> {
    fn code(
        &self,
        kernel: &Kernel<'_>,
        text: &dyn GuestMemory,
        overrides: &Overrides,
    ) -> Result<Vec<u8>, Refusal> {
        if let Some(chosen) = self.site.chosen(kernel, text, overrides)? {
            return self.site.code_of(kernel, text, chosen, overrides);
        }
        let at = self.site.at;
        let target = self.pointer.and_then(|pointer| overrides.target(pointer));
        let Some(target) = target else { return self.site.original(text) };
        let mut code = Vec::new();
        // An empty function is not called.
        if kernel.symbol("_paravirt_nop") != Ok(target) {
            code.extend(insn::call_rel32(at, target).ok_or(Refusal::OutOfReach { at, to: target })?);
        }
        code.extend(insn::nops(self.site.length.saturating_sub(code.len())));
        Ok(code)
    }
}

fn lock_calls<'a>(kernel: &Kernel<'a>, ops: &LockOps) -> Vec<LockCall<'a>> {
    let mut alt_sites = alt_sites(kernel);
    let tables = kernel.image.tables();
    let operation = |pointer: Gva| ops.pointers.iter().position(|at| *at == pointer);
    let Some(table) = &tables.paravirt_sites else {
        let call = |site: AltSite<'a>| {
            let operation = operation(kernel.linked(site.called_through()?))?;
            Some(LockCall { site, operation, pointer: None })
        };
        return alt_sites.into_values().filter_map(call).collect();
    };
    let call = |listed: &ParavirtSite| {
        let pointer = Gva(ops.table.0.wrapping_add(8 * u64::from(listed.operation)));
        let operation = operation(pointer)?;
        let at = kernel.live(listed.at);
        let mut site = alt_sites.remove(&at).unwrap_or_else(|| AltSite::empty(at));
        site.length = site.length.max(listed.len.into());
        Some(LockCall { site, operation, pointer: Some(kernel.live(pointer)) })
    };
    table.iter().filter_map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tables::Alternative;

    #[test]
    fn behind_a_call_that_may_be_preempted_only_nops_change() {
        let code = |old: &[u8], new: &[u8]| Code { at: Gva(0x1000), old: old.to_vec(), new: new.to_vec() };
        let call = [0xe8, 1, 2, 3, 4, 0x90];
        assert_eq!(keeps_its_length(&code(&call, &[0xe8, 5, 6, 7, 8, 0x90])), Ok(()));
        // xor eax, eax; a NOP of four bytes, in whose middle the call returned.
        let inlined = [0x31, 0xc0, 0x0f, 0x1f, 0x40, 0x00];
        for (old, new, inside) in [
            (&call[..], &inlined[..], Gva(0x1005)),
            (&inlined, &call, Gva(0x1002)),
            (&call, &[0xe8, 1, 2, 3, 4, 0xc3], Gva(0x1005)),
        ] {
            let refusal = Refusal::InteriorReachable { at: Gva(0x1000), inside, why: PREEMPTED };
            assert_eq!(keeps_its_length(&code(old, new)), Err(refusal));
        }
    }

    #[test]
    fn a_feature_stands_for_one_operation() {
        let entry = |feature| Alternative {
            at: Gva(0x1000),
            feature,
            inverted: true,
            original: vec![0x90],
            replacement: vec![0x90],
            replacement_at: Gva(0x2000),
            direct_call: false,
        };
        let (unlock, preempted, other) = (entry(276), entry(277), entry(278));
        let call = |operation, entry| LockCall { site: AltSite::of(entry), operation, pointer: None };
        let known = features(&[call(1, &unlock), call(4, &preempted), call(1, &unlock)]);
        assert_eq!(known, Ok(vec![(1, 276), (4, 277)]));
        for calls in [[call(1, &unlock), call(1, &other)], [call(1, &unlock), call(4, &unlock)]] {
            assert_eq!(features(&calls).map_err(|refusal| refusal.code()), Err("unknown_layout"));
        }
    }
}
