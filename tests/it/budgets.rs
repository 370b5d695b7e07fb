//! Bodies that never end, from one address, from many and from an account: with the limits that a server has by default,
//! all others are served meanwhile.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::signer::Identity;
use crate::harness::{Binary, Client, Device, Keys, PASSWORD, deployment, send_request, unique_name, within};

/// As many unfinished bodies as once held all of the memory for bodies.
const BODIES: usize = 66;
/// Rounds of what honest clients do beside the attack.
const ROUNDS: usize = 4;
const MIB: u64 = 1 << 20;

/// Requests of honest clients, each from an address of its own behind the trusted proxy.
struct Honest {
    client: Client,
    alice: Device,
    bob: Device,
    /// Its tokens change with each round.
    carol: Device,
    addresses: u32,
}

impl Honest {
    async fn begin(server: &Binary) -> Self {
        let client = server.client();
        let [alice, bob, carol] = [2, 3, 4].map(|host| register(&client, Keys::default(), format!("192.0.2.{host}")));
        let (alice, bob, carol) = (alice.await, bob.await, carol.await);
        Self { client, alice, bob, carol, addresses: 0 }
    }

    fn address(&mut self) -> String {
        self.addresses += 1;
        format!("203.0.113.{}", self.addresses)
    }

    /// A send, a log-in, a refresh and a sign-up, all of which have to succeed.
    async fn round(&mut self, keys: Keys) {
        let body = prost::Message::encode_to_vec(&send_request(&[(&self.bob, &[7; 50_000])]));
        let send = self.alice.messages_request(Uuid::new_v4(), body).header("x-forwarded-for", self.address());
        within("a send", send.send()).await.expect(200);

        let body =
            json!({"username": self.carol.username, "password": PASSWORD, "deviceId": self.carol.id.to_string()});
        let log_in = self.client.post("/v1/session").header("x-forwarded-for", self.address()).json(&body);
        let session = within("a log-in", log_in.send()).await.expect(200).json();

        let body = json!({"refreshToken": session["refreshToken"]});
        let refresh = self.client.post("/v1/session/refresh").header("x-forwarded-for", self.address()).json(&body);
        within("a refresh", refresh.send()).await.expect(200);

        let address = self.address();
        within("a sign-up", register(&self.client, keys, address)).await;
    }
}

async fn register(client: &Client, keys: Keys, address: String) -> Device {
    let identity = std::sync::Arc::new(Identity::generate());
    let username = unique_name("user");
    let mut body = keys.to_json(&identity);
    body["username"] = json!(username);
    body["password"] = json!(PASSWORD);
    let answer =
        client.post("/v1/users").header("x-forwarded-for", &address).json(&body).send().await.expect(201).json();
    Device::from_answer(client, identity, username, &answer)
}

/// A request whose body announces `announced` bytes and stops before the last one.
async fn unfinished(server: SocketAddr, head: String, announced: usize) -> TcpStream {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let head = format!("{head}host: x\r\ncontent-type: application/json\r\ncontent-length: {announced}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    // A server that has no room for it reads no further, or closes.
    let _ = tokio::time::timeout(Duration::from_secs(2), stream.write_all(&vec![b' '; announced - 1])).await;
    stream
}

async fn hold(bodies: impl Iterator<Item = impl Future<Output = TcpStream>>) -> Vec<TcpStream> {
    futures_util::future::join_all(bodies).await
}

fn assert_memory_is_bounded(server: &Binary) {
    let peak = server.peak_bytes();
    assert!(peak < 256 * MIB, "{} MiB", peak / MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_bodies_of_one_address_stop_no_other_client() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_limited(folder.path(), &[]).await;
    let mut honest = Honest::begin(&server).await;
    let head = || "POST /v1/devices HTTP/1.1\r\nx-forwarded-for: 198.51.100.1\r\n".to_owned();
    // As it was seen, and as large as a body of this route may be.
    let bodies = (0..2 * BODIES).map(|number| if number < BODIES { 2 << 20 } else { 460 << 10 });
    let held = hold(bodies.map(|bytes| unfinished(server.address(), head(), bytes))).await;
    for _ in 0..ROUNDS {
        honest.round(Keys { one_time: 100, pq_one_time: Some(100) }).await;
    }
    assert_memory_is_bounded(&server);
    drop((held, server));
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_bodies_of_many_addresses_stop_no_other_client() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_limited(folder.path(), &[]).await;
    let mut honest = Honest::begin(&server).await;
    let head = |number: usize| format!("POST /v1/devices HTTP/1.1\r\nx-forwarded-for: 198.51.100.{number}\r\n");
    let held = hold((0..2 * BODIES).map(|number| unfinished(server.address(), head(number), 460 << 10))).await;
    // With all of the room for large bodies taken, the reserve is for small ones.
    for _ in 0..ROUNDS {
        honest.round(Keys { one_time: 100, pq_one_time: Some(0) }).await;
    }
    assert_memory_is_bounded(&server);
    drop((held, server));
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_sends_of_one_account_stop_no_other_client() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_limited(folder.path(), &[]).await;
    let mut honest = Honest::begin(&server).await;
    let mallory = register(&server.client(), Keys::default(), "192.0.2.9".to_owned()).await;
    let head = |number: usize| {
        let token = &mallory.token;
        format!(
            "POST /v1/messages HTTP/1.1\r\nx-forwarded-for: 198.51.100.{number}\r\nauthorization: Bearer {token}\r\n"
        )
    };
    let held = hold((0..BODIES).map(|number| unfinished(server.address(), head(number), 2 << 20))).await;
    for _ in 0..ROUNDS {
        honest.round(Keys { one_time: 100, pq_one_time: Some(100) }).await;
    }
    let large = prost::Message::encode_to_vec(&send_request(&[(&honest.bob, &[7; 2_000_000])]));
    let send = honest.alice.messages_request(Uuid::new_v4(), large).header("x-forwarded-for", honest.address());
    within("a large send", send.send()).await.expect(200);
    assert_memory_is_bounded(&server);
    drop((held, server));
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_sends_of_four_accounts_at_one_address_stop_no_other_client() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_limited(folder.path(), &[]).await;
    let mut honest = Honest::begin(&server).await;
    let client = server.client();
    let mut accounts = Vec::new();
    for host in 9..13 {
        accounts.push(register(&client, Keys::default(), format!("192.0.2.{host}")).await);
    }
    let head = |number: usize| {
        let token = &accounts[number % 4].token;
        format!("POST /v1/messages HTTP/1.1\r\nx-forwarded-for: 198.51.100.1\r\nauthorization: Bearer {token}\r\n")
    };
    let held = hold((0..32).map(|number| unfinished(server.address(), head(number), 2 << 20))).await;
    let large = prost::Message::encode_to_vec(&send_request(&[(&honest.bob, &[7; 2_000_000])]));
    let send = honest.alice.messages_request(Uuid::new_v4(), large).header("x-forwarded-for", honest.address());
    within("a large send", send.send()).await.expect(200);
    for _ in 0..ROUNDS {
        honest.round(Keys { one_time: 100, pq_one_time: Some(100) }).await;
    }
    assert_memory_is_bounded(&server);
    drop((held, server));
    deployment::drop_state(folder.path());
}

/// Addresses that guess, in networks of as many, and the pace that the limit for addresses allows each.
const GUESSERS: usize = 240;
const OF_A_NETWORK: usize = 24;
const GUESSES: usize = 4;
const PACE: Duration = Duration::from_secs(1);

/// Passwords for names without an account, from one address. Returns how many of them were looked at.
async fn guess(client: Client, number: usize) -> usize {
    let address = format!("198.51.{}.{}", number / OF_A_NETWORK, number % OF_A_NETWORK);
    let mut pace = tokio::time::interval(PACE);
    let mut looked_at = 0;
    for _ in 0..GUESSES {
        pace.tick().await;
        let (username, device) = (unique_name("unknown"), Uuid::new_v4().to_string());
        let body = json!({"username": username, "password": PASSWORD, "deviceId": device});
        let request = client.post("/v1/session").header("x-forwarded-for", &address).json(&body);
        looked_at += usize::from(request.send().await.status == 401);
    }
    looked_at
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_and_forty_addresses_at_their_allowed_rate_stop_no_log_in() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_limited(folder.path(), &[]).await;
    let client = server.client();
    let mut honest = Vec::new();
    for number in 0..10 {
        honest.push(register(&client, Keys::default(), format!("203.{number}.113.1")).await);
    }
    let guessing: Vec<_> = (0..GUESSERS).map(|number| tokio::spawn(guess(client.clone(), number))).collect();
    let log_in = async |number: usize, device: &Device| {
        // Spread over the time of the attack.
        tokio::time::sleep(PACE * GUESSES as u32 * number as u32 / 10).await;
        let body = json!({"username": device.username, "password": PASSWORD, "deviceId": device.id.to_string()});
        let request = client.post("/v1/session").header("x-forwarded-for", format!("203.{number}.113.2")).json(&body);
        request.send().await.status
    };
    let log_ins = honest.iter().enumerate().map(|(number, device)| log_in(number, device));
    assert_eq!(futures_util::future::join_all(log_ins).await, [200; 10]);
    let mut looked_at = 0;
    for guesser in guessing {
        looked_at += guesser.await.unwrap();
    }
    assert!(looked_at > 20, "only {looked_at} guesses were looked at");
    assert_memory_is_bounded(&server);
    drop(server);
    deployment::drop_state(folder.path());
}

#[tokio::test]
async fn a_body_larger_than_its_route_takes_is_refused_by_its_head() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    for (path, allowed) in [
        ("/v1/session", 16 << 10),
        ("/v1/session/refresh", 16 << 10),
        ("/v1/link-sessions", 16 << 10),
        ("/v1/users", 464 << 10),
        ("/v1/users/reset", 464 << 10),
        ("/v1/devices", 464 << 10),
    ] {
        let head = |bytes: usize| {
            format!(
                "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {bytes}\r\n\r\n"
            )
        };
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(head(allowed + 1).as_bytes()).await.unwrap();
        let mut status = [0; 12];
        within("an answer", stream.read_exact(&mut status)).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 413", "{path}");
        // The largest that is allowed is read, and found to be no JSON object.
        let answer = server.client().post(path).header("content-type", "application/json").body(vec![b' '; allowed]);
        answer.send().await.expect(400);
    }
    drop(server);
    deployment::drop_state(folder.path());
}

/// Requests that are sent ahead and all refused get their answers ever more slowly.
#[tokio::test]
async fn a_client_that_sends_refused_requests_ahead_is_slowed() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_limited(folder.path(), &[]).await;
    // Not 127.0.0.1, which is trusted as a proxy: a connection of many clients is not slowed.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
    let mut stream = socket.connect(server.address()).await.unwrap();
    let request = "GET /v1/devices HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(request.repeat(500).as_bytes()).await.unwrap();
    let mut answers = Vec::new();
    let reading = async { while stream.read_buf(&mut answers).await.is_ok_and(|read| read > 0) {} };
    // What is observed is how few answers there are after this time.
    let _ = tokio::time::timeout(Duration::from_secs(3), reading).await;
    let count = |status: &str| String::from_utf8_lossy(&answers).matches(status).count();
    let (passed, refused) = (count("HTTP/1.1 401 "), count("HTTP/1.1 429 "));
    assert!(passed >= 20, "{passed} passed");
    assert!((20..100).contains(&refused), "{refused} were refused in three seconds, {passed} passed");
    drop(server);
    deployment::drop_state(folder.path());
}
