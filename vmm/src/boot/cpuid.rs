//! CPUID: the leaves that KVM supports, with each vCPU's place in the topology: one package, one
//! thread a core.

use std::arch::x86_64::__cpuid;

use kvm_bindings::CpuId;

/// Extended topology leaves (SDM volume 2, CPUID, leaves 0BH and 1FH).
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Domain types of these leaves, ECX bits 8 to 15.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Leaf 1, EDX bit 28: EBX bits 16 to 23 count the package's logical processors (SDM volume 2, CPUID).
const HTT: u32 = 1 << 28;
/// Leaf 1, ECX bit 31: running under a hypervisor (APM volume 3, E.3.2).
const HYPERVISOR: u32 = 1 << 31;

/// Whether instruction fetch on this machine's processor sees an aligned store as a whole: AMD and
/// Hygon guarantee it (APM volume 2, 7.6.1). Under a hypervisor the answer is no: its bit does not
/// tell virtualization from emulation, and emulators fetch byte by byte (QEMU's TCG does).
#[must_use]
pub fn shows_stores_as_a_whole() -> bool {
    let (vendor, features) = (__cpuid(0), __cpuid(1));
    let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    (vendor == b"AuthenticAMD" || vendor == b"HygonGenuine") && features.ecx & HYPERVISOR == 0
}

/// Fills in the fields that depend on the vCPU. `apic_id` is its index.
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
            // Deterministic cache parameters: EAX bits 14 to 25, no sharing between cores; bits 26 to
            // 31, core numbers in the package less one (SDM volume 2, CPUID, leaf 4).
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
            // The width of a core's number, and the core count less one (APM volume 3, E.4).
            0x8000_0008 => entry.ecx = core_bits << 12 | (count - 1),
            // APIC id, core and node (APM volume 3, E.4).
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}
