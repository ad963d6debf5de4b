//! The commands that init of a guest obeys.
//!
//! ```text
//! hammer CALL A B    all CPUs hammer the system call; results must be A or B
//! timed COMMAND      how long a command takes
//! exits N            leaves the guest so many times; in how long
//! gap                how long a CPU of the workload made no call at most, since last asked
//! count              what every CPU saw in calls begun after this command
//! calls-in MS        how many calls they made in so many milliseconds
//! nmis MS            from now on every CPU gets an NMI so often, and tells where it is
//! locks              all CPUs contend for a spinlock of the kernel
//! locks-in MS        how many times they had it in so many milliseconds
//! locks-end          ends that; what was added under the lock, and what is the sum
//! toggle PATH A B    from now on A and B are written to a file in turn
//! toggle-every MS PATH A B  the same, with a pause behind each
//! toggle-fentry NAMES  from now on a BPF program is put at a function's entry and taken away
//! toggle-module PATH NAME  from now on a module is loaded and unloaded
//! toggle-livepatch PATH  from now on the livepatch module is put in force and taken away
//! toggle-end         ends that; how often it was done
//! fentry NAMES       puts a BPF program at a function's entry; fentry-end takes it away
//! livepatch PATH     loads the livepatch module, until it is in force in all tasks; in how long
//! livepatch-end      takes it out of force and unloads it; in how long
//! probed             where in init's file `probed` begins, which can be hammered
//! dmesg              the errors that the kernel logged since it was last asked
//! cat PATH           prints a file
//! mount KIND PATH    mounts a file system without a device
//! load PATH          loads a module
//! unload NAME        unloads it
//! open PATH          starts a thread that opens a file, however long that takes
//! sleepers           starts threads and a process that sleep in different system calls
//! tasks              every thread with its stack, as /proc has it
//! kallsyms           how many symbols the kernel itself has, and their digest
//! symbols NAMES      where they are
//! write PATH TEXT    writes a file
//! run PROGRAM ARGS   runs a program
//! on CPU CALL A B    calls a system call 1,000 times on one CPU; results as `hammer`
//! kexec KERNEL INITRD MORE  starts another kernel, with more on its command line; no answer but its greeting
//! crash KERNEL INITRD MORE  the same, by a crash
//! hostile TARGET NAMES  attacks the monitor in these ways, or in all, around an address of the kernel's text
//! hostile-end        ends that; what each attack saw
//! garbage            runs garbage in place of the kernel; no answer
//! poweroff | reboot
//! ```

use std::arch::x86_64::__cpuid;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::tcdrain;

use crate::inside::bpf::Fentry;
use crate::inside::hostile::{self, Attacks};
use crate::inside::kallsyms;
use crate::inside::kernel_log::KernelLog;
use crate::inside::kexec;
use crate::inside::locks::Locks;
use crate::inside::modules::{livepatch, livepatch_end, load, unload};
use crate::inside::tasks;
use crate::inside::toggle::{self, Action, Toggle};
use crate::inside::workload::{Hammer, call_on, probed_offset};

fn writes(path: &str, first: &str, second: &str) -> io::Result<[Action; 2]> {
    toggle::writes(Path::new(path), [first, second].map(str::to_owned))
}

/// Puts a BPF program at a function's entry, and takes it away.
fn fentry(names: &[&str]) -> [Action; 2] {
    let program = Arc::new(Mutex::new(None));
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let there = program.clone();
    let attach = move || {
        *there.lock().unwrap_or_else(PoisonError::into_inner) = Some(Fentry::attach(&names)?);
        Ok(())
    };
    let detach = move || {
        *program.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    };
    [Box::new(attach), Box::new(detach)]
}

/// Whose turn it is to make the console write: an answer's, or the kernel's.
static CONSOLE: Mutex<()> = Mutex::new(());

/// What was started and is still running, and where answers go.
pub struct Init {
    console: File,
    log: KernelLog,
    cpus: usize,
    hammer: Option<Hammer>,
    locks: Option<Locks>,
    toggle: Option<Toggle>,
    fentry: Option<Fentry>,
    attacks: Option<Attacks>,
}

impl Init {
    /// Answers on `console`.
    ///
    /// # Errors
    /// What the system said.
    pub fn new(console: File) -> io::Result<Self> {
        Ok(Self {
            console,
            log: KernelLog::open()?,
            cpus: thread::available_parallelism()?.get(),
            hammer: None,
            locks: None,
            toggle: None,
            fentry: None,
            attacks: None,
        })
    }

    /// Greets, telling what this guest is.
    ///
    /// # Errors
    /// What the system said.
    pub fn greet(&mut self, ppid: i32) -> io::Result<()> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        self.say(&format!("@end ready cpus={} release={} ppid={ppid}", self.cpus, release.trim()))
    }

    /// Obeys one command and answers it.
    ///
    /// # Errors
    /// When the console is gone.
    pub fn answer(&mut self, line: &str) -> io::Result<()> {
        let turn = CONSOLE.lock();
        let last = match self.obey(line) {
            Ok(rest) => format!("@end ok {rest}"),
            Err(error) => format!("@end error {error}"),
        };
        self.say(last.trim_end())?;
        tcdrain(&self.console)?;
        drop(turn);
        Ok(())
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        hostile::write_line(&mut self.console, line)
    }

    /// Obeys one command; returns what to add to the answer's last line.
    fn obey(&mut self, line: &str) -> io::Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match *words {
            [] => Ok(String::new()),
            ["hammer", call, first, second] => {
                let number = |text: &str| text.parse().map_err(io::Error::other);
                let expected = [number(first)?, number(second)?];
                let hammer = Hammer::start(call, expected, self.cpus).map_err(io::Error::other)?;
                self.hammer = Some(hammer);
                Ok(format!("cpus={}", self.cpus))
            }
            ["calls-in", period] => {
                let hammer = self.hammer.as_ref().ok_or_else(|| io::Error::other("nothing is hammered"))?;
                let (before, started) = (hammer.calls(), Instant::now());
                thread::sleep(Duration::from_millis(period.parse().map_err(io::Error::other)?));
                Ok(format!("calls={} us={}", hammer.calls() - before, started.elapsed().as_micros()))
            }
            ["nmis", period] => {
                let period = Duration::from_millis(period.parse().map_err(io::Error::other)?);
                thread::spawn(move || {
                    // A backtrace of all CPUs; Linux asks for it by NMI (kernel/nmi_backtrace.c).
                    loop {
                        let turn = CONSOLE.lock();
                        if fs::write("/proc/sysrq-trigger", "l").is_err() {
                            break;
                        }
                        drop(turn);
                        thread::sleep(period);
                    }
                });
                Ok(String::new())
            }
            ["toggle", path, first, second] => self.toggle(writes(path, first, second)?, 0),
            ["toggle-every", period, path, first, second] => {
                let period = period.parse().map_err(io::Error::other)?;
                self.toggle(writes(path, first, second)?, period)
            }
            ["toggle-fentry", ref names @ ..] => self.toggle(fentry(names), 0),
            ["toggle-module", path, name] => {
                let (path, name) = (path.to_owned(), name.to_owned());
                let there: Action = Box::new(move || load(&path));
                let away: Action = Box::new(move || unload(&name));
                self.toggle([there, away], 0)
            }
            ["fentry", ref names @ ..] => {
                let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
                self.fentry = Some(Fentry::attach(&names)?);
                Ok(String::new())
            }
            ["fentry-end"] => {
                self.fentry = None;
                Ok(String::new())
            }
            ["toggle-livepatch", path] => {
                let path = path.to_owned();
                let there: Action = Box::new(move || livepatch(&path).map(drop));
                self.toggle([there, Box::new(|| livepatch_end().map(drop))], 0)
            }
            ["livepatch", path] => Ok(format!("us={}", livepatch(path)?.as_micros())),
            ["livepatch-end"] => Ok(format!("us={}", livepatch_end()?.as_micros())),
            ["toggle-end"] => {
                let toggle = self.toggle.take().ok_or_else(|| io::Error::other("nothing is toggled"))?;
                Ok(format!("written={}", toggle.end()?))
            }
            ["probed"] => Ok(format!("offset={}", probed_offset()?)),
            ["locks"] => {
                self.locks = Some(Locks::start(self.cpus)?);
                Ok(String::new())
            }
            ["locks-in", period] => {
                let locks = self.locks.as_ref().ok_or_else(|| io::Error::other("nothing is locked"))?;
                let (before, started) = (locks.added(), Instant::now());
                thread::sleep(Duration::from_millis(period.parse().map_err(io::Error::other)?));
                Ok(format!("added={} us={}", locks.added() - before, started.elapsed().as_micros()))
            }
            ["locks-end"] => {
                let locks = self.locks.take().ok_or_else(|| io::Error::other("nothing is locked"))?;
                let outcome = locks.end()?;
                Ok(format!("added={} sum={} clashes={}", outcome.added, outcome.sum, outcome.clashes))
            }
            ["count"] => self.count(),
            ["gap"] => self.gap(),
            ["exits", count] => {
                let count: u32 = count.parse().map_err(io::Error::other)?;
                let started = Instant::now();
                for _ in 0..count {
                    // KVM answers it, outside the guest.
                    std::hint::black_box(__cpuid(0));
                }
                Ok(format!("ns={}", started.elapsed().as_nanos()))
            }
            ["timed", ..] => {
                let started = Instant::now();
                let rest = self.obey(line.trim_start().trim_start_matches("timed"))?;
                Ok(format!("us={} {rest}", started.elapsed().as_micros()))
            }
            ["dmesg"] => {
                let news = self.log.read()?;
                for error in &news.errors {
                    self.say(&format!("@dmesg {error}"))?;
                }
                Ok(format!("errors={} records={}", news.errors.len(), news.records))
            }
            ["cat", path] => {
                let text = fs::read_to_string(path)?;
                self.console.write_all(text.as_bytes())?;
                Ok(String::new())
            }
            ["mount", kind, path] => {
                fs::create_dir_all(path)?;
                mount(kind, path, kind, MountFlags::empty(), None)?;
                Ok(String::new())
            }
            ["load", path] => load(path).map(|()| String::new()),
            ["unload", name] => unload(name).map(|()| String::new()),
            ["open", path] => tasks::start_opening(path).map(|()| String::new()),
            ["sleepers"] => Ok(format!("count={}", tasks::start_sleepers()?)),
            ["tasks"] => {
                for line in tasks::list()? {
                    self.say(&format!("@task {line}"))?;
                }
                Ok(String::new())
            }
            ["kallsyms"] => {
                let list = fs::read_to_string("/proc/kallsyms")?;
                let (count, digest) = kallsyms::digest(kallsyms::own(&list));
                Ok(format!("count={count} digest={digest:016x}"))
            }
            ["symbols", ref names @ ..] => {
                let list = fs::read_to_string("/proc/kallsyms")?;
                for symbol in kallsyms::parse(&list).filter(|symbol| names.contains(&symbol.name)) {
                    self.say(&format!("@symbol {} {:#x}", symbol.name, symbol.at))?;
                }
                Ok(String::new())
            }
            ["write", path, ..] => {
                let text = line.split_once(path).map_or("", |(_, text)| text.trim_start());
                fs::write(path, text)?;
                Ok(String::new())
            }
            ["run", program, ref arguments @ ..] => {
                let output = Command::new(program).args(arguments).output()?;
                self.console.write_all(&output.stdout)?;
                self.console.write_all(&output.stderr)?;
                Ok(output.status.to_string())
            }
            ["on", cpu, call, first, second] => {
                let number = |text: &str| text.parse().map_err(io::Error::other);
                let cpu = cpu.parse().map_err(io::Error::other)?;
                let seen = call_on(cpu, call, [number(first)?, number(second)?])?;
                Ok(format!("first={} second={} other={}", seen.first, seen.second, seen.other))
            }
            ["kexec", kernel, initrd, ref more @ ..] => {
                kexec::load(kernel, initrd, more, 0)?;
                Ok(reboot(RebootCommand::Kexec).map(|()| String::new())?)
            }
            ["crash", kernel, initrd, ref more @ ..] => {
                kexec::load(kernel, initrd, more, kexec::ON_CRASH)?;
                fs::write("/proc/sysrq-trigger", "c")?;
                Ok(String::new())
            }
            ["hostile", target, ref names @ ..] => {
                self.attacks = Some(Attacks::start(target, names)?);
                Ok(String::new())
            }
            ["hostile-end"] => {
                let attacks = self.attacks.take().ok_or_else(|| io::Error::other("nothing is attacked"))?;
                for line in attacks.end()? {
                    self.say(&format!("@hostile {line}"))?;
                }
                Ok(String::new())
            }
            ["garbage"] => hostile::run_garbage().map(|()| String::new()),
            ["poweroff"] => Ok(reboot(RebootCommand::PowerOff).map(|()| String::new())?),
            ["reboot"] => Ok(reboot(RebootCommand::Restart).map(|()| String::new())?),
            [other, ..] => Err(io::Error::other(format!("unknown or incomplete command {other}"))),
        }
    }

    fn toggle(&mut self, actions: [Action; 2], pause_ms: u64) -> io::Result<String> {
        self.toggle = Some(Toggle::start(actions, Duration::from_millis(pause_ms))?);
        Ok(String::new())
    }

    /// How long a CPU of the workload stood still at most since this was last asked. One line: what
    /// is written takes the guest its time.
    fn gap(&mut self) -> io::Result<String> {
        let hammer = self.hammer.as_ref().ok_or_else(|| io::Error::other("nothing is hammered"))?;
        let gaps = hammer.longest_gaps();
        let longest = gaps.iter().max().map_or(0, Duration::as_micros);
        Ok(format!("cpus={} us={longest}", gaps.len()))
    }

    fn count(&mut self) -> io::Result<String> {
        let hammer = self.hammer.as_ref().ok_or_else(|| io::Error::other("nothing is hammered"))?;
        for (cpu, counts) in hammer.count().iter().enumerate() {
            self.say(&format!(
                "@count cpu={cpu} first={} second={} other={}",
                counts.first, counts.second, counts.other
            ))?;
        }
        Ok(String::new())
    }
}
