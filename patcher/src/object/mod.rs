//! Relocatable objects of the kernel's source, as a compiler makes them: reading one, proving that it belongs to a
//! kernel image, and what differs between two.
//!
//! ```text
//! a.o ──relocatable──▶ sections, symbols, functions ──matching──▶ where each function is in the image,
//!                       image, and its contents ────────┘         or how it differs
//! before.o, after.o ──normal──▶ without addresses ──comparison──▶ functions that changed, obstacles
//! ```

mod adjacent;
mod agreement;
mod alternatives;
pub mod building;
mod compared;
pub mod comparison;
mod error;
mod known;
pub mod layouts;
mod line;
pub mod matching;
mod new_piece;
mod normal;
pub mod outcome;
mod piece;
mod references;
pub mod relocatable;
pub mod relocation;
pub mod replacement;
mod rewritten;
mod room;
mod sections;
mod spread;
mod static_branches;
mod tables;
mod told;
mod unfit;
mod unplaceable;

pub use building::build;
pub use comparison::{Change, Comparison, Obstacle, compare};
pub use error::Error;
pub use layouts::Layouts;
pub use matching::match_image;
pub use outcome::{Difference, Match, Outcome};
pub use relocatable::Object;
pub use replacement::Replacement;
pub use room::{
    BUG_ENTRY, Description, FAULT_ENTRY, FRAME_ADDRESS, FRAME_ENTRY, FUNCTION_ENTRY, Room, Table,
};
pub use unfit::Unfit;
