//! Numbers of KVM's ioctls (Linux include/uapi/linux/kvm.h), which KVM's crates keep to themselves.

use kvm_bindings::{
    kvm_guest_debug, kvm_mp_state, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events,
};
use libc::{_IO, _IOR, _IOW, _IOWR};

/// `KVMIO`, the type of all of them.
const KVMIO: u32 = 0xae;

pub(super) const RUN: u64 = _IO(KVMIO, 0x80);
pub(super) const GET_REGS: u64 = _IOR::<kvm_regs>(KVMIO, 0x81);
pub(super) const SET_REGS: u64 = _IOW::<kvm_regs>(KVMIO, 0x82);
pub(super) const GET_SREGS: u64 = _IOR::<kvm_sregs>(KVMIO, 0x83);
pub(super) const SET_SREGS: u64 = _IOW::<kvm_sregs>(KVMIO, 0x84);
pub(super) const GET_MSRS: u64 = _IOWR::<kvm_msrs>(KVMIO, 0x88);
pub(super) const GET_MP_STATE: u64 = _IOR::<kvm_mp_state>(KVMIO, 0x98);
pub(super) const SET_GUEST_DEBUG: u64 = _IOW::<kvm_guest_debug>(KVMIO, 0x9b);
pub(super) const GET_VCPU_EVENTS: u64 = _IOR::<kvm_vcpu_events>(KVMIO, 0x9f);
pub(super) const SET_VCPU_EVENTS: u64 = _IOW::<kvm_vcpu_events>(KVMIO, 0xa0);
pub(super) const KVMCLOCK_CTRL: u64 = _IO(KVMIO, 0xad);
pub(super) const SET_USER_MEMORY_REGION: u64 = _IOW::<kvm_userspace_memory_region>(KVMIO, 0x46);
