//! Whether a kernel is about to be replaced by another: by kexec, or by the crash kernel after a panic.
//!
//! Both are announced in the kernel's own data long before control goes over, and stay announced:
//! `kexec_in_progress` is set before devices and other CPUs are shut down (Linux kernel/kexec_core.c,
//! `kernel_kexec`), `panic_cpu` before a crash kernel is started (`crash_kexec`; kernel/panic.c, `panic`).

use patcher::addr::Gva;
use patcher::linux::memory::read;
use patcher::linux::{GuestMemory, Kernel};
use patcher::plan::refusal::Refusal;

/// `panic_cpu` while no CPU panics (Linux include/linux/panic.h, `PANIC_CPU_INVALID`).
const NO_CPU: [u8; 4] = (-1i32).to_le_bytes();

/// Where a kernel announces that it leaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Announcements {
    kexec: Option<Gva>,
    panic: Option<Gva>,
    /// Nothing else can replace the kernel.
    are_all: bool,
}

impl Announcements {
    pub(super) fn of(kernel: &Kernel<'_>) -> Self {
        let symbol = |name| kernel.symbol(name).ok();
        let (kexec, panic) = (symbol("kexec_in_progress"), symbol("panic_cpu"));
        // Without CONFIG_KEXEC_CORE there is neither kexec nor a crash kernel. This is code, so every
        // kernel's table of symbols has it.
        let can_kexec = !matches!(kernel.symbol("machine_kexec"), Err(Refusal::UnknownSymbol { .. }));
        Self { kexec, panic, are_all: !can_kexec || kexec.is_some() && panic.is_some() }
    }

    /// Whether no kernel can take over without announcing it here.
    pub(super) fn are_all(&self) -> bool {
        self.are_all
    }

    /// What the kernel announces.
    pub(super) fn made(&self, memory: &dyn GuestMemory) -> Option<&'static str> {
        let holds = |at: Option<Gva>, quiet: &[u8]| {
            at.is_none_or(|at| read(memory, at, quiet.len()).is_ok_and(|found| found == quiet))
        };
        if !holds(self.kexec, &[0]) {
            return Some("it starts another kernel by kexec");
        }
        (!holds(self.panic, &NO_CPU)).then_some("it panics")
    }
}

#[cfg(test)]
mod tests {
    use patcher::image::{KernelImage, Symbols};
    use patcher::linux::Modules;

    use super::*;

    const KEXEC: u64 = 0x8100_1000;
    const PANIC: u64 = 0x8100_2000;

    /// The two words, as a kernel's memory.
    struct Words(u8, i32);

    impl GuestMemory for Words {
        fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
            match at.0 {
                KEXEC => into.copy_from_slice(&[self.0]),
                PANIC => into.copy_from_slice(&self.1.to_le_bytes()),
                _ => return Err(at),
            }
            Ok(())
        }
    }

    fn announcements(names: &[(u64, &str)]) -> Announcements {
        let symbols = names.iter().map(|(at, name)| (*at, b'T', *name));
        let image =
            KernelImage::from_parts("6.1".into(), Symbols::new(symbols).expect("few"), Gva(0x8100_0000));
        Announcements::of(&Kernel { image: &image, slide: 0, modules: &Modules::NONE })
    }

    const CODE: (u64, &str) = (0x8100_0000, "machine_kexec");
    const NAMES: [(u64, &str); 2] = [(KEXEC, "kexec_in_progress"), (PANIC, "panic_cpu")];

    #[test]
    fn a_kernel_says_when_it_leaves() {
        let all = announcements(&[CODE, NAMES[0], NAMES[1]]);
        assert!(all.are_all());
        assert_eq!(all.made(&Words(0, -1)), None);
        assert_eq!(all.made(&Words(1, -1)), Some("it starts another kernel by kexec"));
        assert_eq!(all.made(&Words(0, 0)), Some("it panics"), "the first CPU does");
    }

    #[test]
    fn a_kernel_that_can_leave_without_saying_so_is_told_from_one_that_cannot() {
        assert!(!announcements(&[CODE, NAMES[0]]).are_all());
        assert!(!announcements(&[CODE, NAMES[1]]).are_all());
        assert!(!announcements(&[CODE]).are_all());
        let without = announcements(&[(0x8100_0000, "_text")]);
        assert!(without.are_all() && without.made(&Words(1, 5)).is_none());
    }
}
