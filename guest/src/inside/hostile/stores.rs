//! Stores from ring 3 to text that is mapped into this process, by instructions that a monitor may
//! not know. Each must do what the processor does.
//!
//! Unsafe code: the stores. Invariant: they go to a slot of this attack's.
#![allow(unsafe_code)]

use std::arch::asm;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::stage::{Slot, Stage};

const VALUE: u8 = 0x91;
const WORD: u64 = 0x9191_9191_9191_9191;

type Form = (&'static str, usize, fn(usize));

macro_rules! form {
    ($name:literal, $length:literal, $($code:literal),+) => {
        ($name, $length, |to| {
            let from = [VALUE; 32];
            // SAFETY: `to` is a slot's start.
            unsafe {
                asm!(
                    $($code,)+ inout("rdi") to => _, inout("rax") WORD => _, inout("rcx") 0_u64 => _,
                    inout("rsi") from.as_ptr() => _, out("xmm0") _, out("rdx") _
                );
            }
        })
    };
}

const FORMS: &[Form] = &[
    form!("mov, 1 byte", 1, "mov [rdi], al"),
    form!("mov, 4 bytes", 4, "mov [rdi], eax"),
    form!("mov, 8 bytes", 8, "mov [rdi], rax"),
    form!("mov by a 32-bit address", 8, "mov [edi], rax"),
    form!("rep stosb", 5, "mov ecx, 5", "rep stosb"),
    form!("rep stosb, none", 0, "rep stosb"),
    form!("rep stosb by a 32-bit count of none", 0, "mov rcx, 0x100000000", "addr32 rep stosb"),
    form!("rep movsb", 7, "mov ecx, 7", "rep movsb"),
    form!("movsq, downwards", 8, "std", "movsq", "cld"),
    form!("xchg", 8, "xchg [rdi], rax"),
    form!("lock cmpxchg", 8, "mov rdx, rax", "mov rax, [rdi]", "lock cmpxchg [rdi], rdx"),
    form!("lock add", 4, "lock add dword ptr [rdi], 0x01010101"),
    form!("or", 8, "or [rdi], rax"),
    form!("movnti", 8, "movnti [rdi], rax"),
    form!("movdqu", 16, "movdqu xmm0, [rsi]", "movdqu [rdi], xmm0"),
    form!("movntdq", 16, "movdqu xmm0, [rsi]", "movntdq [rdi], xmm0"),
    form!("movhps", 8, "movups xmm0, [rsi]", "movhps [rdi], xmm0"),
];

const VECTORS: &[Form] = &[
    form!("vmovdqu", 32, "vmovdqu ymm0, [rsi]", "vmovdqu [rdi], ymm0", "vzeroupper"),
    form!("vmovntdq", 16, "vmovdqu xmm0, [rsi]", "vmovntdq [rdi], xmm0", "vzeroupper"),
];

pub(super) fn run(stage: &Arc<Stage>) -> io::Result<()> {
    let vectors = if std::arch::is_x86_feature_detected!("avx") { VECTORS } else { &[] };
    while stage.goes_on() {
        for (name, length, store) in FORMS.iter().chain(vectors) {
            store(stage.slot(Slot::Stores));
            stage.expect(stage.is(Slot::Stores, VALUE, *length), || (*name).to_owned());
            stage.clear(Slot::Stores);
            stage.done();
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
