//! Attachments in the store: reservations, quota, expiry.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::clock::Timestamp;
use obscura_server::model::ids::{AttachmentId, UserId};
use obscura_server::store::{Allowance, AttachmentAge, Reservation, Reserved, Store, StoredAttachment};

use super::fixture::{NOW, TestStore};

const DAY: Duration = Duration::from_hours(24);
const SECOND: Duration = Duration::from_secs(1);
const NO_QUOTA: u64 = 0;
/// No upload counts less.
const BLOCK: u64 = 4096;

fn quota(quota_bytes: u64) -> Allowance {
    Allowance { quota_bytes, bytes_per_day: 0 }
}

async fn pending(store: &Store, at: Timestamp) -> AttachmentId {
    pending_of(store, at, 100).await
}

async fn pending_of(store: &Store, at: Timestamp, size: u64) -> AttachmentId {
    let id = AttachmentId::random();
    let reserved = store
        .reserve_attachment(Reservation {
            user: UserId::random(),
            id,
            size,
            now: at,
            born: at,
            allowance: quota(NO_QUOTA),
        })
        .await
        .unwrap();
    assert_eq!(reserved, Reserved::Yes);
    id
}

async fn stored(store: &Store, at: Timestamp) -> AttachmentId {
    let id = pending(store, at).await;
    assert!(store.attachment_stored(id).await.unwrap());
    id
}

async fn reserve(store: &Store, user: UserId, size: u64, bytes: u64) -> (AttachmentId, Reserved) {
    let id = AttachmentId::random();
    (
        id,
        store
            .reserve_attachment(Reservation { user, id, size, now: NOW, born: NOW, allowance: quota(bytes) })
            .await
            .unwrap(),
    )
}

/// What becomes of an upload of so many blocks of an account that may upload 1000 of them a day.
async fn upload(store: &Store, user: UserId, blocks: u64, at: Timestamp) -> Reserved {
    let size = blocks.saturating_mul(BLOCK);
    let allowance = Allowance { quota_bytes: NO_QUOTA, bytes_per_day: 1000 * BLOCK };
    store
        .reserve_attachment(Reservation { user, id: AttachmentId::random(), size, now: at, born: at, allowance })
        .await
        .unwrap()
}

fn ids(ages: &[AttachmentAge]) -> Vec<AttachmentId> {
    ages.iter().map(|age| age.id).collect()
}

#[tokio::test]
async fn an_attachment_is_there_once_it_is_stored() {
    let store = TestStore::open().await;
    let id = pending(&store, NOW).await;
    assert_eq!(store.attachment(id, NOW).await.unwrap(), None);
    assert!(store.attachment_stored(id).await.unwrap());
    assert_eq!(store.attachment(id, NOW).await.unwrap(), Some(StoredAttachment { size: 100 }));
    assert!(!store.attachment_stored(id).await.unwrap(), "only once");
    assert!(!store.attachment_stored(AttachmentId::random()).await.unwrap(), "never reserved");
}

#[tokio::test]
async fn an_attachment_ends_with_the_second_that_was_announced() {
    let store = TestStore::open_with(|limits| limits.retention = 3 * DAY).await;
    let began = NOW + Duration::from_millis(999);
    let id = stored(&store, began).await;
    let announced = Timestamp::from_seconds((began + 3 * DAY).seconds());
    assert!(store.attachment(id, announced - Duration::from_millis(1)).await.unwrap().is_some());
    assert!(store.attachment(id, announced).await.unwrap().is_none());
}

#[tokio::test]
async fn the_quota_counts_what_is_stored_and_what_is_under_way() {
    let store = TestStore::open().await;
    let user = UserId::random();
    let (first, reserved) = reserve(&store, user, 60 * BLOCK, 100 * BLOCK).await;
    assert_eq!(reserved, Reserved::Yes);
    assert_eq!(reserve(&store, user, 41 * BLOCK, 100 * BLOCK).await.1, Reserved::QuotaExceeded);
    assert!(store.attachment_stored(first).await.unwrap());
    assert_eq!(reserve(&store, user, 41 * BLOCK, 100 * BLOCK).await.1, Reserved::QuotaExceeded);
    assert_eq!(
        reserve(&store, UserId::random(), 100 * BLOCK, 100 * BLOCK).await.1,
        Reserved::Yes,
        "everybody has a quota of his own"
    );
    assert_eq!(reserve(&store, user, 40 * BLOCK, 100 * BLOCK).await.1, Reserved::Yes);
    assert_eq!(reserve(&store, user, BLOCK, 100 * BLOCK).await.1, Reserved::QuotaExceeded);
    store.delete_attachments(&[first]).await.unwrap();
    assert_eq!(reserve(&store, user, 60 * BLOCK, 100 * BLOCK).await.1, Reserved::Yes);
    assert_eq!(reserve(&store, user, u64::MAX, 100 * BLOCK).await.1, Reserved::QuotaExceeded);
    assert_eq!(reserve(&store, user, 1 << 40, NO_QUOTA).await.1, Reserved::Yes);
}

#[tokio::test]
async fn a_refused_reservation_leaves_nothing() {
    let store = TestStore::open().await;
    let (id, reserved) = reserve(&store, UserId::random(), 101 * BLOCK, 100 * BLOCK).await;
    assert_eq!(reserved, Reserved::QuotaExceeded);
    assert!(!store.attachment_stored(id).await.unwrap());
}

#[tokio::test]
async fn an_upload_counts_at_least_a_block_of_the_quota_and_of_the_day() {
    let store = TestStore::open().await;
    for allowance in [
        Allowance { quota_bytes: 20 * BLOCK, bytes_per_day: 0 },
        Allowance { quota_bytes: 0, bytes_per_day: 20 * BLOCK },
    ] {
        let user = UserId::random();
        let reserve = async |size| {
            let upload = Reservation { user, id: AttachmentId::random(), size, now: NOW, born: NOW, allowance };
            store.reserve_attachment(upload).await.unwrap()
        };
        for size in [1, 0, BLOCK - 1, BLOCK].into_iter().cycle().take(20) {
            assert_eq!(reserve(size).await, Reserved::Yes);
        }
        assert_ne!(reserve(1).await, Reserved::Yes);
    }
}

#[tokio::test]
async fn reservations_at_the_same_time_do_not_pass_the_quota_together() {
    let store = TestStore::open().await;
    let user = store.account().await.user;
    let reservations = join_all((0..30).map(|_| reserve(&store, user, 10 * BLOCK, 100 * BLOCK))).await;
    assert_eq!(reservations.iter().filter(|(_, reserved)| *reserved == Reserved::Yes).count(), 10);
}

#[tokio::test]
async fn an_account_may_upload_so_many_bytes_in_a_day() {
    let (store, user) = (TestStore::open().await, UserId::random());
    assert_eq!(upload(&store, user, 600, NOW).await, Reserved::Yes);
    assert_eq!(upload(&store, user, 400, NOW).await, Reserved::Yes);
    assert_eq!(upload(&store, user, 100, NOW).await, Reserved::TooMuchToday(DAY / 10));
    assert_eq!(upload(&store, UserId::random(), 100, NOW).await, Reserved::Yes, "everybody has a day of his own");
    let later = NOW + DAY / 10;
    assert_eq!(upload(&store, user, 100, later - SECOND).await, Reserved::TooMuchToday(SECOND));
    assert_eq!(upload(&store, user, 100, later).await, Reserved::Yes, "waiting as long as told suffices");
    assert_eq!(upload(&store, user, 1, later).await, Reserved::TooMuchToday(Duration::from_millis(86_400)));
    assert_eq!(upload(&store, user, 1000, later + DAY).await, Reserved::Yes);
}

#[tokio::test]
async fn an_upload_that_came_to_nothing_counts_against_the_day() {
    let (store, user, id) = (TestStore::open().await, UserId::random(), AttachmentId::random());
    let allowance = Allowance { quota_bytes: 1000 * BLOCK, bytes_per_day: 1000 * BLOCK };
    assert_eq!(
        store
            .reserve_attachment(Reservation { user, id, size: 1000 * BLOCK, now: NOW, born: NOW, allowance })
            .await
            .unwrap(),
        Reserved::Yes
    );
    store.delete_attachments(&[id]).await.unwrap();
    assert_eq!(upload(&store, user, 500, NOW).await, Reserved::TooMuchToday(DAY / 2));
}

#[tokio::test]
async fn one_attachment_larger_than_a_day_takes_the_whole_day() {
    let (store, user) = (TestStore::open().await, UserId::random());
    assert_eq!(upload(&store, user, u64::MAX, NOW).await, Reserved::Yes);
    assert_eq!(upload(&store, user, u64::MAX, NOW).await, Reserved::TooMuchToday(DAY));
}

#[tokio::test]
async fn uploads_at_the_same_time_do_not_pass_the_day_together() {
    let store = TestStore::open().await;
    let user = store.account().await.user;
    let uploads = join_all((0..30).map(|_| upload(&store, user, 100, NOW))).await;
    assert_eq!(uploads.iter().filter(|reserved| **reserved == Reserved::Yes).count(), 10);
}

#[tokio::test]
async fn uploads_that_begin_and_end_at_the_same_time_hear_each_of_its_own() {
    let store = TestStore::open().await;
    let (rich, poor) = (UserId::random(), UserId::random());
    let begun = join_all((0..20).map(|_| pending(&store, NOW))).await;
    let given_up = store.stale_reservations(NOW + SECOND, None, 20).await.unwrap();
    assert_eq!(given_up.len(), 20);
    let waiting = join_all((0..20).map(|_| pending(&store, NOW))).await;
    let completed = join_all(begun.iter().chain(&waiting).map(|id| store.attachment_stored(*id)));
    let of_rich = join_all((0..20).map(|_| reserve(&store, rich, 10, 1 << 20)));
    let of_poor = join_all((0..20).map(|_| upload(&store, poor, 501, NOW)));
    let (completed, of_rich, of_poor) = tokio::join!(completed, of_rich, of_poor);
    let completed: Vec<bool> = completed.into_iter().map(Result::unwrap).collect();
    assert_eq!(completed, [[false; 20], [true; 20]].concat());
    assert!(of_rich.iter().all(|(_, reserved)| *reserved == Reserved::Yes));
    assert_eq!(of_poor.iter().filter(|reserved| **reserved == Reserved::Yes).count(), 1);
    for (id, _) in of_rich {
        assert!(store.attachment_stored(id).await.unwrap());
        assert_eq!(store.attachment(id, NOW).await.unwrap(), Some(StoredAttachment { size: 10 }));
    }
}

#[tokio::test]
async fn what_counts_no_more_is_forgotten_in_steps() {
    let store = TestStore::open().await;
    for _ in 0..3 {
        upload(&store, UserId::random(), 500, NOW).await;
    }
    let user = UserId::random();
    upload(&store, user, 1000, NOW).await;
    let noon = NOW + DAY / 2;
    assert_eq!(store.expire_upload_debts(noon - SECOND, 10).await.unwrap(), 0);
    assert_eq!(store.expire_upload_debts(noon, 2).await.unwrap(), 2);
    assert_eq!(store.expire_upload_debts(noon, 2).await.unwrap(), 1);
    assert_eq!(upload(&store, user, 501, noon).await, Reserved::TooMuchToday(Duration::from_millis(86_400)));
}

/// By a clock that was forty days ahead.
#[tokio::test]
async fn beginnings_and_debts_in_the_future_count_as_now_and_as_nothing() {
    let store = TestStore::open_with(|limits| limits.retention = DAY).await;
    let ahead = NOW + 40 * DAY;
    let id = stored(&store, ahead).await;
    assert_eq!(store.correct_attachments(NOW, ahead, 10).await.unwrap(), 0, "the clock is in doubt");
    assert_eq!(store.correct_attachments(NOW, NOW, 10).await.unwrap(), 1);
    assert_eq!(store.expired_attachments(NOW + DAY, None, 10).await.unwrap(), [AttachmentAge { created_at: NOW, id }]);

    let user = UserId::random();
    assert_eq!(upload(&store, user, 1000, ahead).await, Reserved::Yes);
    assert_eq!(upload(&store, user, 900, NOW).await, Reserved::Yes);
    assert!(matches!(upload(&store, user, 200, NOW).await, Reserved::TooMuchToday(_)), "today still counts");
}

#[tokio::test]
async fn the_expired_ones_are_listed_from_the_oldest_on_in_steps() {
    let store = TestStore::open_with(|limits| limits.retention = DAY).await;
    let mut expected = Vec::new();
    for age in [DAY + 2 * SECOND, DAY + 2 * SECOND, DAY + 2 * SECOND, DAY + SECOND, DAY] {
        expected.push(AttachmentAge { created_at: NOW - age, id: stored(&store, NOW - age).await });
    }
    expected.sort();
    stored(&store, NOW - (DAY - SECOND)).await;

    let all = store.expired_attachments(NOW, None, 10).await.unwrap();
    assert_eq!(all, expected);
    let mut after = None;
    let mut steps = Vec::new();
    loop {
        let step = store.expired_attachments(NOW, after, 2).await.unwrap();
        let Some(last) = step.last() else { break };
        after = Some(*last);
        steps.push(step);
    }
    assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    assert_eq!(steps.concat(), expected);

    store.delete_attachments(&ids(&expected[..3])).await.unwrap();
    assert_eq!(store.expired_attachments(NOW, None, 10).await.unwrap(), expected[3..]);
}

#[tokio::test]
async fn a_reservation_that_was_given_up_can_not_become_an_attachment() {
    let store = TestStore::open().await;
    let (old, young) = (pending(&store, NOW - 2 * SECOND).await, pending(&store, NOW).await);
    let finished = stored(&store, NOW - 2 * SECOND).await;
    let stale = store.stale_reservations(NOW, None, 10).await.unwrap();
    assert_eq!(ids(&stale), [old]);
    assert!(!store.attachment_stored(old).await.unwrap());
    assert!(store.attachment_stored(young).await.unwrap());
    assert!(store.attachment(finished, NOW).await.unwrap().is_some());

    assert_eq!(store.stale_reservations(NOW, None, 10).await.unwrap(), stale, "until it is forgotten");
    assert_eq!(store.stale_reservations(NOW, stale.last().copied(), 10).await.unwrap(), []);
    store.delete_attachments(&[old]).await.unwrap();
    assert_eq!(store.stale_reservations(NOW, None, 10).await.unwrap(), []);
}

#[tokio::test]
async fn an_upload_has_as_long_as_its_bytes_take_before_it_is_given_up() {
    let store = TestStore::open().await;
    let began = NOW - Duration::from_secs(600);
    let small = pending(&store, began).await;
    // At 8000 bytes a second that is 1000 s.
    let large = pending_of(&store, began, 8_000_000).await;
    let overdue = async |at: Timestamp| ids(&store.overdue_reservations(at, 8000, None, 10).await.unwrap());
    assert_eq!(overdue(NOW).await, [small]);
    store.delete_attachments(&[small]).await.unwrap();
    assert_eq!(overdue(began + Duration::from_secs(1000)).await, []);
    assert_eq!(overdue(began + Duration::from_secs(1001)).await, [large]);
}

#[tokio::test]
async fn stale_reservations_come_oldest_first_and_no_more_than_asked_for() {
    let store = TestStore::open().await;
    let mut expected = Vec::new();
    for age in [3, 1, 2] {
        expected.insert(0, (age, pending(&store, NOW - age * SECOND).await));
    }
    expected.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
    let stale = store.stale_reservations(NOW, None, 2).await.unwrap();
    assert_eq!(ids(&stale), [expected[0].1, expected[1].1]);
    assert!(store.attachment_stored(expected[2].1).await.unwrap(), "not given up yet");
}

#[tokio::test]
async fn forgetting_nothing_and_unknown_ones_is_fine() {
    let store = TestStore::open().await;
    let kept = stored(&store, NOW).await;
    store.delete_attachments(&[]).await.unwrap();
    store.delete_attachments(&[AttachmentId::random()]).await.unwrap();
    assert!(store.attachment(kept, NOW).await.unwrap().is_some());
}
