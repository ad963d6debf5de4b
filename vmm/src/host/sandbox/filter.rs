//! The seccomp filters of a thread (seccomp(2)), from the lists in [`super::calls`].
//!
//! There are two, and the kernel takes the stricter verdict of them: one refuses what opens files with `EACCES`,
//! the other traps what is not listed.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::calls::{self, Call, EVERY_THREAD, REFUSED, When};
use crate::host::thread::Thread;

/// Both filters of a thread, in the order in which they are installed.
pub(super) fn of(thread: Thread, process: u64) -> Result<[BpfProgram; 2], BackendError> {
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.map(|number| (number, Vec::new())).into();
    // A call without rules is allowed with any arguments.
    let (mut any, mut some) = (Vec::new(), Vec::new());
    for call in EVERY_THREAD.iter().chain(calls::of(thread)).flat_map(|group| group.calls) {
        match call.when {
            When::Always => any.push(call.number),
            _ => some.push(call),
        }
    }
    allowed.extend(any.into_iter().map(|number| (number, Vec::new())));
    for call in some {
        let is_free = allowed.get(&call.number).is_some_and(Vec::is_empty);
        if !is_free {
            allowed.entry(call.number).or_default().extend(rules(call, process)?);
        }
    }
    let refused = REFUSED.map(|number| (number, Vec::new())).into();
    let denied = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    Ok([
        SeccompFilter::new(refused, SeccompAction::Allow, denied, TargetArch::x86_64)?.try_into()?,
        SeccompFilter::new(allowed, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?
            .try_into()?,
    ])
}

/// One rule for each of the values that are allowed.
fn rules(call: &Call, process: u64) -> Result<Vec<SeccompRule>, BackendError> {
    // The kernel looks at the lower half only of what is a number of ours: a request, a signal, a flag.
    let condition = |argument, op, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
    match call.when {
        When::Always => Ok(Vec::new()),
        When::Is(argument, values) => values
            .iter()
            .map(|&value| SeccompRule::new(vec![condition(argument, SeccompCmpOp::Eq, value)?]))
            .collect(),
        When::Lacks(argument, bits) => {
            Ok(vec![SeccompRule::new(vec![condition(argument, SeccompCmpOp::MaskedEq(bits), 0)?])?])
        }
        When::ToItself(signals) => signals
            .iter()
            .map(|&signal| {
                SeccompRule::new(vec![
                    condition(0, SeccompCmpOp::Eq, process)?,
                    condition(2, SeccompCmpOp::Eq, signal)?,
                ])
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_filters() {
        for thread in Thread::ALL {
            let filters = of(thread, 1).expect("it compiles");
            assert!(filters.iter().all(|filter| !filter.is_empty()), "{thread}");
        }
    }

    /// A call that is always allowed makes its conditions void.
    #[test]
    fn no_condition_is_void() {
        for thread in Thread::ALL {
            let own = calls::of(thread);
            let any = |number| {
                own.iter()
                    .flat_map(|group| group.calls)
                    .any(|call: &Call| call.number == number && matches!(call.when, When::Always))
            };
            for call in own.iter().flat_map(|group| group.calls) {
                assert!(matches!(call.when, When::Always) || !any(call.number), "{thread}: {}", call.number);
            }
        }
    }
}
