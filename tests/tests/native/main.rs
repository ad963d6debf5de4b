//! The emulation of stores compared with the processor: the same instruction on the same registers and
//! memory, once by `patcher::insn::store` and once natively, in a child process. What the emulation takes
//! must leave every register, every flag and every byte as the processor does.

mod processor;

use std::collections::BTreeSet;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use patcher::insn;
use patcher::insn::store::{GeneralRegisters, Store, Value};
use patcher::insn::written::{Bitness, written};
use processor::{CODE, GS, Outcome, Registers, SIZE, WINDOW, background};

/// How many instructions are made up.
const TRIES: usize = 120_000;
/// How many are compared at least.
const LEAST: usize = 20_000;
/// Flags that an instruction can change in user mode: CF, PF, AF, ZF, SF, DF, OF.
const FLAGS: u64 = 0xcd5;
/// DF.
const DOWN: u64 = 1 << 10;
/// Most elements of a repeated string instruction.
const ELEMENTS: u64 = 40;

/// Numbers without a pattern, the same in every run (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 33) % bound
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).expect("an index")]
    }
}

/// Bytes that begin as an instruction that stores may do, more often than not.
fn code(random: &mut Random) -> Vec<u8> {
    const PREFIXES: [u8; 12] = [0x66, 0xf3, 0xf2, 0x67, 0x64, 0x65, 0x2e, 0x3e, 0x26, 0x36, 0xf0, 0x66];
    const OPCODES: [&[u8]; 14] = [
        &[0x88],
        &[0x89],
        &[0xc6],
        &[0xc7],
        &[0xa2],
        &[0xa3],
        &[0xa4],
        &[0xa5],
        &[0xaa],
        &[0xab],
        &[0x0f, 0xc3],
        &[0x89],
        &[0x88],
        &[0xf3, 0xa4],
    ];
    let mut code: Vec<u8> = (0..random.below(4)).map(|_| random.one(&PREFIXES)).collect();
    if random.below(2) == 0 {
        code.push(0x40 | random.byte() & 0xf);
    }
    if random.below(8) == 0 {
        code.extend([random.byte(), random.byte()]);
    } else {
        code.extend(random.one(&OPCODES));
    }
    code.extend((0..12).map(|_| random.byte()));
    code
}

/// A place in the window, often near the end of a page.
fn place(random: &mut Random) -> u64 {
    let pages = SIZE as u64 / 4096;
    let page = WINDOW + 4096 * (1 + random.below(pages - 2));
    match random.below(3) {
        0 => page + random.below(4096),
        _ => (page - 16) + random.below(24),
    }
}

/// Changes the code or the registers so that the instruction writes to the window. `None` if that can't be.
fn aimed(code: &mut [u8], registers: &mut GeneralRegisters, random: &mut Random) -> Option<()> {
    let mut decoder = Decoder::with_ip(64, code, CODE, DecoderOptions::NONE);
    let insn = decoder.decode();
    let offsets = decoder.get_constant_offsets(&insn);
    if insn.is_string_instruction() {
        registers.general[7] = place(random);
        registers.general[6] = place(random);
        registers.general[1] = registers.general[1] & !0xff | random.below(ELEMENTS);
        if random.below(8) != 0 {
            registers.general[1] &= 0xff;
        }
        if insn.segment_prefix() == Register::FS {
            registers.general[6] = registers.general[6].wrapping_sub(registers.fs);
        } else if insn.segment_prefix() == Register::GS {
            registers.general[6] = registers.general[6].wrapping_sub(registers.gs);
        }
        let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
        return (!repeats || registers.general[1] < ELEMENTS).then_some(());
    }
    let (first, _) = *written(code, Bitness::Bits64, registers, [0; 4]).first()?;
    let by = place(random).wrapping_sub(first.0);
    let (base, index) = (insn.memory_base(), insn.memory_index());
    if base.is_gpr64() || base.is_gpr32() {
        let base = (base.full_register() as usize).checked_sub(Register::RAX as usize)?;
        registers.general[base] = registers.general[base].wrapping_add(by);
        return (index.full_register() != insn.memory_base().full_register()).then_some(());
    }
    let at = offsets.displacement_offset();
    match offsets.displacement_size() {
        4 => {
            let old = i32::from_le_bytes(code[at..at + 4].try_into().ok()?);
            let new = i64::from(old).wrapping_add(by.cast_signed());
            code[at..at + 4].copy_from_slice(&i32::try_from(new).ok()?.to_le_bytes());
        }
        8 => {
            let old = u64::from_le_bytes(code[at..at + 8].try_into().ok()?);
            code[at..at + 8].copy_from_slice(&old.wrapping_add(by).to_le_bytes());
        }
        _ => return None,
    }
    Some(())
}

fn first(code: &[u8]) -> Instruction {
    Decoder::with_ip(64, code, CODE, DecoderOptions::NONE).decode()
}

/// What the emulation makes of it. `None` if it does not take the instruction,
/// or if that writes elsewhere.
fn emulate(code: &[u8], before: &GeneralRegisters) -> Option<Outcome> {
    let mut memory: Vec<u8> = (0..SIZE).map(background).collect();
    let mut registers = *before;
    let range = |at: u64, width: usize| {
        let from = usize::try_from(at.checked_sub(WINDOW)?).ok()?;
        (from + width <= SIZE).then_some(from..from + width)
    };
    while registers.rip == before.rip {
        let Some(store) = Store::decode(code, &registers) else {
            // Nothing is left to be written: the processor goes on.
            return (registers == *before && is_empty(code, before)).then(|| outcome(&registers, &memory));
        };
        let bytes = match store.value {
            Value::Register(value) => value.to_le_bytes().get(..store.width)?.to_vec(),
            Value::Memory(from) => memory[range(from.0, store.width)?].to_vec(),
        };
        memory[range(store.at.0, store.width)?].copy_from_slice(&bytes);
        store.step(&mut registers);
    }
    assert_eq!(registers.rip, first(code).next_ip());
    assert_eq!((registers.fs, registers.gs), (before.fs, before.gs));
    Some(outcome(&registers, &memory))
}

/// Whether it is a repeated string instruction without elements.
fn is_empty(code: &[u8], registers: &GeneralRegisters) -> bool {
    let insn = first(code);
    let stores = matches!(
        insn.mnemonic(),
        Mnemonic::Movsb
            | Mnemonic::Movsw
            | Mnemonic::Movsd
            | Mnemonic::Movsq
            | Mnemonic::Stosb
            | Mnemonic::Stosw
            | Mnemonic::Stosd
            | Mnemonic::Stosq
    );
    let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
    stores && insn.is_string_instruction() && repeats && registers.general[1] == 0
}

fn outcome(registers: &GeneralRegisters, memory: &[u8]) -> Outcome {
    let changed = memory.iter().enumerate().filter(|(offset, byte)| **byte != background(*offset));
    Outcome {
        registers: Registers { general: registers.general, flags: registers.flags & FLAGS },
        changed: changed.map(|(offset, byte)| (offset, *byte)).collect(),
    }
}

/// An instruction of those that are taken, with registers by which it writes to the window.
fn example(random: &mut Random, fs: u64) -> Option<(Vec<u8>, GeneralRegisters)> {
    let mut code = code(random);
    let mut registers = GeneralRegisters { rip: CODE, flags: 0x202, fs, gs: GS, ..Default::default() };
    registers.general.iter_mut().for_each(|register| {
        // Large numbers are values; as an index they lead out of the window unless the base makes up for it.
        *register = if random.below(2) == 0 { random.next() } else { random.below(64) };
    });
    registers.flags |= random.next() & FLAGS;
    if random.below(3) != 0 {
        registers.flags &= !DOWN;
    }
    let length = first(&code).len();
    if first(&code).is_invalid() {
        return None;
    }
    code.truncate(length);
    aimed(&mut code, &mut registers, random)?;
    Some((code, registers))
}

#[test]
fn stores_do_what_the_processor_does() {
    let (mut random, fs) = (Random(0x9e37_79b9_7f4a_7c15), processor::fs());
    let mut examples = Vec::new();
    for _ in 0..TRIES {
        let Some((code, registers)) = example(&mut random, fs) else { continue };
        if let Some(emulated) = emulate(&code, &registers) {
            examples.push((code, registers, emulated));
        }
    }
    assert!(examples.len() >= LEAST, "only {} instructions are taken", examples.len());
    let native: Vec<(Vec<u8>, Registers)> = examples
        .iter()
        .map(|(code, registers, _)| {
            (code.clone(), Registers { general: registers.general, flags: registers.flags })
        })
        .collect();
    let text = |index: usize| {
        let (code, registers, _) = &examples[index];
        format!("{} {registers:x?}", insn::disassemble(code, patcher::addr::Gva(CODE)).join("; "))
    };
    let native = processor::execute(&native)
        .unwrap_or_else(|(index, signal)| panic!("signal {signal} natively: {}", text(index)));
    for (index, (native, (.., emulated))) in native.into_iter().zip(&examples).enumerate() {
        let flags = native.registers.flags & FLAGS;
        let native = Outcome { registers: Registers { flags, ..native.registers }, ..native };
        assert_eq!(native, *emulated, "the processor's is on the left: {}", text(index));
    }
    let forms: BTreeSet<String> = examples.iter().map(|(code, registers, _)| form(code, registers)).collect();
    for wanted in FORMS {
        assert!(forms.contains(*wanted), "{wanted} is not among {forms:?}");
    }
    let straddles = examples.iter().filter(|(.., after)| {
        after.changed.windows(2).any(|pair| pair[1].0 % 4096 == 0 && pair[0].0 + 1 == pair[1].0)
    });
    let straddles = straddles.count();
    assert!(straddles > LEAST / 20, "only {straddles} cross a page");
    println!("{} instructions of {} forms, {straddles} across pages", examples.len(), forms.len());
}

/// What is to be among the instructions: mnemonic, width, what it repeats by, which way.
const FORMS: &[&str] = &[
    "mov 1",
    "mov 2",
    "mov 4",
    "mov 8",
    "movnti 4",
    "movnti 8",
    "stosb 1",
    "stosw 2",
    "stosd 4",
    "stosq 8",
    "movsb 1",
    "movsw 2",
    "movsd 4",
    "movsq 8",
    "stosb 1 rep",
    "stosw 2 rep",
    "stosd 4 rep",
    "stosq 8 rep",
    "movsb 1 rep",
    "movsw 2 rep",
    "movsd 4 rep",
    "movsq 8 rep",
    "stosb 1 repne",
    "movsb 1 repne",
    "stosb 1 down",
    "stosq 8 rep down",
    "movsq 8 rep down",
    "movsb 1 rep none",
    "stosb 1 rep none",
    "mov 1 fs",
    "mov 8 fs",
    "mov 4 gs",
    "movsb 1 gs",
    "movsb 1 fs",
    "mov 4 rip",
    "mov 8 rip",
    "mov 8 moffs",
    "mov 4 address32",
    "mov 1 high",
    "mov 4 immediate",
    "mov 8 immediate",
];

fn form(code: &[u8], registers: &GeneralRegisters) -> String {
    let insn = first(code);
    let mut form = format!("{:?} {}", insn.mnemonic(), insn.memory_size().size()).to_lowercase();
    let mut also = |when: bool, what: &str| {
        if when {
            form += what
        }
    };
    if insn.is_string_instruction() {
        also(insn.has_repne_prefix(), " repne");
        also(insn.has_rep_prefix(), " rep");
        let by_rdi = insn.op0_kind() == OpKind::MemoryESRDI;
        also(by_rdi && is_empty(code, registers), " none");
        also(registers.flags & DOWN != 0 && !is_empty(code, registers), " down");
        also(insn.segment_prefix() == Register::FS && moves(&insn), " fs");
        also(insn.segment_prefix() == Register::GS && moves(&insn), " gs");
        return form;
    }
    also(insn.segment_prefix() == Register::FS, " fs");
    also(insn.segment_prefix() == Register::GS, " gs");
    let plain = !matches!(insn.segment_prefix(), Register::FS | Register::GS);
    also(plain && insn.is_ip_rel_memory_operand(), " rip");
    also(plain && is_offset(insn.code()), " moffs");
    also(plain && insn.memory_base().is_gpr32(), " address32");
    let source = insn.op1_register();
    let by_register = plain && insn.memory_base().is_gpr64();
    also(by_register && [Register::AH, Register::BH, Register::CH, Register::DH].contains(&source), " high");
    also(by_register && source == Register::None, " immediate");
    form
}

/// Whether it writes to an address that is in the instruction.
fn is_offset(code: Code) -> bool {
    [Code::Mov_moffs8_AL, Code::Mov_moffs16_AX, Code::Mov_moffs32_EAX, Code::Mov_moffs64_RAX].contains(&code)
}

fn moves(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq)
}
