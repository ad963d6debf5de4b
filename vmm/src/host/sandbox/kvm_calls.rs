//! Numbers of KVM's ioctls (Linux include/uapi/linux/kvm.h), which KVM's crates keep to themselves.

use kvm_bindings::{
    kvm_guest_debug, kvm_mp_state, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events,
};

/// `KVMIO`, the type of all of them.
const KVMIO: u64 = 0xae;
/// Directions (include/uapi/asm-generic/ioctl.h).
const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

pub(super) const RUN: u64 = ioc(NONE, 0x80, 0);
pub(super) const GET_REGS: u64 = ioc(READ, 0x81, size_of::<kvm_regs>());
pub(super) const SET_REGS: u64 = ioc(WRITE, 0x82, size_of::<kvm_regs>());
pub(super) const GET_SREGS: u64 = ioc(READ, 0x83, size_of::<kvm_sregs>());
pub(super) const SET_SREGS: u64 = ioc(WRITE, 0x84, size_of::<kvm_sregs>());
pub(super) const GET_MSRS: u64 = ioc(READ | WRITE, 0x88, size_of::<kvm_msrs>());
pub(super) const GET_MP_STATE: u64 = ioc(READ, 0x98, size_of::<kvm_mp_state>());
pub(super) const SET_GUEST_DEBUG: u64 = ioc(WRITE, 0x9b, size_of::<kvm_guest_debug>());
pub(super) const GET_VCPU_EVENTS: u64 = ioc(READ, 0x9f, size_of::<kvm_vcpu_events>());
pub(super) const SET_VCPU_EVENTS: u64 = ioc(WRITE, 0xa0, size_of::<kvm_vcpu_events>());
pub(super) const KVMCLOCK_CTRL: u64 = ioc(NONE, 0xad, 0);
pub(super) const SET_USER_MEMORY_REGION: u64 = ioc(WRITE, 0x46, size_of::<kvm_userspace_memory_region>());
