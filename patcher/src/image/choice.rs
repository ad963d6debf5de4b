//! What an entry of a kernel's table of alternatives says, besides where the code and its replacement are (Linux
//! arch/x86/include/asm/alternative.h, `struct alt_instr`).

use crate::image::records::{
    AlternativeHead, AlternativeLengths, AlternativeRecord, AlternativeRecord5_10, AlternativeRecord5_11,
    Record,
};

/// `X86_FEATURE_ALWAYS`, which is no CPU feature, and which every kernel counts as present.
pub(crate) const ALWAYS: u16 = 3 * 32 + 21;
/// More words of feature bits than a kernel has.
pub(super) const MAX_WORDS: u16 = 64;

/// When a replacement is chosen, and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The feature: 32 times the word, plus the bit.
    pub(crate) feature: u16,
    /// Whether it is chosen if the CPU lacks the feature.
    pub(crate) inverted: bool,
    /// Whether the replacement is a direct call of the target of the original's indirect call.
    pub(crate) direct_call: bool,
    /// Length of the code to replace, in bytes.
    pub(crate) original: usize,
    /// Length of the replacement, in bytes.
    pub(crate) replacement: usize,
}

impl Choice {
    /// What an entry says whose layout follows from its length. `None` if no kernel has entries of that length, or
    /// this one makes no sense.
    pub(crate) fn read(entry: &[u8]) -> Option<Self> {
        fn fields<T: Record>(entry: &[u8]) -> Option<&T> {
            T::ref_from_bytes(entry).ok()
        }
        const SINCE_6_3: usize = size_of::<AlternativeRecord>();
        const SINCE_5_11: usize = size_of::<AlternativeRecord5_11>();
        const UP_TO_5_10: usize = size_of::<AlternativeRecord5_10>();
        match entry.len() {
            SINCE_6_3 => fields(entry).and_then(Self::since_6_3),
            SINCE_5_11 => fields(entry).and_then(Self::since_5_11),
            UP_TO_5_10 => fields(entry).and_then(Self::up_to_5_10),
            _ => None,
        }
    }

    pub(super) fn since_6_3(record: &AlternativeRecord) -> Option<Self> {
        Self::new(record.head.feature.get(), record.flags.get(), record.lengths)
    }

    pub(super) fn since_5_11(record: &AlternativeRecord5_11) -> Option<Self> {
        Self::without_flags(&record.head, record.lengths)
    }

    pub(super) fn up_to_5_10(record: &AlternativeRecord5_10) -> Option<Self> {
        Self::without_flags(&record.head, record.lengths)
    }

    /// Without flags, the feature's top bit is the only one.
    fn without_flags(head: &AlternativeHead, lengths: AlternativeLengths) -> Option<Self> {
        let feature = head.feature.get();
        Self::new(feature & 0x7fff, feature >> 15, lengths)
    }

    fn new(feature: u16, flags: u16, lengths: AlternativeLengths) -> Option<Self> {
        const INVERTED: u16 = 1;
        const DIRECT_CALL: u16 = 2;
        let plausible =
            feature < 32 * MAX_WORDS && flags & !(INVERTED | DIRECT_CALL) == 0 && lengths.original > 0;
        plausible.then(|| Self {
            feature,
            inverted: flags & INVERTED != 0,
            direct_call: flags & DIRECT_CALL != 0,
            original: lengths.original.into(),
            replacement: lengths.replacement.into(),
        })
    }

    /// Whether the replacement always takes the code's place.
    pub(crate) fn is_certain(self) -> bool {
        self.feature == ALWAYS && !self.inverted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_an_entry_tells_its_layout() {
        let entry = |rest: &[u8]| Choice::read(&[&[0xaa; 8], rest].concat());
        let choice = |inverted, direct_call| {
            Some(Choice { feature: 0x97, inverted, direct_call, original: 5, replacement: 4 })
        };
        assert_eq!(entry(&[0x97, 0, 5, 4]), choice(false, false), "since 5.11");
        assert_eq!(entry(&[0x97, 0x80, 5, 4]), choice(true, false));
        assert_eq!(entry(&[0x97, 0, 5, 4, 1]), choice(false, false), "up to 5.10");
        assert_eq!(entry(&[0x97, 0, 0, 0, 5, 4]), choice(false, false), "since 6.3");
        assert_eq!(entry(&[0x97, 0, 1, 0, 5, 4]), choice(true, false));
        assert_eq!(entry(&[0x97, 0, 2, 0, 5, 4]), choice(false, true));
        for wrong in [
            &[0x97, 0, 5][..],
            &[0x97, 0, 0, 0, 5, 4, 0],
            &[0x97, 0, 4, 0, 5, 4],
            &[0x97, 0x80, 0, 0, 5, 4],
            &[0x97, 0x0f, 5, 4],
            &[0x97, 0, 0, 0],
        ] {
            assert_eq!(entry(wrong), None, "{wrong:x?}");
        }
    }
}
