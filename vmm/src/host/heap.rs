//! The monitor's heap: a large block goes back to the system when it is freed.
//!
//! glibc maps a large block by `mmap` and unmaps it when it is freed, but then raises its threshold,
//! so that later blocks of that size come from the heap, which keeps them (mallopt(3), "dynamic mmap
//! threshold"). Unpacking a kernel image takes 60 MiB once. A threshold that is set stays.
//!
//! Unsafe code: `mallopt`. Invariant: it takes two integers by value and sets one inside the C library,
//! under its own lock.
#![allow(unsafe_code)]

/// The size in bytes from which a block is large. API requests and plans for thousands of sites are
/// smaller: `mmap` takes the process's `mmap_lock`, which a program should not wait for.
const LARGE: i32 = 1 << 20;

/// Sets the threshold for the whole process. A C library without this option keeps more memory;
/// nothing else changes.
pub fn unmap_large_blocks_when_freed() {
    // SAFETY: see the module's invariant.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}
