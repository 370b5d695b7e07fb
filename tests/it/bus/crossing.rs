//! Which signals cross, and to whom.

use std::time::Duration;

use obscura_server::bus::Signal;
use obscura_server::model::ids::{Address, DeviceNo};

use super::{Inbox, Node, channels, everything, heard, some_address};
use crate::harness::{Valkey, eventually, within};

#[tokio::test]
async fn a_signal_reaches_the_sessions_of_the_device_on_another_node() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let address = some_address();
    let subscription = [other.listen(address).await, other.bus.subscribe(address)];
    for signal in [Signal::NewMessages, Signal::KeysLow, Signal::AuthChanged] {
        one.bus.notify(&[some_address(), address], signal);
        heard(&subscription[0], signal).await;
        heard(&subscription[1], signal).await;
    }
}

#[tokio::test]
async fn a_signal_reaches_no_other_device_of_the_account() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let address = some_address();
    let sibling = Address { device: DeviceNo(i64::MAX), ..address };
    let (subscription, siblings) = (other.listen(address).await, other.bus.subscribe(sibling));
    one.bus.notify(&[address], Signal::NewMessages);
    heard(&subscription, Signal::NewMessages).await;
    one.bus.notify(&[sibling], Signal::KeysLow);
    assert_eq!(within("a signal", siblings.next()).await, Signal::KeysLow.into());
}

#[tokio::test]
async fn a_session_on_the_same_node_hears_its_signal_once() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let address = some_address();
    let (here, there) = (one.listen(address).await, other.listen(address).await);
    one.bus.notify(&[address], Signal::NewMessages);
    assert_eq!(within("the signal here", here.next()).await, Signal::NewMessages.into());
    heard(&there, Signal::NewMessages).await;
    // Had the first one come back, it would be here before or with this one.
    other.bus.notify(&[address], Signal::KeysLow);
    assert_eq!(within("the next signal", here.next()).await, Signal::KeysLow.into());
}

#[tokio::test]
async fn a_node_subscribes_the_channels_of_its_own_accounts_only_and_leaves_them_later() {
    let valkey = Valkey::start().await;
    let nodes = [(); 2].map(|()| {
        Node::open_with(&valkey.url(), |config| {
            config.notifications.channel_prefix = "test:".into();
            config.notifications.gc_interval = Duration::from_millis(50);
        })
    });
    let addresses = [some_address(), some_address(), some_address()];
    let mut names: Vec<_> = addresses.iter().map(|address| format!("test:{}", address.user)).collect();
    names.push("test:all".into());
    names.sort();
    let here = [nodes[0].listen(addresses[0]).await, nodes[0].listen(addresses[1]).await];
    let there = [nodes[1].listen(addresses[1]).await, nodes[1].listen(addresses[2]).await];
    assert_eq!(channels(&valkey).await, names);
    let subscribers = async |name: &str| {
        let mut connection = valkey.connection().await;
        let counts: (String, u64) =
            redis::cmd("PUBSUB").arg("NUMSUB").arg(name).query_async(&mut connection).await.unwrap();
        counts.1
    };
    for (address, count) in addresses.iter().zip([1, 2, 1]) {
        assert_eq!(subscribers(&format!("test:{}", address.user)).await, count);
    }
    drop(here);
    eventually("one node to leave its channels", async || {
        subscribers(&format!("test:{}", addresses[0].user)).await == 0
            && subscribers(&format!("test:{}", addresses[1].user)).await == 1
    })
    .await;
    // Who comes back is heard again.
    let again = nodes[0].listen(addresses[0]).await;
    nodes[1].bus.notify(&[addresses[0]], Signal::AuthChanged);
    heard(&again, Signal::AuthChanged).await;
    drop((again, there));
    eventually("both to leave", async || channels(&valkey).await == ["test:all"]).await;
}

#[tokio::test]
async fn a_crowd_of_accounts_is_subscribed_and_heard() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let crowd: Vec<_> = (0..2_000).map(|_| some_address()).collect();
    let sessions: Vec<_> = crowd.iter().map(|address| other.bus.subscribe(*address)).collect();
    for session in &sessions {
        everything(session).await;
    }
    one.bus.notify(&crowd, Signal::KeysLow);
    for session in &sessions {
        heard(session, Signal::KeysLow).await;
    }
}

#[tokio::test]
async fn what_is_signalled_while_a_session_begins_is_read_or_heard() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let mut inboxes = Vec::new();
    for _ in 0..300 {
        let (inbox, subscription) = Inbox::new(&other);
        inbox.read(subscription);
        // The channel is not confirmed yet, and the signal may be published before it is.
        inbox.write_on(&one).await;
        inboxes.push(inbox);
        tokio::task::yield_now().await;
    }
    for inbox in &inboxes {
        inbox.all_seen().await;
    }
}

#[tokio::test]
async fn noise_on_a_channel_is_ignored() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let address = some_address();
    let subscription = other.listen(address).await;
    let mut connection = valkey.connection().await;
    for noise in [&b""[..], b"hello", &[1; 20], &[2; 18], &[9; 26]] {
        let channel = format!("user:{}", address.user);
        let () = redis::cmd("PUBLISH").arg(channel).arg(noise).query_async(&mut connection).await.unwrap();
    }
    one.bus.notify(&[address], Signal::AuthChanged);
    assert_eq!(within("the signal", subscription.next()).await, Signal::AuthChanged.into());
}

#[tokio::test]
async fn what_was_signalled_last_still_goes_out_at_the_end() {
    let valkey = Valkey::start().await;
    let [one, other] = Node::pair(&valkey).await;
    let crowd: Vec<_> = (0..1_500).map(|_| some_address()).collect();
    let sessions: Vec<_> = crowd.iter().map(|address| other.bus.subscribe(*address)).collect();
    for session in &sessions {
        everything(session).await;
    }
    one.bus.notify(&crowd, Signal::AuthChanged);
    one.tasks.stop();
    within("the node to end", one.tasks.ended()).await;
    for session in &sessions {
        heard(session, Signal::AuthChanged).await;
    }
}
