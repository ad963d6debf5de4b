//! The container of lzop, as far as the kernel's own decompressor reads it
//! (Linux lib/decompress_unlzo.c). A library decompresses the blocks.

/// The magic number.
pub(super) const MAGIC: &[u8] = &[0x89, b'L', b'Z', b'O', 0, 0x0d, 0x0a, 0x1a, 0x0a];

/// From this version on the header has more fields.
const LONG_HEADER: u16 = 0x0940;
/// No block is larger uncompressed (lzop's `MAX_BLOCK_SIZE`).
const MAX_BLOCK: usize = 64 << 20;

const ADLER32_PLAIN: u32 = 0x1;
const ADLER32_COMPRESSED: u32 = 0x2;
const CRC32_PLAIN: u32 = 0x100;
const CRC32_COMPRESSED: u32 = 0x200;
const FILTER: u32 = 0x800;

/// Decompresses a file of at most `limit` bytes uncompressed.
///
/// # Errors
/// What is wrong with it.
pub(super) fn decompress(file: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let truncated = || "it is truncated".to_owned();
    let mut reader = Reader { rest: file.strip_prefix(MAGIC).ok_or("it has another magic number")? };
    let flags = header(&mut reader).ok_or_else(truncated)?;
    let mut plain = Vec::new();
    loop {
        let size = reader.u32().ok_or_else(truncated)? as usize;
        if size == 0 {
            return Ok(plain);
        }
        let packed = reader.u32().ok_or_else(truncated)? as usize;
        if size > MAX_BLOCK || packed > size || plain.len() + size > limit {
            return Err(format!("a block of {packed} bytes claims to hold {size}"));
        }
        let present = |flag: u32| usize::from(flags & flag != 0);
        let mut checksums = present(ADLER32_PLAIN) + present(CRC32_PLAIN);
        if packed < size {
            checksums += present(ADLER32_COMPRESSED) + present(CRC32_COMPRESSED);
        }
        reader.take(4 * checksums).ok_or_else(truncated)?;
        let block = reader.take(packed).ok_or_else(truncated)?;
        if packed == size {
            plain.extend(block);
            continue;
        }
        let from = plain.len();
        plain.resize(from + size, 0);
        let written = lzokay::decompress::decompress(block, &mut plain[from..]).map_err(|e| e.to_string())?;
        if written != size {
            return Err(format!("a block holds {written} bytes, not {size}"));
        }
    }
}

/// Skips the header; returns its flags.
fn header(reader: &mut Reader<'_>) -> Option<u32> {
    let long = reader.u16()? >= LONG_HEADER;
    // The library's version, the version needed, the method, the level.
    reader.take(if long { 2 + 2 + 1 + 1 } else { 2 + 1 })?;
    let flags = reader.u32()?;
    if flags & FILTER != 0 {
        reader.u32()?;
    }
    // Mode and time.
    reader.take(if long { 12 } else { 8 })?;
    let name = reader.take(1)?[0];
    reader.take(name.into())?;
    // Its checksum.
    reader.u32()?;
    Some(flags)
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(size)?;
        self.rest = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }
}
