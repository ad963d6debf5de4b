//! Guest memory: reads, writes, and what instruction fetches see of them.
//!
//! Memory is divided into units, of one byte or eight ([`Fetch`]). A fetch shows, for each unit,
//! any value that was there since the vCPU's last fence.

use std::collections::BTreeSet;

use patcher::addr::Gva;

use crate::scenario::{Fetch, Scenario};
use crate::state::{State, Vcpu};

/// The index of an address in [`State::memory`].
fn index(scenario: &Scenario<'_>, at: Gva) -> usize {
    let mut before = 0;
    for (base, bytes) in &scenario.memory {
        match at.offset_from(*base) {
            Some(offset) if offset < bytes.len() => return before + offset,
            _ => before += bytes.len(),
        }
    }
    // The test is broken.
    panic!("{at} is not in the scenario's memory: add a piece that holds it");
}

/// What a data access reads.
pub(crate) fn read<'s>(scenario: &Scenario<'_>, state: &'s State<'_>, at: Gva, length: usize) -> &'s [u8] {
    let from = index(scenario, at);
    &state.memory[from..from + length]
}

/// The aligned eight bytes around an address, and where they begin.
pub(crate) fn read_word_around(scenario: &Scenario<'_>, state: &State<'_>, at: Gva) -> (Gva, Vec<u8>) {
    let from = index(scenario, at);
    let word = from / 8 * 8;
    let bytes = state.memory[word..state.memory.len().min(word + 8)].to_vec();
    (Gva(at.0 - (from - word) as u64), bytes)
}

/// Writes a byte that is never executed, so that no fetch can show a stale value.
pub(crate) fn write_data(scenario: &Scenario<'_>, state: &mut State<'_>, at: Gva, byte: u8) {
    state.memory[index(scenario, at)] = byte;
}

/// Writes text: by one store if it is aligned to its size, else byte by byte.
pub(crate) fn write(scenario: &Scenario<'_>, state: &mut State<'_>, at: Gva, bytes: &[u8]) {
    let from = index(scenario, at);
    let whole = matches!(bytes.len(), 1 | 2 | 4 | 8) && from.is_multiple_of(bytes.len());
    for (i, store) in bytes.chunks(if whole { bytes.len() } else { 1 }).enumerate() {
        let from = from + i;
        // A store lies within one unit of eight bytes, or covers several of one byte.
        let units = from / unit_bytes(scenario)..=(from + store.len() - 1) / unit_bytes(scenario);
        for number in units.clone() {
            let old = unit(scenario, &state.memory, number);
            for vcpu in &mut state.vcpus {
                vcpu.stale.entry(number).or_default().insert(old);
            }
        }
        state.memory[from..from + store.len()].copy_from_slice(store);
        for number in units {
            let new = unit(scenario, &state.memory, number);
            for vcpu in &mut state.vcpus {
                if let Some(values) = vcpu.stale.get_mut(&number) {
                    values.remove(&new);
                    if values.is_empty() {
                        vcpu.stale.remove(&number);
                    }
                }
            }
        }
    }
}

/// Every sequence of `length` bytes that a fetch at `at` may show.
pub(crate) fn fetch(
    scenario: &Scenario<'_>,
    state: &State<'_>,
    vcpu: &Vcpu,
    at: Gva,
    length: usize,
) -> BTreeSet<Vec<u8>> {
    let (from, size) = (index(scenario, at), unit_bytes(scenario));
    let mut streams = BTreeSet::from([Vec::new()]);
    for number in from / size..=(from + length - 1) / size {
        let mut values = vcpu.stale.get(&number).cloned().unwrap_or_default();
        values.insert(unit(scenario, &state.memory, number));
        let wanted = from.max(number * size)..(from + length).min((number + 1) * size);
        let longer = |stream: &Vec<u8>, value: u64| {
            let bytes = value.to_le_bytes();
            let part = &bytes[wanted.start - number * size..wanted.end - number * size];
            [stream, part].concat()
        };
        streams = streams.iter().flat_map(|s| values.iter().map(move |v| longer(s, *v))).collect();
    }
    streams
}

/// Fences every vCPU: from now on their fetches show the present values.
pub(crate) fn fence(state: &mut State<'_>) {
    state.vcpus.iter_mut().for_each(|vcpu| vcpu.stale.clear());
}

fn unit_bytes(scenario: &Scenario<'_>) -> usize {
    match scenario.fetch {
        Fetch::Bytes => 1,
        Fetch::Words => 8,
    }
}

/// The value of a unit. The last one may be short.
fn unit(scenario: &Scenario<'_>, memory: &[u8], number: usize) -> u64 {
    let size = unit_bytes(scenario);
    let bytes = &memory[number * size..memory.len().min((number + 1) * size)];
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
