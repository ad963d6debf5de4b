//! How each thread of a running monitor begins.

use crate::host::thread::Thread;
use crate::host::{sandbox, signal_mask};

/// The calling thread takes no signals, whatever it has inherited, and enters the sandbox if there is one.
///
/// # Panics
/// When either fails, which ends the process.
pub fn begin(thread: Thread) {
    if let Err(error) = signal_mask::take_only(&[]) {
        panic!("the signals of a thread ({thread}): {error}");
    }
    sandbox::enter(thread);
}
