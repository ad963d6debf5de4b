//! What a plan names: static keys, static calls, CPU features.

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::image::kernel_image::KernelImage;
use crate::image::tables::{CALL_KEY, CALL_TRAMPOLINE, Tables};

/// A static key of the kernel itself, not of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticKey {
    /// Its name, as a plan writes it: `symbol` or `symbol+0xoffset`.
    pub name: String,
    /// The `struct static_key`.
    pub at: Gva,
    /// Its value in the image.
    pub initially: bool,
    /// How many jumps it switches, without those in modules.
    pub entries: usize,
}

/// A static call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticCall {
    /// Its name, without the prefix of the kernel's symbols.
    pub name: String,
    /// The `struct static_call_key`.
    pub key: Gva,
    /// Its trampoline.
    pub trampoline: Option<Gva>,
    /// Its target in the image; `None` if it calls nothing.
    pub initially: Option<String>,
    /// How many call sites it has, without those in modules.
    pub sites: usize,
}

/// Counts equal items.
pub(crate) fn tally<T: Ord>(all: impl Iterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    for one in all {
        *counts.entry(one).or_default() += 1;
    }
    counts
}

impl KernelImage {
    /// All static keys that have a jump in the kernel itself, by address.
    #[must_use]
    pub fn static_keys(&self) -> Vec<StaticKey> {
        let entries = tally(self.tables().jump_entries.iter().flatten().map(|entry| entry.key));
        let key = |(at, entries): (Gva, usize)| StaticKey {
            name: self.symbols().identify(at).unwrap_or_else(|| at.to_string()),
            at,
            initially: self.tables().initial_value(at) & 0xffff_ffff != 0,
            entries,
        };
        entries.into_iter().map(key).collect()
    }

    /// All static calls, by name.
    #[must_use]
    pub fn static_calls(&self) -> Vec<StaticCall> {
        let sites = tally(self.tables().static_call_sites.iter().flatten().map(|site| site.key));
        let call = |(key, _, symbol): (Gva, u8, &str)| {
            let name = symbol.strip_prefix(CALL_KEY)?;
            let trampoline = self.symbols().only(&format!("{CALL_TRAMPOLINE}{name}"));
            let initially = match self.tables().initial_value(key) {
                0 => None,
                target => self.symbols().describe(Gva(target)),
            };
            let sites = sites.get(&key).copied().unwrap_or(0);
            Some(StaticCall { name: name.to_owned(), key, trampoline, initially, sites })
        };
        let mut calls: Vec<StaticCall> = self.symbols().iter().filter_map(call).collect();
        calls.sort_by(|a, b| a.name.cmp(&b.name));
        calls
    }
}

impl Tables {
    /// The features that alternatives depend on, with the number of alternatives for each.
    #[must_use]
    pub fn feature_counts(&self) -> Vec<(String, usize)> {
        let counts = tally(self.alternatives.iter().flatten().map(|alternative| alternative.feature));
        counts.into_iter().map(|(feature, count)| (self.feature_name(feature), count)).collect()
    }
}
