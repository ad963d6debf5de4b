//! Privileges that are given up, and limits of the whole process.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

/// Most descriptors: 64 vCPUs with two each, 64 connections, and what there is of everything else.
const MOST_DESCRIPTORS: u64 = 320;
/// The priority at which vCPUs are hurried (see [`crate::kvm::kick`]).
const HURRIED: u64 = 1;

/// Sets the limits of the process: descriptors, and the real-time priority that it may use without a capability.
/// Returns the capabilities that the process can't do without, because that limit can't be raised.
///
/// # Errors
/// What the system returned.
pub(super) fn limit() -> io::Result<CapabilitySet> {
    let now = getrlimit(Resource::Nofile);
    let most = |limit: Option<u64>| Some(limit.map_or(MOST_DESCRIPTORS, |limit| limit.min(MOST_DESCRIPTORS)));
    setrlimit(Resource::Nofile, Rlimit { current: most(now.current), maximum: most(now.maximum) })?;
    let realtime = Rlimit { current: Some(HURRIED), maximum: Some(HURRIED) };
    match setrlimit(Resource::Rtprio, realtime) {
        Ok(()) => Ok(CapabilitySet::empty()),
        // Without the privilege to raise it. Then what may set priorities is kept, if there is anything.
        Err(Errno::PERM) => Ok(CapabilitySet::SYS_NICE),
        Err(error) => Err(error.into()),
    }
}

/// Takes from the calling thread every capability but those in `kept`, for ever.
///
/// # Errors
/// What the system returned.
pub(super) fn drop_all_but(kept: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    let held = capabilities(None)?.permitted & kept;
    let inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: held, permitted: held, inheritable })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_gone_for_ever() {
        std::thread::spawn(|| {
            let before = capabilities(None).expect("capabilities");
            drop_all_but(CapabilitySet::SYS_NICE).expect("dropped");
            let now = capabilities(None).expect("capabilities");
            assert_eq!(now.permitted, before.permitted & CapabilitySet::SYS_NICE);
            assert_eq!(now.effective, now.permitted);
            drop_all_but(CapabilitySet::empty()).expect("dropped");
            assert!(capabilities(None).expect("capabilities").permitted.is_empty());
            if !before.permitted.is_empty() {
                assert_eq!(set_capabilities(None, before), Err(Errno::PERM));
            }
        })
        .join()
        .expect("it ended");
    }
}
