//! Telling a device that its one-time prekeys run out.

use std::time::Duration;

use crate::harness::proto::PreKeyStatus;
use crate::harness::{Device, Event, Keys, TestServer};

fn status(ec: i32, min_threshold: i32, pq: i32) -> PreKeyStatus {
    PreKeyStatus { one_time_pre_key_count: ec, min_threshold, pq_pre_key_count: pq }
}

async fn device(server: &TestServer, one_time: u32, pq_one_time: Option<u32>) -> Device {
    Device::register_with(&server.client(), Keys { one_time, pq_one_time }).await
}

#[tokio::test]
async fn a_device_with_few_prekeys_is_told_before_anything_else() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for count in [19, 1, 0] {
        let bob = device(&server, count, None).await;
        alice.send_to(&bob, "mail").await;
        let mut socket = bob.connect().await;
        assert_eq!(socket.next().await, Event::PreKeys(status(count as i32, 20, 0)));
        socket.expect_message("mail").await;
    }
}

#[tokio::test]
async fn a_device_with_enough_prekeys_is_left_in_peace() {
    let server = TestServer::start().await;
    assert_eq!(device(&server, 20, None).await.connect().await.until_pong().await, []);
    assert_eq!(device(&server, 20, Some(20)).await.connect().await.until_pong().await, []);
}

#[tokio::test]
async fn post_quantum_prekeys_are_counted_for_devices_that_use_them() {
    let server = TestServer::start().await;
    let few = device(&server, 30, Some(3)).await;
    assert_eq!(few.connect().await.pre_keys().await, status(30, 20, 3));
    let few_of_both = device(&server, 2, Some(3)).await;
    assert_eq!(few_of_both.connect().await.pre_keys().await, status(2, 20, 3));
    let last_resort_only = device(&server, 30, Some(0)).await;
    assert_eq!(last_resort_only.connect().await.pre_keys().await, status(30, 20, 0));
}

#[tokio::test]
async fn a_fetch_that_leaves_few_tells_the_connected_device() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bob = device(&server, 21, None).await;
    let mut socket = bob.connect().await;
    assert_eq!(socket.until_pong().await, []);
    alice.bundles(bob.user).await; // leaves 20, which is enough
    alice.bundles(bob.user).await;
    assert_eq!(socket.pre_keys().await, status(19, 20, 0));
}

#[tokio::test]
async fn a_burst_of_fetches_is_told_once_with_the_final_count() {
    let server = TestServer::start_with(|config| config.gateway.prekey_debounce = Duration::from_secs(2)).await;
    let alice = server.account().await;
    let bob = device(&server, 22, None).await;
    let mut socket = bob.connect().await;
    assert_eq!(socket.until_pong().await, []);
    for _ in 0..10 {
        alice.bundles(bob.user).await;
    }
    assert_eq!(socket.until_pong().await, [], "nothing comes before the burst is over");
    assert_eq!(socket.pre_keys().await, status(12, 20, 0));
    assert_eq!(socket.until_pong().await, []);
}

#[tokio::test]
async fn an_exhausted_device_is_told_again_at_each_fetch() {
    let server = TestServer::start_with(|config| config.gateway.prekey_debounce = Duration::from_millis(50)).await;
    let alice = server.account().await;
    let bob = device(&server, 0, None).await;
    let mut socket = bob.connect().await;
    for _ in 0..3 {
        assert_eq!(socket.pre_keys().await, status(0, 20, 0));
        alice.bundles(bob.user).await;
    }
    assert_eq!(socket.pre_keys().await, status(0, 20, 0));
}

#[tokio::test]
async fn a_device_that_refilled_in_time_is_not_told() {
    let server = TestServer::start_with(|config| config.gateway.prekey_debounce = Duration::from_secs(2)).await;
    let alice = server.account().await;
    let bob = device(&server, 20, None).await;
    let mut socket = bob.connect().await;
    assert_eq!(socket.until_pong().await, []);
    alice.bundles(bob.user).await; // 19: the device is to be told soon
    bob.refill(2, 100, 2).await; // 21: it need not be
    let nothing = tokio::time::timeout(Duration::from_secs(3), socket.read()).await;
    assert!(nothing.is_err(), "{nothing:?}");
}

#[tokio::test]
async fn every_device_of_the_fetched_account_is_told_of_its_own_count() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bob = device(&server, 20, None).await;
    let tablet = bob.link_with(Keys { one_time: 25, pq_one_time: None }).await;
    let (mut phone_socket, mut tablet_socket) = (bob.connect().await, tablet.connect().await);
    alice.bundles(bob.user).await;
    assert_eq!(phone_socket.pre_keys().await, status(19, 20, 0));
    assert_eq!(tablet_socket.until_pong().await, []);
}

#[tokio::test]
async fn the_threshold_can_be_configured() {
    let server = TestServer::start_with(|config| config.prekeys.refill_threshold = 3).await;
    assert_eq!(device(&server, 2, None).await.connect().await.pre_keys().await, status(2, 3, 0));
    assert_eq!(device(&server, 3, None).await.connect().await.until_pong().await, []);
}
