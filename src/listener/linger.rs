//! Closes a connection whose client may still be sending, so that the client gets the answer.
//!
//! A socket that is closed while bytes wait in it, or come in afterwards, is reset. A reset makes the client's kernel
//! throw away an answer that the client has not read yet. So the server ends its own side of the connection, reads what
//! still comes, and closes when the client has ended its side as well.

use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::api::connections::{Connections, Permit};
use crate::tasks::Tasks;

/// Connections that are read on at a time, in all and for one client. A further connection is closed at once.
const AT_ONCE: usize = 256;
const OF_ONE_CLIENT: usize = 32;
/// The most that is read for one connection: the largest attachment by default, and some more.
const MOST_BYTES: u64 = 64 << 20;
/// The longest time that it takes.
const LONGEST: Duration = Duration::from_secs(60);
/// A client that sends nothing for this long is done.
const SILENCE: Duration = Duration::from_secs(5);
/// After this many bytes reading pauses for this long, so that one connection takes at most 40 MiB/s.
const TURN_BYTES: u64 = 1 << 20;
const PAUSE: Duration = Duration::from_millis(25);
/// Read at a time, into memory that is given back before the next wait.
const PIECE_BYTES: usize = 32 << 10;

/// Reads on, within bounds, on connections that have been answered.
pub(super) struct Lingering {
    places: Connections,
    tasks: Tasks,
}

impl Lingering {
    /// With the same trusted proxies as these connections.
    pub fn beside(connections: &Connections, tasks: Tasks) -> Self {
        Self { places: connections.like(AT_ONCE, OF_ONE_CLIENT), tasks }
    }

    /// Reads on until the client has ended its side, within the limits. `place` is held until then, so that the
    /// connection still counts as open.
    pub fn take_over(&self, stream: TcpStream, place: impl Send + 'static) {
        // A runtime that is ending starts no more tasks.
        let is_running = tokio::runtime::Handle::try_current().is_ok() && !self.tasks.is_stopping();
        let Some(turn) = stream.peer_addr().ok().and_then(|peer| self.places.admit(peer.ip())) else { return };
        if is_running {
            let tasks = self.tasks.clone();
            self.tasks.spawn_tracked(async move {
                let _places: (Permit, _) = (turn, place);
                tokio::select! {
                    () = tasks.stopping() => {}
                    _ = timeout(LONGEST, read_on(stream)) => {}
                }
            });
        }
    }
}

async fn read_on(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    let (mut thrown_away, mut turn) = (0, 0);
    while thrown_away < MOST_BYTES {
        let Ok(readable) = timeout(SILENCE, stream.readable()).await else { break };
        readable?;
        match piece(&stream) {
            Ok(0) => break,
            Ok(bytes) => (thrown_away, turn) = (thrown_away + bytes as u64, turn + bytes as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if turn >= TURN_BYTES {
            turn = 0;
            sleep(PAUSE).await;
        }
    }
    Ok(())
}

fn piece(stream: &TcpStream) -> io::Result<usize> {
    stream.try_read(&mut [0; PIECE_BYTES])
}
