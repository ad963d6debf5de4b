//! What a plan brings, prepared before it is resolved.

use std::collections::BTreeMap;

use crate::image::{Contents, KernelImage};
use crate::object::{Error, Object, Replacement, Room, Unfit, build};
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::{ObjectFile, Patch, Plan};

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
    let malformed =
        |which| move |error: Error| vec![Refusal::ObjectMalformed { which, why: error.to_string() }];
    let before = Object::parse(&before.0).map_err(malformed("before"))?;
    let after = Object::parse(&after.0).map_err(malformed("after"))?;
    build(&before, &after, image, contents).map_err(|unfit| unfit.into_iter().map(refusal).collect())
}

fn refusal(unfit: Unfit) -> Refusal {
    let what = unfit.to_string();
    match unfit {
        Unfit::BuildMismatch { .. } => Refusal::BuildMismatch { what },
        Unfit::Unresolved { .. } => Refusal::Unresolved { what },
        Unfit::TooMuchWork(_)
        | Unfit::Unchanged
        | Unfit::Obstacle(_)
        | Unfit::Told { .. }
        | Unfit::NotLeft { .. }
        | Unfit::Shared { .. } => Refusal::NotReplaceable { what },
    }
}
