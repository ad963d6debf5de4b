//! The header of a bzImage (Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").

use crate::image::error::Error;

/// `HdrS` is at this offset.
const MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
/// The fields that are read end here: `payload_length`.
const END: usize = 0x250;
/// The first protocol with a payload, 2.08.
const PROTOCOL_2_08: u16 = 0x208;
/// The first protocol with `xloadflags`, 2.12.
const PROTOCOL_2_12: u16 = 0x20c;
/// `LOADED_HIGH` of `loadflags`: a bzImage, not a zImage.
const LOADED_HIGH: u8 = 1;
/// `XLF_KERNEL_64` of `xloadflags`: the kernel has a 64-bit entry.
const KERNEL_64: u8 = 1;

/// Whether it has the header.
pub(super) fn is(file: &[u8]) -> bool {
    file.get(MAGIC.0..).is_some_and(|rest| rest.starts_with(MAGIC.1))
}

/// The compressed kernel in a file that [`is`] one.
///
/// # Errors
/// When it is truncated, or has the header but is no kernel for x86-64.
pub(super) fn payload(file: &[u8]) -> Result<&[u8], Error> {
    let truncated = |stated: u64| Error::Truncated { what: "bzImage", bytes: file.len() as u64, stated };
    let header = file.first_chunk::<END>().ok_or_else(|| truncated(END as u64))?;
    let u32_at = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte])));
    let other = |what: &'static str| Err(Error::Other(what.into()));

    let protocol = u16::from_le_bytes([header[0x206], header[0x207]]);
    if protocol < PROTOCOL_2_08 {
        return Err(Error::Other(
            format!(
                "a kernel with boot protocol {}.{:02}; 2.08 (Linux 2.6.26) and later can be used",
                protocol >> 8,
                protocol & 0xff
            )
            .into(),
        ));
    }
    if header[0x211] & LOADED_HIGH == 0 {
        return other("a zImage, which is loaded below 1 MiB in 16-bit mode; build a bzImage");
    }
    if u32_at(0x24c) == 0 {
        return other(
            "no Linux kernel: it has Linux's boot header, but no compressed kernel (payload_length is 0); \
             memtest86+ and other programs are made so",
        );
    }
    if protocol >= PROTOCOL_2_12 && header[0x236] & KERNEL_64 == 0 {
        return other("a 32-bit x86 kernel (without XLF_KERNEL_64); guests are x86-64");
    }
    // Boot sector, setup sectors (0 means 4), and `syssize` units of 16 bytes.
    let setup = match header[0x1f1] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let protected = (setup + 1) * 512;
    let (start, size) = (protected + u32_at(0x248), u32_at(0x24c));
    let stated = (protected + 16 * u32_at(0x1f4)).max(start + size);
    if stated > file.len() as u64 {
        return Err(truncated(stated));
    }
    let range = usize::try_from(start).ok().zip(usize::try_from(start + size).ok());
    range.and_then(|(start, end)| file.get(start..end)).ok_or_else(|| truncated(start + size))
}

/// The release that it states (`kernel_version`), up to the first space; `None` if it is no bzImage.
pub(super) fn release(file: &[u8]) -> Option<&str> {
    let offset = u16::from_le_bytes(*file.get(0x20e..).filter(|_| is(file))?.first_chunk()?);
    let text = file.get(usize::from(offset) + 0x200..)?;
    let end = text.iter().take(256).position(|&b| b == b' ' || b == 0)?;
    std::str::from_utf8(&text[..end]).ok().filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of protocol 2.15 and what follows it: a payload of 64 bytes at the beginning of the
    /// protected-mode part, which has 80.
    fn file(change: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut file = vec![0; 1024 + 80];
        file[0x1f1] = 1;
        file[0x1f4] = 5;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&[0x0f, 2]);
        (file[0x211], file[0x236], file[0x24c]) = (1, 1, 64);
        change(&mut file);
        file
    }

    fn says(file: &[u8], expected: &str) {
        let error = payload(file).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn the_payload_is_found_and_what_is_none_is_named() {
        assert_eq!(payload(&file(|_| ())).map(<[u8]>::len), Ok(64));
        says(&file(|f| f[0x206] = 7), "boot protocol 2.07");
        says(&file(|f| f[0x211] = 0), "a zImage");
        says(&file(|f| f[0x236] = 0), "a 32-bit x86 kernel");
        says(&file(|f| f[0x24c] = 0), "memtest86+");
        says(&file(|f| (f[0x236], f[0x24c]) = (0, 0)), "memtest86+");
    }

    #[test]
    fn a_truncated_one_is_told_with_both_sizes() {
        let whole = file(|_| ());
        says(&whole[..whole.len() - 1], "it has 1103 bytes, and its headers describe 1104");
        says(&whole[..0x210], "it has 528 bytes, and its headers describe 592");
        says(&file(|f| f[0x24f] = 0xff), "it has 1104 bytes, and its headers describe 4278191168");
        says(&file(|f| f[0x1f7] = 0xff), "it has 1104 bytes");
    }
}
