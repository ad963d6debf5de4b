//! What is measured: on which hosts, what work, by which methods.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A host with a guest, or two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Host {
    /// vCPUs of each guest.
    pub vcpus: u8,
    /// Whether every vCPU runs the workload.
    pub busy: bool,
    /// How many processes do nothing but keep a CPU of the host busy.
    pub hogs: u8,
    /// How many guests run side by side. The first is the one that is patched.
    pub vms: u8,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = if self.busy { "busy" } else { "idle" };
        write!(f, "{} vCPUs {load}, {} hogs", self.vcpus, self.hogs)?;
        if self.vms > 1 { write!(f, ", {} VMs", self.vms) } else { Ok(()) }
    }
}

/// Noisy neighbours, where there are any.
pub const HOGS: u8 = 4;
/// How many vCPUs a guest has, on a host with two CPUs.
pub const VCPUS: [u8; 5] = [2, 4, 8, 16, 32];

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Everything, which takes hours.
    Whole,
    /// Two hosts, in minutes.
    Quick,
    /// One host, everything twice: that it all works and is reported.
    Smoke,
}

/// The hosts of a form.
#[must_use]
pub fn hosts(form: Form) -> Vec<Host> {
    let beside_hogs = |vcpus| Host { vcpus, busy: true, hogs: HOGS, vms: 1 };
    match form {
        Form::Whole => {}
        Form::Quick => return [2, 8].map(beside_hogs).to_vec(),
        Form::Smoke => return vec![beside_hogs(2)],
    }
    let mut hosts = Vec::new();
    for vcpus in VCPUS {
        for busy in [false, true] {
            for hogs in [0, HOGS] {
                hosts.push(Host { vcpus, busy, hogs, vms: 1 });
            }
        }
    }
    hosts.extend([0, HOGS].map(|hogs| Host { vcpus: 8, busy: true, hogs, vms: 2 }));
    hosts
}

/// What is to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// The entry of a function that the workload calls.
    OneSite,
    /// The static key `sched_schedstats`, with all its jumps.
    Key,
    /// The entries of 4,096 functions.
    ManySites,
}

/// How many sites are many.
pub const MANY: usize = 4096;

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneSite => "one site",
            Self::Key => "static key",
            Self::ManySites => "4,096 sites",
        })
    }
}

/// Who changes it, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Ours: one store.
    Store,
    /// Ours: breakpoints and fences.
    Breakpoint,
    /// Ours: the same, with copies of the old code.
    Bypass,
    /// Ours: no vCPU runs meanwhile, none is waited for.
    Hold,
    /// Every vCPU is signalled and waited for, then let go on: the pause of any monitor. Nothing
    /// is written, which would take microseconds.
    Pause,
    /// Ours: the same, but the host runs those who are waited for before others.
    HurriedPause,
    /// The guest's own `text_poke`, by its own file for the key.
    TextPoke,
    /// The guest's own `stop_machine`, by switching its clock source.
    StopMachine,
    /// The guest's own livepatch of the same function, until it is in force in all tasks.
    Livepatch,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Store => "store",
            Self::Breakpoint => "breakpoint",
            Self::Bypass => "bypass",
            Self::Hold => "hold",
            Self::Pause => "signal-and-wait pause",
            Self::HurriedPause => "our pause",
            Self::TextPoke => "guest text_poke",
            Self::StopMachine => "guest stop_machine",
            Self::Livepatch => "guest livepatch",
        })
    }
}

impl Work {
    /// By which methods it is done.
    #[must_use]
    pub fn methods(self) -> &'static [Method] {
        use Method::{
            Breakpoint, Bypass, Hold, HurriedPause, Livepatch, Pause, StopMachine, Store, TextPoke,
        };
        match self {
            Self::OneSite => &[Store, Breakpoint, Bypass, Hold, HurriedPause, Pause, StopMachine, Livepatch],
            Self::Key => &[Breakpoint, Bypass, Hold, TextPoke],
            Self::ManySites => &[Breakpoint, Hold],
        }
    }
}

/// All work.
pub const WORKS: [Work; 3] = [Work::OneSite, Work::Key, Work::ManySites];
