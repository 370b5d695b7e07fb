//! What goes wrong when many things happen at once: nothing is lost, nothing is repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use obscura_server::config::Grouping;
use prost::Message as _;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::proto::Envelope;
use crate::harness::{Device, Event, Socket, TestServer, distinct_ids, send_request, within};

/// A send that began first is committed last.
#[tokio::test(flavor = "multi_thread")]
async fn a_send_that_commits_late_is_not_overlooked_by_an_open_socket() {
    let server = TestServer::start().await;
    let (alice, carol, bob) = (server.account().await, server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    let database = server.database().await;
    for round in 0..5 {
        let held = database.hold_write().await;
        let early = tokio::spawn({
            let (alice, bob) = (alice.clone(), bob.clone());
            async move { alice.send_to(&bob, format!("early {round}")).await }
        });
        let late = tokio::spawn({
            let (carol, bob) = (carol.clone(), bob.clone());
            async move { carol.send_to(&bob, format!("late {round}")).await }
        });
        assert_eq!(socket.until_pong().await, [], "neither is committed yet");
        held.release().await;
        let received: BTreeSet<Bytes> = socket.messages(2).await.into_iter().map(|envelope| envelope.message).collect();
        assert_eq!(received, BTreeSet::from([format!("early {round}").into(), format!("late {round}").into()]));
        within("both answers", async { tokio::try_join!(early, late) }).await.unwrap();
    }
}

#[tokio::test]
async fn sixteen_senders_and_one_receiver_with_a_transaction_held_open_in_between() {
    const SENDERS: usize = 16;
    const EACH: usize = 25;
    let server = TestServer::start().await;
    let bob = server.account().await;
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    let mut senders = Vec::new();
    for _ in 0..SENDERS {
        senders.push(server.account().await);
    }
    let sending = futures_util::future::join_all(senders.iter().map(|sender| async {
        for number in 0..EACH {
            sender.send_to(&bob, number.to_string()).await;
        }
    }));
    let database = server.database().await;
    let holding = async {
        for _ in 0..10 {
            let held = database.hold_write().await;
            // Long enough for every sender to have something under way.
            tokio::time::sleep(Duration::from_millis(20)).await;
            held.release().await;
            tokio::task::yield_now().await;
        }
    };
    let receiving = socket.messages(SENDERS * EACH);
    let (_, (), received) = within("all messages", async { tokio::join!(sending, holding, receiving) }).await;
    assert_eq!(distinct_ids(&received).len(), SENDERS * EACH, "a message came twice");
    assert_eq!(socket.until_pong().await, [], "a message came twice");
    let mut of_sender: BTreeMap<Bytes, Vec<usize>> = BTreeMap::new();
    for envelope in received {
        let number = std::str::from_utf8(&envelope.message).unwrap().parse().unwrap();
        of_sender.entry(envelope.sender_device_id).or_default().push(number);
    }
    assert_eq!(of_sender.len(), SENDERS);
    for numbers in of_sender.values() {
        assert_eq!(*numbers, (0..EACH).collect::<Vec<_>>(), "a sender's order is not kept");
    }
}

/// The wait for the disk is shared: sends to one inbox don't queue up behind each other.
#[tokio::test]
async fn sends_to_one_inbox_that_meet_are_stored_together() {
    const SENDS: usize = 64;
    // As always, also in a run that has all others stored in another way.
    let usual = Grouping { max_requests: 512, linger: None };
    let server = TestServer::start_with(|config| config.messaging.grouping = usual).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let database = server.database().await;
    let held = database.hold_write().await;
    let sends = futures_util::future::join_all((0..SENDS).map(|_| alice.send_to(&bob, "x")));
    let release = async {
        // All requests are under way before the database is free.
        tokio::time::sleep(Duration::from_millis(700)).await;
        held.release().await;
    };
    tokio::join!(sends, release);
    let received = bob.connect().await.messages(SENDS).await;
    let groups: BTreeSet<u64> = received.iter().map(|envelope| envelope.timestamp).collect();
    assert!(groups.len() <= 8, "{SENDS} sends took {} transactions", groups.len());
}

/// A fraction of the requests is cut off somewhere in the middle, another right at its end.
#[tokio::test(flavor = "multi_thread")]
async fn what_senders_who_hang_up_have_stored_reaches_a_connected_receiver() {
    const SENDS: usize = 150;
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    let typical = warm_up(&alice).await;
    let sends: Vec<_> = (0..SENDS)
        .map(|number| {
            let request = raw_send(&alice, &bob, number);
            let address = server.address();
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let cut = if number % 3 == 0 { rand::random_range(0..request.len()) } else { request.len() };
                stream.write_all(&request[..cut]).await.unwrap();
                if number % 3 == 1 {
                    // Gives the request a head start of a random length on its cancellation.
                    tokio::time::sleep(typical.mul_f64(rand::random_range(0.0..4.0))).await;
                }
            })
        })
        .collect();
    for send in sends {
        within("a sender", send).await.unwrap();
    }
    let received = everything_stored(&server, &alice, &bob, &mut socket).await;
    assert!(received > SENDS / 10, "only {received} of the sends got far enough to prove anything");
}

/// The senders hang up while the database keeps their messages waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_whose_sender_hangs_up_before_the_commit_wakes_its_receiver() {
    const SENDS: usize = 20;
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    warm_up(&alice).await;
    let held = server.database().await.hold_write().await;
    let mut connections = Vec::new();
    for number in 0..SENDS {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(&raw_send(&alice, &bob, number)).await.unwrap();
        connections.push(stream);
    }
    // Nothing tells from outside that a request has been taken in; if some are not, the test only proves less.
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(connections);
    assert_eq!(socket.until_pong().await, []);
    held.release().await;
    let received = everything_stored(&server, &alice, &bob, &mut socket).await;
    assert!(received > SENDS / 2, "only {received} of the sends got far enough to prove anything");
}

/// Has the server make its connections to the database, and answers how long a request takes that is one of many.
async fn warm_up(device: &Device) -> Duration {
    let request = || async { device.request("GET", "/v1/devices").send().await.expect(200) };
    futures_util::future::join_all((0..50).map(|_| request())).await;
    let began = std::time::Instant::now();
    futures_util::future::join_all((0..150).map(|_| request())).await;
    began.elapsed()
}

/// Waits until all that is stored for `bob` has come over `socket`, and answers how many messages that are.
async fn everything_stored(server: &TestServer, alice: &Device, bob: &Device, socket: &mut Socket) -> usize {
    alice.send_to(bob, "the last").await;
    let database = server.database().await;
    let mut received: Vec<Envelope> = Vec::new();
    let all_here = async {
        loop {
            received.extend(socket.mail().await);
            let stored = database.queued(bob).await as usize;
            if received.len() == stored && received.iter().any(|envelope| envelope.message == "the last") {
                return;
            }
        }
    };
    within("everything stored to arrive without a reconnect", all_here).await;
    assert_eq!(distinct_ids(&received).len(), received.len(), "a message came twice");
    received.len()
}

fn raw_send(sender: &Device, receiver: &Device, number: usize) -> Vec<u8> {
    let body = send_request(&[(receiver, number.to_string().as_bytes())]).encode_to_vec();
    let head = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\nidempotency-key: {}\r\n\
         content-length: {}\r\n\r\n",
        sender.token,
        Uuid::new_v4(),
        body.len()
    );
    [head.into_bytes(), body].concat()
}

/// Sessions come and go while mail arrives; whoever is connected in the end has seen everything, once per connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_reconnects_all_the_time_misses_nothing() {
    const MESSAGES: usize = 150;
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let sender = tokio::spawn({
        let (alice, bob) = (alice.clone(), bob.clone());
        async move {
            for number in 0..MESSAGES {
                alice.send_to(&bob, number.to_string()).await;
            }
        }
    });
    let mut seen: BTreeSet<usize> = BTreeSet::new();
    let receiving = async {
        while seen.len() < MESSAGES {
            let mut socket = bob.connect().await;
            let mut on_this_socket = BTreeSet::new();
            for _ in 0..3 {
                let envelopes = next_mail(&mut socket, seen.len() == MESSAGES).await;
                for envelope in &envelopes {
                    assert!(on_this_socket.insert(envelope.id.clone()), "twice on one connection");
                    seen.insert(std::str::from_utf8(&envelope.message).unwrap().parse().unwrap());
                }
                if seen.len() == MESSAGES {
                    break;
                }
                socket.ack(&envelopes).await;
            }
        }
    };
    within("everything to arrive", receiving).await;
    within("the sender", sender).await.unwrap();
}

async fn next_mail(socket: &mut Socket, done: bool) -> Vec<Envelope> {
    match tokio::time::timeout(Duration::from_secs(5), socket.read()).await {
        Ok(Event::Mail(envelopes)) => envelopes,
        Ok(Event::Ping) => Vec::new(),
        Err(_) if done => Vec::new(),
        other => panic!("{other:?}"),
    }
}
