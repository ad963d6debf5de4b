//! Adding a descriptor to the event loop.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, EventSet, Events};

/// Has the event loop call the subscriber when `source` is readable.
pub(super) fn readable(ops: &mut EventOps, source: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        tracing::error!("the event loop: {error}");
    }
}
