//! Init of the rig's host (L1): loads KVM, then runs one program after another as told over
//! the second serial line (see `guest::rig::wire`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use guest::rig::MODULES;
use guest::rig::wire::{Frame, Request};
use rustix::mount::{MountFlags, mount};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

fn main() {
    if let Err(error) = serve() {
        // PID 1 must not end: the kernel would panic. Say why on the console and stay.
        let _ = fs::write("/dev/console", format!("rig-init: {error}\n"));
        loop {
            thread::park();
        }
    }
}

fn serve() -> io::Result<()> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp")] {
        mount(kind, at, kind, MountFlags::empty(), None)?;
    }
    mount("debugfs", "/sys/kernel/debug", "debugfs", MountFlags::empty(), None)?;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    fs::create_dir_all("/dev/pts")?;
    mount("devpts", "/dev/pts", "devpts", MountFlags::empty(), None)?;
    let line = OpenOptions::new().read(true).write(true).open("/dev/ttyS1")?;
    let mut mode = tcgetattr(&line)?;
    mode.make_raw();
    tcsetattr(&line, OptionalActions::Now, &mode)?;
    let up = Mutex::new(line.try_clone()?);

    let ready = match load_modules() {
        Ok(()) => Frame::Ready,
        Err(error) => Frame::Error(format!("loading KVM: {error}")),
    };
    send(&up, &ready)?;
    for request in BufReader::new(line).lines() {
        let last = serde_json::from_str(&request?)
            .map_err(io::Error::other)
            .and_then(|request| run(&request, &up))
            .unwrap_or_else(|error| Frame::Error(error.to_string()));
        send(&up, &last)?;
    }
    Ok(())
}

fn load_modules() -> io::Result<()> {
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let has = |feature: &str| processor.split_whitespace().any(|word| word == feature);
    for (name, ..) in MODULES.iter().filter(|(.., feature)| feature.is_none_or(has)) {
        let module = File::open(format!("/modules/{name}.ko"))?;
        rustix::system::finit_module(&module, c"", 0)
            .map_err(|errno| io::Error::other(format!("{name}: {errno}")))?;
    }
    Ok(())
}

fn send(up: &Mutex<File>, frame: &Frame) -> io::Result<()> {
    let mut up = up.lock().map_err(|_| io::Error::other("a writer panicked"))?;
    frame.write(&mut *up)
}

/// Runs the program to its end, forwarding both of its streams.
fn run(request: &Request, up: &Mutex<File>) -> io::Result<Frame> {
    let (program, arguments) =
        request.argv.split_first().ok_or_else(|| io::Error::other("an empty command"))?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", "/bin")
        .envs(request.env.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let status = thread::scope(|scope| {
        scope.spawn(|| forward(stdout, Frame::Stdout, up));
        scope.spawn(|| forward(stderr, Frame::Stderr, up));
        child.wait()
    })?;
    let code = status.code().or_else(|| status.signal().map(|n| 128 + n));
    Ok(Frame::Exit(code.unwrap_or(-1)))
}

fn forward(stream: Option<impl Read>, frame: fn(Vec<u8>) -> Frame, up: &Mutex<File>) {
    let Some(mut stream) = stream else { return };
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if send(up, &frame(buffer[..length].to_vec())).is_err() {
            break;
        }
    }
}
