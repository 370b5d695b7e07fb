//! The address of `--db-url` leads to another database than at the start, as after a failover to the wrong system: the node
//! takes nothing more, and stops.

use uuid::Uuid;

use super::bystanders::{node_options, psql};
use crate::harness::{Binary, Device, PATIENCE, Postgres, Proxy, eventually, send_request};

/// A node whose connections to PostgreSQL lead to `other` from some moment on.
async fn assert_stops_on(other: &Postgres) {
    let own = Postgres::start().await;
    let proxy = Proxy::start(([127, 0, 0, 1], own.port()).into()).await;
    let url = own.url().replace(&format!(":{}/", own.port()), &format!(":{}/", proxy.address().port()));
    let folder = tempfile::tempdir().unwrap();
    let mut node = Binary::start_node(&node_options(&url, folder.path())).await;
    let (alice, bob) = (Device::register(&node.client()).await, Device::register(&node.client()).await);
    alice.send_to(&bob, "before").await;

    proxy.set_target(([127, 0, 0, 1], other.port()).into());
    proxy.cut();
    let message = prost::Message::encode_to_vec(&send_request(&[(&bob, b"x")]));
    let send = async || alice.messages_request(Uuid::new_v4(), message.clone()).try_send().await;
    eventually("sends to be refused", async || send().await.is_ok_and(|answer| answer.status != 200)).await;
    // It compares every ten seconds.
    let status = node.exit(2 * PATIENCE).await;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    assert!(node.output().contains("another database answers"), "{}", node.output());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_finds_the_database_of_another_deployment_stops() {
    let other = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let mut maker = Binary::start_node(&node_options(&other.url(), folder.path())).await;
    maker.terminate();
    assert!(maker.exit(PATIENCE).await.success(), "{}", maker.output());
    assert_stops_on(&other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_finds_a_database_without_tables_stops() {
    assert_stops_on(&Postgres::start().await).await;
}

/// The rows are those of a backup, in the same database.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_to_an_older_state_is_told_of() {
    let postgres = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let node = Binary::start_node(&node_options(&postgres.url(), folder.path())).await;
    psql(&postgres.url(), "UPDATE server_time SET seen_at = seen_at - 600000").await;
    let is_told = async || node.output().contains("the database is in an older state than before");
    eventually("the older state to be told of", is_told).await;
    assert_eq!(node.output().matches("run `obscura-server after-restore`").count(), 1, "{}", node.output());
    Device::register(&node.client()).await;
}
