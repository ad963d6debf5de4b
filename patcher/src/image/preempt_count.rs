//! The preempt count: how a kernel counts interrupts and held spinlocks in it, read from its code (Linux
//! include/linux/preempt.h, arch/x86/include/asm/preempt.h).

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;

/// How many instructions of a function are looked at. The count is raised first of all.
const MOST: usize = 12;
/// Those take at most so many bytes.
const BYTES: usize = 64;
/// `struct pcpu_hot`, `preempt_count`: behind the current task (Linux 6.2 to 6.14,
/// arch/x86/include/asm/current.h).
pub const IN_PCPU_HOT: u64 = 8;

/// Where the bits of the preempt count are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountLayout {
    /// Four bytes: 8 bits for preemption, 8 for softirqs, 4 for hardirqs, 4 for NMIs; bit 31 is set if no
    /// reschedule is needed.
    Narrow,
    /// Eight bytes (since 7.3): 8 bits for preemption, 8 for softirqs, 8 for disabled hardirqs, 4 for
    /// hardirqs, 4 for NMIs. Whether a reschedule is needed is said in the upper half.
    Wide,
}

/// An instruction that adds to the preempt count.
pub(super) struct Raise {
    /// How many bytes the count has.
    size: usize,
    /// What it adds, if that is a constant.
    pub(super) by: Option<u64>,
}

impl CountLayout {
    /// As `irq_enter_rcu` counts an interrupt.
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols) -> Option<Self> {
        let raise = raised_by(vmlinux, symbols, "irq_enter_rcu")?;
        match (raise.size, raise.by?) {
            (4, 0x1_0000) => Some(Self::Narrow),
            (8, 0x100_0000) => Some(Self::Wide),
            _ => None,
        }
    }

    /// How many bytes the count has.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Narrow => 4,
            Self::Wide => 8,
        }
    }

    /// A count in the layout [`CountLayout::Narrow`], in which conditions are checked.
    #[must_use]
    pub fn narrow(self, count: u64) -> u32 {
        let [preemption, softirqs, disabled, interrupts, ..] = count.to_le_bytes();
        match self {
            Self::Narrow => u32::from_le_bytes([preemption, softirqs, disabled, interrupts]),
            Self::Wide => {
                let moved = u32::from(interrupts) << 16 | u32::from(softirqs) << 8 | u32::from(preemption);
                // Disabled hardirqs are no interrupt, but no preemption either.
                moved | if disabled == 0 { 0 } else { 1 << 24 }
            }
        }
    }
}

/// The instruction at the beginning of a function that adds to the preempt count.
pub(super) fn raised_by(vmlinux: &Vmlinux<'_>, symbols: &Symbols, name: &str) -> Option<Raise> {
    let hot = || symbols.only("pcpu_hot").and_then(|hot| hot.0.checked_add(IN_PCPU_HOT)).map(Gva);
    let count = symbols.only("__preempt_count").or_else(hot)?;
    let entry = symbols.only(name)?;
    let code = vmlinux.bytes(entry, BYTES)?;
    let is_count = |insn: &Instruction| {
        let at = if insn.is_ip_rel_memory_operand() {
            Some(insn.ip_rel_memory_address())
        } else {
            let bare = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
            bare.then(|| insn.memory_displacement64())
        };
        insn.op0_kind() == OpKind::Memory && insn.segment_prefix() == Register::GS && at == Some(count.0)
    };
    let mut decoder = Decoder::with_ip(64, code, entry.0, DecoderOptions::NONE);
    let insns = std::iter::from_fn(|| decoder.can_decode().then(|| decoder.decode()));
    let insn = insns
        .take(MOST)
        .take_while(|insn| !insn.is_invalid())
        .find(|insn| matches!(insn.mnemonic(), Mnemonic::Inc | Mnemonic::Add) && is_count(insn))?;
    let by = if insn.mnemonic() == Mnemonic::Inc { Some(1) } else { insn.try_immediate(1).ok() };
    Some(Raise { size: insn.memory_size().size(), by })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_either_layout_say_the_same() {
        assert_eq!(CountLayout::Narrow.narrow(0x8000_0001), 0x8000_0001);
        let wide = |count| CountLayout::Wide.narrow(count);
        assert_eq!(wide(1 << 63), 0, "preemptible");
        assert_eq!(wide(1 << 63 | 1), 1, "a spinlock");
        assert_eq!(wide(0x100), 0x100, "a softirq");
        assert_eq!(wide(0x100_0000), 0x1_0000, "an interrupt");
        assert_eq!(wide(0x1000_0000), 0x10_0000, "an NMI");
        assert_eq!(wide(0x1_0000) & 0xff_ffff, 0, "disabled interrupts are none");
        assert_ne!(wide(0x1_0000), 0, "but no preemption either");
    }
}
