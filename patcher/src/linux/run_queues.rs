//! How many tasks the scheduler has, beside those that are on the list of tasks.

use std::collections::BTreeMap;

use crate::linux::tasks::{Task, TaskReader};
use crate::linux::tracers::scan_offsets;
use crate::plan::refusal::Refusal;

/// `TASK_ON_RQ_QUEUED` (kernel/sched/sched.h).
const QUEUED: u64 = 1;

impl TaskReader<'_> {
    /// Whether every CPU's run queue has as many tasks (`nr_running`) as `tasks` are on it. One that exits leaves
    /// the list of tasks before it stops running; a queue with more tasks has such a one. A queue has fewer
    /// while tasks of it are throttled (`cpu.max`), which could hide one. All vCPUs are held.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`], [`Refusal::Unmapped`].
    pub fn run_queues_are_known<'t>(&self, tasks: impl Iterator<Item = &'t Task>) -> Result<bool, Refusal> {
        let offsets = scan_offsets(self.kernel())?;
        let mut queued: BTreeMap<u32, u64> = BTreeMap::new();
        // An idle task is on no queue, whatever it says.
        for task in tasks.filter(|task| task.pid != 0) {
            if self.number(task.at, offsets.on_rq)? == QUEUED {
                *queued.entry(task.cpu).or_default() += 1;
            }
        }
        for (cpu, queue) in self.per_cpu("runqueues")? {
            let expected = queued.remove(&cpu).unwrap_or(0);
            if self.number(queue, offsets.nr_running)? != expected {
                return Ok(false);
            }
        }
        Ok(queued.is_empty())
    }
}
