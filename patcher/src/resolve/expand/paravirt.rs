//! The guest's spinlocks, switched between the native ones and those that call the host while they
//! wait (Linux arch/x86/kernel/kvm.c, `kvm_spinlock_init`).
//!
//! Lock and unlock belong together: only a paravirtual unlock wakes a waiter that halted. So all
//! operations change at once, while no vCPU holds a spinlock or waits for one. A free lock looks the
//! same to both.
//!
//! What a site holds follows from the pointers in `pv_ops`, as at boot: a direct call of the pointer's
//! target. On bare metal, `unlock` and `vcpu_is_preempted` are inlined by an alternative, whose feature
//! stands for the pointer (arch/x86/kernel/paravirt.c, `paravirt_set_cap`).

use crate::addr::Gva;
use crate::image::lock_ops::{IS_PREEMPTED, LockOps, OPERATIONS, UNLOCK};
use crate::insn;
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u32, read_u64};
use crate::plan::Spinlocks;
use crate::plan::refusal::Refusal;
use crate::resolve::expand::alternatives::{AltSite, Overrides, alt_sites, same};
use crate::resolve::expand::expansion::{Code, Datum, Expansion, Needs};
use crate::safety::interior::counts_spinlocks;

/// The targets that KVM's guest support installs.
const KVM: [&str; OPERATIONS.len()] = [
    "__pv_queued_spin_lock_slowpath",
    "__raw_callee_save___pv_queued_spin_unlock",
    "kvm_wait",
    "kvm_kick_cpu",
    "__raw_callee_save___kvm_vcpu_is_preempted",
];
/// `X86_FEATURE_PVUNLOCK` and `X86_FEATURE_VCPUPREEMPT` (5.12 and later).
const PVUNLOCK: u16 = 8 * 32 + 20;
const VCPUPREEMPT: u16 = 8 * 32 + 21;

pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    to: Spinlocks,
) -> Result<Expansion, Refusal> {
    let ops = kernel.image.lock_ops().ok_or(Refusal::UnknownLayout { what: "struct pv_lock_ops" })?;
    let busy = |why: &str| Refusal::Busy { name: "spinlocks".into(), why: why.into() };
    if !counts_spinlocks(*kernel) {
        return Err(busy("the guest's kernel does not count held spinlocks (CONFIG_PREEMPT_COUNT)"));
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
    // The tables hold the kernel's own sites only; those of a module are dropped after loading.
    if let Some(module) = caller_in_modules(kernel, text, &[present, wanted].concat())? {
        return Err(busy(&format!("the module {module} does without the kernel's lock functions")));
    }
    let (before, after) = (overrides(kernel, ops, present), overrides(kernel, ops, wanted));
    let mut code = Vec::new();
    for call in lock_calls(kernel, ops) {
        if kernel.is_init(call.site.at) {
            continue;
        }
        let old = call.code(kernel, text, &before)?;
        let there = read(text, call.site.at, old.len())?;
        if !same(&there, &old, call.site.at) {
            return Err(Refusal::ExpectMismatch { at: call.site.at, expected: old, found: there });
        }
        let new = call.code(kernel, text, &after)?;
        if !same(&there, &new, call.site.at) {
            code.push(Code { at: call.site.at, old: there, new });
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
    data.extend(features(kernel, text, &after)?);
    Ok(Expansion { code, data, needs: Needs::Unlocked })
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

/// The pointers of the operations, and the features that stand for two of them.
fn overrides(kernel: &Kernel<'_>, ops: &LockOps, targets: [Gva; OPERATIONS.len()]) -> Overrides {
    let is_native = |index: usize| targets[index] == kernel.live(ops.native[index]);
    Overrides {
        features: vec![(PVUNLOCK, !is_native(UNLOCK)), (VCPUPREEMPT, !is_native(IS_PREEMPTED))],
        pointers: ops.pointers.iter().map(|at| kernel.live(*at)).zip(targets).collect(),
    }
}

/// Updates the kernel's record of the features, which modules are patched by when they are loaded.
fn features(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    after: &Overrides,
) -> Result<Option<Datum>, Refusal> {
    let at = kernel.feature_word(PVUNLOCK)?;
    let old = read_u32(text, at)?;
    let mut new = old;
    for (feature, present) in &after.features {
        let bit = 1 << (feature % 32);
        new = if *present { new | bit } else { new & !bit };
    }
    let bytes = |word: u32| word.to_le_bytes().to_vec();
    Ok((old != new).then(|| Datum { at, old: bytes(old), new: bytes(new) }))
}

/// A call of one of the operations.
struct LockCall<'a> {
    site: AltSite<'a>,
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
    let Some(table) = &tables.paravirt_sites else {
        let calls_one = |site: &AltSite<'_>| {
            let pointer = site.called_through();
            pointer.is_some_and(|pointer| ops.pointers.contains(&kernel.linked(pointer)))
        };
        let concerned = alt_sites.into_values().filter(calls_one);
        return concerned.map(|site| LockCall { site, pointer: None }).collect();
    };
    let pointer = |operation: u8| Gva(ops.table.0.wrapping_add(8 * u64::from(operation)));
    table
        .iter()
        .filter(|listed| ops.pointers.contains(&pointer(listed.operation)))
        .map(|listed| {
            let at = kernel.live(listed.at);
            let mut site = alt_sites.remove(&at).unwrap_or_else(|| AltSite::empty(at));
            site.length = site.length.max(listed.len.into());
            LockCall { site, pointer: Some(kernel.live(pointer(listed.operation))) }
        })
        .collect()
}
