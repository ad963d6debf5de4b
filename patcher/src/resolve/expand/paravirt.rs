//! The spinlocks of a guest, switched between those of a bare machine and those that tell the
//! host when they wait (Linux arch/x86/kernel/kvm.c, `kvm_spinlock_init`).
//!
//! Lock and unlock belong together: a waiter that halted is only woken by an unlock that
//! knows of it. So all operations change as one, while no vCPU holds or waits for a spinlock:
//! both kinds agree about a lock that nobody holds.
//!
//! What a site looks like follows from the pointers in `pv_ops`, as at boot: a direct call of
//! what the pointer says, and, on a bare machine, for `unlock` and `vcpu_is_preempted` the
//! operation itself, which is an alternative by a feature that stands for the pointer
//! (arch/x86/kernel/paravirt.c, `paravirt_set_cap`).

use crate::addr::Gva;
use crate::image::lock_ops::{IS_PREEMPTED, LockOps, OPERATIONS, UNLOCK};
use crate::insn;
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u32, read_u64};
use crate::plan::Spinlocks;
use crate::plan::refusal::Refusal;
use crate::resolve::expand::alternatives::{Place, World, places, same};
use crate::resolve::expand::expansion::{Code, Datum, Expansion, Needs};
use crate::safety::interior::counts_spinlocks;

/// What KVM's guest support puts in.
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
    if !counts_spinlocks(*kernel, text) {
        return Err(busy("the guest's kernel does not count who holds one"));
    }
    let mut wanted = ops.native.map(|at| kernel.live(at));
    if to == Spinlocks::Kvm {
        for (target, name) in wanted.iter_mut().zip(KVM) {
            *target = kernel.symbol(name)?;
        }
        // Without it the first waiter would write to address 0 and up.
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
    // Only the kernel's own sites are in its tables; a module's are forgotten once it is loaded.
    if let Some(module) = caller_in_modules(kernel, text, &[present, wanted].concat())? {
        return Err(busy(&format!("the module {module} does without the kernel's lock functions")));
    }
    let (before, after) = (world(kernel, ops, present), world(kernel, ops, wanted));
    let mut code = Vec::new();
    for site in sites(kernel, ops) {
        if kernel.is_init(site.place.at) {
            continue;
        }
        let old = site.code(kernel, text, &before)?;
        let there = read(text, site.place.at, old.len())?;
        if !same(&there, &old, site.place.at) {
            return Err(Refusal::ExpectMismatch { at: site.place.at, expected: old, found: there });
        }
        let new = site.code(kernel, text, &after)?;
        if !same(&there, &new, site.place.at) {
            code.push(Code { at: site.place.at, old: there, new });
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

/// A module that calls one of these itself. On kernels that preempt, modules lock by calling
/// `_raw_spin_lock` and its like.
fn caller_in_modules<'a>(
    kernel: &Kernel<'a>,
    text: &dyn GuestMemory,
    targets: &[Gva],
) -> Result<Option<&'a str>, Refusal> {
    const CALL: u8 = 0xe8;
    for module in kernel.modules.all()? {
        let start = module.text.start;
        let size = module.text.end.offset_from(start).unwrap_or(0);
        let bytes = read(text, start, size)?;
        // What looks like such a call by chance is taken for one: nothing else goes there.
        let calls = |(at, code): (u64, &[u8])| {
            let distance = code[1..].first_chunk().map(|bytes| i32::from_le_bytes(*bytes))?;
            let next = start.0.wrapping_add(at + 5);
            (code[0] == CALL).then(|| Gva(next.wrapping_add_signed(distance.into())))
        };
        if (0..).zip(bytes.windows(5)).filter_map(calls).any(|to| targets.contains(&to)) {
            return Ok(Some(&module.name));
        }
    }
    Ok(None)
}

/// The pointers, and the features that stand for them.
fn world(kernel: &Kernel<'_>, ops: &LockOps, targets: [Gva; OPERATIONS.len()]) -> World {
    let is_native = |index: usize| targets[index] == kernel.live(ops.native[index]);
    World {
        features: vec![(PVUNLOCK, !is_native(UNLOCK)), (VCPUPREEMPT, !is_native(IS_PREEMPTED))],
        pointers: ops.pointers.iter().map(|at| kernel.live(*at)).zip(targets).collect(),
    }
}

/// Modules that are loaded later look at the kernel's own note of the features.
fn features(kernel: &Kernel<'_>, text: &dyn GuestMemory, after: &World) -> Result<Option<Datum>, Refusal> {
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
struct Site<'a> {
    place: Place<'a>,
    /// The operation's pointer, where a table apart from the alternatives says that it is
    /// called directly (up to 6.7).
    pointer: Option<Gva>,
}

impl Site<'_> {
    fn code(&self, kernel: &Kernel<'_>, text: &dyn GuestMemory, world: &World) -> Result<Vec<u8>, Refusal> {
        if let Some(chosen) = self.place.chosen(kernel, text, world)? {
            return self.place.code_of(kernel, text, chosen, world);
        }
        let at = self.place.at;
        let target = self.pointer.and_then(|pointer| world.target(pointer));
        let Some(target) = target else { return self.place.original(text) };
        let mut code = Vec::new();
        // What does nothing is not called.
        if kernel.symbol("_paravirt_nop") != Ok(target) {
            code.extend(insn::call_rel32(at, target).ok_or(Refusal::OutOfReach { at, to: target })?);
        }
        code.extend(insn::nops(self.place.length.saturating_sub(code.len())));
        Ok(code)
    }
}

fn sites<'a>(kernel: &Kernel<'a>, ops: &LockOps) -> Vec<Site<'a>> {
    let mut places = places(kernel);
    let tables = kernel.image.tables();
    let Some(table) = &tables.paravirt_sites else {
        let calls_one = |place: &Place<'_>| {
            let pointer = place.called_through();
            pointer.is_some_and(|pointer| ops.pointers.contains(&kernel.linked(pointer)))
        };
        let concerned = places.into_values().filter(calls_one);
        return concerned.map(|place| Site { place, pointer: None }).collect();
    };
    let pointer = |operation: u8| Gva(ops.table.0.wrapping_add(8 * u64::from(operation)));
    table
        .iter()
        .filter(|site| ops.pointers.contains(&pointer(site.operation)))
        .map(|site| {
            let at = kernel.live(site.at);
            let mut place = places.remove(&at).unwrap_or_else(|| Place::empty(at));
            place.length = place.length.max(site.len.into());
            Site { place, pointer: Some(kernel.live(pointer(site.operation))) }
        })
        .collect()
}
