//! The file that guest RAM is in: where possible one that has large pages whatever the host's setting for files in
//! memory is.
//!
//! A memfd has large pages only if `/sys/kernel/mm/transparent_hugepage/shmem_enabled` allows them; on a host as it
//! comes that says `never` (Linux, Documentation/admin-guide/mm/transhuge.rst). A tmpfs goes by its own option
//! `huge=` (tmpfs(5)) instead. So RAM is the only file of a tmpfs of its own, which is mounted nowhere and ends with
//! it. That needs `CAP_SYS_ADMIN` and `fsmount` (Linux 5.2); without them it is a memfd.

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// How the file is called in `/proc/PID/maps`.
const NAME: &CStr = c"guest-ram";
/// Size of a large page, in bytes.
const LARGE_PAGE: u64 = 2 << 20;

/// What a file's pages go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// By `madvise`: large where a mapping asks for them.
    Asked,
    /// By the host's setting for files in memory, `shmem_enabled`.
    HostSetting,
}

impl fmt::Display for Pages {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::Asked => "large ones, in a tmpfs of its own",
            Self::HostSetting => "as shmem_enabled says, in a memfd",
        })
    }
}

/// A file of so many zeroed bytes, whose memory is given back when it is closed and unmapped.
///
/// # Errors
/// When there is neither a tmpfs nor a memfd for it, the error for the memfd.
pub fn zeroed(bytes: u64) -> io::Result<(File, Pages)> {
    let (file, pages) = match in_tmpfs(bytes) {
        Ok(file) => (file, Pages::Asked),
        Err(_) => (memfd_create(NAME, MemfdFlags::CLOEXEC)?.into(), Pages::HostSetting),
    };
    file.set_len(bytes)?;
    Ok((file, pages))
}

fn in_tmpfs(bytes: u64) -> io::Result<File> {
    let tmpfs = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, c"huge", c"advise")?;
    // The default is half of the host's memory. The last page may be a large one.
    fsconfig_set_string(&tmpfs, c"size", bytes.next_multiple_of(LARGE_PAGE).to_string())?;
    fsconfig_set_string(&tmpfs, c"mode", c"0700")?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    Ok(openat(&root, NAME, flags, Mode::RUSR | Mode::WUSR)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_privilege_it_is_a_memfd_and_with_it_a_file_that_has_large_pages() {
        let (file, pages) = zeroed(3 * LARGE_PAGE + 1).expect("a file");
        assert_eq!(file.metadata().expect("its status").len(), 3 * LARGE_PAGE + 1);
        let is_privileged = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).is_ok();
        assert_eq!(pages == Pages::Asked, is_privileged, "{pages}");
    }
}
