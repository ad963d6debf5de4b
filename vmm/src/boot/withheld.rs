//! What KVM supports and the guest is not offered: features that change the rules by which the monitor
//! walks page tables, delivers #BP and emulates stores, and that it does not follow. KVM then lets the guest
//! switch none of them on (Linux arch/x86/kvm/x86.c, `kvm_is_valid_cr4`, `__kvm_valid_efer`, `__kvm_set_xcr`). The
//! monitor itself does not rely on this alone: [`Rules`](crate::memory::access::Rules) knows no vCPU that has
//! one on.
//!
//! KVM reports Xen's and Hyper-V's leaves only to those who ask for them; what else lies where hypervisors have
//! their leaves is dropped.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A register of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Features that are not offered: leaf, subleaf, register, bit (SDM volume 2, CPUID; APM volume 3, E).
const FEATURES: &[(u32, u32, Register, u32)] = &[
    // VMX and SVM: a guest of the guest's has page tables of its own, and its `int3` may not be the guest's.
    (1, 0, Ecx, 5),
    (0x8000_0001, 0, Ecx, 2),
    // SMX and SKINIT start code that measures itself.
    (1, 0, Ecx, 6),
    (0x8000_0001, 0, Ecx, 12),
    // SGX: inside an enclave RIP is not where the vCPU is.
    (7, 0, Ebx, 2),
    (7, 0, Ecx, 30),
    // PKU, whether it is on, and PKS: rights by protection keys.
    (7, 0, Ecx, 3),
    (7, 0, Ecx, 4),
    (7, 0, Ecx, 31),
    // CET: shadow stacks, branch tracking, supervisor shadow stacks. Exceptions push to shadow stacks.
    (7, 0, Ecx, 7),
    (7, 0, Edx, 20),
    (7, 1, Edx, 18),
    // User interrupts.
    (7, 0, Edx, 5),
    // LASS, LAM and AMD's upper address ignore: other rules for linear addresses.
    (7, 1, Eax, 6),
    (7, 1, Eax, 26),
    (0x8000_0021, 0, Eax, 7),
    // FRED, and where NMIs come from: events without IDT.
    (7, 1, Eax, 17),
    (7, 1, Eax, 20),
    // APX: more general registers, and prefixes that are not decoded.
    (7, 1, Edx, 21),
    // The state of PKRU and APX in XCR0, of CET and user interrupts in XSS.
    (0xd, 0, Eax, 9),
    (0xd, 0, Eax, 19),
    (0xd, 1, Ecx, 11),
    (0xd, 1, Ecx, 12),
    (0xd, 1, Ecx, 14),
];

/// Leaves of these features: all zero. SVM's, SGX's, encrypted memory's.
const LEAVES: [u32; 3] = [0x8000_000a, 0x12, 0x8000_001f];
/// Subleaves of leaf 0xd, by their state component.
const STATES: [u32; 5] = [9, 11, 12, 14, 19];
/// Leaves of hypervisors, and KVM's own among them (Linux Documentation/virt/kvm/x86/cpuid.rst).
const HYPERVISORS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;
const KVM: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0001;

/// Takes out what the guest is not offered.
pub fn withhold(cpuid: &mut CpuId) {
    cpuid.retain(|entry| !HYPERVISORS.contains(&entry.function) || KVM.contains(&entry.function));
    for entry in cpuid.as_mut_slice() {
        if LEAVES.contains(&entry.function) || entry.function == 0xd && STATES.contains(&entry.index) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        for (leaf, index, register, bit) in FEATURES {
            if (entry.function, entry.index) == (*leaf, *index) {
                *register.of(entry) &= !(1 << bit);
            }
        }
    }
}

impl Register {
    fn of(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has everything in these leaves.
    fn everything() -> CpuId {
        let leaves: [(u32, u32); 20] = [
            (0, 0),
            (1, 0),
            (7, 0),
            (7, 1),
            (0xd, 0),
            (0xd, 1),
            (0xd, 2),
            (0xd, 9),
            (0xd, 12),
            (0x12, 0),
            (0x4000_0000, 0),
            (0x4000_0001, 0),
            (0x4000_0003, 0),
            (0x4000_0100, 0),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
            (0x8000_000a, 0),
            (0x8000_001f, 0),
            (0x8000_0021, 0),
            (0x8000_0022, 0),
        ];
        let all = leaves.map(|(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        });
        CpuId::from_entries(&all).expect("few")
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<[u32; 4]> {
        let mut all = cpuid.as_slice().iter();
        let found = all.find(|entry| (entry.function, entry.index) == (function, index))?;
        Some([found.eax, found.ebx, found.ecx, found.edx])
    }

    #[test]
    fn what_the_monitor_does_not_follow_is_not_offered() {
        let mut cpuid = everything();
        withhold(&mut cpuid);
        const ALL: u32 = u32::MAX;
        let without = |bits: &[u32]| bits.iter().fold(ALL, |value, bit| value & !(1 << bit));
        for (function, index, expected) in [
            (1, 0, [ALL, ALL, without(&[5, 6]), ALL]),
            (7, 0, [ALL, without(&[2]), without(&[3, 4, 7, 30, 31]), without(&[5, 20])]),
            (7, 1, [without(&[6, 17, 20, 26]), ALL, ALL, without(&[18, 21])]),
            (0xd, 0, [without(&[9, 19]), ALL, ALL, ALL]),
            (0xd, 1, [ALL, ALL, without(&[11, 12, 14]), ALL]),
            (0xd, 2, [ALL; 4]),
            (0xd, 9, [0; 4]),
            (0xd, 12, [0; 4]),
            (0x12, 0, [0; 4]),
            (0x4000_0001, 0, [ALL; 4]),
            (0x8000_0001, 0, [ALL, ALL, without(&[2, 12]), ALL]),
            (0x8000_000a, 0, [0; 4]),
            (0x8000_001f, 0, [0; 4]),
            (0x8000_0021, 0, [without(&[7]), ALL, ALL, ALL]),
        ] {
            assert_eq!(leaf(&cpuid, function, index), Some(expected), "leaf {function:#x}.{index}");
        }
        assert_eq!(leaf(&cpuid, 0x4000_0003, 0), None, "Hyper-V's");
        assert_eq!(leaf(&cpuid, 0x4000_0100, 0), None, "KVM's, behind another hypervisor's");
        assert!(leaf(&cpuid, 0x4000_0000, 0).is_some());
    }
}
