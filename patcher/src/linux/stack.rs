//! The stack of a task that does not run, copied while the guest runs.
//!
//! A task that runs says so (`on_cpu`) before its first instruction, and counts each time that it gives its CPU
//! up (`nvcsw`, `nivcsw`) before it says that it does not run any more (Linux kernel/sched/core.c, `prepare_task`,
//! `__schedule`, `finish_task`). So a copy is right if the task did not run before and after, and neither its
//! counts nor its stack pointer changed.

use crate::addr::Gva;
use crate::linux::linked_list::is_pointer;
use crate::linux::memory::read;
use crate::linux::tasks::TaskReader;
use crate::linux::tracers::scan_offsets;
use crate::linux::view::Kernel;
use crate::plan::refusal::Refusal;

/// How often a stack is copied again whose task has moved.
const ATTEMPTS: usize = 3;
/// Sizes of a stack: two pages, and with all that debugging adds.
const SIZES: std::ops::RangeInclusive<u64> = 1 << 13..=1 << 17;

/// A part of a task's stack, from the stack pointer to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// The stack pointer.
    pub at: Gva,
    /// What lies from there to the end of the stack.
    pub bytes: Vec<u8>,
}

/// What became of the attempt to copy a stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Copied {
    /// It was copied.
    Stack(Stack),
    /// The task runs.
    Running,
    /// The task ran meanwhile, each time.
    Moving,
    /// The task has ended and has no stack any more.
    None,
    /// The stack pointer does not lead into the stack, or the stack is not mapped.
    Unreadable,
}

impl Stack {
    /// The word at an address of the stack.
    #[must_use]
    pub fn word(&self, at: Gva) -> Option<u64> {
        let from = at.offset_from(self.at)?;
        let bytes = self.bytes.get(from..from.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// All words from an address on, with their addresses.
    pub fn words_from(&self, at: Gva) -> impl Iterator<Item = (Gva, u64)> {
        let from = at.offset_from(self.at).unwrap_or(0).next_multiple_of(8);
        let words = self.bytes.get(from..).unwrap_or_default().as_chunks::<8>().0.iter();
        let start = self.at.0.wrapping_add(from as u64);
        (0_u64..)
            .zip(words)
            .map(move |(index, word)| (Gva(start.wrapping_add(8 * index)), u64::from_le_bytes(*word)))
    }
}

/// How long a stack is: the boot CPU's first says it (`__start_init_stack`; `__start_init_task` before 6.9).
///
/// # Errors
/// [`Refusal::UnknownLayout`].
pub fn stack_size(kernel: &Kernel<'_>) -> Result<u64, Refusal> {
    let unknown = || Refusal::UnknownLayout { what: "the size of a stack" };
    let newer =
        kernel.symbol("__start_init_stack").and_then(|start| Ok((start, kernel.symbol("__end_init_stack")?)));
    let older = || Ok((kernel.symbol("__start_init_task")?, kernel.symbol("__end_init_task")?));
    let (start, end) = newer.or_else(|_: Refusal| older()).map_err(|_: Refusal| unknown())?;
    let size = end.0.wrapping_sub(start.0);
    (size.is_power_of_two() && SIZES.contains(&size)).then_some(size).ok_or_else(unknown)
}

/// What shows that a task has moved.
#[derive(PartialEq, Eq)]
struct Position {
    is_running: bool,
    switches: [u64; 2],
    stack: Gva,
    sp: Gva,
}

impl TaskReader<'_> {
    /// Copies the stack of the task whose `struct task_struct` is there.
    ///
    /// # Errors
    /// [`Refusal::UnknownLayout`], [`Refusal::TooMuchToRead`].
    pub fn stack(&self, task: Gva) -> Result<Copied, Refusal> {
        let size = stack_size(self.kernel())?;
        for _ in 0..ATTEMPTS {
            let before = self.position(task)?;
            if before.is_running {
                return Ok(Copied::Running);
            }
            let copied = self.copy(&before, size)?;
            if self.position(task)? == before {
                return Ok(copied);
            }
        }
        Ok(Copied::Moving)
    }

    /// What lies on a task's stack from where it last stopped running, whether it runs now or not.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    pub fn saved_stack(&self, task: Gva) -> Result<Copied, Refusal> {
        let size = stack_size(self.kernel())?;
        self.copy(&self.position(task)?, size)
    }

    /// The lowest address of a task's stack; zero once it has ended.
    ///
    /// # Errors
    /// [`Refusal::Unmapped`], [`Refusal::TooMuchToRead`].
    pub fn stack_base(&self, task: Gva) -> Result<Gva, Refusal> {
        Ok(Gva(self.word(task, self.offsets().stack)?))
    }

    /// Its stack pointer when it last stopped running, and how often it did.
    ///
    /// # Errors
    /// As [`stack_base`](Self::stack_base).
    pub fn switches(&self, task: Gva) -> Result<(Gva, u64), Refusal> {
        let offsets = self.offsets();
        let count = |field| self.number(task, field);
        let switches = count(offsets.nvcsw)?.wrapping_add(count(offsets.nivcsw)?);
        Ok((Gva(self.word(task, offsets.sp)?), switches))
    }

    /// When it began.
    ///
    /// # Errors
    /// As [`stack_base`](Self::stack_base), and [`Refusal::MissingCapability`].
    pub fn start_time(&self, task: Gva) -> Result<u64, Refusal> {
        self.word(task, scan_offsets(self.kernel())?.start_time)
    }

    fn position(&self, task: Gva) -> Result<Position, Refusal> {
        let offsets = self.offsets();
        Ok(Position {
            is_running: self.number(task, offsets.on_cpu)? != 0,
            switches: [self.number(task, offsets.nvcsw)?, self.number(task, offsets.nivcsw)?],
            stack: Gva(self.word(task, offsets.stack)?),
            sp: Gva(self.word(task, offsets.sp)?),
        })
    }

    fn copy(&self, position: &Position, size: u64) -> Result<Copied, Refusal> {
        let Position { stack, sp, .. } = *position;
        if stack == Gva(0) {
            return Ok(Copied::None);
        }
        let end = stack.0.checked_add(size).filter(|end| (stack.0..*end).contains(&sp.0));
        let length = end.and_then(|end| Gva(end).offset_from(sp));
        let Some(length) = length.filter(|_| is_pointer(stack) && is_pointer(sp)) else {
            return Ok(Copied::Unreadable);
        };
        match read(self.memory(), sp, length) {
            Ok(bytes) => Ok(Copied::Stack(Stack { at: sp, bytes })),
            Err(Refusal::Unmapped { .. }) => Ok(Copied::Unreadable),
            Err(other) => Err(other),
        }
    }
}
