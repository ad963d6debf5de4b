//! The text guard: pages of the guest's text that the guest writes to only with the monitor's leave.
//!
//! Mapping A of a protected page is read-only ([`GuestRam::write_protect`]), so a guest write makes
//! the vCPU leave the guest before it took effect, whichever guest mapping it uses. The vCPU's thread
//! then asks [`Guard::attempt`]. A page is protected as long as there is a reason
//! (`pages::Reasons`); the reasons decide what becomes of a write:
//!
//! ```text
//!                    first reason: mprotect(PROT_READ)
//!     ┌──────────┐ ───────────────────────────────────▶ ┌─────────────────────────────────────┐
//!     │ writable │                                      │ protected                           │
//!     └──────────┘ ◀─────────────────────────────────── │  text, site or program (guarded):   │
//!       ▲      ▲     last reason gone:                  │    emulated; waits if in flight     │
//!       │      │     mprotect(PROT_READ | PROT_WRITE)   │  preprotected only: its large page  │
//!       │      │                                        │    becomes writable                 │
//!       │      │ host refused the first: taken back     │  init gate only: the vCPU waits     │
//!       │      └─────────────────────────────────────── │    for the controller               │
//!       │                                               └─────────────────────────────────────┘
//!       │                                                 │ last reason gone,     ▲ new reason
//!       │ guest write: mprotect again                     ▼ host refused          │
//!       │                                               ┌─────────────────────────────────────┐
//!       └────────────────────────────────────────────── │ stuck: refused again, then emulated │
//!                                                       └─────────────────────────────────────┘
//! ```
//!
//! `state` decides and is pure, `protector` has it done, `guard` holds the lock. `docs/guard.md`
//! compares ways to protect, and lists what becomes of a write. A write by another kernel than the one
//! that is guarded makes every page writable (`docs/replaced.md`).
//!
//! [`GuestRam::write_protect`]: crate::memory::GuestRam::write_protect

mod guard;
mod guest_write;
mod init_gate;
mod pages;
mod pieces;
mod preprotect;
mod program;
mod protector;
mod replaced;
mod state;
mod watch_list;
mod watched;

#[cfg(any(test, feature = "fuzzing"))]
pub mod properties;
#[cfg(test)]
mod tests;

pub use self::guard::Guard;
pub use self::guest_write::{Attempt, Lift, Write};
pub(crate) use self::pieces::split_at_pages;
pub use self::preprotect::REST;
pub use self::program::ProgramScope;
pub use self::watch_list::GuestWrites;
