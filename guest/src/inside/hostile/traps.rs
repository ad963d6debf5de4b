//! Breakpoints, single steps and their shadows, while breakpoints are intercepted.
//!
//! Unsafe code: instructions that raise #BP and #DB. Invariant: they are executed by [`caught!`].
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::signals::caught;
use super::stage::{Slot, Stage};

const VALUE: u8 = 0x91;

/// Executes a breakpoint in one of its forms; returns whether one signal came, behind it.
macro_rules! breakpoint {
    ($($code:literal),+) => {{
        let behind: u64;
        // SAFETY: a breakpoint changes nothing.
        let (signals, at) = unsafe {
            caught!(["lea {behind}, [rip + 78f]", $($code,)+ "78: nop"] behind = out(reg) behind, out("rax") _)
        };
        (signals, at == behind)
    }};
}

/// A storm of them, on every CPU.
pub(super) fn breakpoints(stage: &Arc<Stage>) -> io::Result<()> {
    let act = |stage: &Stage| {
        for (name, seen) in [
            ("int3", breakpoint!("int3")),
            ("rep int3", breakpoint!(".byte 0xf3, 0xcc")),
            ("int3 with two prefixes", breakpoint!(".byte 0x66, 0x48, 0xcc")),
            ("int 3", breakpoint!(".byte 0xcd, 3")),
        ] {
            stage.expect(seen == (1, true), || format!("{name}: {} signals, behind it: {}", seen.0, seen.1));
            stage.done();
        }
    };
    stage.on_every_cpu(act, || Ok(()))
}

/// How many steps three instructions take, of which one stores.
fn steps_over(to: *mut u8) -> i64 {
    // SAFETY: the store goes to memory of this attack's own.
    let (signals, _) = unsafe {
        caught!(["pushfq", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "mov [rdi], al", "nop", "popfq"]
            in("rdi") to, in("al") VALUE)
    };
    signals
}

/// A step over a store to text is one step.
pub(super) fn steps(stage: &Arc<Stage>) -> io::Result<()> {
    let mut elsewhere = 0;
    while stage.goes_on() {
        // The last byte of the slot of races, which use the first ones.
        let at = stage.slot(Slot::Nobody) - 1;
        let [text, data] = [at as *mut u8, &raw mut elsewhere].map(steps_over);
        stage.expect(text == data, || format!("{text} steps over text, {data} elsewhere"));
        stage.put(stage.offset(Slot::Nobody) - 1, 0x90);
        stage.done();
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A breakpoint right behind a load of SS, which holds back the step that is due (SDM volume 3, 6.8.3).
pub(super) fn shadows(stage: &Arc<Stage>) -> io::Result<()> {
    let act = |stage: &Stage| {
        let plain = breakpoint!("mov eax, ss", "mov ss, eax", "int3");
        stage.expect(plain == (1, true), || format!("mov ss; int3: {} signals", plain.0));
        let stepped = breakpoint!(
            "mov eax, ss",
            "pushfq",
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            "mov ss, eax",
            "int3",
            "popfq"
        );
        stage.expect(stepped.0 >= 1, || "mov ss; int3 with TF: no signal".into());
        stage.done();
        thread::sleep(Duration::from_millis(1));
    };
    stage.on_every_cpu(act, || Ok(()))
}
