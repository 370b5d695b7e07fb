//! The inboxes in the store: `commit_group`, `unsent`, `positions`, `expire_messages`, `expire_sends`.

use std::cell::Cell;
use std::time::Duration;

use bytes::Bytes;
use obscura_server::clock::{Moment, Timestamp};
use obscura_server::model::ids::{DeviceId, DeviceNo, IdempotencyKey, MessageId, Position, UserId};
use obscura_server::model::message::{Envelope, Outcome, Recipient, Replay, Sealed, SendRequest, Sender};
use obscura_server::store::{Page, Store};

use super::fixture::{NOW, Person, TestStore};
use crate::harness::eventually;

const DAY: Duration = Duration::from_hours(24);
const RETENTION: Duration = Duration::from_hours(24 * 30);
const START: Position = Position(0);

fn sender(person: &Person) -> Sender {
    Sender { user: person.user, device: person.device, no: person.no }
}

fn mail(from: &Person, recipients: Vec<(UserId, Vec<DeviceId>)>, message: &str) -> SendRequest {
    let sealed = |device| (device, Sealed(Bytes::copy_from_slice(message.as_bytes())));
    let recipient = |(user, devices): (UserId, Vec<DeviceId>)| Recipient {
        user,
        submissions: devices.into_iter().map(sealed).collect(),
        throttled_for: None,
    };
    SendRequest {
        sender: sender(from),
        key: IdempotencyKey::random(),
        digest: [1; 16],
        recipients: recipients.into_iter().map(recipient).collect(),
    }
}

pub fn to(from: &Person, to: &Person, message: &str) -> SendRequest {
    mail(from, vec![(to.user, vec![to.device])], message)
}

async fn inbox(store: &Store, person: &Person, now: Timestamp) -> Vec<Envelope> {
    store.unsent(person.no, START, now, 10_000, 1 << 30).await.unwrap().envelopes
}

fn bodies(envelopes: &[Envelope]) -> Vec<String> {
    envelopes.iter().map(|envelope| String::from_utf8_lossy(&envelope.body.0).into_owned()).collect()
}

fn sizes(page: &Page) -> (Vec<usize>, bool) {
    (page.envelopes.iter().map(|envelope| envelope.body.0.len()).collect(), page.more)
}

#[tokio::test]
async fn a_group_of_sends_is_stored_in_order_and_each_is_answered_by_itself() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    let unknown = DeviceId::random();
    let group = [
        to(&alice, &bob, "one"),
        mail(&carol, vec![(bob.user, vec![])], "not queued"),
        mail(&alice, vec![(bob.user, vec![bob.device, unknown]), (carol.user, vec![carol.device])], "two"),
        to(&carol, &bob, "three"),
    ];
    let sent = store.commit_group(&group, &[], NOW).await.unwrap();
    assert_eq!(sent.iter().map(|sent| sent.replay).collect::<Vec<_>>(), [None; 4]);
    assert_eq!(sent[0].outcome, Outcome::default());
    assert_eq!(sent[0].receivers, [bob.address()]);
    assert_eq!(sent[1].outcome.mismatches, [(bob.user, vec![bob.device])]);
    assert_eq!(sent[1].receivers, []);
    assert_eq!(sent[2].outcome, Outcome { invalid_devices: vec![unknown], ..Outcome::default() });
    assert_eq!(sent[2].receivers, [bob.address(), carol.address()]);

    let bobs = inbox(&store, &bob, NOW).await;
    assert_eq!(bodies(&bobs), ["one", "two", "three"]);
    assert!(bobs.is_sorted_by_key(|envelope| (envelope.received_at.millis(), *envelope.id.as_bytes())));
    assert!(bobs.is_sorted_by_key(|envelope| envelope.position));
    assert_eq!((bobs[2].sender_user, bobs[2].sender_device, bobs[2].received_at), (carol.user, carol.device, NOW));
    assert_eq!(bodies(&inbox(&store, &carol, NOW).await), ["two"]);
}

#[tokio::test]
async fn a_repeat_within_one_group_or_in_a_later_one_queues_nothing() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let first = to(&alice, &bob, "once");
    let other_body = SendRequest { digest: [2; 16], ..first.clone() };
    let other_sender = SendRequest { sender: sender(&store.account().await), ..first.clone() };
    let group = [first.clone(), first.clone(), other_body.clone(), other_sender];
    let sent = store.commit_group(&group, &[], NOW).await.unwrap();
    let replays: Vec<_> = sent.iter().map(|sent| sent.replay).collect();
    assert_eq!(replays, [None, Some(Replay::SameBody), Some(Replay::OtherBody), None]);
    let sent = store.commit_group(&[other_body, first], &[], NOW + DAY / 2).await.unwrap();
    assert_eq!(sent[0].replay, Some(Replay::OtherBody));
    assert_eq!(sent[1].replay, Some(Replay::SameBody));
    // Whoever stored the first may have died before it could wake anybody.
    assert!(sent.iter().all(|sent| sent.receivers == [bob.address()]));
    assert_eq!(inbox(&store, &bob, NOW).await.len(), 2);
}

#[tokio::test]
async fn acks_delete_messages_of_their_own_device_only() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    store
        .commit_group(&[to(&alice, &bob, "b1"), to(&alice, &bob, "b2"), to(&alice, &carol, "c")], &[], NOW)
        .await
        .unwrap();
    let (bobs, carols) = (inbox(&store, &bob, NOW).await, inbox(&store, &carol, NOW).await);
    let foreign = [(bob.no, carols[0].position), (carol.no, bobs[0].position), (DeviceNo(999), bobs[1].position)];
    store.commit_group(&[], &foreign, NOW).await.unwrap();
    assert_eq!(inbox(&store, &bob, NOW).await.len() + inbox(&store, &carol, NOW).await.len(), 3);

    let acks = [
        (bob.no, bobs[0].position),
        (bob.no, bobs[0].position),
        (carol.no, carols[0].position),
        (bob.no, Position(77)),
    ];
    let sent = store.commit_group(&[to(&alice, &bob, "b3")], &acks, NOW).await.unwrap();
    assert_eq!(sent.len(), 1);
    assert_eq!(bodies(&inbox(&store, &bob, NOW).await), ["b2", "b3"]);
    assert_eq!(bodies(&inbox(&store, &carol, NOW).await), [""; 0]);
}

#[tokio::test]
async fn a_position_is_never_used_again_even_after_a_restart_with_an_empty_inbox() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    store.commit_group(&[to(&alice, &bob, "one"), to(&alice, &bob, "two")], &[], NOW).await.unwrap();
    let before = inbox(&store, &bob, NOW).await;
    let acks: Vec<_> = before.iter().map(|envelope| (bob.no, envelope.position)).collect();
    store.commit_group(&[], &acks, NOW).await.unwrap();
    let again = store.reopened().await;
    again.commit_group(&[to(&alice, &bob, "three")], &[], NOW).await.unwrap();
    assert!(inbox(&again, &bob, NOW).await[0].position > before[1].position);
}

#[tokio::test]
async fn messages_received_within_one_moment_or_a_step_back_keep_their_order() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    for (number, back) in [0, 0, 3, 1, 0].into_iter().enumerate() {
        let now = NOW - Duration::from_millis(back);
        store.commit_group(&[to(&alice, &bob, &number.to_string())], &[], now).await.unwrap();
    }
    let envelopes = inbox(&store, &bob, NOW).await;
    assert_eq!(bodies(&envelopes), ["0", "1", "2", "3", "4"]);
    assert!(envelopes.is_sorted_by_key(|envelope| (envelope.received_at.millis(), *envelope.id.as_bytes())));
}

/// The clock is two hours ahead for a moment, and then right.
#[tokio::test]
async fn receipt_times_do_not_stay_in_the_future_when_a_clock_that_was_ahead_is_right_again() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let ahead = Moment { earliest: NOW, latest: NOW + Duration::from_hours(2) };
    for (text, moment) in [("before", NOW.into()), ("ahead", ahead), ("after", (NOW + Duration::from_secs(1)).into())] {
        (*store).commit_group(&[to(&alice, &bob, text)], &[], moment).await.unwrap();
    }
    let store = store.reopened().await;
    let later = NOW + Duration::from_secs(2);
    store.commit_group(&[to(&alice, &bob, "later")], &[], later).await.unwrap();
    let envelopes = inbox(&store, &bob, NOW).await;
    assert_eq!(bodies(&envelopes), ["before", "ahead", "after", "later"], "the order stays");
    let times: Vec<_> = envelopes.iter().map(|envelope| envelope.received_at).collect();
    assert_eq!(times, [NOW, ahead.latest, NOW + Duration::from_secs(1), later]);
    assert!(envelopes[2].id < envelopes[1].id, "ids tell the same time");
}

#[tokio::test]
async fn a_page_is_bounded_in_messages_and_in_bytes_and_goes_on_where_the_last_one_ended() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let message = |size: usize| to(&alice, &bob, &"x".repeat(size));
    store.commit_group(&[400, 400, 400, 5000, 1, 2].map(message), &[], NOW).await.unwrap();
    let page = async |after: Position, limit, bytes| store.unsent(bob.no, after, NOW, limit, bytes).await.unwrap();

    let first = page(START, 2, 1 << 30).await;
    assert_eq!(sizes(&first), (vec![400, 400], true));
    let after = first.envelopes[1].position;
    assert_eq!(sizes(&page(after, 2, 1 << 30).await), (vec![400, 5000], true));
    assert_eq!(sizes(&page(START, 50, 1000).await), (vec![400, 400], true), "envelopes weigh more than their bodies");
    let third = page(after, 50, 1000).await;
    assert_eq!(sizes(&third), (vec![400], true));
    let large = page(third.envelopes[0].position, 50, 1000).await;
    assert_eq!(sizes(&large), (vec![], true));
    let weight = large.oversized.expect("the next one is larger");
    assert!((5001..=5200).contains(&weight), "{weight}");
    assert_eq!(page(third.envelopes[0].position, 50, weight - 1).await.oversized, Some(weight));
    let large = page(third.envelopes[0].position, 50, weight).await;
    assert_eq!((sizes(&large), large.oversized), ((vec![5000], true), None), "it comes alone");
    let all = page(large.envelopes[0].position, 50, 1000).await;
    assert_eq!(sizes(&all), (vec![1, 2], false), "nothing is behind them, also if the page has no room for much more");
    let rest = page(large.envelopes[0].position, 50, 1 << 30).await;
    assert_eq!(sizes(&rest), (vec![1, 2], false));
    assert_eq!(sizes(&page(rest.envelopes[1].position, 50, 1 << 30).await), (vec![], false));
}

#[tokio::test]
async fn ids_are_found_in_the_inbox_of_their_own_device_only() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    store
        .commit_group(&[to(&alice, &bob, "b1"), to(&alice, &carol, "c"), to(&alice, &bob, "b2")], &[], NOW)
        .await
        .unwrap();
    let (bobs, carols) = (inbox(&store, &bob, NOW).await, inbox(&store, &carol, NOW).await);
    let ids = [bobs[1].id, MessageId::random(), carols[0].id, bobs[1].id];
    assert_eq!(store.positions(bob.no, &ids).await.unwrap(), [bobs[1].position]);
    assert_eq!(store.positions(bob.no, &[]).await.unwrap(), []);
    let many: Vec<_> = (0..5000).map(|_| MessageId::random()).chain([bobs[0].id]).collect();
    assert_eq!(store.positions(bob.no, &many).await.unwrap(), [bobs[0].position]);
}

#[tokio::test]
async fn a_message_is_gone_the_moment_it_has_the_age_of_retention() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    store.commit_group(&[to(&alice, &bob, "x")], &[], NOW).await.unwrap();
    assert_eq!(inbox(&store, &bob, NOW + RETENTION - Duration::from_millis(1)).await.len(), 1);
    assert_eq!(inbox(&store, &bob, NOW + RETENTION).await.len(), 0);
}

#[tokio::test]
async fn expired_messages_are_swept_in_steps_and_no_others() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    for minute in 0..10 {
        let now = NOW + Duration::from_mins(minute);
        store.commit_group(&[to(&alice, &bob, &minute.to_string())], &[], now).await.unwrap();
    }
    let then = NOW + RETENTION + Duration::from_mins(6);
    let mut steps = Vec::new();
    loop {
        let step = store.expire_messages(then, then, 3).await.unwrap();
        steps.push(step.deleted);
        if !step.more {
            break;
        }
    }
    assert_eq!(steps.iter().sum::<u64>(), 7);
    assert!(steps.iter().all(|deleted| *deleted <= 3), "{steps:?}");
    assert_eq!(store.database().await.number("SELECT count(*) FROM messages").await, 3);
    assert_eq!(bodies(&inbox(&store, &bob, then).await), ["7", "8", "9"]);
    assert_eq!(store.expire_messages(then, then, 3).await.unwrap().deleted, 0);
}

#[tokio::test]
async fn a_clock_that_was_wrong_for_a_while_costs_no_mail() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    store.commit_group(&[to(&alice, &bob, "before")], &[], NOW).await.unwrap();
    store.commit_group(&[to(&alice, &bob, "in 1970")], &[], Timestamp::from_seconds(60)).await.unwrap();
    store.commit_group(&[to(&alice, &bob, "after")], &[], NOW).await.unwrap();
    assert_eq!(store.expire_messages(NOW, NOW, 100).await.unwrap().deleted, 1);
    assert_eq!(bodies(&inbox(&store, &bob, NOW).await), ["before", "after"]);
}

#[tokio::test]
async fn outcomes_are_forgotten_after_a_day_unless_their_messages_still_wait() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let (waiting, delivered) = (to(&alice, &bob, "waiting"), to(&alice, &bob, "delivered"));
    let probe = mail(&alice, vec![(bob.user, vec![])], "");
    store.commit_group(&[waiting.clone(), delivered.clone(), probe.clone()], &[], NOW).await.unwrap();
    let acked = inbox(&store, &bob, NOW).await[1].position;
    store.commit_group(&[], &[(bob.no, acked)], NOW).await.unwrap();
    let database = store.database().await;
    let kept = async || database.number("SELECT count(*) FROM sends").await;

    assert_eq!(store.expire_sends(NOW + DAY - Duration::from_secs(1), 100).await.unwrap(), 0);
    assert_eq!(kept().await, 3);
    let later = NOW + DAY + Duration::from_secs(1);
    assert_eq!(store.expire_sends(later, 100).await.unwrap(), 3, "looked at");
    assert_eq!(kept().await, 1);
    assert_eq!(store.expire_sends(later, 100).await.unwrap(), 0, "what is kept is not looked at again at once");
    let sent = store.commit_group(&[waiting, delivered, probe], &[], later).await.unwrap();
    let replays: Vec<_> = sent.iter().map(|sent| sent.replay).collect();
    assert_eq!(replays, [Some(Replay::SameBody), None, None]);

    let position = inbox(&store, &bob, later).await[0].position;
    store.commit_group(&[], &[(bob.no, position)], later).await.unwrap();
    store.expire_sends(later + DAY, 100).await.unwrap();
    assert_eq!(kept().await, 1, "only the one that was sent anew still waits");
}

#[tokio::test]
async fn outcomes_are_swept_in_steps() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    for second in 0..10 {
        let probe = mail(&alice, vec![(bob.user, vec![])], "");
        store.commit_group(&[probe], &[], NOW + Duration::from_secs(second)).await.unwrap();
    }
    let mut total = 0;
    for _ in 0..5 {
        let step = store.expire_sends(NOW + DAY * 2, 3).await.unwrap();
        assert!(step <= 3, "{step}");
        total += step;
    }
    assert_eq!(total, 10);
}

#[tokio::test]
async fn a_removed_devices_mail_goes_with_it_and_what_it_sent_stays() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    store.commit_group(&[to(&alice, &bob, "to bob"), to(&bob, &alice, "to alice")], &[], NOW).await.unwrap();
    let account = &bob.account;
    store.reset(bob.user, &account.identity, &super::fixture::new_device(), &super::fixture::grant(NOW)).await.unwrap();
    assert_eq!(inbox(&store, &bob, NOW).await, []);
    let alices = inbox(&store, &alice, NOW).await;
    assert_eq!(bodies(&alices), ["to alice"]);
    assert_eq!(alices[0].sender_device, bob.device);
}

#[tokio::test]
async fn a_key_has_an_outcome_for_the_device_that_used_it_and_for_no_other() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let sent = to(&alice, &bob, "once");
    assert!(!store.has_outcome(alice.no, sent.key).await.unwrap());
    store.commit_group(std::slice::from_ref(&sent), &[], NOW).await.unwrap();
    assert!(store.has_outcome(alice.no, sent.key).await.unwrap());
    assert!(!store.has_outcome(bob.no, sent.key).await.unwrap());
}

/// A plan is made once for each connection, and used whatever the tables have become since. Here it is made when the
/// statistics tell of an empty queue, in which so many messages have been.
async fn postgres_reads_what_it_needs_after(former: usize) {
    let store = TestStore::open_in_postgres().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let database = store.database().await;
    let sends = |count| (0..count).map(|_| to(&alice, &bob, "hello")).collect::<Vec<SendRequest>>();
    let ack = |envelope: &Envelope| (bob.no, envelope.position);
    store.commit_group(&sends(former), &[], NOW).await.unwrap();
    let acks: Vec<_> = inbox(&store, &bob, NOW).await.iter().map(ack).collect();
    store.commit_group(&[], &acks, NOW).await.unwrap();
    // A connection tells what it did when it ends.
    let connected = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name = 'obscura-server'";
    let ended = async || eventually("all connections to end", async || database.number(connected).await == 0).await;
    store.close().await;
    ended().await;
    database.execute("ANALYZE; SELECT pg_stat_reset()").await;

    let store = store.reopened().await;
    for _ in 0..30 {
        store.commit_group(&sends(10), &[], NOW).await.unwrap();
    }
    let mut after = START;
    for _ in 0..30 {
        let page = store.unsent(bob.no, after, NOW, 10, 1 << 30).await.unwrap();
        let acks: Vec<_> = page.envelopes.iter().map(ack).collect();
        after = acks.last().unwrap().1;
        store.commit_group(&[to(&bob, &alice, "thanks")], &acks[..5], NOW).await.unwrap();
        store.commit_group(&[], &acks[5..], NOW).await.unwrap();
    }
    store.close().await;
    ended().await;
    let of = "relname IN ('messages', 'sends', 'devices', 'account_locks')";
    let in_sequence = database.number(&format!("SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE {of}")).await;
    assert_eq!(in_sequence, 0, "rows that were read as a part of a whole table");
    let by_age =
        "SELECT sum(idx_scan) FROM pg_stat_user_indexes WHERE indexrelname IN ('messages_by_age', 'sends_to_review')";
    assert_eq!(database.number(by_age).await, 0, "whole indexes that were gone through");
    // Each of 300 messages is looked at once and deleted once; each of 330 sends has an account to lock and a device.
    let by_index = database.number(&format!("SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE {of}")).await;
    assert!((600..2_500).contains(&by_index), "{by_index} rows");
}

#[tokio::test]
async fn postgres_reads_no_more_than_it_needs_with_plans_that_were_made_for_a_new_queue() {
    postgres_reads_what_it_needs_after(0).await;
}

#[tokio::test]
async fn postgres_reads_no_more_than_it_needs_with_plans_that_were_made_for_a_queue_that_was_emptied() {
    postgres_reads_what_it_needs_after(500).await;
}

/// Only the correction of a clock changes a message, and so its place in the table.
#[tokio::test]
async fn a_message_that_is_acknowledged_while_its_time_is_corrected_is_deleted() {
    let store = TestStore::open_in_postgres().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let database = store.database().await;
    for sends in [vec![], vec![to(&bob, &alice, "thanks")]] {
        store.commit_group(&[to(&alice, &bob, "one"), to(&alice, &bob, "two")], &[], NOW).await.unwrap();
        let acks: Vec<_> = inbox(&store, &bob, NOW).await.iter().map(|envelope| (bob.no, envelope.position)).collect();
        let correction = format!("UPDATE messages SET received_at = received_at - 1 WHERE device_no = {}", bob.no.0);
        let held = database.hold(&correction).await;
        let is_committed = Cell::new(false);
        let release = async {
            let waiting = "SELECT count(*) FROM pg_stat_activity
                           WHERE datname = current_database() AND wait_event_type = 'Lock'";
            let waits = async || is_committed.get() || database.number(waiting).await > 0;
            eventually("the acks to wait for it", waits).await;
            held.release().await;
        };
        // It waits for a moment only, which may be over on a busy machine; then it is tried again, as sessions do.
        let commit_group = async {
            let result = Store::commit_group(&store, &sends, &acks, NOW).await;
            is_committed.set(true);
            result
        };
        let (result, ()) = tokio::join!(commit_group, release);
        if !result.unwrap().locked_devices.is_empty() {
            store.commit_group(&[], &acks, NOW).await.unwrap();
        }
        assert!(inbox(&store, &bob, NOW).await.is_empty());
    }
}

#[tokio::test]
async fn an_acked_message_that_another_session_holds_is_named_and_the_sends_beside_it_are_stored() {
    let store = TestStore::open_in_postgres().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    store.commit_group(&[to(&alice, &bob, "one"), to(&alice, &carol, "one")], &[], NOW).await.unwrap();
    let inbox =
        async |person: &Person| store.unsent(person.no, Position::default(), NOW, 10, 1 << 20).await.unwrap().envelopes;
    let acks = [(bob.no, inbox(&bob).await[0].position), (carol.no, inbox(&carol).await[0].position)];
    let database = store.database().await;
    let held = database.hold(&format!("SELECT 1 FROM messages WHERE device_no = {} FOR UPDATE", bob.no.0)).await;
    // Beside a send, and alone.
    for sends in [vec![to(&alice, &carol, "two")], Vec::new()] {
        let result = Store::commit_group(&store, &sends, &acks, NOW).await.unwrap();
        assert_eq!(result.locked_devices, [bob.no]);
        assert!(result.sent.iter().all(Option::is_some));
        assert_eq!(inbox(&carol).await.len(), 1, "her ack is written, and her mail is there");
    }
    held.release().await;
    store.commit_group(&[], &acks, NOW).await.unwrap();
    assert!(inbox(&bob).await.is_empty());
}
