//! What is given for a kernel and is none, is damaged, or can't be booted: `vmm kernel info` and
//! `vmm --kernel` say so, in the same words.

// It has more than is used here.
#[allow(dead_code)]
#[path = "../../patcher/tests/properties/miniature.rs"]
mod miniature;

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the command says on standard error, and its exit code.
fn vmm(arguments: &[&str], kernel: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    let output = command.args(arguments).arg("--kernel").arg(kernel).output().expect("it runs");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A folder of its own that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmm-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder");
        Self(path)
    }

    fn file(&self, bytes: &[u8]) -> PathBuf {
        let path = self.0.join("kernel");
        std::fs::write(&path, bytes).expect("it is written");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A folder in /tmp that can't be removed is no failure.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `file` with these bytes at an offset.
fn with(file: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn what_is_no_kernel_is_named_by_both_commands() {
    let folder = Folder::new("no-kernels");
    let vmlinux = miniature::vmlinux();
    let bzimage = miniature::bzimage(&vmlinux);
    let own = std::fs::read(std::env::current_exe().expect("a path")).expect("a program");
    let efi = with(&with(b"MZ", 0x3c, &[0x40]), 0x40, b"PE\0\0\x64\x86");
    let efi = with(&efi, 0x80, &[0]);
    let (whole, half) = (vmlinux.len(), vmlinux.len() / 2);
    let cases: [(Vec<u8>, &str); 18] = [
        (vec![], "the file is empty"),
        (b"#!/bin/sh\necho hello\n".to_vec(), "neither a bzImage (no HdrS at 0x202), nor an ELF file"),
        (b"070701000002D1".to_vec(), "--initrd takes it"),
        (with(&[], 56, b"ARMd"), "an arm64 kernel (Image)"),
        (with(&[], 0x1fe, &[0x55, 0xaa]), "a boot sector"),
        (efi, "an EFI program, no kernel"),
        (own.clone(), "a shared library or a position-independent program, no kernel"),
        (with(&own, 16, &[1]), "a kernel module (.ko)"),
        (with(&vmlinux, 18, &[183]), "an ELF file for arm64"),
        (with(&vmlinux, 4, &[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3]), "a 32-bit x86 ELF file"),
        (with(&vmlinux, 80, &[0, 0x10, 0x40, 0, 0, 0, 0, 0]), "its code is linked at 0x401000"),
        (vmlinux[..half].to_vec(), &format!("it has {half} bytes, and its headers describe {whole}")),
        (bzimage[..half].to_vec(), &format!("the bzImage is truncated: it has {half} bytes")),
        (bzimage[..0x210].to_vec(), "it has 528 bytes, and its headers describe 592"),
        (with(&bzimage, 0x211, &[0]), "a zImage"),
        (with(&bzimage, 0x236, &[0]), "a 32-bit x86 kernel"),
        (with(&bzimage, 0x24c, &[0; 4]), "memtest86+ and other programs are made so"),
        (b"\x28\xb5\x2f\xfd\x04\x00".to_vec(), "decompressing the kernel (zstd)"),
    ];
    for (bytes, says) in cases {
        let kernel = folder.file(&bytes);
        for command in [&["kernel", "info"][..], &[]] {
            let (code, error) = vmm(command, &kernel);
            assert!(code == Some(2) && error.contains(says), "{command:?}, {says:?}: {code:?} {error}");
            assert!(error.contains(&*kernel.to_string_lossy()), "the file is not named: {error}");
        }
    }
    for command in [&["kernel", "info"][..], &[]] {
        for (path, says) in
            [(&*folder.0, "this is a directory; give a file"), (Path::new("/dev/null"), "empty")]
        {
            let (code, error) = vmm(command, path);
            assert!(code == Some(2) && error.contains(says), "{command:?}, {says:?}: {code:?} {error}");
        }
    }
}

/// The kernel is one, but without names nothing in it can be found.
#[test]
fn a_kernel_without_names_is_told() {
    let folder = Folder::new("nameless");
    let mut vmlinux = miniature::vmlinux();
    vmlinux[64 + 56 + 64..].fill(0xcc);
    let (code, error) = vmm(&["kernel", "info"], &folder.file(&vmlinux));
    assert!(code == Some(2) && error.contains("CONFIG_KALLSYMS"), "{code:?} {error}");
}

#[test]
fn what_can_not_be_placed_is_told() {
    let folder = Folder::new("misplaced");
    let vmlinux = miniature::vmlinux();
    // The physical address of its segment, its size in memory, and the entry.
    for (at, value, says) in [
        (64 + 24, 0x1000_u64, "its entry, 0x1000000, is in none of its segments"),
        (64 + 40, 1 << 40, "the kernel needs 1048592 MiB of memory, the guest has 256 MiB"),
        (24, 0, "its entry, 0x0, is in none of its segments"),
    ] {
        let (code, error) = vmm(&[], &folder.file(&with(&vmlinux, at, &value.to_le_bytes())));
        assert!(code == Some(2) && error.contains(says), "{says:?}: {code:?} {error}");
    }
    let low = with(&with(&vmlinux, 64 + 24, &0x1000_u64.to_le_bytes()), 24, &0x1000_u64.to_le_bytes());
    let (code, error) = vmm(&[], &folder.file(&low));
    assert!(
        code == Some(2) && error.contains("a segment belongs to 0x1000, below 1 MiB"),
        "{code:?} {error}"
    );
}
