//! Promise: a guest can have the monitor do nothing that its vCPU could not do itself, and no instruction
//! of the guest's ends the VM. Guests without a kernel: one instruction after another.

use anyhow::{Context, Result, ensure};
use patcher::addr::Gpa;
use tests::bare::{
    Bare, CODE, KERNEL_STACK, Outcome, PAGE, PRESENT, Ring, TABLE, USER, USER_STACK, WRITABLE, handler,
};
use tests::lab::Lab;
use vmm::memory::layout::{ARENA, CODE_PAGES, CONSTANT_PAGES, DATA_PAGES};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("exits::a_store_needs_the_rights_of_its_pages", rights),
    ("exits::what_is_not_emulated_is_let_go", let_go),
    ("exits::events_on_protected_stacks_arrive", events),
    ("exits::a_write_that_kvm_emulates_is_not_lost", emulated_by_kvm),
    ("exits::breakpoints_with_prefixes_are_delivered", prefixes),
    ("exits::breakpoints_in_interrupt_shadows_are_delivered", shadows),
    ("exits::the_arena_is_read_only", arena),
    ("exits::no_guests_of_guests_are_offered", nothing_nested),
];

/// The pages that the tests write to.
const FIRST: u64 = 32;
const SECOND: u64 = 33;
/// One that they do not write to.
const OTHER: u64 = 40;
const AT: u64 = FIRST * PAGE + 0x100;
/// Two bytes before the second page.
const STRADDLE: u64 = SECOND * PAGE - 2;
const VALUE: u64 = 0x1122_3344_5566_7788;
/// mov [rdi], rax.
const STORE: &[u8] = &[0x48, 0x89, 0x07];
const SMAP: u64 = 1 << 21;
const PF: u64 = 14;
const BP: u64 = 3;

fn exception(vector: u64, error_code: u64, rip: u64, cr2: u64) -> Outcome {
    Outcome::Exception { vector, error_code, rip, cr2 }
}

/// Stores across two pages, the first of which is guarded: done as a whole, or the guest's own #PF.
fn rights(lab: &Lab) -> Result<()> {
    let all = PRESENT | WRITABLE | USER;
    // Mode, CR4, bits of the first and second page, and what the processor reports.
    for (name, ring, cr4, bits, error_code) in [
        ("both may be written", Ring::User, 0, [all, all], None),
        ("the second is read-only", Ring::User, 0, [all, PRESENT | USER], Some(7)),
        ("the second is the kernel's", Ring::User, 0, [all, PRESENT | WRITABLE], Some(7)),
        ("the second is not there", Ring::User, 0, [all, 0], Some(6)),
        ("the kernel: read-only", Ring::Kernel, 0, [PRESENT | WRITABLE, PRESENT], Some(3)),
        ("the kernel: SMAP", Ring::Kernel, SMAP, [PRESENT | WRITABLE, all], Some(3)),
        ("the kernel: without SMAP", Ring::Kernel, 0, [PRESENT | WRITABLE, all], None),
    ] {
        let bare = Bare::new(lab, ring, STORE)?.registers([VALUE, 0, 0, STRADDLE]).cr4(cr4);
        bare.page(FIRST, bits[0])?;
        bare.page(SECOND, bits[1])?;
        bare.protect(FIRST)?;
        let outcome = bare.run().context(name)?;
        let written = bare.word(STRADDLE)?;
        let expected = match error_code {
            None => (Outcome::End, VALUE),
            Some(code) => (exception(PF, code, CODE, SECOND * PAGE), 0),
        };
        ensure!((outcome, written) == expected, "{name}: {outcome:x?}, {written:x}");
        ensure!(bare.is_protected(FIRST), "{name}: {:#?}", bare.events());
        if error_code.is_none() {
            let dirty =
                [FIRST, SECOND].map(|page| bare.word(TABLE + 8 * page).is_ok_and(|e| e & 0x60 == 0x60));
            ensure!(dirty == [true; 2], "{name}: accessed and dirty: {dirty:?}");
        }
    }
    // A string instruction goes as far as it may, and the fault is at the element behind.
    let bare = Bare::new(lab, Ring::User, &[0xf3, 0xaa])?.registers([0x77, 8, 0, STRADDLE]);
    bare.page(SECOND, PRESENT | USER)?;
    bare.protect(FIRST)?;
    let (outcome, written) = (bare.run()?, bare.word(STRADDLE)?);
    ensure!(
        outcome == exception(PF, 7, CODE, SECOND * PAGE) && written == 0x7777,
        "{outcome:x?}, {written:x}"
    );
    Ok(())
}

/// Instructions that are not emulated: each takes effect, once, and its page is let go.
fn let_go(lab: &Lab) -> Result<()> {
    for (name, ring, code, expected) in [
        ("xchg", Ring::User, &[0x48, 0x87, 0x07][..], VALUE),
        ("add", Ring::User, &[0x48, 0x01, 0x07], VALUE),
        ("movups", Ring::User, &[0x0f, 0x57, 0xc0, 0x66, 0x0f, 0x76, 0xc0, 0x0f, 0x11, 0x07], u64::MAX),
        ("push", Ring::User, &[0x48, 0x89, 0xfc, 0x48, 0x83, 0xc4, 8, 0x50], VALUE),
        ("call", Ring::User, &[0x48, 0x89, 0xfc, 0x48, 0x83, 0xc4, 8, 0xe8, 0, 0, 0, 0], CODE + 12),
        ("32-bit mov", Ring::User32, &[0x89, 0x07], VALUE & 0xffff_ffff),
        ("the kernel's lock inc", Ring::Kernel, &[0xf0, 0x48, 0xff, 0x07], 1),
    ] {
        let bare = Bare::new(lab, ring, code)?.registers([VALUE, 0, 0, AT]);
        bare.protect(FIRST)?;
        bare.protect(OTHER)?;
        let outcome = bare.run().context(name)?;
        let written = bare.word(AT)?;
        ensure!(outcome == Outcome::End && written == expected, "{name}: {outcome:x?}, {written:x}");
        let told = bare.events();
        let is_only = !bare.is_protected(FIRST) && bare.is_protected(OTHER);
        ensure!(is_only && told.len() == 1, "{name}: {told:#?}");
    }
    // A page table that is protected, whose entries the processor marks: nothing tells where that is.
    let bare = Bare::new(lab, Ring::User, STORE)?.registers([VALUE, 0, 0, AT]);
    bare.protect(TABLE / PAGE)?;
    let (outcome, written) = (bare.run()?, bare.word(AT)?);
    ensure!(outcome == Outcome::End && written == VALUE, "{outcome:x?}, {written:x}");
    ensure!(!bare.is_protected(TABLE / PAGE), "{:#?}", bare.events());
    Ok(())
}

/// Exceptions whose frames go to protected pages, and exceptions that the monitor delivers there.
fn events(lab: &Lab) -> Result<()> {
    let stack = KERNEL_STACK / PAGE - 1;
    for (name, code, outcome) in [
        ("ud2", &[0x0f, 0x0b][..], exception(6, 0, CODE, 0)),
        ("int3", &[0xcc], exception(BP, 0, CODE + 1, 0)),
        ("int", &[0xcd, 5], exception(5, 0, CODE + 2, 0)),
        // #PF at a store to a page that is not there.
        ("a store that faults", STORE, exception(PF, 6, CODE, SECOND * PAGE)),
    ] {
        let bare = Bare::new(lab, Ring::User, code)?.registers([VALUE, 0, 0, SECOND * PAGE]);
        bare.page(SECOND, 0)?;
        bare.protect(stack)?;
        bare.protect(OTHER)?;
        let found = bare.run().context(name)?;
        ensure!(found == outcome, "{name}: {found:x?}");
        let is_only = !bare.is_protected(stack) && bare.is_protected(OTHER);
        ensure!(is_only, "{name}: {:#?}", bare.events());
    }
    Ok(())
}

/// Port input into guarded memory: KVM emulates it.
fn emulated_by_kvm(lab: &Lab) -> Result<()> {
    // mov dx, 0x5000; insb. No device is there, so all ones come.
    let bare = Bare::new(lab, Ring::User, &[0x66, 0xba, 0, 0x50, 0x6c])?.registers([0, 0, 0, AT]);
    bare.protect(FIRST)?;
    let (outcome, written) = (bare.run()?, bare.word(AT)?);
    ensure!(outcome == Outcome::End && written == 0xff, "{outcome:x?}, {written:x}");
    ensure!(bare.is_protected(FIRST) && bare.events().len() == 1, "{:#?}", bare.events());
    Ok(())
}

/// `int3` with prefixes: the frame tells the address behind it.
fn prefixes(lab: &Lab) -> Result<()> {
    let longest = [[0x66; 14].as_slice(), &[0xcc]].concat();
    for ring in [Ring::User, Ring::Kernel] {
        for code in
            [&[0xcc][..], &[0xf3, 0xcc], &[0x48, 0xcc], &[0x2e, 0x66, 0xf2, 0xcc], &[0xcd, 3], &longest]
        {
            let found = Bare::new(lab, ring, code)?.run().with_context(|| format!("{ring:?} {code:02x?}"))?;
            let expected = exception(BP, 0, CODE + code.len() as u64, 0);
            ensure!(found == expected, "{ring:?} {code:02x?}: {found:x?}");
        }
    }
    Ok(())
}

/// `int3` right behind `mov ss` and `sti`, which hold interrupts and traps back for one instruction.
fn shadows(lab: &Lab) -> Result<()> {
    const DB: u64 = 1;
    // pushf; or qword [rsp], TF; mov ax, SELECTOR; popf; mov ss, ax; int3
    let single_stepping = |selector| {
        [0x9c, 0x48, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x66, 0xb8, selector, 0, 0x9d, 0x8e, 0xd0, 0xcc]
    };
    for (name, ring, code) in [
        ("mov ss", Ring::User, &[0x66, 0xb8, 0x2b, 0, 0x8e, 0xd0, 0xcc][..]),
        ("mov ss, single stepping", Ring::User, &single_stepping(0x2b)),
        ("mov ss in the kernel", Ring::Kernel, &[0x66, 0xb8, 0x18, 0, 0x8e, 0xd0, 0xcc]),
        ("sti", Ring::Kernel, &[0xfb, 0xcc]),
    ] {
        let bare = Bare::new(lab, ring, code)?;
        let found = bare.run().context(name)?;
        let Outcome::Exception { vector, rip, .. } = found else { anyhow::bail!("{name}: {found:x?}") };
        let behind = CODE + code.len() as u64;
        // What `mov ss` held back may come at the handler's first instruction (SDM volume 3, 6.8.3).
        let held_back = (vector, rip) == (DB, handler(BP)) && name.contains("single");
        ensure!((vector, rip) == (BP, behind) || held_back, "{name}: {found:x?}");
        if ring == Ring::User {
            let [ip, .., sp, _] = frame(&bare)?;
            ensure!((ip, sp) == (behind, USER_STACK), "{name}: {ip:x} {sp:x}");
        }
    }
    Ok(())
}

/// The frame at the top of the kernel's stack.
fn frame(bare: &Bare) -> Result<[u64; 5]> {
    let mut words = [0; 5];
    for (index, word) in (0..).zip(&mut words) {
        *word = bare.word(KERNEL_STACK - 40 + 8 * index)?;
    }
    Ok(words)
}

/// Writes to the arena, to new code and to its constants have no effect, and the guest goes on or takes an
/// exception. Those to its data have theirs.
fn arena(lab: &Lab) -> Result<()> {
    // mov [rdi], rax; movq [rdi], xmm0, which Linux 6.1's KVM does not emulate: #UD; and mov dx, 0x5000; insb,
    // which it does, up to the write.
    let codes: [&[u8]; 3] = [STORE, &[0x66, 0x0f, 0xd6, 0x07], &[0x66, 0xba, 0, 0x50, 0x6c]];
    for (part, code) in
        [ARENA, CODE_PAGES, CONSTANT_PAGES].into_iter().flat_map(|part| codes.map(|code| (part, code)))
    {
        let bare = Bare::new(lab, Ring::Kernel, code)?.registers([VALUE, 0, 0, FIRST * PAGE]);
        bare.map(FIRST, part | PRESENT | WRITABLE)?;
        bare.ram.write(Gpa(part), &[0x55; 8])?;
        let found = bare.run().with_context(|| format!("{part:x}: {code:02x?}"))?;
        let is_ud = code == codes[1] && matches!(found, Outcome::Exception { vector: 6, .. });
        let there: [u8; 8] = bare.read(part)?;
        ensure!(
            (found == Outcome::End || is_ud) && there == [0x55; 8],
            "{part:x}: {code:02x?}: {found:x?}, {there:x?}"
        );
    }
    // Across two pages, the first of which is guarded.
    for (part, is_written) in
        [(ARENA, false), (CODE_PAGES, false), (CONSTANT_PAGES, false), (DATA_PAGES, true)]
    {
        let bare = Bare::new(lab, Ring::Kernel, STORE)?.registers([VALUE, 0, 0, STRADDLE]);
        bare.map(SECOND, part | PRESENT | WRITABLE)?;
        bare.ram.write(Gpa(part), &[0x55; 8])?;
        bare.protect(FIRST)?;
        let (found, there) = (bare.run().with_context(|| format!("{part:x}"))?, bare.word(part)?);
        let expected = if is_written { 0x5555_1122_3344_5566 } else { 0x5555_5555_5555_5555 };
        ensure!(found == Outcome::End && there == expected, "{part:x}: {found:x?}, {there:x}");
    }
    Ok(())
}

/// CPUID shows none, and neither can be switched on.
fn nothing_nested(lab: &Lab) -> Result<()> {
    // mov eax, LEAF; xor ecx, ecx; cpuid; mov [AT], ecx
    for (leaf, bit) in [(1_u32, 5), (0x8000_0001, 2)] {
        let [a, b, c, d] = leaf.to_le_bytes();
        let code = [0xb8, a, b, c, d, 0x31, 0xc9, 0x0f, 0xa2, 0x89, 0x0c, 0x25, 0, 1, 2, 0];
        let bare = Bare::new(lab, Ring::Kernel, &code)?;
        let (outcome, ecx) = (bare.run()?, bare.word(AT)?);
        ensure!(outcome == Outcome::End && ecx != 0 && ecx >> bit & 1 == 0, "leaf {leaf:#x}: {ecx:#x}");
    }
    // mov rax, cr4; bts rax, BIT; mov cr4, rax: VMXE, PKE, CET.
    for bit in [13, 22, 23] {
        let code = [0x0f, 0x20, 0xe0, 0x48, 0x0f, 0xba, 0xe8, bit, 0x0f, 0x22, 0xe0];
        let found = Bare::new(lab, Ring::Kernel, &code)?.run()?;
        ensure!(found == exception(13, 0, CODE + 8, 0), "CR4 bit {bit}: {found:x?}");
    }
    // mov ecx, EFER; rdmsr; bts eax, SVME; wrmsr
    let code = [0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x0f, 0xba, 0xe8, 12, 0x0f, 0x30];
    let found = Bare::new(lab, Ring::Kernel, &code)?.run()?;
    ensure!(found == exception(13, 0, CODE + 11, 0), "EFER.SVME: {found:x?}");
    Ok(())
}
