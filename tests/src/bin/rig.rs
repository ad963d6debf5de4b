//! Runs a command in the rig's host, to look around or to debug:
//! `cargo rig vmm doctor`, `cargo rig vmm --kernel /guest/bzImage --initrd /guest/initrd ...`.

use std::time::Duration;

use anyhow::{Result, bail};
use guest::provision::binaries::Monitor;
use tests::lab::{self, Place};

fn main() -> Result<()> {
    let argv: Vec<String> = std::env::args().skip(1).collect();
    if argv.is_empty() || argv[0].starts_with('-') {
        bail!("usage: cargo rig PROGRAM [ARGUMENT ...], for example: cargo rig vmm doctor");
    }
    match lab::prepare(Monitor::Checked)? {
        Place::Here(_) => bail!("this machine has KVM: run the command directly, without `cargo rig`"),
        Place::Rig(mut rigged) => {
            let code = rigged.run(argv, Duration::from_secs(3600), lab::pass_on)?;
            // Dropping it shuts the host off; `exit` does not drop.
            drop(rigged);
            std::process::exit(code);
        }
    }
}
