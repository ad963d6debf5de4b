//! Tasks that sleep, each in another system call, and what the kernel itself says of all tasks.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, mknodat};

/// The first argument of a process that only sleeps, in two threads.
pub const ARGUMENT: &str = "sleep";

type Sleep = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// Starts a thread of each kind, named after what it sleeps in, and gives them half a second to fall asleep. Returns
/// how many there are.
///
/// # Errors
/// When the system has no thread left, or what a call needs is not there.
pub fn start_sleepers() -> io::Result<usize> {
    let (mut pipe, writer) = io::pipe()?;
    let (mut stream, other) = UnixStream::pair()?;
    let (polled, third) = UnixStream::pair()?;
    let listener = UnixListener::bind("/tmp/sleepers")?;
    mknodat(CWD, "/tmp/fifo", FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let lock = || OpenOptions::new().create(true).truncate(false).write(true).open("/tmp/lock");
    let (locked, waits) = (lock()?, lock()?);
    flock(&locked, FlockOperation::LockExclusive)?;
    let mut child = Command::new("/proc/self/exe").arg(ARGUMENT).spawn()?;
    // They stay open as long as init runs.
    std::mem::forget((writer, other, third, locked));
    let sleepers: [(&str, Sleep); 9] = [
        ("in-pipe", Box::new(move || pipe.read(&mut [0]).map(drop))),
        ("in-socket", Box::new(move || stream.read(&mut [0]).map(drop))),
        ("in-poll", Box::new(move || Ok(poll(&mut [PollFd::new(&polled, PollFlags::IN)], None).map(drop)?))),
        ("in-accept", Box::new(move || listener.accept().map(drop))),
        ("in-open", Box::new(|| File::open("/tmp/fifo").map(drop))),
        ("in-flock", Box::new(move || Ok(flock(&waits, FlockOperation::LockExclusive)?))),
        (
            "in-nanosleep",
            Box::new(|| {
                thread::sleep(Duration::MAX);
                Ok(())
            }),
        ),
        (
            "in-futex",
            Box::new(|| {
                thread::park();
                Ok(())
            }),
        ),
        ("in-wait", Box::new(move || child.wait().map(drop))),
    ];
    let count = sleepers.len();
    for (name, sleep) in sleepers {
        thread::Builder::new().name(name.to_owned()).spawn(sleep)?;
    }
    thread::sleep(Duration::from_millis(500));
    Ok(count)
}

/// Starts a thread that opens a file, and gives it half a second.
///
/// # Errors
/// When the system has no thread left.
pub fn start_opening(path: &str) -> io::Result<()> {
    let path = path.to_owned();
    thread::Builder::new().name("opens".to_owned()).spawn(move || File::open(path).map(drop))?;
    thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// What the process with [`ARGUMENT`] does.
pub fn sleep() -> ! {
    let _ = thread::Builder::new().name("second".to_owned()).spawn(thread::park);
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// A line for each thread of each process, as `/proc` has it: `tgid=N pid=N state=S switches=N comm|frame;frame`. A
/// thread that ends meanwhile is left out.
///
/// # Errors
/// When there is no `/proc`.
pub fn list() -> io::Result<Vec<String>> {
    let numbers = |folder: &Path| {
        let names = fs::read_dir(folder)?.flatten().map(|entry| entry.file_name());
        let numbers = names.filter_map(|name| name.to_str()?.parse::<u32>().ok());
        Ok::<_, io::Error>(numbers.collect::<Vec<_>>())
    };
    let mut lines = Vec::new();
    for tgid in numbers(Path::new("/proc"))? {
        let threads = Path::new("/proc").join(tgid.to_string()).join("task");
        for pid in numbers(&threads).unwrap_or_default() {
            let folder = threads.join(pid.to_string());
            lines.extend(describe(&folder).ok().map(|text| format!("tgid={tgid} pid={pid} {text}")));
        }
    }
    Ok(lines)
}

fn describe(folder: &Path) -> io::Result<String> {
    let read = |name: &str| fs::read_to_string(folder.join(name));
    let status = read("status")?;
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let state = field("State:").split(' ').next().unwrap_or_default();
    let switches = [field("voluntary_ctxt_switches:"), field("nonvoluntary_ctxt_switches:")].join("+");
    // `[<0>] function+0xoffset/0xsize [module]`.
    let stack = read("stack")?;
    let frames = stack.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim())).collect::<Vec<_>>();
    Ok(format!("state={state} switches={switches} {}|{}", read("comm")?.trim_end(), frames.join(";")))
}
