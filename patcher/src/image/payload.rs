//! The compressed payload of a bzImage (Linux Documentation/arch/x86/boot.rst: `payload_offset`,
//! `payload_length`).

use std::borrow::Cow;
use std::io::Read;

use crate::image::error::Error;
use crate::image::lzop;

/// Largest uncompressed kernel, in bytes. More means a broken or hostile file.
const MAX_KERNEL: u64 = 1 << 30;
/// Largest dictionary of xz and lzma. The kernel's build uses at most 32 MiB (scripts/xz_wrap.sh); a
/// hostile file may ask for 4 GiB.
const MAX_DICTIONARY_KIB: u32 = 128 << 10;

const GZIP: &[u8] = &[0x1f, 0x8b];
const BZIP2: &[u8] = b"BZh";
/// lzma has no magic number: the usual parameters, and the low bytes of the dictionary size.
const LZMA: &[u8] = &[0x5d, 0, 0];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// The vmlinux inside a bzImage; any other file is returned as it is.
///
/// # Errors
/// When the payload is truncated or does not decompress.
pub fn unpack(file: &[u8]) -> Result<Cow<'_, [u8]>, Error> {
    Ok(extract(file)?.map_or(Cow::Borrowed(file), |(_, vmlinux)| Cow::Owned(vmlinux)))
}

/// Returns the vmlinux inside a bzImage and how it was compressed, or `None` if `file` is no
/// bzImage.
pub(super) fn extract(file: &[u8]) -> Result<Option<(&'static str, Vec<u8>)>, Error> {
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Ok(None);
    }
    let truncated = || Error::Truncated { what: "bzImage" };
    let u32_at = |at: usize| {
        let bytes = file.get(at..at + 4).and_then(|b| b.try_into().ok()).ok_or_else(truncated)?;
        Ok::<_, Error>(u32::from_le_bytes(bytes) as usize)
    };
    let sectors = match *file.get(0x1f1).ok_or_else(truncated)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + u32_at(0x248)?;
    let payload = file.get(start..start + u32_at(0x24c)?).ok_or_else(truncated)?;
    decompress(payload).map(Some)
}

/// The release a bzImage states in its header (`kernel_version`), up to the first space.
pub(super) fn header_release(file: &[u8]) -> Option<&str> {
    if file.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes(file.get(0x20e..0x210)?.try_into().ok()?);
    let text = file.get(usize::from(offset) + 0x200..)?;
    let end = text.iter().take(256).position(|&b| b == b' ' || b == 0)?;
    std::str::from_utf8(&text[..end]).ok().filter(|text| !text.is_empty())
}

fn decompress(payload: &[u8]) -> Result<(&'static str, Vec<u8>), Error> {
    // The last four bytes are the uncompressed size, added by the kernel's build for every
    // method (scripts/Makefile.lib, size_append); gzip's own trailer ends with the same.
    let (data, size) = payload.split_last_chunk::<4>().ok_or(Error::Truncated { what: "bzImage" })?;
    let size = u64::from(u32::from_le_bytes(*size));
    if size > MAX_KERNEL {
        return Err(Error::TooLarge { bytes: size });
    }
    let is = |magic: &[u8]| payload.starts_with(magic);
    let (method, kernel) = if is(GZIP) {
        ("gzip", read(flate2::read::GzDecoder::new(payload), size))
    } else if is(BZIP2) {
        ("bzip2", read(bzip2::read::BzDecoder::new(data), size))
    } else if is(LZMA) {
        let decoder = lzma_rust2::LzmaReader::new_mem_limit(data, MAX_DICTIONARY_KIB, None);
        ("lzma", decoder.map_err(|e| e.to_string()).and_then(|decoder| read(decoder, size)))
    } else if is(XZ) {
        ("xz", read(lzma_rust2::XzReader::new_mem_limit(data, false, MAX_DICTIONARY_KIB), size))
    } else if is(lzop::MAGIC) {
        (
            "lzo",
            usize::try_from(size).map_err(|e| e.to_string()).and_then(|size| lzop::decompress(data, size)),
        )
    } else if is(LZ4_LEGACY) {
        ("lz4", read(lz4_flex::frame::FrameDecoder::new(data), size))
    } else if is(ZSTD) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(data);
        ("zstd", decoder.map_err(|e| e.to_string()).and_then(|decoder| read(decoder, size)))
    } else {
        return Err(Error::Compression { magic: payload.iter().take(6).copied().collect() });
    };
    let fail = |what| Error::Decompress { method, what };
    let kernel = kernel.map_err(fail)?;
    if kernel.len() as u64 != size {
        return Err(fail(format!("the payload states {size} bytes but holds {}", kernel.len())));
    }
    Ok((method, kernel))
}

/// Reads at most one byte more than stated, so that a wrong size is noticed and a decompression bomb
/// stops early.
fn read(decoder: impl Read, size: u64) -> Result<Vec<u8>, String> {
    let mut kernel = Vec::new();
    decoder.take(size + 1).read_to_end(&mut kernel).map_err(|e| e.to_string())?;
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text below as the usual tools compress it, with the kernel's options: `gzip -n -9`,
    /// `bzip2 -9`, `xz --format=lzma -9`, `xz --check=crc32 --x86 --lzma2=dict=32MiB`,
    /// `lzop -9`, `lz4 -l -9`, `zstd -19`.
    const FILES: [(&str, &str); 7] = [
        (
            "gzip",
            "1f8b08000000000002034b4eccc95130b05248b550303080236b856490b8210e71231ce2c638c44d \
             70889be21037c3216e8e43dc0287b8252e7fe1f430161f03002715610222010000",
        ),
        (
            "bzip2",
            "425a68393141592653598c7d6133000079190040007ff82a0420005424a6803468054a6a006469d1 \
             28864982609a10d826f6a25956932490d141b3a7df22300bc09c05d05e05f1772453850908c7d613 \
             30",
        ),
        (
            "lzma",
            "5d00000004ffffffffffffffff00319849ee37625cdcd550cda08f10fe40b29119e5ae2c39c6c494 \
             d10c3987dad1cbe2522e12d9bcbb9aa5e75d13404f77f2ab24dfffd6ff6c00",
        ),
        (
            "xz",
            "fd377a585a0000016922de360201040021011a0001c980b3e0012100345d00319849ee37625cdcd5 \
             50cda08f10fe40b29119e5ae2c39c6c494d10c3987dad1cbe2522e12d9bcbb9aa5e75d13404f77a2 \
             52e000002715610200014ca202000000b71a211b3e300d8b020000000001595a",
        ),
        (
            "lzo",
            "894c5a4f000d0a1a0a104020a0094003090300000d000000006b014a85000000000028b902b10000 \
             012200000042904d3f791e63616c6c20303a206538203030270a003b209d0231355d0032355d0033 \
             355d0034355d0035355d0036355d0037355d0038355d0039365c0337c00331c40311000000000000",
        ),
        (
            "lz4",
            "02214c184f000000d563616c6c20303a2065382030300300213b2018001f311800041f321800041f \
             331800041f341800041f351800041f361800041f371800041f381800041f39d800050ff100060af2 \
             00502030303b20",
        ),
        (
            "zstd",
            "28b52ffd0468dd0100f863616c6c20303a2065382030303b2063616c6c2031323334353637383931 \
             310ca810d8593607800303eb1096848fc4f038ccd2c93d6d9b822f0369f0f63b",
        ),
    ];

    fn text() -> Vec<u8> {
        (0..12).flat_map(|i| format!("call {i}: e8 00 00 00 00; ").into_bytes()).collect()
    }

    fn payload(method: &str, file: &str, size: u32) -> Vec<u8> {
        let mut payload = hex::decode(file.replace(' ', "")).expect("hex");
        if method != "gzip" {
            payload.extend(size.to_le_bytes());
        }
        payload
    }

    #[test]
    fn every_method_of_the_kernel_is_decompressed() {
        let size = u32::try_from(text().len()).expect("small");
        for (method, file) in FILES {
            assert_eq!(decompress(&payload(method, file, size)), Ok((method, text())));
        }
    }

    #[test]
    fn broken_payloads_are_told_whatever_the_method() {
        let size = u32::try_from(text().len()).expect("small");
        for (method, file) in FILES {
            let mut wrong_size = payload(method, file, size - 1);
            let end = wrong_size.len();
            wrong_size[end - 4..].copy_from_slice(&(size - 1).to_le_bytes());
            let error = decompress(&wrong_size).expect_err("one byte more than stated");
            assert!(matches!(error, Error::Decompress { method: found, .. } if found == method), "{error}");
            let whole = payload(method, file, size);
            let mut cut = whole[..whole.len() / 2].to_vec();
            cut.extend(size.to_le_bytes());
            let error = decompress(&cut).expect_err("cut off");
            assert!(matches!(error, Error::Decompress { method: found, .. } if found == method), "{error}");
        }
        assert_eq!(decompress(&[0x5d, 0, 0]), Err(Error::Truncated { what: "bzImage" }));
        assert_eq!(
            decompress(&[0x1f, 0x8b, 0xff, 0xff, 0xff, 0xff]),
            Err(Error::TooLarge { bytes: 0xffff_ffff })
        );
    }
}
