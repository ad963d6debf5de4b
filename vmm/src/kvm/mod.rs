//! KVM as this monitor uses it: the device, and a VM with its memory and vCPUs.
//!
//! Unsafe code: giving host memory to KVM. Invariant: the memory lives as long as the VM;
//! [`Vm`] owns both.
#![allow(unsafe_code)]

pub mod exit;
pub mod kick;

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::memory::GuestRam;
use crate::memory::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// Why KVM or a VM of it can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` can't be opened.
    #[error(
        "/dev/kvm can't be opened: {0}; is the CPU's virtualization (VMX or SVM) enabled and the kvm module \
         loaded, and may this user read and write the file? `vmm doctor` tells more"
    )]
    Open(kvm_ioctls::Error),
    /// A capability is missing.
    #[error("this host's KVM lacks {0}; `vmm doctor` tells more")]
    Missing(&'static str),
    /// More vCPUs than the host allows.
    #[error("{asked} vCPUs were asked for, this host's KVM allows {limit}")]
    TooManyCpus {
        /// How many were asked for.
        asked: u8,
        /// How many KVM allows.
        limit: usize,
    },
    /// An ioctl failed.
    #[error("KVM: {what}: {source}")]
    Call {
        /// The ioctl's name.
        what: &'static str,
        /// What it returned.
        source: kvm_ioctls::Error,
    },
    /// A vCPU's `kvm_run` page can't be mapped.
    #[error("KVM: mapping a vCPU's kvm_run: {0}")]
    Kick(#[from] io::Error),
}

/// Adds the ioctl's name to its error.
pub(crate) trait KvmContext<T> {
    fn context(self, what: &'static str) -> Result<T, Error>;
}

impl<T> KvmContext<T> for Result<T, kvm_ioctls::Error> {
    fn context(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Call { what, source })
    }
}

/// A VM with its memory.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    // Before `ram`, so that KVM forgets the memory before it is unmapped.
    fd: VmFd,
    ram: Arc<GuestRam>,
}

/// The capabilities that the monitor needs, with their names for messages.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
];

impl Vm {
    /// Creates a VM with this memory, an in-kernel interrupt controller and a timer. It can have
    /// `cpus` vCPUs, which are not created yet.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(ram: Arc<GuestRam>, cpus: u8) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::Open)?;
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(Error::Missing(name));
        }
        let limit = kvm.get_max_vcpus();
        if usize::from(cpus) > limit {
            return Err(Error::TooManyCpus { asked: cpus, limit });
        }
        let fd = kvm.create_vm().context("KVM_CREATE_VM")?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        fd.set_tss_address(KVM_TSS).context("KVM_SET_TSS_ADDR")?;
        for region in regions(&ram) {
            set_region(&fd, region)?;
        }
        fd.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).context("KVM_CREATE_PIT2")?;
        Ok(Self { kvm, fd, ram })
    }

    /// Deletes the memory slot that begins at `guest` and sets it again. KVM then drops every
    /// translation into it, those in the vCPUs' TLBs included (KVM API 4.35: a deleted slot is gone
    /// when the call returns). The guest has no memory there in between, so no vCPU may run.
    ///
    /// # Errors
    /// [`Error::Call`]; if the second call fails, the guest has lost the memory.
    pub fn remake_slot(&self, guest: u64) -> Result<(), Error> {
        for region in regions(&self.ram).filter(|region| region.guest_phys_addr == guest) {
            set_region(&self.fd, kvm_userspace_memory_region { memory_size: 0, ..region })?;
            set_region(&self.fd, region)?;
        }
        Ok(())
    }

    /// The VM's memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The VM's file descriptor.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn vcpu(&self, id: u8) -> Result<VcpuFd, Error> {
        self.fd.create_vcpu(u64::from(id)).context("KVM_CREATE_VCPU")
    }

    /// The CPUID leaves that this host's KVM supports.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn supported_cpuid(&self) -> Result<CpuId, Error> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")
    }
}

/// The arena, new code and its constants are the monitor's: the guest only reads and executes them. A write
/// has no effect, as one to ROM (KVM API 4.35, `KVM_MEM_READONLY`; [`crate::kvm::exit::Exit::MemoryOut`]).
fn regions(ram: &GuestRam) -> impl Iterator<Item = kvm_userspace_memory_region> {
    (0..).zip(ram.slots()).map(|(slot, part)| kvm_userspace_memory_region {
        slot,
        flags: if part.read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: part.guest,
        memory_size: part.bytes,
        userspace_addr: part.host,
    })
}

/// `region` must come from [`regions`] of the VM's own memory.
fn set_region(fd: &VmFd, region: kvm_userspace_memory_region) -> Result<(), Error> {
    // SAFETY: the range is a mapping that the VM's `ram` owns. `Vm` drops `ram` after its
    // descriptor, and a vCPU's thread keeps its `Vm` as long as the vCPU's descriptor.
    unsafe { fd.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
}
