//! Sockets that ask for it are told which devices their account has.

use bytes::Bytes;

use crate::harness::{Device, Event, Socket, TestServer};

/// The next list, behind frames of other kinds.
async fn list(socket: &mut Socket) -> Vec<Bytes> {
    loop {
        match socket.next().await {
            Event::Devices(list) => return list.device_ids,
            Event::Ping | Event::PreKeys(_) => {}
            other => panic!("{other:?} instead of a list of devices"),
        }
    }
}

fn ids(devices: &[&Device]) -> Vec<Bytes> {
    devices.iter().map(|device| device.id_bytes()).collect()
}

#[tokio::test]
async fn a_linked_device_is_shown_to_the_others_at_once_and_to_those_that_were_away() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let laptop = alice.link().await;
    let mut phone = alice.connect_with("device-list").await;
    assert_eq!(list(&mut phone).await, ids(&[&alice, &laptop]));
    let tablet = alice.link().await;
    assert_eq!(list(&mut phone).await, ids(&[&alice, &laptop, &tablet]));
    assert_eq!(list(&mut laptop.connect_with("device-list").await).await, ids(&[&alice, &laptop, &tablet]));
    alice.remove(&tablet).await;
    assert_eq!(list(&mut phone).await, ids(&[&alice, &laptop]));
}

#[tokio::test]
async fn a_list_of_devices_comes_before_mail_and_once() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "waiting").await;
    let mut socket = bob.connect_with("device-list").await;
    assert_eq!(list(&mut socket).await, ids(&[&bob]));
    socket.expect_message("waiting").await;
    let more = socket.until_pong().await;
    assert!(!more.iter().any(|event| matches!(event, Event::Devices(_))), "{more:?}");
}

#[tokio::test]
async fn sockets_of_clients_that_do_not_ask_get_no_list_of_devices() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut socket = alice.connect().await;
    socket.until_pong().await;
    let tablet = alice.link().await;
    tablet.send_to(&alice, "from the tablet").await;
    socket.expect_message("from the tablet").await;
    assert_eq!(socket.until_pong().await, []);
}
