//! Where a function must be because of its neighbours: the linker places the code of one object contiguously, in the
//! order in which the compiler wrote it.
//!
//! With `-ffunction-sections` each function has a section of its own, which in the kernel's build are one; this
//! relates them again.

use crate::addr::Gva;
use crate::object::relocatable::Object;

/// The functions of an object in the order in which they lie in the image.
#[derive(Debug)]
pub(super) struct Order {
    /// Each function's index, by the section that it would be in, and its place there.
    functions: Vec<usize>,
    /// Where each function is in that list.
    positions: Vec<usize>,
}

impl Order {
    pub(super) fn new(object: &Object<'_>) -> Self {
        let all = object.functions();
        let mut functions: Vec<usize> = (0..all.len()).collect();
        functions.sort_by_key(|index| {
            let function = &all[*index];
            (group(object, *index), function.section, function.offset)
        });
        let mut positions = vec![0; all.len()];
        for (position, index) in functions.iter().enumerate() {
            positions[*index] = position;
        }
        Self { functions, positions }
    }

    /// Whether a function of a size at `at` lies right behind the one before it, or right before the one behind
    /// it. `place` tells where another is, with its size, if that is known.
    pub(super) fn fits(
        &self,
        object: &Object<'_>,
        index: usize,
        (at, size): (Gva, usize),
        place: impl Fn(usize) -> Option<(Gva, usize)>,
    ) -> bool {
        let before = self.neighbour(object, index, false).and_then(|other| end(place(other)?, object, index));
        let after = self.neighbour(object, index, true);
        let behind = after.and_then(|other| Some((place(other)?.0, end((at, size), object, other)?)));
        before == Some(at) || behind.is_some_and(|(next, end)| next == end)
    }

    /// Where a function is that lies right behind the one before it.
    pub(super) fn behind(
        &self,
        object: &Object<'_>,
        index: usize,
        place: impl Fn(usize) -> Option<(Gva, usize)>,
    ) -> Option<Gva> {
        end(place(self.neighbour(object, index, false)?)?, object, index)
    }

    /// The next function in a direction, or the one before, that would be in the same section.
    fn neighbour(&self, object: &Object<'_>, index: usize, forward: bool) -> Option<usize> {
        /// How many names of one function are skipped; a system call's has 4.
        const MOST_ALIASES: usize = 16;
        let own = object.functions().get(index)?;
        let mut position = *self.positions.get(index)?;
        for _ in 0..MOST_ALIASES {
            position = if forward { position.checked_add(1)? } else { position.checked_sub(1)? };
            let other = *self.functions.get(position)?;
            let function = &object.functions()[other];
            if (function.section, function.offset) != (own.section, own.offset) {
                return (group(object, other) == group(object, index)).then_some(other);
            }
        }
        None
    }
}

/// The section that a function would be in without `-ffunction-sections`.
fn group<'a>(object: &'a Object<'_>, index: usize) -> &'a str {
    let function = &object.functions()[index];
    let section = object.section(function.section).name;
    let own = section.strip_suffix(function.name).and_then(|rest| rest.strip_suffix('.'));
    own.unwrap_or(section)
}

/// The first place behind a function where the next may begin.
fn end((at, size): (Gva, usize), object: &Object<'_>, next: usize) -> Option<Gva> {
    let next = object.functions().get(next)?;
    let align = object.section(next.section).align;
    at.plus(size)?.0.checked_next_multiple_of(align).map(Gva)
}
