//! A node dies, and nobody else notices more than that.

use std::time::Duration;

use crate::cluster::traffic::Traffic;
use crate::harness::{Binary, deployment};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_killed_under_load_loses_nothing_that_was_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = deployment::distributed_options(folder.path()).await;
    options.push("--ws-look-interval-secs=86400".to_owned());
    let mut dying = Binary::start_node(&options).await;
    let living = Binary::start_node(&options).await;
    // The receivers' sockets are at the node that lives on.
    let traffic = Traffic::start(&[dying.client(), living.client()], &[living.client()]).await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..300))).await;
        dying.kill();
        traffic.goes_on(50).await;
        dying = dying.start_elsewhere(options.clone()).await;
        traffic.goes_on(50).await;
    }
    traffic.finish().await;
    deployment::drop_state(folder.path());
}
