//! The kernel of a running guest: where it is (KASLR), its page tables, and proof that it is the
//! kernel whose image was given.
//!
//! Linux puts the address of `entry_SYSCALL_64` into `MSR_LSTAR` when it sets up a CPU
//! (arch/x86/kernel/cpu/common.c, `syscall_init`), early in boot and before it starts other
//! CPUs. From it follows the slide; from the page tables in CR3 at that moment, the physical
//! address; from there the kernel's own top-level table, `init_top_pgt`, which is used from
//! then on, whichever process a vCPU is running.

use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use patcher::addr::{Gpa, Gva};
use patcher::image::KernelImage;
use patcher::image::profile::Capability;
use patcher::linux::view::missing;
use patcher::linux::{GuestMemory, Kernel, Modules};
use patcher::plan::refusal::Refusal;

use crate::memory::GuestRam;
use crate::memory::paging::{Mapping, PageTables, Pieces};
use crate::x86::MSR_LSTAR;

/// Kernel text lies in the upper half.
const UPPER_HALF: u64 = 1 << 63;
/// KASLR moves the kernel by multiples of this (`CONFIG_PHYSICAL_ALIGN`).
const SLIDE_ALIGN: u64 = 2 << 20;
/// And by less than this (`KERNEL_IMAGE_SIZE`).
const SLIDE_MAX: u64 = 1 << 30;

/// Bits 12 to 51 of CR3 (SDM volume 3, table 4-12).
const ROOT: u64 = 0x000f_ffff_ffff_f000;

/// What a vCPU's registers tell about the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    /// Where `SYSCALL` goes.
    pub syscall_entry: Gva,
    /// The page tables in use at that moment.
    pub tables: PageTables,
}

/// Looks at a vCPU that is out of `KVM_RUN`. `None` as long as its kernel has not set up
/// system calls.
pub fn look(vcpu: &VcpuFd) -> Option<Located> {
    let entry = kvm_msr_entry { index: MSR_LSTAR, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    vcpu.get_msrs(&mut msrs).ok()?;
    let syscall_entry = msrs.as_slice().first()?.data;
    if syscall_entry & UPPER_HALF == 0 {
        return None;
    }
    let sregs = vcpu.get_sregs().ok()?;
    Some(Located { syscall_entry: Gva(syscall_entry), tables: PageTables::of(&sregs) })
}

/// The kernel of a running guest.
#[derive(Debug, Clone)]
pub struct GuestKernel {
    image: Arc<KernelImage>,
    slide: u64,
    tables: PageTables,
    ram: Arc<GuestRam>,
    modules: Arc<Modules>,
}

impl GuestKernel {
    /// Ties an image to the guest that runs it.
    ///
    /// # Errors
    /// [`Refusal::GuestNotReady`] when the guest runs something else.
    pub fn new(image: Arc<KernelImage>, found: Located, ram: Arc<GuestRam>) -> Result<Self, Refusal> {
        let other = |why: String| Refusal::GuestNotReady { why };
        image.profile().require(Capability::Location).map_err(missing)?;
        let at_link = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        let slide = found.syscall_entry.0.wrapping_sub(at_link.symbol("entry_SYSCALL_64")?.0);
        if !slide.is_multiple_of(SLIDE_ALIGN) || slide >= SLIDE_MAX {
            return Err(other(format!(
                "its system calls enter at {}, which fits no place of {}",
                found.syscall_entry,
                image.release()
            )));
        }
        let here = Kernel { image: &image, slide, modules: &Modules::NONE };
        let modules = Arc::new(Modules::NONE);
        let mut kernel = Self { image: image.clone(), slide, tables: found.tables, ram, modules };
        kernel.tables.root = match here.symbol("init_top_pgt") {
            Ok(root) => kernel.translate(root).ok_or_else(|| other(format!("{root} is not mapped")))?.at,
            Err(_) => kernel.root_in_use()?,
        };
        let banner = image.banner().ok_or_else(|| other("its image has no version banner".to_owned()))?;
        kernel.compare(here.live(banner.at), banner.text().as_bytes())?;
        if let Some((at, build_id)) = image.build_id_in_memory() {
            kernel.compare(here.live(at), build_id)?;
        }
        Ok(kernel)
    }

    /// The top-level table in use, if it is the kernel's own. That lies in `.data` of the kernel (Linux
    /// arch/x86/kernel/head_64.S, `init_top_pgt`), and is in use when the boot CPU sets up system calls
    /// (arch/x86/mm/init.c, `init_mem_mapping`). The tables of early boot lie in init data, and those of
    /// processes in no part of the kernel.
    fn root_in_use(&self) -> Result<Gpa, Refusal> {
        let root = Gpa(self.tables.root.0 & ROOT);
        let data = self.image.data().unwrap_or(Gva(0)..Gva(0));
        let live = self.kernel().live(data.start);
        let start = self.translate(live).map(|mapping| mapping.at);
        let size = data.end.0.wrapping_sub(data.start.0);
        let is_inside = start.is_some_and(|start| root.0.checked_sub(start.0).is_some_and(|at| at < size));
        if is_inside {
            return Ok(root);
        }
        let why = format!(
            "the page tables at {root} were in use when it was found, and they are not the kernel's own; \
             use a kernel with CONFIG_KALLSYMS_ALL"
        );
        Err(Refusal::GuestNotReady { why })
    }

    /// Refuses a kernel that does not have these bytes of its image.
    fn compare(&self, at: Gva, expected: &[u8]) -> Result<(), Refusal> {
        let other = |why: String| Err(Refusal::GuestNotReady { why });
        let mut found = vec![0; expected.len()];
        if let Err(at) = self.read(at, &mut found) {
            return other(format!("{at} is not mapped"));
        }
        if found != expected {
            let (found, expected) = (String::from_utf8_lossy(&found), String::from_utf8_lossy(expected));
            return other(format!("{found:?} is where {expected:?} should be"));
        }
        Ok(())
    }

    /// The image with its place.
    #[must_use]
    pub fn kernel(&self) -> Kernel<'_> {
        Kernel { image: &self.image, slide: self.slide, modules: &self.modules }
    }

    /// The same kernel with these modules loaded.
    #[must_use]
    pub(super) fn with(&self, modules: Modules) -> Self {
        Self { modules: Arc::new(modules), ..self.clone() }
    }

    /// Where `_text` is.
    #[must_use]
    pub fn base(&self) -> Gva {
        Gva(self.image.text_base().0.wrapping_add(self.slide))
    }

    /// Translates an address through the kernel's own page tables.
    #[must_use]
    pub fn translate(&self, at: Gva) -> Option<Mapping> {
        self.tables.translate_in(&self.ram, at)
    }

    /// The page-directory entry for an address: where it lies, and what it holds.
    pub fn directory_entry(&self, at: Gva) -> Option<(Gpa, u64)> {
        let load = |entry| self.ram.load_u64(entry).ok();
        let entry = self.tables.directory_entry(at, load)?;
        Some((entry, load(entry)?))
    }

    /// Sets a page-table entry that has the value `old`.
    ///
    /// # Errors
    /// When it has another, or is not in RAM; nothing was written then.
    pub fn replace_entry(&self, at: Gpa, old: u64, new: u64) -> Result<(), String> {
        let (old, new) = (old.to_le_bytes(), new.to_le_bytes());
        let replaced = self.ram.exchange(at, &old, &new).map_err(|error| error.to_string())?;
        replaced.map_err(|_| format!("the page-table entry at {at} was changed by the guest"))
    }

    /// The guest's RAM.
    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The physical pieces of a range, all of them, or the first address that has none.
    pub(crate) fn pieces(&self, at: Gva, length: usize) -> Result<Pieces, Gva> {
        self.tables.pieces_in(&self.ram, at, length)
    }
}

impl GuestMemory for GuestKernel {
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        self.tables.read_in(&self.ram, at, into)
    }
}
