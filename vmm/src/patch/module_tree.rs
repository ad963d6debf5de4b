//! Puts a region of memory into the tree by which the guest's kernel finds a module from an address.
//!
//! `mod_tree` (Linux kernel/module/main.c, 6.1 to 6.12) is a latched tree: two red-black trees of the same regions, and a
//! sequence whose lowest bit says which of them readers walk (include/linux/rbtree_latch.h). A reader begins again if the
//! sequence is another one after its walk than before.
//!
//! ```text
//!   mod_tree   sequence   tree 0   tree 1   lowest   highest
//!                           │        │
//!                           ▼        ▼
//!   region     base   size   ...   module   node 0   node 1        in a struct module
//!              ◀───── base ──────▶ a struct mod_tree_node
//! ```
//!
//! All vCPUs are held and nobody has `module_mutex`, so both trees are changed at once, and the sequence advances by two: a
//! reader that was stopped in a tree goes on in it, reaches its end, since it is sound, and begins again.
//!
//! The words with our own region's base and size are the caller's. They are written before.

use std::collections::BTreeMap;
use std::ops::Range;

use patcher::addr::Gva;
use patcher::image::tree_offsets::TreeOffsets;

/// More levels than a sound tree of 2^60 regions has.
const DEEPEST: usize = 128;
/// A `struct rb_node` and its words (include/linux/rbtree_types.h). The first is the parent, and in bit 0 the colour.
const NODE: u64 = 24;
const RIGHT: u64 = 8;
const LEFT: u64 = 16;
const BLACK: u64 = 1;

/// What is inserted.
#[derive(Debug, Clone)]
pub(super) struct Region {
    /// Our `struct mod_tree_node`.
    pub(super) node: Gva,
    pub(super) module: Gva,
    pub(super) memory: Range<Gva>,
}

/// What is written where, in order. Nothing leads to our node before the bounds and its own words are written.
///
/// The guest's nodes and regions are `within`.
///
/// # Errors
/// When the guest is changing the tree, it is inconsistent, or it has a region there; and those of `word`.
pub(super) fn insert(
    tree: Gva,
    layout: &TreeOffsets,
    region: &Region,
    within: &Range<Gva>,
    word: impl Fn(Gva) -> Result<u64, String>,
) -> Result<Vec<(Gva, u64)>, String> {
    let own = layout.nodes.map(|offset| field(region.node, offset));
    // The lowest bits of a node's address are its children's colour.
    if own.iter().any(|node| !node.0.is_multiple_of(8)) || region.memory.is_empty() {
        return Err("no such region can be in the tree of modules".to_owned());
    }
    let sequence = advanced(field(tree, layout.sequence), &word)?;
    let mut writes = bounds(tree, layout, &region.memory, &word)?;

    let mut written = BTreeMap::new();
    for index in 0..2 {
        let root = field(tree, layout.trees[index]);
        let to_base = layout.base.wrapping_sub(layout.node).wrapping_sub(layout.nodes[index]);
        let (base, size) = (to_base.cast_signed(), layout.sizes[0].wrapping_sub(layout.base));
        Tree { root, base, size, own, within, word: &word, written: &mut written }
            .insert(own[index], &region.memory)?;
    }
    writes.push((field(region.node, layout.module), region.module.0));
    let (ours, theirs): (Vec<_>, Vec<_>) = written
        .into_iter()
        .partition(|(at, _)| own.iter().any(|node| (node.0..node.0 + NODE).contains(&at.0)));
    writes.extend(ours);
    for (at, value) in theirs {
        // One that was changed and changed back is left alone.
        if word(at)? != value {
            writes.push((at, value));
        }
    }
    writes.push(sequence);
    Ok(writes)
}

/// The word of the sequence, two further. Its other 32 bits are somebody else's.
fn advanced(at: Gva, word: impl Fn(Gva) -> Result<u64, String>) -> Result<(Gva, u64), String> {
    if !at.0.is_multiple_of(4) {
        return Err("the sequence of the tree of modules is not aligned".to_owned());
    }
    let (whole, shift) = (Gva(at.0 & !7), (at.0 & 4) * 8);
    let value = word(whole)?;
    let sequence = (value >> shift) & u64::from(u32::MAX);
    // A change is two steps (`latch_tree_insert`), so at rest it is even, whatever has become of `module_mutex`.
    if !sequence.is_multiple_of(2) {
        return Err("the guest is changing its tree of modules; try again".to_owned());
    }
    let others = value & !(u64::from(u32::MAX) << shift);
    Ok((whole, others | (((sequence + 2) & u64::from(u32::MAX)) << shift)))
}

/// `__mod_update_bounds`. The upper one first: the guest's begin as -1 and 0.
fn bounds(
    tree: Gva,
    layout: &TreeOffsets,
    memory: &Range<Gva>,
    word: impl Fn(Gva) -> Result<u64, String>,
) -> Result<Vec<(Gva, u64)>, String> {
    let (highest, lowest) = (field(tree, layout.highest), field(tree, layout.lowest));
    let mut writes = Vec::new();
    if memory.end.0 > word(highest)? {
        writes.push((highest, memory.end.0));
    }
    if memory.start.0 < word(lowest)? {
        writes.push((lowest, memory.start.0));
    }
    Ok(writes)
}

fn field(at: Gva, offset: u64) -> Gva {
    Gva(at.0.wrapping_add(offset))
}

fn other(side: u64) -> u64 {
    LEFT + RIGHT - side
}

fn inconsistent(why: &str) -> String {
    format!("the guest's tree of modules is inconsistent: {why}")
}

/// One of the two, with what was written so far over what the guest has.
struct Tree<'a, F> {
    /// The word that leads to the uppermost node.
    root: Gva,
    /// From a node of this tree to the word with its region's base.
    base: i64,
    /// From there to the 32 bits of its size.
    size: u64,
    own: [Gva; 2],
    within: &'a Range<Gva>,
    word: &'a F,
    written: &'a mut BTreeMap<Gva, u64>,
}

impl<F: Fn(Gva) -> Result<u64, String>> Tree<'_, F> {
    fn get(&self, at: Gva) -> Result<u64, String> {
        self.written.get(&at).copied().map_or_else(|| (self.word)(at), Ok)
    }

    fn set(&mut self, at: Gva, value: u64) {
        self.written.insert(at, value);
    }

    fn child(&self, node: Gva, side: u64) -> Result<Option<Gva>, String> {
        let child = self.get(field(node, side))?;
        Ok((child != 0).then_some(Gva(child)))
    }

    fn is_red(&self, node: Gva) -> Result<bool, String> {
        Ok(self.get(node)? & BLACK == 0)
    }

    fn paint(&mut self, node: Gva, black: bool) -> Result<(), String> {
        let parent = self.get(node)? & !BLACK;
        self.set(node, parent | u64::from(black));
        Ok(())
    }

    /// Whether a node of the guest's that `parent` leads to is red.
    fn meet(&self, node: Gva, parent: Option<Gva>) -> Result<bool, String> {
        if !node.0.is_multiple_of(8) {
            return Err(inconsistent("a node is not aligned"));
        }
        if !self.holds(node, NODE) {
            return Err(inconsistent("a node is not where modules are"));
        }
        if self.own.iter().any(|own| own.0.abs_diff(node.0) < NODE) {
            return Err(inconsistent("it leads to our node already"));
        }
        let first = self.get(node)?;
        if first & !BLACK != parent.map_or(0, |parent| parent.0) {
            return Err(inconsistent("a node has another parent"));
        }
        Ok(first & BLACK == 0)
    }

    /// Whether these bytes are where modules are.
    fn holds(&self, at: Gva, length: u64) -> bool {
        self.within.start <= at && at.0.checked_add(length).is_some_and(|end| end <= self.within.end.0)
    }

    fn region(&self, node: Gva) -> Result<Range<u64>, String> {
        let at = node.0.checked_add_signed(self.base).map(Gva);
        let at = at.filter(|at| at.0.is_multiple_of(8) && self.holds(*at, self.size.saturating_add(8)));
        let at = at.ok_or_else(|| inconsistent("a node is not in a region's description"))?;
        let (base, size) = (self.get(at)?, self.get(field(at, self.size))? & u64::from(u32::MAX));
        let end = base.checked_add(size).ok_or_else(|| inconsistent("a region has no end"))?;
        Ok(base..end)
    }

    /// `__lt_insert`.
    fn insert(&mut self, node: Gva, memory: &Range<Gva>) -> Result<(), String> {
        let (path, link) = self.descend(memory)?;
        self.set(node, path.last().map_or(0, |parent| parent.0));
        self.set(field(node, RIGHT), 0);
        self.set(field(node, LEFT), 0);
        self.set(link, node.0);
        self.rebalance(node, path)
    }

    /// The nodes above the place of this region, from the uppermost down, and the word that will lead to it.
    ///
    /// Its neighbours in the tree's order are among them, so nothing else can overlap it.
    fn descend(&self, memory: &Range<Gva>) -> Result<(Vec<Gva>, Gva), String> {
        let memory = memory.start.0..memory.end.0;
        let mut path: Vec<Gva> = Vec::new();
        let (mut link, mut parent_is_red) = (self.root, true);
        // Bases can be here, as the nodes above say.
        let mut possible = 0..u64::MAX;
        loop {
            let node = Gva(self.get(link)?);
            if node.0 == 0 {
                return Ok((path, link));
            }
            if path.len() == DEEPEST {
                return Err(inconsistent("it is too deep"));
            }
            let is_red = self.meet(node, path.last().copied())?;
            if is_red && parent_is_red {
                return Err(inconsistent("a red node is the uppermost or below a red one"));
            }
            let children = (self.child(node, LEFT)?, self.child(node, RIGHT)?);
            if children.0.is_some() && children.0 == children.1 {
                return Err(inconsistent("a node has the same child twice"));
            }
            let theirs = self.region(node)?;
            if !possible.contains(&theirs.start) {
                return Err(inconsistent("it is not in order"));
            }
            let is_right = memory.start >= theirs.start;
            let overlaps = if is_right { memory.start < theirs.end } else { theirs.start < memory.end };
            if overlaps || memory.start == theirs.start {
                return Err(format!("the guest has a module at {}", Gva(theirs.start)));
            }
            if is_right {
                possible.start = theirs.start + 1;
            } else {
                possible.end = theirs.start;
            }
            path.push(node);
            parent_is_red = is_red;
            link = field(node, if is_right { RIGHT } else { LEFT });
        }
    }

    /// `__rb_insert` (Linux lib/rbtree.c), whose cases are named here. `node` is red, and below the last of `path`.
    fn rebalance(&mut self, mut node: Gva, mut path: Vec<Gva>) -> Result<(), String> {
        loop {
            let Some(mut parent) = path.pop() else {
                return self.paint(node, true);
            };
            if !self.is_red(parent)? {
                return Ok(());
            }
            let grandparent = path.pop().ok_or_else(|| inconsistent("the uppermost node is red"))?;
            let side = if self.child(grandparent, LEFT)? == Some(parent) { LEFT } else { RIGHT };
            if let Some(uncle) = self.child(grandparent, other(side))?
                && self.meet(uncle, Some(grandparent))?
            {
                // Case 1.
                self.paint(uncle, true)?;
                self.paint(parent, true)?;
                self.paint(grandparent, false)?;
                node = grandparent;
                continue;
            }
            if self.child(parent, other(side))? == Some(node) {
                // Case 2.
                self.rotate(parent, side, field(grandparent, side))?;
                parent = node;
            }
            // Case 3.
            let link = match path.last() {
                None => self.root,
                Some(above) if self.child(*above, LEFT)? == Some(grandparent) => field(*above, LEFT),
                Some(above) => field(*above, RIGHT),
            };
            self.rotate(grandparent, other(side), link)?;
            self.paint(parent, true)?;
            return self.paint(grandparent, false);
        }
    }

    /// Moves `upper` down to this side, and its child on the other, which is red, up into its place, to which `link` leads.
    fn rotate(&mut self, upper: Gva, side: u64, link: Gva) -> Result<(), String> {
        let lower = self.child(upper, other(side))?.ok_or_else(|| inconsistent("a node has gone"))?;
        let inner = self.child(lower, side)?;
        if let Some(inner) = inner {
            if self.meet(inner, Some(lower))? {
                return Err(inconsistent("a red node beside the path is below a red one"));
            }
            self.set(inner, upper.0 | BLACK);
        }
        self.set(field(upper, other(side)), inner.map_or(0, |inner| inner.0));
        self.set(field(lower, side), upper.0);
        let (first, colour) = (self.get(upper)?, self.get(lower)? & BLACK);
        self.set(lower, (first & !BLACK) | colour);
        self.set(upper, lower.0 | (first & BLACK));
        self.set(link, lower.0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const WITHIN: Range<Gva> = Gva(0xffff_ffff_c000_0000)..Gva(0xffff_ffff_ff00_0000);
    /// Where the struct modules of the tests are, and their regions.
    const MODULES: u64 = WITHIN.start.0;
    const REGIONS: u64 = 0xffff_ffff_d000_0000;
    const SLOT: u64 = 0x1000;
    const TREE: Gva = Gva(0xffff_ffff_8280_0000);
    const LAYOUT: TreeOffsets = TreeOffsets {
        sequence: 4,
        trees: [8, 16],
        lowest: 24,
        highest: 32,
        module: 0,
        nodes: [8, 32],
        base: 0x130,
        sizes: [0x138, 0x138],
        node: 0x140,
    };
    /// A bit that leads out of `WITHIN`.
    const ELSEWHERE: u64 = 1 << 40;
    /// What shares a word with the sequence.
    const NEIGHBOUR: u64 = 0x1234_5678;

    /// The memory of a guest, and what was put into its tree.
    #[derive(Clone, PartialEq, Debug)]
    struct Guest {
        words: BTreeMap<u64, u64>,
        regions: Vec<(Gva, Range<u64>)>,
        sequence: u32,
    }

    /// The region in a slot, as the module with this number has it.
    fn region(number: usize, slot: u64, size: u64) -> Region {
        let module = Gva(MODULES + 0x400 * number as u64);
        let base = REGIONS + SLOT * slot;
        Region { node: Gva(module.0 + 0x140), module, memory: Gva(base)..Gva(base + size) }
    }

    impl Guest {
        fn new(sequence: u32) -> Self {
            let first = u64::from(sequence) << 32 | NEIGHBOUR;
            let words = [
                (TREE.0, first),
                (TREE.0 + 8, 0),
                (TREE.0 + 16, 0),
                (TREE.0 + 24, u64::MAX),
                (TREE.0 + 32, 0),
            ];
            Self { words: words.into(), regions: Vec::new(), sequence }
        }

        /// With a module in each of these slots, which fill them.
        fn with(slots: impl IntoIterator<Item = u64>) -> Self {
            let mut guest = Self::new(0);
            for (number, slot) in slots.into_iter().enumerate() {
                guest.put(&region(number, slot, SLOT));
            }
            guest
        }

        fn word(&self, at: Gva) -> Result<u64, String> {
            self.words.get(&at.0).copied().ok_or_else(|| format!("{at} is not mapped"))
        }

        fn insert(&self, region: &Region) -> Result<Vec<(Gva, u64)>, String> {
            insert(TREE, &LAYOUT, region, &WITHIN, |at| self.word(at))
        }

        /// Inserts it as the loader of a module does, and checks everything.
        fn put(&mut self, region: &Region) {
            self.describe(region);
            let before = self.words.clone();
            let writes = self.insert(region).expect("it is sound");
            self.words.extend(writes.iter().map(|(at, to)| (at.0, *to)));
            self.regions.push((region.node, region.memory.start.0..region.memory.end.0));
            self.sequence = self.sequence.wrapping_add(2);
            self.check_writes(region, &writes, &before);
            self.check();
        }

        /// The words that are not the tree's: the base, and the size with something behind it.
        fn describe(&mut self, region: &Region) {
            let size = region.memory.end.0 - region.memory.start.0;
            self.words.insert(region.node.0 - 16, region.memory.start.0);
            self.words.insert(region.node.0 - 8, size | 0x5555_5555 << 32);
        }

        /// In the order that is promised, each word once, no others than these, and the guest's only if they change.
        fn check_writes(&self, region: &Region, writes: &[(Gva, u64)], before: &BTreeMap<u64, u64>) {
            let class = |at: Gva| {
                let of = |node: Gva| (8..56).step_by(8).any(|offset| at.0 == node.0 + offset);
                match at.0.wrapping_sub(TREE.0) {
                    32 => 0,
                    24 => 1,
                    _ if at == region.node => 2,
                    _ if of(region.node) => 3,
                    8 | 16 => 4,
                    _ if self.regions.iter().any(|(node, _)| of(*node)) => 4,
                    0 => 5,
                    _ => panic!("{at} is nobody's"),
                }
            };
            let classes: Vec<_> = writes.iter().map(|(at, _)| class(*at)).collect();
            assert!(classes.is_sorted(), "{classes:?}");
            let different: BTreeSet<_> = writes.iter().map(|(at, _)| at).collect();
            assert_eq!(different.len(), writes.len(), "a word is written twice");
            assert_eq!(classes.iter().filter(|class| [2, 3].contains(*class)).count(), 7, "our words");
            assert_eq!(classes.last(), Some(&5), "the sequence is last");
            for (at, to) in writes {
                assert!([2, 3].contains(&class(*at)) || before[&at.0] != *to, "{at} does not change");
            }
            assert_eq!(self.words[&region.node.0], region.module.0);
        }

        fn check(&self) {
            assert_eq!(self.words[&TREE.0], u64::from(self.sequence) << 32 | NEIGHBOUR);
            let lowest = self.regions.iter().map(|(_, memory)| memory.start).min().expect("one");
            let highest = self.regions.iter().map(|(_, memory)| memory.end).max().expect("one");
            assert_eq!((self.words[&(TREE.0 + 24)], self.words[&(TREE.0 + 32)]), (lowest, highest));
            let mut sorted: Vec<u64> = self.regions.iter().map(|(_, memory)| memory.start).collect();
            sorted.sort_unstable();
            for index in 0..2 {
                let root = self.words[&(TREE.0 + LAYOUT.trees[index])];
                assert_eq!(self.words[&root] & 1, 1, "the uppermost is black");
                let mut found = Vec::new();
                self.black_height(index, root, 0, &mut found);
                assert_eq!(found, sorted, "in order, and all of them");
                for (node, memory) in &self.regions {
                    for at in [memory.start, memory.end - 1] {
                        assert_eq!(self.find(index, at), Some(node.0), "{at:#x} in tree {index}");
                    }
                    let is_free = |at: &u64| !self.regions.iter().any(|(_, memory)| memory.contains(at));
                    for at in [memory.start - 1, memory.end].iter().filter(|at| is_free(at)) {
                        assert_eq!(self.find(index, *at), None, "{at:#x} in tree {index}");
                    }
                }
            }
        }

        /// Of the tree at this node, with the parent pointers and colours checked, and its bases in order.
        fn black_height(&self, index: usize, node: u64, parent: u64, found: &mut Vec<u64>) -> u32 {
            if node == 0 {
                return 0;
            }
            let first = self.words[&node];
            assert_eq!(first & !1, parent, "the parent");
            let is_red = first & 1 == 0;
            assert!(!is_red || self.words[&parent] & 1 == 1, "a red node is below a red one");
            let left = self.black_height(index, self.words[&(node + 16)], node, found);
            found.push(self.words[&(node - LAYOUT.nodes[index] - 16)]);
            let right = self.black_height(index, self.words[&(node + 8)], node, found);
            assert_eq!(left, right, "the black heights");
            left + u32::from(!is_red)
        }

        /// `mod_find`, in one of the trees.
        fn find(&self, index: usize, at: u64) -> Option<u64> {
            let mut node = self.words[&(TREE.0 + LAYOUT.trees[index])];
            while node != 0 {
                let of = node - LAYOUT.nodes[index];
                let (base, size) = (self.words[&(of - 16)], self.words[&(of - 8)] & 0xffff_ffff);
                if at < base {
                    node = self.words[&(node + 16)];
                } else if at >= base + size {
                    node = self.words[&(node + 8)];
                } else {
                    return Some(of);
                }
            }
            None
        }

        /// A node of tree 0, from the uppermost: `r` is to the right, `l` to the left.
        fn at(&self, path: &str) -> u64 {
            let step = |node, side| self.words[&(node + if side == 'r' { 8 } else { 16 })];
            path.chars().fold(self.words[&(TREE.0 + 8)], step)
        }

        /// Where is read before it is inserted.
        fn read_for(&self, region: &Region) -> Vec<Gva> {
            let read = RefCell::new(BTreeSet::new());
            let note = |at: Gva| {
                read.borrow_mut().insert(at);
                self.word(at)
            };
            insert(TREE, &LAYOUT, region, &WITHIN, note).expect("it is sound");
            read.into_inner().into_iter().collect()
        }

        /// What is said of this one, once these words are there.
        fn refusal(&self, damage: &[(u64, u64)], region: &Region) -> String {
            let mut guest = self.clone();
            guest.describe(region);
            guest.insert(region).expect("it is sound before");
            guest.words.extend(damage.iter().copied());
            guest.insert(region).expect_err("it is damaged")
        }
    }

    fn slots() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let one = (0..100_u64, prop_oneof![Just(SLOT), 1..=SLOT]);
        prop::collection::vec(one, 1..=60).prop_map(|mut slots| {
            let mut seen = BTreeSet::new();
            slots.retain(|(slot, _)| seen.insert(*slot));
            slots
        })
    }

    proptest! {
        #[test]
        fn both_trees_stay_sound_and_lead_to_every_region(slots in slots(), sequence in any::<u32>()) {
            let mut guest = Guest::new(sequence & !1);
            for (number, (slot, size)) in slots.into_iter().enumerate() {
                guest.put(&region(number, slot, size));
            }
        }

        /// Whatever is in a guest's memory, it ends, and what it would write is in the trees' words.
        #[test]
        fn no_damage_leads_elsewhere(
            slots in slots(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..5_usize), 1..6),
        ) {
            let mut guest = Guest::with(slots.into_iter().map(|(slot, _)| slot));
            let new = region(60, 100, SLOT);
            guest.describe(&new);
            let (read, all) = (guest.read_for(&new), guest.words.keys().copied().collect::<Vec<_>>());
            for (at, other, change) in damage {
                let (at, other) = (at.get(&read).0, *other.get(&all));
                let value = guest.words[&at];
                let damaged = [value ^ 1, value ^ 4, value ^ ELSEWHERE, other, guest.words[&other]][change];
                guest.words.insert(at, damaged);
            }
            // All of it can be read elsewhere too.
            let word = |at: Gva| guest.word(at).or_else(|_| guest.word(Gva(at.0 ^ ELSEWHERE)));
            if let Ok(writes) = insert(TREE, &LAYOUT, &new, &WITHIN, word) {
                let is_allowed = |at: Gva| (TREE.0..TREE.0 + 40).contains(&at.0) || WITHIN.contains(&at);
                prop_assert!(writes.iter().all(|(at, _)| at.0.is_multiple_of(8) && is_allowed(*at)));
            }
        }
    }

    #[test]
    fn ascending_and_descending_regions_stay_balanced() {
        Guest::with(0..60);
        Guest::with((0..60).rev());
        // From both ends to the middle: the double rotations.
        Guest::with((0..30).flat_map(|slot| [slot, 59 - slot]));
    }

    #[test]
    fn the_sequence_wraps_in_its_half_of_the_word() {
        Guest::new(0xffff_fffe).put(&region(0, 0, SLOT));
        for (at, before, after) in [(4, 0xffff_fffe_0000_0007, 7), (0, 0x6_ffff_fffe, 0x6_0000_0000)] {
            assert_eq!(advanced(Gva(TREE.0 + at), |_| Ok(before)), Ok((TREE, after)));
        }
        assert!(advanced(Gva(TREE.0 + 2), |_| Ok(0)).is_err(), "not aligned");
    }

    #[test]
    fn a_tree_that_is_being_changed_is_left_alone() {
        let said = Guest::with(0..3).refusal(&[(TREE.0, 1 << 32)], &region(60, 70, SLOT));
        assert!(said.contains("is changing"), "{said}");
    }

    #[test]
    fn bounds_that_are_wide_enough_stay() {
        let guest = Guest::with([0, 9]);
        let writes = guest.insert(&region(60, 4, SLOT)).expect("it is sound");
        assert!(!writes.iter().any(|(at, _)| [24, 32].contains(&at.0.wrapping_sub(TREE.0))));
    }

    /// Regions in the even slots, as if loaded one after the other.
    fn guest() -> Guest {
        Guest::with((0..40).step_by(2))
    }

    fn is_inconsistent(guest: &Guest, damage: &[(u64, u64)], new: &Region, why: &str) {
        let said = guest.refusal(damage, new);
        assert_eq!(said, format!("the guest's tree of modules is inconsistent: {why}"));
    }

    #[test]
    fn a_damaged_path_is_refused() {
        let (guest, new) = (guest(), region(60, 70, SLOT));
        let (root, next, third) = (guest.at(""), guest.at("r"), guest.at("rr"));
        let first = |node: u64| guest.words[&node];
        let link = TREE.0 + 8;
        // A copy of the uppermost node, with its region's words, where no modules are.
        let moved = |to: u64| {
            let offsets = [0, 8, 16, -24, -16];
            let copy =
                |offset| (to.wrapping_add_signed(offset), guest.words[&root.wrapping_add_signed(offset)]);
            let children = ["l", "r"].map(|side| guest.at(side));
            let lead = children.map(|child| (child, to | first(child) & 1));
            [&offsets.map(copy)[..], &lead, &[(link, to)]].concat()
        };
        let cases: &[(&[(u64, u64)], &str)] = &[
            (&[(third + 8, root)], "a node has another parent"),
            (&[(third + 8, third)], "a node has another parent"),
            (&[(link, root | 4)], "a node is not aligned"),
            (&[(next + 8, third | 1)], "a node is not aligned"),
            (&moved(WITHIN.end.0), "a node is not where modules are"),
            (&moved(WITHIN.end.0 - 16), "a node is not where modules are"),
            (&moved(WITHIN.start.0 - 8), "a node is not where modules are"),
            (&[(link, u64::MAX - 7)], "a node is not where modules are"),
            (&moved(WITHIN.start.0), "a node is not in a region's description"),
            (&[(root, 0), (next, root | 1)], "a red node is the uppermost or below a red one"),
            (&[(next, root), (third, next)], "a red node is the uppermost or below a red one"),
            (&[(root, third | 1)], "a node has another parent"),
            (&[(third, root | 1)], "a node has another parent"),
            (&[(third, next | 3)], "a node has another parent"),
            (&[(next + 16, third)], "a node has the same child twice"),
            (&[(third - 24, REGIONS)], "it is not in order"),
            (&[(third - 24, u64::MAX - 8)], "a region has no end"),
            (&[(link, new.node.0 + 8)], "it leads to our node already"),
            (&[(link, new.node.0 + 48)], "it leads to our node already"),
        ];
        for (damage, why) in cases {
            is_inconsistent(&guest, damage, &new, why);
        }
    }

    /// To the left as well, where a base must be below the ones above.
    #[test]
    fn a_path_to_the_left_is_in_order_too() {
        let guest = guest();
        let damage = [(guest.at("l") - 24, REGIONS + 60 * SLOT)];
        is_inconsistent(&guest, &damage, &region(60, 1, SLOT), "it is not in order");
    }

    #[test]
    fn a_tree_that_does_not_end_is_left() {
        for (count, is_deep) in [(DEEPEST, false), (DEEPEST + 1, true)] {
            // Each below the one before, all black, with agreeing parents.
            let mut guest = Guest::new(0);
            for index in 0..2 {
                let (mut link, mut parent) = (TREE.0 + LAYOUT.trees[index], 0);
                for number in 0..count {
                    let one = region(number, number as u64, SLOT);
                    guest.describe(&one);
                    let node = one.node.0 + LAYOUT.nodes[index];
                    guest.words.extend([(link, node), (node, parent | 1), (node + 8, 0), (node + 16, 0)]);
                    (link, parent) = (node + 8, node);
                }
            }
            let said = guest.insert(&region(count, count as u64, SLOT));
            assert_eq!(said.is_err_and(|said| said.ends_with("it is too deep")), is_deep, "{count}");
        }
    }

    #[test]
    fn a_region_that_overlaps_one_of_the_guests_is_refused() {
        let guest = guest();
        let at = |from: u64, to: u64| Region {
            memory: Gva(REGIONS + from)..Gva(REGIONS + to),
            ..region(60, 0, SLOT)
        };
        for slot in [0, 2, 18, 38] {
            let base = slot * SLOT;
            let overlapping = [(0, 1), (SLOT - 1, SLOT + 1), (1, 2), (0, SLOT)]
                .map(|(from, to)| at(base + from, base + to));
            let before = at(base.max(8) - 8, base + 1);
            for new in overlapping.into_iter().chain([before]) {
                let said = guest.insert(&new).expect_err("it overlaps");
                assert!(said.starts_with("the guest has a module at"), "{said}");
            }
            guest.insert(&at(base + SLOT, base + SLOT + 1)).expect("it is next to one");
        }
        // One without a size would still part ours from what is above it.
        let mut guest = guest;
        guest.words.insert(guest.at("r") - 16, 0);
        let base = guest.words[&(guest.at("r") - 24)] - REGIONS;
        assert!(guest.insert(&at(base, base + 8)).is_err(), "the same base");
        assert!(guest.insert(&at(base - 8, base + 8)).is_err(), "it is in ours");
        guest.insert(&at(base + 8, base + 16)).expect("it is empty");
    }

    #[test]
    fn what_cannot_be_in_a_tree_is_not_inserted() {
        let guest = guest();
        let sound = region(60, 70, SLOT);
        guest.insert(&sound).expect("it is sound");
        let misaligned = Region { node: Gva(sound.node.0 + 4), ..sound.clone() };
        let empty = Region { memory: sound.memory.start..sound.memory.start, ..sound };
        assert!(guest.insert(&misaligned).is_err() && guest.insert(&empty).is_err());
    }

    /// What is beside the path is met by recolouring and rotations.
    #[test]
    fn a_damaged_node_beside_the_path_is_refused() {
        // 1 ◀─ 3 black ─▶ 5, both red: below 5 case 1 meets 1.
        let guest = Guest::with([3, 1, 5]);
        let (uncle, new) = (guest.at("l"), region(60, 6, SLOT));
        let outside = WITHIN.start.0 - 64;
        let cases: [(&[(u64, u64)], &str); 3] = [
            (&[(guest.at("") + 16, uncle | 4)], "a node is not aligned"),
            (&[(guest.at("") + 16, outside), (outside, guest.at(""))], "a node is not where modules are"),
            (&[(uncle, uncle)], "a node has another parent"),
        ];
        for (damage, why) in cases {
            is_inconsistent(&guest, damage, &new, why);
        }
        // 3 black ─▶ 5 red: case 3 moves what is to the left of 5, which is nothing.
        let guest = Guest::with([3, 5]);
        let (red, inner) = (guest.at("r"), MODULES + 0x8000);
        let cases: [(&[(u64, u64)], &str); 4] = [
            (&[(red + 16, inner), (inner, red)], "a red node beside the path is below a red one"),
            (&[(red + 16, inner), (inner, inner | 1)], "a node has another parent"),
            (&[(red + 16, inner | 2)], "a node is not aligned"),
            (&[(red + 16, outside), (outside, red | 1)], "a node is not where modules are"),
        ];
        for (damage, why) in cases {
            is_inconsistent(&guest, damage, &new, why);
        }
    }

    #[test]
    fn a_word_that_cannot_be_read_is_an_error() {
        let (guest, new) = (guest(), region(60, 70, SLOT));
        let read = guest.read_for(&new);
        assert!(read.len() > 20 && !read.iter().any(|at| at.0.abs_diff(new.node.0) < 64), "ours is not read");
        for gone in read {
            let word = |at: Gva| if at == gone { Err("gone".to_owned()) } else { guest.word(at) };
            assert_eq!(insert(TREE, &LAYOUT, &new, &WITHIN, word), Err("gone".to_owned()), "{gone}");
        }
    }
}
