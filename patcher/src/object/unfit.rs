//! What keeps two objects from being a replacement.

use crate::object::comparison::Obstacle;
use crate::object::outcome::{Outcome, PieceMatch};

/// Why two objects make no replacement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// An object takes too much work.
    #[error("{0}")]
    TooMuchWork(String),
    /// The object before the change is not of this kernel.
    #[error("{name} of the object before the change is not what the kernel has: {why}")]
    BuildMismatch {
        /// The function, or the section of data.
        name: String,
        /// The difference.
        why: String,
    },
    /// The objects are the same, as far as functions go.
    #[error("the objects have the same functions, so there is nothing to replace")]
    Unchanged,
    /// Something changed that can't be replaced in a running kernel.
    #[error("{0}")]
    Obstacle(Obstacle),
    /// An alternative by CPU feature that can't be chosen as the kernel does.
    #[error("{function} has an alternative by CPU feature that can't be applied: {why}")]
    Alternative {
        /// The function.
        function: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A branch by a static key that can't be made a test of the key.
    #[error("{function} has a branch by a static key that can't test the key: {why}")]
    StaticBranch {
        /// The function.
        function: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The kernel writes a constant into the function while it starts, which new code would lack.
    #[error(
        "{function} has the constant {constant}, which the kernel writes into its code while it starts; that is not \
         done for new code yet"
    )]
    RuntimeConstant {
        /// The function.
        function: String,
        /// The table of the places of the constant.
        constant: String,
    },
    /// A function that may not be left by a jump.
    #[error("{function} lies in section {section}, which no jump may leave")]
    NotLeft {
        /// The function.
        function: String,
        /// Its section.
        section: String,
    },
    /// A function whose code can't be taken by itself.
    #[error(
        "{function} can't be taken out of its section: build both objects with -ffunction-sections -fdata-sections"
    )]
    Shared {
        /// The function.
        function: String,
    },
    /// Something that new code refers to, and that is at no place that is known.
    #[error("{from} refers to {symbol}, {why}")]
    Unresolved {
        /// The function or variable that refers to it.
        from: String,
        /// What it refers to.
        symbol: String,
        /// What is known of that.
        why: &'static str,
    },
}

/// Why a piece of the object before the change is not the kernel's.
pub(super) fn mismatch(piece: &PieceMatch) -> Option<Unfit> {
    let why = match &piece.outcome {
        Outcome::Mismatch(difference) => difference.to_string(),
        Outcome::Ambiguous { .. } => "it is at several places, and nothing tells which is its".to_owned(),
        _ => return None,
    };
    Some(Unfit::BuildMismatch { name: piece.name.clone(), why })
}
