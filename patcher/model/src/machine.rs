//! The machine: the monitor, the guest and the vCPUs, each of which may act at any moment.

use crate::explore::{System, Transition};
use crate::scenario::Scenario;
use crate::state::{State, Transitions};
use crate::{guest, monitor, vcpu};

impl<'p> System for Scenario<'p> {
    type State = State<'p>;

    fn start(&self) -> State<'p> {
        State::new(self)
    }

    fn transitions(&self, state: &State<'p>, describe: bool) -> Vec<Transition<State<'p>>> {
        let mut out = Transitions::new(describe);
        monitor::transitions(self, state, &mut out);
        guest::write(self, state, &mut out);
        for index in 0..state.vcpus.len() {
            vcpu::transitions(self, state, index, &mut out);
        }
        let mut all = out.into_vec();
        // vCPUs are interchangeable, so states that differ only in their order are one state.
        for state in all.iter_mut().filter_map(|transition| transition.result.as_mut().ok()) {
            state.vcpus.sort();
        }
        all
    }
}
