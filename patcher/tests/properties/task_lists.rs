//! Tasks and their stacks in the memory of a guest that runs the miniature: as they should be, changing while they
//! are read, and with anything in them. Reading ends, and says what it could not read.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use patcher::addr::Gva;
use patcher::image::KernelImage;
use patcher::image::orc::OrcTable;
use patcher::image::task_offsets::TaskOffsets;
use patcher::linux::stack::{Copied, Stack, stack_size};
use patcher::linux::tasks::{MOST_TASKS, Task, TaskReader, WORK};
use patcher::linux::unwind::{Backtrace, Unwinder};
use patcher::linux::{Bounded, GuestMemory, Kernel, Module, Modules};
use patcher::plan::refusal::Refusal;

use crate::miniature::{self, BASE};

/// Where the task of a number is, what its process shares, and its stack.
const TASKS: u64 = 0xffff_8880_0010_0000;
const SIGNALS: u64 = 0xffff_8880_0020_0000;
pub(crate) const STACKS: u64 = 0xffff_c900_0000_0000;
pub(crate) const PER_CPU: u64 = 0xffff_8880_0030_0000;
pub(crate) const STACK: u64 = 0x4000;
static NO_MODULES: Modules = Modules::NONE;

/// The miniature's image, and words over it. `when` is called with the number of the read.
pub(crate) struct Guest<'a> {
    image: &'a KernelImage,
    text: Vec<u8>,
    words: RefCell<BTreeMap<u64, u64>>,
    reads: Cell<u64>,
    when: &'a dyn Fn(u64, &mut BTreeMap<u64, u64>),
}

impl GuestMemory for Guest<'_> {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        self.reads.set(self.reads.get() + 1);
        (self.when)(self.reads.get(), &mut self.words.borrow_mut());
        let image = BASE..BASE + self.text.len() as u64;
        for (place, byte) in (at.0..).zip(into) {
            let word = self.words.borrow().get(&(place & !7)).copied();
            *byte = match word {
                Some(word) => word.to_le_bytes()[usize::try_from(place % 8).expect("small")],
                None if image.contains(&place) => self.text[usize::try_from(place - BASE).expect("small")],
                None if place >> 56 == 0xff => 0,
                None => return Err(Gva(place)),
            };
        }
        Ok(())
    }
}

pub(crate) fn image() -> (KernelImage, Vec<u8>) {
    let file = miniature::vmlinux();
    (KernelImage::parse(&file).expect("a kernel"), file[64 + 56..].to_vec())
}

fn never(_: u64, _: &mut BTreeMap<u64, u64>) {}

pub(crate) fn symbol(image: &KernelImage, name: &str) -> u64 {
    image.symbols().only(name).expect("a symbol").0
}

pub(crate) fn offsets(image: &KernelImage) -> TaskOffsets {
    image.offsets().task.expect("the offsets")
}

pub(crate) fn task(number: u64) -> u64 {
    TASKS + 0x100 * number
}

impl<'a> Guest<'a> {
    /// Of two CPUs, with processes of so many threads each, the first of which is 1.
    pub(crate) fn new(image: &'a KernelImage, text: &[u8], processes: &[u64]) -> Self {
        let guest =
            Self { image, text: text.to_vec(), words: RefCell::default(), reads: Cell::new(0), when: &never };
        let at = offsets(image);
        let head = symbol(image, "init_task");
        let (mut leaders, mut next) = (vec![head + at.tasks], 1);
        for count in processes {
            let leader = next;
            let signal = SIGNALS + 0x100 * leader;
            let mut nodes = vec![signal + at.thread_head];
            for number in leader..leader + count {
                guest.describe(task(number), number, leader, signal);
                nodes.push(task(number) + at.thread_node);
            }
            guest.link(&nodes);
            leaders.push(task(leader) + at.tasks);
            next += count;
        }
        guest.link(&leaders);
        for cpu in 0..2 {
            let base = PER_CPU + 0x1_0000 * cpu;
            // The image's per-CPU variables are linked where it is.
            let start = symbol(image, "__per_cpu_start");
            guest.set(symbol(image, "__per_cpu_offset") + 8 * cpu, base.wrapping_sub(start));
            let place = symbol(image, "idle_threads") - start;
            let idle = if cpu == 0 { head } else { task(900) };
            guest.describe(idle, 0, 0, SIGNALS);
            guest.set(base + place, idle);
        }
        guest
    }

    pub(crate) fn set(&self, at: u64, word: u64) {
        assert_eq!(at % 8, 0, "{at:#x}");
        self.words.borrow_mut().insert(at, word);
    }

    /// Links a list; the first is its head.
    pub(crate) fn link(&self, nodes: &[u64]) {
        for (index, node) in nodes.iter().enumerate() {
            self.set(*node, nodes[(index + 1) % nodes.len()]);
            self.set(node + 8, nodes[(index + nodes.len() - 1) % nodes.len()]);
        }
    }

    fn describe(&self, task: u64, pid: u64, tgid: u64, signal: u64) {
        let at = offsets(self.image);
        // Members of four bytes: `pid` and `tgid` share a word, as do `on_cpu` and `exit_state`, `__state` and `flags`.
        assert_eq!((at.pid.offset + 4, at.pid.offset % 8), (at.tgid.offset, 0));
        self.set(task + at.pid.offset, pid | tgid << 32);
        self.set(task + at.state.offset, 1);
        self.set(task + at.comm, u64::from(b'a') + pid % 26);
        self.set(task + at.signal, signal);
        self.set(task + at.stack, STACKS + STACK * pid);
        self.set(task + at.sp, STACKS + STACK * pid + STACK - 0x100);
    }

    pub(crate) fn kernel(&self) -> Kernel<'_> {
        Kernel { image: self.image, slide: 0, modules: &NO_MODULES }
    }

    fn tasks(&self) -> Result<Vec<Task>, Refusal> {
        let kernel = self.kernel();
        TaskReader::new(&kernel, self)?.all(MOST_TASKS)
    }

    fn pids(&self) -> Result<Vec<u32>, String> {
        let tasks = self.tasks().map_err(|refusal| refusal.to_string())?;
        Ok(tasks.iter().map(|task| task.pid).collect())
    }

    fn stack(&self, task: u64) -> Result<Copied, Refusal> {
        let kernel = self.kernel();
        TaskReader::new(&kernel, self)?.stack(Gva(task))
    }

    /// The frames of a task that stands there, with these words on its stack behind.
    fn backtrace(&self, at: u64, words: &[u64]) -> Backtrace {
        let kernel = self.kernel();
        let mut all = vec![0; 7];
        all[6] = at;
        all.extend(words);
        let stack =
            Stack { at: Gva(STACKS), bytes: all.iter().flat_map(|word| word.to_le_bytes()).collect() };
        Unwinder::new(&kernel, self).backtrace(&stack).expect("little to read")
    }
}

/// Numbers that look random, the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("small")
    }
}

#[test]
fn every_thread_of_every_process_and_the_idle_tasks() {
    let (image, text) = image();
    let guest = Guest::new(&image, &text, &[1, 3, 2]);
    let tasks = guest.tasks().expect("tasks");
    let found: Vec<_> =
        tasks.iter().map(|task| (task.tgid, task.pid, task.comm.as_str(), task.state)).collect();
    let of = |tgid, pid, comm| (tgid, pid, comm, 'S');
    let own = [of(1, 1, "b"), of(2, 2, "c"), of(2, 3, "d"), of(2, 4, "e"), of(5, 5, "f"), of(5, 6, "g")];
    assert_eq!(found, [&[of(0, 0, "a"); 2], &own[..]].concat());
    let too_many = TaskReader::new(&guest.kernel(), &guest).expect("a reader").all(7);
    assert_eq!(too_many.map_err(|refusal| refusal.code()), Err("too_many_tasks"));
    assert_eq!(stack_size(&guest.kernel()), Ok(STACK));
}

#[test]
fn lists_that_lead_into_themselves_or_do_not_lead_back_are_told() {
    let (image, text) = image();
    let at = offsets(&image);
    for (what, place, word) in [
        ("the second leads to the first", task(4) + at.tasks, task(1) + at.tasks),
        ("a process leads to itself", task(2) + at.tasks, task(2) + at.tasks),
        ("a process leads nowhere", task(2) + at.tasks, 0x7fff_0000_1000),
        ("a process leads out of place", task(2) + at.tasks, task(4) + at.tasks + 1),
        ("a process does not point back", task(2) + at.tasks + 8, task(4) + at.tasks),
        ("a thread leads to itself", task(3) + at.thread_node, task(3) + at.thread_node),
        ("threads without their head", task(3) + at.thread_node, task(2) + at.thread_node),
        ("a thread of another process", task(3) + at.signal, SIGNALS),
        ("no signal", task(2) + at.signal, 8),
    ] {
        let guest = Guest::new(&image, &text, &[1, 2, 1]);
        assert_eq!(guest.pids(), Ok(vec![0, 0, 1, 2, 3, 4]));
        guest.set(place, word);
        let refused = guest.tasks().map_err(|refusal| refusal.code());
        assert_eq!(refused, Err("bad_tasks"), "{what}");
    }
}

/// A task ends, or is born, at any moment of the walk: all others are listed, each once.
#[test]
fn tasks_that_come_and_go_meanwhile_hide_no_others() {
    let (image, text) = image();
    let at = offsets(&image);
    let quiet = Guest::new(&image, &text, &[1, 2, 1, 1]);
    quiet.tasks().expect("tasks");
    for moment in 1..=quiet.reads.get() {
        // Process 4 is taken out as `list_del_rcu` does, and its memory filled with something else.
        let ends = |read: u64, words: &mut BTreeMap<u64, u64>| {
            if read == moment {
                let (before, behind) = (task(2) + at.tasks, task(5) + at.tasks);
                words.extend([(before, behind), (behind + 8, before), (task(4) + at.tasks + 8, 0x122)]);
                // By now it is another's, which is on no list yet.
                words.insert(task(4) + at.pid.offset, 77 | 77 << 32);
            }
        };
        let guest = Guest { when: &ends, ..Guest::new(&image, &text, &[1, 2, 1, 1]) };
        let mut pids = guest.pids().expect("tasks");
        pids.retain(|pid| *pid != 4);
        assert_eq!(pids, [0, 0, 1, 2, 3, 5], "4 ends at read {moment}");
        // And is put in again, as `list_add_tail_rcu` does.
        let begins = |read: u64, words: &mut BTreeMap<u64, u64>| {
            let (before, own, behind) = (task(2) + at.tasks, task(4) + at.tasks, task(5) + at.tasks);
            if read == 1 {
                words.extend([(before, behind), (behind + 8, before)]);
            }
            if read == moment + 1 {
                words.extend([(own, behind), (own + 8, before), (before, own), (behind + 8, own)]);
            }
        };
        let guest = Guest { when: &begins, ..Guest::new(&image, &text, &[1, 2, 1, 1]) };
        let mut pids = guest.pids().expect("tasks");
        pids.retain(|pid| *pid != 4);
        assert_eq!(pids, [0, 0, 1, 2, 3, 5], "4 begins at read {moment}");
    }
}

#[test]
fn a_guest_with_anything_in_its_lists_is_read_or_refused() {
    let (image, text) = image();
    let mut random = Random(1);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..4000 {
        let guest = Guest::new(&image, &text, &[1, 2, 3, 1]);
        let places: Vec<u64> = guest.words.borrow().keys().copied().collect();
        for _ in 0..=random.below(3) {
            let (to, other) = (places[random.below(places.len())], places[random.below(places.len())]);
            let word = match random.below(4) {
                0 => random.next(),
                1 => 0,
                2 => other,
                _ => *guest.words.borrow().get(&other).expect("a word"),
            };
            guest.set(to, word);
        }
        let kernel = guest.kernel();
        let memory = Bounded::new(&guest, 6000);
        let reader = TaskReader::new(&kernel, &memory).expect("a reader");
        let mut unwinder = Unwinder::new(&kernel, &memory);
        match reader.all(100) {
            Ok(tasks) => {
                assert!(tasks.len() <= 100);
                read += 1;
                for task in tasks {
                    if let Ok(Copied::Stack(stack)) = reader.stack(task.at) {
                        assert!(stack.bytes.len() <= usize::try_from(STACK).expect("small"));
                        let _ = unwinder.backtrace(&stack);
                    }
                }
            }
            Err(refusal) => {
                let known = ["bad_tasks", "too_many_tasks", "unmapped", "too_much_to_read"];
                assert!(known.contains(&refusal.code()), "{refusal}");
                refused += 1;
            }
        }
    }
    assert!(read > 500 && refused > 500, "{read} read, {refused} refused");
}

#[test]
fn a_stack_is_copied_only_if_its_task_did_not_run() {
    let (image, text) = image();
    let at = offsets(&image);
    let guest = || Guest::new(&image, &text, &[1]);
    let copied = |guest: &Guest<'_>| guest.stack(task(1)).expect("little to read");
    let Copied::Stack(stack) = copied(&guest()) else { panic!("it was not copied") };
    assert_eq!((stack.at.0, stack.bytes.len()), (STACKS + 2 * STACK - 0x100, 0x100));
    let with = |place: u64, word: u64| {
        let guest = guest();
        guest.set(task(1) + place, word);
        copied(&guest)
    };
    assert_eq!(with(at.on_cpu.offset, 1), Copied::Running);
    assert_eq!(with(at.stack, 0), Copied::None);
    for sp in [0, STACKS, STACKS + 2 * STACK, STACKS + STACK + 4, u64::MAX] {
        assert_eq!(with(at.sp, sp), Copied::Unreadable, "{sp:#x}");
    }
    assert_eq!(with(at.stack, u64::MAX - 0xff), Copied::Unreadable);
    for counter in [at.nvcsw.offset, at.nivcsw.offset, at.sp] {
        // It runs before every read.
        let runs = |read: u64, words: &mut BTreeMap<u64, u64>| {
            let word = if counter == at.sp { STACKS + STACK + 8 * read } else { read };
            words.insert(task(1) + counter, word);
        };
        assert_eq!(copied(&Guest { when: &runs, ..guest() }), Copied::Moving, "{counter}");
        // It ran once, while the stack was read for the first time.
        let once = |read: u64, words: &mut BTreeMap<u64, u64>| {
            if read == 6 {
                words.insert(task(1) + counter, STACKS + STACK + 0x100);
            }
        };
        assert!(matches!(copied(&Guest { when: &once, ..guest() }), Copied::Stack(_)), "{counter}");
    }
}

#[test]
fn frames_are_those_of_the_table_up_to_where_a_task_began() {
    let (image, text) = image();
    let guest = Guest::new(&image, &text, &[1]);
    let at = |name| symbol(&image, name);
    let reliable = |trace: &Backtrace| {
        let frames = trace.frames.iter().filter(|frame| frame.reliable);
        frames.map(|frame| frame.name(&guest.kernel()).expect("a name").symbol).collect::<Vec<_>>()
    };
    let begin = at("ret_from_fork_asm");
    let trace = guest.backtrace(at("schedule") + 1, &[at("kvm_wait") + 2, begin + 1, 7]);
    assert_eq!(trace.broken, None);
    let expected = ["schedule+0x1/0x10", "kvm_wait+0x2/0x10", "ret_from_fork_asm+0x1/0x10"];
    assert_eq!(reliable(&trace), expected);
    let new = guest.backtrace(begin, &[]);
    assert_eq!((new.broken, reliable(&new)), (None, vec!["ret_from_fork_asm+0x0/0x10".to_owned()]));
    // Behind what is no code, only what stands behind a call may be a frame.
    let (behind_call, elsewhere) = (at("function") + 15, at("function") + 5);
    for wrong in [7, at("modules"), at("return_to_handler")] {
        let trace = guest.backtrace(at("schedule") + 1, &[wrong, elsewhere, behind_call]);
        assert!(trace.broken.is_some() && trace.frames.len() == 2, "{trace:?}");
        assert_eq!(reliable(&trace), ["schedule+0x1/0x10"]);
        assert_eq!((trace.frames[1].address.0, trace.frames[1].reliable), (behind_call, false));
    }
    assert!(guest.backtrace(at("schedule") + 1, &[]).broken.is_some(), "it leads out of the stack");
    // The entry of `schedule` has no frame at all.
    let entries = image.orc().expect("a table").table.entries.0;
    guest.set(entries, u64::from_le_bytes([0, 0, 0, 0, 5, 2, 0, 0]));
    let trace = guest.backtrace(at("schedule") + 1, &[at("kvm_wait") + 2]);
    assert!(trace.broken.is_some() && reliable(&trace) == ["schedule+0x1/0x10"], "{trace:?}");
}

#[test]
fn frames_of_a_module_are_those_of_its_own_table() {
    const TEXT: u64 = 0xffff_ffff_c000_0000;
    let (image, text) = image();
    let guest = Guest::new(&image, &text, &[1]);
    let symbols = patcher::image::Symbols::new([(TEXT, b't', "waits")].into_iter()).expect("one");
    let table = OrcTable { ips: Gva(TEXT + 0x2000), entries: Gva(TEXT + 0x3000), count: 1 };
    guest.set(table.ips.0, TEXT.wrapping_sub(table.ips.0) & 0xffff_ffff);
    // Two words more than a return address.
    guest.set(table.entries.0, u64::from_le_bytes([24, 0, 0, 0, 5, 2, 0, 0]));
    let trace = |orc| {
        let module = Module {
            at: Gva(TEXT + 0x8000),
            name: "late".to_owned(),
            text: Gva(TEXT)..Gva(TEXT + 0x1000),
            symbols: patcher::image::Symbols::new(symbols.iter().map(|(at, kind, name)| (at.0, kind, name)))
                .expect("one"),
            jump_entries: Vec::new(),
            static_call_sites: Vec::new(),
            exceptions: Vec::new(),
            landings: patcher::image::landings::Landings::default(),
            orc,
        };
        let modules = Modules::new(Ok((vec![module], Vec::new())));
        let kernel = Kernel { image: &image, slide: 0, modules: &modules };
        let begin = symbol(&image, "ret_from_fork_asm") + 1;
        let words = [0, 0, 0, 0, 0, 0, TEXT + 0x10, 1, 2, begin];
        let stack =
            Stack { at: Gva(STACKS), bytes: words.iter().flat_map(|word| u64::to_le_bytes(*word)).collect() };
        let trace = Unwinder::new(&kernel, &guest).backtrace(&stack).expect("little to read");
        let name = trace.frames[0].name(&kernel).expect("a name");
        assert_eq!((name.symbol.as_str(), name.module.as_deref()), ("waits+0x10/0x1000", Some("late")));
        (trace.frames.len(), trace.broken.is_none())
    };
    assert_eq!(trace(Some(table)), (2, true));
    assert_eq!(trace(None), (1, false));
    assert!(!trace(Some(OrcTable { count: u32::MAX, ..table })).1, "it claims more than there is");
}

/// Whatever is on a stack and in a table, unwinding ends, and finds no more frames than the stack has words.
#[test]
fn stacks_and_tables_may_hold_anything() {
    let (image, text) = image();
    let mut random = Random(2);
    let places: Vec<u64> = image.symbols().iter().map(|(at, ..)| at.0).collect();
    let orc = image.orc().expect("a table").table;
    for _ in 0..5000 {
        let guest = Guest::new(&image, &text, &[1]);
        if random.below(2) == 0 {
            for word in 0..3 {
                guest.set((orc.entries.0 & !7) + 8 * word, random.next() & 0x0fff_0f0f_00ff_00ff);
            }
        }
        let mut word = || match random.below(3) {
            0 => places[random.below(places.len())] + u64::try_from(random.below(4)).expect("small"),
            1 => STACKS + 8 * u64::try_from(random.below(64)).expect("small"),
            _ => random.next(),
        };
        let words: Vec<u64> = (0..60).map(|_| word()).collect();
        let at = word();
        assert!(guest.backtrace(at, &words).frames.len() <= 67);
    }
}

#[test]
fn reading_ends_with_the_budget() {
    let (image, text) = image();
    let guest = Guest::new(&image, &text, &[1, 2, 3]);
    let kernel = guest.kernel();
    let all = |units| {
        let memory = Bounded::new(&guest, units);
        TaskReader::new(&kernel, &memory).and_then(|reader| reader.all(MOST_TASKS)).map(|tasks| tasks.len())
    };
    let enough = (0..1000).find(|units| all(*units).is_ok()).expect("it needs less");
    assert!((0..enough).all(|units| all(units) == Err(Refusal::TooMuchToRead)));
    assert_eq!(all(WORK), Ok(8));
}
