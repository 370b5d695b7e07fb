//! Inboxes are counted only when that may change something, and a few at a time.

use obscura_server::store::{Limits, Store};

use super::*;

/// So many messages of one sender for each of these accounts.
async fn fill(store: &TestStore, sender: &Person, people: &[Person], messages: usize) {
    let to: Vec<(&Person, usize)> = people.iter().map(|person| (person, 1)).collect();
    let mails: Vec<SendRequest> = (0..messages).map(|_| send(sender, &to)).collect();
    for some in mails.chunks(64) {
        let mut rest = some.to_vec();
        // Whatever has to be counted for that.
        while !rest.is_empty() {
            let result = (**store).commit_group(&rest, &[], NOW).await.unwrap();
            let is_left = result.sent.iter().map(Option::is_none);
            rest = rest.into_iter().zip(is_left).filter(|(_, is_left)| *is_left).map(|(mail, _)| mail).collect();
        }
    }
}

async fn accounts(store: &TestStore, count: usize) -> Vec<Person> {
    let mut people = Vec::new();
    for _ in 0..count {
        people.push(store.account().await);
    }
    people
}

async fn commit_group_at(store: &Store, mail: &SendRequest) -> SendResult {
    let result = store.commit_group(std::slice::from_ref(mail), &[], NOW).await.unwrap();
    result.sent.into_iter().next().flatten().expect("a send that needs not wait")
}

#[tokio::test]
async fn a_repeat_is_accepted_as_soon_as_a_part_of_the_inbox_has_been_acknowledged() {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (32, 100)).await;
    let (alice, bob) = (store.account().await, store.account().await);
    fill(&store, &alice, std::slice::from_ref(&bob), 32).await;
    let more: Vec<SendRequest> = (0..4).map(|_| send(&alice, &[(&bob, 1)])).collect();
    for mail in more.iter().chain(&more) {
        assert_eq!(refused(&commit_group(&store, mail).await), [(bob.device, RefusalReason::Inbox)]);
    }
    let acks: Vec<_> = waiting(&store, &bob).await[..2].iter().map(|position| (bob.no, *position)).collect();
    store.commit_group(&[], &acks, NOW).await.unwrap();
    let before = store.counted();
    for mail in &more[..2] {
        assert!(refused(&commit_group(&store, mail).await).is_empty());
    }
    assert_eq!(store.counted() - before, 30, "once, for both of them");
    for mail in &more[2..] {
        assert_eq!(refused(&commit_group(&store, mail).await), [(bob.device, RefusalReason::Inbox)]);
    }
}

#[tokio::test]
async fn one_send_to_many_full_inboxes_is_judged_in_parts_and_holds_no_other_up() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    let people = accounts(&store, 40).await;
    fill(&store, &alice, &people, 501).await;
    let store = store.reopened().await;
    // What a group counts, and the last count of it.
    let most = match store.database().await {
        Database::Sqlite(_) => 8_000 + 8 * 1_000,
        Database::Postgres(_) => 32_000 + 32 * 1_000,
    };
    let to: Vec<(&Person, usize)> = people.iter().map(|person| (person, 1)).collect();
    commit_group(&store, &send(&bob, &[(&carol, 1)])).await;
    let (large, mut groups, mut total) = (send(&bob, &to), 0, 0);
    let sent = loop {
        groups += 1;
        let before = store.counted();
        let group = [large.clone(), send(&bob, &[(&carol, 1)])];
        let mut result = (*store).commit_group(&group, &[], NOW).await.unwrap().sent;
        let counted = store.counted() - before;
        assert!(counted <= most, "{counted}");
        total += counted;
        assert!(result.pop().unwrap().is_some_and(|sent| sent.outcome.refused.is_empty()), "it needs no count");
        if let Some(sent) = result.pop().unwrap() {
            break sent;
        }
    };
    assert!(refused(&sent).is_empty());
    assert!(groups <= 4, "{groups} groups");
    assert_eq!(total, 40 * 501, "each once");
    assert_eq!(waiting(&store, &carol).await.len(), 1 + groups);
    for person in &people {
        assert_eq!(waiting(&store, person).await.len(), 502, "it was queued once");
    }
}

#[tokio::test]
async fn a_group_that_fails_has_no_other_inboxes_counted_again() {
    let store = TestStore::open_with(|limits| limits.max_inbox_size = 8).await;
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    fill(&store, &alice, std::slice::from_ref(&bob), 5).await;
    let database = store.database().await;
    deny_messages_of_49_bytes(&database).await;
    let before = store.counted();
    assert!(store.commit_group(&[send(&alice, &[(&carol, 49)])], &[], NOW).await.is_err());
    assert!(refused(&commit_group(&store, &send(&carol, &[(&bob, 1)])).await).is_empty());
    assert_eq!(store.counted() - before, 0);
    // The inbox of the group itself is counted again.
    assert!(store.commit_group(&[send(&carol, &[(&bob, 49)])], &[], NOW).await.is_err());
    assert!(refused(&commit_group(&store, &send(&carol, &[(&bob, 1)])).await).is_empty());
    assert_eq!(store.counted() - before, 6);
}

#[tokio::test]
async fn refusals_at_one_node_make_no_other_one_count() {
    let half = |limits: &mut Limits| limits.max_inbox_size = 16;
    let store = TestStore::open_in_postgres_with(half).await;
    let beside = store.open_again().await.unwrap();
    let (alice, bob, carol) = (store.account().await, store.account().await, store.account().await);
    fill(&store, &alice, std::slice::from_ref(&bob), 9).await;
    assert!(refused(&commit_group_at(&beside, &send(&carol, &[(&bob, 1)])).await).is_empty());
    for _ in 0..5 {
        let sent = commit_group(&store, &send(&alice, &[(&bob, 1)])).await;
        assert_eq!(refused(&sent), [(bob.device, RefusalReason::Share)]);
    }
    let before = store.counted();
    assert!(refused(&commit_group_at(&beside, &send(&carol, &[(&bob, 1)])).await).is_empty());
    assert_eq!(store.counted() - before, 0);
    assert_eq!(waiting(&store, &bob).await.len(), 11);
}

/// What a node refuses without a count does not make it believe what another one has written.
#[tokio::test]
async fn an_inbox_takes_no_more_than_its_limit_though_another_node_fills_it_between_refusals() {
    let limits = |limits: &mut Limits| {
        (limits.max_inbox_size, limits.inbox_max_bytes, limits.sender_share_percent) = (8, 10_000, 100);
    };
    let store = TestStore::open_in_postgres_with(limits).await;
    let beside = store.open_again().await.unwrap();
    let (alice, bob) = (store.account().await, store.account().await);
    fill(&store, &alice, std::slice::from_ref(&bob), 6).await;
    let too_large = || send(&alice, &[(&bob, 9_999)]);
    assert_eq!(refused(&commit_group(&store, &too_large()).await), [(bob.device, RefusalReason::Inbox)]);
    for _ in 0..2 {
        assert!(refused(&commit_group_at(&beside, &send(&alice, &[(&bob, 1)])).await).is_empty());
        assert_eq!(refused(&commit_group(&store, &too_large()).await), [(bob.device, RefusalReason::Inbox)]);
    }
    assert_eq!(refused(&commit_group(&store, &send(&alice, &[(&bob, 1)])).await), [(bob.device, RefusalReason::Inbox)]);
    assert_eq!(waiting(&store, &bob).await.len(), 8);
}
