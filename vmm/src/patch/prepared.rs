//! What objects bring, as it was prepared lately. A plan is checked, explained and applied, reverted and applied again, each
//! time with the same objects, and to prepare them takes longer than all else: the kernel's file is unpacked for it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use patcher::image::KernelImage;
use patcher::object::Replacement;
use patcher::plan::{Patch, Plan};
use sha2::{Digest, Sha256};

/// Most plans whose objects are remembered, and most bytes that each may bring.
const MOST: usize = 4;
const MOST_BYTES: usize = 1 << 20;

type Replacements = BTreeMap<usize, Replacement>;

/// What was prepared, the latest first.
#[derive(Debug, Default)]
pub(super) struct Prepared(VecDeque<Known>);

#[derive(Debug)]
struct Known {
    image: Arc<KernelImage>,
    objects: Objects,
    replacements: Replacements,
}

/// Tells the objects of a plan from others: which of its patches brings what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Objects([u8; 32]);

impl Prepared {
    /// What objects bring to a kernel, if that is known.
    pub(super) fn find(&self, objects: Objects, image: &Arc<KernelImage>) -> Option<Replacements> {
        let is_it = |known: &&Known| known.objects == objects && Arc::ptr_eq(&known.image, image);
        self.0.iter().find(is_it).map(|known| known.replacements.clone())
    }

    /// Remembers it.
    pub(super) fn keep(&mut self, objects: Objects, image: Arc<KernelImage>, replacements: &Replacements) {
        if replacements.values().map(Replacement::size).sum::<usize>() > MOST_BYTES {
            return;
        }
        self.0.push_front(Known { image, objects, replacements: replacements.clone() });
        self.0.truncate(MOST);
    }
}

impl Objects {
    pub(super) fn of(plan: &Plan) -> Self {
        let mut sum = Sha256::new();
        for (index, patch) in plan.patches.iter().enumerate() {
            let Patch::Object { before, after } = patch else { continue };
            sum.update((index as u64).to_le_bytes());
            for file in [before, after] {
                sum.update((file.0.len() as u64).to_le_bytes());
                sum.update(&file.0);
            }
        }
        Self(sum.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;
    use patcher::image::symbols::Symbols;

    use super::*;

    fn plan(name: &str, objects: &[(&[u8], &[u8])]) -> Plan {
        let base64 =
            |bytes: &[u8]| serde_json::to_value(patcher::plan::ObjectFile(bytes.to_vec())).expect("JSON");
        let patches: Vec<_> = objects
            .iter()
            .map(|(before, after)| serde_json::json!({ "object": { "before": base64(before), "after": base64(after) } }))
            .collect();
        let plan = serde_json::json!({ "version": 1, "name": name, "patches": patches });
        Plan::parse(plan.to_string().as_bytes()).expect("a plan")
    }

    fn objects(name: &str, objects: &[(&[u8], &[u8])]) -> Objects {
        Objects::of(&plan(name, objects))
    }

    fn image() -> Arc<KernelImage> {
        Arc::new(KernelImage::from_parts("6.1".into(), Symbols::default(), Gva(0xffff_ffff_8100_0000)))
    }

    #[test]
    fn the_same_objects_for_the_same_kernel_are_known() {
        let (mut prepared, ours) = (Prepared::default(), image());
        prepared.keep(objects("a", &[(b"1", b"23")]), ours.clone(), &Replacements::new());
        let finds = |prepared: &Prepared, objects: &[(&[u8], &[u8])], image: &Arc<KernelImage>| {
            prepared.find(self::objects("b", objects), image).is_some()
        };
        assert!(finds(&prepared, &[(b"1", b"23")], &ours), "whatever the plan's name");
        for other in [&[(&b"12"[..], &b"3"[..])][..], &[(b"1", b"24")], &[(b"1", b"23"), (b"1", b"23")]] {
            assert!(!finds(&prepared, other, &ours), "{other:?}");
        }
        assert!(!finds(&prepared, &[(b"1", b"23")], &image()), "another kernel");
        for number in 0..MOST {
            prepared.keep(
                objects("a", &[(b"1", number.to_string().as_bytes())]),
                ours.clone(),
                &Replacements::new(),
            );
        }
        assert!(
            !finds(&prepared, &[(b"1", b"23")], &ours) && prepared.0.len() == MOST,
            "the oldest is forgotten"
        );
    }
}
