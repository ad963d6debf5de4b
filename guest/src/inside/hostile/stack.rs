//! A stack that lies in text: pushes, calls, and what the kernel does when it is interrupted there.
//!
//! Unsafe code: the stack pointer leaves the stack for some instructions. Invariant: it is back
//! before anything else is done, and signals have a stack of their own.
#![allow(unsafe_code)]

use std::arch::asm;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::stage::{SLOT, Slot, Stage};

const WORD: u64 = 0x9191_9191_9191_9191;

pub(super) fn run(stage: &Arc<Stage>) -> io::Result<()> {
    while stage.goes_on() {
        let (popped, returned): (u64, u64);
        // SAFETY: the stack is the upper half of a slot; it is left before the end.
        unsafe {
            asm!(
                "xchg rsp, {stack}",
                "push {word}",
                "call 77f",
                "77: pop {returned}",
                "enter 8, 0",
                "leave",
                "pop {word}",
                "xchg rsp, {stack}",
                "lea {stack}, [rip + 77b]",
                "sub {returned}, {stack}",
                stack = inout(reg) stage.slot(Slot::Stack) + SLOT => _,
                word = inout(reg) WORD => popped,
                returned = out(reg) returned,
            );
        }
        stage.expect(popped == WORD && returned == 0, || {
            format!("popped {popped:#x}, returned to {returned:#x}")
        });
        stage.clear(Slot::Stack);
        stage.done();
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
