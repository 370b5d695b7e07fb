use std::net::{IpAddr, Ipv4Addr};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use proptest::prelude::*;

use super::*;

const SOON: Duration = Duration::from_secs(2);

fn config(total: u32) -> ResourceLimitConfig {
    ResourceLimitConfig { max_waiting: 8, ..ResourceLimitConfig::total(total) }
}

/// Client `host` of network `block`.
fn client(block: u8, host: u8) -> LimitSubject {
    LimitSubject::Address(IpAddr::V4(Ipv4Addr::new(192, 0, block, host)))
}

/// A request that waits in the queue from here on.
fn waiting(
    amount: &ResourceLimit,
    subject: LimitSubject,
    units: u32,
) -> BoxFuture<'static, Result<ResourcePermit, NoRoom>> {
    let amount = amount.clone();
    let mut request = async move { amount.take(subject, units, SOON).await }.boxed();
    assert!((&mut request).now_or_never().is_none(), "it waits");
    request
}

#[tokio::test(start_paused = true)]
async fn an_amount_is_shared_and_given_back() {
    let amount = ResourceLimit::new(config(4));
    let (mut first, mut second) = (amount.holder(client(0, 1)), amount.holder(client(0, 2)));
    first.grow_to(1, SOON).await.unwrap();
    first.grow_to(1, SOON).await.unwrap();
    first.grow_to(3, SOON).await.unwrap();
    second.grow_to(1, SOON).await.unwrap();
    assert_eq!(second.grow_to(2, SOON).await, Err(NoRoom));
    assert_eq!(amount.taken(), 4);
    drop(first);
    second.grow_to(4, SOON).await.unwrap();
    assert!(amount.try_take(client(0, 1), 1).is_none());
    second.shrink_to(1);
    assert!(amount.try_take(client(0, 1), 4).is_none());
    assert!(amount.try_take(client(0, 1), 3).is_some());
    drop(second);
    let state = amount.state();
    assert!((state.taken, state.held.len(), state.served.len()) == (0, 0, 0), "nothing is left behind");
}

#[test]
fn no_subject_has_more_than_its_share_and_neighbours_no_more_than_theirs() {
    let amount =
        ResourceLimit::new(ResourceLimitConfig { shares: vec![(Scope::Own, 2), (Scope::Block, 3)], ..config(100) });
    let held = amount.try_take(client(0, 1), 2).unwrap();
    assert!(amount.try_take(client(0, 1), 1).is_none());
    let _neighbour = amount.try_take(client(0, 2), 1).unwrap();
    assert!(amount.try_take(client(0, 3), 1).is_none());
    let _stranger = amount.try_take(client(1, 1), 2).unwrap();
    drop(held);
    assert!(amount.try_take(client(0, 3), 2).is_some());
    assert!(amount.try_take(LimitSubject::Exempt, 97).is_some(), "only the total counts");
}

#[test]
fn the_reserve_is_for_small_holders() {
    let amount = ResourceLimit::new(ResourceLimitConfig { reserve: 4, small: 2, ..config(10) });
    let _large = amount.try_take(client(0, 1), 6).unwrap();
    assert!(amount.try_take(client(0, 2), 3).is_none());
    let mut small = amount.try_take(client(0, 2), 2).unwrap();
    assert!(!small.try_grow(1), "it would be large");
    assert!(amount.try_take(client(0, 3), 2).is_some());
}

#[tokio::test(start_paused = true)]
async fn in_turn_a_large_request_is_not_overtaken_by_small_ones() {
    let amount = ResourceLimit::new(ResourceLimitConfig { in_turn: true, ..config(4) });
    let mut held: Vec<_> = (1..5).map(|host| amount.try_take(client(0, host), 1).unwrap()).collect();
    let large = waiting(&amount, client(1, 1), 3);
    let small = waiting(&amount, client(2, 1), 1);
    held.truncate(2);
    assert!(amount.try_take(client(3, 1), 1).is_none(), "what is free is kept for the one whose turn it is");
    held.truncate(1);
    let large = large.await.unwrap();
    assert_eq!(amount.taken(), 4);
    drop(held);
    let small = small.await.unwrap();
    assert_eq!((large.units(), small.units(), amount.taken()), (3, 1, 4));
}

#[tokio::test(start_paused = true)]
async fn in_turn_a_request_above_its_share_delays_only_those_with_whom_it_shares() {
    let amount = ResourceLimit::new(ResourceLimitConfig { in_turn: true, shares: vec![(Scope::Own, 3)], ..config(10) });
    let held = amount.try_take(client(0, 1), 2).unwrap();
    let large = waiting(&amount, client(0, 1), 3);
    assert!(amount.try_take(client(0, 1), 1).is_none(), "its own units are kept for it");
    let _other = amount.try_take(client(0, 2), 3).unwrap();
    drop(held);
    assert_eq!(large.await.unwrap().units(), 3);
}

#[tokio::test(start_paused = true)]
async fn in_turn_the_next_request_is_served_when_the_one_before_it_stops_waiting() {
    let amount = ResourceLimit::new(ResourceLimitConfig { in_turn: true, ..config(4) });
    let _held = amount.try_take(client(0, 1), 2).unwrap();
    let first = waiting(&amount, client(1, 1), 3);
    let mut second = waiting(&amount, client(0, 2), 2);
    drop(first);
    assert!((&mut second).now_or_never().is_some());
    let first = waiting(&amount, client(1, 1), 3);
    drop(second);
    let mut second = waiting(&amount, client(0, 2), 2);
    assert!(first.await.is_err(), "it waits for as long as it may");
    assert!((&mut second).now_or_never().is_some());
}

#[tokio::test(start_paused = true)]
async fn in_turn_a_request_above_the_share_of_its_payer_delays_no_neighbour() {
    let shares = vec![(Scope::Own, 3), (Scope::Block, 8)];
    let amount = ResourceLimit::new(ResourceLimitConfig { in_turn: true, shares, ..config(10) });
    let _held = amount.try_take(client(0, 1), 3).unwrap();
    let _waiting = waiting(&amount, client(0, 1), 2);
    assert!(amount.try_take(client(0, 2), 3).is_some(), "of the same network");
}

#[tokio::test(start_paused = true)]
async fn in_turn_a_request_that_has_stopped_waiting_delays_no_other() {
    let amount = ResourceLimit::new(ResourceLimitConfig { in_turn: true, ..config(4) });
    let _held = amount.try_take(client(0, 1), 2).unwrap();
    drop(waiting(&amount, client(1, 1), 3));
    assert!(amount.try_take(client(0, 2), 2).is_some());
}

#[tokio::test(start_paused = true)]
async fn networks_take_turns_however_many_requests_one_of_them_has() {
    let amount = ResourceLimit::new(ResourceLimitConfig { fairness: Scope::Block, ..config(1) });
    let held = amount.try_take(client(0, 1), 1).unwrap();
    let mut crowd = Vec::new();
    for host in 2..6 {
        crowd.push(waiting(&amount, client(0, host), 1));
    }
    drop(held);
    let first = crowd.remove(0).await.unwrap();
    let honest = waiting(&amount, client(1, 1), 1);
    drop(first);
    let served = honest.await.expect("it is served before the crowd, which was served already");
    drop(served);
    for one in crowd {
        one.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_drops_from_the_subject_that_waits_with_the_most() {
    let amount = ResourceLimit::new(ResourceLimitConfig { fairness: Scope::Block, max_waiting: 3, ..config(1) });
    let held = amount.try_take(client(0, 1), 1).unwrap();
    let mut crowd = Vec::new();
    for host in 2..5 {
        crowd.push(waiting(&amount, client(0, host), 1));
    }
    assert_eq!(amount.take(client(0, 9), 1, SOON).await.unwrap_err(), NoRoom);
    let honest = waiting(&amount, client(1, 1), 1);
    assert_eq!(crowd.pop().unwrap().await.unwrap_err(), NoRoom);
    drop(held);
    let first = crowd.remove(0).await.unwrap();
    drop(first);
    honest.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_no_longer_waits_takes_nothing() {
    let amount = ResourceLimit::new(config(1));
    let held = amount.try_take(client(0, 1), 1).unwrap();
    let given_up = waiting(&amount, client(0, 2), 1);
    let too_late = waiting(&amount, client(0, 3), 1);
    let patient = waiting(&amount, client(0, 4), 1);
    drop(given_up);
    drop(held);
    // What it was given before it stopped waiting goes on to the next.
    drop(too_late);
    drop(patient.await.unwrap());
    assert_eq!(amount.taken(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_be_had_is_not_waited_for() {
    let amount = ResourceLimit::new(ResourceLimitConfig { shares: vec![(Scope::Own, 2)], ..config(10) });
    let begun = tokio::time::Instant::now();
    assert_eq!(amount.take(client(0, 1), 3, SOON).await.unwrap_err(), NoRoom);
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is taken, grown, shrunk and dropped in whatever order: no bound is passed, and in the end all is free.
    #[test]
    fn no_bound_is_ever_passed(
        total in 1u32..40, reserve in 0u32..20, small in 0u32..6, own in 1u32..20, block in 1u32..30,
        steps in prop::collection::vec((0u8..3, 0u8..3, 0usize..12, 0u32..12), 1..200),
    ) {
        let shares = vec![(Scope::Own, own), (Scope::Block, block)];
        let amount = ResourceLimit::new(ResourceLimitConfig { shares, reserve, small, ..config(total) });
        let mut holders: Vec<Option<(u8, u8, ResourcePermit)>> = (0..12).map(|_| None).collect();
        for (network, host, index, units) in steps {
            match &mut holders[index] {
                Some((_, _, held)) if units % 3 == 0 => held.shrink_to(units),
                Some((_, _, held)) if units % 3 == 1 => { held.try_grow(units); }
                place @ Some(_) => *place = None,
                place @ None => *place = amount.try_take(client(network, host), units).map(|held| (network, host, held)),
            }
            let of = |pick: &dyn Fn(u8, u8) -> bool| -> u32 {
                holders.iter().flatten().filter(|(network, host, _)| pick(*network, *host)).map(|(_, _, held)| held.units).sum()
            };
            let large: u32 = holders.iter().flatten().map(|(_, _, held)| held.units).filter(|units| *units > small).sum();
            prop_assert_eq!(amount.taken(), of(&|_, _| true));
            prop_assert!(amount.taken() <= total);
            prop_assert!(large <= total.saturating_sub(reserve));
            for network in 0..3 {
                prop_assert!(of(&|one, _| one == network) <= block);
                for host in 0..3 {
                    prop_assert!(of(&|one, other| (one, other) == (network, host)) <= own);
                }
            }
        }
        holders.clear();
        let state = amount.state();
        prop_assert!(state.taken == 0 && state.held.is_empty());
    }
}
