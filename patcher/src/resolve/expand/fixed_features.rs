//! CPU features whose alternatives go with something else that the kernel sets at boot: a control
//! register, page tables, or a format of saved state. Code for the one with the other does not work.

use crate::image::tables::Tables;

/// The features, by the kernel's names, and what each goes with.
const FIXED: &[(&str, &str)] = &[
    // Without STAC, CR4.SMAP faults at each access to user memory (SDM volume 3, 4.6.1).
    ("smap", "CR4.SMAP"),
    ("smep", "CR4.SMEP"),
    ("umip", "CR4.UMIP"),
    ("lass", "CR4.LASS"),
    // The entry code trusts the sign of the GS base only where user space can't set it
    // (Linux arch/x86/entry/entry_64.S, `paranoid_entry`).
    ("fsgsbase", "CR4.FSGSBASE"),
    ("pcid", "CR4.PCIDE"),
    ("pge", "CR4.PGE"),
    ("pku", "CR4.PKE"),
    ("ospke", "CR4.PKE"),
    ("la57", "CR4.LA57"),
    ("ibt", "CR4.CET"),
    ("user_shstk", "CR4.CET"),
    ("fred", "CR4.FRED"),
    ("nx", "EFER.NXE"),
    // Each writes another layout of the state that XRSTOR reads (SDM volume 1, 13.4).
    ("xsave", "the layout of saved FPU state"),
    ("xsavec", "the layout of saved FPU state"),
    ("xsaves", "the layout of saved FPU state"),
    ("pti", "a second set of page tables"),
    ("tdx_guest", "the hypervisor's interface"),
    ("vmmcall", "the hypervisor's interface"),
];
/// `X86_FEATURE_XENPV`, which has no name (Linux arch/x86/include/asm/cpufeatures.h).
const XENPV: u16 = 8 * 32 + 16;

/// What a feature goes with, if it is one of those.
pub(super) fn goes_with(tables: &Tables, feature: u16) -> Option<&'static str> {
    if feature == XENPV {
        return Some("the hypervisor's interface");
    }
    let is = |(name, _): &&(&str, &str)| tables.feature(name) == Some(feature);
    FIXED.iter().find(is).map(|(_, what)| *what)
}
