//! Bytes that the plan gives itself.

use crate::insn;
use crate::linux::memory::GuestMemory;
use crate::linux::view::Kernel;
use crate::plan::refusal::Refusal;
use crate::resolve::expand::expansion::{Code, Expansion, verify};

/// Replaces the bytes at `at`; what the replacement leaves over becomes NOPs.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    at: &str,
    expect: &[u8],
    replace: &[u8],
) -> Result<Expansion, Refusal> {
    let at = kernel.address(at)?;
    if replace.len() > expect.len() {
        return Err(Refusal::ReplacementTooLong { replacement: replace.len(), site: expect.len() });
    }
    if insn::count(replace, at).is_none() {
        return Err(Refusal::ReplacementUndecodable { bytes: replace.to_vec() });
    }
    verify(text, at, expect)?;
    let mut new = replace.to_vec();
    new.extend(insn::nops(expect.len() - replace.len()));
    Ok(Expansion::of(Code { at, old: expect.to_vec(), new }))
}
