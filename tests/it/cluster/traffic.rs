//! People who write to each other all the time, whatever happens to the servers, and who notice what goes wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::harness::{Client, Device, Event, Socket, eventually, send_request, within_time};

const SENDERS: usize = 6;
const RECEIVERS: usize = 3;
/// No answer may take longer, whatever is away: neither the request's own time limit nor a client's patience is the way
/// to learn of an outage.
const LONGEST_ANSWER: Duration = Duration::from_secs(15);

/// Senders and receivers at work.
pub struct Traffic {
    diary: Arc<Diary>,
    senders: Vec<JoinHandle<()>>,
    receivers: Vec<JoinHandle<()>>,
}

/// What the clients know.
#[derive(Default)]
struct Diary {
    /// The texts that were answered with 200.
    answered: Mutex<BTreeSet<Bytes>>,
    /// The texts that have come out of each receiver's one socket, in their order.
    delivered: Mutex<BTreeMap<usize, Vec<Bytes>>>,
    refused: AtomicUsize,
    is_over: AtomicBool,
    receivers_may_go: AtomicBool,
}

/// What came of it.
pub struct Report {
    /// Messages answered with 200, each of which was delivered.
    pub answered: usize,
    /// Requests answered with 503.
    pub refused: usize,
}

impl Traffic {
    /// Senders spread over `senders`, receivers over `receivers`. Each receiver has one socket, which has to last.
    pub async fn start(senders: &[Client], receivers: &[Client]) -> Self {
        let diary = Arc::new(Diary::default());
        let (mut devices, mut receiving) = (Vec::new(), Vec::new());
        for n in 0..RECEIVERS {
            let device = Device::register(&receivers[n % receivers.len()]).await;
            let mut socket = device.connect().await;
            socket.until_pong().await;
            receiving.push(tokio::spawn(receive(n, socket, diary.clone())));
            devices.push(device);
        }
        let mut sending = Vec::new();
        for n in 0..SENDERS {
            // A sender whose node doesn't answer at all goes to the next one.
            let nodes = [&senders[n % senders.len()..], &senders[..n % senders.len()]].concat();
            let sender = Device::register(&nodes[0]).await;
            sending.push(tokio::spawn(send(sender, nodes, devices.clone(), diary.clone())));
        }
        let traffic = Self { diary, senders: sending, receivers: receiving };
        traffic.goes_on(50).await;
        traffic
    }

    /// Waits until so many more messages have been answered and delivered.
    pub async fn goes_on(&self, more: usize) {
        let count = || {
            let delivered: usize = self.diary.delivered.lock().unwrap().values().map(Vec::len).sum();
            (self.diary.answered.lock().unwrap().len(), delivered)
        };
        let (answered, delivered) = count();
        let far_enough = async || count().0 >= answered + more && count().1 >= delivered + more;
        eventually("the traffic to go on", far_enough).await;
    }

    /// How many requests were answered with 503 so far.
    pub fn refused(&self) -> usize {
        self.diary.refused.load(Ordering::Relaxed)
    }

    /// Lets the senders finish, and sees that everything answered with 200 comes out of the sockets that were opened at
    /// the start, in order, and nothing twice.
    pub async fn finish(self) -> Report {
        self.diary.is_over.store(true, Ordering::Relaxed);
        for sender in self.senders {
            within_time(Duration::from_secs(60), "a sender to finish", sender).await.unwrap();
        }
        let answered = self.diary.answered.lock().unwrap().clone();
        let missing = || {
            let delivered = self.diary.delivered.lock().unwrap();
            let delivered: BTreeSet<&Bytes> = delivered.values().flatten().collect();
            answered.iter().filter(|text| !delivered.contains(text)).count()
        };
        let complete = async || missing() == 0 || self.receivers.iter().any(JoinHandle::is_finished);
        let deadline = Instant::now() + Duration::from_secs(40);
        while !complete().await && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.diary.receivers_may_go.store(true, Ordering::Relaxed);
        for receiver in self.receivers {
            within_time(Duration::from_secs(10), "a receiver to finish", receiver).await.unwrap();
        }
        let delivered = self.diary.delivered.lock().unwrap();
        let all: BTreeSet<&Bytes> = delivered.values().flatten().collect();
        let missing = answered.iter().filter(|text| !all.contains(text)).count();
        assert_eq!(missing, 0, "of {} messages answered with 200 so many were not delivered", answered.len());
        delivered.values().for_each(|texts| assert_in_order(texts));
        Report { answered: answered.len(), refused: self.diary.refused.load(Ordering::Relaxed) }
    }
}

/// The numbers of each sender ascend.
fn assert_in_order(texts: &[Bytes]) {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for text in texts {
        let text = std::str::from_utf8(text).unwrap();
        let (sender, number) = text.split_once(' ').unwrap();
        let number = number.parse().unwrap();
        let before = last.insert(sender, number);
        assert!(before.is_none_or(|before| before < number), "{sender} {number} came after {before:?}");
    }
}

/// Sends one message after another, and repeats each under its key until it is answered with 200.
async fn send(sender: Device, nodes: Vec<Client>, receivers: Vec<Device>, diary: Arc<Diary>) {
    let mut node = 0;
    for number in 0.. {
        if diary.is_over.load(Ordering::Relaxed) {
            return;
        }
        let text = Bytes::from(format!("{} {number}", sender.id));
        let body = send_request(&[(&receivers[number % RECEIVERS], &text)]).encode_to_vec();
        let key = Uuid::new_v4();
        loop {
            let began = Instant::now();
            let answer = sender.at(&nodes[node]).messages_request(key, body.clone()).try_send().await;
            let took = began.elapsed();
            assert!(took < LONGEST_ANSWER, "an answer took {took:?}");
            match answer {
                Ok(answer) if answer.status == 503 => {
                    let wait = answer.header("retry-after").and_then(|wait| wait.parse::<u64>().ok());
                    assert!(wait.is_some_and(|wait| wait >= 1), "a 503 that does not say when to come again");
                    diary.refused.fetch_add(1, Ordering::Relaxed);
                    // Sooner than asked, to be a nuisance.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Ok(answer) => {
                    assert!(answer.expect(200).body.is_empty(), "not everything was queued");
                    break;
                }
                Err(error) => {
                    assert!(nodes.len() > 1, "no answer at all: {error}");
                    node = (node + 1) % nodes.len();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        diary.answered.lock().unwrap().insert(text);
    }
}

/// Reads from one socket to the end, acknowledges everything, and never connects again.
async fn receive(n: usize, mut socket: Socket, diary: Arc<Diary>) {
    let mut ids = BTreeSet::new();
    loop {
        match tokio::time::timeout(Duration::from_millis(100), socket.read()).await {
            Err(_) if diary.receivers_may_go.load(Ordering::Relaxed) => return,
            Err(_) | Ok(Event::Ping | Event::Pong(_) | Event::PreKeys(_)) => {}
            Ok(Event::Mail(envelopes)) => {
                for envelope in &envelopes {
                    assert!(ids.insert(envelope.id.clone()), "a message came twice on one socket");
                }
                let texts = envelopes.iter().map(|envelope| envelope.message.clone());
                diary.delivered.lock().unwrap().entry(n).or_default().extend(texts);
                socket.ack(&envelopes).await;
            }
            Ok(end) => panic!("a socket that has to last ended with {end:?}"),
        }
    }
}
