//! Inboxes take what they can keep: limits, refusals, repeats that queue the rest, and what the receiver is told.

use std::time::Duration;

use obscura_server::model::ids::DeviceId;
use obscura_server::model::message::{RefusalReason, Replay, SendRequest, SendResult, Sender};
use obscura_server::store::{Limits, Notice};
use uuid::Uuid;

use super::fixture::{NOW, Person, TestStore};
use super::support::{acknowledge, deny_messages_of_49_bytes, send, waiting};
use crate::harness::{Database, eventually};

mod counting;

const HOUR: Duration = Duration::from_hours(1);

async fn commit_group(store: &TestStore, mail: &SendRequest) -> SendResult {
    store.commit_group(std::slice::from_ref(mail), &[], NOW).await.unwrap().remove(0)
}

fn refused(sent: &SendResult) -> Vec<(DeviceId, RefusalReason)> {
    sent.outcome.refused.iter().map(|refused| (refused.device, refused.reason)).collect()
}

fn counts(notice: Option<Notice>) -> Option<(i64, i64)> {
    notice.map(|notice| (notice.expired, notice.refused))
}

#[tokio::test]
async fn a_full_inbox_takes_nothing_new_and_keeps_what_it_has() {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (5, 100)).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    for _ in 0..5 {
        assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 1)])).await).is_empty());
    }
    let before = waiting(&store, &bob).await;
    let sent = commit_group(&store, &send(&carol, &[(&bob, 1), (&alice, 1)])).await;
    assert_eq!(refused(&sent), [(bob.device, RefusalReason::Inbox)]);
    assert!(sent.retry_after.is_some() && sent.replay.is_none());
    assert_eq!(waiting(&store, &bob).await, before);
    assert_eq!(waiting(&store, &alice).await.len(), 1, "another recipient of the same send is not held up");
    let store = store.reopened().await;
    assert_eq!(refused(&commit_group(&store, &send(&carol, &[(&bob, 1)])).await), [(bob.device, RefusalReason::Inbox)]);
}

#[tokio::test]
async fn bytes_fill_an_inbox_as_messages_do() {
    let store =
        TestStore::open_with(|limits| (limits.inbox_max_bytes, limits.sender_share_percent) = (1000, 100)).await;
    let (alice, bob) = (store.account().await, store.account().await);
    assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 900)])).await).is_empty());
    assert_eq!(
        refused(&commit_group(&store, &send(&alice, &[(&bob, 101)])).await),
        [(bob.device, RefusalReason::Inbox)]
    );
    assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 100)])).await).is_empty());
    assert_eq!(waiting(&store, &bob).await.len(), 2);
}

#[tokio::test]
async fn a_sender_has_its_share_only_above_half_and_own_devices_have_all() {
    let store = TestStore::open_with(|limits| limits.max_inbox_size = 8).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    for _ in 0..5 {
        assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 1)])).await).is_empty(), "up to more than half");
    }
    assert_eq!(refused(&commit_group(&store, &send(&alice, &[(&bob, 1)])).await), [(bob.device, RefusalReason::Share)]);
    for _ in 0..2 {
        assert!(
            refused(&commit_group(&store, &send(&carol, &[(&bob, 1)])).await).is_empty(),
            "another one has a share"
        );
    }
    assert_eq!(refused(&commit_group(&store, &send(&carol, &[(&bob, 1)])).await), [(bob.device, RefusalReason::Share)]);
    // Bob's other device.
    let own = || {
        let mail = send(&bob, &[(&bob, 1)]);
        SendRequest { sender: Sender { device: DeviceId::random(), ..mail.sender }, ..mail }
    };
    assert!(refused(&commit_group(&store, &own()).await).is_empty());
    assert_eq!(refused(&commit_group(&store, &own()).await), [(bob.device, RefusalReason::Inbox)]);
}

#[tokio::test]
async fn what_an_account_queues_for_its_own_devices_counts_in_its_day() {
    let store = TestStore::open_with(|limits| limits.sender_bytes_per_day = 6400).await;
    let bob = store.account().await;
    let own = || {
        let mail = send(&bob, &[(&bob, 100)]);
        SendRequest { sender: Sender { device: DeviceId::random(), ..mail.sender }, ..mail }
    };
    for _ in 0..64 {
        assert!(refused(&commit_group(&store, &own()).await).is_empty());
    }
    assert_eq!(refused(&commit_group(&store, &own()).await), [(bob.device, RefusalReason::Day)]);
}

#[tokio::test]
async fn an_account_queues_so_many_bytes_in_a_day_also_after_a_restart() {
    let store = TestStore::open_with(|limits| limits.sender_bytes_per_day = 6400).await;
    let (alice, bob) = (store.account().await, store.account().await);
    for _ in 0..64 {
        assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 100)])).await).is_empty());
    }
    let sent = commit_group(&store, &send(&alice, &[(&bob, 100)])).await;
    assert_eq!(refused(&sent), [(bob.device, RefusalReason::Day)]);
    assert!(sent.retry_after.unwrap() > Duration::from_mins(10), "a 64th of a day is more than that");
    assert!(refused(&commit_group(&store, &send(&bob, &[(&alice, 100)])).await).is_empty(), "it is the sender's day");
    let store = store.reopened().await;
    // A new process learns of the day when it has a 64th of it to write down.
    assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 100)])).await).is_empty());
    assert_eq!(refused(&commit_group(&store, &send(&alice, &[(&bob, 100)])).await), [(bob.device, RefusalReason::Day)]);
    assert_eq!(store.expire_send_debts(NOW, 100).await.unwrap(), 0);
    assert!(store.expire_send_debts(NOW + HOUR * 72, 100).await.unwrap() > 0);
}

#[tokio::test]
async fn a_repeat_queues_only_what_was_refused_also_after_a_restart() {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (2, 100)).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    for _ in 0..2 {
        commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    }
    let both = send(&alice, &[(&bob, 1), (&carol, 1)]);
    assert_eq!(refused(&commit_group(&store, &both).await), [(bob.device, RefusalReason::Inbox)]);
    let store = store.reopened().await;
    let repeated = commit_group(&store, &both).await;
    assert_eq!(
        (refused(&repeated), repeated.replay),
        (vec![(bob.device, RefusalReason::Inbox)], Some(Replay::SameBody))
    );
    acknowledge(&store, &bob).await;
    acknowledge(&store, &carol).await;
    let store = store.reopened().await;
    let other = SendRequest { digest: [2; 16], ..both.clone() };
    let mismatched = commit_group(&store, &other).await;
    assert_eq!(mismatched.replay, Some(Replay::OtherBody), "another body queues no rest");
    assert_eq!((refused(&mismatched).len(), waiting(&store, &bob).await.len()), (1, 0));
    for _ in 0..2 {
        assert!(refused(&commit_group(&store, &both).await).is_empty());
        assert_eq!(waiting(&store, &bob).await.len(), 1);
        assert_eq!(waiting(&store, &carol).await.len(), 0, "what was accepted is not queued again");
    }
    // Also when the outcome is past its age while the message waits.
    store.expire_sends(NOW + HOUR * 25, 100).await.unwrap();
    store.commit_group(std::slice::from_ref(&both), &[], NOW + HOUR * 25).await.unwrap();
    assert_eq!(waiting(&store, &bob).await.len(), 1);
}

#[tokio::test]
async fn a_mismatch_and_a_refusal_meet_in_one_send() {
    let store = TestStore::open_with(|limits| limits.max_inbox_size = 1).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    let mut mail = send(&alice, &[(&bob, 1), (&carol, 1)]);
    mail.recipients[1].submissions.clear();
    let sent = commit_group(&store, &mail).await;
    assert_eq!(sent.outcome.mismatches, [(carol.user, vec![carol.device])]);
    assert_eq!(refused(&sent), [(bob.device, RefusalReason::Inbox)]);
    acknowledge(&store, &bob).await;
    let store = store.reopened().await;
    let sent = commit_group(&store, &mail).await;
    assert_eq!(sent.outcome.mismatches, [(carol.user, vec![carol.device])]);
    assert_eq!((refused(&sent).len(), waiting(&store, &bob).await.len()), (0, 1));
}

#[tokio::test]
async fn only_the_recipient_that_gets_too_much_is_left_out() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    let mut mail = send(&alice, &[(&bob, 1), (&carol, 1)]);
    mail.recipients[0].throttled_for = Some(Duration::from_secs(3));
    let sent = commit_group(&store, &mail).await;
    assert_eq!(refused(&sent), [(bob.device, RefusalReason::Target)]);
    assert_eq!((sent.retry_after, waiting(&store, &carol).await.len()), (Some(Duration::from_secs(3)), 1));
    mail.recipients[0].throttled_for = None;
    assert!(refused(&commit_group(&store, &mail).await).is_empty());
    assert_eq!((waiting(&store, &bob).await.len(), waiting(&store, &carol).await.len()), (1, 1));
}

#[tokio::test]
async fn an_inbox_that_is_over_a_new_limit_keeps_everything() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    for _ in 0..10 {
        commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    }
    let store = store.reopened_with(|limits| limits.max_inbox_size = 3).await;
    assert_eq!(refused(&commit_group(&store, &send(&alice, &[(&bob, 1)])).await), [(bob.device, RefusalReason::Inbox)]);
    assert_eq!(waiting(&store, &bob).await.len(), 10);
}

#[tokio::test]
async fn a_notice_counts_each_refused_send_once_and_what_expired_until_it_is_acknowledged() {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (2, 100)).await;
    let (alice, bob) = (store.account().await, store.account().await);
    for _ in 0..2 {
        commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    }
    assert_eq!(store.notice(bob.no).await.unwrap(), None);
    let (one, other) = (send(&alice, &[(&bob, 1)]), send(&alice, &[(&bob, 1)]));
    for mail in [&one, &one, &other, &one] {
        commit_group(&store, mail).await;
    }
    assert_eq!(counts(store.notice(bob.no).await.unwrap()), Some((0, 2)));
    acknowledge(&store, &bob).await;
    let store = store.reopened().await;
    commit_group(&store, &one).await;
    let told = store.notice(bob.no).await.unwrap();
    assert_eq!(counts(told), Some((0, 1)), "a repeat that was queued takes its refusal back");
    let told = told.unwrap();
    assert_eq!(told.since.millis() % 3_600_000, 0);

    let later = NOW + HOUR * 24 * 31;
    assert_eq!(store.expire_messages(later, later, 100).await.unwrap().deleted, 1);
    assert_eq!(counts(store.notice(bob.no).await.unwrap()), Some((1, 1)));
    store.acknowledge_notice(bob.no, told, later).await.unwrap();
    assert_eq!(counts(store.notice(bob.no).await.unwrap()), Some((1, 0)), "what came after is still to be told");
    store.acknowledge_notice(bob.no, told, later).await.unwrap();
    assert_eq!(counts(store.notice(bob.no).await.unwrap()), Some((1, 0)), "an ack that comes again changes nothing");
    let rest = store.notice(bob.no).await.unwrap().unwrap();
    store.acknowledge_notice(bob.no, rest, later).await.unwrap();
    assert_eq!(store.notice(bob.no).await.unwrap(), None);
    assert_eq!(store.database().await.number("SELECT count(*) FROM inbox_notices").await, 0);
}

/// A store in which one message fills an inbox, with bob's inbox full.
async fn full_inbox() -> (TestStore, [Person; 3]) {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (1, 100)).await;
    let [alice, bob, carol] = [store.account().await, store.account().await, store.account().await];
    commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    (store, [alice, bob, carol])
}

async fn acknowledge_notice(store: &TestStore, person: &Person) {
    let told = store.notice(person.no).await.unwrap().expect("a notice");
    store.acknowledge_notice(person.no, told, NOW).await.unwrap();
}

/// Repeats a send until there is room for all of it.
async fn queue_the_rest(store: &TestStore, mail: &SendRequest) {
    eventually("room", async || refused(&commit_group(store, mail).await).is_empty()).await;
}

/// All of it within one hour.
#[tokio::test]
async fn a_repeat_does_not_take_the_refusal_of_another_sender_off_a_notice() {
    for is_reopened in [false, true] {
        let (mut store, [alice, bob, carol]) = full_inbox().await;
        let (first, second) = (send(&alice, &[(&bob, 1)]), send(&carol, &[(&bob, 1)]));
        commit_group(&store, &first).await;
        acknowledge_notice(&store, &bob).await;
        if is_reopened {
            store = store.reopened().await;
        }
        commit_group(&store, &second).await;
        acknowledge(&store, &bob).await;
        queue_the_rest(&store, &first).await;
        assert_eq!(counts(store.notice(bob.no).await.unwrap()), Some((0, 1)), "the other message was refused");
        acknowledge(&store, &bob).await;
        queue_the_rest(&store, &second).await;
        assert_eq!(store.notice(bob.no).await.unwrap(), None, "now both have arrived");
    }
}

#[tokio::test]
async fn a_send_that_was_repeated_in_parts_takes_only_its_own_refusals_off_notices() {
    let (store, [alice, bob, carol]) = full_inbox().await;
    commit_group(&store, &send(&alice, &[(&carol, 1)])).await;
    let (both, other) = (send(&alice, &[(&bob, 1), (&carol, 1)]), send(&carol, &[(&bob, 1)]));
    commit_group(&store, &both).await;
    acknowledge_notice(&store, &bob).await;
    commit_group(&store, &other).await;
    acknowledge(&store, &carol).await;
    let is_for_bob = async || refused(&commit_group(&store, &both).await) == [(bob.device, RefusalReason::Inbox)];
    eventually("room for carol", is_for_bob).await;
    assert_eq!(store.notice(carol.no).await.unwrap(), None);
    acknowledge(&store, &bob).await;
    queue_the_rest(&store, &both).await;
    assert_eq!(counts(store.notice(bob.no).await.unwrap()), Some((0, 1)), "the other message was refused");
}

#[tokio::test]
async fn a_notice_that_was_overtaken_by_repeats_takes_nothing_else_along_when_it_is_acknowledged() {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (2, 100)).await;
    let (alice, bob) = (store.account().await, store.account().await);
    let mails: Vec<SendRequest> = (0..6).map(|_| send(&alice, &[(&bob, 1)])).collect();
    for mail in &mails[..5] {
        commit_group(&store, mail).await;
    }
    let told = store.notice(bob.no).await.unwrap().unwrap();
    assert_eq!(counts(Some(told)), Some((0, 3)));
    acknowledge(&store, &bob).await;
    for mail in &mails[2..4] {
        queue_the_rest(&store, mail).await;
    }
    assert_eq!(refused(&commit_group(&store, &mails[5]).await).len(), 1);
    store.acknowledge_notice(bob.no, told, NOW).await.unwrap();
    let left = store.notice(bob.no).await.unwrap().expect("one that was refused after the notice is still to be told");
    assert!(left.refused >= 1);
    store.acknowledge_notice(bob.no, left, NOW).await.unwrap();
    assert_eq!(store.notice(bob.no).await.unwrap(), None);
}

#[tokio::test]
async fn two_stores_on_one_database_queue_the_rest_once() {
    let store = TestStore::open_in_postgres_with(|limits| limits.max_inbox_size = 1).await;
    let beside = store.open_again().await.unwrap();
    let (alice, bob) = (store.account().await, store.account().await);
    commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    let mail = send(&alice, &[(&bob, 1)]);
    assert_eq!(refused(&commit_group(&store, &mail).await).len(), 1);
    acknowledge(&store, &bob).await;
    let both = [mail.clone()];
    let (one, other) = tokio::join!(beside.commit_group(&both, &[], NOW), beside.commit_group(&both, &[], NOW));
    for sent in [one.unwrap(), other.unwrap()] {
        assert!(sent.sent[0].as_ref().is_some_and(|sent| sent.outcome.refused.is_empty()));
    }
    assert_eq!(waiting(&store, &bob).await.len(), 1);
}

#[tokio::test]
async fn a_day_is_charged_with_what_was_queued_and_not_with_groups_that_failed() {
    let store = TestStore::open_with(|limits| limits.sender_bytes_per_day = 6400).await;
    let (alice, bob) = (store.account().await, store.account().await);
    let database = store.database().await;
    deny_messages_of_49_bytes(&database).await;
    for number in 0..128 {
        let fails = [send(&alice, &[(&bob, 49)])];
        assert!(store.commit_group(&fails, &[], NOW).await.is_err());
        assert!(refused(&commit_group(&store, &send(&alice, &[(&bob, 50)])).await).is_empty(), "{number}");
    }
    assert_eq!(refused(&commit_group(&store, &send(&alice, &[(&bob, 50)])).await), [(bob.device, RefusalReason::Day)]);
}

/// A group has counted an inbox and is about to be committed when another one of the same node fails.
#[tokio::test]
async fn a_full_inbox_is_not_written_down_as_empty_when_another_group_fails() {
    let full = |limits: &mut Limits| (limits.max_inbox_size, limits.sender_share_percent) = (4, 100);
    let store = TestStore::open_in_postgres_with(full).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    for _ in 0..3 {
        commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
    }
    let store = store.reopened().await;
    let database = store.database().await;
    let gate = "
        CREATE TABLE opened (x integer);
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN LOOP
            PERFORM 1 FROM opened;
            EXIT WHEN FOUND;
            PERFORM pg_sleep(0.01);
        END LOOP; RETURN NEW; END $$;
        CREATE TRIGGER gate BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION wait()";
    database.execute(gate).await;
    let (to_bob, to_carol) = (send(&alice, &[(&bob, 1)]), [send(&alice, &[(&carol, 1)])]);
    let fails = async {
        let waits = "SELECT count(*) FROM pg_stat_activity \
                     WHERE datname = current_database() AND wait_event = 'PgSleep'";
        eventually("the first group to be written", async || database.number(waits).await > 0).await;
        let held = database.hold_account(Uuid::from_bytes(*carol.user.as_bytes())).await;
        (*store).commit_group(&to_carol, &[], NOW).await.unwrap();
        database.execute("INSERT INTO opened VALUES (1)").await;
        held.release().await;
    };
    let (filled, ()) = tokio::join!(commit_group(&store, &to_bob), fails);
    assert!(refused(&filled).is_empty());
    assert!(waiting(&store, &carol).await.is_empty(), "her account was held");
    assert_eq!(database.number("SELECT max(at_most) FROM account_locks").await, 4);
    assert_eq!(refused(&commit_group(&store, &send(&carol, &[(&bob, 1)])).await), [(bob.device, RefusalReason::Inbox)]);
}

#[tokio::test]
async fn bytes_that_a_former_version_did_not_count_are_counted_when_it_matters() {
    let store = TestStore::open_in_postgres_with(|limits| limits.inbox_max_bytes = 4 << 20).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    commit_group(&store, &send(&alice, &[(&bob, 3 << 20)])).await;
    // A node of a former version counts messages alone.
    let database = store.database().await;
    database.execute("UPDATE account_locks SET bytes_at_most = 0, bytes_of = 0").await;
    assert_eq!(
        refused(&commit_group(&store, &send(&carol, &[(&bob, 2 << 20)])).await),
        [(bob.device, RefusalReason::Inbox)]
    );
    assert!(refused(&commit_group(&store, &send(&carol, &[(&bob, 1 << 20)])).await).is_empty());
}
