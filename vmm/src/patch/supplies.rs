//! Prepares what a plan brings: its objects are compared with the kernel's file, which is read again for that.

use std::time::Instant;

use patcher::object::Room;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::plan::{Patch, Plan};
use patcher::resolve::{ResolvedPlan, Supplies};

use crate::patch::code_pages::CodePages;
use crate::patch::engine::{Engine, at_root};
use crate::patch::prepared::Objects;

impl Engine {
    /// What the objects of a plan bring. Nothing is written.
    pub(super) fn supplies(&mut self, plan: &Plan) -> Result<Supplies, Vec<Refused>> {
        if !plan.patches.iter().any(|patch| matches!(patch, Patch::Object { .. })) {
            return Ok(Supplies::default());
        }
        let began = Instant::now();
        let not_ready = |why| at_root(Refusal::GuestNotReady { why });
        let image = self.image().map_err(|why| not_ready(why.to_string()))?;
        let objects = Objects::of(plan);
        let replacements = match self.prepared.find(objects, &image) {
            Some(known) => known,
            None => {
                let unpacked = self.unpack_image().map_err(not_ready)?;
                let contents = unpacked.contents().map_err(not_ready)?;
                let replacements = Supplies::prepare(plan, &image, &contents)?;
                self.prepared.keep(objects, image, &replacements);
                replacements
            }
        };
        tracing::debug!("preparing the objects of {} took {:?}", plan.name, began.elapsed());
        Ok(Supplies { replacements, room: None })
    }

    /// Finds the room that there is now for what objects bring.
    pub(super) fn find_room(&mut self, supplies: &mut Supplies) -> Result<(), Vec<Refused>> {
        if !supplies.replacements.is_empty() {
            supplies.room = Some(self.room().map_err(|why| at_root(Refusal::NoRoom { why }))?);
        }
        Ok(())
    }

    /// Code and data of an applied plan have their place for good: a task may come back to code that was live once, and
    /// data are not set anew when a site is.
    pub(super) fn keep_what_was_brought(&mut self, plan: &mut ResolvedPlan) {
        if let (Some(left), Some(pages)) = (plan.left.take(), &mut self.code_pages) {
            pages.take(&left);
        }
        plan.brings.clear();
        plan.counts.clear();
    }

    /// The room for new code in the guest.
    fn room(&mut self) -> Result<Room, String> {
        if self.code_pages.is_none() {
            let placed = CodePages::place(self.kernel().map_err(|refusal| refusal.to_string())?)?;
            self.code_pages = Some(placed);
        }
        self.code_pages.as_ref().map(CodePages::room).ok_or_else(String::new)
    }
}
