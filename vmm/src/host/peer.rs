//! Who is at the other end of a Unix socket.
//!
//! Unsafe code: `getsockopt` with `SO_PEERGROUPS` (Linux 4.13, net/core/sock.c), for which no crate in use
//! has a safe call, and with `SO_PEERCRED`, whose process number rustix takes for one that is never 0: it is 0
//! for a process of another PID namespace. Invariant: the kernel writes no more bytes than the length says,
//! which is the size of the buffer, and reports how many it wrote; every bit pattern is a valid value.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use serde::Serialize;

/// More groups than a process can have (`NGROUPS_MAX`, include/uapi/linux/limits.h).
const MOST_GROUPS: usize = 65_536;
/// More than most processes have.
const USUAL_GROUPS: usize = 64;

/// The process that connected, as it was then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its number, in the monitor's PID namespace; 0 if it has none there.
    pub pid: u32,
    /// Its program, once [`Namer`](crate::host::namer::Namer) has looked it up, and if it may. A process that
    /// ended meanwhile may have left its number to another.
    pub executable: Option<String>,
}

/// Who is at the other end.
///
/// # Errors
/// What the system returned.
pub fn of(socket: impl AsFd) -> io::Result<Peer> {
    // Process, user, group (`struct ucred`, unix(7)).
    let mut numbers = [0_u32; 3];
    if option(&socket, libc::SO_PEERCRED, &mut numbers)? != size_of_val(&numbers) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let [pid, uid, gid] = numbers;
    Ok(Peer { uid, gid, pid, executable: None })
}

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
    let length = option(socket, libc::SO_PEERGROUPS, &mut groups)?;
    groups.truncate(length / size_of::<u32>());
    Ok(groups)
}

/// Reads an option of a socket; returns how many bytes it has.
fn option(socket: &impl AsFd, name: i32, value: &mut [u32]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(size_of_val(value)).unwrap_or(0);
    // SAFETY: see the module's invariant; the descriptor is open as long as `socket` is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(length as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_this_process() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let peer = of(&one).expect("a peer");
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
    }

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
