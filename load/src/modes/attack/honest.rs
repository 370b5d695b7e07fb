//! Ten clients that do what clients do, well within every limit.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use prost::Message as _;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};
use uuid::Uuid;

use super::record::PATIENCE;
use super::scene::{Account, CLIENTS, Scene};
use crate::http::{Connection, bearer};
use crate::modes::attachments::upload_one;
use crate::people::{PASSWORD, device};
use crate::sender::random_bytes;
use crate::socket::{SMALL_BUFFER, Socket};
use crate::wire::{DeviceMessage, Label, SendMessageResponse, put_request};

/// Pauses between two operations of one client.
const SENDS: Duration = Duration::from_secs(1);
const FETCHES: Duration = Duration::from_secs(4);
const SESSIONS: Duration = Duration::from_secs(5);
const ATTACHMENTS: Duration = Duration::from_secs(5);
/// Between two looks at the readiness.
const PROBES: Duration = Duration::from_millis(500);
/// Bytes of messages and attachments.
const MESSAGE: usize = 1024;
const ATTACHMENT: usize = 16 << 10;
/// Before a socket that was closed is opened again.
const PAUSE: Duration = Duration::from_millis(200);

/// Says whether the measurement still goes on.
pub type Ending = watch::Receiver<bool>;

/// The running clients.
pub struct Clients {
    client_loops: JoinSet<()>,
    sockets: JoinSet<()>,
}

impl Clients {
    /// Opens the sockets of all clients. They receive from now on.
    pub async fn connect(scene: &Arc<Scene>) -> Result<Self> {
        let mut sockets = JoinSet::new();
        for n in 0..CLIENTS {
            let socket = open(scene, n).await?;
            sockets.spawn(receive(scene.clone(), n, socket));
        }
        Ok(Self { client_loops: JoinSet::new(), sockets })
    }

    /// Begins to send, fetch, refresh, log in, sign up, upload and download; for `duration` in all.
    pub fn begin(&mut self, scene: &Arc<Scene>, duration: Duration, ending: &Ending) {
        for n in 0..CLIENTS {
            for operation in Operation::ALL {
                let pause = operation.pause().unwrap_or(duration);
                let client_loop = ClientLoop { scene: scene.clone(), n, operation, pause, ending: ending.clone() };
                self.client_loops.spawn(client_loop.run());
            }
        }
        self.client_loops.spawn(readiness(scene.clone(), ending.clone()));
    }

    /// Waits for what is still under way, and for the last messages.
    pub async fn end(mut self, scene: &Scene) {
        while self.client_loops.join_next().await.is_some() {}
        scene.record.wait_for_deliveries().await;
        self.sockets.shutdown().await;
    }
}

/// What a client does again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Send,
    Fetch,
    Refresh,
    LogIn,
    /// Up and down again.
    Attachment,
    SignUp,
}

impl Operation {
    const ALL: [Self; 6] = [Self::Send, Self::Fetch, Self::Refresh, Self::LogIn, Self::Attachment, Self::SignUp];

    fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Fetch => "prekey fetch",
            Self::Refresh => "refresh",
            Self::LogIn => "log-in",
            Self::Attachment => "attachment",
            Self::SignUp => "sign-up",
        }
    }

    /// How many clients later than the sends of the same client it begins, so that what counts as one class of requests
    /// doesn't come at the same time.
    fn offset(self) -> usize {
        match self {
            Self::Send | Self::Refresh => 0,
            Self::LogIn | Self::Fetch => 3,
            Self::SignUp | Self::Attachment => 6,
        }
    }

    /// Between two of one client. `None`: each client does it once.
    fn pause(self) -> Option<Duration> {
        match self {
            Self::Send => Some(SENDS),
            Self::Fetch => Some(FETCHES),
            Self::Refresh | Self::LogIn => Some(SESSIONS),
            Self::Attachment => Some(ATTACHMENTS),
            Self::SignUp => None,
        }
    }
}

/// One kind of operation of one client.
struct ClientLoop {
    scene: Arc<Scene>,
    n: usize,
    operation: Operation,
    pause: Duration,
    ending: Ending,
}

impl ClientLoop {
    /// Does the same at fixed times over one connection, which is opened again after a failure.
    async fn run(mut self) {
        // The clients one after the other, not all at once.
        let place = (self.n + self.operation.offset()) % CLIENTS;
        let phase = self.pause * place as u32 / CLIENTS as u32;
        let mut ticks = ticks(phase, self.pause);
        let scene = self.scene.clone();
        let mut open: Option<Connection> = None;
        for turn in 0.. {
            if !is_next(&mut ticks, &mut self.ending).await {
                return;
            }
            let one = scene.record.operation(self.operation.name(), async {
                let connection = match &mut open {
                    Some(connection) => connection,
                    None => open.insert(scene.clients[self.n].device.connect(scene.api).await?),
                };
                self.once(connection, turn).await
            });
            if one.await.is_err() {
                open = None;
            }
        }
    }

    async fn once(&self, connection: &mut Connection, turn: usize) -> Result<()> {
        let (scene, n) = (&*self.scene, self.n);
        let account = &scene.clients[n].device;
        match self.operation {
            Operation::Send => {
                let label = Label { sender: n as u32, number: turn as u32, ..Label::default() };
                send(scene, connection, account, label, (n + 1) % CLIENTS).await
            }
            Operation::Fetch => {
                // Each of the others in turn, so that none is asked for its keys more often than people do.
                let other = &scene.clients[(n + 1 + turn % (CLIENTS - 1)) % CLIENTS].device;
                fetch_bundle(connection, account, other).await.map(drop)
            }
            Operation::Refresh => {
                let asked = json!({"refreshToken": account.refresh_token()});
                let answer = connection.post_json("/v1/session/refresh", &asked).await?.json(200)?;
                account.renew(device(&answer).context("not an AuthResponse")?);
                Ok(())
            }
            // With an account that has no socket, because a log-in ends the device's former session.
            Operation::LogIn => log_in(connection, &scene.clients[n].other).await,
            Operation::Attachment => {
                let (bytes, token) = (random_bytes(ATTACHMENT), account.token());
                let id = upload_one(connection, &token, &bytes).await?;
                connection.download(&format!("/v1/attachments/{id}"), &token, &bytes).await
            }
            Operation::SignUp => scene.registrar.sign_up(connection, 1000 + n).await.map(drop),
        }
    }
}

/// What the operator's monitoring sees.
async fn readiness(scene: Arc<Scene>, mut ending: Ending) {
    let mut ticks = ticks(Duration::ZERO, PROBES);
    while is_next(&mut ticks, &mut ending).await {
        let probe = async { Connection::open(scene.management).await?.get("/readyz").await?.expect(200) };
        // It is counted, and there is nothing else to do about it.
        let _ = scene.record.operation("readiness", probe).await;
    }
}

fn ticks(phase: Duration, pause: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + phase, pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits for the next tick. False if the measurement is over.
async fn is_next(ticks: &mut Interval, ending: &mut Ending) -> bool {
    tokio::select! {
        biased;
        _ = ending.wait_for(|is_over| *is_over) => false,
        _ = ticks.tick() => true,
    }
}

async fn open(scene: &Scene, n: usize) -> Result<Socket> {
    let account = &scene.clients[n].device;
    let mut connection = account.connect(scene.api).await?;
    Socket::open(&mut connection, scene.api, &account.current(), SMALL_BUFFER).await
}

/// Receives and acknowledges, and opens the socket again when it is closed.
async fn receive(scene: Arc<Scene>, n: usize, mut socket: Socket) {
    let mut seen = HashSet::new();
    loop {
        match socket.mail().await {
            Ok(mail) => {
                for label in mail.iter().filter_map(|mail| Label::of(&mail.message)) {
                    if seen.insert((label.sender, label.number)) {
                        scene.record.arrived(n, label.sender, label.number);
                    }
                }
                if socket.ack(mail).await.is_ok() {
                    continue;
                }
                scene.record.failure("gateway", "an ack could not be written");
            }
            Err(_) => scene.record.failure("gateway", "closed"),
        }
        socket = loop {
            tokio::time::sleep(PAUSE).await;
            let opening = scene.record.operation("gateway", open(&scene, n));
            if let Ok(socket) = opening.await {
                break socket;
            }
        };
    }
}

/// Sends a message to the device of another client, and expects its arrival.
async fn send(scene: &Scene, connection: &mut Connection, from: &Account, label: Label, to: usize) -> Result<()> {
    scene.record.expect(to, label.sender, label.number);
    let sent = async {
        let device_message = DeviceMessage::to(&scene.clients[to].device.device, label);
        let (status, said) = put(connection, from, "", &[device_message]).await?;
        ensure!(status == 200, "the server answered {status} instead of 200");
        ensure!(said == SendMessageResponse::default(), "something was not queued");
        Ok(())
    };
    let sent = timeout(PATIENCE, sent).await.unwrap_or_else(|_| Err(anyhow!("nothing in time")));
    if sent.is_err() {
        scene.record.give_up(to, label.sender, label.number);
    }
    sent
}

/// One send under a new key, never repeated. Answers the status, and what is said about devices if that is 200.
pub async fn put(
    connection: &mut Connection,
    from: &Account,
    fields: &str,
    device_messages: &[DeviceMessage<'_>],
) -> Result<(u16, SendMessageResponse)> {
    let mut body = Vec::new();
    put_request(&mut body, device_messages, &[0x5a; MESSAGE]);
    let key = Uuid::from_bytes(rand::random());
    let fields = format!("{}idempotency-key: {key}\r\n{fields}", bearer(&from.token()));
    let answer = connection.request("POST", "/v1/messages", &fields, &body).await?;
    let said = if answer.status == 200 { SendMessageResponse::decode(answer.body)? } else { Default::default() };
    Ok((answer.status, said))
}

/// Fetches the bundles of another account. Answers whether a one-time prekey was among them.
pub async fn fetch_bundle(connection: &mut Connection, from: &Account, of: &Account) -> Result<bool> {
    let path = format!("/v1/keys/{}", Uuid::from_bytes(of.device.user));
    let answer = connection.request("GET", &path, &bearer(&from.token()), &[]).await?.json(200)?;
    let bundle = answer["bundles"].get(0).context("no bundle")?;
    Ok(!bundle["oneTimePreKey"].is_null())
}

/// Logs in, and keeps the new tokens. With the refresh token that the device still has, the wrong passwords of others don't
/// slow it; a server that doesn't know the member skips it.
pub async fn log_in(connection: &mut Connection, account: &Account) -> Result<()> {
    let id = Uuid::from_bytes(account.device.id).to_string();
    let mut asked = json!({"username": account.name, "password": PASSWORD, "deviceId": id});
    asked["refreshToken"] = account.refresh_token().into();
    let answer = connection.post_json("/v1/session", &asked).await?.json(200)?;
    account.renew(device(&answer).context("not an AuthResponse")?);
    Ok(())
}
