use std::net::{IpAddr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::model::ids::UserId;

fn account() -> LimitSubject {
    LimitSubject::Account(UserId::random())
}

fn address(text: &str) -> LimitSubject {
    LimitSubject::Address(text.parse().unwrap())
}

fn per_second(rate: u32, burst: u32) -> RateLimit {
    RateLimit::new(Refusal::AccountLimit).with(Scope::Own, Quota::per_second(rate, burst))
}

fn taken(rate: &RateLimit, subject: LimitSubject) -> u32 {
    (0..1000).map(|_| u32::from(rate.take(subject).is_ok())).sum()
}

#[tokio::test(start_paused = true)]
async fn a_subject_has_a_burst_at_first_and_waiting_as_long_as_stated_suffices() {
    let rate = per_second(10, 20);
    let (busy, quiet) = (account(), account());
    assert_eq!(taken(&rate, busy), 20);
    rate.take(quiet).unwrap();
    for _ in 0..50 {
        let RateLimited(wait, _) = rate.take(busy).unwrap_err();
        assert!(wait <= Duration::from_millis(100), "{wait:?}");
        tokio::time::advance(wait.max(Duration::from_millis(1))).await;
        rate.take(busy).unwrap();
    }
    tokio::time::advance(Duration::from_hours(1)).await;
    assert_eq!(taken(&rate, busy), 20);
}

#[test]
fn a_rate_of_zero_is_no_limit_and_a_burst_of_zero_is_one() {
    assert_eq!(taken(&per_second(0, 5), account()), 1000);
    assert_eq!(taken(&per_second(1, 0), account()), 1);
    assert_eq!(taken(&RateLimit::new(Refusal::AccountLimit), account()), 1000);
}

#[tokio::test(start_paused = true)]
async fn a_client_above_its_own_limit_takes_nothing_from_its_neighbours() {
    let rate = per_second(1, 3).with(Scope::Block, Quota::per_second(1, 5));
    assert_eq!(taken(&rate, address("192.0.2.1")), 3);
    assert_eq!(taken(&rate, address("192.0.2.2")), 2);
    assert_eq!(taken(&rate, address("192.0.3.1")), 3);
    assert_eq!(taken(&rate, address("2001:db8::1")), 3);
    assert_eq!(taken(&rate, address("2001:db8:0:1::1")), 2);
    // Refused by the neighbours' limit, it has kept its own tokens.
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(taken(&rate, address("192.0.2.9")), 3);
}

#[test]
fn the_total_counts_for_all_payers() {
    let rate = per_second(1, 3).with(Scope::All, Quota::per_hour(4));
    assert_eq!((taken(&rate, account()), taken(&rate, account()), taken(&rate, account())), (3, 1, 0));
}

/// In a map with a bound, enough other subjects would push an empty bucket out, and so fill it.
#[tokio::test(start_paused = true)]
async fn many_other_payers_neither_fill_an_empty_bucket_nor_take_anything_from_others() {
    let rate = per_second(1, 200);
    let (empty, quiet) = (account(), account());
    assert_eq!(taken(&rate, empty), 200);
    for host in 0..5 * CELLS as u128 {
        let neighbour = LimitSubject::Address(IpAddr::V6(Ipv6Addr::from_bits(host << 64)));
        rate.take(neighbour).unwrap();
    }
    rate.take(empty).unwrap_err();
    rate.take(quiet).unwrap();
}

/// A flood from many subjects takes cells from others in one row or the other, hardly ever in both.
#[test]
fn a_thousand_flooding_payers_leave_others_alone() {
    let rate = per_second(10, 20);
    for _ in 0..1000 {
        assert!(taken(&rate, account()) <= 40, "at most what two cells have");
    }
    let refused = (0..10_000).filter(|_| rate.take(account()).is_err()).count();
    assert!(refused <= 50, "{refused} of 10 000");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn waiting_always_suffices_and_no_more_is_given_than_the_rate(
        rate in 1u32..50, burst in 1u32..50, pauses in prop::collection::vec(0u64..3_000_000, 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let (limit, client, opened) = (per_second(rate, burst), address("192.0.2.1"), Instant::now());
            let mut all = 0;
            for micros in pauses {
                tokio::time::advance(Duration::from_micros(micros)).await;
                let spent = taken(&limit, client);
                assert!(spent <= burst + 1);
                let RateLimited(wait, _) = limit.take(client).unwrap_err();
                assert!(wait <= Duration::from_secs(1), "a token comes within a second");
                tokio::time::advance(wait + Duration::from_millis(1)).await;
                limit.take(client).unwrap();
                all += spent + 1;
            }
            let earned = opened.elapsed().as_secs_f64() * f64::from(rate);
            assert!(f64::from(all) <= f64::from(burst) + earned + 1.0, "{all} of {burst} and {earned}");
        });
    }
}
