//! How many tasks the scheduler has, beside those that are on the list of tasks.

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::linux::memory::read_u64;
use crate::linux::tasks::{Task, TaskReader};
use crate::linux::tracers::scan_offsets;
use crate::plan::refusal::Refusal;

/// `TASK_ON_RQ_QUEUED` (kernel/sched/sched.h).
const QUEUED: u64 = 1;
/// As many CPUs as are looked for.
const MOST_CPUS: u64 = 64;

impl TaskReader<'_> {
    /// Whether every CPU's run queue has as many tasks (`nr_running`) as `tasks` are on it. One that exits leaves
    /// the list of tasks before it stops running; a queue with more tasks has such a one. A queue has fewer
    /// while tasks of it are throttled (`cpu.max`), which could hide one. All vCPUs are held.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`], [`Refusal::Unmapped`].
    pub fn run_queues_are_known(&self, tasks: &[Task]) -> Result<bool, Refusal> {
        let offsets = scan_offsets(self.kernel())?;
        let mut queued: BTreeMap<u32, u64> = BTreeMap::new();
        // An idle task is on no queue, whatever it says.
        for task in tasks.iter().filter(|task| task.pid != 0) {
            if self.number(task.at, offsets.on_rq)? == QUEUED {
                *queued.entry(task.cpu).or_default() += 1;
            }
        }
        let memory = self.memory();
        let unknown = Refusal::UnknownLayout { what: "per-CPU data" };
        let queue = self.kernel().per_cpu("runqueues").ok_or(unknown)?;
        let bases = self.kernel().symbol("__per_cpu_offset")?;
        let possible = read_u64(memory, self.kernel().symbol("__cpu_possible_mask")?)?;
        for cpu in (0..MOST_CPUS).filter(|cpu| possible >> cpu & 1 == 1) {
            let base = read_u64(memory, Gva(bases.0.wrapping_add(8 * cpu)))?;
            let expected = u32::try_from(cpu).ok().and_then(|cpu| queued.remove(&cpu)).unwrap_or(0);
            if self.number(Gva(base.wrapping_add(queue)), offsets.nr_running)? != expected {
                return Ok(false);
            }
        }
        Ok(queued.is_empty())
    }
}
