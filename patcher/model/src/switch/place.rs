//! The addresses of the modelled kernel.

use std::ops::Range;

use patcher::addr::Gva;

/// The next instruction of a context, or a return address on its stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    /// Code that nobody replaces. Its address is low, so that it is in no range.
    Elsewhere,
    /// The function's first instruction, which the switch changes to a jump to `NewEntry`.
    OldEntry,
    /// Calls, jumps to the `.cold` piece, or goes on.
    OldBody,
    /// Where that call returns; then the function returns.
    OldReturn,
    /// Calls what does not return. It is the function's last instruction.
    OldLast,
    /// Behind the function.
    OldEnd,
    /// The `.cold` piece: calls.
    ColdEntry,
    /// Where that call returns; then back into the function.
    ColdReturn,
    /// Behind the piece.
    ColdEnd,
    /// New code, which calls as the old one does.
    NewEntry,
    /// Where the call returns; then the function returns.
    NewReturn,
    /// A function of the new code that nothing but a timer calls.
    Callback,
    /// Behind the new code.
    NewEnd,
    /// A callee, in which tasks sleep.
    Callee,
    /// A callee that does not return.
    Forever,
    /// A copy of the instruction at `OldBody`, out of line.
    Slot,
    /// Behind the slot.
    SlotEnd,
    /// `return_to_handler`: the function graph tracer's.
    Graph,
    /// Within it: the return address is in a register.
    GraphPopped,
    /// Behind it.
    GraphEnd,
    /// `arch_rethook_trampoline`.
    Rethook,
    /// Within it.
    RethookPopped,
    /// Behind it.
    RethookEnd,
}

impl Place {
    pub(super) fn address(self) -> Gva {
        Gva(0xffff_ffff_8100_0000 + self as u64)
    }

    pub(super) fn word(self) -> u64 {
        self.address().0
    }

    /// Whether it is an instruction of the old function but its first.
    pub(super) fn is_old(self) -> bool {
        (Self::OldBody..=Self::OldLast).contains(&self)
            || (Self::ColdEntry..=Self::ColdReturn).contains(&self)
            || self == Self::Slot
    }

    /// Whether it is an instruction of the new code that is reached by the function's entry.
    pub(super) fn is_new(self) -> bool {
        (Self::NewEntry..=Self::NewReturn).contains(&self)
    }
}

/// The addresses from one place to another.
pub(super) fn range(from: Place, to: Place) -> Range<Gva> {
    from.address()..to.address()
}
