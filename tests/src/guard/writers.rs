//! Code that writes to the kernel's text without asking its patcher: made for the purpose, and
//! put in place of a function that nothing uses.

/// Where in the function the bytes lie that it writes to, from its start.
pub(super) const SLOTS: usize = 0x300;
/// A byte that is an instruction by itself, as are those that follow it: no code is spoilt by
/// them.
pub(super) const VALUE: u8 = 0x91;

const NOP: u8 = 0x90;
const RET: u8 = 0xc3;

/// A piece of memory that the code writes to.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    /// By which instruction.
    pub(super) name: &'static str,
    /// Where, from the function's start.
    pub(super) offset: usize,
    /// What will be there.
    pub(super) bytes: Vec<u8>,
}

/// Makes code for a function at `start` of so many bytes, of which the first `begin` stay, and
/// tells what it will have written. It returns 0.
#[must_use]
pub(super) fn every_width(start: u64, begin: usize, room: usize) -> (Vec<u8>, Vec<Slot>) {
    let value = |length: u8| (VALUE..VALUE + length).collect::<Vec<u8>>();
    let mut writer = Writer::new(begin);
    let slot = |name, offset: usize, length| Slot { name, offset: SLOTS + offset, bytes: value(length) };
    let mut slots = Vec::new();
    for (name, at, length, code) in [
        ("mov, 1 byte", 0, 1, [&[0xc6, 0x47, 0][..], &value(1)].concat()),
        ("mov, 2 bytes", 2, 2, [&[0x66, 0xc7, 0x47, 2][..], &value(2)].concat()),
        ("mov, 4 bytes", 4, 4, [&[0xc7, 0x47, 4][..], &value(4)].concat()),
        // mov rax, imm64; mov [rdi+8], rax
        ("mov, 8 bytes", 8, 8, [&[0x48, 0xb8][..], &value(8), &[0x48, 0x89, 0x47, 8]].concat()),
        ("mov, across words", 0x13, 8, vec![0x48, 0x89, 0x47, 0x13]),
        // lea rsi, [rdi+8]; add rdi, 0x20; mov ecx, 5; rep movsb; sub rdi, 0x25
        (
            "rep movsb",
            0x20,
            5,
            vec![
                0x48, 0x8d, 0x77, 8, 0x48, 0x83, 0xc7, 0x20, 0xb9, 5, 0, 0, 0, 0xf3, 0xa4, 0x48, 0x83, 0xef,
                0x25,
            ],
        ),
        // lea rsi, [rdi+8]; add rdi, 0x30; movsq; sub rdi, 0x38
        (
            "movsq",
            0x30,
            8,
            vec![0x48, 0x8d, 0x77, 8, 0x48, 0x83, 0xc7, 0x30, 0x48, 0xa5, 0x48, 0x83, 0xef, 0x38],
        ),
    ] {
        writer.code(&code);
        slots.push(slot(name, at, length));
    }
    // add rdi, 0x40; mov al, VALUE; mov ecx, 3; rep stosb; sub rdi, 0x43
    writer.code(&[0x48, 0x83, 0xc7, 0x40, 0xb0, VALUE, 0xb9, 3, 0, 0, 0, 0xf3, 0xaa, 0x48, 0x83, 0xef, 0x43]);
    slots.push(Slot { name: "rep stosb", offset: SLOTS + 0x40, bytes: vec![VALUE; 3] });
    if let Some(boundary) = page_boundary(start, begin + writer.0.len() + 32, begin + room) {
        // mov rax, [rdi+8]; mov [rdi+x], rax
        let from = boundary - 3;
        let distance = (i32::try_from(from).unwrap_or(0) - i32::try_from(SLOTS).unwrap_or(0)).to_le_bytes();
        writer.code(&[&[0x48, 0x8b, 0x47, 8, 0x48, 0x89, 0x87][..], &distance].concat());
        slots.push(Slot { name: "mov, across pages", offset: from, bytes: value(8) });
    }
    (writer.end(room), slots)
}

/// Code that writes by an instruction that the guard does not know: `xchg [rdi], al`.
#[must_use]
pub(super) fn unknown(begin: usize, room: usize) -> (Vec<u8>, Slot) {
    let mut writer = Writer::new(begin);
    writer.code(&[0xb0, VALUE, 0x86, 0x07]);
    (writer.end(room), Slot { name: "xchg", offset: SLOTS, bytes: vec![VALUE] })
}

/// Where a page begins inside a function, from its start, between two offsets.
fn page_boundary(start: u64, from: usize, to: usize) -> Option<usize> {
    const PAGE: u64 = 4096;
    let offset = usize::try_from(start.next_multiple_of(PAGE) - start).ok()?;
    let is_free = offset + 8 < SLOTS || offset >= SLOTS + 0x50 + 8;
    (offset >= from + 8 && offset + 8 < to && is_free).then_some(offset)
}

/// Code that switches write protection off (CR0.WP), writes, and switches it on again.
struct Writer(Vec<u8>);

impl Writer {
    fn new(begin: usize) -> Self {
        // pushf; cli; mov rdx, cr0; mov rax, rdx; btr rax, 16; mov cr0, rax
        let mut code = vec![
            0x9c, 0xfa, 0x0f, 0x20, 0xc2, 0x48, 0x89, 0xd0, 0x48, 0x0f, 0xba, 0xf0, 16, 0x0f, 0x22, 0xc0,
        ];
        // cld; lea rdi, [rip+start]; add rdi, slots. Code that takes an address inside itself is not replaced as
        // a whole.
        code.extend([0xfc, 0x48, 0x8d, 0x3d]);
        let behind = begin + code.len() + 4;
        code.extend((-i32::try_from(behind).unwrap_or(0)).to_le_bytes());
        code.extend([0x48, 0x81, 0xc7]);
        code.extend(i32::try_from(SLOTS).unwrap_or(0).to_le_bytes());
        Self(code)
    }

    fn code(&mut self, code: &[u8]) {
        self.0.extend(code);
    }

    fn end(mut self, room: usize) -> Vec<u8> {
        // mov cr0, rdx; popf; xor eax, eax
        self.0.extend([0x0f, 0x22, 0xc2, 0x9d, 0x31, 0xc0, RET]);
        self.0.resize(room - 1, NOP);
        self.0.push(RET);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;
    use patcher::insn;

    use super::*;

    #[test]
    fn the_code_is_whole_before_and_after_it_has_written() {
        let (mut code, slots) = every_width(0xffff_ffff_8152_fb50, 5, 1771);
        assert_eq!(slots.len(), 9);
        assert!(insn::count(&code, Gva(0)).is_some());
        for slot in &slots {
            let from = slot.offset - 5;
            assert!(code[from..from + slot.bytes.len()].iter().all(|byte| *byte == NOP), "{}", slot.name);
            code[from..from + slot.bytes.len()].copy_from_slice(&slot.bytes);
        }
        assert!(insn::count(&code, Gva(0)).is_some());
        assert!(insn::count(&unknown(5, 1771).0, Gva(0)).is_some());
    }
}
