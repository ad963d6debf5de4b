//! Promise: whatever a client does to the control socket, the guest and other clients do not
//! notice.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, prlimit};
use tests::clients;
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("socket::garbage_and_broken_clients", broken_clients),
    ("socket::many_clients_at_once", many_clients),
    ("socket::silent_clients_keep_nobody_out", silent_clients),
    ("socket::slow_and_wrong_clients_cost_little", |lab| clients::clients(lab, Duration::from_secs(8))),
    ("socket::a_group_may_read_and_others_nothing", roles),
];

fn broken_clients(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    let mode = std::fs::symlink_metadata(vm.socket())?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the socket's mode is {mode:o}");
    vm.hammer("getppid", 0, 1)?;
    let plan = redirect_plan("interrupted", None).to_string();
    let whole = format!("POST /patches HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{plan}", plan.len());
    let endless = format!("GET /{} HTTP/1.1\r\n", "a".repeat(1 << 20));
    let headers = format!("GET /vm HTTP/1.1\r\n{}", "X-Y: z\r\n".repeat(10_000));
    let garbage: Vec<u8> = (0..100_000_u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let wrong: [&[u8]; 9] = [
        b"",
        b"\x00\x01\x02\xff\xfe\r\n\r\n",
        b"GET",
        b"GET /vm HTTP/9.9\r\n\r\n",
        b"POST /patches HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /patches HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n{",
        endless.as_bytes(),
        headers.as_bytes(),
        &garbage,
    ];
    for bytes in wrong {
        let mut stream = UnixStream::connect(vm.socket())?;
        // The server may hang up in the middle of it.
        let _ = stream.write_all(bytes);
    }
    // Clients that die in the middle of a good request, at every tenth byte, and right after.
    for cut in (0..=whole.len()).step_by(10).chain([whole.len()]) {
        let mut stream = UnixStream::connect(vm.socket())?;
        stream.write_all(&whole.as_bytes()[..cut])?;
    }
    // One that says nothing at all is hung up on.
    let mut silent = UnixStream::connect(vm.socket())?;
    silent.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut rest = Vec::new();
    ensure!(silent.read_to_end(&mut rest).is_ok(), "a silent client is kept for a minute");

    // The cut-off requests were dropped. The whole one was obeyed or dropped, depending on
    // when its client was found to be gone; nothing lies between.
    let (status, answer) = vm.request(Method::GET, "/patches", b"")?;
    let patches = answer.as_array().map_or(0, Vec::len);
    ensure!(status == 200 && patches <= 1, "{status}: {answer:#}");
    vm.expect_all(patches == 1)?;
    if patches == 1 {
        vm.revert("interrupted")?;
    }
    vm.apply(&redirect_plan("whole", None))?;
    vm.expect_all(true)?;
    vm.revert("whole")?;
    vm.expect_all(false)?;
    for (method, uri, expected) in [
        (Method::GET, "/", 404),
        (Method::GET, "/nothing/here", 404),
        (Method::DELETE, "/vm", 405),
        (Method::GET, "/vm/pause", 405),
        (Method::PUT, "/vm/pause?fast", 400),
    ] {
        let (status, answer) = vm.request(method, uri, b"")?;
        ensure!(status == expected && answer["error"].is_string(), "{uri}: {status} {answer:#}");
    }
    vm.expect_no_kernel_errors()
}

fn many_clients(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    vm.hammer("getppid", 0, 1)?;
    let socket = vm.socket();
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let socket = socket.clone();
            std::thread::spawn(move || -> Result<(usize, usize)> {
                let (mut applied, mut refused) = (0, 0);
                for round in 0..10 {
                    // All want the same site; the late are refused, and plans never interleave.
                    let name = format!("client{number}-{round}");
                    let plan = redirect_plan(&name, None).to_string().into_bytes();
                    let (_, answer) = vmm::api::client::request(&socket, Method::POST, "/patches", plan)?;
                    match answer["state"].as_str() {
                        Some("applied") => {
                            applied += 1;
                            let uri = format!("/patches/{name}/revert");
                            let (_, answer) =
                                vmm::api::client::request(&socket, Method::POST, &uri, Vec::new())?;
                            ensure!(answer["state"] == "reverted", "{answer:#}");
                        }
                        Some("refused") => refused += 1,
                        _ => anyhow::bail!("{answer:#}"),
                    }
                }
                Ok((applied, refused))
            })
        })
        .collect();
    let mut total = (0, 0);
    for client in clients {
        let (applied, refused) = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        total = (total.0 + applied, total.1 + refused);
    }
    ensure!(total.0 > 0 && total.0 + total.1 == 80, "{total:?}");
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()
}

/// Connections that say nothing, more than there are descriptors for: a good client is served throughout.
fn silent_clients(lab: &Lab) -> Result<()> {
    let vm = Vm::start(lab, &Setup::cpus(2))?;
    let descriptors =
        || -> Result<usize> { Ok(std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))?.count()) };
    let before = descriptors()?;
    // Fewer than it would take for the connections that it allows.
    let limit = before as u64 + 20;
    let pid = i32::try_from(vm.pid())?;
    let few = Rlimit { current: Some(limit), maximum: Some(limit) };
    prlimit(rustix::process::Pid::from_raw(pid), Resource::Nofile, few)?;
    let mut idle = Vec::new();
    for round in 0..300 {
        let mut client = UnixStream::connect(vm.socket())?;
        // Some begin a request and go on a byte at a time.
        if round % 3 == 0 {
            client.write_all(b"POST /patches HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")?;
        }
        idle.push(client);
        if round % 10 == 0 {
            let (status, _) = vm.request(Method::GET, "/vm", b"")?;
            ensure!(status == 200, "with {round} silent clients: {status}");
            for client in idle.iter_mut().step_by(3) {
                // Most have been hung up on by now.
                let _ = client.write_all(b" ");
            }
        }
    }
    let (used, ticks) = (descriptors()?, cpu_ticks(vm.pid(), "api")?);
    ensure!(used <= before + 20, "{used} descriptors, {before} before");
    std::thread::sleep(Duration::from_secs(2));
    // A hundredth of a second each (proc_pid_stat(5)).
    let spent = cpu_ticks(vm.pid(), "api")? - ticks;
    ensure!(spent < 20, "{spent} ticks of 200 while nobody asks: it spins");
    drop(idle);
    let plan = redirect_plan("after", None);
    ensure!(vm.apply(&plan)?["state"] == "applied");
    for _ in 0..1000 {
        drop(UnixStream::connect(vm.socket())?);
    }
    let (status, _) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(status == 200, "after a thousand connections: {status}");
    vm.power_off()
}

/// The CPU time of a process's thread, in ticks.
fn cpu_ticks(pid: u32, thread: &str) -> Result<u64> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        let Some((head, rest)) = stat.rsplit_once(") ") else { continue };
        if head.ends_with(&format!("({thread}")) {
            // Fields 14 and 15 of the line, of which the first two are gone.
            let times = rest.split(' ').skip(11).take(2).map(str::parse::<u64>);
            return Ok(times.sum::<Result<u64, _>>()?);
        }
    }
    anyhow::bail!("process {pid} has no thread {thread}")
}

/// Only where this process may run programs as other users.
fn roles(lab: &Lab) -> Result<()> {
    const GROUP: u32 = 4242;
    let arguments = vec!["--api-group".to_owned(), GROUP.to_string()];
    let vm = Vm::start(lab, &Setup { arguments, ..Setup::cpus(2) })?;
    std::fs::set_permissions(vm.folder(), std::fs::Permissions::from_mode(0o755))?;
    let status = vm.socket().symlink_metadata()?;
    ensure!(status.permissions().mode() & 0o777 == 0o660 && status.gid() == GROUP, "{status:?}");
    let ask = |group: u32, arguments: &[&str]| -> Result<(bool, String)> {
        let mut command = std::process::Command::new(&lab.vmm);
        let output =
            command.args(arguments).arg("--socket").arg(vm.socket()).uid(1000).gid(group).output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    };
    for reading in [&["vm", "info"][..], &["patch", "list"], &["events"]] {
        let (done, text) = ask(GROUP, reading)?;
        ensure!(done, "{reading:?}: {text}");
    }
    for changing in [&["vm", "pause"][..], &["vm", "vcpus"], &["patch", "revert", "x"]] {
        let (done, text) = ask(GROUP, changing)?;
        ensure!(!done && text.contains("for the VM's owner"), "{changing:?}: {text}");
    }
    let (done, text) = ask(4343, &["vm", "info"])?;
    ensure!(!done && text.contains("ermission denied"), "another group: {text}");
    // Even if the socket's mode was changed.
    std::fs::set_permissions(vm.socket(), std::fs::Permissions::from_mode(0o666))?;
    // Again and again: an answer that comes before the question is none to a client.
    for _ in 0..10 {
        let (done, text) = ask(4343, &["vm", "info"])?;
        ensure!(!done && text.contains("another user"), "another group, mode 0666: {text}");
    }
    vm.power_off()
}
