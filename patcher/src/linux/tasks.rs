//! All tasks of a running guest: its processes (the list from `init_task.tasks`), their threads (the list
//! from `signal->thread_head`), and the idle task of each CPU, which is on no list (Linux kernel/fork.c,
//! `copy_process`; kernel/smpboot.c).
//!
//! The guest runs while its lists are read, and nobody in it waits for the reader. So each step is
//! checked against the link back, before a member is read and after (`linked_list`), and a thread must
//! share the `signal` of the process on whose list it is. Memory that was freed and used again meanwhile
//! passes none of these. What still fails after many attempts is an error.

use crate::addr::Gva;
use crate::image::btf::Scalar;
use crate::image::profile::Capability;
use crate::image::task_offsets::TaskOffsets;
use crate::linux::linked_list::{LinkedList, Retries};
use crate::linux::memory::{GuestMemory, read, read_u64};
use crate::linux::task_state::letter;
use crate::linux::view::{Kernel, missing};
use crate::plan::refusal::Refusal;

/// Most tasks of a guest.
pub const MOST_TASKS: usize = 1 << 16;
/// What may be spent on reading tasks and their stacks, in units of [`Budget`](crate::budget::Budget). A task costs
/// some 20 units, its stack some 100.
pub const WORK: u64 = 1 << 23;
/// No more CPUs than a word has bits are looked for in `__cpu_possible_mask`; the monitor's guests have no more.
const MOST_CPUS: u32 = 64;
/// `TASK_COMM_LEN` (include/linux/sched.h).
const COMM: usize = 16;
/// `PF_KTHREAD` (include/linux/sched.h).
const KERNEL_THREAD: u32 = 0x0020_0000;

/// A task: a thread of a process, or of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its `struct task_struct`.
    pub at: Gva,
    /// The number of the thread; 0 for the idle task of a CPU.
    pub pid: u32,
    /// The number of the process.
    pub tgid: u32,
    /// Its name.
    pub comm: String,
    /// Its state, by the letter that `/proc` has for it.
    pub state: char,
    /// The CPU that it runs on, or ran on last.
    pub cpu: u32,
    /// Whether it runs.
    pub is_running: bool,
    /// Whether it is one of the kernel's own.
    pub is_kernel_thread: bool,
}

/// Reads tasks of a running guest.
#[derive(Clone, Copy)]
pub struct TaskReader<'a> {
    kernel: &'a Kernel<'a>,
    memory: &'a dyn GuestMemory,
    offsets: TaskOffsets,
}

impl<'a> TaskReader<'a> {
    /// Of a kernel in which tasks are found.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`].
    pub fn new(kernel: &'a Kernel<'a>, memory: &'a dyn GuestMemory) -> Result<Self, Refusal> {
        kernel.image.profile().require(Capability::Tasks).map_err(missing)?;
        let offsets =
            kernel.image.offsets().task.ok_or(Refusal::UnknownLayout { what: "struct task_struct" })?;
        Ok(Self { kernel, memory, offsets })
    }

    /// Where the members of a task are.
    pub(super) fn offsets(&self) -> TaskOffsets {
        self.offsets
    }

    pub(crate) fn kernel(&self) -> &'a Kernel<'a> {
        self.kernel
    }

    pub(crate) fn memory(&self) -> &'a dyn GuestMemory {
        self.memory
    }

    /// All tasks, sorted by the numbers of their processes.
    ///
    /// # Errors
    /// [`Refusal::TooManyTasks`] when the guest has more than `most`; [`Refusal::BadTasks`] when its lists are inconsistent
    /// or change faster than they are read; [`Refusal::Unmapped`], [`Refusal::TooMuchToRead`].
    pub fn all(&self, most: usize) -> Result<Vec<Task>, Refusal> {
        let retries = Retries::default();
        let list = LinkedList { memory: self.memory, retries: &retries, most, limit: most };
        let head = Gva(self.kernel.symbol("init_task")?.0.wrapping_add(self.offsets.tasks));
        let mut tasks = self.idle()?;
        let threads = |node: Gva| self.threads(Gva(node.0.wrapping_sub(self.offsets.tasks)), list);
        for threads in list.members(head, threads)? {
            tasks.extend(threads);
            if tasks.len() > most {
                return Err(list.too_many());
            }
        }
        tasks.sort_by_key(|task| (task.tgid, task.pid, task.at));
        Ok(tasks)
    }

    /// The threads of a process; `None` if it changed meanwhile.
    fn threads(&self, leader: Gva, list: LinkedList<'_>) -> Result<Option<Vec<Task>>, Refusal> {
        let signal = self.word(leader, self.offsets.signal)?;
        let tgid = self.short(leader, self.offsets.tgid)?;
        let head = Gva(signal.wrapping_add(self.offsets.thread_head));
        let few = Retries::few();
        let thread = |node: Gva| {
            let at = Gva(node.0.wrapping_sub(self.offsets.thread_node));
            let task = self.task(at)?;
            let is_its = self.word(at, self.offsets.signal)? == signal && task.tgid == tgid;
            Ok(is_its.then_some(task))
        };
        match (LinkedList { retries: &few, ..list }).members(head, thread) {
            Ok(threads) => Ok(Some(threads).filter(|all| all.iter().any(|task| task.at == leader))),
            Err(Refusal::BadTasks { .. }) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Where a per-CPU variable is, of each CPU that may be there, with the CPU's number.
    pub(super) fn per_cpu(&self, name: &str) -> Result<Vec<(u32, Gva)>, Refusal> {
        let possible = read_u64(self.memory, self.kernel.symbol("__cpu_possible_mask")?)?;
        let bases = self.kernel.symbol("__per_cpu_offset")?;
        let place = self.kernel.per_cpu(name).ok_or(Refusal::UnknownLayout { what: "per-CPU data" })?;
        let cpus = (0..MOST_CPUS).filter(|cpu| possible >> cpu & 1 == 1);
        let at = |cpu: u32| {
            let base = read_u64(self.memory, Gva(bases.0.wrapping_add(8 * u64::from(cpu))))?;
            Ok((cpu, Gva(base.wrapping_add(place))))
        };
        cpus.map(at).collect()
    }

    /// The idle tasks, those of CPUs that are switched off included.
    fn idle(&self) -> Result<Vec<Task>, Refusal> {
        let mut tasks = Vec::new();
        for (_, place) in self.per_cpu("idle_threads")? {
            let at = Gva(read_u64(self.memory, place)?);
            // Early in boot other CPUs have none.
            if at != Gva(0) {
                let task = self.task(at)?;
                if task.pid != 0 {
                    return Err(Refusal::BadTasks { why: "an idle task has a number" });
                }
                tasks.push(task);
            }
        }
        Ok(tasks)
    }

    fn task(&self, at: Gva) -> Result<Task, Refusal> {
        let offsets = self.offsets;
        let number = |field| self.short(at, field);
        let comm = read(self.memory, Gva(at.0.wrapping_add(offsets.comm)), COMM)?;
        let comm = comm.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Task {
            at,
            pid: number(offsets.pid)?,
            tgid: number(offsets.tgid)?,
            comm: String::from_utf8_lossy(comm).into_owned(),
            state: letter(number(offsets.state)?, number(offsets.exit_state)?),
            cpu: number(offsets.cpu)?,
            is_running: number(offsets.on_cpu)? != 0,
            is_kernel_thread: number(offsets.flags)? & KERNEL_THREAD != 0,
        })
    }

    /// A number of a task.
    pub(super) fn number(&self, at: Gva, Scalar { offset, size }: Scalar) -> Result<u64, Refusal> {
        let bytes = read(self.memory, Gva(at.0.wrapping_add(offset)), size.min(8) as usize)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// The same, of which 32 bits count.
    fn short(&self, at: Gva, field: Scalar) -> Result<u32, Refusal> {
        let number = self.number(at, field)? & u64::from(u32::MAX);
        Ok(u32::try_from(number).unwrap_or(u32::MAX))
    }

    pub(super) fn word(&self, at: Gva, offset: u64) -> Result<u64, Refusal> {
        read_u64(self.memory, Gva(at.0.wrapping_add(offset)))
    }
}
