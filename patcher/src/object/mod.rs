//! Relocatable objects of the kernel's source, as a compiler makes them: reading one, and proving that it belongs
//! to a kernel image.
//!
//! ```text
//! a.o ──relocatable──▶ sections, symbols, functions ──matching──▶ where each function is in the image,
//!                       image, and its contents ────────┘         or how it differs
//! ```

mod adjacent;
mod agreement;
mod compared;
mod error;
mod known;
pub mod matching;
pub mod outcome;
pub mod relocatable;
pub mod relocation;
mod rewritten;

pub use error::Error;
pub use matching::match_image;
pub use outcome::{Difference, Match, Outcome};
pub use relocatable::Object;
