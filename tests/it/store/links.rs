//! Link sessions in the store.

use std::time::Duration;

use obscura_server::clock::Timestamp;
use obscura_server::store::{Approval, Approved, LinkBody, Linked, NewLink, Store};
use tokio::task::JoinSet;

use super::fixture::{NOW, TestStore, grant};
use super::support::{Member, NONE, account, approved_link, count, linked, new_device, new_link, number, public_key};
use crate::harness::signer::Identity;

const LIFETIME: Duration = Duration::from_mins(10);
const MILLISECOND: Duration = Duration::from_millis(1);

/// A link session that waits for its approval.
async fn opened(store: &Store, account: &Member, now: Timestamp) -> [u8; 32] {
    let hash = rand::random();
    store.open_link(account.user, &hash, now + LIFETIME, now).await.unwrap();
    hash
}

async fn body(store: &Store, hash: &[u8; 32]) -> LinkBody {
    store.link_body(hash, NOW).await.unwrap()
}

/// An approval that asks for no proof.
fn parcel(parcel: &[u8]) -> Approval<'_> {
    Approval { parcel, proof_required: false }
}

async fn approve(store: &Store, account: &Member, hash: &[u8; 32]) -> Approved {
    store.approve_link(account.user, hash, parcel(b"parcel"), NOW).await.unwrap()
}

fn newcomer(account: &Member, hash: [u8; 32]) -> NewLink {
    new_link(hash, &account.identity(), account.keys(1, 1..=2))
}

#[tokio::test]
async fn a_link_session_waits_for_its_approval_and_then_holds_the_parcel() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let hash = opened(&store, &alice, NOW).await;
    assert_eq!(body(&store, &hash).await, LinkBody::Waiting);
    assert_eq!(approve(&store, &alice, &hash).await, Approved::Stored);
    for _ in 0..2 {
        assert_eq!(body(&store, &hash).await, LinkBody::Approved(b"parcel".into()), "reading does not consume");
    }
    assert_eq!(body(&store, &rand::random()).await, LinkBody::Unknown);
}

#[tokio::test]
async fn an_empty_parcel_approves_too() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let hash = opened(&store, &alice, NOW).await;
    assert_eq!(store.approve_link(alice.user, &hash, parcel(b""), NOW).await.unwrap(), Approved::Stored);
    assert_eq!(body(&store, &hash).await, LinkBody::Approved(Vec::new()));
    assert_eq!(approve(&store, &alice, &hash).await, Approved::Already);
}

#[tokio::test]
async fn a_second_approval_changes_nothing() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let hash = approved_link(&store, &alice).await;
    assert_eq!(store.approve_link(alice.user, &hash, parcel(b"other"), NOW).await.unwrap(), Approved::Already);
    assert_eq!(body(&store, &hash).await, LinkBody::Approved(b"parcel".into()));
}

#[tokio::test]
async fn an_account_cannot_approve_for_another() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let hash = opened(&store, &alice, NOW).await;
    assert_eq!(approve(&store, &bob, &hash).await, Approved::Unknown);
    assert_eq!(approve(&store, &alice, &rand::random()).await, Approved::Unknown);
    assert_eq!(body(&store, &hash).await, LinkBody::Waiting);
}

#[tokio::test]
async fn a_new_link_session_replaces_the_waiting_one_of_its_account_only() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let approved = approved_link(&store, &alice).await;
    let waiting = opened(&store, &alice, NOW).await;
    let others = opened(&store, &bob, NOW).await;
    let newest = opened(&store, &alice, NOW).await;
    assert_eq!(body(&store, &approved).await, LinkBody::Approved(b"parcel".into()));
    assert_eq!(body(&store, &waiting).await, LinkBody::Unknown);
    assert_eq!(body(&store, &others).await, LinkBody::Waiting);
    assert_eq!(body(&store, &newest).await, LinkBody::Waiting);
}

#[tokio::test]
async fn link_sessions_opened_at_the_same_instant_leave_one_that_waits() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let mut openers = JoinSet::new();
    for _ in 0..20 {
        let (store, alice) = (Store::clone(&store), alice);
        openers.spawn(async move { opened(&store, &alice, NOW).await });
    }
    let mut waiting = 0;
    for hash in openers.join_all().await {
        waiting += u32::from(body(&store, &hash).await == LinkBody::Waiting);
    }
    assert_eq!(waiting, 1);
}

#[tokio::test]
async fn a_link_session_ends_after_its_lifetime() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let approved = approved_link(&store, &alice).await;
    let waiting = opened(&store, &alice, NOW).await;
    let (last, over) = (NOW + (LIFETIME - MILLISECOND), NOW + LIFETIME);
    assert_eq!(store.link_body(&waiting, last).await.unwrap(), LinkBody::Waiting);
    for hash in [waiting, approved] {
        assert_eq!(store.link_body(&hash, over).await.unwrap(), LinkBody::Unknown);
        assert_eq!(store.approve_link(alice.user, &hash, parcel(b""), over).await.unwrap(), Approved::Unknown);
        assert_eq!(store.link_device(&newcomer(&alice, hash), over).await.unwrap(), Linked::SessionInvalid);
    }
    assert!(matches!(store.link_device(&newcomer(&alice, approved), last).await.unwrap(), Linked::Device { .. }));
}

#[tokio::test]
async fn expired_link_sessions_are_forgotten_in_steps() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    for _ in 0..5 {
        approved_link(&store, &alice).await;
    }
    let living = rand::random();
    store.open_link(alice.user, &living, NOW + LIFETIME + MILLISECOND, NOW).await.unwrap();
    let over = NOW + LIFETIME;
    assert_eq!(store.expire_links(NOW, 10).await.unwrap(), 0);
    assert_eq!(store.expire_links(over, 3).await.unwrap(), 3);
    assert_eq!(store.expire_links(over, 3).await.unwrap(), 2);
    assert_eq!(store.expire_links(over, 3).await.unwrap(), 0);
    assert_eq!(store.link_body(&living, over).await.unwrap(), LinkBody::Waiting);
}

#[tokio::test]
async fn opening_a_link_session_purges_the_expired_ones_of_the_account() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    approved_link(&store, &alice).await;
    opened(&store, &alice, NOW + LIFETIME).await;
    assert_eq!(count(&store, "link_sessions").await, 1);
}

#[tokio::test]
async fn an_approved_link_session_makes_one_device_and_is_used_up() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let hash = approved_link(&store, &alice).await;
    let mut link = newcomer(&alice, hash);
    link.device.name = Some("Laptop".to_owned());
    let Linked::Device { user, no } = store.link_device(&link, NOW).await.unwrap() else { panic!("not linked") };
    assert_eq!(user, alice.user);
    let device_auth = store.device_auth(link.device.id).await.unwrap().unwrap();
    assert_eq!((device_auth.no, device_auth.user, device_auth.is_primary), (no, alice.user, false));
    assert_eq!(device_auth.tokens_revoked_until, 0);
    let devices = store.devices(alice.user).await.unwrap();
    assert_eq!(devices[1].name.as_deref(), Some("Laptop"));
    assert_eq!(store.prekey_counts(no).await.unwrap().unwrap().ec, 2);
    assert_eq!(number(&store, &format!("SELECT count(*) FROM sessions WHERE device_no = {}", no.0)).await, 1);

    assert_eq!(body(&store, &hash).await, LinkBody::Unknown);
    assert_eq!(store.link_device(&newcomer(&alice, hash), NOW).await.unwrap(), Linked::SessionInvalid);
}

#[tokio::test]
async fn a_link_session_makes_one_device_however_many_try_at_once() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let hash = approved_link(&store, &alice).await;
    let mut newcomers = JoinSet::new();
    for _ in 0..8 {
        let (store, link) = (Store::clone(&store), newcomer(&alice, hash));
        newcomers.spawn(async move { store.link_device(&link, NOW).await.unwrap() });
    }
    let linked = newcomers.join_all().await;
    assert_eq!(linked.iter().filter(|linked| matches!(linked, Linked::Device { .. })).count(), 1, "{linked:?}");
    assert_eq!(linked.iter().filter(|linked| **linked == Linked::SessionInvalid).count(), 7);
    assert_eq!(store.devices(alice.user).await.unwrap().len(), 2);
}

#[tokio::test]
async fn unknown_and_unapproved_link_sessions_link_nothing() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let waiting = opened(&store, &alice, NOW).await;
    for hash in [waiting, rand::random()] {
        assert_eq!(store.link_device(&newcomer(&alice, hash), NOW).await.unwrap(), Linked::SessionInvalid);
    }
    assert_eq!(body(&store, &waiting).await, LinkBody::Waiting, "it stays usable");
    assert_eq!(store.devices(alice.user).await.unwrap().len(), 1);
}

#[tokio::test]
async fn the_device_limit_refuses_before_the_identity_does_and_keeps_the_session() {
    let store = TestStore::open_with(|limits| limits.max_devices = 2).await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let second = linked(&store, &alice).await;
    linked(&store, &bob).await;
    let hash = approved_link(&store, &alice).await;
    let stranger = Identity::generate();
    let link = NewLink { identity: public_key(&stranger), ..newcomer(&alice, hash) };
    assert_eq!(store.link_device(&link, NOW).await.unwrap(), Linked::LimitReached { max: 2 });

    store.remove_device(alice.user, second.device).await.unwrap();
    assert_eq!(store.link_device(&link, NOW).await.unwrap(), Linked::IdentityDiffers);
    assert_eq!(count(&store, "devices").await, 3, "nothing of a refused device is stored");
    assert!(matches!(store.link_device(&newcomer(&alice, hash), NOW).await.unwrap(), Linked::Device { .. }));
}

#[tokio::test]
async fn a_reset_voids_approved_link_sessions() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let hash = approved_link(&store, &alice).await;
    let device = new_device(alice.keys(1, NONE));
    let (identity, grant) = (public_key(&alice.identity()), grant(NOW));
    store.reset(alice.user, &identity, &device, &grant).await.unwrap();
    assert_eq!(store.link_device(&newcomer(&alice, hash), NOW).await.unwrap(), Linked::SessionInvalid);
}
