//! Who stands in a function of a guest that runs the miniature: what is read of its tasks and vCPUs, and every moment at
//! which nothing can be told.

use patcher::addr::{Gva, VcpuId};
use patcher::image::KernelImage;
use patcher::image::scan_offsets::ScanOffsets;
use patcher::linux::kprobes;
use patcher::linux::tasks::TaskReader;
use patcher::plan::refusal::Refusal;
use patcher::safety::guest_stacks::{GuestStacks, Position, Unread};
use patcher::safety::old_code::Place;
use patcher::safety::stack_check::{OldCode, Running, StackCheck, Stacks, TaskId, Why};

use crate::task_lists::{Guest, PER_CPU, STACK, STACKS, image, offsets, symbol, task};

/// Where the pages of kprobes' copies are described, and such a page.
const PAGES: u64 = 0xffff_8880_0040_0000;
const COPIES: u64 = 0xffff_ffff_c100_0000;
/// Where the monitor has its own.
const OWN_COPIES: Gva = Gva(0xffff_ffff_c200_0000);
/// Where a tracer keeps return addresses.
const KEPT: u64 = 0xffff_8880_0050_0000;
/// What no function is at.
const NOTHING: u64 = 7;

fn scan(image: &KernelImage) -> ScanOffsets {
    image.offsets().scan.expect("the offsets")
}

/// Where a CPU counts the tasks of its run queue.
fn queue(image: &KernelImage, cpu: u64) -> u64 {
    let place = symbol(image, "runqueues") - symbol(image, "__per_cpu_start");
    // It shares its word with what is before it.
    PER_CPU + 0x1_0000 * cpu + place + scan(image).nr_running.offset - 4
}

/// Three processes of one thread: the first runs in the kernel on CPU 0, the second in user mode on CPU 1, the third
/// sleeps.
fn guest<'a>(image: &'a KernelImage, text: &[u8]) -> Guest<'a> {
    let guest = Guest::new(image, text, &[1, 1, 1]);
    let (at, own) = (offsets(image), scan(image));
    // The idle tasks have stacks of their own.
    guest.set(task(900) + at.stack, STACKS + 900 * STACK);
    guest.set(task(900) + at.sp, STACKS + 901 * STACK - 0x100);
    guest.set(task(900) + at.cpu.offset, 1);
    for (number, cpu) in [(1, 0), (2, 1)] {
        guest.set(task(number) + at.on_cpu.offset, 1);
        guest.set(task(number) + at.cpu.offset, cpu);
        guest.set(task(number) + own.on_rq.offset, 1);
        guest.set(queue(image, cpu), 1 << 32);
    }
    for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
        guest.link(&[symbol(image, cache) + own.slot_pages]);
    }
    guest
}

/// Where the stack of a task ends, less some words.
fn stack_of(number: u64, words: u64) -> u64 {
    STACKS + (number + 1) * STACK - 8 * words
}

fn in_kernel(rsp: u64, cpu: Option<usize>) -> Position {
    Position::Kernel { rip: Gva(NOTHING), rsp: Gva(rsp), cpu }
}

/// vCPU 0 in the kernel on the stack of the first task, vCPU 1 in user mode.
fn positions() -> Vec<Position> {
    vec![in_kernel(stack_of(1, 2), Some(0)), Position::User]
}

fn held<'g>(
    guest: &'g Guest<'_>,
    kernel: &'g patcher::linux::Kernel<'g>,
    positions: &[Position],
) -> GuestStacks<'g> {
    let mut stacks = GuestStacks::new(TaskReader::new(kernel, guest).expect("a reader"));
    stacks.held(positions.iter().enumerate().map(|(vcpu, position)| (VcpuId(vcpu), *position)).collect());
    stacks
}

fn id(number: u64) -> TaskId {
    TaskId(Gva(task(number)))
}

#[test]
fn a_vcpu_in_the_kernel_has_the_task_of_its_stack_and_one_in_user_mode_that_of_its_cpu() {
    let (image, text) = image();
    let guest = guest(&image, &text);
    guest.set(stack_of(1, 1), 0x1234);
    let kernel = guest.kernel();
    let mut stacks = held(&guest, &kernel, &positions());
    let expected = [
        Running { task: id(1), words: vec![NOTHING, 0, 0x1234] },
        Running { task: id(2), words: Vec::new() },
    ];
    assert_eq!(stacks.vcpus().as_deref(), Ok(&expected[..]));
    assert_eq!(stacks.tasks().map(|tasks| tasks.len()), Ok(5));
    // A CPU that was not started runs nothing, though its idle task says that it runs.
    guest.set(task(900) + offsets(&image).on_cpu.offset, 1);
    let more = [positions(), vec![Position::NotStarted]].concat();
    assert_eq!(held(&guest, &kernel, &more).vcpus().as_deref(), Ok(&expected[..]));
}

#[test]
fn moments_at_which_nothing_can_be_told_of_the_vcpus() {
    let (image, text) = image();
    let at = offsets(&image);
    type World = (&'static str, Vec<Position>, u64, u64);
    let same = (task(3) + at.cpu.offset, 0);
    let user = Position::User;
    let worlds: [World; 8] = [
        ("an interrupt's stack", vec![in_kernel(PER_CPU, Some(0)), user], same.0, same.1),
        ("behind a stack", vec![in_kernel(stack_of(3, 0), Some(0)), user], same.0, same.1),
        ("below all stacks", vec![in_kernel(STACKS - 8, Some(0)), user], same.0, same.1),
        ("an odd stack pointer", vec![in_kernel(stack_of(1, 2) + 1, Some(0)), user], same.0, same.1),
        ("a CPU that is not known", vec![in_kernel(stack_of(1, 2), None), user], same.0, same.1),
        ("nobody runs in user mode", positions(), task(2) + at.on_cpu.offset, 0),
        ("two may run in user mode", positions(), task(3) + at.on_cpu.offset, 1),
        ("who runs is on the other CPU", positions(), task(2) + at.cpu.offset, 0),
    ];
    for (what, positions, place, word) in worlds {
        let guest = guest(&image, &text);
        guest.set(task(3) + at.cpu.offset, 1);
        guest.set(place, word);
        let kernel = guest.kernel();
        let told = held(&guest, &kernel, &positions).vcpus();
        assert!(matches!(told, Err(Unread::Unsettled(_))), "{what}: {told:?}");
    }
}

#[test]
fn a_run_queue_with_a_task_that_is_not_listed_or_not_there_is_told() {
    let (image, text) = image();
    for cpu in 0..2 {
        for count in [0, 2] {
            let guest = guest(&image, &text);
            guest.set(queue(&image, cpu), count << 32);
            let kernel = guest.kernel();
            let told = held(&guest, &kernel, &positions()).tasks();
            assert!(matches!(told, Err(Unread::Unsettled(_))), "{count} on CPU {cpu}: {told:?}");
            // While the guest runs nothing is concluded from it.
            let mut running = GuestStacks::new(TaskReader::new(&kernel, &guest).expect("a reader"));
            assert!(running.tasks().is_ok());
        }
    }
    // One that moves from one CPU to another is on none.
    let guest = guest(&image, &text);
    guest.set(task(2) + scan(&image).on_rq.offset, 2);
    let kernel = guest.kernel();
    assert!(matches!(held(&guest, &kernel, &positions()).tasks(), Err(Unread::Unsettled(_))));
}

#[test]
fn addresses_that_tracers_keep_are_read_as_far_as_they_may_be_in_use() {
    let (image, text) = image();
    let own = scan(&image);
    let guest = guest(&image, &text);
    let kernel = guest.kernel();
    let reader = TaskReader::new(&kernel, &guest).expect("a reader");
    let hidden = || reader.hidden_addresses(Gva(task(3)));
    assert_eq!(hidden(), Ok(Vec::new()));
    guest.set(task(3) + own.ret_stack, KEPT);
    guest.set(KEPT + 120, 0x77);
    // `curr_ret_stack` shares its word with `on_rq`.
    let uses = |count: u64| guest.set(task(3) + own.on_rq.offset, count << 32);
    for (count, words) in [(0, 8), (1, 16), (200, 512), (u64::from(u32::MAX), 512)] {
        uses(count);
        let found = hidden().expect("it is read");
        assert_eq!((found.len(), found.contains(&0x77)), (words, count > 0), "{count}");
    }
    guest.set(task(3) + own.ret_stack, 0);
    let hook = |number: u64| KEPT + 0x1000 + 0x100 * number;
    guest.set(task(3) + own.hooks, hook(1) + own.hook_node);
    for (number, next) in [(1, hook(2) + own.hook_node), (2, 0)] {
        guest.set(hook(number) + own.hook_node, next);
        guest.set(hook(number) + own.hook_address, 0x100 * number);
    }
    assert_eq!(hidden(), Ok(vec![0x100, 0x200]));
    guest.set(hook(2) + own.hook_node, hook(1) + own.hook_node);
    assert!(matches!(hidden(), Err(Refusal::BadTasks { .. })));
}

#[test]
fn pages_of_copies_of_both_kinds_count() {
    let (image, text) = image();
    let own = scan(&image);
    let guest = guest(&image, &text);
    let kernel = guest.kernel();
    assert_eq!(kprobes::slots(&kernel, &guest), Ok(Vec::new()));
    let page = |number: u64| PAGES + 0x100 * number;
    for (cache, number) in [("kprobe_insn_slots", 1), ("kprobe_optinsn_slots", 2)] {
        guest.link(&[symbol(&image, cache) + own.slot_pages, page(number) + own.slot_node]);
        guest.set(page(number) + own.slot_page, COPIES + 0x1000 * number);
    }
    let range = |number: u64| Gva(COPIES + 0x1000 * number)..Gva(COPIES + 0x1000 * (number + 1));
    assert_eq!(kprobes::slots(&kernel, &guest), Ok(vec![range(1), range(2)]));
    guest.set(page(2) + own.slot_node, page(2) + own.slot_node);
    assert_eq!(kprobes::slots(&kernel, &guest), Err(Refusal::BadProbes));
}

/// Each thing that shows that a task stands in `schedule`, alone.
#[test]
fn a_task_is_found_by_each_thing_that_shows_it() {
    let (image, text) = image();
    let (at, own) = (offsets(&image), scan(&image));
    let inside = symbol(&image, "schedule") + 3;
    let trampoline = symbol(&image, "return_to_handler");
    type Shows = (&'static str, u64, Why, fn(&Guest<'_>, u64, u64));
    let shown: [Shows; 6] = [
        ("a word of a sleeper", 3, Why::Function(0), |guest, inside, _| guest.set(stack_of(3, 1), inside)),
        ("a word of who runs", 1, Why::Function(0), |guest, inside, _| guest.set(stack_of(1, 1), inside)),
        ("within a trampoline", 3, Why::Trampoline, |guest, _, trampoline| {
            guest.set(stack_of(3, 4), trampoline + 1);
        }),
        ("an address that a tracer keeps", 3, Why::Function(0), |guest, inside, trampoline| {
            guest.set(stack_of(3, 4), trampoline);
            guest.set(KEPT, inside);
        }),
        ("a copy", 3, Why::Slot, |guest, _, _| guest.set(stack_of(3, 2), COPIES + 5)),
        ("a copy of the monitor's", 3, Why::Slot, |guest, _, _| guest.set(stack_of(3, 2), OWN_COPIES.0 + 5)),
    ];
    for (what, number, why, show) in shown {
        for moved in [false, true] {
            let guest = guest(&image, &text);
            let kernel = guest.kernel();
            guest.link(&[symbol(&image, "kprobe_insn_slots") + own.slot_pages, PAGES + own.slot_node]);
            guest.set(PAGES + own.slot_page, COPIES);
            guest.set(task(3) + own.ret_stack, KEPT);
            let place = Place::find(&kernel, "schedule").expect("a function");
            let code = OldCode::of(&kernel, &guest, &[place], Some(OWN_COPIES..Gva(OWN_COPIES.0 + 0x100)))
                .expect("it is read");
            let mut check = StackCheck::new(code);
            let mut stacks = GuestStacks::new(TaskReader::new(&kernel, &guest).expect("a reader"));
            if !moved {
                show(&guest, inside, trampoline);
            }
            for task in stacks.tasks().expect("tasks") {
                // The idle task of CPU 0 has none where it says.
                let _ = check.look(&mut stacks, task);
            }
            if moved {
                show(&guest, inside, trampoline);
                guest.set(task(3) + at.nvcsw.offset, 1);
            }
            let mut stacks = held(&guest, &kernel, &positions());
            let found = check.occupants(&mut stacks).expect("it can be told");
            let found: Vec<_> = found.iter().map(|occupant| (occupant.task, occupant.why)).collect();
            assert_eq!(found, [(id(number), why)], "{what}, moved: {moved}");
            assert_eq!(stacks.task(id(number)).map(|task| u64::from(task.pid)), Some(number));
        }
    }
}
