//! Init of a guest (L2): obeys commands on the serial console, so that a test or a person can drive
//! the workload. A line in, lines out; every answer ends with a line that begins with `@end`. The
//! commands are those of `guest::inside::commands`.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::process::ExitCode;
use std::thread;

use guest::inside::commands::Init;
use guest::inside::hostile;
use guest::inside::tasks;
use rustix::mount::{MountFlags, mount};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some((hostile::ARGUMENT, rest)) =
        arguments.split_first().map(|(first, rest)| (first.as_str(), rest))
    {
        return hostile::main(rest);
    }
    if arguments.first().is_some_and(|first| first == tasks::ARGUMENT) {
        tasks::sleep();
    }
    if let Err(error) = serve() {
        // PID 1 must not end: the kernel would panic. Say why on the kernel log and stay.
        let _ = fs::write("/dev/kmsg", format!("<2>guest-init: {error}"));
        loop {
            thread::park();
        }
    }
    ExitCode::SUCCESS
}

fn serve() -> io::Result<()> {
    // Before anything else, so that a test sees whether the kernel was patched by then.
    let ppid = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        mount(kind, at, kind, MountFlags::empty(), None)?;
    }
    // The initramfs has no /dev/console node, so init starts without streams.
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    let mut mode = tcgetattr(&console)?;
    mode.local_modes &= !LocalModes::ECHO;
    tcsetattr(&console, OptionalActions::Now, &mode)?;
    let mut init = Init::new(console.try_clone()?)?;
    init.greet(ppid)?;
    for line in BufReader::new(console).lines() {
        init.answer(&line?)?;
    }
    Ok(())
}
