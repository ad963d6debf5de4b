//! What holds for the delivery of #BP whatever the guest's registers, tables and memory are; for the fuzz
//! target `breakpoint`, and in a short form here.

use std::cell::RefCell;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs};
use patcher::addr::{Gpa, Gva};

use crate::memory::paging::PageTables;
use crate::memory::{GuestRam, PAGE, PAGE_SIZE};
use crate::vcpu::inject_bp::inject;
use crate::x86::{EFER_LMA, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM};

/// Pages that the input fills, from the second on.
const PAGES: u64 = 12;
/// Size of the frame that is pushed, in bytes.
const FRAME: u64 = 40;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// Bits that the processor sets in entries of page tables (SDM volume 3, 4.8).
const ACCESSED_DIRTY: u8 = 0x60;

thread_local! {
    static RAM: RefCell<Option<GuestRam>> = const { RefCell::new(None) };
}

/// The input's numbers, and zeros behind its end.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn next(&mut self) -> u64 {
        let (bytes, rest) = self.0.split_at(self.0.len().min(8));
        self.0 = rest;
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    }

    fn small(&mut self) -> u16 {
        let [low, high, ..] = self.next().to_le_bytes();
        u16::from_le_bytes([low, high])
    }
}

/// A vCPU at an `int3`, from what the input begins with.
fn vcpu(numbers: &mut Numbers<'_>) -> (kvm_regs, kvm_sregs) {
    let regs =
        kvm_regs { rip: numbers.next(), rsp: numbers.next(), rflags: numbers.next(), ..kvm_regs::default() };
    let mut table = || kvm_dtable { base: numbers.next(), limit: numbers.small(), padding: [0; 3] };
    let (idt, gdt) = (table(), table());
    let mut sregs = kvm_sregs { idt, gdt, cr3: numbers.next(), cr4: numbers.next(), ..kvm_sregs::default() };
    (sregs.tr.base, sregs.efer) = (numbers.next(), numbers.next() | EFER_LMA);
    (sregs.tr.limit, sregs.cs.l) = (0x67, 1);
    (sregs.cr0, sregs.cr4) = (CR0_PG | CR0_PE, sregs.cr4 | CR4_PAE);
    (sregs.cs.selector, sregs.ss.selector) = (numbers.small(), numbers.small());
    let ring = numbers.small().to_le_bytes()[0] & 3;
    (sregs.cs.dpl, sregs.ss.dpl) = (ring, ring);
    (regs, sregs)
}

/// Delivers #BP to a vCPU whose registers and memory the input says. Either nothing changes; or the frame,
/// and no other byte, is on the stack that RSP says, and the registers are those of the handler.
///
/// # Panics
/// When that does not hold.
pub fn deliver(input: &[u8]) {
    RAM.with_borrow_mut(|ram| {
        let ram = ram.get_or_insert_with(|| GuestRam::new((PAGES + 4) * PAGE).expect("memory"));
        let mut numbers = Numbers(input);
        let (regs, sregs) = vcpu(&mut numbers);
        let mut before = vec![0; PAGE_SIZE * usize::try_from(PAGES).expect("few")];
        let filled = numbers.0.len().min(before.len());
        before[..filled].copy_from_slice(&numbers.0[..filled]);
        ram.write(Gpa(PAGE), &before).expect("RAM");
        check(ram, &regs, &sregs, &before);
    });
}

fn check(ram: &GuestRam, regs: &kvm_regs, sregs: &kvm_sregs, before: &[u8]) {
    let (mut new, mut special) = (*regs, *sregs);
    let result = inject(&mut new, &mut special, 1, ram, &|_| true);
    let mut after = vec![0; before.len()];
    ram.read(Gpa(PAGE), &mut after).expect("RAM");
    let Ok(has_changed) = result else {
        assert_eq!((new, special), (*regs, *sregs), "refused, but the registers changed");
        assert!(after == before, "refused, but memory changed");
        return;
    };
    assert_eq!(has_changed, special != *sregs);
    assert_eq!((special.cr3, special.efer, special.idt), (sregs.cr3, sregs.efer, sregs.idt));
    assert!(special.ss.dpl <= sregs.ss.dpl, "delivered to an outer ring");
    assert_eq!(new.rsp % 16, 8, "the frame is not aligned");
    let cleared = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM;
    assert_eq!(new.rflags | RFLAGS_IF, regs.rflags & !cleared | RFLAGS_IF);
    // The walk that the processor would have done, before the frame was there.
    let load = |at: Gpa| {
        let from = usize::try_from(at.0.checked_sub(PAGE)?).ok()?;
        match before.get(from..from + 8) {
            Some(bytes) => Some(u64::from_le_bytes(bytes.try_into().ok()?)),
            None => ram.load_u64(at).ok(),
        }
    };
    let frame = [
        regs.rip.wrapping_add(1),
        sregs.cs.selector.into(),
        regs.rflags,
        regs.rsp,
        u64::from(sregs.ss.selector),
    ];
    let mut expected = before.to_vec();
    for (offset, word) in (0..FRAME).step_by(8).zip(frame) {
        let place = PageTables::of(sregs).translate(Gva(new.rsp.wrapping_add(offset)), load);
        let place = place.expect("the stack is mapped").at.0;
        let from = place.checked_sub(PAGE).and_then(|from| usize::try_from(from).ok());
        if let Some(there) = from.and_then(|from| expected.get_mut(from..from + 8)) {
            there.copy_from_slice(&word.to_le_bytes());
        }
    }
    // The walks may have set bits of the tables.
    for (at, (now, then)) in after.iter().zip(&mut expected).enumerate() {
        if at % 8 == 0 && *now & !ACCESSED_DIRTY == *then & !ACCESSED_DIRTY {
            *then |= *now;
        }
    }
    assert!(after == expected, "another byte than the frame's changed");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    /// A vCPU in ring 3 with a gate, code segment, task state and page tables that all are right.
    fn seed() -> Vec<u8> {
        let words = [0x1000, 0x7000, 0x202, 0x4000, 0xfff, 0x5000, 0x7f, 0x1000, 0, 0x6000, 0, 0x33, 0x2b, 3];
        let mut input: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        let start = input.len();
        input.resize(start + 0x7000, 0);
        let mut put = |at: usize, value: u64| {
            let at = start + at - 0x1000;
            input[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        for (at, value) in [
            (0x1000, 0x2003),
            (0x2000, 0x3003),
            (0x3000, 0x83),
            (0x4030, 0x8200_ee00_0010_1140),
            (0x4038, 0xffff_ffff),
            (0x5010, 0x00af_9b00_0000_ffff),
            (0x6004, 0x7800),
        ] {
            put(at, value);
        }
        input
    }

    #[test]
    fn the_seed_is_delivered() {
        let seed = seed();
        let mut numbers = Numbers(&seed);
        let (mut regs, mut sregs) = vcpu(&mut numbers);
        let ram = GuestRam::new(16 * PAGE).expect("memory");
        ram.write(Gpa(PAGE), numbers.0).expect("RAM");
        assert_eq!(inject(&mut regs, &mut sregs, 1, &ram, &|_| true), Ok(true));
        assert_eq!((regs.rip, regs.rsp), (0xffff_ffff_8200_1140, 0x7800 - FRAME));
        deliver(&seed);
        // For the fuzzer.
        if let Some(folder) = std::env::var_os("FUZZ_CORPUS") {
            let folder = std::path::PathBuf::from(folder).join("breakpoint");
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(folder.join("ring 3"), seed).expect("written");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 4000, rng_seed: RngSeed::Fixed(3), ..ProptestConfig::default()
        })]

        #[test]
        fn nothing_changes_or_all_that_the_processor_changes(
            edits in prop::collection::vec((0..0x1000_usize, any::<u64>(), 1..9_usize), 0..6),
        ) {
            // Where there is something: the registers, the tables' beginnings.
            const PLACES: [usize; 8] = [0, 0x70, 0x1070, 0x2070, 0x3070, 0x30a0, 0x4080, 0x5070];
            let mut input = seed();
            for (at, bytes, length) in edits {
                let at = PLACES[at % 8] + (at >> 3) % 0x70;
                input[at..at + length].copy_from_slice(&bytes.to_le_bytes()[..length]);
            }
            deliver(&input);
        }
    }
}
