//! What a plan brings, prepared before it is resolved.

use std::collections::BTreeMap;

use crate::image::{Contents, KernelImage};
use crate::object::layouts::LayoutChange;
use crate::object::{Layouts, Object, Replacement, Room, Unfit, build};
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::{ObjectFile, Patch, Plan};

/// Most types whose layouts differ that are told of an object.
const MOST_LAYOUTS: usize = 16;

/// What the objects of a plan bring, and the room that the guest has for it.
#[derive(Debug, Clone, Default)]
pub struct Supplies {
    /// By the index of the patch.
    pub replacements: BTreeMap<usize, Replacement>,
    /// Free guest memory for all of them.
    pub room: Option<Room>,
}

impl Supplies {
    /// Prepares the objects of a plan. `contents` is the image's. The guest is not looked at.
    ///
    /// # Errors
    /// Every reason that was found.
    pub fn prepare(
        plan: &Plan,
        image: &KernelImage,
        contents: &Contents<'_>,
    ) -> Result<BTreeMap<usize, Replacement>, Vec<Refused>> {
        let (mut replacements, mut refused) = (BTreeMap::new(), Vec::new());
        for (i, patch) in plan.patches.iter().enumerate() {
            let Patch::Object { before, after } = patch else { continue };
            match replacement(before, after, image, contents) {
                Ok(replacement) => _ = replacements.insert(i, replacement),
                Err(refusals) => {
                    refused.extend(refusals.into_iter().map(|refusal| refusal.at(Pointer::patch(i))));
                }
            }
        }
        if refused.is_empty() { Ok(replacements) } else { Err(refused) }
    }
}

fn replacement(
    before: &ObjectFile,
    after: &ObjectFile,
    image: &KernelImage,
    contents: &Contents<'_>,
) -> Result<Replacement, Vec<Refusal>> {
    let first = read(before, "before")?;
    let second = read(after, "after")?;
    let changes = layouts(before, "before")?.changes(&layouts(after, "after")?);
    if !changes.is_empty() {
        let refusal = |change: &LayoutChange| Refusal::NotReplaceable { what: change.to_string() };
        return Err(changes.iter().take(MOST_LAYOUTS).map(refusal).collect());
    }
    build(&first, &second, image, contents).map_err(|unfit| unfit.into_iter().map(refusal).collect())
}

fn read<'f>(file: &'f ObjectFile, which: &'static str) -> Result<Object<'f>, Vec<Refusal>> {
    Object::parse(&file.0).map_err(|error| vec![Refusal::ObjectMalformed { which, why: error.to_string() }])
}

fn layouts(file: &ObjectFile, which: &'static str) -> Result<Layouts, Vec<Refusal>> {
    Layouts::read(&file.0).map_err(|error| vec![Refusal::ObjectMalformed { which, why: error.to_string() }])
}

fn refusal(unfit: Unfit) -> Refusal {
    let what = unfit.to_string();
    match unfit {
        Unfit::BuildMismatch { .. } => Refusal::BuildMismatch { what },
        Unfit::Unresolved { .. } => Refusal::Unresolved { what },
        Unfit::TooMuchWork(_)
        | Unfit::Unchanged
        | Unfit::Obstacle(_)
        | Unfit::Alternative { .. }
        | Unfit::StaticBranch { .. }
        | Unfit::RuntimeConstant { .. }
        | Unfit::NotLeft { .. }
        | Unfit::Shared { .. } => Refusal::NotReplaceable { what },
    }
}
