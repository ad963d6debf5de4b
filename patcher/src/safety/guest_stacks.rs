//! The stacks of a running guest, as [`StackCheck`](crate::safety::stack_check::StackCheck) reads them.

use std::collections::BTreeMap;

use crate::addr::{Gva, VcpuId};
use crate::linux::memory::read_words;
use crate::linux::stack::{Copied, stack_size};
use crate::linux::tasks::{MOST_TASKS, Task, TaskReader};
use crate::plan::refusal::Refusal;
use crate::safety::stack_check::{Mark, Running, Stacks, TaskId};

/// Where a held vCPU stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// The guest has not started it.
    NotStarted,
    /// In user mode: no kernel function is called.
    User,
    /// In the kernel.
    Kernel {
        /// The next instruction.
        rip: Gva,
        /// The stack pointer.
        rsp: Gva,
        /// The number of the CPU that it is, if it could be told.
        cpu: Option<usize>,
    },
}

/// Why stacks are not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unread {
    /// They can't be.
    Refused(Refusal),
    /// Not now: another moment may do. What the guest is in the midst of.
    Unsettled(String),
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// A guest's stacks.
pub struct GuestStacks<'a> {
    reader: TaskReader<'a>,
    /// All vCPUs while they are held; empty while the guest runs.
    vcpus: Vec<(VcpuId, Position)>,
    /// The tasks when they were last listed.
    tasks: BTreeMap<TaskId, Task>,
    /// On whose stacks the vCPUs in the kernel stand.
    on_stacks: BTreeMap<TaskId, VcpuId>,
    /// The vCPU that stands where nothing can be told, when it was last looked.
    unsettled: Option<VcpuId>,
    /// How many stacks were read.
    pub stacks_read: usize,
}

impl<'a> GuestStacks<'a> {
    /// Of a guest that runs.
    #[must_use]
    pub fn new(reader: TaskReader<'a>) -> Self {
        Self {
            reader,
            vcpus: Vec::new(),
            tasks: BTreeMap::new(),
            on_stacks: BTreeMap::new(),
            unsettled: None,
            stacks_read: 0,
        }
    }

    /// From now on all vCPUs are held, and stand there.
    pub fn held(&mut self, vcpus: Vec<(VcpuId, Position)>) {
        self.vcpus = vcpus;
        self.tasks.clear();
        self.on_stacks.clear();
        self.unsettled = None;
        self.stacks_read = 0;
    }

    /// The vCPU in the kernel that stands on a task's stack, when it was last looked.
    #[must_use]
    pub fn on_stack_of(&self, task: TaskId) -> Option<VcpuId> {
        self.on_stacks.get(&task).copied()
    }

    /// The vCPU because of which nothing could be told, if it was one.
    #[must_use]
    pub fn unsettled(&self) -> Option<VcpuId> {
        self.unsettled
    }

    /// A task that was listed.
    #[must_use]
    pub fn task(&self, task: TaskId) -> Option<&Task> {
        self.tasks.get(&task)
    }

    /// All tasks. While the vCPUs are held they are listed once.
    fn list(&mut self) -> Result<(), Unread> {
        if self.vcpus.is_empty() || self.tasks.is_empty() {
            let tasks = self.reader.all(MOST_TASKS)?;
            self.tasks = tasks.into_iter().map(|task| (TaskId(task.at), task)).collect();
        }
        Ok(())
    }

    /// The tasks of vCPUs in user mode. Each runs on a CPU that no vCPU in the kernel is.
    fn in_user_mode(&self, in_kernel: &[Running], cpus: &[usize]) -> Result<Vec<Running>, Unread> {
        let is_free = |task: &&Task| {
            let is_elsewhere = usize::try_from(task.cpu).is_ok_and(|cpu| !cpus.contains(&cpu));
            task.is_running
                && task.pid != 0
                && is_elsewhere
                && in_kernel.iter().all(|other| other.task.0 != task.at)
        };
        let found = self
            .tasks
            .values()
            .filter(is_free)
            .map(|task| Running { task: TaskId(task.at), words: Vec::new() });
        let found: Vec<Running> = found.collect();
        let expected = self.vcpus.iter().filter(|(_, position)| *position == Position::User).count();
        if found.len() == expected {
            return Ok(found);
        }
        let what = format!("{expected} vCPUs are in user mode, but {} tasks can be theirs", found.len());
        Err(Unread::Unsettled(what))
    }
}

impl Stacks for GuestStacks<'_> {
    type Error = Unread;

    fn tasks(&mut self) -> Result<Vec<TaskId>, Unread> {
        self.list()?;
        if !self.vcpus.is_empty() && !self.reader.run_queues_are_known(self.tasks.values())? {
            let what = "a run queue has tasks that are not on the list, or are throttled";
            return Err(Unread::Unsettled(what.to_owned()));
        }
        Ok(self.tasks.keys().copied().collect())
    }

    fn mark(&mut self, task: TaskId) -> Result<Mark, Unread> {
        let (stack_pointer, switches) = self.reader.switches(task.0)?;
        Ok(Mark { start_time: self.reader.start_time(task.0)?, stack_pointer, switches })
    }

    fn stack(&mut self, task: TaskId) -> Result<Vec<u64>, Unread> {
        self.stacks_read += 1;
        match self.reader.saved_stack(task.0)? {
            Copied::Stack(stack) => Ok(stack.words_from(stack.at).map(|(_, word)| word).collect()),
            // It has ended, and will not run again.
            Copied::None => Ok(Vec::new()),
            _ => Err(Unread::Unsettled(format!("the stack of the task at {} can't be read", task.0))),
        }
    }

    fn hidden(&mut self, task: TaskId) -> Result<Vec<u64>, Unread> {
        Ok(self.reader.hidden_addresses(task.0)?)
    }

    fn vcpus(&mut self) -> Result<Vec<Running>, Unread> {
        self.list()?;
        let size = stack_size(self.reader.kernel())?;
        let mut stacks = BTreeMap::new();
        for task in self.tasks.keys() {
            stacks.insert(self.reader.stack_base(task.0)?, *task);
        }
        let (mut running, mut cpus) = (Vec::new(), Vec::new());
        for (vcpu, position) in &self.vcpus {
            let Position::Kernel { rip, rsp, cpu } = position else { continue };
            let below = stacks.range(..=*rsp).next_back();
            let end = |base: &Gva| Gva(base.0.saturating_add(size));
            let own =
                below.filter(|(base, _)| **base != Gva(0) && *rsp < end(base) && rsp.0.is_multiple_of(8));
            let (Some((base, task)), Some(cpu)) = (own, cpu) else {
                self.unsettled = Some(*vcpu);
                let what = format!("vCPU {} serves an interrupt, or enters or leaves the kernel", vcpu.0);
                return Err(Unread::Unsettled(what));
            };
            let left = end(base).offset_from(*rsp).unwrap_or(0);
            let words = read_words(self.reader.memory(), *rsp, left)?;
            running.push(Running { task: *task, words: [vec![rip.0], words].concat() });
            self.on_stacks.insert(*task, *vcpu);
            cpus.push(*cpu);
        }
        let others = self.in_user_mode(&running, &cpus)?;
        running.extend(others);
        Ok(running)
    }
}
