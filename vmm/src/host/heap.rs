//! The monitor's own heap: what is large goes back to the system when it is freed.
//!
//! glibc maps a large allocation by itself and unmaps it when freed, but then takes the next ones of
//! up to that size from its heap (mallopt(3), "dynamic mmap threshold"), which stays. A kernel image
//! is unpacked once, into 60 MiB; that the heap keeps, and with transparent large pages all of it.
//!
//! Unsafe code: one call into the C library. Invariant: it takes integers and sets one.
#![allow(unsafe_code)]

/// From which size an allocation is large, in bytes. Requests and plans for thousands of sites are
/// not: to map memory the process's `mmap_lock` is needed, and programs should not wait for that.
const LARGE: i32 = 1 << 20;

/// Makes it so, for the whole process from here on. Where the C library does not know of this, nothing
/// is lost but memory.
pub fn give_back_what_is_large() {
    // SAFETY: see the module's invariant.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}
