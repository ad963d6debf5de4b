//! A function that nothing in the guest uses, replaced by code made for a test.

use anyhow::{Context, Result, ensure};
use patcher::{insn, plan};
use serde_json::{Value, json};

use crate::vm::Vm;

/// The function that is replaced: long, calls nothing, and is used by nothing in the guest.
pub const FUNCTION: &str = "md5_transform";
/// Its first instruction is the tracer's no-operation, which stays.
pub const BEGIN: usize = 5;

/// The name of the patch that replaces it.
pub const PATCH: &str = "test-code";

/// Replaces the function by the patch [`PATCH`], behind its first instruction, with what `code` makes
/// for its address and so many bytes.
///
/// # Errors
/// Anything unexpected.
pub fn replace(vm: &Vm, code: impl FnOnce(u64, usize) -> Result<Vec<u8>>) -> Result<()> {
    let report = vm.apply(&replacement(vm, FUNCTION, BEGIN, code)?)?;
    ensure!(report["strategy"] == "inspect", "{report:#}");
    Ok(())
}

/// The plan by which a function is replaced from `begin` on.
///
/// # Errors
/// Anything unexpected.
pub fn replacement(
    vm: &Vm,
    function: &str,
    begin: usize,
    code: impl FnOnce(u64, usize) -> Result<Vec<u8>>,
) -> Result<Value> {
    let whole = |expect: &str, replace: &str| {
        json!({ "version": 1, "name": PATCH, "deadline_ms": 60_000, "patches": [{
            "at": format!("{function}+{begin:#x}"), "expect": expect, "replace": replace }] })
    };
    // Refusals tell what is there, and then where the function ends.
    let most = plan::MAX_SITE;
    let there = vm.refused("expect_mismatch", &whole(&"00".repeat(most), "90"))?;
    let there = there.rsplit(' ').next().context("bytes")?;
    let end = vm.refused("not_text", &whole(there, "90"))?;
    let end = end.strip_prefix("0x").and_then(|text| text.split(' ').next()).context("an address")?;
    let (start, end) = (vm.address(function)?, u64::from_str_radix(end, 16)?);
    let room = usize::try_from(end - start)? - begin;
    Ok(whole(&there[..2 * room], &insn::hex(&code(start, room)?)))
}
