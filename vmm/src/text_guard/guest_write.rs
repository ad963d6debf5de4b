//! A guest write that stopped a vCPU: it is judged, and done for the vCPU through mapping B. Called
//! on the vCPU's thread; `docs/guard.md` has the table of what becomes of a write.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::insn;
use patcher::plan::write_policy::is_done;

use crate::guest::events::{Details, Kind};
use crate::guest::vcpu_state::VcpuRegisters;
use crate::memory::paging::{Piece, parts};
use crate::memory::{self, PAGE_SIZE};
use crate::text_guard::guard::Guard;
use crate::text_guard::pages::Reasons;
use crate::text_guard::pieces::page_of;
use crate::text_guard::state::Judgement;
use crate::text_guard::watched::Watched;

/// A write that a vCPU is about to do.
pub struct Write<'a> {
    /// The vCPU.
    pub vcpu: VcpuId,
    /// Its registers.
    pub registers: &'a VcpuRegisters,
    /// The address it uses. `None` if that is not known: KVM emulated the instruction.
    pub at: Option<Gva>,
    /// Where that leads, page by page.
    pub pieces: &'a [Piece],
    /// What it writes.
    pub bytes: &'a [u8],
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// It was done, or a policy denied it; the vCPU goes on behind it.
    Done {
        /// The controller must be notified: the write concerns a patch, and is the first one that
        /// does since [`Guard::take_guest_writes`].
        notify: bool,
    },
    /// None of its pages is guarded: the vCPU can do it itself.
    NotGuarded,
    /// It must wait for the program in flight, then be tried again.
    InFlight,
}

/// What became of a page that a vCPU writes to by an instruction that can't be emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lift {
    /// It is no longer guarded.
    Lifted,
    /// It was not guarded.
    NotGuarded,
    /// The vCPU must wait for the program in flight, then try again.
    InFlight,
}

impl Guard {
    /// Does the write that stopped a vCPU.
    ///
    /// # Errors
    /// The write was not done, or only in part.
    pub fn attempt(&self, write: &Write<'_>) -> Result<Attempt, memory::Error> {
        let mut protector = self.lock();
        match protector.state.judge(write.pieces) {
            Judgement::NotGuarded => return Ok(Attempt::NotGuarded),
            Judgement::Open if protector.open(write.pieces, self.now()) => return Ok(Attempt::NotGuarded),
            Judgement::Open => {
                // The vCPU can't do it, so it is done as if the page were guarded.
                self.perform(write)?;
                return Ok(Attempt::Done { notify: false });
            }
            Judgement::InFlight => return Ok(Attempt::InFlight),
            Judgement::Guarded => {}
        }
        let written = protector.state.watch_list.at(write.pieces);
        let introspection = self.introspection();
        let is_there = |site: &&Arc<Watched>| {
            introspection.as_ref().is_some_and(|introspection| site.is_there(introspection.kernel()))
        };
        let here: Vec<&Arc<Watched>> = written.iter().filter(is_there).collect();
        let by_patcher = introspection
            .as_ref()
            .zip(write.at)
            .is_some_and(|(introspection, at)| introspection.is_kernel_patcher(write.registers, at));
        let done = here.iter().all(|site| is_done(site.policy, by_patcher));
        if done {
            self.perform(write)?;
        }
        self.stopped_writes.fetch_add(1, SeqCst);
        let notify = protector.state.watch_list.note_write(write.pieces, &written);
        drop(protector);
        let kind = if by_patcher { Kind::GuestWrite } else { Kind::UnexpectedWrite };
        self.events().tell(kind, || self.details(write, here.last().map(|site| &***site), done));
        Ok(Attempt::Done { notify })
    }

    fn perform(&self, write: &Write<'_>) -> Result<(), memory::Error> {
        for (at, part) in parts(write.pieces.iter().copied(), write.bytes) {
            self.ram.store(at, part)?;
        }
        Ok(())
    }

    fn details(&self, write: &Write<'_>, watched: Option<&Watched>, done: bool) -> Details {
        let at = write.pieces.first().map_or(Gpa(0), |(at, _)| *at);
        let symbol = self.introspection().and_then(|introspection| introspection.symbol_in_memory(at));
        let place = symbol.unwrap_or_else(|| format!("guest-physical {at}"));
        let done = if done { "wrote" } else { "was kept from writing" };
        Details {
            who: Some(self.describe_vcpu(write.vcpu, write.registers)),
            patch: watched.map(|watched| watched.patch.to_string()),
            what: match write.at {
                Some(at) => format!("{done} {} to {place}, through {at}", insn::hex(write.bytes)),
                None => format!("{done} {} to {place}", insn::hex(write.bytes)),
            },
        }
    }

    /// Gives up the guard of the page there, for a vCPU whose write can't be emulated; then the vCPU
    /// can do it.
    #[must_use]
    pub fn lift(&self, vcpu: VcpuId, registers: &VcpuRegisters, at: Gpa) -> Lift {
        let page = page_of(at);
        let whole = [(Gpa(page), PAGE_SIZE)];
        let mut protector = self.lock();
        match protector.state.judge(&whole) {
            Judgement::NotGuarded => return Lift::NotGuarded,
            Judgement::Open => {
                protector.open(&whole, self.now());
                return Lift::NotGuarded;
            }
            Judgement::InFlight => return Lift::InFlight,
            Judgement::Guarded => {}
        }
        let patches = protector.state.watch_list.names_on(page);
        Self::report(protector.lift(page, self.now()));
        drop(protector);
        self.stopped_writes.fetch_add(1, SeqCst);
        let what =
            format!("writes to the page at guest-physical {page:#x} by an instruction that is not known");
        self.tell_unguarded(vcpu, registers, what, "the page is guarded no more", &patches);
        Lift::Lifted
    }

    /// Gives up the guard of every page but the init gate's, for a vCPU that is stopped at a write and
    /// nothing tells where.
    #[must_use]
    pub fn give_up_all(&self, vcpu: VcpuId, registers: &VcpuRegisters) -> Lift {
        let mut protector = self.lock();
        if protector.state.has_program() {
            return Lift::InFlight;
        }
        let patches = protector.state.watch_list.names();
        let was_guarded = protector.state.pages.count(Reasons::GUARDED) > 0;
        let (any, result) = protector.give_up_all(self.now());
        Self::report(result);
        drop(protector);
        if !any {
            return Lift::NotGuarded;
        }
        self.stopped_writes.fetch_add(1, SeqCst);
        if was_guarded {
            let what = "was stopped at a write again and again, and nothing tells to where".to_owned();
            self.tell_unguarded(vcpu, registers, what, "no page is guarded any more", &patches);
        }
        Lift::Lifted
    }

    fn tell_unguarded(
        &self,
        vcpu: VcpuId,
        registers: &VcpuRegisters,
        what: String,
        so: &str,
        patches: &[Arc<str>],
    ) {
        /// How many are named.
        const NAMED: usize = 8;
        self.events().tell(Kind::Unguarded, || {
            let named: Vec<&str> = patches.iter().take(NAMED).map(|name| &**name).collect();
            let held = match named[..] {
                [] => String::new(),
                _ => format!(
                    "; what the guest writes there to these patches is not seen or denied any more: {}{}",
                    named.join(", "),
                    if patches.len() > NAMED { ", ..." } else { "" }
                ),
            };
            Details {
                who: Some(self.describe_vcpu(vcpu, registers)),
                patch: patches.first().map(ToString::to_string),
                what: format!("{what}; {so}{held}"),
            }
        });
    }

    /// Whether the guest can't write to the page at an address now.
    #[must_use]
    pub fn is_protected(&self, at: Gpa) -> bool {
        !self.lock().state.pages.reasons(page_of(at)).is_empty()
    }
}
