//! The vmlinux in a file: the payload of a bzImage, a compressed vmlinux, or the file itself.

use std::borrow::Cow;

use object::elf::ELFMAG;

use crate::image::compression::Method;
use crate::image::error::Error;
use crate::image::{bzimage, foreign};

/// Largest uncompressed kernel, in bytes. More means a broken or hostile file.
pub(super) const MAX_KERNEL: u64 = 512 << 20;

/// The vmlinux in a bzImage or in a compressed vmlinux; any other ELF file as it is.
///
/// # Errors
/// When the file is none of these, or is truncated or damaged.
pub fn unpack(file: &[u8]) -> Result<Cow<'_, [u8]>, Error> {
    Ok(extract(file)?.map_or(Cow::Borrowed(file), |(_, vmlinux)| Cow::Owned(vmlinux)))
}

/// Returns the vmlinux in a compressed kernel and how it was compressed, or `None` if `file` is an ELF
/// file.
pub(super) fn extract(file: &[u8]) -> Result<Option<(&'static str, Vec<u8>)>, Error> {
    extract_up_to(MAX_KERNEL, file)
}

fn extract_up_to(limit: u64, file: &[u8]) -> Result<Option<(&'static str, Vec<u8>)>, Error> {
    if bzimage::is(file) {
        let (method, vmlinux) = sized(bzimage::payload(file)?)?;
        if !vmlinux.starts_with(&ELFMAG) {
            return Err(Error::Elf { what: "the bzImage's payload is none".into() });
        }
        return Ok(Some((method, vmlinux)));
    }
    if file.starts_with(&ELFMAG) {
        return Ok(None);
    }
    let Some(method) = Method::of(file) else { return Err(foreign::why(file)) };
    let name = method.name();
    let vmlinux =
        method.decompress(file, &ELFMAG, limit).map_err(|what| Error::Decompress { method: name, what })?;
    if !vmlinux.starts_with(&ELFMAG) {
        return Err(match foreign::why(&vmlinux) {
            Error::Other(what) => Error::Other(what),
            _ => Error::Other(format!("a file compressed with {name} that holds no ELF file").into()),
        });
    }
    if vmlinux.len() as u64 > limit {
        return Err(Error::TooLarge { bytes: vmlinux.len() as u64, limit });
    }
    Ok(Some((name, vmlinux)))
}

/// Decompresses the payload of a bzImage. Its last four bytes are the uncompressed size, added by the
/// kernel's build for every method (scripts/Makefile.lib, `size_append`); gzip's own trailer ends with
/// the same.
fn sized(payload: &[u8]) -> Result<(&'static str, Vec<u8>), Error> {
    let unknown = || Error::Compression { magic: payload.iter().take(6).copied().collect() };
    let method = Method::of(payload).ok_or_else(unknown)?;
    let (data, size) = payload.split_last_chunk::<4>().ok_or_else(unknown)?;
    let size = u64::from(u32::from_le_bytes(*size));
    if size > MAX_KERNEL {
        return Err(Error::TooLarge { bytes: size, limit: MAX_KERNEL });
    }
    let data = if method == Method::Gzip { payload } else { data };
    let fail = |what| Error::Decompress { method: method.name(), what };
    let kernel = method.decompress(data, &[], size).map_err(fail)?;
    if kernel.len() as u64 != size {
        return Err(fail(format!("the payload states {size} bytes but holds {} or more", kernel.len())));
    }
    Ok((method.name(), kernel))
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
            assert_eq!(sized(&payload(method, file, size)), Ok((method, text())));
        }
    }

    #[test]
    fn a_decompression_bomb_is_stopped() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let zeros = [&ELFMAG[..], &[0; 1 << 20]].concat();
        let bomb = std::io::Write::write_all(&mut encoder, &zeros).and_then(|()| encoder.finish());
        let error = extract_up_to(1000, &bomb.expect("it is compressed")).expect_err("too large");
        assert_eq!(error, Error::TooLarge { bytes: 1001, limit: 1000 });
    }

    #[test]
    fn broken_payloads_are_told_whatever_the_method() {
        let size = u32::try_from(text().len()).expect("small");
        for (method, file) in FILES {
            let mut wrong_size = payload(method, file, size - 1);
            let end = wrong_size.len();
            wrong_size[end - 4..].copy_from_slice(&(size - 1).to_le_bytes());
            let error = sized(&wrong_size).expect_err("one byte more than stated");
            assert!(matches!(error, Error::Decompress { method: found, .. } if found == method), "{error}");
            let whole = payload(method, file, size);
            let mut cut = whole[..whole.len() / 2].to_vec();
            cut.extend(size.to_le_bytes());
            let error = sized(&cut).expect_err("cut off");
            assert!(matches!(error, Error::Decompress { method: found, .. } if found == method), "{error}");
        }
        let unknown = Error::Compression { magic: vec![0x5d, 0] };
        assert_eq!(sized(&[0x5d, 0]), Err(unknown));
        assert_eq!(
            sized(&[0x1f, 0x8b, 0xff, 0xff, 0xff, 0xff]),
            Err(Error::TooLarge { bytes: 0xffff_ffff, limit: MAX_KERNEL })
        );
    }
}
