//! Why what an object brings can't be placed.

/// Why a replacement can't be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unplaceable {
    /// There is not enough room.
    #[error("there is no room for the {bytes} bytes of {name}")]
    NoRoom {
        /// The piece.
        name: String,
        /// How many bytes it has.
        bytes: usize,
    },
    /// A field can't hold its address.
    #[error("{name}+{offset:#x} can't refer to {to:#x}: the field is too narrow")]
    OutOfRange {
        /// The piece.
        name: String,
        /// Where in it.
        offset: usize,
        /// What it refers to.
        to: u64,
    },
    /// It is not known how functions of the running kernel return.
    #[error("{name} returns by a thunk, and no function of the object tells how the guest's kernel has that")]
    NoReturn {
        /// The piece.
        name: String,
    },
    /// An alternative that follows from a pointer's value.
    #[error(
        "{name}+{offset:#x} calls through a pointer where the guest's kernel calls the pointer's target; that is not \
         done for new code yet"
    )]
    DirectCall {
        /// The piece.
        name: String,
        /// Where in it.
        offset: usize,
    },
}
