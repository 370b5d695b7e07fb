use std::path::Path;

use axum::http::HeaderValue;

use super::*;
use crate::config::Config;

fn server() -> Server {
    Config::embedded(Path::new("unused")).unwrap().server
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn the_address_is_the_rightmost_forwarded_one_that_no_proxy_has() {
    let server = server();
    let client = |peer: &str, lines: &[&'static str]| {
        let lines = lines.iter().map(|line| (FORWARDED_FOR.parse().unwrap(), HeaderValue::from_static(line)));
        client_address(&server, ip(peer), &lines.collect::<HeaderMap>()).to_string()
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
        ("10.0.0.1", &["6.6.6.6, 198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", &["6.6.6.6, [2001:db8::5]:4711"], "2001:db8::5"),
        ("10.0.0.1", &["6.6.6.6, [2001:db8::5]"], "2001:db8::5"),
        ("10.0.0.1", &["6.6.6.6, ::ffff:198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", &["192.168.1.1, 10.2.3.4"], "10.0.0.1"),
        ("127.0.0.1", &["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.2", &["198.51.100.1"], "127.0.0.2"),
        // A proxy on this machine that connects over IPv6.
        ("::1", &["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", &["198.51.100.1, ::1"], "198.51.100.1"),
    ] {
        assert_eq!(client(peer, lines), expected, "{peer} {lines:?}");
    }
}

#[test]
fn an_item_that_is_no_address_ends_the_reading() {
    let server = server();
    for (line, expected) in [
        ("203.0.113.9, unix:", "10.0.0.1"),
        ("203.0.113.9, unknown", "10.0.0.1"),
        ("203.0.113.9, ", "10.0.0.1"),
        ("", "10.0.0.1"),
        ("203.0.113.9, unix:, 10.0.0.9", "10.0.0.9"),
        ("203.0.113.9, unix:, 192.168.0.1, 10.0.0.9", "192.168.0.1"),
        ("198.51.100.1, unknown, _hidden, , 10.0.0.9", "10.0.0.9"),
        ("unix:, 203.0.113.9", "203.0.113.9"),
        ("nonsense", "10.0.0.1"),
    ] {
        let headers = HeaderMap::from_iter([(FORWARDED_FOR.parse().unwrap(), HeaderValue::from_static(line))]);
        assert_eq!(client_address(&server, ip("10.0.0.1"), &headers), ip(expected), "{line}");
    }
    // On a line of its own as well.
    let lines = ["203.0.113.9", "unix:"].map(|line| (FORWARDED_FOR.parse().unwrap(), HeaderValue::from_static(line)));
    assert_eq!(client_address(&server, ip("10.0.0.1"), &HeaderMap::from_iter(lines)), ip("10.0.0.1"));
}

#[test]
fn other_headers_and_bytes_that_are_no_text_are_not_believed() {
    let mut headers = HeaderMap::new();
    headers.insert("forwarded", HeaderValue::from_static("for=198.51.100.1"));
    headers.insert("x-real-ip", HeaderValue::from_static("198.51.100.1"));
    assert_eq!(client_address(&server(), ip("10.0.0.1"), &headers), ip("10.0.0.1"));
    headers.insert(FORWARDED_FOR, HeaderValue::from_bytes(b"198.51.100.2, \xff, 10.0.0.9").unwrap());
    assert_eq!(client_address(&server(), ip("10.0.0.1"), &headers), ip("10.0.0.9"));
}

#[test]
fn only_addresses_that_a_proxy_of_the_operator_may_have_are_told_of() {
    for (address, expected) in [
        ("127.0.0.2", true),
        ("10.1.2.3", true),
        ("169.254.0.1", true),
        ("::1", true),
        ("fd00::1", true),
        ("fe80::1", true),
        ("203.0.113.7", false),
        ("2001:db8::1", false),
    ] {
        assert_eq!(is_local(ip(address)), expected, "{address}");
    }
}
