//! Line numbers as constants in code. A change of the source moves those behind it, and `__LINE__` with them.
//!
//! Only calls that are known to take one count: any other constant that differs is a change.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Register};

use crate::object::normal::{Normal, Target};

/// Functions that take a line number, and the register that it is in (ext4's and jbd2's errors and handles,
/// include/linux/kernel.h, include/linux/lockdep.h, include/linux/rcupdate.h).
const TAKE_A_LINE: [(&str, Register); 25] = [
    ("__might_sleep", Register::ESI),
    ("__might_resched", Register::ESI),
    ("__might_fault", Register::ESI),
    ("lockdep_rcu_suspicious", Register::ESI),
    ("__ext4_error", Register::EDX),
    ("__ext4_error_inode", Register::EDX),
    ("__ext4_error_file", Register::EDX),
    ("__ext4_std_error", Register::EDX),
    ("__ext4_warning", Register::EDX),
    ("__ext4_warning_inode", Register::EDX),
    ("__ext4_grp_locked_error", Register::ESI),
    ("__ext4_journal_start_sb", Register::ESI),
    // From 6.3 on.
    ("__ext4_journal_start_sb", Register::EDX),
    ("__ext4_journal_start_reserved", Register::ESI),
    ("__ext4_journal_stop", Register::ESI),
    ("__ext4_journal_get_write_access", Register::ESI),
    ("__ext4_journal_get_create_access", Register::ESI),
    ("__ext4_forget", Register::ESI),
    ("__ext4_mark_inode_dirty", Register::ECX),
    ("ext4_check_blockref", Register::ESI),
    ("__xattr_check_inode", Register::R8D),
    ("__ext4_handle_dirty_metadata", Register::ESI),
    ("__ext4_check_dir_entry", Register::ESI),
    ("__ext4_read_dirblock", Register::R8D),
    ("__ext4_iget", Register::R8D),
];

/// The line numbers that count as such: smaller constants may be another argument.
const LINES: std::ops::Range<u64> = 64..1 << 17;

/// Whether the bytes of two functions are equal but for line numbers, both of one length.
pub(super) fn equal_but_for_lines(before: &Normal<'_>, after: &Normal<'_>) -> bool {
    let (mut first, mut second) = (decoder(before), decoder(after));
    // Constants that differ, each by its register, until a call takes them.
    let mut pending: Vec<Register> = Vec::new();
    let mut factory = InstructionInfoFactory::new();
    while first.can_decode() && second.can_decode() {
        let start = first.position();
        let (one, other) = (first.decode(), second.decode());
        let end = first.position();
        if one.is_invalid() || end != second.position() {
            return false;
        }
        if before.bytes[start..end] != after.bytes[start..end] {
            let Some(register) = constant(&one).filter(|register| constant(&other) == Some(*register)) else {
                return false;
            };
            pending.push(register);
        } else if !pending.is_empty() {
            let next = before.references.partition_point(|one| one.offset < start);
            let callee = before.references.get(next).filter(|one| one.offset < end);
            let takes = |register: &Register| {
                let Some(Target::Symbol { name, addend: 0, .. }) = callee.map(|one| &one.target) else {
                    return false;
                };
                TAKE_A_LINE.contains(&(name, *register))
            };
            if matches!(one.code(), Code::Call_rel32_64 | Code::Jmp_rel32_64) {
                if !pending.iter().all(takes) {
                    return false;
                }
                pending.clear();
            } else if one.flow_control() != FlowControl::Next || uses(&mut factory, &one, &pending) {
                return false;
            }
        }
    }
    pending.is_empty() && !first.can_decode() && !second.can_decode()
}

fn decoder<'a>(normal: &'a Normal<'_>) -> Decoder<'a> {
    Decoder::with_ip(64, &normal.bytes, 0, DecoderOptions::NONE)
}

/// The register into which an instruction loads a constant that may be a line number.
fn constant(insn: &Instruction) -> Option<Register> {
    let loads = insn.code() == Code::Mov_r32_imm32 && LINES.contains(&insn.immediate(1));
    loads.then(|| insn.op0_register())
}

/// Whether an instruction reads or writes one of some registers.
fn uses(factory: &mut InstructionInfoFactory, insn: &Instruction, registers: &[Register]) -> bool {
    let used = factory.info(insn).used_registers();
    used.iter().any(|used| registers.iter().any(|one| one.full_register() == used.register().full_register()))
}
