use super::*;

const ADDRESSES: config::RateLimits =
    config::RateLimits { per_second: 10, burst: 20, auth_per_second: 1, auth_burst: 3 };
const ACCOUNTS: config::AccountRates = config::AccountRates {
    per_second: 10,
    burst: 20,
    target_per_second: 5,
    target_burst: 40,
    bundles_per_hour: 6,
    one_time_prekeys_per_hour: 10,
    one_time_prekeys_burst: 15,
};
const HOUR: Duration = Duration::from_hours(1);
/// Bytes.
const LARGEST_GUEST_BODY: usize = 512 << 10;

fn limits() -> Limits {
    Limits::new(&ADDRESSES, &ACCOUNTS, LARGEST_GUEST_BODY)
}

fn address(text: &str) -> LimitSubject {
    LimitSubject::Address(text.parse().unwrap())
}

fn taken(mut take: impl FnMut() -> Result<(), RateLimited>) -> u32 {
    (0..3000).map(|_| u32::from(take().is_ok())).sum()
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_there_at_first_and_a_token_comes_back_each_time() {
    let (limits, client) = (limits(), address("192.0.2.1"));
    for (tier, burst, rate) in [(Tier::Standard, 20, 10), (Tier::Auth, 3, 1), (Tier::Open, 1000, 100)] {
        assert_eq!(taken(|| limits.address(tier, client)), burst);
        assert_eq!(limits.address(tier, client).unwrap_err().0, Duration::from_secs(1) / rate);
        for _ in 0..5 {
            tokio::time::advance(Duration::from_secs(1) / rate).await;
            limits.address(tier, client).unwrap();
            limits.address(tier, client).unwrap_err();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_rate_or_burst_of_zero_counts_as_one() {
    let none = config::RateLimits { per_second: 0, burst: 0, auth_per_second: 0, auth_burst: 0 };
    let (limits, client) = (Limits::new(&none, &ACCOUNTS, LARGEST_GUEST_BODY), address("192.0.2.1"));
    for tier in [Tier::Standard, Tier::Auth] {
        limits.address(tier, client).unwrap();
        limits.address(tier, client).unwrap_err();
        tokio::time::advance(Duration::from_secs(1)).await;
        limits.address(tier, client).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_tiers_and_the_clients_are_independent() {
    let limits = limits();
    assert_eq!(taken(|| limits.address(Tier::Auth, address("192.0.2.1"))), 3);
    limits.address(Tier::Standard, address("192.0.2.1")).unwrap();
    limits.address(Tier::Open, address("192.0.2.1")).unwrap();
    limits.address(Tier::Auth, address("192.0.2.2")).unwrap();
    limits.address(Tier::Auth, address("::ffff:192.0.2.1")).unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn neighbouring_v6_networks_share_twenty_times_what_one_of_them_has() {
    let limits = limits();
    let networks = (0..100).map(|network| address(&format!("2001:db8:0:{network:x}::1")));
    assert_eq!(networks.map(|network| taken(|| limits.address(Tier::Auth, network))).sum::<u32>(), 60);
    limits.address(Tier::Auth, address("2001:db8:1::1")).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_flood_at_one_account_is_slowed_and_others_still_reach_it() {
    let limits = limits();
    let (victim, friend) = (UserId::random(), UserId::random());
    let flooders: Vec<_> = (0..10).map(|_| UserId::random()).collect();
    let flood = || flooders.iter().map(|flooder| taken(|| limits.send(*flooder, victim))).sum::<u32>();
    assert_eq!(flood(), 40 + 10 * TRICKLE_BURST);
    limits.send(friend, victim).unwrap();
    limits.send(flooders[0], friend).unwrap();
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!((5..=5 + 10).contains(&flood()), "what comes back in a second");
}

#[tokio::test(start_paused = true)]
async fn an_asker_gets_so_many_bundles_of_an_account_in_an_hour() {
    let limits = limits();
    let (asker, target) = (UserId::random(), UserId::random());
    assert_eq!(taken(|| limits.bundles(asker, target)), 6);
    assert_eq!(limits.bundles(asker, target), Err(RateLimited(HOUR / 6, Refusal::BundleLimit)));
    limits.bundles(asker, UserId::random()).unwrap();
    limits.bundles(target, asker).unwrap();
    tokio::time::advance(HOUR / 6).await;
    assert_eq!(taken(|| limits.bundles(asker, target)), 1);
}

#[tokio::test(start_paused = true)]
async fn all_askers_share_the_one_time_prekeys_of_an_account() {
    let (limits, target) = (limits(), UserId::random());
    let spent = || (0..100).filter(|_| limits.may_spend_one_time_prekeys(UserId::random(), target)).count();
    assert_eq!(spent(), 15);
    tokio::time::advance(HOUR).await;
    assert_eq!(spent(), 10);
    assert!(limits.may_spend_one_time_prekeys(UserId::random(), UserId::random()));
}

#[test]
fn an_account_is_not_kept_from_its_own_devices() {
    let (limits, own) = (limits(), UserId::random());
    assert_eq!((taken(|| limits.send(own, own)), taken(|| limits.bundles(own, own))), (3000, 3000));
}

#[tokio::test(start_paused = true)]
async fn an_account_spends_as_many_of_its_own_one_time_prekeys_as_all_others_together() {
    let (limits, own) = (limits(), UserId::random());
    let spent = || (0..100).filter(|_| limits.may_spend_one_time_prekeys(own, own)).count();
    assert_eq!(spent(), 15);
    tokio::time::advance(HOUR).await;
    assert_eq!(spent(), 10);
    assert!(limits.may_spend_one_time_prekeys(UserId::random(), own));
}

#[tokio::test(start_paused = true)]
async fn an_account_replaces_so_many_signed_prekeys_in_an_hour() {
    let (limits, account) = (limits(), UserId::random());
    (0..1000).for_each(|_| limits.refill(account).unwrap().refund());
    let replaced = || (0..1000).filter_map(|_| limits.refill(account).ok()).count();
    assert_eq!(replaced(), REFILLS_AT_ONCE as usize);
    tokio::time::advance(HOUR).await;
    assert_eq!(replaced(), REFILLS_PER_HOUR as usize);
    assert!(limits.refill(UserId::random()).is_ok());
}

#[test]
fn an_account_rate_of_zero_is_no_limit() {
    let off = config::AccountRates {
        per_second: 0,
        target_per_second: 0,
        bundles_per_hour: 0,
        one_time_prekeys_per_hour: 0,
        ..ACCOUNTS
    };
    let (limits, one, other) = (Limits::new(&ADDRESSES, &off, LARGEST_GUEST_BODY), UserId::random(), UserId::random());
    assert_eq!(taken(|| limits.request(one)), 3000);
    assert_eq!(taken(|| limits.send(one, other)), 3000);
    assert_eq!(taken(|| limits.bundles(one, other)), 3000);
    assert!((0..100).all(|_| limits.may_spend_one_time_prekeys(one, other)));
}

/// Holders of bodies that grow to `kib`, one after another from as many subjects as it takes, until there is no more room.
fn hoard(limits: &Limits, kib: u32, mut subject: impl FnMut(u32) -> LimitSubject) -> Vec<ResourcePermit> {
    (0..100_000).map_while(|number| limits.bodies(subject(number)).try_take(subject(number), kib)).collect()
}

#[test]
fn one_address_holds_one_large_body_and_its_neighbours_get_theirs() {
    let limits = limits();
    let hoard = hoard(&limits, kib(LARGEST_GUEST_BODY), |_| address("192.0.2.1"));
    assert_eq!(hoard.len(), 1);
    let other = address("192.0.2.2");
    assert!(limits.bodies(other).try_take(other, kib(LARGEST_GUEST_BODY)).is_some());
}

#[test]
fn whatever_guests_hold_small_bodies_and_accounts_have_room() {
    let limits = limits();
    let v4 = |number: u32| LimitSubject::Address(std::net::Ipv4Addr::from_bits(number).into());
    let hoard = hoard(&limits, kib(LARGEST_GUEST_BODY), v4);
    assert_eq!(hoard.len(), 96, "48 MiB");
    let (guest, account) = (address("192.0.2.1"), LimitSubject::Account(UserId::random()));
    assert!(limits.bodies(guest).try_take(guest, SMALL_BODY_KIB).is_some());
    assert!(limits.bodies(account).try_take(account, 2 << 10).is_some());
}

#[test]
fn whatever_accounts_hold_small_bodies_have_room() {
    let limits = limits();
    let hoard = hoard(&limits, 2 << 10, |_| LimitSubject::Account(UserId::random()));
    assert_eq!(hoard.len(), 24, "48 MiB");
    let account = LimitSubject::Account(UserId::random());
    assert!(limits.bodies(account).try_take(account, SMALL_BODY_KIB).is_some());
}

/// With an account alone as subject, three of them hold all the room there is for large bodies.
#[test]
fn many_accounts_at_one_address_or_in_one_network_leave_room_for_others() {
    let limits = limits();
    let at = |host: u8| LimitSubject::AccountAt(UserId::random(), std::net::Ipv4Addr::new(192, 0, 2, host).into());
    let of_address = hoard(&limits, 2 << 10, |_| at(1));
    assert_eq!(of_address.len(), 8, "16 MiB");
    let of_network = hoard(&limits, 2 << 10, |number| at(2 + number as u8));
    assert_eq!(of_address.len() + of_network.len(), 16, "32 MiB");
    let stranger = LimitSubject::AccountAt(UserId::random(), std::net::Ipv4Addr::new(192, 0, 3, 1).into());
    assert!(limits.bodies(stranger).try_take(stranger, 2 << 10).is_some());
}
