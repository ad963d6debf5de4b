//! A thousand clients that say nothing, too little, too slowly or what is wrong, at a monitor that may open 128
//! files: a good client is served all the time, and the monitor has little to do.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::lab::Lab;
use crate::vm::{Method, Setup, Vm};

/// How many clients connect.
const CLIENTS: usize = 1000;
/// How many of them stay and say nothing.
const IDLE: usize = 300;
/// How many send a byte a second; fewer than there are places, so that they stay.
const SLOW: usize = 40;
/// How many files the monitor may open.
const DESCRIPTORS: u64 = 128;
/// Most CPU time that all this may take, in parts of one CPU.
const MOST_CPU: f64 = 0.05;

/// What a slow client begins with.
const UNFINISHED: &[u8] = b"POST /patches HTTP/1.1\r\nContent-Length: 1000\r\n\r\n";

/// Bodies and heads that are wrong, each in its way.
fn wrong() -> Vec<Vec<u8>> {
    let post = |head: &str, body: &[u8]| {
        [format!("POST /patches HTTP/1.1\r\n{head}\r\n\r\n").as_bytes(), body].concat()
    };
    let sized = |body: &[u8]| post(&format!("Content-Length: {}", body.len()), body);
    vec![
        Vec::new(),
        b"\x00\x01\x02\xff\xfe\r\n\r\n".to_vec(),
        b"GET /vm HTTP/9.9\r\n\r\n".to_vec(),
        [b"GET /".as_slice(), &[b'a'; 4096], b" HTTP/1.1\r\n\r\n"].concat(),
        post("Content-Length: 99999999999999999999", b""),
        post("Content-Length: -1", b""),
        post("Content-Length: 10\r\nContent-Length: 20", b"0123456789"),
        post("Content-Length: 1000000000", b"{"),
        post("Transfer-Encoding: chunked", b"zz\r\n{\r\n0\r\n\r\n"),
        post("Transfer-Encoding: chunked", b"ffffffffffffffff\r\n{"),
        post("Transfer-Encoding: chunked\r\nContent-Length: 3", b"3\r\n{}\n\r\n0\r\n\r\n"),
        sized(b""),
        sized(b"{"),
        sized(b"null"),
        sized(&[0xff; 100]),
        sized(&b"[".repeat(10_000)),
        sized(format!("{{\"version\":1,\"name\":\"{}\",\"patches\":[]}}", "n".repeat(10_000)).as_bytes()),
        sized(b"{\"version\":1e999,\"name\":\"\\u0000\",\"patches\":[{}]}"),
    ]
}

/// Has the clients come and stay for so long.
///
/// # Errors
/// When a good client is not served, or the monitor takes too much CPU time.
pub fn clients(lab: &Lab, stay: Duration) -> Result<()> {
    let vm = Vm::start(lab, &Setup::cpus(2))?;
    let few = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    let pid = Pid::from_raw(i32::try_from(vm.pid())?);
    prlimit(pid, Resource::Nofile, few)?;
    let mut longest = Duration::ZERO;
    let mut served = 0;
    let mut serve = |when: &str| -> Result<()> {
        let began = Instant::now();
        let (status, _) = vm.request(Method::GET, "/vm", b"").with_context(|| when.to_owned())?;
        ensure!(status == 200, "{when}: {status}");
        longest = longest.max(began.elapsed());
        served += 1;
        Ok(())
    };
    let wrong = wrong();
    let (before, began) = (cpu_ticks(vm.pid())?, Instant::now());
    let (mut stayed, mut slow) = (Vec::new(), Vec::new());
    for number in 0..CLIENTS {
        let mut client = UnixStream::connect(vm.socket())?;
        client.set_nonblocking(true)?;
        if number < SLOW {
            let _ = client.write_all(UNFINISHED);
            slow.push(client);
        } else if number < SLOW + IDLE {
            stayed.push(client);
        } else {
            // It may be hung up on in the middle of it.
            let _ = client.write_all(&wrong[number % wrong.len()]);
        }
        if number % 20 == 0 {
            serve("while they come")?;
        }
    }
    let coming = (cpu_ticks(vm.pid())? - before, began.elapsed());
    // Each slow one has a place of those that came after it.
    reconnect(&vm, &mut slow)?;
    let (before, began) = (cpu_ticks(vm.pid())?, Instant::now());
    while began.elapsed() < stay {
        reconnect(&vm, &mut slow)?;
        std::thread::sleep(Duration::from_secs(1));
    }
    // A tick is a hundredth of a second (proc_pid_stat(5)).
    let ticks = cpu_ticks(vm.pid())? - before;
    let share = ticks as f64 / 100.0 / began.elapsed().as_secs_f64();
    for _ in 0..20 {
        serve("while they stay")?;
    }
    let files = std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))?.count();
    println!(
        "{CLIENTS} clients came, {} ticks in {:?}; {IDLE} silent, {SLOW} slow, {files} files open: {:.1} % of a CPU; \
         a good client was answered {served} times, within {longest:?}",
        coming.0,
        coming.1,
        share * 100.0
    );
    ensure!(share < MOST_CPU, "{:.1} % of a CPU", share * 100.0);
    drop((stayed, slow));
    vm.power_off()
}

/// Sends a byte of a body from each; those that were hung up on come again.
fn reconnect(vm: &Vm, slow: &mut [UnixStream]) -> Result<()> {
    for client in slow {
        if client.write_all(b"x").is_err() {
            *client = UnixStream::connect(vm.socket())?;
            client.set_nonblocking(true)?;
            let _ = client.write_all(UNFINISHED);
        }
    }
    Ok(())
}

/// The CPU time of a monitor but its vCPUs', in ticks.
///
/// The process's own line has the time of threads that have ended as well (proc_pid_stat(5)). The vCPUs, which
/// end with the process, are read first: what they do between the two readings counts as the monitor's.
fn cpu_ticks(pid: u32) -> Result<i64> {
    let mut vcpus = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // It may have ended since the folder was read.
        let Ok(stat) = std::fs::read_to_string(task?.path().join("stat")) else { continue };
        let (name, ticks) = name_and_ticks(&stat)?;
        if name.starts_with("vcpu") {
            vcpus += ticks;
        }
    }
    let (_, all) = name_and_ticks(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?)?;
    Ok(all - vcpus)
}

/// The name and the time in a line of `stat`: fields 2, and 14 and 15.
fn name_and_ticks(stat: &str) -> Result<(&str, i64)> {
    let (head, rest) = stat.rsplit_once(") ").context("a line of stat")?;
    let (_, name) = head.split_once('(').context("a name in a line of stat")?;
    let times = rest.split(' ').skip(11).take(2).map(str::parse::<i64>);
    Ok((name, times.sum::<Result<i64, _>>()?))
}
