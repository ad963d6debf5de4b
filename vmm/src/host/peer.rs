//! Who is at the other end of a Unix socket.
//!
//! Unsafe code: `getsockopt` with `SO_PEERGROUPS` (Linux 4.13, net/core/sock.c), for which no crate in use
//! has a safe call. Invariant: the kernel writes no more bytes than the length says, which is the size of the
//! buffer, and reports how many it wrote; every bit pattern is a valid group.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// More groups than a process can have (`NGROUPS_MAX`, include/uapi/linux/limits.h).
const MOST_GROUPS: usize = 65_536;
/// More than most processes have.
const USUAL_GROUPS: usize = 64;

/// The supplementary groups that the process had when it connected.
///
/// # Errors
/// What the system returned.
pub fn groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    match at_most(USUAL_GROUPS, &socket) {
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => at_most(MOST_GROUPS, &socket),
        result => result,
    }
}

fn at_most(count: usize, socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; count];
    let mut length = libc::socklen_t::try_from(size_of_val(groups.as_slice())).unwrap_or(0);
    // SAFETY: see the module's invariant; the descriptor is open as long as `socket` is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(length as usize / size_of::<u32>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_this_process_s_groups() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let mut found = groups(&one).expect("groups");
        let mut own: Vec<u32> = rustix::process::getgroups()
            .expect("groups")
            .into_iter()
            .map(rustix::process::Gid::as_raw)
            .collect();
        found.sort_unstable();
        own.sort_unstable();
        assert_eq!(found, own);
    }
}
