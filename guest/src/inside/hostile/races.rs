//! What a monitor looks at after a store has stopped a CPU changes meanwhile: the protection of
//! the page, the page, the instruction.
//!
//! Unsafe code: stores whose page may be gone, and code that changes. Invariant: they are executed
//! by [`caught!`]; what lies where they write is put back.
#![allow(unsafe_code)]

use std::hint;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use super::signals::caught;
use super::stage::{NOP, PAGE, SLOT, Slot, Stage};

const VALUE: u8 = 0x91;

/// Stores a byte; `false` if that is not allowed.
fn store(to: usize, byte: u8) -> bool {
    // SAFETY: `to` is in a slot, or unmapped, or read-only.
    let (signals, _) = unsafe { caught!(["mov [rdi], al"] in("rdi") to, in("al") byte) };
    signals == 0
}

fn protect(at: usize, protection: i32) -> io::Result<()> {
    // SAFETY: a mapping of this attack's own; who stores there expects faults.
    let failed = unsafe { libc::mprotect(at as *mut libc::c_void, PAGE, protection) != 0 };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Once `mprotect` has returned, no other CPU writes there.
pub(super) fn protection(stage: &Arc<Stage>) -> io::Result<()> {
    static NEXT: AtomicU8 = AtomicU8::new(0);
    let mapping = stage.map(0, libc::PROT_READ | libc::PROT_WRITE, 0)?;
    let offset = stage.offset(Slot::Races);
    let act = move |_: &Stage| {
        store(mapping + offset, NOP + NEXT.fetch_add(1, Ordering::Relaxed) % 8);
    };
    stage.on_every_cpu(act, || {
        while stage.goes_on() {
            protect(mapping, libc::PROT_READ)?;
            let before = stage.read(offset);
            for _ in 0..2000 {
                hint::spin_loop();
            }
            let after = stage.read(offset);
            stage.expect(before == after, || format!("{before:#x} became {after:#x} while it was read-only"));
            protect(mapping, libc::PROT_READ | libc::PROT_WRITE)?;
            stage.done();
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })?;
    stage.clear(Slot::Races);
    Ok(())
}

/// A store across two pages of which the second is read-only writes nothing.
pub(super) fn straddle(stage: &Arc<Stage>) -> io::Result<()> {
    // Room for both first.
    let room = {
        // SAFETY: a mapping at an address that the kernel chooses.
        let address = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_NONE, flags, -1, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        address as usize
    };
    stage.map(room, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED)?;
    stage.map(room + PAGE, libc::PROT_READ, libc::MAP_FIXED)?;
    let around = || [PAGE - 4, PAGE - 3, PAGE - 2, PAGE - 1, 0, 1, 2, 3].map(|at| stage.read(at));
    while stage.goes_on() {
        let before = around();
        // The same bytes, but for one bit each: whatever is executed there is not, for so short a time.
        let changed = u64::from_le_bytes(before.map(|byte| byte ^ 1));
        // SAFETY: it is put back below.
        let (signals, _) =
            unsafe { caught!(["mov [rdi], rax"] in("rdi") room + PAGE - 4, in("rax") changed) };
        let after = around();
        for (at, byte) in [PAGE - 4, PAGE - 3, PAGE - 2, PAGE - 1, 0, 1, 2, 3].into_iter().zip(before) {
            if stage.read(at) != byte {
                stage.put(at, byte);
            }
        }
        stage.expect(signals == 1 && before == after, || {
            format!("{signals} signals, {before:x?} became {after:x?}")
        });
        stage.done();
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// An instruction becomes another while it is executed: one that stores to the slot of this
/// attack, or one that stores where only the kernel may, or to a page that is read-only.
pub(super) fn swap(stage: &Arc<Stage>) -> io::Result<()> {
    /// `mov [rdi], al; ret` and `mov [rsi], al; ret`: they differ in the second byte.
    const CODE: [u8; 3] = [0x88, 0x07, 0xc3];
    const OTHER: u8 = 0x06;
    // SAFETY: a mapping at an address that the kernel chooses; the code is written before it is called.
    let code = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let address = libc::mmap(std::ptr::null_mut(), PAGE, all, flags, -1, 0);
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        std::ptr::copy_nonoverlapping(CODE.as_ptr(), address.cast::<u8>(), CODE.len());
        address as usize
    };
    let read_only = stage.map(0, libc::PROT_READ, 0)? + stage.offset(Slot::Nobody);
    let act = move |stage: &Stage| {
        let mine = stage.slot(Slot::Races) + SLOT / 2;
        let kernels = usize::try_from(stage.in_kernel(Slot::Nobody)).unwrap_or(0);
        for other in [kernels, read_only] {
            // SAFETY: what is called stores one byte; a fault leaves it by the label, with its return
            // address still on the stack, which the saved pointer takes away.
            let _ = unsafe {
                caught!(["mov rdx, rsp", "call rcx", "77: mov rsp, rdx", "lea r14, [rip]"]
                    in("rcx") code, in("rdi") mine, in("rsi") other, in("al") VALUE, out("rdx") _)
            };
        }
        stage.done();
    };
    stage.on_every_cpu(act, || {
        while stage.goes_on() {
            for byte in [OTHER, CODE[1]] {
                // SAFETY: the second byte of the code; either value is whole code.
                unsafe { std::ptr::write_volatile((code + 1) as *mut u8, byte) };
                for _ in 0..50 {
                    hint::spin_loop();
                }
            }
            if !stage.is(Slot::Nobody, NOP, SLOT) {
                stage.expect(false, || "a store of ring 3 went where only the kernel may write".into());
                stage.clear(Slot::Nobody);
            }
        }
        Ok(())
    })?;
    stage.put(stage.offset(Slot::Races) + SLOT / 2, NOP);
    Ok(())
}

/// The page goes and comes while it is written to.
pub(super) fn remap(stage: &Arc<Stage>) -> io::Result<()> {
    let mapping = stage.map(0, libc::PROT_READ | libc::PROT_WRITE, 0)?;
    let at = stage.offset(Slot::Races) + SLOT / 4;
    let act = move |stage: &Stage| {
        store(mapping + at, NOP);
        stage.done();
    };
    stage.on_every_cpu(act, || {
        while stage.goes_on() {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let both = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: in place of a mapping of this attack's own; who stores there expects faults.
            unsafe { libc::mmap(mapping as *mut libc::c_void, PAGE, both, flags, -1, 0) };
            stage.map(mapping, both, libc::MAP_FIXED)?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })
}
