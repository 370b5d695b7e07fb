//! `kill -9` in the middle of everything, again and again: what was answered holds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use uuid::Uuid;

use crate::harness::proto::Envelope;
use crate::harness::{Binary, Database, Device, Event, Keys, Socket, eventually, send_request, within_time};

const CRASHES: usize = 20;
const SENDERS: usize = 4;
const RECEIVERS: usize = 3;

/// What the clients know, whatever became of the server.
#[derive(Default)]
struct Diary {
    /// The texts that were answered with 200.
    answered: Mutex<BTreeSet<Bytes>>,
    /// Under which ids each text has been delivered.
    delivered: Mutex<BTreeMap<Bytes, BTreeSet<Bytes>>>,
    /// The ids that were acknowledged, and those of them that the database had deleted before a crash.
    acknowledged: Mutex<BTreeSet<Bytes>>,
    flushed: Mutex<BTreeSet<Bytes>>,
    /// The one-time prekeys that were handed out, of both kinds.
    prekeys: Mutex<Vec<(&'static str, i64)>>,
    enough: AtomicBool,
}

impl Diary {
    fn is_enough(&self) -> bool {
        self.enough.load(Ordering::Relaxed)
    }

    /// How many messages were answered and how many prekeys handed out so far.
    fn progress(&self) -> (usize, usize) {
        (self.answered.lock().unwrap().len(), self.prekeys.lock().unwrap().len())
    }

    fn note_delivery(&self, envelopes: &[Envelope]) {
        let flushed = self.flushed.lock().unwrap();
        let mut delivered = self.delivered.lock().unwrap();
        for envelope in envelopes {
            assert!(!flushed.contains(&envelope.id), "an acknowledged and deleted message came back");
            delivered.entry(envelope.message.clone()).or_default().insert(envelope.id.clone());
        }
    }
}

/// A client's pause before it tries a server that is down again.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(15)).await;
}

/// Sends one message after another, and repeats each under its key until it is answered.
async fn send(sender: Device, receivers: Vec<Device>, diary: Arc<Diary>) {
    for number in 0.. {
        if diary.is_enough() {
            return;
        }
        let receiver = &receivers[number % RECEIVERS];
        let size = if number % 50 == 0 { 100_000 } else { 100 };
        let text = Bytes::from(format!("{} {number} {}", sender.id, "x".repeat(size)));
        let body = send_request(&[(receiver, &text)]).encode_to_vec();
        let key = Uuid::new_v4();
        loop {
            match sender.messages_request(key, body.clone()).try_send().await {
                Ok(answer) => {
                    assert!(answer.expect(200).body.is_empty());
                    break;
                }
                Err(_) => pause().await,
            }
        }
        diary.answered.lock().unwrap().insert(text);
    }
}

/// Reads whatever comes, and acknowledges about half of it.
async fn receive(receiver: Device, diary: Arc<Diary>) {
    while !diary.is_enough() {
        let Some(mut socket) = connect(&receiver).await else {
            pause().await;
            continue;
        };
        loop {
            match tokio::time::timeout(Duration::from_millis(100), socket.read()).await {
                Err(_) if diary.is_enough() => return,
                Err(_) | Ok(Event::Ping | Event::PreKeys(_)) => {}
                Ok(Event::Mail(envelopes)) => {
                    diary.note_delivery(&envelopes);
                    let acked: Vec<Bytes> =
                        envelopes.into_iter().map(|envelope| envelope.id).filter(|_| rand::random()).collect();
                    diary.acknowledged.lock().unwrap().extend(acked.iter().cloned());
                    if !socket.try_ack_ids(acked).await {
                        break;
                    }
                }
                Ok(_) => break,
            }
        }
    }
}

async fn connect(device: &Device) -> Option<Socket> {
    let answer = device.request("POST", "/v1/gateway/ticket").try_send().await.ok()?.expect(201).json();
    Socket::try_open(device.client.address(), answer["ticket"].as_str()?).await
}

/// Fetches bundles and notes which one-time prekeys came with them.
async fn fetch(asker: Device, target: Device, diary: Arc<Diary>) {
    while !diary.is_enough() {
        let request = asker.request("GET", &format!("/v1/keys/{}", target.user));
        if let Ok(answer) = request.try_send().await {
            let bundle = &answer.expect(200).json()["bundles"][0];
            let mut prekeys = diary.prekeys.lock().unwrap();
            if let Some(id) = bundle["oneTimePreKey"]["keyId"].as_i64() {
                prekeys.push(("elliptic-curve", id));
            }
            if let Some(id) = bundle["pqPreKey"]["keyId"].as_i64().filter(|id| *id < 1_000_000) {
                prekeys.push(("post-quantum", id));
            }
        }
        pause().await;
    }
}

/// Writes down which acknowledged messages are deleted for good. The connection is gone again before the crash, so that
/// the next start has to recover the database.
async fn inspect_the_database(folder: &Path, diary: &Diary) {
    let acknowledged = diary.acknowledged.lock().unwrap().clone();
    let database = Database::of(folder).await;
    let stored = database.message_ids().await;
    database.close().await;
    diary.flushed.lock().unwrap().extend(acknowledged.difference(&stored).cloned());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_survives_twenty_crashes() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--max-pre-keys=2000", "--ws-ack-flush-interval-ms=20"];
    let mut server = Binary::start(folder.path(), &options).await;
    let client = server.client();
    let target = Device::register_with(&client, Keys { one_time: 1500, pq_one_time: Some(300) }).await;
    let mut receivers = Vec::new();
    for _ in 0..RECEIVERS {
        receivers.push(Device::register(&client).await);
    }
    let diary = Arc::new(Diary::default());
    let mut load = Vec::new();
    for receiver in &receivers {
        load.push(tokio::spawn(receive(receiver.clone(), diary.clone())));
    }
    for _ in 0..SENDERS {
        let sender = Device::register(&client).await;
        load.push(tokio::spawn(send(sender.clone(), receivers.clone(), diary.clone())));
        load.push(tokio::spawn(fetch(sender, target.clone(), diary.clone())));
    }

    for _ in 0..CRASHES {
        let (answered, handed_out) = diary.progress();
        let far_enough = async || {
            let (answered_now, handed_out_now) = diary.progress();
            answered_now >= answered + 10 && handed_out_now >= handed_out + 3
        };
        eventually("clients to get on", far_enough).await;
        // A crash may come at any moment, so at a random one.
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..300))).await;
        inspect_the_database(folder.path(), &diary).await;
        tokio::time::sleep(Duration::from_micros(rand::random_range(0..20_000))).await;
        server.kill();
        server = server.start_again(&options).await;
    }

    diary.enough.store(true, Ordering::Relaxed);
    for client in load {
        within_time(Duration::from_secs(60), "the clients to finish", client).await.unwrap();
    }
    assert_nothing_was_lost(folder.path(), &receivers, &diary).await;
    assert_nothing_was_repeated(&diary);
}

async fn assert_nothing_was_lost(folder: &Path, receivers: &[Device], diary: &Diary) {
    let database = Database::of(folder).await;
    let mut left = BTreeSet::new();
    for receiver in receivers {
        let mut socket = receiver.connect().await;
        let waiting = database.queued(receiver).await as usize;
        let envelopes = socket.messages(waiting).await;
        diary.note_delivery(&envelopes);
        left.extend(envelopes.into_iter().map(|envelope| envelope.id));
    }
    let (answered, delivered) = (diary.answered.lock().unwrap(), diary.delivered.lock().unwrap());
    let acknowledged = diary.acknowledged.lock().unwrap();
    assert!(diary.flushed.lock().unwrap().len() > 10, "too few acks to prove anything");
    for text in answered.iter() {
        let what = String::from_utf8_lossy(&text[..40.min(text.len())]);
        let ids = delivered.get(text).unwrap_or_else(|| panic!("{what} was answered with 200 and never delivered"));
        for id in ids.difference(&acknowledged) {
            assert!(left.contains(id), "{what} was never acknowledged and is gone");
        }
    }
}

fn assert_nothing_was_repeated(diary: &Diary) {
    for (text, ids) in diary.delivered.lock().unwrap().iter() {
        let what = String::from_utf8_lossy(&text[..40.min(text.len())]);
        assert_eq!(ids.len(), 1, "{what} was queued {} times", ids.len());
    }
    let mut prekeys = diary.prekeys.lock().unwrap().clone();
    let handed_out = prekeys.len();
    prekeys.sort_unstable();
    prekeys.dedup();
    assert_eq!(prekeys.len(), handed_out, "a one-time prekey was handed out twice");
}

/// The options of a server whose inboxes hold one message.
const ONE_MESSAGE: [&str; 2] = ["--max-inbox-size=1", "--inbox-sender-share-percent=100"];

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_after_a_crash_queues_only_what_was_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &ONE_MESSAGE).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    let tablet = bob.link().await;
    alice.send(&[(&bob, b"before"), (&tablet, b"before")]).await;
    let mut socket = tablet.connect().await;
    let before = socket.expect_message("before").await;
    socket.ack(&[before]).await;
    let database = Database::of(folder.path()).await;
    eventually("the tablet's inbox to be empty", async || database.queued(&tablet).await == 0).await;
    drop(socket);

    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"phone"), (&tablet, b"tablet")]));
    alice.post_messages(key, &request).await.expect(429);
    server.kill();
    server = server.start_again(&ONE_MESSAGE).await;
    alice.post_messages(key, &request).await.expect(429);
    assert_eq!((database.queued(&bob).await, database.queued(&tablet).await), (1, 1));

    let mut socket = bob.connect().await;
    let before = socket.expect_message("before").await;
    socket.ack(&[before]).await;
    eventually("the phone's inbox to be empty", async || database.queued(&bob).await == 0).await;
    eventually("the repeat to find room", async || alice.post_messages(key, &request).await.status == 200).await;
    server.kill();
    let _server = server.start_again(&ONE_MESSAGE).await;
    let again = alice.post_messages(key, &request).await.expect(200);
    assert!(again.body.is_empty() && again.header("idempotency-replayed").is_some());
    assert_eq!((database.queued(&bob).await, database.queued(&tablet).await), (1, 1));
    bob.connect().await.expect_message("phone").await;
    tablet.connect().await.expect_message("tablet").await;
}
