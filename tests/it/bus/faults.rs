//! What happens to Valkey and to the connections must not cost a signal, nor anybody's time.

use std::time::{Duration, Instant};

use obscura_server::bus::Signal;
use obscura_server::telemetry::metrics::SignalWay;

use super::{Inbox, Node, everything, heard, some_address};
use crate::harness::{Binary, Proxy, Valkey, Way, eventually, within, within_time};

/// A node behind a proxy.
async fn behind_a_proxy(valkey: &Valkey) -> (Proxy, Node) {
    let proxy = Proxy::start(valkey.address()).await;
    let node = Node::open(&format!("redis://{}", proxy.address()));
    node.connected().await;
    (proxy, node)
}

#[tokio::test]
async fn a_valkey_that_comes_late_is_found_and_who_subscribed_before_is_heard() {
    let mut valkey = Valkey::start().await;
    valkey.kill();
    let nodes = [Node::open(&valkey.url()), Node::open(&valkey.url())];
    let address = some_address();
    let subscription = nodes[1].bus.subscribe(address);
    nodes[0].bus.notify(&[address], Signal::NewMessages);
    nodes[1].bus.notify(&[address], Signal::KeysLow);
    assert_eq!(within("the signal of the same node", subscription.next()).await, Signal::KeysLow.into());
    valkey.restart().await;
    everything(&subscription).await;
    nodes[0].ready().await;
    nodes[0].bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
}

#[tokio::test]
async fn a_valkey_killed_and_started_empty_loses_nothing_and_needs_no_new_subscription() {
    let mut valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let inbox = Inbox::read_on(&other).await;
    let address = some_address();
    let subscription = other.listen(address).await;
    for _ in 0..3 {
        valkey.kill();
        inbox.write_on(&one).await;
        other.not_ready().await;
        inbox.write_on(&one).await;
        valkey.restart().await;
        inbox.write_on(&one).await;
        inbox.all_seen().await;
    }
    one.ready().await;
    one.bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
}

#[tokio::test]
async fn an_outage_a_reconnection_and_signals_from_elsewhere_are_counted() {
    let mut valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let metrics = other.metrics.clone();
    let subscription = other.listen(some_address()).await;
    drop(subscription);
    assert_eq!((metrics.bus_connected.value(()), metrics.bus_connects.value(())), (Some(1), 1));
    valkey.kill();
    eventually("the outage to be seen", async || metrics.bus_connected.value(()) == Some(0)).await;
    valkey.restart().await;
    eventually("the connection to be back", async || metrics.bus_connected.value(()) == Some(1)).await;
    assert!(metrics.bus_connects.value(()) >= 2 && metrics.bus_resyncs.value(()) >= 1);
    let address = some_address();
    let subscription = other.listen(address).await;
    one.ready().await;
    one.bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
    assert_eq!(one.metrics.signals.value(SignalWay::Out), 1);
    assert!(metrics.signals.value(SignalWay::In) >= 1);
}

#[tokio::test]
async fn a_valkey_frozen_for_five_seconds_loses_nothing_and_blocks_no_caller() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let inbox = Inbox::read_on(&other).await;
    let here = one.bus.subscribe(some_address());
    inbox.write_on(&one).await;
    valkey.freeze();
    let thaw = Instant::now() + Duration::from_secs(5);
    let mut slowest = Duration::ZERO;
    while Instant::now() < thaw {
        let start = Instant::now();
        inbox.write_on(&one).await;
        slowest = slowest.max(start.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(slowest < Duration::from_secs(1), "a signal took {slowest:?}");
    valkey.thaw();
    inbox.all_seen().await;
    drop(here);
    one.ready().await;
    other.ready().await;
    inbox.write_on(&one).await;
    inbox.all_seen().await;
}

#[tokio::test]
async fn a_node_ends_in_time_though_valkey_is_frozen() {
    let valkey = Valkey::start().await;
    let node = Node::open(&valkey.url());
    node.connected().await;
    valkey.freeze();
    node.bus.notify(&[some_address()], Signal::NewMessages);
    node.tasks.stop();
    within_time(Duration::from_secs(5), "the node to end", node.tasks.ended()).await;
}

#[tokio::test]
async fn connections_cut_again_and_again_lose_nothing() {
    let valkey = Valkey::start().await;
    let ((to_one, one), (to_other, other)) = (behind_a_proxy(&valkey).await, behind_a_proxy(&valkey).await);
    let inbox = Inbox::read_on(&other).await;
    for round in 0..400 {
        inbox.write_on(&one).await;
        match round % 100 {
            20 => to_one.cut(),
            50 => to_other.cut(),
            80 => [&to_one, &to_other].iter().for_each(|proxy| proxy.cut()),
            99 => inbox.all_seen().await,
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    assert!(to_one.accepted() > 4 && to_other.accepted() > 4);
}

#[tokio::test]
async fn a_connection_of_which_only_one_direction_is_left_is_noticed_on_both_sides() {
    let valkey = Valkey::start().await;
    let ((to_one, one), (to_other, other)) = (behind_a_proxy(&valkey).await, behind_a_proxy(&valkey).await);
    let inbox = Inbox::read_on(&other).await;
    for (proxy, way) in [(&to_one, Way::Up), (&to_one, Way::Down), (&to_other, Way::Up), (&to_other, Way::Down)] {
        proxy.freeze(way);
        let before = proxy.accepted();
        inbox.write_on(&one).await;
        eventually("a new connection", async || proxy.accepted() > before).await;
        inbox.all_seen().await;
    }
}

#[tokio::test]
async fn what_is_held_back_for_a_moment_arrives_and_another_valkey_at_the_same_address_is_as_good() {
    let (mut valkey, heir) = (Valkey::start().await, Valkey::start().await);
    let ((to_one, one), (to_other, other)) = (behind_a_proxy(&valkey).await, behind_a_proxy(&valkey).await);
    let inbox = Inbox::read_on(&other).await;
    to_other.freeze(Way::Down);
    inbox.write_on(&one).await;
    to_other.thaw();
    inbox.all_seen().await;
    [&to_one, &to_other].iter().for_each(|proxy| proxy.set_target(heir.address()));
    valkey.stop();
    inbox.write_on(&one).await;
    inbox.all_seen().await;
    one.ready().await;
    let address = some_address();
    let subscription = other.listen(address).await;
    one.bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
}

#[tokio::test]
async fn too_many_pending_signals_become_a_resync_of_every_node() {
    let valkey = Valkey::start().await;
    let (proxy, one) = behind_a_proxy(&valkey).await;
    let other = Node::open(&valkey.url());
    other.connected().await;
    let subscription = other.listen(some_address()).await;
    proxy.refuse(true);
    proxy.cut();
    one.not_ready().await;
    let many: Vec<_> = (0..70_000).map(|_| some_address()).collect();
    one.bus.notify(&many, Signal::NewMessages);
    proxy.refuse(false);
    everything(&subscription).await;
    // The wire is as good as before.
    let address = some_address();
    let subscription = other.listen(address).await;
    one.bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
}

#[tokio::test]
async fn a_valkey_that_stays_away_is_asked_ever_more_rarely() {
    let valkey = Valkey::start().await;
    let proxy = Proxy::start(valkey.address()).await;
    proxy.refuse(true);
    let start = Instant::now();
    let node = Node::open(&format!("redis://{}", proxy.address()));
    eventually("some attempts", async || proxy.accepted() >= 10).await;
    // 20, 30, 45, 67, 101, 151, and then 200 ms each, give or take a tenth.
    let least = Duration::from_millis(20 + 30 + 45 + 67 + 101 + 151 + 3 * 200).mul_f64(0.9);
    assert!(start.elapsed() >= least, "ten attempts in {:?}", start.elapsed());
    assert!(!node.is_ready().await);
    proxy.refuse(false);
    node.ready().await;
}

#[tokio::test]
async fn a_node_that_dies_with_signals_unsent_makes_the_others_resync() {
    let valkey = Valkey::start().await;
    let node = Node::open(&valkey.url());
    let subscription = node.listen(some_address()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut dying = Binary::start_embedded(folder.path(), &[&format!("--pubsub-url={}", valkey.url())]).await;
    eventually("the node to say hello", async || dying.output().contains("connected to Valkey")).await;
    dying.kill();
    everything(&subscription).await;
}

#[tokio::test]
async fn a_silent_node_makes_the_others_resync_and_again_when_it_is_back() {
    let valkey = Valkey::start().await;
    let node = Node::open(&valkey.url());
    let subscription = node.listen(some_address()).await;
    let (proxy, away) = behind_a_proxy(&valkey).await;
    proxy.refuse(true);
    proxy.cut();
    everything(&subscription).await;
    proxy.refuse(false);
    everything(&subscription).await;
    away.ready().await;
}
