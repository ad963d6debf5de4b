//! Closes the gate for modules and opens it, and decides about the modules at its doors.
//!
//! ```text
//!   a plan that concerns modules ─▶ close ─▶ keep, as long as a patch or a pending plan needs it ─▶ open
//!                                              │
//!            a module at a door ─▶ decide ─────┤ it comes: apply the plans that wait for it
//!                                              └ it goes: take patches back, let go of their sites
//! ```
//!
//! `docs/modules.md` has the argument.

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::insn::INT3;
use patcher::insn::push::{Push, first_push};
use patcher::linux::Module;
use patcher::linux::bounded::{Bounded, INSPECTION};
use patcher::linux::kprobes::{among, probes};
use patcher::linux::memory::read;
use patcher::plan::refusal::Refusal;
use patcher::safety::blockers;

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::guest::locks::are_free;
use crate::patch::doors::{Gate, LONGEST};
use crate::patch::engine::Engine;
use crate::patch::executor::PATIENCE;
use crate::patch::kernel_locks::wait_while_taken;
use crate::patch::outcome::of_result;
use crate::sync::module_gate::Door;

/// How long closing waits for a guest that patches itself.
const CLOSING: Duration = Duration::from_secs(2);
/// More modules than these are not known to be complete.
const MOST_COMPLETE: usize = 4096;

impl Engine {
    /// Has modules stop at the doors from now on.
    pub(super) fn close_module_gate(&mut self) -> Result<(), Refusal> {
        self.not_held()?;
        if self.gate.is_closed() {
            return Ok(());
        }
        let unseen = |why: &str| Refusal::ModulesUnseen { why: why.to_owned() };
        let kernel = self.kernel()?.clone();
        let doors = kernel.kernel().image.landmarks().module_doors.ok_or_else(|| {
            unseen("do_init_module or free_module is not found, or does not begin as expected")
        })?;
        let live = |at: Gva| kernel.kernel().live(at);
        let doors = doors.map(|push| Push { at: live(push.at), next: live(push.next), ..push });
        self.audit.intend()?;
        self.rendezvous.module_gate().close(doors);
        let armed = self.rendezvous.arm(PATIENCE).map_err(|error| unseen(&error.to_string()));
        match armed.and_then(|()| self.write_doors(&kernel, &doors)) {
            Ok(doors) => {
                self.gate.doors = doors;
                Ok(())
            }
            Err(refusal) => {
                self.forget_doors();
                Err(refusal)
            }
        }
    }

    /// Writes the `int3`s while no vCPU runs, the guest does not patch itself, and the code is the image's.
    fn write_doors(&self, kernel: &GuestKernel, doors: &[Push; 2]) -> Result<Vec<(Push, u8)>, Refusal> {
        let unseen = |why: String| Refusal::ModulesUnseen { why };
        let locks = blockers::locks(&kernel.kernel());
        let until = Instant::now() + CLOSING;
        loop {
            wait_while_taken(kernel, &locks, until);
            let held = self.rendezvous.hold(PATIENCE);
            let written = held.map_err(|error| unseen(error.to_string())).and_then(|()| {
                if are_free(kernel, &locks) { write_doors(kernel, doors).map(Some) } else { Ok(None) }
            });
            self.rendezvous.release();
            match written? {
                Some(written) => return Ok(written),
                None if Instant::now() > until => {
                    return Err(unseen("the guest was patching itself all the time".to_owned()));
                }
                None => {}
            }
        }
    }

    /// Lets modules pass unseen.
    fn open_module_gate(&mut self) -> Result<(), Refusal> {
        if let Some(kernel) = self.known_kernel().cloned()
            && self.gate.is_closed()
        {
            self.audit.intend()?;
            let memory = CachedTranslations::of(&kernel);
            // Without the hold, a vCPU fetches the old instruction or exits, finds the new byte, and
            // fetches again; the write is of one byte.
            let _ = self.rendezvous.hold(PATIENCE);
            for (door, byte) in &self.gate.doors {
                // What the guest wrote there is its own.
                if memory.compare(door.at, &[INT3]) == Ok(Ok(())) {
                    let _ = memory.write(door.at, &[*byte]);
                }
            }
            self.rendezvous.release();
        }
        self.forget_doors();
        Ok(())
    }

    /// Takes the gate for open, whatever is in memory.
    pub(super) fn forget_doors(&mut self) {
        self.gate = Gate::default();
        self.rendezvous.module_gate().open();
        self.rendezvous.disarm();
    }

    /// Opens the gate once nothing needs it, and closes it again if the guest has overwritten a door.
    pub(super) fn keep_module_gate(&mut self) {
        if self.held_by.is_some()
            || !self.gate.is_closed() && self.pending.is_empty() && self.named_modules.is_empty()
        {
            return;
        }
        let applied = |name: &String| self.patches.applied().any(|patch| patch.plan.name == *name);
        let names: Vec<String> = self.named_modules.keys().filter(|name| applied(name)).cloned().collect();
        self.named_modules.retain(|name, _| names.contains(name));
        if names.is_empty() && self.pending.is_empty() {
            // Tried again after the next message if the audit log can't be written.
            let _ = self.by_itself("open_module_gate", "", Self::open_module_gate, of_result);
            return;
        }
        // Another kernel may have taken over, without doors.
        let Ok(kernel) = self.kernel() else { return };
        let kernel = kernel.clone();
        let stands = |(door, _): &(Push, u8)| read(&kernel, door.at, 1).is_ok_and(|now| now == [INT3]);
        if self.gate.is_closed() && self.gate.doors.iter().all(stands) {
            return;
        }
        let again = |engine: &mut Self| {
            engine.open_module_gate()?;
            engine.close_module_gate()
        };
        let what = match self.by_itself("close_module_gate", "", again, of_result) {
            Ok(()) => {
                "the guest overwrote where the monitor notices modules; they are noticed again".to_owned()
            }
            Err(refusal) => refusal.to_string(),
        };
        for name in self.pending.waiting().into_iter().chain(names) {
            self.emit_conflict(&name, what.clone());
        }
    }

    /// Decides about all modules at the doors.
    pub(super) fn decide_at_doors(&mut self) {
        let rendezvous = self.rendezvous.clone();
        while let Some((door, module)) = rendezvous.module_gate().undecided() {
            let may_pass = match door {
                Door::Comes => {
                    if self.gate.complete.len() < MOST_COMPLETE {
                        self.gate.complete.insert(module);
                    }
                    self.module_comes(module);
                    true
                }
                Door::Goes => {
                    self.gate.complete.insert(module);
                    let gone = self.module_goes(module);
                    if gone {
                        self.gate.complete.remove(&module);
                    }
                    gone
                }
            };
            if may_pass {
                rendezvous.module_gate().let_pass(door, module);
            } else {
                rendezvous.module_gate().put_off(door, module);
            }
        }
    }

    /// The kernel with its modules, and which of them is at an address.
    pub(super) fn with_module(&mut self, at: Gva) -> Result<(GuestKernel, usize), Refusal> {
        let complete = self.gate.complete.clone();
        let kernel = self.kernel()?.with_modules(&complete);
        let is_it = |module: &Module| module.at == at;
        let index = kernel.kernel().modules.all()?.iter().position(is_it);
        let index = index
            .ok_or(Refusal::BadModules { why: "the one that is loaded or unloaded is not in their list" })?;
        Ok((kernel, index))
    }
}

/// No vCPU runs, and the guest does not patch itself.
fn write_doors(kernel: &GuestKernel, doors: &[Push; 2]) -> Result<Vec<(Push, u8)>, Refusal> {
    let unseen = |why: String| Refusal::ModulesUnseen { why };
    let memory = CachedTranslations::of(kernel);
    let probes = probes(&kernel.kernel(), &Bounded::new(&memory, INSPECTION))?;
    let mut written = Vec::new();
    for door in doors {
        let code = read(&memory, door.at, LONGEST)?;
        if let Some(probe) = among(&probes, door.at, door.next) {
            return Err(unseen(format!("the guest has a kprobe at {probe}")));
        }
        if first_push(&code, door.at) != Some(*door) {
            return Err(unseen(format!("the guest has changed the code at {}", door.at)));
        }
        written.push((*door, code[0]));
    }
    for door in doors {
        memory.write(door.at, &[INT3]).map_err(|at| Refusal::Unmapped { at })?;
    }
    Ok(written)
}
