//! The instructions that raise #BP: `int3`, with whatever prefixes (SDM volume 2, 2.1.1 and INT3).

use patcher::insn::{INT3, MAX_LENGTH};

/// `int 3` in two bytes, if the host reports it as #BP.
const INT_IMMEDIATE: [u8; 2] = [0xcd, 3];

/// An instruction that raises #BP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Breakpoint {
    /// How many prefixes it has.
    pub(super) prefixes: usize,
    /// Its length in bytes.
    pub(super) length: usize,
}

impl Breakpoint {
    /// A bare `int3`.
    pub(super) const PLAIN: Self = Self { prefixes: 0, length: 1 };

    /// Decodes the instruction that `code` begins with. `None` if it is another one, or not all there.
    pub(super) fn decode(code: &[u8], is_64_bit: bool) -> Option<Self> {
        // LOCK is none of them: it raises #UD.
        let is_prefix = |byte: &u8| match byte {
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf2 | 0xf3 => true,
            0x40..=0x4f => is_64_bit,
            _ => false,
        };
        let prefixes = code.iter().take_while(|byte| is_prefix(byte)).count();
        let length = match code.get(prefixes..)? {
            [INT3, ..] => prefixes + 1,
            rest if rest.starts_with(&INT_IMMEDIATE) => prefixes + 2,
            _ => return None,
        };
        (length <= MAX_LENGTH).then_some(Self { prefixes, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_belong_to_it() {
        let decode = |code: &[u8]| Breakpoint::decode(code, true).map(|found| (found.prefixes, found.length));
        assert_eq!(decode(&[0xcc]), Some((0, 1)));
        assert_eq!(decode(&[0xf3, 0xcc, 0x90]), Some((1, 2)));
        assert_eq!(decode(&[0x66, 0x2e, 0x48, 0xcc]), Some((3, 4)));
        assert_eq!(decode(&[0xcd, 3]), Some((0, 2)));
        assert_eq!(decode(&[0xf2, 0xcd, 3]), Some((1, 3)));
        let longest = [[0x66; 14].as_slice(), &[0xcc]].concat();
        assert_eq!(decode(&longest), Some((14, 15)));
        for code in [&[0xcd, 4][..], &[0xf0, 0xcc], &[0x90], &[0xf3, 0x90], &[0x66; 15], &[]] {
            assert_eq!(decode(code), None, "{code:02x?}");
        }
        assert_eq!(decode(&[[0x66; 15].as_slice(), &[0xcc]].concat()), None, "too long: #GP");
        assert_eq!(Breakpoint::decode(&[0x48, 0xcc], false), None, "dec eax");
        assert_eq!(Breakpoint::decode(&[0x67, 0xcc], false).map(|found| found.length), Some(2));
    }
}
