//! CPUID: what KVM supports, with each vCPU's place in the topology filled in: one package,
//! one thread a core.

use std::arch::x86_64::__cpuid;

use kvm_bindings::CpuId;

/// Topology leaves (SDM volume 2, CPUID).
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Leaf 1: EDX bit 28, more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 1: ECX bit 31, running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;

/// Whether this machine's processor promises that an aligned store to code is seen as a
/// whole: AMD's and Hygon's do (APM volume 2, 7.6.1). Not if it is itself emulated, which the
/// hypervisor bit can't tell from virtualized: emulators fetch byte by byte (QEMU's TCG does).
#[must_use]
pub fn shows_stores_as_a_whole() -> bool {
    let (vendor, features) = (__cpuid(0), __cpuid(1));
    let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    (vendor == b"AuthenticAMD" || vendor == b"HygonGenuine") && features.ecx & HYPERVISOR == 0
}

/// Fills in what depends on the vCPU. `apic_id` is its index.
pub fn place(cpuid: &mut CpuId, apic_id: u8, cpus: u8) {
    let (id, count) = (u32::from(apic_id), u32::from(cpus));
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
                entry.ecx |= HYPERVISOR;
                if cpus > 1 {
                    entry.edx |= HTT;
                }
            }
            // Deterministic cache parameters: cores in the package, none sharing beyond it.
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | ((1 << core_bits) - 1) << 26;
            }
            leaf if TOPOLOGY.contains(&leaf) => {
                (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                    0 => (0, 1, LEVEL_THREAD << 8),
                    1 => (core_bits, count, 1 | LEVEL_CORE << 8),
                    other => (0, 0, other),
                };
                entry.edx = id;
            }
            // AMD (APM volume 3, E.4): core count and the width of a core's number.
            0x8000_0008 => entry.ecx = core_bits << 12 | (count - 1),
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}
