//! The compressed payload of a bzImage (Linux Documentation/arch/x86/boot.rst: `payload_offset`,
//! `payload_length`).

use std::io::Read;

use super::image::Error;

/// No kernel is larger uncompressed; more is a broken or hostile file.
const MAX_KERNEL: u64 = 1 << 30;

const MAGIC_GZIP: &[u8] = &[0x1f, 0x8b];
const MAGIC_LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const MAGIC_ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Returns the vmlinux inside a bzImage, or `None` if `file` is no bzImage.
pub(super) fn extract(file: &[u8]) -> Result<Option<Vec<u8>>, Error> {
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

fn decompress(payload: &[u8]) -> Result<Vec<u8>, Error> {
    // The last four bytes are the uncompressed size, added by the kernel's build for every
    // method (scripts/Makefile.lib, size_append); gzip's own trailer ends with the same.
    let fail = |method, what: String| Error::Decompress { method, what };
    let (data, size) = payload.split_last_chunk::<4>().ok_or(Error::Truncated { what: "bzImage" })?;
    let size = u64::from(u32::from_le_bytes(*size));
    if size > MAX_KERNEL {
        return Err(Error::TooLarge { bytes: size });
    }
    let mut kernel = Vec::new();
    let mut read = |method, reader: &mut dyn Read| {
        // One byte more than stated, so that a lie is seen and a bomb is not unpacked.
        reader
            .take(size + 1)
            .read_to_end(&mut kernel)
            .map_err(|e| fail(method, e.to_string()))
            .map(|_| method)
    };
    let method = if payload.starts_with(MAGIC_GZIP) {
        read("gzip", &mut flate2::read::GzDecoder::new(payload))
    } else if payload.starts_with(MAGIC_LZ4_LEGACY) {
        read("lz4", &mut lz4_flex::frame::FrameDecoder::new(data))
    } else if payload.starts_with(MAGIC_ZSTD) {
        let mut decoder =
            ruzstd::decoding::StreamingDecoder::new(data).map_err(|e| fail("zstd", e.to_string()))?;
        read("zstd", &mut decoder)
    } else {
        let magic = payload.iter().take(6).copied().collect();
        return Err(Error::Compression { magic });
    }?;
    if kernel.len() as u64 != size {
        return Err(fail(method, format!("{size} bytes were stated, {} came out", kernel.len())));
    }
    Ok(kernel)
}
