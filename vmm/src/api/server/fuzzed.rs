//! What holds for the control socket whatever a client sends; for the fuzz target `http`, and in a short
//! form here. The server is the real one; of the VM there is a controller that has ended, so that whatever
//! becomes a command is answered with 503.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::api::access::Role;
use crate::api::connections::Connections;
use crate::api::event_stream::EventStream;
use crate::api::routes::ApiState;
use crate::api::server::serve;
use crate::guest::events::Events;
use crate::host::peer::Peer;
use crate::patch::controller::Controls;

/// Time for a connection whose client has sent all that it will.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer to one connection: more than all of its requests can get.
const LONGEST: usize = 1 << 20;
/// What requests are answered with.
const STATUS: [&str; 10] = ["100", "200", "400", "403", "404", "405", "408", "413", "431", "503"];
/// What an answer begins with that is no error, and what one has that is not a stream.
const OK: &[u8] = b" 200 OK\r\n";
const LENGTH: &[u8] = b"content-length:";
/// The answer to a command.
const ENDED: &[u8] = b"HTTP/1.1 503";

/// Sends the input to the server, in pieces as long as its first byte says, as a reader or as the owner.
/// Answers begin as such, the connection ends soon after the client's last byte unless it follows the events,
/// a reader gives no command but to read, and the next client is served.
///
/// # Panics
/// When that does not hold.
pub fn client(input: &[u8]) {
    let Some((choice, bytes)) = input.split_first() else { return };
    let role = if choice & 1 == 0 { Role::Owner } else { Role::Reader };
    let piece = usize::from(choice >> 1) + 1;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let events = EventStream::new(Arc::new(Events::default()));
        let state = ApiState::new(Controls::of_none(), events, None);
        let connections = Connections::default();
        let answer = sent(&connections, &state, role, bytes.chunks(piece)).await;
        if !answer.is_empty() {
            let status = answer.strip_prefix(b"HTTP/1.1 ").or(answer.strip_prefix(b"HTTP/1.0 "));
            let status = status.and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok());
            assert!(status.is_some_and(|status| STATUS.contains(&status)), "{}", answer.escape_ascii());
        }
        let count = |text: &[u8], all: &[u8]| all.windows(text.len()).filter(|at| *at == text).count();
        if role == Role::Reader && count(b"503", bytes) == 0 {
            let reads = count(b"GET ", bytes);
            assert!(count(ENDED, &answer) <= reads, "a command of a reader: {}", answer.escape_ascii());
        }
        let request = b"GET /events HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\n\r\n";
        let answer = sent(&connections, &state, Role::Owner, std::iter::once(&request[..])).await;
        assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", answer.escape_ascii());
    });
}

/// What the server answers until it closes the connection.
async fn sent<'a>(
    connections: &Connections,
    state: &ApiState,
    role: Role,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> Vec<u8> {
    let (client, server) = UnixStream::pair().expect("a pair of sockets");
    let place = Arc::new(connections.place(role).expect("no connection is left behind"));
    let (served, state) = (place.clone(), state.clone());
    let peer = Peer { uid: 0, gid: 0, pid: 0, executable: None };
    let task = tokio::spawn(async move { drop(serve(server, (role, peer), served, state).await) });
    place.taken_by(task.abort_handle());
    for piece in pieces {
        // The server closes a connection whose request it can't read.
        if send(&client, piece).await.is_none() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let _ = shutdown(&client, Shutdown::Write);
    let mut answer = Vec::new();
    let ended = timeout(PATIENCE, receive(&client, &mut answer)).await.is_ok();
    assert!(ended, "the connection does not end: {}", answer.escape_ascii());
    assert!(answer.len() < LONGEST, "the answer does not end");
    // The client hangs up.
    drop(client);
    task.abort();
    let _ = task.await;
    answer
}

/// Sends all of it. `None` if the server has closed the connection.
async fn send(client: &UnixStream, mut bytes: &[u8]) -> Option<()> {
    while !bytes.is_empty() {
        client.writable().await.ok()?;
        match client.try_write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
    Some(())
}

/// Whether the last answer is the stream of events, which goes on while the client is there.
fn follows_events(answers: &[u8]) -> bool {
    let starts = answers.windows(OK.len()).rposition(|at| at == OK);
    let head = starts.map(|start| &answers[start..]).unwrap_or_default();
    let end = head.windows(4).position(|at| at == b"\r\n\r\n");
    end.is_some_and(|end| !head[..end].windows(LENGTH.len()).any(|at| at == LENGTH))
}

/// Receives until the server closes the connection, or resets it with bytes of the client unread, or until
/// it streams events.
async fn receive(client: &UnixStream, into: &mut Vec<u8>) {
    let mut piece = [0; 4096];
    while into.len() < LONGEST && !follows_events(into) && client.readable().await.is_ok() {
        match client.try_read(&mut piece) {
            Ok(0) => return,
            Ok(read) => into.extend(&piece[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    const SEEDS: [&str; 9] = [
        "\0GET /vm HTTP/1.1\r\nHost: vmm\r\n\r\n",
        "\x01PUT /vm/pause?hurry=false HTTP/1.1\r\nHost: vmm\r\n\r\n",
        "\x11DELETE /vm/arena HTTP/1.1\r\nHost: vmm\r\n\r\nGET /patches/x HTTP/1.1\r\nHost: vmm\r\n\r\n",
        "\x40POST /patches HTTP/1.1\r\nHost: vmm\r\nContent-Length: 5\r\n\r\n{\"a\":",
        "\x7ePOST /patches/check HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a\":\r\n0\r\n\r\n",
        "\x05POST /patches HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n",
        "\x20GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n\r\n\r\nGET /vm",
        "\x60PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\x02GET /events/stream HTTP/1.1\r\nHost: vmm\r\n\r\n",
    ];

    #[test]
    fn the_seeds_are_answered() {
        SEEDS.iter().for_each(|seed| client(seed.as_bytes()));
        // For the fuzzer.
        if let Some(folder) = std::env::var_os("FUZZ_CORPUS") {
            let folder = std::path::PathBuf::from(folder).join("http");
            std::fs::create_dir_all(&folder).expect("a folder");
            for (number, seed) in SEEDS.iter().enumerate() {
                std::fs::write(folder.join(number.to_string()), seed).expect("written");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 2000, rng_seed: RngSeed::Fixed(4), ..ProptestConfig::default()
        })]

        #[test]
        fn whatever_a_client_sends_ends_and_the_next_is_served(
            seed in prop::sample::select(SEEDS.to_vec()),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<[u8; 3]>(), 0..4_usize, 0..4_usize), 0..5),
        ) {
            let mut input = seed.as_bytes().to_vec();
            for (at, bytes, removed, put) in edits {
                let at = at.index(input.len());
                let end = (at + removed).min(input.len());
                input.splice(at..end, bytes[..put].iter().copied());
                if input.is_empty() {
                    input.push(0);
                }
            }
            client(&input);
        }
    }
}
