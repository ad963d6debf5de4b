//! A BPF program at a function's entry, by which the guest's kernel patches that entry: one
//! that does nothing (Linux `BPF_PROG_TYPE_TRACING`, `BPF_TRACE_FENTRY`).
//!
//! Unsafe code: the `bpf` system call. Invariant: the attributes and what they point to live
//! until it returns, and the kernel writes to none of it.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `bpf` commands (include/uapi/linux/bpf.h).
const PROG_LOAD: i64 = 5;
const RAW_TRACEPOINT_OPEN: i64 = 17;
/// `BPF_PROG_TYPE_TRACING` and `BPF_TRACE_FENTRY`.
const TRACING: u32 = 26;
const FENTRY: u32 = 24;
/// `BPF_MOV64_IMM(BPF_REG_0, 0)`, `BPF_EXIT_INSN()`.
const PROGRAM: [u64; 2] = [0xb7, 0x95];
const LICENSE: &[u8; 4] = b"GPL\0";

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u64; 2],
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
    attach_prog_fd: u64,
}

/// `union bpf_attr` for `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
#[derive(Default)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    padding: u32,
}

/// A program that is attached until this is dropped.
pub struct Fentry {
    _link: OwnedFd,
}

impl Fentry {
    /// Puts a program at the entry of one of the kernel's functions, by any of its names.
    ///
    /// # Errors
    /// What the system said; `NotFound` when the kernel describes none of them.
    pub fn attach(names: &[String]) -> io::Result<Self> {
        let btf = fs::read("/sys/kernel/btf/vmlinux")?;
        let id = names.iter().find_map(|name| function_id(&btf, name)).ok_or(io::ErrorKind::NotFound)?;
        let load = ProgLoad {
            prog_type: TRACING,
            insn_cnt: 2,
            insns: PROGRAM.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
            expected_attach_type: FENTRY,
            attach_btf_id: id,
            ..ProgLoad::default()
        };
        let program = bpf(PROG_LOAD, &load)?;
        let prog_fd = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
        let open = RawTracepointOpen { prog_fd, ..RawTracepointOpen::default() };
        Ok(Self { _link: bpf(RAW_TRACEPOINT_OPEN, &open)? })
    }
}

fn bpf<T>(command: i64, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is a `repr(C)` struct without padding of the size that is told; it
    // and what it points to (constants) outlive the call, and these commands only read them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel just made it, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kinds of types, and how many bytes follow the head of each (`Documentation/bpf/btf.rst`).
const FUNC: u32 = 12;

fn function_id(btf: &[u8], function: &str) -> Option<u32> {
    let word = |at: usize| Some(u32::from_le_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    let offset = |at: usize| usize::try_from(word(at)?).ok();
    let header = offset(4)?;
    let (types, strings) = (header + offset(8)?, header + offset(16)?);
    let end = types + offset(12)?;
    let (mut at, mut id) = (types, 0);
    while at < end {
        id += 1;
        let (name, info) = (strings + offset(at)?, word(at + 4)?);
        let (kind, members) = (info >> 24 & 0x1f, usize::try_from(info & 0xffff).ok()?);
        let text = btf.get(name..)?.strip_prefix(function.as_bytes());
        if kind == FUNC && text.is_some_and(|rest| rest.first() == Some(&0)) {
            return Some(id);
        }
        at += 12
            + match kind {
                // INT, VAR, DECL_TAG
                1 | 14 | 17 => 4,
                // ARRAY
                3 => 12,
                // STRUCT, UNION, DATASEC, ENUM64
                4 | 5 | 15 | 19 => 12 * members,
                // ENUM, FUNC_PROTO
                6 | 13 => 8 * members,
                _ => 0,
            };
    }
    None
}
