//! Kernel files: every form in which a kernel comes is read, and what is none is named.

use std::io::Write;

use patcher::addr::Gpa;
use patcher::image::{Error, KernelFile, KernelImage, Loadable, unpack};

use crate::miniature;

/// What the build of a kernel calls the methods, and what compresses by them.
type Packer = fn(&[u8]) -> Vec<u8>;
const METHODS: [(&str, Packer); 7] = [
    ("gzip", gzip),
    ("bzip2", bzip2),
    ("lzma", lzma),
    ("xz", xz),
    ("lzo", lzo),
    ("lz4", lz4),
    ("zstd", zstd),
];

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(data).and_then(|()| encoder.finish()).expect("it is compressed")
}

fn bzip2(data: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    encoder.write_all(data).and_then(|()| encoder.finish()).expect("it is compressed")
}

fn lzma(data: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::LzmaOptions::with_preset(9);
    let mut encoder = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).expect("an encoder");
    encoder.write_all(data).and_then(|()| encoder.finish()).expect("it is compressed")
}

fn xz(data: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(9);
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).expect("an encoder");
    encoder.write_all(data).and_then(|()| encoder.finish()).expect("it is compressed")
}

/// lzop's container (Linux lib/decompress_unlzo.c) without checksums, one block.
fn lzo(data: &[u8]) -> Vec<u8> {
    let block = lzokay::compress::compress(data).expect("it is compressed");
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("small").to_be_bytes();
    let mut file = b"\x89LZO\0\r\n\x1a\n\x10\x30\x20\xa0\x09\x40\x03\x09".to_vec();
    // Flags, mode, time, no name, the header's checksum.
    file.extend([0; 4 + 12 + 1 + 4]);
    file.extend([&length(data)[..], &length(&block), &block, &[0; 4]].concat());
    file
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
    encoder.write_all(data).expect("it is compressed");
    encoder.finish().expect("it is compressed")
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
}

/// As the payload of a bzImage: followed by the size, except by gzip, which has it itself.
fn payload(method: &str, packed: &[u8], data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).expect("small").to_le_bytes();
    [packed, if method == "gzip" { &[] } else { &size }].concat()
}

/// Inputs of `checks::compressed`: which method, and what follows its magic number.
pub(crate) fn packed() -> Vec<Vec<u8>> {
    const MAGIC: [usize; 8] = [3, 4, 3, 6, 9, 4, 4, 4];
    const BY: [Packer; 8] = [gzip, bzip2, lzma, xz, lzo, lz4_of_the_kernel, lz4, zstd];
    let text: Vec<u8> =
        (0..200_u8).flat_map(|number| [0x7f, b'E', b'L', b'F', number, number / 16]).collect();
    let inputs = (0..).zip(BY.iter().zip(MAGIC));
    inputs.map(|(method, (pack, magic))| [&[method], &pack(&text)[magic..]].concat()).collect()
}

/// The older format, one block as it is.
fn lz4_of_the_kernel(data: &[u8]) -> Vec<u8> {
    let bzimage = miniature::bzimage(data);
    bzimage[1024..bzimage.len() - 4].to_vec()
}

#[test]
fn a_kernel_is_read_however_it_is_compressed() {
    let vmlinux = miniature::vmlinux();
    let plain = KernelImage::parse(&vmlinux).expect("a kernel");
    assert_eq!(plain.compression(), None);
    for (method, pack) in METHODS {
        let packed = pack(&vmlinux);
        assert!(packed.len() < vmlinux.len(), "{method}: {} bytes", packed.len());
        let bzimage = miniature::bzimage_of(&payload(method, &packed, &vmlinux));
        assert!(matches!(KernelFile::open(&bzimage), Ok(KernelFile::BzImage)), "{method}");
        let Ok(KernelFile::Vmlinux(opened)) = KernelFile::open(&packed) else { panic!("{method}") };
        assert_eq!(*opened, *vmlinux, "{method}");
        for file in [&bzimage, &packed] {
            assert_eq!(*unpack(file).expect("a kernel"), *vmlinux, "{method}");
            let image = KernelImage::parse(file).expect("a kernel");
            assert_eq!(image.compression(), Some(method));
            assert_eq!((image.release(), image.build_id()), (plain.release(), plain.build_id()));
            assert!(image.symbols().iter().eq(plain.symbols().iter()), "{method}");
        }
    }
}

#[test]
fn what_is_compressed_and_damaged_or_no_kernel_is_told() {
    let vmlinux = miniature::vmlinux();
    for (method, pack) in METHODS {
        let packed = pack(&vmlinux);
        let error = unpack(&packed[..packed.len() * 3 / 4]).expect_err("it is cut off");
        assert!(matches!(error, Error::Decompress { method: told, .. } if told == method), "{error}");
        assert!(error.to_string().contains("truncated"), "{error}");
        for (content, says) in [
            (&[b"070701".as_slice(), &[b'0'; 4096]].concat()[..], "--initrd takes it"),
            (&[b' '; 4096], &format!("compressed with {method} that holds no ELF file")),
        ] {
            let error = KernelFile::open(&pack(content)).expect_err(says);
            assert!(matches!(&error, Error::Other(what) if what.contains(says)), "{method}: {error}");
        }
        // A kernel whose last byte is missing, inside of what is whole.
        let error = KernelImage::parse(&pack(&vmlinux[..vmlinux.len() - 1])).expect_err("it is cut off");
        let (bytes, stated) = (vmlinux.len() as u64 - 1, vmlinux.len() as u64);
        assert_eq!(error, Error::Truncated { what: "vmlinux", bytes, stated }, "{method}");
    }
}

#[test]
fn the_miniature_can_be_loaded() {
    let vmlinux = miniature::vmlinux();
    let loadable = Loadable::parse(&vmlinux).expect("a kernel");
    assert_eq!((loadable.entry, loadable.pvh_entry), (Gpa(0x100_0000), None));
    assert_eq!(loadable.segments.iter().map(|segment| segment.at).collect::<Vec<_>>(), [Gpa(0x100_0000)]);
    let mut without_symbols = vmlinux.clone();
    without_symbols[64 + 56 + 64..].fill(0xcc);
    assert!(Loadable::parse(&without_symbols).is_ok());
    assert_eq!(KernelImage::parse(&without_symbols).expect_err("no kallsyms"), Error::NoSymbols);
}
