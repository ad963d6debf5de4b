//! Another kernel takes the place of the guest's, with patches applied.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guard::{events, eventually, key, key_plan, pages_and_writes, summary};
use crate::lab::Lab;
use crate::memory::read_guest_memory;
use crate::oracle::differences;
use crate::patches::redirect_plan;
use crate::vm::{Method, Setup, Vm, write_initramfs};

/// Where a guest has the kernels that it starts.
const KERNEL: &str = "another/kernel";
const INITRD: &str = "another/initrd";

/// A VM that has kernels to start, one after the other.
fn start(lab: &Lab, kernels: &[&Path], command_line: &str) -> Result<Vm> {
    let folder = tempfile::tempdir()?;
    let mut initrd = lab.initrd.clone();
    let files = |kernel: &Path, initrd: &Path| {
        vec![(KERNEL.to_owned(), kernel.to_owned()), (INITRD.to_owned(), initrd.to_owned())]
    };
    let (first, later) = kernels.split_first().context("a kernel")?;
    for (number, kernel) in later.iter().enumerate().rev() {
        let with_kernel = folder.path().join(number.to_string());
        write_initramfs(lab, &files(kernel, &initrd), &with_kernel)?;
        initrd = with_kernel;
    }
    let setup = Setup {
        kernel: Some(lab.kernel.clone()),
        memory_mib: 768,
        command_line: command_line.to_owned(),
        files: files(first, &initrd),
        ..Setup::cpus(4)
    };
    Vm::start(lab, &setup)
}

/// Where the kernel's code is in the guest's memory, as the guest says.
fn place(vm: &mut Vm) -> Result<(u64, usize)> {
    let (lines, _) = vm.ask("cat /proc/iomem")?;
    let line = lines.iter().find_map(|line| line.trim().strip_suffix(" : Kernel code"));
    let (start, last) = line.and_then(|range| range.split_once('-')).with_context(|| lines.join("\n"))?;
    let (start, last) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(last, 16)?);
    Ok((start, usize::try_from(last + 1 - start)?))
}

fn command(kind: &str, more: &str) -> String {
    format!("{kind} /{KERNEL} /{INITRD} {more}")
}

/// Applies a patch that is guarded and two that are not, one of them with copies in the arena.
fn patch(vm: &mut Vm, policy: &str) -> Result<()> {
    vm.hammer("getppid", 0, 1)?;
    vm.apply(&key_plan(Some(policy)))?;
    vm.apply(&redirect_plan("flip", Some("breakpoint")))?;
    vm.apply(&vm.arguments_plan("copied", "bypass", true)?)?;
    vm.expect_all(true)?;
    ensure!(pages_and_writes(vm)?.0 > 0, "no page is guarded");
    Ok(())
}

/// All patches are lost, each is told so once, and nothing of theirs is left.
fn all_lost(vm: &mut Vm) -> Result<()> {
    for name in ["key", "flip", "copied"] {
        let found = summary(vm, name)?;
        ensure!(found["state"] == "lost", "{found:#}");
        let told = events(vm, "patch_lost")?;
        ensure!(told.iter().filter(|event| event["patch"] == name).count() == 1, "{told:#?}");
        let refused = vm.request(Method::POST, &format!("/patches/{name}/revert"), b"")?.1;
        ensure!(refused["refusals"][0]["code"] == "not_applied", "{refused:#}");
    }
    println!("{}", events(vm, "patch_lost")?[0]["what"]);
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(info["patches"] == 0 && info["arena"].is_null() && info["guard"]["pages"] == 0, "{info:#}");
    Ok(())
}

/// The kernel runs, unpatched, and can be patched.
fn can_be_patched(vm: &mut Vm) -> Result<()> {
    ensure!(key(vm)? == "0", "the key is on");
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(false)?;
    for strategy in ["breakpoint", "bypass", "hold", "inspect"] {
        vm.apply(&redirect_plan("flip", Some(strategy))).context("in the new kernel")?;
        vm.expect_all(true)?;
        vm.revert("flip")?;
        vm.expect_all(false)?;
    }
    vm.apply(&key_plan(Some("rebase")))?;
    ensure!(key(vm)? == "1", "the key is off");
    vm.revert("key")?;
    vm.expect_no_kernel_errors()
}

/// Every way there is.
///
/// # Errors
/// Anything unexpected.
pub fn all(lab: &Lab) -> Result<()> {
    by_the_same(lab, "rebase", "pti=on").context("by itself, elsewhere")?;
    in_place(lab, "deny").context("by itself, in place")?;
    by_another(lab, "deny", "").context("by another")?;
    by_another(lab, "rebase", "nokaslr").context("by another, without KASLR")?;
    by_the_crash_kernel(lab).context("by the crash kernel")
}

/// The same kernel at another place: it is found again, and can be patched.
///
/// # Errors
/// Anything unexpected.
pub fn by_the_same(lab: &Lab, policy: &str, line: &str) -> Result<()> {
    let mut vm = start(lab, &[&lab.kernel], line)?;
    patch(&mut vm, policy)?;
    // What is protected ahead is let go of, too.
    eventually(&mut vm, |vm| Ok(info(vm)?["guard"]["pages_ahead"].as_u64() > Some(0)))?;
    vm.replace_kernel(&command("kexec", ""))?;
    all_lost(&mut vm)?;
    ensure!(info(&vm)?["kernel"]["release"].is_string(), "the kernel was not found: {:#}", info(&vm)?);
    can_be_patched(&mut vm)?;
    // And once more.
    patch(&mut vm, policy)?;
    vm.power_off()
}

/// The same kernel at the same place, in memory and without KASLR: its text is that of a twin that was never
/// patched. (Linux puts a kernel as high as it can, so the second that is started replaces the first.)
///
/// # Errors
/// Anything unexpected.
pub fn in_place(lab: &Lab, policy: &str) -> Result<()> {
    let mut vm = start(lab, &[&lab.kernel, &lab.kernel], "nokaslr")?;
    vm.replace_kernel(&command("kexec", ""))?;
    let before = place(&mut vm)?;
    patch(&mut vm, policy)?;
    vm.replace_kernel(&command("kexec", ""))?;
    let (start_at, length) = place(&mut vm)?;
    ensure!((start_at, length) == before, "the new kernel is at {start_at:#x}, not in place of {before:x?}");
    all_lost(&mut vm)?;
    let text = read_guest_memory(&vm, start_at, length)?;
    let mut twin = start(lab, &[&lab.kernel], "nokaslr")?;
    twin.replace_kernel(&command("kexec", ""))?;
    ensure!(place(&mut twin)? == before, "the twin is elsewhere");
    let differ = differences(&text, &read_guest_memory(&twin, start_at, length)?);
    ensure!(
        differ.is_empty(),
        "{} bytes of text are not a twin's, the first at {:#x}",
        differ.len(),
        differ[0]
    );
    twin.power_off()?;
    can_be_patched(&mut vm)?;
    vm.power_off()
}

/// Another kernel: plans are refused, and say why.
///
/// # Errors
/// Anything unexpected.
pub fn by_another(lab: &Lab, policy: &str, line: &str) -> Result<()> {
    let mut vm = start(lab, &[&lab.later_kernel], line)?;
    patch(&mut vm, policy)?;
    let greeting = vm.replace_kernel(&command("kexec", ""))?;
    ensure!(greeting.contains("release=6.12"), "{greeting}");
    all_lost(&mut vm)?;
    refused(&mut vm)?;
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// The crash kernel, in memory that the kernel before reserved for it: its CPUs still stand in that kernel.
///
/// # Errors
/// Anything unexpected.
pub fn by_the_crash_kernel(lab: &Lab) -> Result<()> {
    let mut vm = start(lab, &[&lab.kernel], "crashkernel=320M")?;
    patch(&mut vm, "deny")?;
    vm.replace_kernel(&command("crash", "nr_cpus=1"))?;
    all_lost(&mut vm)?;
    refused(&mut vm)?;
    vm.power_off()
}

fn refused(vm: &mut Vm) -> Result<()> {
    let (_, answer) =
        vm.request(Method::POST, "/patches", redirect_plan("flip", Some("hold")).to_string().as_bytes())?;
    let refusal = &answer["refusals"][0];
    ensure!(refusal["code"] == "guest_not_ready", "{answer:#}");
    println!("{}", refusal["message"]);
    Ok(())
}

fn info(vm: &Vm) -> Result<Value> {
    Ok(vm.request(Method::GET, "/vm", b"")?.1)
}
