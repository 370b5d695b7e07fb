//! Sessions in the store: refresh tokens, gateway tickets, and what ends them.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::clock::Timestamp;
use obscura_server::model::ids::{DeviceId, DeviceNo, IdempotencyKey, UserId};
use obscura_server::store::{NewTicket, REPEAT_WINDOW, Refresh, Refreshed, SessionGrant};

use super::fixture::{NOW, Person, TestStore, fcm, grant, new_device, public_key};

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
/// The second up to which these tests make access tokens void.
const REVOKED_UNTIL: i64 = NOW.seconds() + 900;

/// The wish to exchange the token of `session` for the one of the answer.
fn wish(session: &SessionGrant, key: Option<IdempotencyKey>) -> Refresh {
    let next = SessionGrant { secret_hash: rand::random(), ..*session };
    Refresh { secret_hash: session.secret_hash, key, next, revoked_until: REVOKED_UNTIL }
}

impl Person {
    fn session(&self) -> &SessionGrant {
        &self.account.session
    }
}

impl TestStore {
    /// Exchanges the token of `session`, which has to work, and gives the next one.
    async fn rotated(&self, session: &SessionGrant, now: Timestamp) -> SessionGrant {
        let wish = wish(session, None);
        let refreshed = self.refresh(&wish, now).await.unwrap();
        assert!(matches!(refreshed, Refreshed::Rotated(_)), "{refreshed:?}");
        wish.next
    }

    async fn try_refresh(&self, session: &SessionGrant, key: Option<IdempotencyKey>, now: Timestamp) -> Refreshed {
        self.refresh(&wish(session, key), now).await.unwrap()
    }

    async fn ticket(&self, no: DeviceNo, expires_at: Timestamp) -> [u8; 32] {
        let hash = rand::random();
        assert!(
            self.issue_ticket(NewTicket { hash, device: no, token_expires_at: REVOKED_UNTIL + 1, expires_at })
                .await
                .unwrap()
        );
        hash
    }
}

#[tokio::test]
async fn a_log_in_replaces_the_session_of_the_device() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let second = grant(NOW);
    let holder = store.log_in(alice.user, alice.device, &second).await.unwrap().unwrap();
    assert_eq!((holder.user, holder.device, holder.no), (alice.user, alice.device, alice.no));
    assert_eq!(store.try_refresh(alice.session(), None, NOW).await, Refreshed::Refused);
    store.rotated(&second, NOW).await;
}

#[tokio::test]
async fn a_log_in_voids_the_tokens_and_tickets_of_before_and_keeps_the_push_token() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    assert!(store.set_push_target(alice.no, i64::MAX, &fcm("token")).await.unwrap());
    let tickets = [store.ticket(alice.no, NOW + SECOND).await, store.ticket(bob.no, NOW + SECOND).await];
    let mut epoch = 0;
    for _ in 0..3 {
        let holder = store.log_in(alice.user, alice.device, &grant(NOW)).await.unwrap().unwrap();
        let device_auth = store.device_auth(alice.device).await.unwrap().unwrap();
        assert_eq!(holder.tokens_revoked_until, device_auth.tokens_revoked_until);
        assert!(
            device_auth.tokens_revoked_until >= alice.session().access_expires_at
                && device_auth.tokens_revoked_until > epoch
        );
        epoch = device_auth.tokens_revoked_until;
    }
    assert_eq!(store.redeem_ticket(&tickets[0], NOW).await.unwrap(), None);
    assert!(store.redeem_ticket(&tickets[1], NOW).await.unwrap().is_some(), "others go on");
    assert_eq!(store.device_auth(bob.device).await.unwrap().unwrap().tokens_revoked_until, 0);
    assert_eq!(store.database().await.number("SELECT count(*) FROM push_tokens").await, 1);
}

#[tokio::test]
async fn a_refused_log_in_changes_nothing() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let ticket = store.ticket(alice.no, NOW + SECOND).await;
    assert_eq!(store.log_in(bob.user, alice.device, &grant(NOW)).await.unwrap(), None);
    assert_eq!(store.device_auth(alice.device).await.unwrap().unwrap().tokens_revoked_until, 0);
    assert!(store.redeem_ticket(&ticket, NOW).await.unwrap().is_some());
}

#[tokio::test]
async fn only_a_device_of_the_account_can_be_logged_in() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    for device in [bob.device, DeviceId::random()] {
        assert_eq!(store.log_in(alice.user, device, &grant(NOW)).await.unwrap(), None);
    }
    assert_eq!(store.log_in(UserId::random(), alice.device, &grant(NOW)).await.unwrap(), None);
    store.rotated(alice.session(), NOW).await;
    store.rotated(bob.session(), NOW).await;
}

#[tokio::test]
async fn a_refresh_replaces_the_token_and_gives_it_a_new_lifetime() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let first_end = alice.session().expires_at;
    let mut wish = wish(alice.session(), None);
    wish.next.expires_at = first_end + SECOND;
    let refreshed = store.refresh(&wish, first_end - MILLISECOND).await.unwrap();
    let Refreshed::Rotated(holder) = refreshed else { panic!("{refreshed:?}") };
    assert_eq!((holder.user, holder.device, holder.no), (alice.user, alice.device, alice.no));
    store.rotated(&wish.next, first_end + SECOND - MILLISECOND).await;
}

#[tokio::test]
async fn a_token_is_dead_from_the_moment_of_its_expiry() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let end = alice.session().expires_at;
    let next = store.rotated(alice.session(), NOW).await;
    assert_eq!(store.try_refresh(&next, None, end).await, Refreshed::Refused);
    assert_eq!(store.try_refresh(alice.session(), None, end).await, Refreshed::Refused, "nothing is left to be stolen");
    store.rotated(&next, end - MILLISECOND).await;
}

#[tokio::test]
async fn unknown_tokens_are_refused_and_end_nothing() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    assert_eq!(store.try_refresh(&grant(NOW), None, NOW).await, Refreshed::Refused);
    store.rotated(alice.session(), NOW).await;
}

#[tokio::test]
async fn a_used_token_is_refused_for_ten_seconds_and_then_counts_as_stolen() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let next = store.rotated(alice.session(), NOW).await;
    for key in [None, Some(IdempotencyKey::random())] {
        let soon = NOW + Duration::from_secs(10) - MILLISECOND;
        assert_eq!(store.try_refresh(alice.session(), key, soon).await, Refreshed::Refused);
    }
    assert_eq!(store.epoch(alice.no).await.unwrap(), Some(0), "nothing else has happened");

    let later = NOW + Duration::from_secs(10);
    assert_eq!(store.try_refresh(alice.session(), None, later).await, Refreshed::Stolen(alice.address()));
    assert_eq!(store.try_refresh(&next, None, later).await, Refreshed::Refused, "the session has ended");
    assert_eq!(store.epoch(alice.no).await.unwrap(), Some(REVOKED_UNTIL));
    assert!(store.device_auth(alice.device).await.unwrap().is_some(), "the device stays");
    store.rotated(bob.session(), later).await;
}

#[tokio::test]
async fn the_successor_of_a_used_token_works_on() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let second = store.rotated(alice.session(), NOW).await;
    assert_eq!(store.try_refresh(alice.session(), None, NOW + SECOND).await, Refreshed::Refused);
    let third = store.rotated(&second, NOW + SECOND).await;
    assert_eq!(store.try_refresh(&second, None, NOW + SECOND).await, Refreshed::Refused);
    store.rotated(&third, NOW + SECOND).await;
}

#[tokio::test]
async fn a_token_of_long_ago_counts_as_stolen_though_its_use_is_forgotten() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let next = store.rotated(alice.session(), NOW).await;
    assert_eq!(store.expire_refresh_uses(NOW, 10).await.unwrap(), 1);
    let later = NOW + REPEAT_WINDOW;
    assert_eq!(store.try_refresh(alice.session(), None, later).await, Refreshed::Stolen(alice.address()));
    assert_eq!(store.try_refresh(&next, None, later).await, Refreshed::Refused);
}

#[tokio::test]
async fn the_same_wish_is_repeated_for_a_minute() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let (wish, other_key) = (wish(alice.session(), Some(IdempotencyKey::random())), Some(IdempotencyKey::random()));
    let Refreshed::Rotated(holder) = store.refresh(&wish, NOW).await.unwrap() else { panic!("the token is good") };

    let repeated =
        |current: &SessionGrant| Refreshed::Repeated { holder, used_at: NOW, secret_hash: current.secret_hash };
    assert_eq!(store.refresh(&wish, NOW).await.unwrap(), repeated(&wish.next));
    assert_eq!(store.try_refresh(alice.session(), other_key, NOW + SECOND).await, Refreshed::Refused, "another wish");
    assert_eq!(store.try_refresh(alice.session(), None, NOW + SECOND).await, Refreshed::Refused, "no wish at all");
    let third = store.rotated(&wish.next, NOW + SECOND).await;
    assert_eq!(store.refresh(&wish, NOW + REPEAT_WINDOW - MILLISECOND).await.unwrap(), repeated(&third));
    let late = store.refresh(&wish, NOW + REPEAT_WINDOW).await.unwrap();
    assert_eq!(late, Refreshed::Stolen(alice.address()));
}

#[tokio::test]
async fn a_used_token_under_another_key_counts_as_stolen_after_ten_seconds() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let first = wish(alice.session(), Some(IdempotencyKey::random()));
    store.refresh(&first, NOW).await.unwrap();
    let other = store.try_refresh(alice.session(), Some(IdempotencyKey::random()), NOW + 10 * SECOND).await;
    assert_eq!(other, Refreshed::Stolen(alice.address()));
    assert_eq!(store.refresh(&first, NOW + 10 * SECOND).await.unwrap(), Refreshed::Refused, "nothing is repeated now");
}

#[tokio::test]
async fn of_many_refreshes_at_once_one_succeeds() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let answers = join_all((0..8).map(|_| store.try_refresh(alice.session(), None, NOW))).await;
    assert_eq!(answers.iter().filter(|answer| matches!(answer, Refreshed::Rotated(_))).count(), 1);
    assert_eq!(answers.iter().filter(|answer| **answer == Refreshed::Refused).count(), 7);
}

#[tokio::test]
async fn a_log_out_ends_the_session_and_leaves_the_device() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    for person in [&alice, &bob] {
        assert!(store.set_push_target(person.no, i64::MAX, &fcm("token")).await.unwrap());
    }
    let (ticket, bobs_ticket) = (store.ticket(alice.no, NOW + SECOND).await, store.ticket(bob.no, NOW + SECOND).await);
    store.log_out(alice.no, REVOKED_UNTIL).await.unwrap();

    assert_eq!(store.try_refresh(alice.session(), None, NOW).await, Refreshed::Refused);
    assert_eq!(store.redeem_ticket(&ticket, NOW).await.unwrap(), None);
    let device_auth = store.device_auth(alice.device).await.unwrap().unwrap();
    assert_eq!(device_auth.tokens_revoked_until, REVOKED_UNTIL);
    let counts = store.prekey_counts(alice.no).await.unwrap().unwrap();
    assert_eq!(counts.ec, 2, "the keys stay");
    let database = store.database().await;
    assert_eq!(database.number("SELECT device_no FROM push_tokens").await, bob.no.0);

    assert!(store.redeem_ticket(&bobs_ticket, NOW).await.unwrap().is_some());
    store.rotated(bob.session(), NOW).await;
    let again = grant(NOW);
    let holder = store.log_in(alice.user, alice.device, &again).await.unwrap().unwrap();
    assert_eq!(holder.tokens_revoked_until, REVOKED_UNTIL + 1, "who issues the next access token has to know");
    store.rotated(&again, NOW).await;
}

#[tokio::test]
async fn every_log_out_begins_a_new_epoch() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    for (revoked_until, expected) in [
        (REVOKED_UNTIL, REVOKED_UNTIL),
        (REVOKED_UNTIL, REVOKED_UNTIL + 1),
        (REVOKED_UNTIL - 900, REVOKED_UNTIL + 2),
        (REVOKED_UNTIL + 9, REVOKED_UNTIL + 9),
    ] {
        store.log_out(alice.no, revoked_until).await.unwrap();
        assert_eq!(store.epoch(alice.no).await.unwrap(), Some(expected));
    }
}

#[tokio::test]
async fn tickets_that_are_asked_for_and_used_at_once_are_each_good_for_their_device_and_once() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let owners: Vec<_> = [alice.no, bob.no].into_iter().cycle().take(20).collect();
    let tickets = join_all(owners.iter().map(|no| store.ticket(*no, NOW + SECOND))).await;
    // Each is presented twice.
    let presented = tickets.iter().chain(&tickets).map(|ticket| store.redeem_ticket(ticket, NOW));
    let answers: Vec<_> = join_all(presented).await.into_iter().map(Result::unwrap).collect();
    let (first, again) = answers.split_at(tickets.len());
    for ((one, other), owner) in first.iter().zip(again).zip(owners) {
        let holders: Vec<_> = one.iter().chain(other).map(|holder| holder.no).collect();
        assert_eq!(holders, [owner]);
    }
}

#[tokio::test]
async fn a_ticket_is_good_once_and_until_it_expires() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let end = NOW + 30 * SECOND;
    let (first, second) = (store.ticket(alice.no, end).await, store.ticket(alice.no, end).await);
    let holder = store.redeem_ticket(&first, end - MILLISECOND).await.unwrap().unwrap();
    assert_eq!(
        (holder.user, holder.device, holder.no, holder.tokens_revoked_until),
        (alice.user, alice.device, alice.no, 0)
    );
    assert_eq!(store.redeem_ticket(&first, NOW).await.unwrap(), None, "used");
    assert_eq!(store.redeem_ticket(&second, end).await.unwrap(), None, "expired");
    assert_eq!(store.redeem_ticket(&second, NOW).await.unwrap(), None, "used up by the vain attempt");
    assert_eq!(store.redeem_ticket(&[0; 32], NOW).await.unwrap(), None, "unknown");
}

#[tokio::test]
async fn of_many_handshakes_with_one_ticket_one_succeeds() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let ticket = store.ticket(alice.no, NOW + SECOND).await;
    let answers = join_all((0..8).map(|_| store.redeem_ticket(&ticket, NOW))).await;
    assert_eq!(answers.into_iter().filter(|answer| matches!(answer, Ok(Some(_)))).count(), 1);
}

#[tokio::test]
async fn no_ticket_is_issued_for_a_void_token_or_a_device_that_is_gone() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let issue = async |token_expires_at| {
        let (device, expires_at) = (alice.no, NOW + SECOND);
        store.issue_ticket(NewTicket { hash: rand::random(), device, token_expires_at, expires_at }).await.unwrap()
    };
    assert!(issue(1).await);
    store.log_out(alice.no, REVOKED_UNTIL).await.unwrap();
    assert!(!issue(REVOKED_UNTIL).await, "its call came in just before the log-out");
    assert!(issue(REVOKED_UNTIL + 1).await);
    store.reset(alice.user, &public_key(9), &new_device(), &grant(NOW)).await.unwrap();
    assert!(!issue(REVOKED_UNTIL + 1).await);
}

#[tokio::test]
async fn the_sweeps_forget_what_has_expired_a_batch_at_a_time() {
    let store = TestStore::open().await;
    let people = [store.account().await, store.account().await, store.account().await];
    let end = people[0].session().expires_at;
    let far = end + Duration::from_hours(24);
    let alive = SessionGrant { expires_at: end + SECOND, ..grant(NOW) };
    store.log_in(people[2].user, people[2].device, &alive).await.unwrap();
    assert_eq!(store.expire_sessions(end - MILLISECOND, far, 10).await.unwrap(), 0);
    assert_eq!(store.expire_sessions(end, far, 1).await.unwrap(), 1);
    assert_eq!(store.expire_sessions(end, far, 10).await.unwrap(), 1);
    store.rotated(&alive, end).await;

    let no = people[0].no;
    for expires_at in [NOW, NOW, NOW + SECOND] {
        store.ticket(no, expires_at).await;
    }
    assert_eq!(store.expire_tickets(NOW, 1).await.unwrap(), 1);
    assert_eq!(store.expire_tickets(NOW, 10).await.unwrap(), 1);
    assert_eq!(store.expire_tickets(NOW + SECOND, 10).await.unwrap(), 1);

    assert_eq!(store.expire_refresh_uses(end - MILLISECOND, 10).await.unwrap(), 0);
    assert_eq!(store.expire_refresh_uses(end, 10).await.unwrap(), 1);
}

#[tokio::test]
async fn the_end_of_a_session_voids_every_token_ever_issued_though_the_clock_or_the_lifetime_have_changed() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let issued_long_ago = SessionGrant { access_expires_at: REVOKED_UNTIL + 86_400, ..grant(NOW) };
    store.log_in(alice.user, alice.device, &issued_long_ago).await.unwrap();
    store.log_in(alice.user, alice.device, &grant(NOW)).await.unwrap();
    let epoch = store.epoch(alice.no).await.unwrap();
    assert_eq!(epoch, Some(REVOKED_UNTIL + 86_401), "a log-in ends the session before it");
    store.log_out(alice.no, REVOKED_UNTIL).await.unwrap();
    assert_eq!(
        store.epoch(alice.no).await.unwrap(),
        Some(REVOKED_UNTIL + 86_402),
        "past the token that the log-in gave"
    );
}

#[tokio::test]
async fn a_session_is_held_by_the_device_whose_current_refresh_token_it_is() {
    let (store, now) = (TestStore::open().await, NOW);
    let alice = store.account().await;
    let session = alice.account.session;
    let holder = async |family, secret, now| store.session_holder(&family, &secret, now).await.unwrap();
    let held = holder(session.family, session.secret_hash, now).await.unwrap();
    assert_eq!((held.user, held.device, held.no), (alice.user, alice.device, alice.no));
    assert_eq!(holder(session.family, [7; 32], now).await, None, "another secret");
    assert_eq!(holder([7; 16], session.secret_hash, now).await, None, "another family");
    assert_eq!(holder(session.family, session.secret_hash, session.expires_at).await, None, "expired");
    store.log_out(alice.no, 0).await.unwrap();
    assert_eq!(holder(session.family, session.secret_hash, now).await, None, "logged out");
}

#[tokio::test]
async fn when_the_last_tokens_of_a_device_expired_is_forgotten_a_day_later() {
    const DAY: Duration = Duration::from_hours(24);
    let store = TestStore::open().await;
    let people = [store.account().await, store.account().await, store.account().await];
    let gone = &people[0];
    store.log_out(gone.no, REVOKED_UNTIL).await.unwrap();
    let database = store.database().await;
    let kept = "SELECT count(*) FROM devices WHERE tokens_void_to <> 0 OR tokens_issued_to <> 0";
    let end = gone.session().access_expires_at.max(REVOKED_UNTIL);
    let at = Timestamp::from_seconds(end) + DAY;
    // Two devices at a time, the last one by itself.
    let walk = async |now| {
        let next = store.clear_expired_revocations(DeviceNo(0), now, 2).await.unwrap();
        assert_eq!(next, Some(people[1].no));
        assert_eq!(store.clear_expired_revocations(people[1].no, now, 2).await.unwrap(), None);
    };
    walk(at - SECOND * 3600).await;
    assert_eq!(database.number(kept).await, 3, "less than a day");
    walk(at).await;
    assert_eq!(database.number(kept).await, 0);
    assert_eq!(store.epoch(gone.no).await.unwrap(), Some(0));

    let again = grant(at);
    store.log_in(gone.user, gone.device, &again).await.unwrap();
    store.rotated(&again, at).await;
    walk(at).await;
    assert_eq!(database.number(kept).await, 1, "tokens of today");
    database.close().await;
}
