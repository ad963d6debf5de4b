//! The compression methods of kernels (Linux scripts/Makefile.lib): a library each.

use std::io::Read;

use crate::image::lzop;

/// Largest dictionary of xz and lzma. The kernel's build uses at most 32 MiB (scripts/xz_wrap.sh); a
/// hostile file may ask for 4 GiB.
const MAX_DICTIONARY_KIB: u32 = 128 << 10;

/// How much of data is looked at that does not begin as expected.
const BEGINNING: u64 = 64 << 10;

/// A compression method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

/// What data begins with. lz4 has two formats: the kernel's build makes the older one.
const MAGIC: [(&[u8], Method); 8] = [
    (&[0x1f, 0x8b], Method::Gzip),
    (b"BZh", Method::Bzip2),
    // lzma has no magic number: the usual parameters, and the low bytes of the dictionary size.
    (&[0x5d, 0, 0], Method::Lzma),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], Method::Xz),
    (lzop::MAGIC, Method::Lzo),
    (&[0x02, 0x21, 0x4c, 0x18], Method::Lz4),
    (&[0x04, 0x22, 0x4d, 0x18], Method::Lz4),
    (&[0x28, 0xb5, 0x2f, 0xfd], Method::Zstd),
];

impl Method {
    /// The method by which data is compressed, if that is known.
    pub(super) fn of(data: &[u8]) -> Option<Self> {
        MAGIC.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, method)| *method)
    }

    /// As it is called in a kernel's configuration.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Decompresses what begins with `expected`; of anything else only the first bytes. No more than
    /// one byte beyond `limit` is made, so that a decompression bomb stops early.
    ///
    /// # Errors
    /// The decompressor's.
    pub(super) fn decompress(self, data: &[u8], expected: &[u8], limit: u64) -> Result<Vec<u8>, String> {
        let read = |decoder: &mut dyn Read| {
            let mut out = Vec::new();
            decoder.take(BEGINNING.min(limit)).read_to_end(&mut out).map_err(|e| e.to_string())?;
            if out.starts_with(expected) {
                let rest = (limit + 1).saturating_sub(out.len() as u64);
                decoder.take(rest).read_to_end(&mut out).map_err(|e| e.to_string())?;
            }
            Ok(out)
        };
        match self {
            Self::Gzip => read(&mut flate2::read::GzDecoder::new(data)),
            Self::Bzip2 => read(&mut bzip2::read::MultiBzDecoder::new(data)),
            Self::Lzma => {
                let decoder = lzma_rust2::LzmaReader::new_mem_limit(data, MAX_DICTIONARY_KIB, None);
                read(&mut decoder.map_err(|e| e.to_string())?)
            }
            Self::Xz => read(&mut lzma_rust2::XzReader::new_mem_limit(data, true, MAX_DICTIONARY_KIB)),
            Self::Lzo => lzop::decompress(data, usize::try_from(limit).map_err(|e| e.to_string())?),
            Self::Lz4 => read(&mut lz4_flex::frame::FrameDecoder::new(data)),
            Self::Zstd => {
                let decoder = ruzstd::decoding::StreamingDecoder::new(data);
                read(&mut decoder.map_err(|e| e.to_string())?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_does_not_begin_as_expected_only_the_beginning_is_decompressed() {
        const MAX: u64 = 1 << 30;
        let mut encoder = flate2::read::GzEncoder::new(&[7; 1 << 20][..], flate2::Compression::fast());
        let mut packed = Vec::new();
        encoder.read_to_end(&mut packed).expect("it is compressed");
        let length = |expected: &[u8]| {
            Method::Gzip.decompress(&packed, expected, MAX).expect("it decompresses").len() as u64
        };
        assert_eq!((length(&[7]), length(&[8])), (1 << 20, BEGINNING));
    }
}
