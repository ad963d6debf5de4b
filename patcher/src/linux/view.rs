//! A running kernel: its image, moved by KASLR, and its loaded modules.

use crate::addr::Gva;
use crate::image::KernelImage;
use crate::image::profile::{Capability, Lacking};
use crate::image::symbols::Function;
use crate::image::tables::{JumpEntry, StaticCallSite};
use crate::insn;
use crate::linux::memory::{GuestMemory, read_u32};
use crate::linux::modules::{Module, Modules};
use crate::plan::refusal::Refusal;

/// A refusal for want of a capability.
#[must_use]
pub fn missing(Lacking { capability, reason }: Lacking) -> Refusal {
    Refusal::MissingCapability { capability: capability.name(), reason }
}

/// A kernel image and where it runs.
#[derive(Debug, Clone, Copy)]
pub struct Kernel<'a> {
    /// The image.
    pub image: &'a KernelImage,
    /// How far above its link-time address it runs (KASLR); a multiple of 2 MiB.
    pub slide: u64,
    /// Its loaded modules.
    pub modules: &'a Modules,
}

impl<'a> Kernel<'a> {
    /// The live address of a link-time address.
    #[must_use]
    pub fn live(&self, linked: Gva) -> Gva {
        Gva(linked.0.wrapping_add(self.slide))
    }

    /// The link-time address of a live address.
    #[must_use]
    pub fn linked(&self, live: Gva) -> Gva {
        Gva(live.0.wrapping_sub(self.slide))
    }

    pub(crate) fn module_at(&self, at: Gva) -> Option<&'a Module> {
        self.modules.known().iter().find(|module| module.text.contains(&at))
    }

    /// The function around a live address.
    #[must_use]
    pub fn function_at(&self, at: Gva) -> Option<Function<'a>> {
        if let Some(module) = self.module_at(at) {
            let function = module.symbols.function_at(at)?;
            return Some(Function { end: function.end.min(module.text.end), ..function });
        }
        let linked = self.linked(at);
        let function = self.image.symbols().function_at(linked).filter(|_| self.image.is_text(linked))?;
        Some(Function { start: self.live(function.start), end: self.live(function.end), ..function })
    }

    /// Where a per-CPU variable is, counted from a CPU's base in `__per_cpu_offset`. `None` if there is
    /// no such variable, or the kernel links them in a way that is not known.
    ///
    /// Up to 6.14 the symbols are such distances themselves (`__per_cpu_start` is 0, and KASLR does not
    /// move them); since 6.15 they are addresses in the image, which it does (Linux `9d7de2aa8b41`).
    #[must_use]
    pub fn per_cpu(&self, name: &str) -> Option<u64> {
        let symbols = self.image.symbols();
        let at = symbols.only(name)?;
        match symbols.only("__per_cpu_start")? {
            Gva(0) => Some(at.0),
            start if start >= self.image.text_base() => Some(self.live(at).0),
            _ => None,
        }
    }

    /// Where execution arrives behind `at` and before `end`, other than by a branch of the function
    /// itself, as the image or the module says: from where, to where.
    #[must_use]
    pub fn landing_inside(&self, at: Gva, end: Gva) -> Option<(Gva, Gva)> {
        if let Some(module) = self.module_at(at) {
            return module.landings.inside(at, end);
        }
        let (from, to) = self.image.landings().inside(self.linked(at), self.linked(end))?;
        Some((self.live(from), self.live(to)))
    }

    /// Whether an address is in init memory, which is freed once the kernel is up.
    #[must_use]
    pub fn is_init(&self, at: Gva) -> bool {
        self.image.landmarks().init.as_ref().is_some_and(|init| init.contains(&self.linked(at)))
    }

    /// Whether the five bytes at an address are a function's fentry call, or the NOP in its place.
    #[must_use]
    pub fn is_fentry(&self, at: Gva) -> bool {
        self.image.tables().is_fentry(self.linked(at))
    }

    /// Whether the kernel replaces the instruction at an address by another of the same length while
    /// it runs, according to the image: a fentry call, a static key's jump, a static call. So no other
    /// instruction begins inside, and no branch goes there. (Tables of modules are in guest memory,
    /// which is not trusted.)
    #[must_use]
    pub fn is_patched_by_itself(&self, at: Gva) -> bool {
        self.is_fentry(at) || self.image.tables().is_switched(self.linked(at))
    }

    /// Whether the instruction at an address is one that the kernel makes a call, though it may be a NOP
    /// now: a static call, or a function's fentry call. A task may still be where it led to.
    #[must_use]
    pub fn may_call(&self, at: Gva) -> bool {
        let Some(module) = self.module_at(at) else {
            return self.is_fentry(at) || self.image.tables().is_static_call(self.linked(at));
        };
        // Its list of fentry calls is not read; they are at or behind the marker of indirect branches.
        let is_entry = |function: Function<'_>| {
            [0, insn::MARKER].map(|skip| function.start.plus(skip)).contains(&Some(at))
        };
        module.static_call_sites.iter().any(|site| site.code == at)
            || module.symbols.function_at(at).is_some_and(is_entry)
    }

    /// Whether compilers were told to make no jump tables: a kernel with thunks for indirect branches is
    /// built with `-fno-jump-tables` (Linux arch/x86/Makefile, `CONFIG_RETPOLINE`, `CONFIG_X86_KERNEL_IBT`),
    /// and its modules with the same flags.
    #[must_use]
    pub fn has_thunks(&self) -> bool {
        self.image.symbols().only("__x86_indirect_thunk_rax").is_some()
    }

    /// Whether the instruction at an address is in the exception table. Yes, if that is not known.
    #[must_use]
    pub fn may_fault(&self, at: Gva) -> bool {
        if let Some(module) = self.module_at(at) {
            return module.exceptions.binary_search(&at).is_ok();
        }
        let own = (self.image.text_base()..self.image.end()).contains(&self.linked(at));
        let handled = self.image.tables().exceptions.as_ref().filter(|_| own);
        handled.is_none_or(|handled| handled.binary_search(&self.linked(at)).is_ok())
    }

    /// All jumps that static keys switch, those of modules included.
    ///
    /// # Errors
    /// As [`Modules::all`].
    pub fn jump_entries(&self) -> Result<impl Iterator<Item = JumpEntry>, Refusal> {
        let live = |entry: &JumpEntry| JumpEntry {
            code: self.live(entry.code),
            target: self.live(entry.target),
            key: self.live(entry.key),
            ..*entry
        };
        let own = self.image.tables().jump_entries.iter().flatten().map(live);
        let modules = self.modules.all()?.iter();
        Ok(own.chain(modules.flat_map(|module| module.jump_entries.iter().copied())))
    }

    /// All calls that can be retargeted, those of modules included.
    ///
    /// # Errors
    /// As [`Modules::all`].
    pub fn static_call_sites(&self) -> Result<impl Iterator<Item = StaticCallSite>, Refusal> {
        let live = |site: &StaticCallSite| StaticCallSite {
            code: self.live(site.code),
            key: self.live(site.key),
            ..*site
        };
        let own = self.image.tables().static_call_sites.iter().flatten().map(live);
        let modules = self.modules.all()?.iter();
        Ok(own.chain(modules.flat_map(|module| module.static_call_sites.iter().copied())))
    }

    /// The address of the kernel's record of a CPU feature: bit `feature % 32` of the four bytes there.
    ///
    /// # Errors
    /// [`Refusal::MissingCapability`].
    pub fn feature_word(&self, feature: u16) -> Result<Gva, Refusal> {
        self.image.profile().require(Capability::CpuFeatures).map_err(missing)?;
        let offset = self.image.offsets().capability;
        let offset = offset.ok_or(Refusal::UnknownLayout { what: "struct cpuinfo_x86" })?;
        let start = self.symbol("boot_cpu_data")?;
        Ok(Gva(start.0.wrapping_add(offset + 4 * u64::from(feature / 32))))
    }

    /// Whether the kernel has a CPU feature's bit set.
    ///
    /// # Errors
    /// As [`Kernel::feature_word`].
    pub fn has_feature(&self, text: &dyn GuestMemory, feature: u16) -> Result<bool, Refusal> {
        Ok(read_u32(text, self.feature_word(feature)?)? >> (feature % 32) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Symbols;

    #[test]
    fn per_cpu_symbols_are_distances_or_addresses() {
        const TEXT: u64 = 0xffff_ffff_8100_0000;
        let place = |start: u64| {
            let symbols = [(start, b'D', "__per_cpu_start"), (start + 0x20, b'D', "current_task")];
            let symbols = Symbols::new(symbols.into_iter()).expect("a table");
            let image = KernelImage::from_parts("x".to_owned(), symbols, Gva(TEXT));
            let kernel = Kernel { image: &image, slide: 0x20_0000, modules: &Modules::NONE };
            assert_eq!(kernel.per_cpu("pcpu_hot"), None);
            kernel.per_cpu("current_task")
        };
        assert_eq!(place(0), Some(0x20), "up to 6.14: KASLR does not move them");
        assert_eq!(place(TEXT + 0x100), Some(TEXT + 0x20_0120), "since 6.15: it does");
        assert_eq!(place(0x1000), None, "neither is known");
    }

    #[test]
    fn data_is_not_text_whatever_its_letter() {
        const TEXT: u64 = 0xffff_ffff_8100_0000;
        let symbols =
            [(TEXT, b'T', "_text"), (TEXT + 0x100, b'T', "_etext"), (TEXT + 0x1000, b'T', "modules")];
        let symbols = Symbols::new(symbols.into_iter()).expect("a table");
        let image = KernelImage::from_parts("x".to_owned(), symbols, Gva(TEXT));
        let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        assert_eq!(kernel.function_at(Gva(TEXT + 0x10)).map(|function| function.name), Some("_text"));
        assert_eq!(kernel.function_at(Gva(TEXT + 0x1008)), None);
    }
}
