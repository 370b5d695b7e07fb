//! What was stored while a clock was wrong, once it is right again.

use std::time::Duration;

use obscura_server::clock::{Moment, Timestamp};
use obscura_server::model::ids::AttachmentId;
use obscura_server::model::message::{Replay, SendRequest, SendResult};
use obscura_server::store::{Allowance, Reservation, Reserved, Store};

use super::fixture::{NOW, Person, TestStore};
use super::support::{self, acknowledge, waiting};
use crate::harness::eventually;

const DAY: Duration = Duration::from_hours(24);
const HOUR: Duration = Duration::from_hours(1);

/// The clock may be ahead by so much.
fn ahead(by: Duration) -> Moment {
    Moment { earliest: NOW, latest: NOW + by }
}

fn send(from: &Person, to: &[&Person]) -> SendRequest {
    support::send(from, &to.iter().map(|person| (*person, 200)).collect::<Vec<_>>())
}

async fn commit_group(store: &Store, mail: &SendRequest, now: impl Into<Moment>) -> SendResult {
    let result = store.commit_group(std::slice::from_ref(mail), &[], now).await.unwrap();
    result.sent.into_iter().next().flatten().expect("a send that needs not wait")
}

/// Sweeps, in steps of so many, until there is nothing more to do.
async fn sweep(store: &TestStore, mut now: Timestamp, step: u32) {
    while store.expire_messages(now, now, step).await.unwrap().more {
        now = now + Duration::from_secs(1);
    }
    while store.expire_sends(now, step).await.unwrap() > 0 {}
}

#[tokio::test]
async fn who_sent_something_while_the_clock_was_forty_days_ahead_is_forgotten_after_a_day() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    let (kept, acked, probe) = (send(&alice, &[&bob]), send(&alice, &[&carol]), send(&alice, &[]));
    for mail in [&kept, &acked] {
        commit_group(&store, mail, ahead(DAY * 40)).await;
    }
    acknowledge(&store, &carol).await;
    let database = store.database().await;
    let sends = async || database.number("SELECT count(*) FROM sends").await;
    // A sweep of sends comes by first.
    store.expire_sends(NOW, 100).await.unwrap();
    sweep(&store, NOW, 100).await;
    for mail in [&kept, &acked] {
        assert_eq!(commit_group(&store, mail, NOW + HOUR * 23).await.replay, Some(Replay::SameBody));
    }
    assert_eq!(sends().await, 2);
    sweep(&store, NOW + HOUR * 25, 100).await;
    assert_eq!(sends().await, 1, "one of them waits");
    acknowledge(&store, &bob).await;
    sweep(&store, NOW + HOUR * 50, 100).await;
    assert_eq!(sends().await, 0);
    commit_group(&store, &probe, NOW + HOUR * 50).await;
}

#[tokio::test]
async fn a_key_stays_while_its_message_waits_though_the_clock_was_ten_days_ahead_when_it_came() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let mail = send(&alice, &[&bob]);
    commit_group(&store, &mail, ahead(DAY * 10)).await;
    for day in [0, 2, 9, 12, 14] {
        let now = NOW + DAY * day + HOUR;
        sweep(&store, now, 100).await;
        assert_eq!(commit_group(&store, &mail, now).await.replay, Some(Replay::SameBody), "day {day}");
        assert_eq!(waiting(&store, &bob).await.len(), 1, "day {day}");
    }
}

/// Each of them has several messages, and the steps end within some of them.
#[tokio::test]
async fn all_messages_of_a_send_are_corrected_together_with_it() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let people = [store.account().await, store.account().await, store.account().await];
    let to: Vec<&Person> = people.iter().collect();
    for minute in 0..5 {
        commit_group(&store, &send(&alice, &to), ahead(DAY * 10 + Duration::from_mins(minute))).await;
    }
    sweep(&store, NOW, 4).await;
    let database = store.database().await;
    let late = format!("received_at > {}", (NOW + DAY).millis());
    assert_eq!(database.number(&format!("SELECT count(*) FROM messages WHERE {late}")).await, 0);
    let together = "SELECT count(*) FROM messages m JOIN sends s
        ON m.received_at = s.sent_at AND m.position BETWEEN s.first_position AND s.last_position";
    assert_eq!(database.number(together).await, 15);
}

/// Their messages may have come at different times, so the outcome has to stay until the last of them has expired.
#[tokio::test]
async fn a_repeat_that_queued_the_rest_while_the_clock_was_wrong_is_remembered_while_that_may_wait() {
    let store = TestStore::open_with(|limits| limits.max_inbox_size = 1).await;
    let (alice, bob) = (store.account().await, store.account().await);
    let (first, mail) = (send(&alice, &[&bob]), send(&alice, &[&bob]));
    commit_group(&store, &first, NOW).await;
    assert_eq!(commit_group(&store, &mail, NOW).await.outcome.refused.len(), 1);
    acknowledge(&store, &bob).await;
    let is_queued = async || commit_group(&store, &mail, ahead(DAY * 40)).await.outcome.refused.is_empty();
    eventually("room", is_queued).await;
    for day in [0, 2, 29] {
        let now = NOW + DAY * day + HOUR;
        sweep(&store, now, 100).await;
        assert_eq!(commit_group(&store, &mail, now).await.replay, Some(Replay::SameBody), "day {day}");
    }
    sweep(&store, NOW + DAY * 31, 100).await;
    assert_eq!(store.database().await.number("SELECT count(*) FROM sends").await, 0);
}

#[tokio::test]
async fn debts_that_a_wrong_clock_has_stored_are_deleted() {
    let store = TestStore::open_with(|limits| limits.sender_bytes_per_day = 6400).await;
    let (alice, bob) = (store.account().await, store.account().await);
    commit_group(&store, &send(&alice, &[&bob]), ahead(DAY * 40)).await;
    let allowance = Allowance { quota_bytes: 0, bytes_per_day: 1 << 20 };
    let (user, id, now) = (alice.user, AttachmentId::random(), NOW + DAY * 40);
    let upload = Reservation { user, id, size: 5000, now, born: now, allowance };
    assert_eq!(store.reserve_attachment(upload).await.unwrap(), Reserved::Yes);
    let database = store.database().await;
    let debts = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    assert_eq!((debts("send_debts").await, debts("upload_debts").await), (1, 1));
    for latest in [NOW + DAY * 40, NOW] {
        let is_over = latest == NOW;
        let now = Moment { earliest: NOW, latest };
        assert_eq!(store.expire_send_debts(now, 10).await.unwrap(), u64::from(is_over));
        assert_eq!(store.expire_upload_debts(now, 10).await.unwrap(), u64::from(is_over));
    }
}

/// The same key for two recipients, at the same moment, at two nodes whose clocks are in doubt.
#[tokio::test]
async fn a_key_that_another_node_has_just_used_is_not_used_again_while_the_clock_is_in_doubt() {
    let store = TestStore::open_in_postgres().await;
    let beside = store.open_again().await.unwrap();
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    let first = send(&alice, &[&bob]);
    let other = SendRequest { digest: [2; 16], key: first.key, ..send(&alice, &[&carol]) };
    let database = store.database().await;
    let gate = format!(
        "CREATE TABLE opened (x integer);
         CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN LOOP
             PERFORM 1 FROM opened;
             EXIT WHEN FOUND;
             PERFORM pg_sleep(0.01);
         END LOOP; RETURN NEW; END $$;
         CREATE TRIGGER gate BEFORE INSERT ON messages FOR EACH ROW WHEN (NEW.device_no = {}) EXECUTE FUNCTION wait()",
        bob.no.0
    );
    database.execute(&gate).await;
    let activity = async |event: &str| {
        let of = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()";
        database.number(&format!("{of} AND {event}")).await > 0
    };
    let second = async {
        let is_written = async || activity("wait_event = 'PgSleep'").await;
        eventually("the first one to be written", is_written).await;
        commit_group(&beside, &other, ahead(DAY * 40)).await
    };
    let open = async {
        eventually("the second one to wait for it", async || activity("wait_event_type = 'Lock'").await).await;
        database.execute("INSERT INTO opened VALUES (1)").await;
    };
    let (first, second, ()) = tokio::join!(commit_group(&store, &first, NOW), second, open);
    assert_eq!((first.replay, second.replay), (None, Some(Replay::OtherBody)));
    assert_eq!((waiting(&store, &bob).await.len(), waiting(&store, &carol).await.len()), (1, 0));
}
