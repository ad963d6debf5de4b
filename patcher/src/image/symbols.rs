//! A symbol table: by name, and by address.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::addr::Gva;

/// Symbols at their link-time addresses.
#[derive(Debug, Default)]
pub struct Symbols {
    names: String,
    /// Sorted by address.
    entries: Vec<Entry>,
    /// Indices into `entries`, sorted by the [hash](hash) of the name. The hashes are not kept: a monitor has
    /// hundreds of thousands of symbols, and looks up few.
    by_name: Vec<u32>,
}

/// 16 bytes.
#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    /// Where its name begins.
    start: u32,
    length: u16,
    kind: u8,
}

/// How many names of one address are tried. A guest's modules may claim any number, and each is
/// looked up again.
const MOST_ALIASES: usize = 64;
/// How many places of one name are counted. Real kernels have less than 1,000 `__func__.0`.
const MOST_PLACES: usize = 4096;
/// How many symbols of other kinds are skipped in search of a function.
const MOST_OTHERS: usize = 4096;

fn hash(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// The result of a look-up by name.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// No symbol has it.
    None,
    /// One symbol has it, or several at the same address.
    One(Gva),
    /// Several symbols at different addresses have it.
    Several(Vec<Gva>),
}

impl Symbols {
    /// Builds the table from (address, type letter as in `nm`, name).
    ///
    /// Returns `None` if the names exceed 4 GiB, or one of them 64 KiB.
    pub fn new<'a>(symbols: impl Iterator<Item = (u64, u8, &'a str)>) -> Option<Self> {
        let mut table = Self::default();
        for (address, kind, name) in symbols {
            let start = u32::try_from(table.names.len()).ok()?;
            table.names.push_str(name);
            let length = u16::try_from(name.len()).ok()?;
            table.entries.push(Entry { address, start, length, kind });
        }
        table.names.shrink_to_fit();
        table.entries.shrink_to_fit();
        table.entries.sort_by_key(|entry| entry.address);
        let mut by_name: Vec<u32> = (0..u32::try_from(table.entries.len()).ok()?).collect();
        by_name.sort_by_cached_key(|index| table.hash_of(*index));
        table.by_name = by_name;
        Some(table)
    }

    fn entry_name(&self, entry: &Entry) -> &str {
        let start = entry.start as usize;
        &self.names[start..start + usize::from(entry.length)]
    }

    fn indexed(&self, index: u32) -> Option<&Entry> {
        self.entries.get(usize::try_from(index).ok()?)
    }

    fn hash_of(&self, index: u32) -> Option<u64> {
        self.indexed(index).map(|entry| hash(self.entry_name(entry)))
    }

    /// How many symbols there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The addresses of the symbols of this name, in order.
    fn named<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = Gva> {
        self.entries_named(name).map(|entry| Gva(entry.address))
    }

    fn entries_named<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = &'a Entry> {
        let wanted = Some(hash(name));
        let from = self.by_name.partition_point(|index| self.hash_of(*index) < wanted);
        let length = self.by_name[from..].partition_point(|index| self.hash_of(*index) == wanted);
        let entries = self.by_name[from..from + length].iter().filter_map(|index| self.indexed(*index));
        entries.filter(move |entry| self.entry_name(entry) == name)
    }

    /// Finds a symbol by its exact name, or as `name,N`: the N-th place of this name in the order of
    /// addresses, counted from 1, as the guest's livepatches count it (Linux include/linux/livepatch.h,
    /// `old_sympos`). No symbol of the kernel has a comma in its name.
    #[must_use]
    pub fn find(&self, name: &str) -> Found {
        let mut addresses: Vec<Gva> = self.named(name).collect();
        addresses.dedup();
        match *addresses {
            [] => self.find_place(name).map_or(Found::None, Found::One),
            [one] => Found::One(one),
            _ => Found::Several(addresses),
        }
    }

    /// The address of `name,N`.
    fn find_place(&self, text: &str) -> Option<Gva> {
        let (name, place) = text.rsplit_once(',')?;
        // Written in one way only: digits, the first of them not 0.
        let canonical = !place.starts_with('0') && place.bytes().all(|byte| byte.is_ascii_digit());
        let place: usize = place.parse().ok().filter(|_| canonical)?;
        self.distinct(name).nth(place.checked_sub(1)?)
    }

    /// Every symbol of exactly this name: its address and type letter.
    pub(crate) fn places<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (Gva, u8)> {
        self.entries_named(name).map(|entry| (Gva(entry.address), entry.kind))
    }

    /// The addresses of the symbols of this name, in order, each once.
    fn distinct<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Gva> {
        let mut last = None;
        self.named(name).filter(move |at| last.replace(*at) != Some(*at))
    }

    /// A name that only this address has: the symbol's own, or `name,N`. `None` if no such symbol is
    /// there, or its place is not among the first of very many.
    #[must_use]
    pub fn unique_name(&self, name: &str, at: Gva) -> Option<String> {
        if self.only(name) == Some(at) {
            return Some(name.to_owned());
        }
        let place = self.distinct(name).take(MOST_PLACES).position(|found| found == at)?;
        Some(format!("{name},{}", place + 1))
    }

    /// The address of a name, if there is only one.
    #[must_use]
    pub fn only(&self, name: &str) -> Option<Gva> {
        let mut all = self.named(name);
        let first = all.next()?;
        all.next_back().is_none_or(|last| last == first).then_some(first)
    }

    /// The text symbol (`t`, `T`, `w`, `W`) that covers an address: its name, start, and
    /// where the next symbol begins, which bounds its size.
    #[must_use]
    pub fn function_at(&self, address: Gva) -> Option<Function<'_>> {
        let is_text = |entry: &Entry| matches!(entry.kind, b't' | b'T' | b'w' | b'W');
        let after = self.entries.partition_point(|entry| entry.address <= address.0);
        let found = self.entries[..after].iter().rev().take(MOST_OTHERS).find(|entry| is_text(entry))?;
        // Of aliases at one address, prefer a global one.
        let first = self.entries.partition_point(|entry| entry.address < found.address);
        let aliases = || {
            let all = self.entries[first..after].iter().take_while(|entry| entry.address == found.address);
            all.filter(|entry| is_text(entry)).take(MOST_ALIASES)
        };
        let named = aliases().find(|entry| entry.kind.is_ascii_uppercase()).or_else(|| aliases().next())?;
        let end = self.entries.get(after).map_or(u64::MAX, |entry| entry.address);
        Some(Function { name: self.entry_name(named), start: Gva(found.address), end: Gva(end) })
    }

    /// Whether a symbol is at an address.
    #[must_use]
    pub fn is_at(&self, address: Gva) -> bool {
        self.entries.binary_search_by_key(&address.0, |entry| entry.address).is_ok()
    }

    /// The next symbol's address behind an address.
    #[must_use]
    pub fn after(&self, address: Gva) -> Option<Gva> {
        let after = self.entries.partition_point(|entry| entry.address <= address.0);
        self.entries.get(after).map(|entry| Gva(entry.address))
    }

    /// The last symbol's address up to an address.
    #[must_use]
    pub fn at_or_before(&self, address: Gva) -> Option<Gva> {
        let after = self.entries.partition_point(|entry| entry.address <= address.0);
        self.entries[..after].last().map(|entry| Gva(entry.address))
    }

    /// An address in the form `symbol` or `symbol+0xoffset`, of a symbol of any kind.
    #[must_use]
    pub fn describe(&self, address: Gva) -> Option<String> {
        let after = self.entries.partition_point(|entry| entry.address <= address.0);
        let at = self.entries[..after].last()?.address;
        let first = self.entries.partition_point(|entry| entry.address < at);
        // Prefer a name that is unambiguous.
        let names =
            || self.entries[first..after].iter().take(MOST_ALIASES).map(|entry| self.entry_name(entry));
        let name = names().find(|name| self.only(name).is_some()).or_else(|| names().next())?;
        Some(if at == address.0 { name.to_owned() } else { format!("{name}+{:#x}", address.0 - at) })
    }

    /// As [`Symbols::describe`], but unambiguous, and the same after every boot: `name,N` if the
    /// symbol's name is not unique.
    #[must_use]
    pub fn identify(&self, address: Gva) -> Option<String> {
        let described = self.describe(address)?;
        let (name, offset) = described.split_at(described.find('+').unwrap_or(described.len()));
        if self.only(name).is_some() {
            return Some(described);
        }
        let unique = self.unique_name(name, self.at_or_before(address)?);
        unique.map(|unique| format!("{unique}{offset}")).or_else(|| self.from_first(address))
    }

    /// An address as its distance from the kernel's first byte, `_text+0xoffset`. `None` in modules.
    #[must_use]
    pub fn from_first(&self, address: Gva) -> Option<String> {
        const FIRST: &str = "_text";
        Some(format!("{FIRST}+{:#x}", address.offset_from(self.only(FIRST)?)?))
    }

    /// All symbols in the order of their addresses: address, type letter, name.
    pub fn iter(&self) -> impl Iterator<Item = (Gva, u8, &str)> {
        self.entries.iter().map(|entry| (Gva(entry.address), entry.kind, self.entry_name(entry)))
    }
}

/// A function, as the symbol table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its first byte.
    pub start: Gva,
    /// Where the next symbol begins.
    pub end: Gva,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_found_and_ambiguity_is_told() {
        let table = Symbols::new(
            [
                (0x08, b'T', "_text"),
                (0x30, b't', "dup"),
                (0x10, b'T', "one"),
                (0x20, b't', "dup"),
                (0x10, b'W', "alias"),
                (0x40, b'D', "data"),
            ]
            .into_iter(),
        )
        .expect("a table");
        assert_eq!(table.find("one"), Found::One(Gva(0x10)));
        assert_eq!(table.find("alias"), Found::One(Gva(0x10)));
        assert_eq!(table.find("dup"), Found::Several(vec![Gva(0x20), Gva(0x30)]));
        assert_eq!(table.find("du"), Found::None);
        let function = table.function_at(Gva(0x2f)).expect("covered");
        assert_eq!((function.name, function.start, function.end), ("dup", Gva(0x20), Gva(0x30)));
        assert_eq!(table.function_at(Gva(0x1f)).expect("covered").name, "one");
        assert_eq!(table.function_at(Gva(0x7)), None);
        assert_eq!(table.describe(Gva(0x11)).as_deref(), Some("one+0x1"));
        assert_eq!(table.describe(Gva(0x31)).as_deref(), Some("dup+0x1"));
        assert_eq!(table.identify(Gva(0x11)).as_deref(), Some("one+0x1"));
        assert_eq!(table.identify(Gva(0x31)).as_deref(), Some("dup,2+0x1"));
        assert_eq!(table.from_first(Gva(0x31)).as_deref(), Some("_text+0x29"));
        assert_eq!((table.describe(Gva(7)), table.identify(Gva(7))), (None, None));
    }

    #[test]
    fn places_of_a_name_are_counted_from_one_by_address() {
        let symbols = [(0x30, b't', "dup"), (0x20, b't', "dup"), (0x20, b't', "dup"), (0x40, b't', "one")];
        let table = Symbols::new(symbols.into_iter()).expect("a table");
        assert_eq!(table.find("dup,1"), Found::One(Gva(0x20)));
        assert_eq!(table.find("dup,2"), Found::One(Gva(0x30)), "two symbols at one address are one place");
        assert_eq!(table.find("one,1"), Found::One(Gva(0x40)));
        for none in
            ["dup,0", "dup,3", "dup,", "dup,01", "dup,+1", "dup,-1", "dup,1,1", "dup,x", ",1", "one,2"]
        {
            assert_eq!(table.find(none), Found::None, "{none}");
        }
        assert_eq!(table.find(&format!("dup,{}1", u64::MAX)), Found::None, "beyond any number");
        assert_eq!(table.unique_name("dup", Gva(0x30)).as_deref(), Some("dup,2"));
        assert_eq!(table.unique_name("one", Gva(0x40)).as_deref(), Some("one"));
        assert_eq!(table.unique_name("dup", Gva(0x31)), None);
    }
}
