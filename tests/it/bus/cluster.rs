//! A cluster of three.

use std::time::Duration;

use obscura_server::bus::{Signal, SignalSubscription};
use obscura_server::model::ids::Address;

use super::{Inbox, Node, heard, some_address};
use crate::harness::{Valkey, eventually, free_port, within};

pub async fn cluster() -> Vec<Valkey> {
    let mut members = Vec::new();
    for slots in ["0 5461", "5462 10922", "10923 16383"] {
        let port = free_port().to_string();
        let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", &port];
        let member = Valkey::start_with(&[&options[..], &["--cluster-require-full-coverage", "no"]].concat()).await;
        let mut connection = member.connection().await;
        let mut add = redis::cmd("CLUSTER");
        add.arg("ADDSLOTSRANGE").arg(slots.split(' ').collect::<Vec<_>>());
        let () = add.query_async(&mut connection).await.unwrap();
        members.push((member, port));
    }
    for (member, _) in &members[1..] {
        let (first, port) = &members[0];
        let mut meet = redis::cmd("CLUSTER");
        meet.arg("MEET").arg("127.0.0.1").arg(first.address().port()).arg(port);
        let () = meet.query_async(&mut member.connection().await).await.unwrap();
    }
    for (member, _) in &members {
        eventually("the cluster to be one", async || {
            let mut connection = member.connection().await;
            let info: String = redis::cmd("CLUSTER").arg("INFO").query_async(&mut connection).await.unwrap();
            let nodes: String = redis::cmd("CLUSTER").arg("NODES").query_async(&mut connection).await.unwrap();
            // A member that is known but not linked yet is not told what is published.
            let is_linked = |node: &str| !node.contains("handshake") && node.split(' ').nth(7) == Some("connected");
            info.contains("cluster_state:ok") && nodes.lines().count() == 3 && nodes.lines().all(is_linked)
        })
        .await;
    }
    members.into_iter().map(|(member, _)| member).collect()
}

/// Wakes until it is heard: members of a cluster lose what one of them publishes while the machine is too busy for them to
/// answer each other in time.
async fn sends(sender: &Node, address: Address, signal: Signal, subscription: &SignalSubscription) {
    let patience = Duration::from_secs(1);
    within("a signal through the cluster", async {
        sender.bus.notify(&[address], signal);
        while tokio::time::timeout(patience, heard(subscription, signal)).await.is_err() {
            sender.bus.notify(&[address], signal);
        }
    })
    .await;
}

#[tokio::test]
async fn signals_cross_a_cluster_and_go_on_when_a_member_dies() {
    let mut members = cluster().await;
    let hosts: Vec<_> = members.iter().map(|member| member.address().to_string()).collect();
    let nodes = ["redis-cluster", "valkey-cluster", "redis"]
        .map(|scheme| Node::open(&format!("{scheme}://{}", hosts.join(","))));
    let address = some_address();
    for node in &nodes {
        let subscription = node.listen(address).await;
        for sender in nodes.iter().filter(|sender| !std::ptr::eq(*sender, node)) {
            sender.ready().await;
            sends(sender, address, Signal::AuthChanged, &subscription).await;
        }
    }
    // Wherever those three went, these two are on different members.
    let pinned = [Node::open(&format!("redis://{}", hosts[1])), Node::open(&format!("redis-cluster://{}", hosts[2]))];
    let subscription = pinned[1].listen(address).await;
    pinned[0].ready().await;
    sends(&pinned[0], address, Signal::KeysLow, &subscription).await;

    let inbox = Inbox::read_on(&nodes[1]).await;
    // One of the three was there, or all three hear it from the others.
    members[0].kill();
    for _ in 0..100 {
        inbox.write_on(&nodes[0]).await;
    }
    inbox.all_seen().await;
    for node in &nodes {
        node.ready().await;
    }
}
