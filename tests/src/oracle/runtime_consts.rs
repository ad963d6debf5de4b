//! Immediates of the text that a kernel sets while it boots: addresses and sizes of tables that it
//! allocates then (Linux arch/x86/include/asm/runtime-const.h, since 6.11). Twins need not have the same.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use patcher::addr::{Gpa, Gva};
use patcher::image::{KernelFile, KernelImage, Loadable};

/// The kinds of immediates, and the bytes that each has.
const KINDS: [(&str, usize); 3] = [("ptr", 8), ("mask", 4), ("shift", 1)];
/// Where the link-time addresses of a kernel begin (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The immediates of a kernel, as ranges of its text. None, if it sets none.
pub(super) fn immediates(file: &[u8], image: &KernelImage) -> Result<Vec<Range<usize>>> {
    let tables: Vec<(Gva, Gva, usize)> = image
        .symbols()
        .iter()
        .filter_map(|(start, _, name)| {
            let rest = name.strip_prefix("__start_runtime_")?;
            let (_, length) = KINDS.into_iter().find(|(kind, _)| rest.starts_with(&format!("{kind}_")))?;
            Some((start, image.symbols().only(&format!("__stop_runtime_{rest}"))?, length))
        })
        .collect();
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let vmlinux = patcher::image::unpack(file)?;
    let KernelFile::Vmlinux(vmlinux) = KernelFile::open(&vmlinux)? else { anyhow::bail!("no vmlinux") };
    let loadable = Loadable::parse(&vmlinux)?;
    let word = |at: Gva| -> Option<[u8; 4]> {
        let at = Gpa(at.0.checked_sub(KERNEL_MAP)?);
        let offset = |start: Gpa| usize::try_from(at.0.checked_sub(start.0)?).ok();
        loadable.segments.iter().find_map(|segment| {
            let offset = offset(segment.at)?;
            segment.bytes.get(offset..offset + 4)?.try_into().ok()
        })
    };
    let end = image.symbols().only("_etext").context("_etext")?;
    let mut found = Vec::new();
    for (start, stop, length) in tables {
        for entry in (start.0..stop.0).step_by(4) {
            let distance = word(Gva(entry)).with_context(|| format!("no entry at {entry:#x}"))?;
            let at = entry.wrapping_add_signed(i32::from_le_bytes(distance).into());
            let offset = usize::try_from(at.wrapping_sub(image.text_base().0))?;
            ensure!(image.is_text(Gva(at)), "the entry at {entry:#x} leads to {at:#x}, which is no text");
            // What runs while the kernel boots only is not compared.
            if at < end.0 {
                found.push(offset..offset + length);
            }
        }
    }
    Ok(found)
}
