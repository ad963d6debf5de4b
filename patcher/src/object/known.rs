//! What the image's own symbols say of the names of an object.

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::image::KernelImage;
use crate::object::relocatable::Object;

/// The names of an object's symbols that the image has, too.
#[derive(Debug)]
pub(super) struct Known<'a>(BTreeMap<&'a str, Names>);

/// The places of a name, in order, each once.
#[derive(Debug, Default)]
struct Names {
    all: Vec<Gva>,
    global: Vec<Gva>,
    /// Those of weak definitions.
    weak: Vec<Gva>,
}

impl<'a> Known<'a> {
    /// Looks up every name of an object once.
    pub(super) fn new(object: &Object<'a>, image: &KernelImage) -> Self {
        let mut known: BTreeMap<&str, Names> = BTreeMap::new();
        for symbol in object.symbols() {
            known.entry(symbol.name).or_insert_with(|| {
                let mut names = Names::default();
                for (at, kind) in image.symbols().places(symbol.name) {
                    names.all.push(at);
                    if kind.is_ascii_uppercase() {
                        names.global.push(at);
                    }
                    if matches!(kind, b'w' | b'W' | b'v' | b'V') {
                        names.weak.push(at);
                    }
                }
                for places in [&mut names.all, &mut names.global, &mut names.weak] {
                    places.sort_unstable();
                    places.dedup();
                }
                names
            });
        }
        Self(known)
    }

    /// All places of a name.
    pub(super) fn all(&self, name: &str) -> &[Gva] {
        self.0.get(name).map_or(&[], |names| &names.all)
    }

    /// The places of a name that other objects see; all places if none of them are.
    pub(super) fn global(&self, name: &str) -> &[Gva] {
        self.0.get(name).map_or(&[], |names| if names.global.is_empty() { &names.all } else { &names.global })
    }

    /// Whether the image's symbol of a place is the weak definition of a name.
    pub(super) fn is_weak(&self, name: &str, at: Gva) -> bool {
        self.0.get(name).is_some_and(|names| names.weak.binary_search(&at).is_ok())
    }
}
