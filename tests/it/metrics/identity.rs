//! *Accepted = acked + expired + removed + queued*, whatever happens, and over all nodes together.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::config::Config;
use uuid::Uuid;

use super::page::sum;
use crate::harness::{Device, TestServer, eventually, send_request};

/// Messages an inbox holds.
const MAX: u32 = 5;

fn configure(config: &mut Config) {
    (config.messaging.max_inbox_size, config.messaging.sender_share_percent) = (MAX, 100);
    config.messaging.cleanup_interval = Duration::from_secs(1);
}

async fn left(nodes: &[&TestServer], cause: &str) -> u64 {
    sum(nodes, "obscura_queue_left_total", &[("cause", cause)]).await
}

/// What the nodes say of the queue: accepted, acked, expired, removed.
async fn told(nodes: &[&TestServer]) -> [u64; 4] {
    [
        sum(nodes, "obscura_queue_accepted_total", &[]).await,
        left(nodes, "acked").await,
        left(nodes, "expired").await,
        left(nodes, "removed").await,
    ]
}

async fn queued(node: &TestServer) -> u64 {
    node.database().await.number("SELECT count(*) FROM messages").await.unsigned_abs()
}

/// Everything that can happen to a message, through the first node and the last one in turn.
async fn everything_happens(nodes: &[&TestServer]) {
    let (first, last) = (nodes[0], nodes[nodes.len() - 1]);
    let (a, b) = (first.client(), last.client());
    let (alice, bob, carol) = (first.account().await, last.account().await, first.account().await);

    // Acked by two sockets, at both nodes, and once more.
    let mut sockets = [bob.at(&a).connect().await, bob.at(&b).connect().await];
    for text in ["one", "two", "three"] {
        alice.send_to(&bob, text).await;
    }
    let mail = [sockets[0].messages(3).await, sockets[1].messages(3).await];
    for (socket, mail) in sockets.iter_mut().zip(&mail) {
        socket.ack(mail).await;
    }
    eventually("the acks to be written", async || left(nodes, "acked").await >= 3).await;
    sockets[1].ack(&mail[0]).await;
    sockets[1].ack_ids(vec![Uuid::new_v4().as_bytes().to_vec().into()]).await;
    sockets[1].until_pong().await;
    drop(sockets);

    // Sent again at the other node, and another request under the same key.
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"repeated")]));
    for hand in [&alice.at(&a), &alice.at(&b), &alice.at(&a)] {
        hand.post_messages(key, &request).await.expect(200);
    }
    alice.at(&b).post_messages(key, &send_request(&[(&bob, b"another")])).await.expect(200);

    // Refused: four are too many.
    for number in 0..MAX + 4 {
        let hand = alice.at(if number % 2 == 0 { &a } else { &b });
        let answer = hand.post_messages(Uuid::new_v4(), &send_request(&[(&carol, b"much")])).await;
        answer.expect(if number < MAX { 200 } else { 429 });
    }
    assert_eq!(sum(nodes, "obscura_queue_refused_total", &[("reason", "inbox")]).await, 4);

    // Removed with a device, and with an account that starts over.
    let tablet = bob.link().await;
    alice.send(&[(&tablet, b"one"), (&bob, b"two")]).await;
    bob.remove(&tablet).await;
    let dave = first.account().await;
    alice.send_to(&dave, "lost").await;
    dave.at(&b).reset().await;

    assert_eq!(told(nodes).await, [3 + 1 + 5 + 2 + 1, 3, 0, 1 + 1]);
    assert_eq!(queued(first).await, 7);
    assert_eq!(sum(nodes, "obscura_queue_repeats_total", &[("body", "same")]).await, 2);
    assert_eq!(sum(nodes, "obscura_queue_repeats_total", &[("body", "other")]).await, 1);

    // Expired, and something new that waits.
    first.clock.advance(Duration::from_hours(24 * 31));
    eventually("old messages to be swept", async || queued(first).await == 0).await;
    alice.log_in().await.send_to(&bob, "new").await;
    eventually("what was swept to be counted", async || left(nodes, "expired").await == 7).await;
    assert_eq!(told(nodes).await, [13, 3, 7, 2]);
    assert_eq!(queued(first).await, 1);
}

#[tokio::test]
async fn no_message_is_lost_from_the_books_of_a_server() {
    let server = TestServer::start_with(configure).await;
    everything_happens(&[&server]).await;
}

#[tokio::test]
async fn no_message_is_lost_from_the_books_of_two_nodes() {
    let first = TestServer::start_node_with(configure).await;
    let second = first.start_beside().await;
    everything_happens(&[&first, &second]).await;
}

/// Sends at both nodes at once, each of them twice, to inboxes that are full again and again while their owners acknowledge at both nodes.
#[tokio::test(flavor = "multi_thread")]
async fn the_books_of_two_nodes_agree_after_a_scramble() {
    const ROUNDS: u32 = 15;
    let first = TestServer::start_node_with(configure).await;
    let second = first.start_beside().await;
    let (a, b) = (first.client(), second.client());
    let people = join_all((0..4).map(|_| first.account())).await;
    let senders = people.iter().enumerate().map(|(n, sender)| {
        let targets: Vec<&Device> = people.iter().skip(n + 1).chain(people.iter().take(n)).collect();
        let hands = [sender.at(&a), sender.at(&b)];
        async move {
            for round in 0..ROUNDS {
                let text = round.to_string();
                let request = send_request(&targets.iter().map(|to| (*to, text.as_bytes())).collect::<Vec<_>>());
                let key = Uuid::new_v4();
                let answers = join_all(hands.iter().map(|hand| hand.post_messages(key, &request))).await;
                assert!(answers.iter().all(|answer| [200, 429].contains(&answer.status)), "{answers:?}");
            }
        }
    });
    let readers = people.iter().flat_map(|reader| [reader.at(&a), reader.at(&b)]).map(|hand| async move {
        let mut socket = hand.connect().await;
        for _ in 0..ROUNDS {
            let mail = socket.mail().await;
            socket.ack(&mail).await;
        }
        socket.until_pong().await;
        socket.close().await;
    });
    let reading = async {
        // Some get less than they wait for, when what they wait for is refused or acknowledged by the other socket.
        let _ = tokio::time::timeout(Duration::from_secs(5), join_all(readers)).await;
    };
    tokio::join!(join_all(senders), reading);
    let nodes = [&first, &second];
    eventually("the last acks to be written and counted", async || {
        let [accepted, acked, expired, removed] = told(&nodes).await;
        accepted == acked + expired + removed + queued(&first).await
    })
    .await;
    let [accepted, acked, ..] = told(&nodes).await;
    assert!(accepted <= u64::from(ROUNDS) * 4 * 3, "each send is accepted once at most");
    assert!(acked > 0 && acked <= accepted, "{acked} acked of {accepted}");
}
