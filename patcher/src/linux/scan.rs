//! What words on a stack may be return addresses. Nothing is assumed of frames, so nothing is missed but
//! return addresses that the guest keeps elsewhere (`task->ret_stack`, `task->rethooks`).

use crate::addr::Gva;
use crate::linux::stack::Stack;

/// A word of a stack that is an address behind an instruction of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// Where on the stack it is.
    pub at: Gva,
    /// The word.
    pub word: Gva,
    /// Which range.
    pub range: usize,
}

/// The words of a stack in any of these ranges, behind the start and up to the end: a call that never returns
/// may be the last instruction.
///
/// ```
/// use patcher::addr::Gva;
/// use patcher::linux::scan::hits;
/// use patcher::linux::stack::Stack;
///
/// let words = [7_u64, 0x1000, 0x1020, 0x1010];
/// let stack = Stack { at: Gva(0x8000), bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() };
/// let found = hits(&stack, &[(Gva(0x1000), Gva(0x1020))]);
/// assert_eq!(found.iter().map(|hit| (hit.at.0, hit.word.0)).collect::<Vec<_>>(), [(0x8010, 0x1020), (0x8018, 0x1010)]);
/// ```
#[must_use]
pub fn hits(stack: &Stack, ranges: &[(Gva, Gva)]) -> Vec<Hit> {
    let of_word = |(at, word): (Gva, u64)| {
        let inside = move |(start, end): &(Gva, Gva)| start.0 < word && word <= end.0;
        let range = ranges.iter().position(inside)?;
        Some(Hit { at, word: Gva(word), range })
    };
    stack.words_from(stack.at).filter_map(of_word).collect()
}
