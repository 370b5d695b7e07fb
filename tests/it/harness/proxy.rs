//! A TCP proxy that does to connections what networks do: cut them, refuse them, swallow what goes one way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client to the target.
    Up,
    /// From the target to the client.
    Down,
}

/// A proxy on a free port. It lives as long as the runtime of its test.
pub struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    accepted: Arc<AtomicU64>,
}

#[derive(Clone, Copy)]
struct Weather {
    target: SocketAddr,
    is_refusing: bool,
    /// Connections with a smaller number are cut.
    cut_below: u64,
    /// Likewise for frozen ones.
    frozen_up_below: u64,
    frozen_down_below: u64,
}

impl Weather {
    fn is_frozen(&self, connection: u64, way: Way) -> bool {
        connection < if way == Way::Up { self.frozen_up_below } else { self.frozen_down_below }
    }
}

impl Proxy {
    /// Forwards to this address.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let weather = Weather { target, is_refusing: false, cut_below: 0, frozen_up_below: 0, frozen_down_below: 0 };
        let (weather, forecast) = watch::channel(weather);
        let accepted = Arc::<AtomicU64>::default();
        tokio::spawn(accept(listener, forecast, accepted.clone()));
        Self { address, weather, accepted }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections there have been, the refused ones included.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// From now on new connections go there.
    pub fn set_target(&self, target: SocketAddr) {
        self.weather.send_modify(|weather| weather.target = target);
    }

    /// Closes all connections there are. New ones work.
    pub fn cut(&self) {
        let accepted = self.accepted();
        self.weather.send_modify(|weather| weather.cut_below = accepted);
    }

    /// Closes new connections as soon as they are made, until told otherwise.
    pub fn refuse(&self, is_refusing: bool) {
        self.weather.send_modify(|weather| weather.is_refusing = is_refusing);
    }

    /// Forwards nothing more this way on the connections there are, and closes none. New ones work.
    pub fn freeze(&self, way: Way) {
        let accepted = self.accepted();
        self.weather.send_modify(|weather| match way {
            Way::Up => weather.frozen_up_below = accepted,
            Way::Down => weather.frozen_down_below = accepted,
        });
    }

    /// Forwards everything again, also what was held back.
    pub fn thaw(&self) {
        self.weather.send_modify(|weather| (weather.frozen_up_below, weather.frozen_down_below) = (0, 0));
    }
}

async fn accept(listener: TcpListener, weather: watch::Receiver<Weather>, accepted: Arc<AtomicU64>) {
    loop {
        let Ok((client, _)) = listener.accept().await else { return };
        let connection = accepted.fetch_add(1, Ordering::SeqCst);
        if !weather.borrow().is_refusing {
            tokio::spawn(forward(client, connection, weather.clone()));
        }
    }
}

async fn forward(client: TcpStream, connection: u64, mut weather: watch::Receiver<Weather>) {
    let target = weather.borrow().target;
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let up = pump(from_client, to_server, weather.clone(), connection, Way::Up);
    let down = pump(from_server, to_client, weather.clone(), connection, Way::Down);
    tokio::select! {
        () = up => {}
        () = down => {}
        _ = weather.wait_for(|weather| connection < weather.cut_below) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut weather: watch::Receiver<Weather>,
    connection: u64,
    way: Way,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let thawed = weather.wait_for(|weather| !weather.is_frozen(connection, way)).await.is_ok();
        if !thawed || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
