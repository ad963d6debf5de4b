//! From a resolved plan to a changed guest: steps, the compiler that orders them, the session that
//! yields them one by one, and the target that executes them.
//!
//! ```text
//! step ◀── compile          which steps, in which order, with which undo
//!   ▲
//!   └───── session ◀── target    walk, roll back; execute
//! ```

pub mod compile;
pub mod session;
pub mod step;
pub mod target;
