//! Lists the guest's tasks with their stacks, while the guest runs. Nothing is held and nothing is changed.

use patcher::linux::stack::Copied;
use patcher::linux::tasks::{MOST_TASKS, Task, TaskReader, WORK};
use patcher::linux::unwind::{Frame, Unwinder};
use patcher::linux::{Bounded, Kernel};
use patcher::plan::refusal::Refusal;

use crate::api::tasks::{StackState, TaskFrame, TaskLine, TaskList, TaskQuery, TaskStack};
use crate::guest::cached_translations::CachedTranslations;
use crate::patch::engine::Engine;

/// Most tasks of an answer: some 4 MiB of JSON.
const MOST_LISTED: usize = 1 << 14;
/// Most tasks of an answer with their stacks, and most frames of all of these.
const MOST_STACKS: usize = 1 << 10;
const MOST_FRAMES: usize = 1 << 15;

impl Engine {
    /// The tasks that are asked for.
    pub(super) fn tasks(&mut self, query: &TaskQuery) -> Result<TaskList, Refusal> {
        let complete = self.gate.complete.clone();
        let kernel =
            if query.stacks { self.kernel()?.with_modules(&complete) } else { self.kernel()?.clone() };
        // What is cached are large pages, of which no stack is a part.
        let memory = CachedTranslations::of(&kernel);
        let memory = Bounded::new(&memory, WORK);
        let view = kernel.kernel();
        let reader = TaskReader::new(&view, &memory)?;
        let mut tasks = reader.all(MOST_TASKS)?;
        tasks.retain(|task| is_wanted(task, query));
        let (limit, what) = if query.stacks {
            (MOST_STACKS, "tasks to list with stacks")
        } else {
            (MOST_LISTED, "tasks to list")
        };
        if tasks.len() > limit {
            return Err(Refusal::TooManyTasks { limit, what });
        }
        let mut unwinder = Unwinder::new(&view, &memory);
        let (mut lines, mut frames) = (Vec::new(), 0);
        for task in tasks {
            let stack = if query.stacks { Some(stack(&reader, &mut unwinder, &view, &task)?) } else { None };
            frames += stack.as_ref().map_or(0, |stack| stack.frames.len());
            if frames > MOST_FRAMES {
                return Err(Refusal::TooManyTasks { limit: MOST_FRAMES, what: "frames to list" });
            }
            lines.push(line(task, stack));
        }
        Ok(TaskList { tasks: lines })
    }
}

fn is_wanted(task: &Task, query: &TaskQuery) -> bool {
    query.pid.is_none_or(|pid| task.pid == pid || task.tgid == pid)
        && query.name.as_ref().is_none_or(|name| task.comm.contains(name.as_str()))
}

fn line(task: Task, stack: Option<TaskStack>) -> TaskLine {
    let Task { pid, tgid, comm, state, cpu, is_running, is_kernel_thread, .. } = task;
    // It may have begun or ended to run since it was listed.
    let running = match stack.as_ref().map(|stack| stack.state) {
        Some(state) => state == StackState::Running,
        None => is_running,
    };
    TaskLine { pid, tgid, comm, state, cpu, running, kernel_thread: is_kernel_thread, stack }
}

fn stack(
    reader: &TaskReader<'_>,
    unwinder: &mut Unwinder<'_>,
    kernel: &Kernel<'_>,
    task: &Task,
) -> Result<TaskStack, Refusal> {
    let without = |state| Ok(TaskStack { state, why: None, frames: Vec::new() });
    let stack = match reader.stack(task.at)? {
        Copied::Stack(stack) => stack,
        Copied::Running => return without(StackState::Running),
        Copied::Moving => return without(StackState::Moving),
        Copied::None => return without(StackState::None),
        Copied::Unreadable => return without(StackState::Unreadable),
    };
    let trace = unwinder.backtrace(&stack)?;
    let state = if trace.broken.is_some() { StackState::Partial } else { StackState::Complete };
    let why = trace.broken.map(str::to_owned);
    Ok(TaskStack { state, why, frames: trace.frames.iter().map(|frame| named(kernel, frame)).collect() })
}

fn named(kernel: &Kernel<'_>, frame: &Frame) -> TaskFrame {
    let name = frame.name(kernel);
    let (symbol, module) = name.map_or((None, None), |name| (Some(name.symbol), name.module));
    TaskFrame { address: frame.address, symbol, module, reliable: frame.reliable }
}
