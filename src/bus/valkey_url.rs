//! Where Valkey is, from the URL of the options. Several hosts are the nodes of a cluster: a message published on one of
//! them reaches the subscribers of all, so one connection, to whichever answers, is enough.

use redis::io::tcp::TcpSettings;
use redis::{ConnectionInfo, IntoConnectionInfo, ProtocolVersion};

use crate::bus::BusError;

const OPEN: [&str; 4] = ["redis", "valkey", "redis-cluster", "valkey-cluster"];
const OVER_TLS: [&str; 4] = ["rediss", "valkeys", "rediss-cluster", "valkeys-cluster"];

/// The hosts of the URL, each with the same user, password and encryption. No error repeats the URL.
pub fn parse_servers(url: &str) -> Result<Vec<ConnectionInfo>, BusError> {
    let (scheme, rest) = url.split_once("://").ok_or(BusError::Url("it has no scheme"))?;
    let scheme = match scheme {
        open if OPEN.contains(&open) => "redis",
        tls if OVER_TLS.contains(&tls) => "rediss",
        _ => return Err(BusError::Url("its scheme is not known")),
    };
    if rest.contains('#') {
        return Err(BusError::Url("nothing may follow a #, and certificates are always checked"));
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    if user.matches('@').count() > 1 {
        return Err(BusError::Url("it has more than one @; user and password stand once, before the first host"));
    }
    hosts.split(',').map(|host| parse_server(&format!("{scheme}://{user}{}{path}", host.trim()))).collect()
}

fn parse_server(url: &str) -> Result<ConnectionInfo, BusError> {
    // The library's own sentence is left out, because it might repeat the password.
    let info = url.into_connection_info().map_err(|_| BusError::Url("a host, a port or what follows is not right"))?;
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    // A signal is small and should not wait for company.
    let tcp = TcpSettings::default().set_nodelay(true);
    Ok(info.set_redis_settings(settings).set_tcp_settings(tcp))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(url: &str) -> Vec<String> {
        parse_servers(url).unwrap().iter().map(|server| server.addr().to_string()).collect()
    }

    #[test]
    fn one_host_and_several_are_understood_with_and_without_tls() {
        assert_eq!(addresses("redis://valkey"), ["valkey:6379"]);
        assert_eq!(addresses("valkeys://u:p@valkey:7000/2"), ["valkey:7000"]);
        for scheme in
            ["redis", "valkey", "redis-cluster", "valkey-cluster", "rediss", "rediss-cluster", "valkeys-cluster"]
        {
            assert_eq!(addresses(&format!("{scheme}://:p@a:1,b:2, [::1]:3")), ["a:1", "b:2", "::1:3"]);
        }
        let is_encrypted =
            |url: &str| matches!(parse_servers(url).unwrap()[0].addr(), redis::ConnectionAddr::TcpTls { .. });
        assert!(is_encrypted("rediss-cluster://a,b") && is_encrypted("valkeys://a") && !is_encrypted("redis://a"));
    }

    #[test]
    fn user_and_password_are_those_of_every_host() {
        for server in parse_servers("redis-cluster://us%40er:p%2Fw,x@a:1,b").unwrap() {
            assert_eq!(server.redis_settings().username(), Some("us@er"));
            assert_eq!(server.redis_settings().password(), Some("p/w,x"));
            assert_eq!(server.redis_settings().protocol(), ProtocolVersion::RESP3);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_without_repeating_it() {
        for url in [
            "redis://:hunter2@a:1,",
            "redis://:hunter2@",
            "redis://:hunter2@host:port",
            "redis://:hunter2@host/first",
            "rediss://:hunter2@host#insecure",
            "redis://:hunter2@a,:hunter2@b",
            "redis://:hunter2@0.0.0.0",
            "http://:hunter2@host",
            "hunter2",
        ] {
            let sentence = parse_servers(url).unwrap_err().to_string();
            assert!(sentence.starts_with("--pubsub-url: ") && !sentence.contains("hunter2"), "{url}: {sentence}");
        }
    }
}
