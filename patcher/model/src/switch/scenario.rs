//! What a guest does while its function is switched, and how the monitor goes about it.

/// What the guest's tasks do, besides calling the function and sleeping in what it calls.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// Tasks call what the function calls from elsewhere, too.
    pub others_call: bool,
    /// Tasks are preempted at any instruction (`preempt=full`).
    pub preempts: bool,
    /// A CPU serves an interrupt, whose handler calls the function, too.
    pub interrupts: bool,
    /// Tasks fork and exit. One that exits calls the function once more after it left the list.
    pub forks: bool,
    /// The function graph tracer keeps return addresses.
    pub graph: bool,
    /// A kretprobe or fexit keeps return addresses, by a rethook.
    pub rethook: bool,
    /// An optimised kprobe executes an instruction of the function out of line.
    pub slot: bool,
    /// The function has a `.cold` piece.
    pub cold: bool,
    /// Its last instruction calls what does not return.
    pub forever: bool,
    /// New code starts a timer.
    pub timer: bool,
}

/// The rules of the monitor. A test takes each out to show that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Reads `ret_stack` where `return_to_handler` is found.
    pub ret_stack: bool,
    /// Reads `rethooks` where `arch_rethook_trampoline` is found.
    pub rethooks: bool,
    /// Counts whoever is within a trampoline as inside.
    pub within_trampolines: bool,
    /// Tells which task runs by the vCPU's stack, not by `current`.
    pub by_stack: bool,
    /// Counts the vCPU's RIP.
    pub rip: bool,
    /// Goes on from an interrupt's stack to the one below.
    pub below_interrupts: bool,
    /// Counts the return address of a call that is the last instruction.
    pub end: bool,
    /// Looks for `.cold` pieces.
    pub pieces: bool,
    /// Counts a piece's first instruction.
    pub piece_starts: bool,
    /// Looks for slots.
    pub slots: bool,
    /// Under the hold, looks again at tasks whose mark changed.
    pub looks_again: bool,
    /// Under the hold, lists the tasks again.
    pub lists_again: bool,
    /// Lists tasks of run queues, too.
    pub run_queues: bool,
    /// Reads the mark before the stack.
    pub mark_first: bool,
    /// A mark has the number of switches.
    pub switches: bool,
    /// A mark has the time when the task started.
    pub start_time: bool,
    /// Switches only when nobody stands inside.
    pub waits: bool,
    /// Reverts only when nobody stands in the new code.
    pub waits_to_revert: bool,
    /// New code stays in memory after it was reverted.
    pub keeps_code: bool,
}

impl Rules {
    /// As the monitor works.
    pub const ALL: Self = Self {
        ret_stack: true,
        rethooks: true,
        within_trampolines: true,
        by_stack: true,
        rip: true,
        below_interrupts: true,
        end: true,
        pieces: true,
        piece_starts: true,
        slots: true,
        looks_again: true,
        lists_again: true,
        run_queues: true,
        mark_first: true,
        switches: true,
        start_time: true,
        waits: true,
        waits_to_revert: true,
        keeps_code: true,
    };
}

/// A switch and its revert in a guest.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// How many tasks there may be at once. All of them exist at first.
    pub tasks: usize,
    /// How many CPUs.
    pub cpus: usize,
    /// How often a task stops running.
    pub switches: u8,
    /// How often the monitor tries before it gives up.
    pub attempts: u8,
    /// What tasks do.
    pub guest: Guest,
    /// What the monitor does.
    pub rules: Rules,
    /// An end that counts as a violation, to show that it is reached.
    pub never: Option<End>,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Switched, and switched back.
    Reverted,
    /// Somebody always stood in the old code.
    GaveUp,
    /// Switched; somebody always stood in the new code.
    Stayed,
}

impl Scenario {
    /// Two tasks on one CPU, which call the function and sleep in it.
    #[must_use]
    pub fn new(guest: Guest) -> Self {
        Self { tasks: 2, cpus: 1, switches: 1, attempts: 1, guest, rules: Rules::ALL, never: None }
    }
}
