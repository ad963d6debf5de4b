//! A static key, which switches instructions between NOP and jump (Linux
//! include/linux/jump_label.h, arch/x86/kernel/jump_label.c).

use crate::image::tables::JumpEntry;
use crate::insn::{self, jmp_rel8, jmp_rel32};
use crate::linux::Kernel;
use crate::linux::memory::{GuestMemory, read, read_u32};
use crate::plan::refusal::Refusal;
use crate::resolve::expand::expansion::{Code, Datum, Expansion, verify};

/// Makes the key true or false, as `static_key_enable` and `static_key_disable` do: every jump and the
/// count. The guest can switch the key again afterwards.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    name: &str,
    enable: bool,
) -> Result<Expansion, Refusal> {
    let key = kernel.address(name)?;
    kernel.modules.none_is_coming(name)?;
    let entries: Vec<JumpEntry> = kernel.jump_entries()?.filter(|entry| entry.key == key).collect();
    if entries.is_empty() {
        return Err(Refusal::UnknownStaticKey { name: name.to_owned() });
    }
    let count = read_u32(text, key)?;
    let busy = |why: String| Refusal::Busy { name: name.to_owned(), why };
    let new = match (count, enable) {
        (0, true) => 1_u32,
        (1, false) => 0,
        (0, false) | (1.., true) if count <= i32::MAX.unsigned_abs() => {
            return Err(Refusal::NothingToDo { at: key });
        }
        (2.., false) if count <= i32::MAX.unsigned_abs() => {
            return Err(busy(format!(
                "the guest counts {count} users of it, each of which will decrement the count"
            )));
        }
        _ => return Err(busy("the guest is changing it".into())),
    };
    let mut code = Vec::new();
    for entry in entries.iter().filter(|entry| !kernel.is_init(entry.code)) {
        code.push(switch(text, entry, enable)?);
    }
    let data = vec![Datum { at: key, old: count.to_le_bytes().to_vec(), new: new.to_le_bytes().to_vec() }];
    Ok(Expansion { code, data, ..Expansion::default() })
}

fn switch(text: &dyn GuestMemory, entry: &JumpEntry, enable: bool) -> Result<Code, Refusal> {
    // The kernel's build chose the length; the first byte tells which.
    let short = matches!(read(text, entry.code, 1)?[..], [0xeb | 0x66]);
    let form = |on: bool| {
        let jump = if short {
            jmp_rel8(entry.code, entry.target).map(Vec::from)
        } else {
            jmp_rel32(entry.code, entry.target).map(Vec::from)
        };
        let jump = jump.ok_or(Refusal::OutOfReach { at: entry.code, to: entry.target })?;
        Ok(if on != entry.branch { jump } else { insn::nops(jump.len()) })
    };
    let (old, new) = (form(!enable)?, form(enable)?);
    verify(text, entry.code, &old)?;
    Ok(Code { at: entry.code, old, new })
}
