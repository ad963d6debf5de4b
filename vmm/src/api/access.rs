//! Who may do what: the owner and root everything, members of a configured group only what neither changes
//! nor stops the guest.

use std::os::fd::AsFd;

use crate::host::peer::{self, Peer};

/// What a client may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Everything.
    Owner,
    /// To read.
    Reader,
}

/// Who may connect.
#[derive(Debug, Clone, Copy, Default)]
pub struct Access {
    /// The group whose members may read.
    pub readers: Option<u32>,
}

impl Access {
    /// The process that connected, and its role; `None` if it has none. The socket's mode says the same; this
    /// holds even if the mode was changed.
    pub(super) fn admit(&self, stream: &impl AsFd) -> Option<(Role, Peer)> {
        let peer = peer::of(stream).ok()?;
        if peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw() {
            return Some((Role::Owner, peer));
        }
        let readers = self.readers?;
        let is_reader =
            peer.gid == readers || peer::groups(stream).is_ok_and(|groups| groups.contains(&readers));
        is_reader.then_some((Role::Reader, peer))
    }
}
