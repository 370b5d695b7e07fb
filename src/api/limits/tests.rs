use std::time::Duration;

use axum::http::HeaderValue;
use proptest::prelude::*;

use super::*;

const RATES: config::RateLimits = config::RateLimits { per_second: 10, burst: 20, auth_per_second: 1, auth_burst: 3 };

fn limits(rates: &config::RateLimits) -> Limits {
    let networks = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.1/32"];
    Limits::new(rates, networks.iter().map(|network| network.parse().unwrap()).collect())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn retry_after(result: Result<(), ApiError>) -> u64 {
    match result {
        Err(ApiError::TooManyRequests { retry_after_secs, .. }) => retry_after_secs,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_there_at_first_and_a_token_comes_back_each_time() {
    let limits = limits(&RATES);
    let client = ip("192.0.2.1");
    for (tier, burst, rate) in [(Tier::Standard, 20, 10), (Tier::Auth, 3, 1)] {
        for _ in 0..burst {
            limits.check(tier, client).unwrap();
        }
        assert_eq!(retry_after(limits.check(tier, client)), if rate == 1 { 2 } else { 1 });
        for _ in 0..5 {
            tokio::time::advance(Duration::from_secs(1) / rate).await;
            limits.check(tier, client).unwrap();
            limits.check(tier, client).unwrap_err();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_rate_or_burst_of_zero_counts_as_one() {
    let limits = limits(&config::RateLimits { per_second: 0, burst: 0, auth_per_second: 0, auth_burst: 0 });
    for tier in [Tier::Standard, Tier::Auth] {
        limits.check(tier, ip("192.0.2.1")).unwrap();
        limits.check(tier, ip("192.0.2.1")).unwrap_err();
        tokio::time::advance(Duration::from_secs(1)).await;
        limits.check(tier, ip("192.0.2.1")).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn waiting_as_long_as_told_always_suffices(
        rate in 1u32..50, burst in 1u32..50, pauses in prop::collection::vec(0u64..3_000_000, 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let limits = limits(&config::RateLimits { per_second: rate, burst, ..RATES });
            let client = ip("192.0.2.1");
            for micros in pauses {
                tokio::time::advance(Duration::from_micros(micros)).await;
                let mut spent = 0;
                while limits.check(Tier::Standard, client).is_ok() {
                    spent += 1;
                }
                assert!(spent <= burst + 1);
                let wait = retry_after(limits.check(Tier::Standard, client));
                assert!(wait <= 2, "a token comes within a second");
                tokio::time::advance(Duration::from_secs(wait)).await;
                limits.check(Tier::Standard, client).unwrap();
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn the_tiers_and_the_clients_are_independent() {
    let limits = limits(&RATES);
    for _ in 0..3 {
        limits.check(Tier::Auth, ip("192.0.2.1")).unwrap();
    }
    limits.check(Tier::Auth, ip("192.0.2.1")).unwrap_err();
    limits.check(Tier::Standard, ip("192.0.2.1")).unwrap();
    limits.check(Tier::Auth, ip("192.0.2.2")).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_v6_network_is_one_client_and_a_mapped_address_is_a_v4_client() {
    let limits = limits(&RATES);
    for address in ["2001:db8::1", "2001:db8::2", "2001:db8::ffff:ffff:ffff:ffff"] {
        limits.check(Tier::Auth, ip(address)).unwrap();
    }
    limits.check(Tier::Auth, ip("2001:db8::abcd")).unwrap_err();
    limits.check(Tier::Auth, ip("2001:db8:0:1::1")).unwrap();

    for address in ["192.0.2.9", "::ffff:192.0.2.9", "::ffff:c000:209"] {
        limits.check(Tier::Auth, ip(address)).unwrap();
    }
    limits.check(Tier::Auth, ip("192.0.2.9")).unwrap_err();
    limits.check(Tier::Auth, ip("::ffff:192.0.2.10")).unwrap();
}

#[test]
fn the_address_is_the_rightmost_forwarded_one_that_no_proxy_has() {
    let limits = limits(&RATES);
    let client = |peer: &str, lines: &[&'static str]| {
        let lines = lines.iter().map(|line| ("x-forwarded-for".parse().unwrap(), HeaderValue::from_static(line)));
        limits.client_address(ip(peer), &lines.collect::<HeaderMap>()).to_string()
    };
    for (peer, lines, expected) in [
        ("203.0.113.7", &["198.51.100.1"][..], "203.0.113.7"),
        ("203.0.113.7", &[], "203.0.113.7"),
        ("10.0.0.1", &[], "10.0.0.1"),
        ("10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6, 198.51.100.1, 192.168.3.4,10.0.0.9"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6, 198.51.100.1", "10.0.0.9"], "198.51.100.1"),
        ("10.0.0.1", &["198.51.100.1, unknown, _hidden, , 10.0.0.9"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6, 198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6, [2001:db8::5]:4711"], "2001:db8::5"),
        ("10.0.0.1", &["6.6.6.6, [2001:db8::5]"], "2001:db8::5"),
        ("10.0.0.1", &["6.6.6.6, ::ffff:198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", &["192.168.1.1, 10.2.3.4"], "10.0.0.1"),
        ("10.0.0.1", &["nonsense"], "10.0.0.1"),
        ("127.0.0.1", &["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.2", &["198.51.100.1"], "127.0.0.2"),
    ] {
        assert_eq!(client(peer, lines), expected, "{peer} {lines:?}");
    }
}

#[test]
fn other_headers_and_bytes_that_are_no_text_are_not_believed() {
    let mut headers = HeaderMap::new();
    headers.insert("forwarded", HeaderValue::from_static("for=198.51.100.1"));
    headers.insert("x-real-ip", HeaderValue::from_static("198.51.100.1"));
    headers.insert("x-forwarded-for", HeaderValue::from_bytes(b"\xff\xfe, 198.51.100.2, \xff").unwrap());
    assert_eq!(limits(&RATES).client_address(ip("10.0.0.1"), &headers), ip("198.51.100.2"));
}

#[tokio::test(start_paused = true)]
async fn a_sweep_drops_the_full_buckets_and_keeps_the_others() {
    let limits = limits(&RATES);
    let auth = || limits.inner.auth.limiter.read().unwrap().len();
    for host in 0..1000u32 {
        limits.check(Tier::Auth, IpAddr::V4((0x0b00_0000 + host).into())).unwrap();
    }
    limits.sweep();
    assert_eq!(auth(), 1000);
    tokio::time::advance(Duration::from_millis(2500)).await;
    for _ in 0..3 {
        limits.check(Tier::Auth, ip("192.0.2.1")).unwrap();
    }
    limits.sweep();
    assert_eq!(auth(), 1);
    limits.check(Tier::Auth, ip("192.0.2.1")).unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn two_hundred_thousand_clients_are_not_all_remembered() {
    let limits = limits(&RATES);
    let mut most = 0;
    for host in 0..200_000u32 {
        limits.check(Tier::Standard, IpAddr::V6(Ipv6Addr::from_bits(u128::from(host) << 64))).unwrap();
        if host % 1000 == 0 {
            most = most.max(limits.inner.standard.limiter.read().unwrap().len());
        }
    }
    assert!((90_000..=MAX_BUCKETS + 1).contains(&most), "{most}");
}
