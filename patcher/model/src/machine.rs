//! The simulated machine. It is adversarial: whatever a processor, the host's scheduler or
//! the guest may do at a moment, it does, in some run.
//!
//! - A fetch shows, for each unit of memory, any value that was there since the vCPU's last
//!   fence: per byte ([`Fetch::Bytes`]: no vendor promises less) or per aligned eight bytes
//!   ([`Fetch::Words`]: APM volume 2, 7.6.1).
//! - A vCPU may stop anywhere for any time (the host preempted it), and be interrupted
//!   before any instruction by something that runs the same sites.
//! - A vCPU that meets an `int3` with interception on leaves the guest, reads the trap table,
//!   and reads the byte: two steps, between which anything may happen. Interception is
//!   switched off some time after the program disarms it.
//! - The guest may write a byte next to a site, or replace an `int3` of its own.
//! - Each step of the monitor may fail, done or not or in part; while undoing one more may.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::explore::{System, Violation};
use patcher::addr::{Gva, VcpuId};
use patcher::insn::{self, INT3};
use patcher::program::session::{End, Session};
use patcher::program::step::StepError;
use patcher::program::step::{Program, Step};
use patcher::safety::interior;
use patcher::safety::quiesce::{Mode, VcpuState};
use patcher::safety::trap::{TrapAction, TrapTable, Verdict};

/// What a fetch sees of memory that was written since the last fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetch {
    /// Each byte old or new, whatever its neighbours are.
    Bytes,
    /// Each aligned eight bytes as some store left them.
    Words,
}

/// What the guest does to its own text, at any time, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Nothing.
    Quiet,
    /// Writes a byte.
    Writes(Gva, u8),
    /// Has an `int3` of its own, which it never takes out.
    Owns(Gva),
    /// Has an `int3` of its own, which it replaces by another byte.
    Replaces(Gva, u8),
    /// Patches the sites, as often as it likes: takes its lock, comes by the blocker, compares what
    /// is there with what it may be, and relies on that until it gives the lock back.
    Patches {
        /// The word that is zero while it does not.
        lock: Gva,
        /// Where it comes by before it compares.
        blocker: Gva,
    },
}

/// What the monitor's side of a trap does; each can be taken out to see that it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// A vCPU that trapped reads the byte again.
    pub reads_again: bool,
    /// Before it delivers a #BP it looks whether its table is still the one in force.
    pub looks_twice: bool,
    /// [`Step::Store`] is one atomic access.
    pub stores_are_atomic: bool,
    /// An inspected vCPU tells whether it may have interrupted something.
    pub tells_interrupted: bool,
}

impl Rules {
    /// As the monitor works.
    pub const ALL: Self =
        Self { reads_again: true, looks_twice: true, stores_are_atomic: true, tells_interrupted: true };
}

/// A program on a machine.
#[derive(Debug, Clone)]
pub struct World<'p> {
    /// What the monitor runs.
    pub program: &'p Program,
    /// Memory before: pieces that do not touch.
    pub memory: Vec<(Gva, Vec<u8>)>,
    /// How many vCPUs.
    pub vcpus: usize,
    /// What fetches see.
    pub fetch: Fetch,
    /// Whether vCPUs are interrupted.
    pub interrupts: bool,
    /// Whether steps fail.
    pub failures: bool,
    /// Whether a write may not happen, though it is said to be done.
    pub lost_writes: bool,
    /// Whether no vCPU may run some sites old after some vCPU ran one new.
    pub atomic: bool,
    /// What the guest does.
    pub guest: Guest,
    /// What the monitor does at traps.
    pub rules: Rules,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Version {
    Old,
    New,
    /// The old instruction, elsewhere.
    Copy,
    /// An instruction that is not changed.
    Same,
}

/// An instruction that may be executed somewhere.
#[derive(Debug, Clone)]
struct Known {
    version: Version,
    code: Vec<u8>,
    next: Option<Gva>,
}

/// Where a vCPU, or what it interrupted, stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Frame {
    Elsewhere,
    /// `pass`: what it executed of this site so far.
    At {
        rip: Gva,
        pass: Option<Version>,
    },
    /// It patches the guest's text: it has the lock, and comes to the blocker.
    Locked(Gva),
    /// It is past the blocker.
    Compares,
    /// It found the sites so, and relies on it.
    Relies(Version),
}

/// What a vCPU does that trapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Out {
    Trapped,
    /// It read the table: whether that was the program's.
    Looked(bool),
    Waiting,
}

/// What a vCPU is called in a trace. The vCPUs are alike, so it makes no state different.
#[derive(Debug, Clone, Copy)]
struct Name(usize);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.0)
    }
}

impl PartialEq for Name {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Name {}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Cpu {
    name: Name,
    frames: Vec<Frame>,
    /// By the unit's number: values besides the present one that a fetch may show.
    stale: BTreeMap<usize, BTreeSet<u64>>,
    out: Option<Out>,
    intercepts: bool,
}

/// A state of everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State<'p> {
    session: Session<'p>,
    memory: Vec<u8>,
    published: bool,
    armed: bool,
    held: bool,
    /// A word that was read to be written back, if stores are not atomic.
    loaded: Option<Vec<u8>>,
    failures: u8,
    guest_done: bool,
    saw_new: bool,
    cpus: Vec<Cpu>,
}

/// Everything that can happen in a state.
struct Moves<'p> {
    told: bool,
    list: Vec<(String, Result<State<'p>, Violation>)>,
}

impl<'p> Moves<'p> {
    fn add(&mut self, what: impl FnOnce() -> String, result: Result<State<'p>, Violation>) {
        // The vCPUs are alike: their order makes no difference.
        let sorted = result.map(|mut state| {
            state.cpus.sort();
            state
        });
        self.list.push((if self.told { what() } else { String::new() }, sorted));
    }
}

fn violation<T>(what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(what.into()))
}

impl<'p> World<'p> {
    /// A world of two vCPUs that does its worst, but for the guest's own patching.
    #[must_use]
    pub fn new(program: &'p Program, memory: Vec<(Gva, Vec<u8>)>) -> Self {
        Self {
            program,
            memory,
            vcpus: 2,
            fetch: Fetch::Bytes,
            interrupts: true,
            failures: true,
            lost_writes: false,
            atomic: false,
            guest: Guest::Quiet,
            rules: Rules::ALL,
        }
    }

    fn index(&self, at: Gva) -> usize {
        let mut before = 0;
        for (base, bytes) in &self.memory {
            match at.offset_from(*base) {
                Some(offset) if offset < bytes.len() => return before + offset,
                _ => before += bytes.len(),
            }
        }
        // A program that leaves the world is a broken test.
        panic!("{at} is not in the world");
    }

    fn read<'s>(&self, state: &'s State<'p>, at: Gva, length: usize) -> &'s [u8] {
        let from = self.index(at);
        &state.memory[from..from + length]
    }

    fn unit_bytes(&self) -> usize {
        if self.fetch == Fetch::Bytes { 1 } else { 8 }
    }

    fn unit(&self, memory: &[u8], number: usize) -> u64 {
        let size = self.unit_bytes();
        let bytes = &memory[number * size..memory.len().min((number + 1) * size)];
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Writes memory; one store if it is aligned to its size, else byte by byte.
    fn write(&self, state: &mut State<'p>, at: Gva, bytes: &[u8]) {
        let from = self.index(at);
        let whole = matches!(bytes.len(), 1 | 2 | 4 | 8) && from.is_multiple_of(bytes.len());
        for (i, store) in bytes.chunks(if whole { bytes.len() } else { 1 }).enumerate() {
            let from = from + i;
            let number = from / self.unit_bytes();
            // A store never crosses a unit of eight; over units of one it is one for each.
            for number in number..=(from + store.len() - 1) / self.unit_bytes() {
                let old = self.unit(&state.memory, number);
                for cpu in &mut state.cpus {
                    cpu.stale.entry(number).or_default().insert(old);
                }
            }
            state.memory[from..from + store.len()].copy_from_slice(store);
            for number in number..=(from + store.len() - 1) / self.unit_bytes() {
                let new = self.unit(&state.memory, number);
                for cpu in &mut state.cpus {
                    if let Some(values) = cpu.stale.get_mut(&number) {
                        values.remove(&new);
                        if values.is_empty() {
                            cpu.stale.remove(&number);
                        }
                    }
                }
            }
        }
    }

    /// Every stream of `length` bytes that a fetch at `at` may show.
    fn fetch(&self, state: &State<'p>, cpu: &Cpu, at: Gva, length: usize) -> BTreeSet<Vec<u8>> {
        let (from, size) = (self.index(at), self.unit_bytes());
        let mut streams = BTreeSet::from([Vec::new()]);
        for number in from / size..=(from + length - 1) / size {
            let mut values = cpu.stale.get(&number).cloned().unwrap_or_default();
            values.insert(self.unit(&state.memory, number));
            let wanted = from.max(number * size)..(from + length).min((number + 1) * size);
            let longer = |stream: &Vec<u8>, value: u64| {
                let bytes = value.to_le_bytes();
                let part = &bytes[wanted.start - number * size..wanted.end - number * size];
                [stream, part].concat()
            };
            streams = streams.iter().flat_map(|s| values.iter().map(move |v| longer(s, *v))).collect();
        }
        streams
    }

    fn table(&self) -> Arc<TrapTable> {
        let publish = self.program.steps.iter().find_map(|step| match &step.step {
            Step::Publish(table) => Some(table.clone()),
            _ => None,
        });
        publish.unwrap_or_default()
    }

    /// The instructions that may be executed at `rip`.
    fn known(&self, rip: Gva) -> Vec<Known> {
        let mut known = Vec::new();
        for site in &self.program.sites {
            for (version, code) in [(Version::Old, &site.old), (Version::New, &site.new)] {
                let starts = [vec![site.at], interior::boundaries(code, site.at)].concat();
                for insn in insn::decode(code, site.at).filter(|insn| insn.at == rip && starts.contains(&rip))
                {
                    let offset = rip.offset_from(site.at).unwrap_or(0);
                    let next = rip.plus(insn.len).filter(|next| !insn.ends && starts.contains(next));
                    known.push(Known { version, code: code[offset..offset + insn.len].to_vec(), next });
                }
            }
        }
        if let Some(code) =
            self.program.copies.iter().find(|copy| copy.at == rip).map(|copy| copy.code.clone())
        {
            known.push(Known { version: Version::Copy, code, next: None });
        }
        let blocker = self.program.blockers.iter().find(|(at, _)| *at == rip);
        known.extend(blocker.map(|(_, byte)| Known {
            version: Version::Same,
            code: vec![*byte],
            next: None,
        }));
        known
    }

    fn standing(&self, cpu: usize, frames: &[Frame]) -> VcpuState {
        /// Code that belongs to no site.
        const ELSEWHERE: Gva = Gva(0);
        let rip = match frames.last() {
            Some(Frame::At { rip, .. } | Frame::Locked(rip)) => *rip,
            _ => ELSEWHERE,
        };
        // Interrupts are disabled or counted while something else is interrupted.
        let interrupted = frames.len() > 1 && self.rules.tells_interrupted;
        let mode = Mode::Kernel { interrupts: !interrupted, preempt_count: 0, idle: false };
        VcpuState { vcpu: VcpuId(cpu), rip, mode }
    }

    fn fence(state: &mut State<'p>) {
        state.cpus.iter_mut().for_each(|cpu| cpu.stale.clear());
    }

    /// Does a step. `None` if it can't be done yet.
    fn perform(&self, state: &mut State<'p>, step: &Step) -> Option<Result<(), StepError>> {
        let compare = |state: &State<'p>, at: Gva, bytes: &[u8]| {
            let found = self.read(state, at, bytes.len()).to_vec();
            if found == bytes { Ok(()) } else { Err(StepError::Mismatch { found }) }
        };
        match step {
            Step::Publish(_) => state.published = true,
            Step::Withdraw => state.published = false,
            Step::Arm => {
                state.armed = true;
                state.cpus.iter_mut().for_each(|cpu| cpu.intercepts = true);
                Self::fence(state);
            }
            Step::Disarm => state.armed = false,
            Step::Fence | Step::FinalFence => Self::fence(state),
            Step::Open { at, byte } => self.write(state, *at, &[*byte]),
            Step::Hold => {
                state.held = true;
                Self::fence(state);
            }
            Step::Inspect(condition) => {
                let vcpus: Vec<VcpuState> =
                    state.cpus.iter().enumerate().map(|(i, cpu)| self.standing(i, &cpu.frames)).collect();
                vcpus.iter().try_for_each(|vcpu| condition.check(vcpu)).ok()?;
                state.held = true;
                Self::fence(state);
            }
            Step::Release => state.held = false,
            Step::Write { at, bytes } => self.write(state, *at, bytes),
            Step::Check { at, bytes } => return Some(compare(state, *at, bytes)),
            Step::Await { at } => compare(state, *at, &[0; 8]).ok()?,
            Step::Store { at, old, new } => {
                if let Err(error) = compare(state, *at, old) {
                    return Some(Err(error));
                }
                // The whole word is stored, with its neighbours as they are, or were.
                let from = self.index(*at);
                let word = from / 8 * 8;
                let mut bytes = state
                    .loaded
                    .take()
                    .unwrap_or_else(|| state.memory[word..state.memory.len().min(word + 8)].to_vec());
                bytes[from - word..from - word + new.len()].copy_from_slice(new);
                self.write(state, Gva(at.0 - (from - word) as u64), &bytes);
            }
        }
        Some(Ok(()))
    }

    fn monitor_moves(&self, state: &State<'p>, moves: &mut Moves<'p>) {
        let Ok(step) = state.session.next() else { return };
        if let Step::Store { at, .. } = step
            && !self.rules.stores_are_atomic
            && state.loaded.is_none()
        {
            let word = self.index(*at) / 8 * 8;
            let mut next = state.clone();
            next.loaded = Some(state.memory[word..state.memory.len().min(word + 8)].to_vec());
            return moves.add(|| "monitor: reads the word around the site".into(), Ok(next));
        }
        let mut done = state.clone();
        if let Some(result) = self.perform(&mut done, step) {
            let failed = result.is_err();
            done.session.outcome(result);
            let what = || format!("monitor: {step}{}", if failed { ": finds something else" } else { "" });
            moves.add(what, self.ended(done));
        }
        let undoing = !state.session.may_give_up();
        if self.lost_writes && !undoing && state.failures == 0 && matches!(step, Step::Write { .. }) {
            let mut lost = state.clone();
            lost.failures = 1;
            lost.session.outcome(Ok(()));
            moves.add(|| format!("monitor: {step}: is LOST"), self.ended(lost));
        }
        if !self.failures || step.is_closing() || state.failures > u8::from(undoing) {
            return;
        }
        // It fails: nothing was done, or all, or a part.
        let fail = |mut next: State<'p>| {
            next.failures = state.failures.max(u8::from(undoing)) + 1;
            next.session.outcome(Err(StepError::Deadline));
            self.ended(next)
        };
        moves.add(|| format!("monitor: {step}: FAILS, not done"), fail(state.clone()));
        let part = match step {
            Step::Write { at, bytes } => {
                let mut half = state.clone();
                self.write(&mut half, *at, &bytes[..bytes.len().div_ceil(2)]);
                half
            }
            Step::Arm | Step::Hold => {
                let mut requested = state.clone();
                requested.armed |= *step == Step::Arm;
                requested.held |= *step == Step::Hold;
                requested
            }
            _ => return,
        };
        moves.add(|| format!("monitor: {step}: FAILS, done in part"), fail(part));
    }

    /// Checks what must hold when the session ends.
    fn ended(&self, state: State<'p>) -> Result<State<'p>, Violation> {
        let Err(end) = state.session.next() else { return Ok(state) };
        if let End::Held { .. } = end {
            return match (state.held, state.failures) {
                (false, _) => violation("the guest runs on, though its text is broken"),
                (true, 0..=1) => violation("the guest is held, though nothing failed while undoing"),
                (true, _) => Ok(state),
            };
        }
        let before = self.start();
        for site in &self.program.sites {
            let found = self.read(&state, site.at, site.old.len());
            let began = self.read(&before, site.at, site.old.len());
            if *end == End::Applied && self.guest == Guest::Quiet && began != site.old {
                return violation(format!("{} was {} and is overwritten", site.at, insn::hex(began)));
            }
            let is_right = match end {
                End::Applied => found == site.new,
                // What the guest replaced itself is the old code.
                _ => found == began || state.guest_done && found == site.old,
            };
            if !is_right {
                return violation(format!("{} ends as {}", site.at, insn::hex(found)));
            }
        }
        if let Some((at, _)) =
            self.program.blockers.iter().find(|(at, byte)| self.read(&state, *at, 1) != [*byte])
        {
            return violation(format!("the blocker at {at} is still there"));
        }
        if let Guest::Writes(at, byte) = self.guest
            && state.guest_done
            && self.read(&state, at, 1) != [byte]
        {
            return violation(format!("what the guest wrote at {at} is lost"));
        }
        match (state.held, state.published, state.armed) {
            (false, false, false) => Ok(state),
            (true, ..) => violation("the vCPUs stay held"),
            (_, true, _) => violation("the traps stay published"),
            (.., true) => violation("#BP stays intercepted"),
        }
    }

    fn guest_moves(&self, state: &State<'p>, moves: &mut Moves<'p>) {
        if let Guest::Writes(at, byte) | Guest::Replaces(at, byte) = self.guest
            && !state.guest_done
            && !state.held
        {
            let mut next = state.clone();
            next.guest_done = true;
            self.write(&mut next, at, &[byte]);
            moves.add(|| format!("guest: writes {byte:02x} at {at}"), Ok(next));
        }
    }

    fn cpu_moves(&self, state: &State<'p>, number: usize, moves: &mut Moves<'p>) {
        let cpu = &state.cpus[number];
        let name = cpu.name;
        let with = |change: &dyn Fn(&mut Cpu)| {
            let mut next = state.clone();
            change(&mut next.cpus[number]);
            next
        };
        if cpu.intercepts != state.armed {
            let on = if state.armed { "on" } else { "off" };
            let next = with(&|cpu| cpu.intercepts = state.armed);
            moves.add(|| format!("{name}: switches interception {on}"), Ok(next));
        }
        if cpu.out.is_some() {
            return self.out_moves(state, number, moves);
        }
        if state.held {
            return;
        }
        match cpu.frames.last() {
            Some(Frame::Locked(_) | Frame::Compares | Frame::Relies(_)) => {
                self.patcher_moves(state, number, moves);
            }
            Some(Frame::At { rip, pass }) => {
                if self.interrupts && cpu.frames.len() < 2 {
                    let next = with(&|cpu| cpu.frames.push(Frame::Elsewhere));
                    moves.add(|| format!("{name}: is interrupted at {rip}"), Ok(next));
                }
                self.executions(state, number, *rip, *pass, moves);
            }
            _ => {
                if cpu.frames.len() > 1 {
                    let next = with(&|cpu| cpu.frames.truncate(1));
                    moves.add(|| format!("{name}: returns from the interrupt"), Ok(next));
                }
                let own = match self.guest {
                    Guest::Owns(at) => Some(at),
                    _ => None,
                };
                let blockers = self.program.blockers.iter().map(|(at, _)| *at);
                if let Guest::Patches { lock, blocker } = self.guest
                    && cpu.frames.len() == 1
                    && self.read(state, lock, 8) == [0; 8]
                {
                    let mut next = with(&|cpu| top(cpu, Frame::Locked(blocker)));
                    // Nobody executes it, so nobody fetches it stale.
                    next.memory[self.index(lock)] = 1;
                    moves.add(|| format!("{name}: takes the lock"), Ok(next));
                }
                for at in self.program.sites.iter().map(|site| site.at).chain(own).chain(blockers) {
                    let next = with(&|cpu| top(cpu, Frame::At { rip: at, pass: None }));
                    moves.add(|| format!("{name}: comes to {at}"), Ok(next));
                }
            }
        }
    }

    /// What a vCPU does that patches the guest's text.
    fn patcher_moves(&self, state: &State<'p>, number: usize, moves: &mut Moves<'p>) {
        let Guest::Patches { lock, .. } = self.guest else { return };
        let cpu = &state.cpus[number];
        let name = cpu.name;
        let to = |frame| {
            let mut next = state.clone();
            top(&mut next.cpus[number], frame);
            next
        };
        let found = |version| {
            self.program.sites.iter().all(|site| {
                let code = if version == Version::Old { &site.old } else { &site.new };
                self.read(state, site.at, code.len()) == *code
            })
        };
        match cpu.frames.last() {
            Some(Frame::Locked(blocker)) => {
                for stream in self.fetch(state, cpu, *blocker, 1) {
                    if stream[0] == INT3 {
                        moves
                            .add(|| format!("{name}: meets the blocker"), self.int3(state, number, *blocker));
                    } else {
                        moves.add(|| format!("{name}: comes by the blocker"), Ok(to(Frame::Compares)));
                    }
                }
            }
            Some(Frame::Compares) => {
                let version = [Version::Old, Version::New].into_iter().find(|version| found(*version));
                let result = match version {
                    Some(version) => Ok(to(Frame::Relies(version))),
                    None => violation("the guest finds what it does not expect, and panics"),
                };
                moves.add(|| format!("{name}: compares"), result);
            }
            Some(Frame::Relies(version)) => {
                let mut next = to(Frame::Elsewhere);
                next.memory[self.index(lock)] = 0;
                let result = if found(*version) {
                    Ok(next)
                } else {
                    violation("the guest replaces what is there no more")
                };
                moves.add(|| format!("{name}: gives the lock back"), result);
            }
            _ => {}
        }
    }

    /// What a vCPU in the guest may execute at `rip`.
    fn executions(
        &self,
        state: &State<'p>,
        number: usize,
        rip: Gva,
        pass: Option<Version>,
        moves: &mut Moves<'p>,
    ) {
        let name = state.cpus[number].name;
        let known = self.known(rip);
        let length = known.iter().map(|insn| insn.code.len()).max().unwrap_or(1);
        let mut seen = BTreeSet::new();
        for stream in self.fetch(state, &state.cpus[number], rip, length) {
            let version = known.iter().position(|insn| stream.starts_with(&insn.code));
            let what = if stream[0] == INT3 { None } else { Some(version.ok_or(stream)) };
            seen.insert(what);
        }
        for what in seen {
            match what {
                None => {
                    let told = || format!("{name}: executes int3 at {rip}");
                    moves.add(told, self.int3(state, number, rip));
                }
                Some(Err(stream)) => {
                    let text = insn::disassemble(&stream, rip).join(" | ");
                    let told = || format!("{name}: executes {text}");
                    moves.add(
                        told,
                        violation(format!("neither the old nor the new code: {}", insn::hex(&stream))),
                    );
                }
                Some(Ok(index)) => {
                    let insn = &known[index];
                    let told = || format!("{name}: executes the {:?} code at {rip}", insn.version);
                    moves.add(told, self.executed(state, number, pass, insn));
                }
            }
        }
    }

    fn executed(
        &self,
        state: &State<'p>,
        number: usize,
        pass: Option<Version>,
        insn: &Known,
    ) -> Result<State<'p>, Violation> {
        let mut next = state.clone();
        let end = state.session.next().err();
        match insn.version {
            version if pass.is_some_and(|pass| pass != version) => {
                return violation("a site was begun in one version and goes on in the other");
            }
            Version::Old if end == Some(&End::Applied) => {
                return violation("old code is executed after the program was applied");
            }
            Version::Old if self.atomic && state.saw_new => {
                return violation("old code is executed after new code of the same group");
            }
            Version::New if matches!(end, Some(End::RolledBack { .. })) => {
                return violation("new code is executed after the program was rolled back");
            }
            Version::New => next.saw_new = self.atomic,
            _ => {}
        }
        let frame = match insn.next {
            Some(rip) => Frame::At { rip, pass: Some(insn.version) },
            None => Frame::Elsewhere,
        };
        top(&mut next.cpus[number], frame);
        Ok(next)
    }

    /// Whether the guest has an `int3` of its own there now.
    fn is_guests(&self, state: &State<'p>, rip: Gva) -> bool {
        match self.guest {
            Guest::Owns(at) => at == rip,
            Guest::Replaces(at, _) => at == rip && !state.guest_done,
            _ => false,
        }
    }

    fn int3(&self, state: &State<'p>, number: usize, rip: Gva) -> Result<State<'p>, Violation> {
        let mut next = state.clone();
        let cpu = &mut next.cpus[number];
        if cpu.intercepts {
            cpu.out = Some(Out::Trapped);
        } else {
            self.delivered(state, rip)?;
            top(cpu, Frame::Elsewhere);
        }
        Ok(next)
    }

    /// The guest gets a #BP: its own, or a stale one of its own, which it recognises by the
    /// byte that is there now.
    fn delivered(&self, state: &State<'p>, rip: Gva) -> Result<(), Violation> {
        let was_guests = matches!(self.guest, Guest::Replaces(at, _) if at == rip);
        if self.is_guests(state, rip) || was_guests && self.read(state, rip, 1) != [INT3] {
            Ok(())
        } else {
            violation("the guest gets a #BP that is not its own")
        }
    }

    fn out_moves(&self, state: &State<'p>, number: usize, moves: &mut Moves<'p>) {
        let cpu = &state.cpus[number];
        let name = cpu.name;
        let Some(Frame::At { rip, .. } | Frame::Locked(rip)) = cpu.frames.last().copied() else { return };
        let to = |frame: Option<Frame>, out: Option<Out>| {
            let mut next = state.clone();
            let cpu = &mut next.cpus[number];
            cpu.out = out;
            if let Some(frame) = frame {
                top(cpu, frame);
            }
            Ok(next)
        };
        match cpu.out {
            Some(Out::Trapped) => {
                let told = || format!("{name}: is out, reads the trap table");
                moves.add(told, to(None, Some(Out::Looked(state.published))));
            }
            Some(Out::Looked(published)) => {
                let table = if published { self.table() } else { Arc::default() };
                let byte = if self.rules.reads_again { self.read(state, rip, 1)[0] } else { INT3 };
                let (what, result) = match table.judge(rip, byte) {
                    Verdict::Resume => ("executes what is there now", to(None, None)),
                    Verdict::Pass(TrapAction::Wait) => ("waits", to(None, Some(Out::Waiting))),
                    Verdict::Pass(TrapAction::Effect(_)) => {
                        ("passes by effect", to(Some(Frame::Elsewhere), None))
                    }
                    Verdict::Pass(TrapAction::Slot(copy)) => {
                        ("goes to the copy", to(Some(Frame::At { rip: copy, pass: None }), None))
                    }
                    Verdict::Deliver if self.rules.looks_twice && published != state.published => {
                        ("finds another table", to(None, Some(Out::Trapped)))
                    }
                    Verdict::Deliver => (
                        "delivers #BP to the guest",
                        self.delivered(state, rip).and_then(|()| to(Some(Frame::Elsewhere), None)),
                    ),
                };
                moves.add(|| format!("{name}: reads {byte:02x} at {rip}, {what}"), result);
            }
            Some(Out::Waiting) if !state.published => {
                moves.add(|| format!("{name}: goes on"), to(None, None));
            }
            _ => {}
        }
    }
}

fn top(cpu: &mut Cpu, frame: Frame) {
    if let Some(top) = cpu.frames.last_mut() {
        *top = frame;
    }
}

impl<'p> System for World<'p> {
    type State = State<'p>;

    fn start(&self) -> State<'p> {
        // An earlier program has just been disarmed: some vCPU still intercepts.
        let left_over = matches!(self.guest, Guest::Owns(_) | Guest::Replaces(..));
        let cpu = |name| Cpu {
            name: Name(name),
            frames: vec![Frame::Elsewhere],
            stale: BTreeMap::new(),
            out: None,
            intercepts: left_over,
        };
        State {
            session: Session::new(self.program),
            memory: self.memory.iter().flat_map(|(_, bytes)| bytes).copied().collect(),
            published: false,
            armed: false,
            held: false,
            loaded: None,
            failures: 0,
            guest_done: false,
            saw_new: false,
            cpus: (0..self.vcpus).map(cpu).collect(),
        }
    }

    fn moves(&self, state: &State<'p>, told: bool) -> Vec<(String, Result<State<'p>, Violation>)> {
        let mut moves = Moves { told, list: Vec::new() };
        self.monitor_moves(state, &mut moves);
        self.guest_moves(state, &mut moves);
        for number in 0..state.cpus.len() {
            self.cpu_moves(state, number, &mut moves);
        }
        moves.list
    }
}
