//! Code in the guest's kernel that writes to text and is not its patcher.

use anyhow::{Context, Result, ensure};
use patcher::addr::Gva;
use patcher::insn::hex;
use serde_json::{Value, json};

use super::writers::{self, Slot, VALUE};
use super::{events, eventually, guarded, pages_and_writes, summary};
use crate::lab::Lab;
use crate::memory::read_guest_memory;
use crate::oracle::Places;
use crate::test_function::{self, BEGIN, FUNCTION};
use crate::vm::{Setup, Vm};

/// Code in the guest's kernel that writes to text by itself, with every width and kind of
/// instruction: it is done exactly as written, told, and dropped where a patch says so.
///
/// # Errors
/// Anything unexpected.
pub fn unexpected_writers(lab: &Lab, setups: &[Setup]) -> Result<()> {
    let mut across_pages = 0;
    let unmoved = |setup: &Setup| guarded(Setup { command_line: "nokaslr".into(), ..setup.clone() });
    let setups: Vec<Setup> = setups.iter().map(unmoved).collect();
    for (mut vm, setup) in Vm::start_each(lab, &setups)?.into_iter().zip(&setups) {
        let places = Places::new(setup)?;
        let start = vm.address(FUNCTION)?;
        let at = |vm: &Vm, slot: &Slot| {
            read_guest_memory(vm, places.physical(Gva(start + slot.offset as u64)), slot.bytes.len())
        };
        let lead = json!({ "version": 1, "name": "lead", "deadline_ms": 60_000,
            "patches": [{ "redirect": "__x64_sys_getppid", "to": FUNCTION }] });
        let mut slots = Vec::new();
        test_function::replace(&vm, |start, room| {
            let (code, made) = writers::every_width(start, BEGIN, room);
            slots = made;
            Ok(code)
        })?;
        vm.hammer("getppid", 0, 1)?;
        vm.apply(&lead)?;
        vm.expect_all(false)?;
        for slot in &slots {
            let found = at(&vm, slot)?;
            ensure!(found == slot.bytes, "{}: {found:02x?}", slot.name);
        }
        across_pages += slots.iter().filter(|slot| slot.name == "mov, across pages").count();
        let told = events(&vm, "unexpected_write")?;
        let first = told.first().context("nothing was told")?;
        let symbol = first["symbol"].as_str().unwrap_or("");
        ensure!(symbol.starts_with(FUNCTION) && first["task"].is_string(), "{first:#}");
        // A site that it writes to. Another byte of the same kind is put there.
        let ours = VALUE + 4;
        let site = |policy: &str| {
            json!({ "version": 1, "name": "site", "deadline_ms": 60_000, "on_guest_write": policy, "over": [test_function::PATCH],
                "patches": [{ "at": format!("{FUNCTION}+{:#x}", slots[0].offset),
                    "expect": hex(&[VALUE]), "replace": hex(&[ours]) }] })
        };
        vm.apply(&site("deny"))?;
        vm.expect_all(false)?;
        ensure!(at(&vm, &slots[0])? == [ours], "deny: it was written");
        // Of so many writes only some are told.
        let is_site = |event: &Value| event["patch"] == "site";
        eventually(&mut vm, |vm| Ok(events(vm, "unexpected_write")?.iter().any(is_site)))?;
        vm.revert("site")?;
        vm.expect_all(false)?;
        vm.apply(&site("yield"))?;
        eventually(&mut vm, |vm| Ok(summary(vm, "site")?["state"] == "superseded"))?;
        ensure!(at(&vm, &slots[0])? == [VALUE], "yield: it was not written");
        vm.apply(&site("rebase"))?;
        vm.expect_all(false)?;
        vm.revert("lead")?;
        vm.expect_all(false)?;
        eventually(&mut vm, |vm| Ok(at(vm, &slots[0])? == [ours]))?;
        vm.revert("site")?;
        ensure!(at(&vm, &slots[0])? == [VALUE], "rebase: reverted to {:x?}", at(&vm, &slots[0])?);
        // Whatever it wrote is not what the patch put there, so that is in force no more.
        ensure!(
            summary(&vm, test_function::PATCH)?["state"] == "superseded",
            "{:#}",
            summary(&vm, test_function::PATCH)?
        );
        vm.expect_no_kernel_errors()?;

        let pages = pages_and_writes(&vm)?.0;
        let mut slot = None;
        test_function::replace(&vm, |_, room| {
            let (code, made) = writers::unknown(BEGIN, room);
            slot = Some(made);
            Ok(code)
        })?;
        vm.apply(&lead)?;
        vm.expect_all(false)?;
        let slot = slot.context("a slot")?;
        ensure!(at(&vm, &slot)? == slot.bytes, "{}: {:x?}", slot.name, at(&vm, &slot)?);
        ensure!(pages_and_writes(&vm)?.0 == pages - 1, "the page is still guarded");
        let unguarded = events(&vm, "unguarded")?;
        ensure!(unguarded.len() == 1, "{unguarded:#?}");
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    ensure!(across_pages > 0, "no kernel has a page boundary in {FUNCTION}");
    Ok(())
}
