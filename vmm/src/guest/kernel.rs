//! The kernel of a running guest: where it is (KASLR), its page tables, and proof that it is the
//! kernel whose image was given.
//!
//! Linux puts the address of `entry_SYSCALL_64` into `MSR_LSTAR` when it sets up a CPU
//! (arch/x86/kernel/cpu/common.c, `syscall_init`), early in boot and before it starts other
//! CPUs. From it follows the slide; from the page tables in CR3 at that moment, the physical
//! address; from there the kernel's own top-level table, `init_top_pgt`, which is used from
//! then on, whichever process a vCPU is running.
//!
//! A kernel that was found may be replaced, by kexec or after a crash: [`GuestKernel::check`] tells
//! (`docs/replaced.md`).

use std::sync::Arc;

use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::image::KernelImage;
use patcher::image::profile::Capability;
use patcher::linux::view::missing;
use patcher::linux::{GuestMemory, Kernel, Modules};
use patcher::plan::refusal::Refusal;

use crate::guest::leaving::Announcements;
use crate::guest::located::Located;
use crate::memory::paging::{Mapping, PageTables, Pieces};
use crate::memory::{GuestRam, PAGE};

/// KASLR moves the kernel by multiples of this (`CONFIG_PHYSICAL_ALIGN`).
const SLIDE_ALIGN: u64 = 2 << 20;
/// And by less than this (`KERNEL_IMAGE_SIZE`).
const SLIDE_MAX: u64 = 1 << 30;

/// The kernel of a running guest.
#[derive(Debug, Clone)]
pub struct GuestKernel {
    image: Arc<KernelImage>,
    slide: u64,
    tables: PageTables,
    ram: Arc<GuestRam>,
    modules: Arc<Modules>,
    /// Where `SYSCALL` goes, and where that lies in memory.
    entry: (Gva, Gpa),
    /// `linux_banner`.
    banner: (Gva, Vec<u8>),
    /// The linker's build ID, if there is one.
    build_id: Option<(Gva, Vec<u8>)>,
    announcements: Announcements,
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
        let unmapped = |at: Gva| other(format!("{at} is not mapped"));
        let translate = |at: Gva| found.tables.translate_in(&ram, at).ok_or_else(|| unmapped(at));
        let entry = translate(found.syscall_entry)?.at;
        let banner = image.banner().ok_or_else(|| other("its image has no version banner".to_owned()))?;
        let build_id = image.build_id_in_memory().map(|(at, id)| (here.live(at), id.to_vec()));
        let mut kernel = Self {
            announcements: Announcements::of(&here),
            banner: (here.live(banner.at), banner.text().as_bytes().to_vec()),
            build_id,
            entry: (found.syscall_entry, entry),
            image: image.clone(),
            slide,
            tables: found.tables,
            ram: ram.clone(),
            modules: Arc::new(Modules::NONE),
        };
        kernel.tables.root = match here.symbol("init_top_pgt") {
            Ok(root) => translate(root)?.at,
            Err(_) => kernel.root_in_use()?,
        };
        kernel.check().map_err(other)?;
        Ok(kernel)
    }

    /// The kernel that vCPUs run, by what the registers of each tell (`None`: it runs no kernel yet).
    ///
    /// # Errors
    /// [`Refusal::GuestNotReady`] when none of them, or not all of them, run this image.
    pub fn run_by(
        image: &Arc<KernelImage>,
        vcpus: &[(VcpuId, Option<Located>)],
        ram: &Arc<GuestRam>,
    ) -> Result<Self, Refusal> {
        let running = || vcpus.iter().filter_map(|(vcpu, found)| Some((*vcpu, (*found)?)));
        let mut result = Err(Refusal::GuestNotReady { why: "it has not set up system calls yet".to_owned() });
        // With page-table isolation a process has tables of its own without the kernel's data; the kernel's
        // are one page before them (Linux arch/x86/include/asm/pgtable.h, `PTI_PGTABLE_SWITCH_BIT`).
        let kernels = |found: Located| {
            let root = Gpa(found.tables.root.0 & !PAGE);
            Located { tables: PageTables { root, ..found.tables }, ..found }
        };
        let candidates = running().filter(|(_, found)| found.has_syscalls());
        for found in candidates.flat_map(|(_, found)| [found, kernels(found)]) {
            result = Self::new(image.clone(), found, ram.clone());
            if result.is_ok() {
                break;
            }
        }
        let kernel = result?;
        match running().find(|(_, found)| !kernel.is_run_with(found.tables)) {
            Some((vcpu, _)) => Err(Refusal::GuestNotReady {
                why: format!("vCPU {} does not run the kernel that another vCPU is in", vcpu.0),
            }),
            None => Ok(kernel),
        }
    }

    /// Whether the guest still has this kernel, as far as memory tells: it is where it was found, and does
    /// not announce that another takes over.
    ///
    /// # Errors
    /// What tells otherwise.
    pub fn check(&self) -> Result<(), String> {
        let (entry, at) = self.entry;
        if self.translate(entry).map(|mapping| mapping.at) != Some(at) {
            return Err("its page tables do not lead to its system calls any more".to_owned());
        }
        for (at, expected) in std::iter::once(&self.banner).chain(&self.build_id) {
            let mut found = vec![0; expected.len()];
            self.read(*at, &mut found).map_err(|at| format!("{at} is not mapped"))?;
            if found != *expected {
                let (found, expected) = (String::from_utf8_lossy(&found), String::from_utf8_lossy(expected));
                return Err(format!("{found:?} is where {expected:?} should be"));
            }
        }
        self.announcements.made(self).map_or(Ok(()), |what| Err(what.to_owned()))
    }

    /// Whether [`GuestKernel::check`] notices every kernel that takes over before it runs. If not, the vCPUs
    /// have to be asked, too.
    #[must_use]
    pub fn announces_its_end(&self) -> bool {
        self.announcements.are_all()
    }

    /// Whether a vCPU that uses these page tables runs this kernel or a process of it: all of them have its
    /// system calls where it has them (with page-table isolation, too), and no other kernel's have.
    #[must_use]
    pub fn is_run_with(&self, tables: PageTables) -> bool {
        let (entry, at) = self.entry;
        tables.translate_in(&self.ram, entry).is_some_and(|mapping| mapping.at == at)
    }

    /// Where `linux_banner` lies in memory. The kernel does not write there once it runs, a kernel that
    /// takes its place does.
    #[must_use]
    pub fn sentinel(&self) -> Option<Gpa> {
        Some(self.translate(self.banner.0)?.at)
    }

    /// The top-level table in use, if it is the kernel's own. That lies in `.data` of the kernel (Linux
    /// arch/x86/kernel/head_64.S, `init_top_pgt`), and is in use when the boot CPU sets up system calls
    /// (arch/x86/mm/init.c, `init_mem_mapping`). The tables of early boot lie in init data, and those of
    /// processes in no part of the kernel.
    fn root_in_use(&self) -> Result<Gpa, Refusal> {
        let root = self.tables.root;
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

    /// Whether a page can be mapped without being executable: the kernel has mapped its read-only data so
    /// (Linux arch/x86/mm/init_64.c, `mark_rodata_ro`, right before init), or its direct mapping of all memory
    /// (`PAGE_KERNEL`). It does that only with EFER.NXE set.
    #[must_use]
    pub fn maps_no_execute(&self) -> bool {
        let is_marked = |at| self.tables.is_marked_no_execute(at, |entry| self.ram.load_u64(entry).ok());
        is_marked(self.banner.0) || self.in_direct_mapping(self.entry.1).is_some_and(is_marked)
    }

    /// Where the kernel maps physical memory (arch/x86/include/asm/page_64.h).
    fn in_direct_mapping(&self, at: Gpa) -> Option<Gva> {
        let mut base = [0; 8];
        self.read(self.kernel().symbol("page_offset_base").ok()?, &mut base).ok()?;
        u64::from_le_bytes(base).checked_add(at.0).map(Gva)
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
    pub(crate) fn ram(&self) -> &GuestRam {
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
