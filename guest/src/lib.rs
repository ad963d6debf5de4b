//! What guests and the rig's host are made of, and what runs inside them.
//!
//! Everything that is fetched or built lies in one cache outside the checkout
//! ([`provision::cache`]), so a second clone on the same machine, or a machine that is offline by
//! now, starts at once.

pub mod inside;
pub mod provision;
pub mod rig;
