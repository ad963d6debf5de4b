//! Whether any task stands inside code that is about to be replaced.
//!
//! What `klp_check_stack` asks in the guest (Linux kernel/livepatch/transition.c, 6.12), asked from
//! outside and without unwinding: every word of every stack counts as a return address. That finds
//! each task that stands inside, and now and then one that does not.
//!
//! Most stacks are read while the guest runs. Under the hold, only tasks that may have moved are
//! looked at again: a task that stopped running again has another [`Mark`], and one that runs is told
//! by the stack on which a vCPU stands. The crate `model` shows what breaks without each rule.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::addr::Gva;

/// A task, by the address of its `task_struct`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub Gva);

/// What differs once a task has run and stopped running again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mark {
    /// `start_time`: another task may get the memory of one that exited.
    pub start_time: u64,
    /// `thread.sp`: where its stack ended when it last stopped running.
    pub stack_pointer: Gva,
    /// `nvcsw` and `nivcsw` together: how often it stopped running.
    pub switches: u64,
}

/// The code that is about to be replaced, and what may hide that a task stands in it.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub struct OldCode {
    /// The functions whose entries lead to new code. The address of the first instruction is outside:
    /// there, nothing of the function was executed. The address behind the last one is inside: it is
    /// the return address of a call that does not return.
    pub functions: Vec<Range<Gva>>,
    /// Their `.cold` and `.part` pieces, which nothing leads away from. Here the first instruction is
    /// inside, too.
    pub pieces: Vec<Range<Gva>>,
    /// Code that executes copies of instructions from elsewhere, and goes on behind them: slots of
    /// kprobes and of the arena. Whoever stands there may stand in any function.
    pub slots: Vec<Range<Gva>>,
    /// Where functions return to whose return address a tracer keeps elsewhere: `return_to_handler`,
    /// `arch_rethook_trampoline`. Past its first instruction the real address may be in a register only.
    pub trampolines: Vec<Range<Gva>>,
}

/// A guest whose stacks are read.
pub trait Stacks {
    /// Why a read failed.
    type Error;

    /// Every task: of the list of tasks, their threads, the idle tasks, and those on run queues, where
    /// a task is that exits and has left the list.
    ///
    /// # Errors
    /// The lists can't be read to their end.
    fn tasks(&mut self) -> Result<Vec<TaskId>, Self::Error>;

    /// The task's mark.
    ///
    /// # Errors
    /// It can't be read.
    fn mark(&mut self, task: TaskId) -> Result<Mark, Self::Error>;

    /// The words of a task's stack from `thread.sp` up.
    ///
    /// # Errors
    /// They can't be read.
    fn stack(&mut self, task: TaskId) -> Result<Vec<u64>, Self::Error>;

    /// The return addresses that tracers keep for a task: of `ret_stack` and `rethooks`.
    ///
    /// # Errors
    /// They can't be read.
    fn hidden(&mut self, task: TaskId) -> Result<Vec<u64>, Self::Error>;

    /// Every vCPU. All of them are held.
    ///
    /// # Errors
    /// A vCPU's stacks can't be read.
    fn vcpus(&mut self) -> Result<Vec<Running>, Self::Error>;
}

/// What a vCPU runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The task on whose stack it stands, told by RSP, or whose stack is below an interrupt's. Not by
    /// `current`, which names another task within `__switch_to`.
    pub task: TaskId,
    /// RIP, and the words of all its stacks: an interrupt's or exception's from RSP up, and so on down
    /// to the task's. None in user mode.
    pub words: Vec<u64>,
}

/// A task that stands inside, or may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Occupant {
    /// The task.
    pub task: TaskId,
    /// The word that tells it.
    pub word: Gva,
    /// What the word means.
    pub why: Why,
}

/// Why a word tells that a task stands inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// It is an address of the function with this index.
    Function(usize),
    /// It is an address of the piece with this index.
    Piece(usize),
    /// It is an address of a slot.
    Slot,
    /// It is an address within a trampoline.
    Trampoline,
}

impl OldCode {
    /// What a word means, if anything.
    fn judge(&self, word: u64) -> Option<Why> {
        let word = Gva(word);
        let behind_start = |range: &Range<Gva>| range.start < word && word <= range.end;
        let anywhere = |range: &Range<Gva>| range.start <= word && word <= range.end;
        if let Some(index) = self.functions.iter().position(behind_start) {
            return Some(Why::Function(index));
        }
        if let Some(index) = self.pieces.iter().position(anywhere) {
            return Some(Why::Piece(index));
        }
        if self.slots.iter().any(anywhere) {
            return Some(Why::Slot);
        }
        self.trampolines.iter().any(behind_start).then_some(Why::Trampoline)
    }

    fn hides(&self, word: u64) -> bool {
        self.trampolines.iter().any(|trampoline| trampoline.start.0 == word)
    }
}

/// A search for tasks that stand inside, in two parts: while the guest runs, and under a hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StackCheck {
    code: Arc<OldCode>,
    /// Tasks that did not stand inside, with the marks that they had then.
    outside: BTreeMap<TaskId, Mark>,
}

impl StackCheck {
    /// A search that has seen no task.
    #[must_use]
    pub fn new(code: impl Into<Arc<OldCode>>) -> Self {
        Self { code: code.into(), outside: BTreeMap::new() }
    }

    /// Whether it searches this code, and nothing else.
    #[must_use]
    pub fn is_of(&self, code: &OldCode) -> bool {
        *self.code == *code
    }

    /// Looks at a task while the guest runs. A task that runs meanwhile is looked at all the same:
    /// what is read of it counts only if it has the same mark under the hold and does not run.
    ///
    /// # Errors
    /// A read failed. What was found before is kept.
    pub fn look<S: Stacks>(&mut self, stacks: &mut S, task: TaskId) -> Result<(), S::Error> {
        // First, so that a task that runs and stops while its stack is read has another mark later.
        let mark = stacks.mark(task)?;
        self.look_since(stacks, task, mark)
    }

    /// Looks at a task whose mark was read before.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn look_since<S: Stacks>(
        &mut self,
        stacks: &mut S,
        task: TaskId,
        mark: Mark,
    ) -> Result<(), S::Error> {
        let words = stacks.stack(task)?;
        match self.occupies(stacks, task, &words)? {
            None => self.outside.insert(task, mark),
            Some(_) => self.outside.remove(&task),
        };
        Ok(())
    }

    /// Every task that stands inside, or may. All vCPUs are held. Empty: nobody does, until they are
    /// released.
    ///
    /// # Errors
    /// A read failed, so that nothing is known.
    pub fn occupants<S: Stacks>(&self, stacks: &mut S) -> Result<Vec<Occupant>, S::Error> {
        let mut occupants = Vec::new();
        let mut running = BTreeSet::new();
        for Running { task, words } in stacks.vcpus()? {
            running.insert(task);
            occupants.extend(self.occupies(stacks, task, &words)?);
        }
        for task in stacks.tasks()? {
            if running.contains(&task) || self.outside.get(&task) == Some(&stacks.mark(task)?) {
                continue;
            }
            let words = stacks.stack(task)?;
            occupants.extend(self.occupies(stacks, task, &words)?);
        }
        Ok(occupants)
    }

    /// The first word that tells that the task stands inside: one that tells where, if there is one. A tracer's
    /// trampoline leaves words on stacks that outlast it, and lie below those of the functions that were called through it.
    fn occupies<S: Stacks>(
        &self,
        stacks: &mut S,
        task: TaskId,
        words: &[u64],
    ) -> Result<Option<Occupant>, S::Error> {
        let hidden = match words.iter().any(|word| self.code.hides(*word)) {
            true => stacks.hidden(task)?,
            false => Vec::new(),
        };
        let told = || words.iter().chain(&hidden).filter_map(|word| Some((*word, self.code.judge(*word)?)));
        let tells_where = |(_, why): &(u64, Why)| matches!(why, Why::Function(_) | Why::Piece(_));
        let found = told().find(tells_where).or_else(|| told().next());
        Ok(found.map(|(word, why)| Occupant { task, word: Gva(word), why }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTION: Range<Gva> = Gva(0x100)..Gva(0x140);
    const PIECE: Range<Gva> = Gva(0x200)..Gva(0x210);
    const SLOT: Range<Gva> = Gva(0x300)..Gva(0x310);
    const TRAMPOLINE: Range<Gva> = Gva(0x400)..Gva(0x420);

    fn code() -> OldCode {
        OldCode {
            functions: vec![Gva(0x10)..Gva(0x20), FUNCTION],
            pieces: vec![PIECE],
            slots: vec![SLOT],
            trampolines: vec![TRAMPOLINE],
        }
    }

    #[test]
    fn what_a_word_means() {
        for (word, why) in [
            (0x100, None),
            (0x101, Some(Why::Function(1))),
            (0x140, Some(Why::Function(1))),
            (0x141, None),
            (0x1ff, None),
            (0x200, Some(Why::Piece(0))),
            (0x210, Some(Why::Piece(0))),
            (0x211, None),
            (0x300, Some(Why::Slot)),
            (0x310, Some(Why::Slot)),
            (0x400, None),
            (0x401, Some(Why::Trampoline)),
            (0x420, Some(Why::Trampoline)),
        ] {
            assert_eq!(code().judge(word), why, "{word:#x}");
        }
    }

    /// A guest with one task, of which some reads fail.
    struct One {
        stack: Option<Vec<u64>>,
        hidden: Option<Vec<u64>>,
        read: Vec<&'static str>,
    }

    const TASK: TaskId = TaskId(Gva(0x9000));

    impl Stacks for One {
        type Error = &'static str;

        fn tasks(&mut self) -> Result<Vec<TaskId>, Self::Error> {
            Ok(vec![TASK])
        }

        fn mark(&mut self, _: TaskId) -> Result<Mark, Self::Error> {
            self.read.push("mark");
            Ok(Mark { start_time: 1, stack_pointer: Gva(2), switches: 3 })
        }

        fn stack(&mut self, _: TaskId) -> Result<Vec<u64>, Self::Error> {
            self.read.push("stack");
            self.stack.clone().ok_or("no stack")
        }

        fn hidden(&mut self, _: TaskId) -> Result<Vec<u64>, Self::Error> {
            self.read.push("hidden");
            self.hidden.clone().ok_or("nothing hidden")
        }

        fn vcpus(&mut self) -> Result<Vec<Running>, Self::Error> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn the_mark_is_read_first_and_an_unchanged_task_is_not_read_again() {
        let mut one = One { stack: Some(vec![0x999]), hidden: None, read: Vec::new() };
        let mut check = StackCheck::new(code());
        check.look(&mut one, TASK).expect("it is read");
        assert_eq!(one.read, ["mark", "stack"]);
        one.read.clear();
        assert_eq!(check.occupants(&mut one), Ok(Vec::new()));
        assert_eq!(one.read, ["mark"]);
    }

    #[test]
    fn what_cannot_be_read_is_no_answer() {
        let check = StackCheck::new(code());
        let mut one = One { stack: None, hidden: None, read: Vec::new() };
        assert_eq!(check.occupants(&mut one), Err("no stack"));
        one.stack = Some(vec![0x999, 0x400]);
        assert_eq!(check.occupants(&mut one), Err("nothing hidden"));
        one.hidden = Some(vec![0x118]);
        let occupant = Occupant { task: TASK, word: Gva(0x118), why: Why::Function(1) };
        assert_eq!(check.occupants(&mut one), Ok(vec![occupant]));
    }

    #[test]
    fn a_word_that_tells_where_counts_before_one_that_does_not() {
        let check = StackCheck::new(code());
        // The return address that the trampoline hides is kept elsewhere.
        for (stack, hidden, why) in [
            (vec![0x410, 0x400], vec![0x118], Why::Function(1)),
            (vec![0x410, 0x308, 0x208], vec![], Why::Piece(0)),
            (vec![0x410, 0x308], vec![], Why::Trampoline),
            (vec![0x308, 0x410], vec![], Why::Slot),
        ] {
            let mut one = One { stack: Some(stack), hidden: Some(hidden), read: Vec::new() };
            let occupants = check.occupants(&mut one).expect("it is read");
            assert_eq!(occupants.iter().map(|one| one.why).collect::<Vec<_>>(), [why]);
        }
    }

    #[test]
    fn a_task_that_was_outside_and_moved_in_while_the_guest_ran_is_inside() {
        let mut check = StackCheck::new(code());
        let mut one = One { stack: Some(vec![0x999]), hidden: None, read: Vec::new() };
        check.look(&mut one, TASK).expect("it is read");
        one.stack = Some(vec![0x120]);
        check.look(&mut one, TASK).expect("it is read");
        let occupants = check.occupants(&mut one).expect("it is read");
        assert_eq!(occupants.len(), 1);
    }
}
