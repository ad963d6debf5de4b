//! What other readers than ours find in a kernel's image: symbols by `vmlinux-to-elf` (from PyPI), sections
//! by `readelf`. Found once for each image, and cached.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::provision::command::output_of;
use crate::provision::corpus::Stock;
use crate::provision::error::{AtPath, Error};
use crate::provision::progress::Step;
use crate::provision::{cache, packages};

/// The reader and what it needs for the compressions that Debian uses, pinned.
const PYTHON_PACKAGES: [&str; 4] =
    ["vmlinux-to-elf==1.4.0", "lz4==4.4.5", "zstandard==0.25.0", "peewee==4.5.3"];
const PACKAGES: &[&str] = &["python3", "python3-venv", "binutils"];
/// Part of the cache keys: raise it when the readers or what is kept change.
const BUILD: u32 = 1;

/// Unpacks a bzImage. Where the payload lies is in the header (Linux Documentation/arch/x86/boot.rst,
/// `payload_offset`). The reader's own search does not look for LZ4 where it sees a version's text, and
/// LZ4 leaves that readable.
const UNPACK: &str = "
import io, struct, sys
from vmlinux_to_elf.core.auto_unpack import VmlinuzDecompressor
from vmlinux_to_elf.utils.lz4_legacy import decompress_lz4_buffer
image = open(sys.argv[1], 'rb').read()
at = (image[0x1f1] + 1) * 512 + struct.unpack_from('<I', image, 0x248)[0]
is_lz4 = image[at:].startswith(bytes.fromhex('02214c18'))
kernel = decompress_lz4_buffer(io.BytesIO(image[at:])) if is_lz4 else VmlinuzDecompressor(image).decompressed
open(sys.argv[2], 'wb').write(kernel)
";

/// What was found in an image.
#[derive(Debug, Clone)]
pub struct Reading {
    /// A symbol a line: address, type, name, as in `/proc/kallsyms`.
    pub symbols: String,
    /// What `readelf -SW` says of the uncompressed kernel.
    pub sections: String,
}

/// The readers, installed on first use.
#[derive(Debug, Clone)]
pub struct Readers {
    python: PathBuf,
}

impl Readers {
    /// Installs what is missing.
    ///
    /// # Errors
    /// When packages are missing and can't be installed, or PyPI can't be reached.
    pub fn new() -> Result<Self, Error> {
        packages::ensure("readers of kernel images", PACKAGES)?;
        let folder = cache::entry(&format!("readers-{BUILD}"), |into| {
            let step = Step::new("Fetching another reader of kernel images (vmlinux-to-elf, from PyPI)");
            output_of(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(into))?;
            // Without its dependencies: one has to be compiled, for a compression that is not met here.
            let pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"];
            output_of(Command::new(python(into)).args(pip).args(PYTHON_PACKAGES))?;
            step.done();
            Ok(())
        })?;
        Ok(Self { python: python(&folder) })
    }

    /// What they find in a kernel's image.
    ///
    /// # Errors
    /// When one of them fails.
    pub fn read(&self, kernel: &Stock) -> Result<Reading, Error> {
        let folder = cache::entry(&format!("reading-{}-{BUILD}", kernel.release), |into| {
            self.find(&kernel.bzimage, into)
        })?;
        let text = |name: &str| fs::read_to_string(folder.join(name)).at(folder.join(name));
        Ok(Reading { symbols: text("symbols")?, sections: text("sections")? })
    }

    fn find(&self, image: &Path, into: &Path) -> Result<(), Error> {
        let vmlinux = into.join("vmlinux");
        output_of(Command::new(&self.python).args(["-c", UNPACK]).arg(image).arg(&vmlinux))?;
        let sections = output_of(Command::new("readelf").arg("-SW").arg(&vmlinux))?;
        fs::write(into.join("sections"), sections).at(into)?;
        let symbols = into.join("symbols");
        let file = File::create(&symbols).at(&symbols)?;
        let mut command = Command::new(&self.python);
        command.args(["-m", "vmlinux_to_elf.scripts.kallsyms_finder"]).arg(&vmlinux);
        let program = format!("{command:?}");
        let status = command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null()).status();
        let status = status.map_err(|source| Error::Spawn { program: program.clone(), source })?;
        fs::remove_file(&vmlinux).at(&vmlinux)?;
        if status.success() { Ok(()) } else { Err(Error::Failed { program, status, output: String::new() }) }
    }
}

/// A virtual environment finds itself by this path, so it may be moved; its scripts can't.
fn python(environment: &Path) -> PathBuf {
    environment.join("bin/python3")
}
