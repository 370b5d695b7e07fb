//! A Valkey that answers and is not the right one: demoted, or deaf.

use std::time::{Duration, Instant};

use obscura_server::bus::Signal;
use obscura_server::config::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Inbox, Node, heard, some_address};
use crate::harness::{Proxy, TestServer, Valkey, eventually, within, within_time};

/// Makes one the replica of the other, or a primary.
async fn replica_of(valkey: &Valkey, primary: Option<&Valkey>) {
    let (host, port) = match primary {
        Some(primary) => ("127.0.0.1".to_owned(), primary.address().port().to_string()),
        None => ("NO".to_owned(), "ONE".to_owned()),
    };
    let mut command = redis::cmd("REPLICAOF");
    command.arg(host).arg(port);
    let () = command.query_async(&mut valkey.connection().await).await.unwrap();
}

/// A primary and its replica, whose data is there.
async fn primary_and_replica() -> (Valkey, Valkey) {
    let (primary, replica) = (Valkey::start().await, Valkey::start_with(&["--repl-diskless-sync-delay", "0"]).await);
    replica_of(&replica, Some(&primary)).await;
    eventually("the replica to follow", async || {
        let info: String =
            redis::cmd("INFO").arg("replication").query_async(&mut replica.connection().await).await.unwrap();
        info.contains("master_link_status:up")
    })
    .await;
    (primary, replica)
}

#[tokio::test]
async fn a_node_that_stays_connected_to_a_demoted_primary_moves_to_the_new_one() {
    let (primary, replica) = primary_and_replica().await;
    // What both know is a name that leads to the primary.
    let (to_one, to_other) = (Proxy::start(primary.address()).await, Proxy::start(primary.address()).await);
    let [one, other] = [&to_one, &to_other].map(|proxy| Node::open(&format!("redis://{}", proxy.address())));
    one.connected().await;
    other.connected().await;
    let inbox = Inbox::read_on(&other).await;

    [&to_one, &to_other].iter().for_each(|proxy| proxy.set_target(replica.address()));
    replica_of(&replica, None).await;
    replica_of(&primary, Some(&replica)).await;
    to_other.cut();
    let since = Instant::now();
    inbox.write_on(&one).await;
    one.not_ready().await;
    assert!(since.elapsed() < Duration::from_secs(8), "noticed after {:?}", since.elapsed());
    inbox.all_seen().await;
    one.ready().await;
    let address = some_address();
    let subscription = other.listen(address).await;
    one.bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
}

#[tokio::test]
async fn of_several_hosts_the_one_that_takes_writes_is_used_also_after_a_failover() {
    let (primary, replica) = primary_and_replica().await;
    let url = format!("redis://{},{}", replica.address(), primary.address());
    let nodes: Vec<_> = (0..4).map(|_| Node::open(&url)).collect();
    let connected = async |valkey: &Valkey| {
        let clients: String =
            redis::cmd("CLIENT").arg("LIST").query_async(&mut valkey.connection().await).await.unwrap();
        clients.lines().filter(|client| client.contains("cmd=zrem") || !client.contains(" sub=0")).count()
    };
    eventually("all nodes to be at the primary", async || connected(&primary).await == 4).await;
    replica_of(&replica, None).await;
    replica_of(&primary, Some(&replica)).await;
    eventually("all nodes to be at the new primary", async || connected(&replica).await == 4).await;
    for node in &nodes {
        node.ready().await;
    }
}

#[tokio::test]
async fn a_replica_that_takes_writes_of_its_own_is_no_primary_either() {
    let (primary, replica) = primary_and_replica().await;
    let mut set = redis::cmd("CONFIG");
    set.arg(&["SET", "replica-read-only", "no"]);
    let () = set.query_async(&mut replica.connection().await).await.unwrap();
    let node = Node::open(&replica.url());
    eventually("some attempts", async || node.metrics.bus_connected.value(()) == Some(0)).await;
    node.not_ready().await;
    replica_of(&replica, None).await;
    node.ready().await;
    drop(primary);
}

#[tokio::test]
async fn a_valkey_that_confirms_everything_and_delivers_nothing_is_no_connection() {
    let deaf = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = deaf.local_addr().unwrap();
    let proxy = Proxy::start(address).await;
    tokio::spawn(async move {
        while let Ok((client, _)) = deaf.accept().await {
            tokio::spawn(confirm_everything(client));
        }
    });
    let node = Node::open(&format!("redis://{}", proxy.address()));
    eventually("a second attempt", async || proxy.accepted() >= 2).await;
    let valkey = Valkey::start().await;
    proxy.set_target(valkey.address());
    within("a connection to one that delivers", node.connected()).await;
    node.ready().await;
}

/// Speaks as much of the protocol as a client needs to believe in it.
async fn confirm_everything(mut client: TcpStream) {
    let mut received = Vec::new();
    while matches!(client.read_buf(&mut received).await, Ok(1..)) {
        let mut answer = Vec::new();
        while let Some((command, length)) = first_command(&received) {
            received.drain(..length);
            answer.extend_from_slice(
                match command[0].to_ascii_uppercase().as_str() {
                    "HELLO" => "%2\r\n$5\r\nproto\r\n:3\r\n$4\r\nrole\r\n$6\r\nmaster\r\n".to_owned(),
                    "SUBSCRIBE" => {
                        let confirm = |channel: &String| {
                            format!(">3\r\n$9\r\nsubscribe\r\n${}\r\n{channel}\r\n:1\r\n", channel.len())
                        };
                        command[1..].iter().map(confirm).collect()
                    }
                    "PUBLISH" | "ZREM" => ":1\r\n".to_owned(),
                    "PING" => "+PONG\r\n".to_owned(),
                    _ => "+OK\r\n".to_owned(),
                }
                .as_bytes(),
            );
        }
        if client.write_all(&answer).await.is_err() {
            return;
        }
    }
}

/// The first whole command, and its length. What is not text becomes something else, which doesn't matter here.
fn first_command(bytes: &[u8]) -> Option<(Vec<String>, usize)> {
    let line = |from: usize| {
        let length = bytes.get(from..)?.windows(2).position(|two| two == b"\r\n")?;
        let number = std::str::from_utf8(&bytes[from + 1..from + length]).ok()?.parse::<usize>().ok()?;
        Some((number, from + length + 2))
    };
    let (count, mut at) = line(0)?;
    let mut words = Vec::with_capacity(count);
    for _ in 0..count {
        let (length, start) = line(at)?;
        words.push(String::from_utf8_lossy(bytes.get(start..start + length)?).into_owned());
        at = start + length + 2;
    }
    (at <= bytes.len()).then_some((words, at))
}

#[tokio::test]
async fn while_valkey_is_away_mail_of_another_node_comes_within_fifteen_seconds() {
    let mut valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let inbox = Inbox::read_on(&other).await;
    valkey.kill();
    other.not_ready().await;
    for _ in 0..2 {
        inbox.write_on(&one).await;
        within_time(Duration::from_secs(16), "the mail to be found", inbox.all_seen()).await;
    }
}

#[tokio::test]
async fn a_node_on_a_demoted_primary_says_so_at_its_management_port_within_seconds() {
    let (primary, replica) = primary_and_replica().await;
    let server = TestServer::start_with(|config| {
        config.pubsub.url = Secret::new(primary.url());
        config.pubsub.min_backoff = Duration::from_millis(20);
    })
    .await;
    let pubsub = async || server.management().get("/readyz").send().await.json()["pubsub"].clone();
    assert_eq!(pubsub().await, "ok");
    replica_of(&replica, None).await;
    replica_of(&primary, Some(&replica)).await;
    let since = Instant::now();
    eventually("the node to say so", async || pubsub().await == "error").await;
    assert!(since.elapsed() < Duration::from_secs(8), "after {:?}", since.elapsed());
    replica_of(&primary, None).await;
    eventually("the node to be ready again", async || pubsub().await == "ok").await;
}
