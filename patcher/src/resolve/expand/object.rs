//! Functions that are replaced by new code: what an object brings is placed, and a jump at the entry of each old
//! function leads to the new one.

use std::collections::BTreeSet;

use crate::addr::Gva;
use crate::image::profile::Capability;
use crate::insn;
use crate::linux::memory::{GuestMemory, read};
use crate::linux::view::{Kernel, missing};
use crate::object::Room;
use crate::object::replacement::{RETURN, Replacement, Return, Running, Unplaceable};
use crate::plan::refusal::Refusal;
use crate::resolve::expand::call_thunk::thunk;
use crate::resolve::expand::expansion::{Brought, Code, Datum, Expansion, Needs};
use crate::resolve::expand::paravirt;
use crate::resolve::expand::redirect::jump;
use crate::safety::old_code::Place;

/// Where functions return on a processor whose returns may not lie anywhere (Linux
/// Documentation/admin-guide/hw-vuln/indirect-target-selection.rst).
const ITS_RETURN: &str = "its_return_thunk";

/// Places what `replacement` brings in `room`, and leads the functions that it replaces there.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    replacement: &Replacement,
    room: &Room,
) -> Result<Expansion, Refusal> {
    let returns = returns(kernel, text, replacement)?;
    let not_replaceable = |what: &str| Err(Refusal::NotReplaceable { what: what.to_owned() });
    if replacement.is_indirect()
        && let Some(Return::Thunk(to)) = returns
        && kernel.function_at(to).is_some_and(|function| function.name == ITS_RETURN)
    {
        return not_replaceable(
            "the new code branches to where a register says, and the guest's kernel has each such branch where its \
             processor may have it (indirect target selection); that is not done for new code yet",
        );
    }
    for at in replacement.taken() {
        let at = kernel.live(*at);
        if read(text, at, insn::MARKER)? != insn::ENDBR64 {
            let name = kernel.identify(at).unwrap_or_else(|| at.to_string());
            return Err(Refusal::NotReplaceable {
                what: format!("the new code takes the address of {name}, which the kernel has sealed (IBT)"),
            });
        }
    }
    if replacement.has_bugs() {
        kernel.image.profile().require(Capability::BugTables).map_err(missing)?;
    }
    if replacement.has_faults() {
        for needed in [Capability::ModuleTree, Capability::Modules] {
            kernel.image.profile().require(needed).map_err(missing)?;
        }
    }
    let features = features(kernel, text, replacement)?;
    let running = Running { slide: kernel.slide, returns, features: &features };
    let placed = replacement.place(room, running).map_err(|error| match error {
        Unplaceable::DirectCall { .. } => Refusal::NotReplaceable { what: error.to_string() },
        _ => Refusal::NoRoom { why: error.to_string() },
    })?;
    let mut expansion = Expansion { needs: Needs::Left, ..Expansion::default() };
    let mut old = Vec::new();
    for (name, from, to) in &placed.functions {
        if thunk(kernel, text, *from).is_some() {
            return not_replaceable(
                "the guest's kernel counts the depth of its calls (retbleed=stuff); that is not done for new code yet",
            );
        }
        expansion.code.push(entry(kernel, text, name, *from, *to)?);
        old.push(Place::of(kernel, *from, name)?);
    }
    let count = |(at, before, after): (Gva, u32, u32)| Datum {
        at,
        old: before.to_le_bytes().to_vec(),
        new: after.to_le_bytes().to_vec(),
    };
    let counts = placed.counts.into_iter().map(count).collect();
    expansion.brought = Some(Brought { pieces: placed.pieces, old, left: placed.left, counts });
    Ok(expansion)
}

/// Which of the CPU features the kernel has that the new code depends on.
fn features(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    replacement: &Replacement,
) -> Result<BTreeSet<u16>, Refusal> {
    let asked = replacement.features();
    // No later plan tells code that was placed.
    if !asked.is_empty() && paravirt::unlock_feature(kernel).is_some_and(|unlock| asked.contains(&unlock)) {
        return Err(Refusal::NotReplaceable {
            what:
                "the new code releases spinlocks by itself, and how that is done a plan may switch (paravirt)"
                    .to_owned(),
        });
    }
    let mut present = BTreeSet::new();
    for feature in asked {
        if kernel.has_feature(text, feature)? {
            present.insert(feature);
        }
    }
    Ok(present)
}

/// The jump at the entry of an old function. It goes behind the place for the tracer, so that the guest's tracer, its
/// BPF programs and its kprobes there go on, come and go; a BPF program calls what is behind that place. Nobody is
/// inside when it is written, so it may take the place of several instructions.
fn entry(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    name: &str,
    from: Gva,
    to: Gva,
) -> Result<Code, Refusal> {
    let is_switched = |code: &Code| {
        let end = code.at.plus(code.old.len()).unwrap_or(code.at);
        kernel.image.tables().is_patched_from(kernel.linked(code.at), kernel.linked(end))
    };
    let behind = jump(kernel, text, from, to, true)?;
    if !is_switched(&behind) {
        return Ok(behind);
    }
    let first = jump(kernel, text, from, to, false)?;
    if kernel.is_fentry(first.at) {
        return Ok(first);
    }
    Err(Refusal::NotReplaceable {
        what: format!(
            "{name} begins with code that the guest's kernel changes itself, so a jump can't stay there"
        ),
    })
}

/// How functions of the object return in the running kernel.
fn returns(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    replacement: &Replacement,
) -> Result<Option<Return>, Refusal> {
    let mut forms = BTreeSet::new();
    for at in replacement.returns() {
        let at = kernel.live(*at);
        let code: Vec<u8> = read(text, at, RETURN)?;
        let code = <[u8; RETURN]>::try_from(code).ok().and_then(|code| Return::read(code, at));
        let Some(form) = code else {
            let what = format!("{at} does not return as a function of any known kernel does");
            return Err(Refusal::NotReplaceable { what });
        };
        forms.insert(match form {
            Return::Plain => None,
            Return::Thunk(to) => Some(to),
        });
    }
    let form = |to: Option<Gva>| to.map_or(Return::Plain, Return::Thunk);
    match forms.len() {
        0 => Ok(None),
        1 => Ok(forms.pop_first().map(form)),
        _ => Err(Refusal::NotReplaceable {
            what: "the functions of the object return in several ways in the guest's kernel".to_owned(),
        }),
    }
}
