//! Searches all tasks of the guest for those that stand in functions: while it runs, and then, of those that
//! moved, while all vCPUs are held.

use std::collections::BTreeMap;
use std::ops::Range;

use patcher::addr::{Gva, VcpuId};
use patcher::linux::Bounded;
use patcher::linux::tasks::{TaskReader, WORK};
use patcher::safety::guest_stacks::{GuestStacks, Position, Unread};
use patcher::safety::old_code::Place;
use patcher::safety::stack_check::{Occupant, OldCode, StackCheck, Stacks, Why};

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::guest::per_cpu::PerCpu;
use crate::guest::vcpu_state::{Activity, VcpuRegisters};

/// What was found.
pub(super) struct Found {
    /// Who stands inside, or may.
    pub(super) tasks: Vec<FoundTask>,
    /// How many tasks the guest has.
    pub(super) looked_at: usize,
    /// How many of them were looked at again while all vCPUs were held.
    pub(super) again: usize,
}

/// A task that stands inside, or may.
pub(super) struct FoundTask {
    pub(super) pid: u32,
    pub(super) comm: String,
    /// What tells it.
    pub(super) address: Gva,
    /// The same as `function+0xoffset`.
    pub(super) symbol: Option<String>,
    pub(super) why: Why,
}

/// Holds all vCPUs, or lets some of those that are held go on for a moment and holds them again.
pub(super) trait Holder {
    /// What keeps it from that.
    type Error;

    /// Holds all vCPUs and returns where they stand. They stay held, so release them.
    ///
    /// # Errors
    /// What keeps it from that.
    fn hold(&mut self) -> Result<Vec<(VcpuId, VcpuRegisters)>, Self::Error>;

    /// Lets these vCPUs go on for a moment, and returns where they stand then. `None` if that is not to be done any more.
    ///
    /// # Errors
    /// As [`Holder::hold`].
    fn let_on(&mut self, vcpus: &[VcpuId]) -> Result<Option<Vec<(VcpuId, VcpuRegisters)>>, Self::Error>;
}

/// Searches. `copies` is where the monitor has copies of instructions. All vCPUs are held afterwards, so release them.
///
/// A vCPU that stands outside stays held while those inside go on: of several that are inside half of their time, all
/// are seldom outside at the same time.
///
/// # Errors
/// What `holder` returned. Inside: why nothing is known, perhaps only now.
pub(super) fn search<H: Holder>(
    kernel: &GuestKernel,
    places: &[Place],
    copies: Option<&Range<Gva>>,
    holder: &mut H,
) -> Result<Result<Found, Unread>, H::Error> {
    let view = kernel.kernel();
    // Without it no vCPU's CPU is known.
    let per_cpu = PerCpu::find(kernel).ok();
    let translations = CachedTranslations::of(kernel);
    let memory = Bounded::new(&translations, WORK);
    let code = || OldCode::of(&view, &memory, places, copies.cloned());
    let reader = match TaskReader::new(&view, &memory) {
        Ok(reader) => reader,
        Err(refusal) => return Ok(Err(refusal.into())),
    };
    let mut stacks = GuestStacks::new(reader);
    let before = code().map_err(Unread::from).and_then(|code| look(StackCheck::new(code), &mut stacks));
    let (check, looked_at) = match before {
        Ok(before) => before,
        Err(unread) => return Ok(Err(unread)),
    };
    let mut positions: BTreeMap<VcpuId, Position> = BTreeMap::new();
    let mut news = holder.hold()?;
    let occupants = loop {
        let moved = news.iter().map(|(vcpu, registers)| (*vcpu, position(per_cpu.as_ref(), registers)));
        positions.extend(moved);
        translations.forget();
        stacks.held(positions.iter().map(|(vcpu, position)| (*vcpu, *position)).collect());
        // Kprobes may have come meanwhile, and copies of instructions with them.
        let unchanged = code().map_err(Unread::from).map(|now| check.is_of(&now));
        let occupants = unchanged.and_then(|unchanged| match unchanged {
            true => check.occupants(&mut stacks),
            false => Err(Unread::Unsettled("the guest's kprobes change".to_owned())),
        });
        let inside = who_goes_on(&occupants, &stacks);
        // What is left must do for another look.
        if inside.is_empty() || memory.left() < WORK / 2 {
            break occupants;
        }
        match holder.let_on(&inside)? {
            Some(moved) => news = moved,
            None => break occupants,
        }
    };
    let found = |occupant: &Occupant| {
        let Occupant { task, word, why } = *occupant;
        let (pid, comm) = stacks.task(task).map(|task| (task.pid, task.comm.clone())).unwrap_or_default();
        let symbol = in_new_code(places, word).or_else(|| view.identify(word));
        FoundTask { pid, comm, address: word, symbol, why }
    };
    Ok(occupants.map(|occupants| Found {
        tasks: occupants.iter().map(found).collect(),
        looked_at,
        again: stacks.stacks_read,
    }))
}

/// The vCPUs that stand inside, or where nothing can be told; none if a task that does not run stands inside, which
/// may need any vCPU to come out.
fn who_goes_on(occupants: &Result<Vec<Occupant>, Unread>, stacks: &GuestStacks<'_>) -> Vec<VcpuId> {
    match occupants {
        Ok(occupants) => {
            let vcpus = occupants.iter().map(|occupant| stacks.on_stack_of(occupant.task));
            vcpus.collect::<Option<_>>().unwrap_or_default()
        }
        Err(Unread::Unsettled(_)) => stacks.unsettled().into_iter().collect(),
        Err(Unread::Refused(_)) => Vec::new(),
    }
}

/// An address in code of the monitor's, as `function+0xoffset`.
fn in_new_code(places: &[Place], at: Gva) -> Option<String> {
    let is_in = |place: &&Place| {
        // It has no entry that leads elsewhere.
        place.code.is_empty() && place.pieces.iter().any(|piece| piece.start <= at && at <= piece.end)
    };
    let place = places.iter().find(is_in)?;
    Some(format!("{}+{:#x}", place.name, at.offset_from(place.code.start)?))
}

/// Looks at all tasks while the guest runs; how many there are.
fn look(mut check: StackCheck, stacks: &mut GuestStacks<'_>) -> Result<(StackCheck, usize), Unread> {
    let tasks = stacks.tasks()?;
    for task in &tasks {
        match check.look(stacks, *task) {
            // It is looked at again when all vCPUs are held.
            Ok(()) | Err(Unread::Unsettled(_)) => {}
            Err(refused) => return Err(refused),
        }
    }
    Ok((check, tasks.len()))
}

fn position(per_cpu: Option<&PerCpu>, registers: &VcpuRegisters) -> Position {
    match registers.activity() {
        Activity::NotStarted => Position::NotStarted,
        _ if !registers.in_kernel() => Position::User,
        _ => Position::Kernel {
            rip: registers.rip(),
            rsp: registers.rsp(),
            cpu: per_cpu.and_then(|data| data.cpu(registers)),
        },
    }
}
