//! A vCPU at a door of the gate for modules ([`ModuleGate`]): it waits until the module may pass, then
//! does the `push` that the door's `int3` stands for.
//!
//! [`ModuleGate`]: crate::sync::module_gate::ModuleGate

use patcher::addr::Gva;
use patcher::insn::push::Push;

use crate::sync::module_gate::{Door, Passage};
use crate::vcpu::Vcpu;
use crate::vcpu::int3::Breakpoint;
use crate::vcpu::stopped::decoded;

impl Vcpu {
    /// The vCPU has come to a door. Unless the module may pass, the vCPU enters the guest again at the
    /// same instruction, after a moment.
    pub(super) fn at_module_door(&self, door: Door, push: Push) -> Result<(), String> {
        let regs = self.fd.get_regs().map_err(|error| self.at_door(&error))?;
        let module = Gva(regs.rdi);
        let gate = self.rendezvous.module_gate();
        match gate.ask(door, module) {
            Passage::Open => return self.push(push),
            Passage::New => self.listener.module_at_door(),
            Passage::Undecided => {}
        }
        self.parked(|| gate.wait(door, module))
    }

    fn push(&self, push: Push) -> Result<(), String> {
        let mut regs = self.fd.get_regs().map_err(|error| self.at_door(&error))?;
        let sregs = self.fd.get_sregs().map_err(|error| self.at_door(&error))?;
        let value = decoded(&regs, &sregs).general[push.register];
        regs.rsp = regs.rsp.wrapping_sub(8);
        if !self.push_word(&regs, &sregs, value)? {
            // The `push` would fault. Kernel stacks are mapped; a kernel whose stack is not can't go on.
            return self.deliver(&Breakpoint::PLAIN);
        }
        regs.rip = push.next.0;
        self.fd.set_regs(&regs).map_err(|error| self.at_door(&error))?;
        self.end_shadow()
    }

    fn at_door(&self, what: &dyn std::fmt::Display) -> String {
        format!("vCPU {}: where modules are loaded and unloaded: {what}", self.id.0)
    }
}
