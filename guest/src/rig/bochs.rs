//! The rig's second emulator: Bochs, with VMX and EPT, from the distribution's package. Slow,
//! but an Intel processor, and written by others.

use std::fs::{self, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};
use crate::provision::kernel::Kernel;
use crate::provision::packages;
use crate::provision::progress::Step;

const PACKAGES: &[&str] =
    &["bochs", "bochs-term", "bochsbios", "vgabios", "grub-common", "grub-pc-bin", "xorriso", "mtools"];
const MEMORY_MIB: &str = "2048";
/// How long Bochs may take until it connects to its second serial line.
const CONNECT: Duration = Duration::from_secs(60);

/// What GRUB does: it reads the kernel and its file system from the disc.
const GRUB: &str = "\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=0
menuentry rig {
  linux /boot/kernel console=ttyS0 quiet panic=-1 mitigations=off nokaslr
  initrd /boot/initrd
}
";

/// Provides the packages, makes a disc that boots the host, and says how to start it and where
/// its second serial line will come from.
pub(crate) fn machine(
    kernel: &Kernel,
    initrd: &Path,
    folder: &Path,
) -> Result<(Command, TcpListener), Error> {
    packages::ensure("the rig's second emulator", PACKAGES)?;
    let step = Step::new("Making a disc for the rig's host");
    let tree = folder.join("disc");
    fs::create_dir_all(tree.join("boot/grub")).at(&tree)?;
    fs::write(tree.join("boot/grub/grub.cfg"), GRUB).at(&tree)?;
    fs::copy(&kernel.bzimage, tree.join("boot/kernel")).at(&kernel.bzimage)?;
    fs::rename(initrd, tree.join("boot/initrd")).at(initrd)?;
    let disc = folder.join("disc.iso");
    output_of(Command::new("grub-mkrescue").arg("-o").arg(&disc).arg(&tree))?;
    fs::remove_dir_all(&tree).at(&tree)?;
    step.done();
    let wire = TcpListener::bind("127.0.0.1:0").at("a port for the rig's serial line")?;
    let port = wire.local_addr().at("a port for the rig's serial line")?.port();
    let at = |name: &str| folder.join(name).display().to_string();
    let settings = format!(
        "display_library: term\n\
         cpu: model=corei7_skylake_x, count=1, ips=100000000, reset_on_triple_fault=0\n\
         memory: guest={MEMORY_MIB}, host={MEMORY_MIB}\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path=\"{}\", status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=file, dev=\"{}\"\n\
         com2: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n\
         log: {}\n\
         panic: action=fatal\nerror: action=ignore\ninfo: action=ignore\ndebug: action=ignore\n\
         clock: sync=none\nsound: waveoutdrv=dummy\nspeaker: enabled=0\n",
        at("disc.iso"),
        at("console"),
        at("bochs")
    );
    fs::write(folder.join("settings"), settings).at(folder)?;
    // The package has the debugger compiled in, which waits for a command to go on.
    fs::write(folder.join("go"), "c\n").at(folder)?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "bochs", "-q", "-f", &at("settings"), "-rc", &at("go")]);
    command.env("TERM", "xterm");
    Ok((command, wire))
}

/// Looks at the screen of a Bochs that was started: it draws on a pseudo-terminal that it makes,
/// and waits for ever once that is full.
pub(crate) fn watch_screen(pid: u32) {
    thread::spawn(move || {
        let terminal = |path: &Path| {
            let about = fs::read_to_string(path).ok()?;
            about.lines().find_map(|line| line.strip_prefix("tty-index:"))?.trim().parse::<u32>().ok()
        };
        // Until there is one, or Bochs has ended.
        while let Ok(open) = fs::read_dir(format!("/proc/{pid}/fdinfo")) {
            if let Some(number) = open.flatten().find_map(|file| terminal(&file.path())) {
                let mut options = OpenOptions::new();
                let screen =
                    options.read(true).custom_flags(libc::O_NOCTTY).open(format!("/dev/pts/{number}"));
                return screen.and_then(|mut screen| io::copy(&mut screen, &mut io::sink()));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(0)
    });
}

/// The second serial line, once the machine was started.
pub(crate) fn accept(listener: &TcpListener) -> Result<TcpStream, Error> {
    let at = "the rig's serial line";
    listener.set_nonblocking(true).at(at)?;
    let until = Instant::now() + CONNECT;
    loop {
        match listener.accept() {
            Ok((wire, _)) => {
                wire.set_nonblocking(false).at(at)?;
                wire.set_nodelay(true).at(at)?;
                return Ok(wire);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(error).at(at),
        }
    }
}
