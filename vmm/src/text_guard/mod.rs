//! The text guard: pages of the guest's text that it can't write to without asking.
//!
//! Mapping A of a guarded page is read-only ([`GuestRam::write_protect`]), so a write makes
//! the vCPU leave the guest before it took effect, whatever mapping of the guest's it goes
//! through. The vCPU's own thread then does it through mapping B, if it may, while it holds
//! the guard's lock; a program takes the same lock to say which bytes it is about to change,
//! and who writes to those waits. `docs/guard.md` compares ways to protect, and lists what
//! becomes of a write.

mod preprotect;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::insn;
use patcher::plan::write_policy::is_done;
use patcher::resolve::ResolvedPlan;

use self::preprotect::Ahead;
use self::watch::Watched;
pub(crate) use self::watch::split_at_pages;
use crate::guest::events::{Details, Events, Kind, Who};
use crate::guest::introspect::Introspection;
use crate::guest::kernel::GuestKernel;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::memory::paging::Piece;
use crate::memory::{self, GuestRam, PAGE, PAGE_SIZE};

/// How long the guest must not have written to a part of its text for that to be protected
/// ahead of programs.
pub const REST: Duration = Duration::from_secs(5);

/// The guard of one VM.
pub struct Guard {
    ram: Arc<GuestRam>,
    events: Arc<Events>,
    scene: OnceLock<Introspection>,
    state: Mutex<State>,
    /// A program ended.
    changed: Condvar,
    /// How many vCPUs wait for a program to end.
    waiting: AtomicUsize,
    hits: AtomicU64,
}

#[derive(Default)]
struct State {
    /// All of the kernel's text, if that is guarded.
    text: Option<Range<u64>>,
    /// Pages that were given up.
    lifted: BTreeSet<u64>,
    /// Pages that are guarded for patches, and for how many sites.
    pages: BTreeMap<u64, usize>,
    /// What the program in flight changes.
    in_flight: Vec<Piece>,
    /// Pages that are guarded for the program's sake only.
    runs: Vec<Range<u64>>,
    /// The same, of pages that were protected already.
    borrowed: BTreeSet<u64>,
    /// Text that is protected already, so that programs need not do it. It is not guarded: the
    /// guest may write to it, which makes it writable.
    ahead: Ahead,
    /// The sites of applied patches, by the pages they are on.
    watched: BTreeMap<u64, Vec<Arc<Watched>>>,
    /// Patches whose sites were written to.
    touched: BTreeSet<Arc<str>>,
    /// Something on the page of a site was written to.
    beside: bool,
    /// The page of the gate before init, while that is closed.
    gate: Option<u64>,
}

/// A write that a vCPU is about to do.
pub struct Write<'a> {
    /// The vCPU.
    pub vcpu: VcpuId,
    /// Where it stands.
    pub registers: &'a VcpuRegisters,
    /// The address it uses.
    pub at: Gva,
    /// Where that leads, page by page.
    pub pieces: &'a [Piece],
    /// What it writes.
    pub bytes: &'a [u8],
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// It was done, or it is not to be done; the vCPU goes on behind it. Whether the sites
    /// of a patch were touched, and nobody was told yet.
    Done {
        /// Somebody should look after the patches.
        touched: bool,
    },
    /// None of its pages is guarded: the vCPU can do it itself.
    NotGuarded,
    /// It must wait for the program in flight, then be tried again.
    InFlight,
}

/// What the guest wrote to, for whoever looks after the patches.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GuestWrites {
    /// Something on the page of a site: the guest may lead its vCPUs past the site by that.
    pub beside: bool,
    /// Sites of these patches.
    pub touched: Vec<Arc<str>>,
}

/// What became of a page that a vCPU writes to in a way that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lift {
    /// It is guarded no more.
    Lifted,
    /// It was not.
    NotGuarded,
    /// The vCPU must wait for the program in flight, then try again.
    InFlight,
}

impl Guard {
    /// A guard that guards nothing yet.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, events: Arc<Events>) -> Self {
        Self {
            ram,
            events,
            scene: OnceLock::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            hits: AtomicU64::new(0),
        }
    }

    /// Makes the guest's kernel known; the first one counts.
    pub fn introduce(&self, kernel: &GuestKernel) {
        self.scene.get_or_init(|| Introspection::new(kernel));
    }

    /// The guest's kernel, once it is known.
    #[must_use]
    pub fn scene(&self) -> Option<&Introspection> {
        self.scene.get()
    }

    /// What happened.
    #[must_use]
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// How many pages are guarded.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let state = self.lock();
        let text = state.text.as_ref().map_or(0, |text| (text.end - text.start) / PAGE);
        let apart = state.pages.keys().filter(|page| !state.is_text(**page)).count();
        let lifted = state.lifted.iter().filter(|page| state.is_text(**page)).count();
        text - lifted as u64 + apart as u64
    }

    /// How many pages of text are protected ahead of programs.
    #[must_use]
    pub fn pages_ahead(&self) -> u64 {
        self.lock().ahead.closed_bytes() / PAGE
    }

    /// How many writes to guarded pages the vCPUs were stopped at.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(SeqCst)
    }

    /// Whether a vCPU waits for the program in flight.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.waiting.load(SeqCst) > 0
    }

    /// A vCPU in the guest's own words.
    #[must_use]
    pub fn who(&self, vcpu: VcpuId, registers: &VcpuRegisters) -> Who {
        self.scene().map_or_else(|| Who::at(vcpu, registers.rip()), |scene| scene.who(vcpu, registers))
    }

    // The controller's side.

    /// Protects the page of the gate before init. Who writes to it asks the controller.
    ///
    /// # Errors
    /// What the system said; the gate is open then.
    pub fn close_gate(&self, at: Gpa) -> Result<(), memory::Error> {
        let mut state = self.lock();
        self.ram.write_protect(&one(at.0), true)?;
        state.gate = Some(at.0);
        Ok(())
    }

    /// Lets everybody write to the gate's page.
    ///
    /// # Errors
    /// What the system said.
    pub fn open_gate(&self) -> Result<(), memory::Error> {
        let gate = self.lock().gate.take();
        gate.map_or(Ok(()), |page| self.ram.write_protect(&one(page), false))
    }

    /// Guards these pages for the VM's life, as its text.
    ///
    /// # Errors
    /// What the system said; nothing more is guarded than before then.
    pub fn guard_text(&self, text: &Range<Gpa>) -> Result<(), memory::Error> {
        let mut state = self.lock();
        self.ram.write_protect(text, true)?;
        state.text = Some(text.start.0 & !(PAGE - 1)..text.end.0.next_multiple_of(PAGE));
        Ok(())
    }

    /// Whether it is known which text is to be protected ahead of programs.
    #[must_use]
    pub fn knows_text(&self) -> bool {
        self.lock().ahead.is_known()
    }

    /// Makes that known, once. Nothing is protected by this.
    pub fn know_text(&self, text: &Range<Gpa>) {
        let long_ago = Instant::now().checked_sub(REST);
        self.lock().ahead = Ahead::of(&(text.start.0..text.end.0), long_ago.unwrap_or_else(Instant::now));
    }

    /// Protects the text that the guest has not written to for [`REST`], ahead of programs.
    ///
    /// # Errors
    /// What the system said; that text stays as it was.
    pub fn close_text(&self) -> Result<(), memory::Error> {
        let mut state = self.lock();
        let rested = Instant::now().checked_sub(REST).map(|before| state.ahead.open_since(before));
        rested.into_iter().flatten().try_for_each(|part| self.close(&mut state, &part))
    }

    fn close(&self, state: &mut State, part: &Range<u64>) -> Result<(), memory::Error> {
        self.switch(&state.unguarded(part), true)?;
        state.ahead.close(part);
        Ok(())
    }

    /// Lets the guest write to the part of the text that a page lies in, as far as that is not
    /// guarded. Returns whether it can.
    fn open(&self, state: &mut State, at: u64) -> bool {
        let Some(part) = state.ahead.closed(at) else { return true };
        let done = self.switch(&state.unguarded(&part), false).is_ok();
        if done {
            state.ahead.open(&part, Instant::now());
        }
        done
    }

    /// Protects all of these pages, or none, or lets all of them go, or none.
    fn switch(&self, pages: &[Range<Gpa>], protected: bool) -> Result<(), memory::Error> {
        let done = pages.iter().try_for_each(|run| self.ram.write_protect(run, protected));
        if done.is_err() {
            // As they were, neighbours are in one piece again, which the system does not refuse.
            pages.iter().for_each(|run| _ = self.ram.write_protect(run, !protected));
        }
        done
    }

    /// Watches the sites of a patch that was applied, and guards their pages, if its plan says
    /// what to do about writes.
    ///
    /// # Errors
    /// The first page that can't be guarded; the patch is watched as far as it can be.
    pub fn watch(&self, plan: &ResolvedPlan, kernel: &GuestKernel) -> Result<(), memory::Error> {
        let name: Arc<str> = plan.name.as_str().into();
        let mut state = self.lock();
        let mut result = Ok(());
        for site in &plan.sites {
            let Ok(watched) = Watched::new(name.clone(), site, plan.on_guest_write, kernel) else { continue };
            let watched = Arc::new(watched);
            for page in watched.pages() {
                state.watched.entry(page).or_default().push(watched.clone());
                if watched.is_guarded {
                    result = result.and(self.take_page(&mut state, page));
                }
            }
        }
        result
    }

    /// Looks after a patch again.
    pub fn touch(&self, name: &str) {
        self.lock().touched.insert(name.into());
    }

    /// Forgets the sites of a patch.
    pub fn forget(&self, name: &str) {
        self.forget_some(name, |_| true);
    }

    /// Forgets some sites of a patch.
    pub fn forget_some(&self, name: &str, which: impl Fn(Gva) -> bool) {
        let mut state = self.lock();
        let mut pages = Vec::new();
        for (page, watched) in &mut state.watched {
            let goes = |watched: &Arc<Watched>| *watched.patch == *name && which(watched.at);
            pages.extend(watched.iter().filter(|w| goes(w) && w.is_guarded).map(|_| *page));
            watched.retain(|watched| !goes(watched));
        }
        state.watched.retain(|_, watched| !watched.is_empty());
        for page in pages {
            self.give_page(&mut state, page);
        }
    }

    /// What the guest wrote to since this was last asked. Taken at once: whoever writes next is the
    /// first again, and tells.
    pub fn take_news(&self) -> GuestWrites {
        let mut state = self.lock();
        GuestWrites {
            beside: std::mem::take(&mut state.beside),
            touched: std::mem::take(&mut state.touched).into_iter().collect(),
        }
    }

    /// Guards the bytes that a program is about to change until the returned scope ends. Who
    /// writes to them waits. If no vCPU runs while they are changed, `held`, pages that are
    /// not guarded already need not be.
    ///
    /// # Errors
    /// The first page that can't be guarded; nothing is guarded then.
    pub fn begin(&self, pieces: Vec<Piece>, held: bool) -> Result<Scope<'_>, memory::Error> {
        let mut state = self.lock();
        let scope = Scope { guard: self };
        let pages = pieces.iter().filter(|_| !held).map(|(at, _)| at.0 & !(PAGE - 1)).collect();
        if let Err(error) = self.guard_for_program(&mut state, pages) {
            // The scope takes back what was done.
            drop(state);
            return Err(error);
        }
        state.in_flight = pieces;
        drop(state);
        Ok(scope)
    }

    fn guard_for_program(&self, state: &mut State, pages: BTreeSet<u64>) -> Result<(), memory::Error> {
        for part in state.ahead.open_with(&pages) {
            self.close(state, &part)?;
        }
        let is_ahead = |page: &u64| state.ahead.closed(*page).is_some();
        let (ahead, bare): (BTreeSet<u64>, _) = pages.into_iter().partition(is_ahead);
        state.borrowed = ahead;
        for run in runs(bare) {
            for part in state.unprotected(&run) {
                self.ram.write_protect(&part, true)?;
                state.runs.push(part.start.0..part.end.0);
            }
        }
        Ok(())
    }

    fn end(&self) {
        let mut state = self.lock();
        state.in_flight.clear();
        let borrowed = std::mem::take(&mut state.borrowed).into_iter().map(|page| page..page + PAGE);
        for run in std::mem::take(&mut state.runs).into_iter().chain(borrowed) {
            for part in state.unprotected(&run) {
                self.unprotect(&part);
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn take_page(&self, state: &mut State, page: u64) -> Result<(), memory::Error> {
        if !state.is_protected(page) {
            self.ram.write_protect(&one(page), true)?;
        }
        *state.pages.entry(page).or_insert(0) += 1;
        Ok(())
    }

    fn give_page(&self, state: &mut State, page: u64) {
        let Some(users) = state.pages.get_mut(&page) else { return };
        *users -= 1;
        if *users == 0 {
            state.pages.remove(&page);
            if !state.is_protected(page) {
                self.unprotect(&one(page));
            }
        }
    }

    fn unprotect(&self, pages: &Range<Gpa>) {
        if let Err(error) = self.ram.write_protect(pages, false) {
            // The guest's writes are still done, one by one.
            eprintln!("vmm: {error}");
        }
    }

    // The vCPU threads' side.

    /// Does what a vCPU was stopped at.
    ///
    /// # Errors
    /// The write was not done, or only in part.
    pub fn attempt(&self, write: &Write<'_>) -> Result<Attempt, memory::Error> {
        let mut state = self.lock();
        if !write.pieces.iter().any(|(at, _)| state.is_guarded(at.0)) {
            if write.pieces.iter().all(|(at, _)| self.open(&mut state, at.0)) {
                return Ok(Attempt::NotGuarded);
            }
            // Then it is done as if they were.
            self.perform(write)?;
            return Ok(Attempt::Done { touched: false });
        }
        if write.pieces.iter().any(|piece| state.in_flight.iter().any(|other| overlap(*piece, *other))) {
            return Ok(Attempt::InFlight);
        }
        let touched = state.touched_by(write.pieces);
        let scene = self.scene();
        let is_there = |site: &&Arc<Watched>| scene.is_some_and(|scene| site.is_there(scene.kernel()));
        let here: Vec<&Arc<Watched>> = touched.iter().filter(is_there).collect();
        let by_patcher = scene.is_some_and(|scene| scene.is_patcher(write.registers, write.at));
        let done = here.iter().all(|site| is_done(site.policy, by_patcher));
        if done {
            self.perform(write)?;
        }
        self.hits.fetch_add(1, SeqCst);
        let was_told = !state.touched.is_empty() || state.beside;
        state.touched.extend(touched.iter().map(|site| site.patch.clone()));
        state.beside |= write.pieces.iter().any(|(at, _)| state.watched.contains_key(&(at.0 & !(PAGE - 1))));
        let untold = !was_told && (!state.touched.is_empty() || state.beside);
        drop(state);
        let kind = if by_patcher { Kind::GuestWrite } else { Kind::UnexpectedWrite };
        self.events.tell(kind, || self.news(write, here.last().map(|site| &***site), done));
        Ok(Attempt::Done { touched: untold })
    }

    fn perform(&self, write: &Write<'_>) -> Result<(), memory::Error> {
        let mut rest = write.bytes;
        for &(at, length) in write.pieces {
            let (here, behind) = rest.split_at(length);
            self.ram.store(at, here)?;
            rest = behind;
        }
        Ok(())
    }

    fn news(&self, write: &Write<'_>, watched: Option<&Watched>, done: bool) -> Details {
        let at = write.pieces.first().map_or(Gpa(0), |(at, _)| *at);
        let symbol = self.scene().and_then(|scene| scene.symbol_in_memory(at));
        let place = symbol.unwrap_or_else(|| format!("guest-physical {at}"));
        let done = if done { "wrote" } else { "was kept from writing" };
        Details {
            who: Some(self.who(write.vcpu, write.registers)),
            patch: watched.map(|watched| watched.patch.to_string()),
            what: format!("{done} {} to {place}, through {}", insn::hex(write.bytes), write.at),
        }
    }

    /// Whether the gate is closed.
    #[must_use]
    pub fn is_gate_closed(&self) -> bool {
        self.lock().gate.is_some()
    }

    /// Whether an address is on the gate's page, and that is closed.
    #[must_use]
    pub fn is_gate(&self, at: Gpa) -> bool {
        self.lock().gate == Some(at.0 & !(PAGE - 1))
    }

    /// Gives up the guard of the page there, for a vCPU whose write can't be done for it; then
    /// the vCPU can.
    #[must_use]
    pub fn lift(&self, vcpu: VcpuId, registers: &VcpuRegisters, at: Gpa) -> Lift {
        let page = at.0 & !(PAGE - 1);
        let mut state = self.lock();
        if !state.is_guarded(page) {
            self.open(&mut state, page);
            return Lift::NotGuarded;
        }
        if state.in_flight.iter().any(|piece| overlap(*piece, (Gpa(page), PAGE_SIZE))) {
            return Lift::InFlight;
        }
        state.lifted.insert(page);
        state.pages.remove(&page);
        // A program's run may have it, as what lies between others.
        let without = |run: Range<u64>| match run.contains(&page) {
            true => vec![run.start..page, page + PAGE..run.end],
            false => vec![run],
        };
        state.runs = std::mem::take(&mut state.runs).into_iter().flat_map(without).collect();
        let on_page = state.watched.get(&page).into_iter().flatten();
        let patches: Vec<Arc<str>> = on_page.map(|watched| watched.patch.clone()).collect();
        state.touched.extend(patches);
        match state.ahead.closed(page) {
            Some(_) => _ = self.open(&mut state, page),
            None => self.unprotect(&one(page)),
        }
        drop(state);
        self.hits.fetch_add(1, SeqCst);
        self.events.tell(Kind::Unguarded, || Details {
            who: Some(self.who(vcpu, registers)),
            patch: None,
            what: format!(
                "writes to the page at guest-physical {page:#x} by an instruction that is not known; \
                 the page is guarded no more"
            ),
        });
        Lift::Lifted
    }

    /// Waits until the program in flight has ended.
    pub fn wait_for_program(&self) {
        self.waiting.fetch_add(1, SeqCst);
        let mut state = self.lock();
        while !state.in_flight.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.waiting.fetch_sub(1, SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_text(&self, at: u64) -> bool {
        self.text.as_ref().is_some_and(|text| text.contains(&at))
    }

    fn is_guarded(&self, at: u64) -> bool {
        let page = at & !(PAGE - 1);
        let in_text = self.is_text(page) && !self.lifted.contains(&page);
        let in_program = || self.borrowed.contains(&page) || self.runs.iter().any(|run| run.contains(&page));
        in_text || self.pages.contains_key(&page) || in_program()
    }

    /// Whether a page is guarded, or protected ahead of programs.
    fn is_protected(&self, at: u64) -> bool {
        self.ahead.closed(at).is_some() || self.is_guarded(at)
    }

    /// The parts of a run of pages that are not guarded.
    fn unguarded(&self, run: &Range<u64>) -> Vec<Range<Gpa>> {
        parts(run, |page| !self.is_guarded(page))
    }

    /// The parts of a run of pages that the guest can write to.
    fn unprotected(&self, run: &Range<u64>) -> Vec<Range<Gpa>> {
        parts(run, |page| !self.is_protected(page))
    }

    /// The sites of patches that share a byte with these, those of the patch that was applied
    /// last at the end.
    fn touched_by(&self, pieces: &[Piece]) -> Vec<Arc<Watched>> {
        let mut touched: Vec<Arc<Watched>> = Vec::new();
        for piece in pieces {
            for site in self.watched.get(&(piece.0.0 & !(PAGE - 1))).into_iter().flatten() {
                let is_known = touched.iter().any(|known| Arc::ptr_eq(known, site));
                if !is_known && site.pieces.iter().any(|part| overlap(*part, *piece)) {
                    touched.push(site.clone());
                }
            }
        }
        touched
    }
}

/// A program in flight: while this lives its bytes are guarded.
pub struct Scope<'g> {
    guard: &'g Guard,
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.guard.end();
    }
}

/// Pages as runs, each of which is protected by one call. Each call costs about a fence, a page
/// that is protected without need only the faults by which it is mapped again: so many pages
/// make one run, with all that is in between.
fn runs(pages: BTreeSet<u64>) -> Vec<Range<u64>> {
    const FEW: usize = 4;
    const FAR: u64 = 64 << 20;
    let (Some(first), Some(last)) = (pages.first(), pages.last()) else { return Vec::new() };
    if pages.len() > FEW && last - first < FAR {
        return std::iter::once(*first..last + PAGE).collect();
    }
    pages.into_iter().map(|page| page..page + PAGE).collect()
}

/// The parts of a run of pages for which something holds.
fn parts(run: &Range<u64>, holds: impl Fn(u64) -> bool) -> Vec<Range<Gpa>> {
    let mut parts: Vec<Range<Gpa>> = Vec::new();
    for page in (run.start..run.end).step_by(PAGE_SIZE).filter(|page| holds(*page)) {
        match parts.last_mut().filter(|part| part.end.0 == page) {
            Some(part) => part.end = Gpa(page + PAGE),
            None => parts.push(one(page)),
        }
    }
    parts
}

fn one(page: u64) -> Range<Gpa> {
    Gpa(page)..Gpa(page + PAGE)
}

fn overlap((at, length): Piece, (other, other_length): Piece) -> bool {
    at.0 < other.0 + other_length as u64 && other.0 < at.0 + length as u64
}

#[cfg(test)]
mod tests {
    use patcher::plan::write_policy::Policy;

    use super::*;

    const PAGES: u64 = 32;

    fn guard() -> Guard {
        Guard::new(Arc::new(GuestRam::new(PAGES * PAGE).expect("RAM")), Arc::default())
    }

    fn attempt(guard: &Guard, pieces: &[Piece], bytes: &[u8]) -> Attempt {
        let registers = VcpuRegisters::default();
        let write = Write { vcpu: VcpuId(0), registers: &registers, at: Gva(0), pieces, bytes };
        guard.attempt(&write).expect("RAM")
    }

    const DONE: Attempt = Attempt::Done { touched: false };

    fn holds(guard: &Guard, at: u64, bytes: &[u8]) -> bool {
        let mut found = vec![0; bytes.len()];
        guard.ram.read(Gpa(at), &mut found).expect("RAM");
        found == bytes
    }

    #[test]
    fn a_write_to_a_guarded_page_is_done_or_left_to_the_vcpu() {
        let guard = guard();
        let at = (Gpa(PAGE), 1);
        assert_eq!(attempt(&guard, &[at], &[7]), Attempt::NotGuarded);
        assert!(holds(&guard, PAGE, &[0]));
        guard.guard_text(&(Gpa(PAGE)..Gpa(3 * PAGE))).expect("guarded");
        assert_eq!(attempt(&guard, &[at], &[7]), DONE);
        assert!(holds(&guard, PAGE, &[7]));
        // One of its pages is enough.
        assert_eq!(attempt(&guard, &[(Gpa(3 * PAGE - 1), 1), (Gpa(4 * PAGE), 2)], &[1, 2, 3]), DONE);
        assert!(holds(&guard, 3 * PAGE - 1, &[1]) && holds(&guard, 4 * PAGE, &[2, 3]));
        assert_eq!((guard.pages(), guard.hits()), (2, 2));
        assert!(guard.events().since(0).iter().all(|event| event.kind == Kind::UnexpectedWrite));
    }

    #[test]
    fn who_writes_to_what_a_program_changes_waits_for_its_end() {
        let guard = guard();
        for held in [false, true] {
            guard.guard_text(&(Gpa(0)..Gpa(PAGE))).expect("guarded");
            let scope = guard.begin(vec![(Gpa(100), 5), (Gpa(2 * PAGE), 5)], held).expect("guarded");
            assert_eq!(attempt(&guard, &[(Gpa(104), 1)], &[7]), Attempt::InFlight);
            assert_eq!(attempt(&guard, &[(Gpa(98), 4)], &[7; 4]), Attempt::InFlight);
            assert_eq!(attempt(&guard, &[(Gpa(105), 1)], &[7]), DONE, "beside it");
            let elsewhere = attempt(&guard, &[(Gpa(2 * PAGE + 1), 1)], &[7]);
            assert_eq!(elsewhere, if held { Attempt::NotGuarded } else { Attempt::InFlight });
            assert!(holds(&guard, 98, &[0; 6]));
            std::thread::scope(|threads| {
                let waiter = threads.spawn(|| guard.wait_for_program());
                while !guard.is_waited_for() {
                    std::thread::yield_now();
                }
                drop(scope);
                waiter.join().expect("it ended");
            });
            assert!(!guard.is_waited_for());
            assert_eq!(attempt(&guard, &[(Gpa(104), 1)], &[0]), DONE);
            assert_eq!(attempt(&guard, &[(Gpa(2 * PAGE), 1)], &[7]), Attempt::NotGuarded);
        }
    }

    #[test]
    fn many_pages_are_one_run_and_what_was_guarded_stays_so() {
        let guard = guard();
        guard.guard_text(&(Gpa(8 * PAGE)..Gpa(10 * PAGE))).expect("guarded");
        let is_guarded = |page: u64| guard.lock().is_guarded(page * PAGE);
        let far: Vec<Piece> = (0..6).map(|i| (Gpa(4 * i * PAGE + 9), 1)).collect();
        let scope = guard.begin(far, false).expect("guarded");
        assert!((0..=20).all(is_guarded) && !is_guarded(21));
        drop(scope);
        let left: Vec<u64> = (0..PAGES).filter(|page| is_guarded(*page)).collect();
        assert_eq!(left, [8, 9]);
        // Few are taken one by one.
        let scope = guard.begin(vec![(Gpa(0), 1), (Gpa(4 * PAGE), 1)], false).expect("guarded");
        assert!(is_guarded(0) && is_guarded(4) && !is_guarded(1));
        drop(scope);
        assert!(guard.begin(vec![(Gpa(0), 1), (Gpa(2 * PAGES * PAGE), 1)], false).is_err());
        assert!(!is_guarded(0), "nothing stays of what failed");
    }

    #[test]
    fn who_writes_first_since_the_last_look_tells() {
        let guard = guard();
        guard.guard_text(&(Gpa(0)..Gpa(PAGE))).expect("guarded");
        let site = Watched {
            patch: "p".into(),
            at: Gva(0),
            policy: Policy::Yield,
            pieces: vec![(Gpa(100), 5)],
            is_guarded: true,
        };
        guard.lock().watched.insert(0, vec![Arc::new(site)]);
        let touched = |at: u64| match attempt(&guard, &[(Gpa(at), 1)], &[7]) {
            Attempt::Done { touched } => touched,
            other => panic!("{other:?}"),
        };
        assert_eq!(guard.take_news(), GuestWrites::default());
        for _ in 0..2 {
            assert_eq!([touched(50), touched(104), touched(50)], [true, false, false]);
            assert_eq!(guard.take_news(), GuestWrites { beside: true, touched: vec!["p".into()] });
        }
        assert_eq!([touched(104), touched(104)], [true, false]);
    }

    #[test]
    fn text_is_protected_ahead_until_the_guest_writes_to_it() {
        let guard = guard();
        assert!(!guard.knows_text());
        guard.know_text(&(Gpa(4 * PAGE)..Gpa(20 * PAGE)));
        let protected = || (0..PAGES).filter(|page| !may_write(&guard, *page)).collect::<Vec<_>>();
        assert!(guard.knows_text() && protected().is_empty());
        guard.close_text().expect("protected");
        assert_eq!((protected(), guard.pages_ahead(), guard.pages()), ((4..20).collect(), 16, 0));
        // Other memory does not matter.
        assert_eq!(attempt(&guard, &[(Gpa(20 * PAGE), 1)], &[7]), Attempt::NotGuarded);
        assert_eq!(guard.pages_ahead(), 16);
        // A program finds it as it wants it, and leaves it so.
        let scope = guard.begin(vec![(Gpa(5 * PAGE), 1), (Gpa(25 * PAGE), 1)], false).expect("guarded");
        assert_eq!(attempt(&guard, &[(Gpa(5 * PAGE), 1)], &[7]), Attempt::InFlight);
        assert_eq!(attempt(&guard, &[(Gpa(5 * PAGE + 1), 1)], &[7]), DONE);
        assert!(protected().contains(&25));
        drop(scope);
        assert_eq!(protected(), (4..20).collect::<Vec<_>>());
        // The guest's first write opens it; that is its own business, and told to nobody.
        let told = guard.events().since(0).len();
        assert_eq!(attempt(&guard, &[(Gpa(6 * PAGE), 1)], &[7]), Attempt::NotGuarded);
        assert_eq!((protected().len(), guard.pages_ahead(), guard.hits()), (0, 0, 1));
        assert_eq!(guard.events().since(0).len(), told);
        // It must rest before it is protected again, unless a program comes.
        guard.close_text().expect("nothing to do");
        assert!(protected().is_empty());
        drop(guard.begin(vec![(Gpa(5 * PAGE), 1)], false).expect("guarded"));
        assert_eq!(protected(), (4..20).collect::<Vec<_>>());
        // The guest writes while a program goes on: all but the program's own page is open.
        let scope = guard.begin(vec![(Gpa(5 * PAGE), 1)], false).expect("guarded");
        assert_eq!(attempt(&guard, &[(Gpa(6 * PAGE), 1)], &[7]), Attempt::NotGuarded);
        assert_eq!(protected(), [5]);
        drop(scope);
        assert!(protected().is_empty());
    }

    /// Whether mapping A of a page is writable, as the system has it.
    fn may_write(guard: &Guard, page: u64) -> bool {
        let at = guard.ram.slots()[0].host + page * PAGE;
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let hex = |number: &str| u64::from_str_radix(number, 16).expect("a number");
        let found = maps.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            (hex(start)..hex(end)).contains(&at).then(|| rest.as_bytes()[1] == b'w')
        });
        found.expect("it is mapped")
    }

    /// Everything that changes protection, in any order: what the guest can't write to is what
    /// the guard knows to be protected, and no page stays so for nothing.
    #[test]
    fn what_is_protected_is_known_to_be() {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut below = |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        for round in 0..20 {
            let guard = guard();
            if round % 3 == 0 {
                guard.guard_text(&(Gpa(5 * PAGE)..Gpa(9 * PAGE))).expect("guarded");
            }
            let mut watched: Vec<u64> = Vec::new();
            let mut scope = None;
            for step in 0..60 {
                let page = below(PAGES);
                let action = below(9);
                match action {
                    0 if !guard.knows_text() => guard.know_text(&(Gpa(3 * PAGE)..Gpa(17 * PAGE))),
                    1 => guard.close_text().expect("protected"),
                    3 if scope.is_none() => {
                        let pieces = (0..1 + below(6)).map(|_| (Gpa(below(PAGES) * PAGE), 1)).collect();
                        scope = Some(guard.begin(pieces, below(4) == 0).expect("guarded"));
                    }
                    4 => scope = None,
                    5 => {
                        guard.take_page(&mut guard.lock(), page * PAGE).expect("guarded");
                        watched.push(page * PAGE);
                    }
                    6 => {
                        let Some(page) = watched.pop() else { continue };
                        guard.give_page(&mut guard.lock(), page);
                    }
                    7 => {
                        let lift = guard.lift(VcpuId(0), &VcpuRegisters::default(), Gpa(page * PAGE));
                        assert!(
                            lift == Lift::InFlight || may_write(&guard, page),
                            "round {round}, step {step}"
                        );
                    }
                    _ => {
                        let attempt = attempt(&guard, &[(Gpa(page * PAGE), 1)], &[7]);
                        let may = may_write(&guard, page);
                        assert_eq!(attempt == Attempt::NotGuarded, may, "round {round}, step {step}");
                    }
                }
                for page in 0..PAGES {
                    let known = guard.lock().is_protected(page * PAGE);
                    assert_eq!(
                        known,
                        !may_write(&guard, page),
                        "round {round}, step {step}: {action} page {page}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_page_that_is_given_up_is_guarded_no_more() {
        let guard = guard();
        guard.guard_text(&(Gpa(0)..Gpa(2 * PAGE))).expect("guarded");
        let lift = || guard.lift(VcpuId(1), &VcpuRegisters::default(), Gpa(PAGE + 5));
        let scope = guard.begin(vec![(Gpa(PAGE), 1)], false).expect("guarded");
        assert_eq!(lift(), Lift::InFlight);
        drop(scope);
        assert_eq!((lift(), lift()), (Lift::Lifted, Lift::NotGuarded));
        assert_eq!(attempt(&guard, &[(Gpa(PAGE), 1)], &[7]), Attempt::NotGuarded);
        assert_eq!(attempt(&guard, &[(Gpa(0), 1)], &[7]), DONE);
        assert_eq!(guard.pages(), 1);
        assert_eq!(guard.events().since(0)[0].kind, Kind::Unguarded);
    }
}
