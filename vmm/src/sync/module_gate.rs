//! The gate for modules: two doors in the guest's kernel, each an `int3`, that every module passes before
//! its init runs and before its memory is freed. A vCPU that comes to a door asks here whether the module
//! may pass, and the controller says when.
//!
//! ```text
//!   vCPU: int3 ─▶ ask ─▶ not decided: wait a moment, enter the guest again (takes interrupts), int3 ...
//!                  └───▶ it may pass: the vCPU does what the int3 stands for
//! ```
//!
//! A vCPU at a door never waits long out of the guest: another that patches text may wait for it to
//! answer an interrupt, and holds the locks that the controller's program needs. What is decided is
//! decided for a module, not for a vCPU: the task may come to the door again on another one.

use std::collections::BTreeMap;
use std::time::Duration;

use patcher::addr::Gva;
use patcher::insn::push::Push;

use crate::host::lock::{Condvar, Mutex};

/// Longest time that a vCPU stays out of the guest at a door.
const MOMENT: Duration = Duration::from_millis(1);
/// More modules than these do not come to the doors at once. What is forgotten is asked again.
const MOST_WAITING: usize = 256;

/// A door.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// A module is complete, and its init did not run yet.
    Comes,
    /// A module's exit is behind it, or its init has failed, and its memory is not freed yet.
    Goes,
}

/// What a vCPU does that is at a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// It goes through.
    Open,
    /// The controller must be told; then it waits.
    New,
    /// It waits.
    Undecided,
}

/// The gate of one VM.
#[derive(Debug, Default)]
pub struct ModuleGate {
    state: Mutex<State>,
    decided: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// `None` while the gate is open.
    doors: Option<[Push; 2]>,
    /// The modules at the doors, by their `struct module`, and whether they may pass.
    modules: BTreeMap<(Door, Gva), bool>,
}

impl ModuleGate {
    // The vCPU threads' side.

    /// The door at an address, and the instruction that its `int3` stands for.
    #[must_use]
    pub fn door_at(&self, at: Gva) -> Option<(Door, Push)> {
        let [comes, goes] = self.state.lock().doors?;
        [(Door::Comes, comes), (Door::Goes, goes)].into_iter().find(|(_, push)| push.at == at)
    }

    /// Asks for a module to pass a door. It passes once for each time that it was let.
    pub fn ask(&self, door: Door, module: Gva) -> Passage {
        let mut state = self.state.lock();
        match state.modules.get(&(door, module)) {
            Some(true) => {
                state.modules.remove(&(door, module));
                Passage::Open
            }
            Some(false) => Passage::Undecided,
            None => {
                if state.modules.len() == MOST_WAITING {
                    state.modules.clear();
                }
                state.modules.insert((door, module), false);
                Passage::New
            }
        }
    }

    /// Waits a moment, or until a module may pass a door.
    pub fn wait(&self, door: Door, module: Gva) {
        let mut state = self.state.lock();
        if state.modules.get(&(door, module)) == Some(&false) {
            self.decided.wait_for(&mut state, MOMENT);
        }
    }

    // The controller's side.

    /// Makes the doors known, before their `int3`s are written.
    pub fn close(&self, doors: [Push; 2]) {
        self.state.lock().doors = Some(doors);
    }

    /// Forgets them, once their `int3`s are gone.
    pub fn open(&self) {
        *self.state.lock() = State::default();
        self.decided.notify_all();
    }

    /// The doors, while the gate is closed.
    #[must_use]
    pub fn doors(&self) -> Option<[Push; 2]> {
        self.state.lock().doors
    }

    /// A module that is to be decided about.
    #[must_use]
    pub fn undecided(&self) -> Option<(Door, Gva)> {
        let state = self.state.lock();
        state.modules.iter().find(|(_, may_pass)| !**may_pass).map(|(at, _)| *at)
    }

    /// Lets a module pass a door.
    pub fn let_pass(&self, door: Door, module: Gva) {
        self.state.lock().modules.insert((door, module), true);
        self.decided.notify_all();
    }

    /// Puts the decision off: the vCPU will ask again.
    pub fn put_off(&self, door: Door, module: Gva) {
        self.state.lock().modules.remove(&(door, module));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMES: Push = Push { at: Gva(0x1000), register: 12, next: Gva(0x1002) };
    const GOES: Push = Push { at: Gva(0x2000), register: 3, next: Gva(0x2001) };
    const MODULE: Gva = Gva(0x5000);

    fn closed() -> ModuleGate {
        let gate = ModuleGate::default();
        gate.close([COMES, GOES]);
        gate
    }

    #[test]
    fn a_module_passes_once_for_each_time_that_it_was_let() {
        let gate = closed();
        assert_eq!(gate.door_at(COMES.at), Some((Door::Comes, COMES)));
        assert_eq!(gate.door_at(GOES.at), Some((Door::Goes, GOES)));
        assert_eq!(gate.door_at(Gva(0x1001)), None);
        assert_eq!(gate.ask(Door::Comes, MODULE), Passage::New);
        assert_eq!(gate.ask(Door::Comes, MODULE), Passage::Undecided, "on another vCPU, perhaps");
        assert_eq!(gate.undecided(), Some((Door::Comes, MODULE)));
        gate.wait(Door::Comes, MODULE);
        gate.let_pass(Door::Comes, MODULE);
        assert_eq!(gate.undecided(), None);
        assert_eq!(gate.ask(Door::Goes, MODULE), Passage::New, "the other door");
        assert_eq!(gate.ask(Door::Comes, MODULE), Passage::Open);
        assert_eq!(gate.ask(Door::Comes, MODULE), Passage::New, "it is loaded again");
        gate.put_off(Door::Comes, MODULE);
        assert_eq!(gate.ask(Door::Comes, MODULE), Passage::New);
    }

    #[test]
    fn an_open_gate_has_no_doors_and_remembers_nothing() {
        let gate = closed();
        assert_eq!(gate.ask(Door::Goes, MODULE), Passage::New);
        gate.open();
        assert_eq!((gate.doors(), gate.door_at(GOES.at), gate.undecided()), (None, None, None));
    }

    #[test]
    fn what_a_guest_makes_up_is_bounded() {
        let gate = closed();
        for module in 0..10 * MOST_WAITING as u64 {
            gate.ask(Door::Comes, Gva(module));
            assert!(gate.state.lock().modules.len() <= MOST_WAITING);
        }
    }
}
