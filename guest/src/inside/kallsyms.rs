//! `/proc/kallsyms`, read and reduced to a number that two readers of the same list agree on.

use std::hash::{DefaultHasher, Hash, Hasher};

/// A line of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Where it is.
    pub at: u64,
    /// Its type, a letter as in `nm`.
    pub kind: char,
    /// Its name.
    pub name: &'a str,
    /// Whether it is the kernel's own, not a module's.
    pub own: bool,
}

/// Its lines in their order: `address type name [module]`.
pub fn parse(list: &str) -> impl Iterator<Item = Symbol<'_>> + Clone {
    list.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let at = u64::from_str_radix(words.next()?, 16).ok()?;
        Some(Symbol {
            at,
            kind: words.next()?.chars().next()?,
            name: words.next()?,
            own: words.next().is_none(),
        })
    })
}

/// The kernel's own symbols as it was linked: what KASLR added is taken off.
pub fn own(list: &str) -> impl Iterator<Item = (u64, char, &str)> {
    const LINKED: u64 = 0xffff_ffff_8100_0000;
    let text = parse(list).find(|symbol| symbol.name == "_text").map_or(LINKED, |symbol| symbol.at);
    // What is per CPU or absolute is not moved.
    let linked = move |at: u64| if at >= text { at - (text - LINKED) } else { at };
    parse(list).filter(|symbol| symbol.own).map(move |symbol| (linked(symbol.at), symbol.kind, symbol.name))
}

/// How many there are, and a number that depends on all of them and their order.
pub fn digest<'a>(symbols: impl Iterator<Item = (u64, char, &'a str)>) -> (usize, u64) {
    let mut hasher = DefaultHasher::new();
    let mut count = 0;
    for symbol in symbols {
        symbol.hash(&mut hasher);
        count += 1;
    }
    (count, hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "0000000000000000 A fixed_percpu_data\nffffffff81200000 T _text\n\
        ffffffff81200010 t same\nffffffffc0000000 t init\t[loop]\n";

    #[test]
    fn own_symbols_are_moved_back_and_modules_left_out() {
        let expected = [
            (0, 'A', "fixed_percpu_data"),
            (0xffff_ffff_8100_0000, 'T', "_text"),
            (0xffff_ffff_8100_0010, 't', "same"),
        ];
        assert_eq!(own(LIST).collect::<Vec<_>>(), expected);
        assert_eq!(digest(own(LIST)), digest(expected.into_iter()));
        assert_ne!(digest(own(LIST)), digest(expected.into_iter().rev()));
        assert_ne!(digest(own(LIST)), digest(expected.into_iter().take(2)));
    }
}
