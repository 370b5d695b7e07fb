//! Which endpoints are called. A client names them, and must not be able to make this server call its own
//! neighbours: only https, only public addresses, and every address of a name has to be one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::push::providers::names::Names;

/// Which addresses may be called.
#[derive(Clone)]
pub(super) struct Allowed {
    names: Names,
    /// Called though they are not public.
    networks: Vec<IpNet>,
}

/// An endpoint that may be called, unless its name leads somewhere else.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) url: Url,
    /// Scheme, host and port.
    pub(super) origin: String,
}

#[derive(Debug, thiserror::Error)]
#[error("the name leads to an address that is not public")]
struct NotPublic;

impl Allowed {
    pub(super) fn new(networks: Vec<IpNet>, names: Names) -> Self {
        Self { names, networks }
    }

    /// Reads an endpoint; `None` if it may not be called.
    pub(super) fn endpoint(&self, text: &str) -> Option<Endpoint> {
        let url = Url::parse(text).ok()?;
        let is_plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        if url.scheme() != "https" || !is_plain {
            return None;
        }
        let host = url.host_str()?;
        // A name is looked at when it is resolved. An address never is.
        let may_be_called = match host.trim_matches(['[', ']']).parse() {
            Ok(address) => self.has(address),
            Err(_) => true,
        };
        may_be_called.then(|| Endpoint { origin: url.origin().ascii_serialization(), url })
    }

    fn has(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        is_public(address) || self.networks.iter().any(|network| network.contains(&address))
    }

    async fn resolve(&self, name: &str) -> Result<Addrs, Box<dyn std::error::Error + Send + Sync>> {
        let found = self.names.addresses(name).await?;
        if found.iter().all(|address| self.has(*address)) {
            // The connection is made to one of these and to nothing else.
            Ok(Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0))))
        } else {
            Err(NotPublic.into())
        }
    }
}

impl Resolve for Allowed {
    fn resolve(&self, name: Name) -> Resolving {
        let allowed = self.clone();
        Box::pin(async move { Self::resolve(&allowed, name.as_str()).await })
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

/// <https://www.iana.org/assignments/iana-ipv4-special-registry>
fn is_public_v4(address: Ipv4Addr) -> bool {
    !matches!(
        address.octets(),
        [0 | 10 | 127 | 224.., ..]
            | [100, 64..=127, ..]
            | [169, 254, ..]
            | [172, 16..=31, ..]
            | [192, 0, 0 | 2, _]
            | [192, 88, 99, _]
            | [192, 168, ..]
            | [198, 18 | 19, ..]
            | [198, 51, 100, _]
            | [203, 0, 113, _]
    )
}

/// <https://www.iana.org/assignments/iana-ipv6-special-registry>
fn is_public_v6(address: Ipv6Addr) -> bool {
    match address.segments() {
        // A network translates these to IPv4.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
            is_public_v4(Ipv4Addr::new(a, b, c, d))
        }
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x2002, ..] | [0x3fff, 0..=0xfff, ..] => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_to_public_addresses_is_called() {
        let allowed = Allowed::new(Vec::new(), Names::of_the_system());
        for good in
            ["https://push.example/a?b=c", "https://8.8.8.8/x", "https://[2606:4700::1111]:8443/", "https://a:444"]
        {
            assert!(allowed.endpoint(good).is_some(), "{good}");
        }
        for bad in [
            "http://push.example/",
            "ftp://push.example/",
            "https://user:password@push.example/",
            "https://push.example/#part",
            "https://",
            "push.example",
            "https://127.0.0.1/",
            "https://0x7f000001/",
            "https://2130706433/",
            "https://127.1/",
            "https://10.1.2.3/",
            "https://172.31.0.1/",
            "https://192.168.0.1/",
            "https://169.254.169.254/latest/meta-data",
            "https://100.64.0.1/",
            "https://0.0.0.0/",
            "https://255.255.255.255/",
            "https://[::1]/",
            "https://[::]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://[fe80::1]/",
            "https://[fd00::1]/",
            "https://[2002:7f00:1::]/",
            "https://[2001:db8::1]/",
        ] {
            assert!(allowed.endpoint(bad).is_none(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_name_is_called_only_if_all_its_addresses_may_be() {
        assert!(Allowed::new(Vec::new(), Names::of_the_system()).resolve("localhost").await.is_err());
        let loopback = ["127.0.0.0/8", "::1/128"].map(|network| network.parse().unwrap()).to_vec();
        assert!(Allowed::new(loopback, Names::of_the_system()).resolve("localhost").await.is_ok());
    }

    #[test]
    fn a_network_may_be_allowed() {
        let allowed = Allowed::new(vec!["10.1.0.0/16".parse().unwrap()], Names::of_the_system());
        assert!(allowed.endpoint("https://10.1.2.3/").is_some() && allowed.endpoint("https://10.2.2.3/").is_none());
    }
}
