//! What the monitor reads of this guest, by the rules that it keeps.

use std::convert::Infallible;

use patcher::addr::Gva;
use patcher::safety::stack_check::{Mark, Running, Stacks, TaskId};

use super::scenario::Rules;
use super::state::{Life, State, id, index};

/// The guest, as it is read.
pub(super) struct Reader<'s> {
    pub(super) rules: Rules,
    pub(super) state: &'s State,
    /// Shows these tasks, not those that there are.
    pub(super) listed: Option<&'s [TaskId]>,
    /// Shows all stacks as empty.
    pub(super) blank: bool,
}

impl Stacks for Reader<'_> {
    type Error = Infallible;

    fn tasks(&mut self) -> Result<Vec<TaskId>, Infallible> {
        if let Some(listed) = self.listed {
            return Ok(listed.to_vec());
        }
        let is_found = |life| life == Life::Listed || life == Life::Exiting && self.rules.run_queues;
        let tasks = self.state.tasks.iter().enumerate();
        Ok(tasks.filter(|(_, task)| is_found(task.life)).map(|(index, _)| id(index)).collect())
    }

    fn mark(&mut self, task: TaskId) -> Result<Mark, Infallible> {
        let task = &self.state.tasks[index(task)];
        let rules = self.rules;
        if !rules.looks_again {
            return Ok(Mark { start_time: 0, stack_pointer: Gva(0), switches: 0 });
        }
        Ok(Mark {
            start_time: if rules.start_time { task.started.into() } else { 0 },
            stack_pointer: Gva(task.saved as u64),
            switches: if rules.switches { task.switches.into() } else { 0 },
        })
    }

    fn stack(&mut self, task: TaskId) -> Result<Vec<u64>, Infallible> {
        if self.blank {
            return Ok(Vec::new());
        }
        let task = &self.state.tasks[index(task)];
        Ok(task.context.stack.iter().take(task.saved).rev().map(|place| place.word()).collect())
    }

    fn hidden(&mut self, task: TaskId) -> Result<Vec<u64>, Infallible> {
        let task = &self.state.tasks[index(task)];
        let ret_stack = task.ret_stack.iter().filter(|_| self.rules.ret_stack);
        let rethooks = task.rethooks.iter().filter(|_| self.rules.rethooks);
        Ok(ret_stack.chain(rethooks).map(|place| place.word()).collect())
    }

    fn vcpus(&mut self) -> Result<Vec<Running>, Infallible> {
        let vcpus = self.state.cpus.iter().map(|cpu| {
            let task = &self.state.tasks[cpu.running].context;
            let (top, below) = match &cpu.interrupt {
                Some(handler) => (handler, self.rules.below_interrupts.then_some(task)),
                None => (task, None),
            };
            let rip = self.rules.rip.then_some(top.ip);
            let stacks = top.stack.iter().chain(below.iter().flat_map(|below| &below.stack));
            Running {
                task: id(if self.rules.by_stack { cpu.running } else { cpu.current }),
                words: rip.iter().chain(stacks).map(|place| place.word()).collect(),
            }
        });
        Ok(vcpus.collect())
    }
}
