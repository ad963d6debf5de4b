//! A state of the guest and the monitor, and the transitions that are found from it.

use patcher::addr::Gva;
use patcher::safety::stack_check::{Mark, OldCode, StackCheck, TaskId};

use super::place::Place;
use super::scenario::{End, Scenario};

/// A flow of control with a stack: a task's, or that of an interrupt's handler.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Context {
    /// The next instruction, while it runs.
    pub(super) ip: Place,
    /// Return addresses, and the instructions at which it was interrupted or preempted.
    pub(super) stack: Vec<Place>,
    /// The return address that a trampoline holds in a register.
    pub(super) register: Option<Place>,
    /// How many activations of the old function it has. The monitor does not see this.
    pub(super) in_old: u8,
    /// How many of the new one.
    pub(super) in_new: u8,
}

impl Context {
    /// One that was called, or interrupted something, at `from`.
    pub(super) fn from(from: Place) -> Self {
        Self { ip: Place::Elsewhere, stack: vec![from], register: None, in_old: 0, in_new: 0 }
    }

    pub(super) fn pop(&mut self) -> Place {
        self.stack.pop().unwrap_or(Place::Elsewhere)
    }
}

/// How far a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Life {
    /// It is on the list of tasks.
    Listed,
    /// It exits: it has left the list and still runs.
    Exiting,
    /// Nothing, or the memory of one that is gone.
    Dead,
}

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Task {
    pub(super) life: Life,
    pub(super) context: Context,
    /// Where its stack ended when it last stopped running.
    pub(super) saved: usize,
    /// How often it stopped running.
    pub(super) switches: u8,
    /// Which task this is in the same memory.
    pub(super) started: u8,
    pub(super) ret_stack: Vec<Place>,
    pub(super) rethooks: Vec<Place>,
}

impl Task {
    /// A task that has not run yet. Its stack has where it begins.
    pub(super) fn new(life: Life, started: u8) -> Self {
        Self {
            life,
            context: Context::from(Place::Elsewhere),
            saved: 1,
            switches: 0,
            started,
            ret_stack: Vec::new(),
            rethooks: Vec::new(),
        }
    }
}

/// A CPU. Its vCPU is preempted at any time, for any time: then nothing of it happens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Cpu {
    /// The task on whose stack it stands.
    pub(super) running: usize,
    /// `current`: another one for a moment within `__switch_to`.
    pub(super) current: usize,
    /// Its idle task.
    pub(super) idle: usize,
    /// The handler of an interrupt.
    pub(super) interrupt: Option<Context>,
}

/// What the monitor does next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Next {
    /// It lists the tasks.
    List,
    /// It looks at these, the last one first; of that one it may have read the mark.
    Look { tasks: Vec<TaskId>, mark: Option<Mark>, seen_outside: bool },
    /// Nothing.
    Ended(End),
}

/// A state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// Those that the scenario allows, then the idle ones.
    pub(super) tasks: Vec<Task>,
    pub(super) cpus: Vec<Cpu>,
    /// Whether the function's entry leads to the new code.
    pub(super) switched: bool,
    /// Whether the new code's memory was given back.
    pub(super) freed: bool,
    /// Whether a timer of the new code is running.
    pub(super) timer: bool,
    pub(super) next: Next,
    pub(super) reverts: bool,
    pub(super) attempts: u8,
    pub(super) check: StackCheck,
    /// The tasks when they were listed.
    pub(super) listed: Vec<TaskId>,
}

impl State {
    /// The first task runs on the first CPU; every other CPU is idle.
    pub(super) fn new(scenario: &Scenario) -> Self {
        let mut tasks: Vec<Task> = (0..scenario.tasks).map(|_| Task::new(Life::Listed, 0)).collect();
        tasks[0].context.pop();
        let cpus = (0..scenario.cpus).map(|index| {
            let idle = scenario.tasks + index;
            let running = if index == 0 { 0 } else { idle };
            Cpu { running, current: running, idle, interrupt: None }
        });
        let cpus: Vec<Cpu> = cpus.collect();
        for cpu in &cpus {
            let mut idle = Task::new(Life::Listed, 0);
            if cpu.running == cpu.idle {
                idle.context.pop();
            }
            tasks.push(idle);
        }
        Self {
            tasks,
            cpus,
            switched: false,
            freed: false,
            timer: false,
            next: Next::List,
            reverts: false,
            attempts: scenario.attempts,
            check: StackCheck::new(OldCode::default()),
            listed: Vec::new(),
        }
    }

    /// What runs on a CPU.
    pub(super) fn context(&self, cpu: usize) -> &Context {
        let cpu = &self.cpus[cpu];
        cpu.interrupt.as_ref().unwrap_or(&self.tasks[cpu.running].context)
    }

    /// The same, to be changed.
    pub(super) fn context_mut(&mut self, cpu: usize) -> &mut Context {
        let cpu = &mut self.cpus[cpu];
        cpu.interrupt.as_mut().unwrap_or(&mut self.tasks[cpu.running].context)
    }

    /// Every flow of control that goes on one day.
    pub(super) fn contexts(&self) -> impl Iterator<Item = &Context> {
        let tasks = self.tasks.iter().filter(|task| task.life != Life::Dead).map(|task| &task.context);
        tasks.chain(self.cpus.iter().filter_map(|cpu| cpu.interrupt.as_ref()))
    }

    pub(super) fn is_idle(&self, task: usize) -> bool {
        self.cpus.iter().any(|cpu| cpu.idle == task)
    }
}

/// The name of a task's memory.
pub(super) fn id(task: usize) -> TaskId {
    TaskId(Gva(task as u64))
}

/// The task in that memory.
pub(super) fn index(task: TaskId) -> usize {
    usize::try_from(task.0.0).expect("made by `id`")
}

/// The transitions out of a state.
pub(super) type Transitions = crate::explore::Transitions<State>;
