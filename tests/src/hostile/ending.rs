//! Garbage in place of the kernel.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::signal;
use crate::vm::{Method, Vm};

/// Has the guest run garbage. The VM ends by its own triple fault, or goes on and is stopped.
pub(super) fn garbage(mut vm: Vm) -> Result<&'static str> {
    const TRIPLE_FAULT: i32 = 11;
    vm.tell("garbage")?;
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        if let Some(code) = vm.ended()? {
            ensure!(code == TRIPLE_FAULT, "exit code {code}: {}", vm.errors());
            return Ok("a triple fault");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let (status, answer) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(status == 200, "{status}: {answer:#}");
    signal::send(vm.pid(), "TERM")?;
    let code = vm.wait()?;
    ensure!(code == 0, "exit code {code}: {}", vm.errors());
    Ok("it went on until it was stopped")
}
