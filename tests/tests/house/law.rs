//! The law: which room lies above which.

use std::collections::BTreeSet;

use crate::arrows::{Arrow, Source};

/// Rooms from the lowest floor to the highest; those on the same floor do not use each other. A
/// room is a module with all that is in it, but for what is a room of its own.
pub(crate) struct Law(pub(crate) &'static [&'static [&'static str]]);

pub(crate) const PATCHER: Law = Law(&[
    &["addr", "budget"],
    &["insn"],
    &["image", "plan"],
    &["object"],
    &["linux", "site"],
    &["safety"],
    &["resolve"],
    &["program"],
]);

pub(crate) const MONITOR: Law = Law(&[
    &["x86", "host", "memory"],
    &["kvm", "boot", "devices", "config", "audit"],
    &["guest"],
    &["sync", "text_guard", "api"],
    &["vcpu"],
    &["machine"],
    &["patch"],
    &["api::routes"],
    &["api::server", "api::client"],
    &["monitor"],
    &["cli"],
]);

pub(crate) const MODEL: Law = Law(&[
    &["explore", "scenario", "code"],
    &["state", "switch"],
    &["memory"],
    &["invariants"],
    &["trap", "monitor"],
    &["guest"],
    &["vcpu"],
    &["machine"],
]);

pub(crate) const GUEST: Law = Law(&[&["provision"], &["inside", "rig"]]);

impl Law {
    /// What breaks it, each in a sentence.
    pub(crate) fn violations(&self, sources: &[Source], arrows: &[Arrow]) -> Vec<String> {
        let mut wrong = Vec::new();
        for source in sources.iter().filter(|source| !source.is_root() && self.room(source).is_none()) {
            wrong.push(format!("{} is in no room of the law", source.path));
        }
        for arrow in arrows {
            let (from, to) = (&sources[arrow.from], &sources[arrow.to]);
            let (Some((low, room)), Some((high, other))) = (self.room(from), self.room(to)) else { continue };
            let (from, to) = (&from.path, &to.path);
            if low < high {
                wrong.push(format!("{from} uses {to}: `{room}` is below `{other}`"));
            } else if low == high && room != other {
                wrong.push(format!("{from} uses {to}: `{room}` and `{other}` are neighbours"));
            }
        }
        wrong.extend(circle(sources, arrows));
        wrong
    }

    /// The floor and the name of the room that a file is in: the longest that fits.
    fn room(&self, source: &Source) -> Option<(usize, &'static str)> {
        let rooms =
            self.0.iter().enumerate().flat_map(|(floor, rooms)| rooms.iter().map(move |room| (floor, *room)));
        rooms.filter(|(_, room)| source.is_in(room)).max_by_key(|(_, room)| room.len())
    }
}

/// A circle of files, the shortest through the first file that is in one.
fn circle(sources: &[Source], arrows: &[Arrow]) -> Option<String> {
    let next = |from: usize| arrows.iter().filter(move |arrow| arrow.from == from).map(|arrow| arrow.to);
    for start in 0..sources.len() {
        let mut seen = BTreeSet::new();
        let mut ways: Vec<Vec<usize>> = next(start).map(|to| vec![start, to]).collect();
        while !ways.is_empty() {
            if let Some(way) = ways.iter().find(|way| way.last() == Some(&start)) {
                let names: Vec<&str> = way.iter().map(|file| sources[*file].path.as_str()).collect();
                return Some(format!("a circle: {}", names.join(" -> ")));
            }
            let longer = |way: Vec<usize>| {
                let last = way.last().copied().unwrap_or(start);
                next(last).map(move |to| [way.clone(), vec![to]].concat()).collect::<Vec<_>>()
            };
            let all: Vec<Vec<usize>> = ways.into_iter().flat_map(longer).collect();
            ways = all.into_iter().filter(|way| way.last().is_some_and(|last| seen.insert(*last))).collect();
        }
    }
    None
}
