//! Promise: a stock SMP guest boots, its devices work, and the VM ends with the right exit
//! code however it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use patcher::image::unpack;
use serde_json::json;
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("boot::one_vcpu_and_power_off", |lab| ends(lab, 1, "", "poweroff", 0)),
    ("boot::reset_by_the_keyboard_controller", |lab| ends(lab, 2, "reboot=k", "reboot", 10)),
    ("boot::reset_by_acpi", |lab| ends(lab, 2, "reboot=a", "reboot", 10)),
    ("boot::triple_fault", |lab| ends(lab, 2, "reboot=t", "reboot", 11)),
    ("boot::panic", |lab| ends(lab, 2, "", "write /proc/sysrq-trigger c", 10)),
    ("boot::sixteen_vcpus", |lab| tests::campaigns::every_vcpu(lab, 16)),
    ("boot::memory_above_the_device_gap", large_memory),
    ("boot::signals_end_it_cleanly", signals),
    ("boot::kaslr_on_and_off", kaslr),
    ("boot::vmlinux_plain_and_compressed_by_each_entry", vmlinux),
    ("boot::the_monitors_own_memory_is_small", small),
    ("boot::guest_memory_has_large_pages", large_pages),
    ("boot::short_series", |lab| tests::campaigns::boots(lab, 3)),
];

fn ends(lab: &Lab, cpus: u8, command_line: &str, command: &str, code: i32) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { command_line: command_line.into(), ..Setup::cpus(cpus) })?;
    vm.expect_no_kernel_errors()?;
    let socket = vm.socket();
    let ended = vm.end_by(command)?;
    ensure!(ended == code, "{command}: exit code {ended}, not {code}");
    ensure!(!socket.exists(), "the control socket was left behind");
    Ok(())
}

/// For comparison, Firecracker promises 5 MiB; it does not read the guest's kernel.
fn small(lab: &Lab) -> Result<()> {
    const MOST_KIB: u64 = 20 << 10;
    let mut vm = Vm::start(lab, &Setup::cpus(8))?;
    // So the kernel's image was read.
    vm.apply(&json!({ "version": 1, "name": "key", "patches": [{ "static_key": "sched_schedstats", "enable": true }] }))?;
    let kib = vm.resident_kib()?;
    println!("{kib} KiB");
    ensure!(kib < MOST_KIB, "{kib} KiB are resident");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// Whatever the host's own setting is: the rig's host is as it comes.
fn large_pages(lab: &Lab) -> Result<()> {
    const LEAST_KIB: u64 = 30 << 10;
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")?;
    let kib = vm.large_pages_kib()?;
    println!("{kib} KiB, shmem_enabled: {}", setting.trim());
    ensure!(kib > LEAST_KIB, "{kib} KiB are mapped by large pages, with shmem_enabled {setting}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn large_memory(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { memory_mib: 3200, ..Setup::cpus(1) })?;
    let (lines, _) = vm.ask("cat /proc/meminfo")?;
    let total: u64 = lines
        .iter()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or(0);
    ensure!(total > 3000 << 10, "the guest sees {total} KiB only");
    Ok(())
}

fn signals(lab: &Lab) -> Result<()> {
    const SIGNALS: [&str; 2] = ["INT", "TERM"];
    for (mut vm, signal) in Vm::start_all(lab, &SIGNALS.map(|_| Setup::cpus(2)))?.into_iter().zip(SIGNALS) {
        vm.hammer("getpid", 1, 1)?;
        tests::signal::send(vm.pid(), signal)?;
        let code = vm.wait()?;
        ensure!(code == 0, "SIG{signal}: exit code {code}: {}", vm.errors());
        ensure!(!vm.socket().exists(), "SIG{signal}: the control socket was left behind");
    }
    Ok(())
}

fn kaslr(lab: &Lab) -> Result<()> {
    let mut slides = Vec::new();
    let setup = |command_line: &str| Setup { command_line: command_line.into(), ..Setup::cpus(2) };
    for mut vm in Vm::start_all(lab, &["nokaslr", "", ""].map(setup))? {
        vm.hammer("getppid", 0, 1)?;
        tests::campaigns::flip_by_each_strategy(&mut vm)?;
        let (_, info) = vm.request(Method::GET, "/vm", b"")?;
        slides.push(info["kernel"]["slide"].as_u64());
    }
    ensure!(slides[0] == Some(0), "nokaslr: {slides:?}");
    // A kernel may by chance land where it was linked, but hardly twice.
    ensure!(
        slides[1..].iter().any(|slide| slide.is_some_and(|slide| slide != 0)),
        "never relocated: {slides:?}"
    );
    Ok(())
}

/// What a kernel entered by each protocol says of its loader: what Linux sets itself for PVH without Xen
/// (arch/x86/platform/pvh/enlighten.c), and what the monitor writes to the zero page.
const BY_PVH: &str = "176";
const BY_ZERO_PAGE: &str = "255";

/// The compressed vmlinux in a bzImage as a file of its own: the payload without the size behind it
/// (Linux Documentation/arch/x86/boot.rst).
fn compressed(bzimage: &Path, folder: &Path, method: &str) -> Result<PathBuf> {
    let file = fs::read(bzimage)?;
    let word = |at: usize| {
        let bytes = file.get(at..).and_then(|rest| rest.first_chunk()).context("truncated")?;
        Ok::<_, anyhow::Error>(usize::try_from(u32::from_le_bytes(*bytes))?)
    };
    let start = (usize::from(file[0x1f1]) + 1) * 512 + word(0x248)?;
    let path = folder.join("vmlinux").with_extension(method);
    fs::write(&path, file.get(start..start + word(0x24c)? - 4).context("truncated")?)?;
    Ok(path)
}

/// The vmlinux in a bzImage, its note of the PVH entry under another name.
fn without_pvh(bzimage: &Path, folder: &Path) -> Result<PathBuf> {
    const NOTE: &[u8] = b"\x12\0\0\0Xen\0";
    let file = fs::read(bzimage)?;
    let mut elf = unpack(&file)?.into_owned();
    let at = elf.windows(NOTE.len()).position(|bytes| bytes == NOTE).context("no PVH entry")?;
    elf[at + 4] = b'x';
    let path = folder.join("vmlinux");
    fs::write(&path, elf)?;
    Ok(path)
}

/// A vmlinux boots where it is linked, by PVH if it has that entry, else in 64-bit mode, and is patched
/// as any kernel is: before init, under load, by a key.
fn vmlinux(lab: &Lab) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = folder.path();
    let plan = at.join("plan.json");
    fs::write(&plan, redirect_plan("early", None).to_string())?;
    let arguments = vec!["--patch".to_owned(), plan.display().to_string()];
    let kernels = [
        (compressed(&lab.kernel, at, "lz4")?, BY_PVH),
        (without_pvh(&lab.later_kernel, at)?, BY_ZERO_PAGE),
        (compressed(&lab.current_kernel, at, "zst")?, BY_PVH),
    ];
    let setups = kernels.each_ref().map(|(kernel, _)| Setup {
        kernel: Some(kernel.clone()),
        arguments: arguments.clone(),
        ..Setup::cpus(2)
    });
    for (mut vm, (kernel, entry)) in Vm::start_all(lab, &setups)?.into_iter().zip(kernels) {
        entered_and_patched(&mut vm, entry).with_context(|| kernel.display().to_string())?;
        vm.power_off()?;
    }
    Ok(())
}

fn entered_and_patched(vm: &mut Vm, entry: &str) -> Result<()> {
    let (loader, _) = vm.ask("cat /proc/sys/kernel/bootloader_type")?;
    ensure!(loader.iter().any(|line| line.contains(entry)), "entered by {loader:?}, not {entry}");
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(info["kernel"]["slide"] == 0, "it was moved: {info}");
    ensure!(vm.greeting.contains("ppid=1"), "init started unpatched: {}", vm.greeting);
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(true)?;
    vm.revert("early")?;
    vm.expect_all(false)?;
    tests::campaigns::flip_by_each_strategy(vm)?;
    vm.apply(&json!({ "version": 1, "name": "key", "patches": [{ "static_key": "sched_schedstats", "enable": true }] }))?;
    let (now, _) = vm.ask(&format!("cat {}", tests::vm::SCHEDSTATS))?;
    ensure!(now.iter().any(|line| line.contains('1')), "the key is not on: {now:?}");
    vm.revert("key")?;
    vm.expect_no_kernel_errors()
}

/// Runs the monitor to its end; for command lines that it does not accept.
pub(crate) fn run_to_end(lab: &Lab, arguments: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(&lab.vmm).args(arguments).output()?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.code().unwrap_or(-1), text))
}
