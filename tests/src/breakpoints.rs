//! Breakpoints of the guest's own, while the monitor intercepts them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::test_function;
use crate::vm::{Method, SCHEDSTATS, Setup, TRACING, Vm, field};

/// Boots with breakpoints intercepted from the first instruction on, and then makes the guest
/// run into so many of its own, in its kernel and in user space, and put some there and take
/// them away all the time, while programs run back to back and NMIs come in. One that is
/// delivered with a wrong address makes the kernel run astray or init crash.
///
/// # Errors
/// Anything unexpected.
pub fn delivered(lab: &Lab, mode: &str, count: usize) -> Result<()> {
    let setup = Setup {
        command_line: "log_buf_len=8M".into(),
        switches: vec!["--breakpoints".into(), mode.into()],
        ..Setup::cpus(4)
    };
    let mut vm = Vm::start(lab, &setup)?;
    let at_boot = own_breakpoints(&vm)?;
    vm.mount_tracing()?;
    vm.ask("write /proc/sys/debug/kprobes-optimization 0")?;
    let offset = field(&vm.ask("probed")?.1, "offset")?;
    let behind = vm.behind_the_tracer("__x64_sys_getppid")?;
    vm.ask(&format!("write {TRACING}/kprobe_events p:own/kernel __x64_sys_getppid+{behind}"))?;
    vm.ask(&format!("write {TRACING}/uprobe_events p:own/user /init:{offset:#x}"))?;
    vm.ask(&format!("write {TRACING}/events/own/enable 1"))?;
    vm.ask("nmis 100")?;
    let mut programs = 0;
    for (place, call, result, file) in [
        ("kernel", "getppid", 0, SCHEDSTATS.to_owned()),
        ("user", "probed", 0x1234_5678, format!("{TRACING}/events/own/user/enable")),
    ] {
        vm.hammer(call, result, result + 1)?;
        vm.ask(&format!("toggle {file} 0 1"))?;
        let (before, mut last) = (own_breakpoints(&vm)?, 0);
        while last < (count / 2) as u64 {
            for _ in 0..20 {
                vm.apply(&unnoticed())?;
                vm.revert("flip")?;
                programs += 2;
            }
            vm.expect_all(false)?;
            vm.expect_no_kernel_errors()?;
            let now = own_breakpoints(&vm)? - before;
            if now == last {
                bail!("{place}: after {now} there are none");
            }
            last = now;
        }
        let toggled = field(&vm.ask("toggle-end")?.1, "written")?;
        println!("{place}: {last} delivered, put and taken {toggled} times");
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
    }
    println!("{at_boot} until init started, {programs} programs");
    vm.power_off()
}

/// How many breakpoints of its own the guest was given.
fn own_breakpoints(vm: &Vm) -> Result<u64> {
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    info["breakpoints"].as_u64().context("a number of breakpoints")
}

/// A plan that changes nothing that anybody would notice.
fn unnoticed() -> Value {
    json!({ "version": 1, "name": "flip", "strategy": "breakpoint", "deadline_ms": 60_000,
        "patches": [{ "at": test_function::FUNCTION, "expect": "0f1f440000", "replace": "0f1f440001" }] })
}

/// The same with KVM's own injection, which must not go well.
///
/// # Errors
/// When it does.
pub fn by_kvm(lab: &Lab, count: usize) -> Result<()> {
    let outcome = delivered(lab, "always-by-kvm", count);
    ensure!(outcome.is_err(), "{count} breakpoints were all right");
    println!("as expected: {:#}", outcome.err().context("an error")?);
    Ok(())
}
