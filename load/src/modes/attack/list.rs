//! Every attack, by name.

use super::attacker::{Attacker, Strike};
use super::witness::Witness;
use super::{accounts, bodies, connections, frames, inbox, keys, pipelines, push};

/// One attack.
pub struct Attack {
    /// On the command line.
    pub name: &'static str,
    /// In the table.
    pub what: &'static str,
    /// What the attacker does.
    pub strike: fn(Attacker) -> Strike,
    /// Who is looked at beside the ten clients.
    pub witness: Witness,
    /// How much of one answer the attacker may get.
    pub limit: Option<Limit>,
    /// The server's resolver never answers.
    pub is_without_dns: bool,
}

/// The most answers of one status that the limits of the server allow an attacker.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub status: u16,
    pub burst: f64,
    pub per_second: f64,
}

impl Limit {
    /// Says so if there were more.
    pub fn violation(self, attacker: &Attacker, seconds: f64) -> Option<String> {
        let (got, allowed) = (attacker.answered_with(self.status), self.burst + self.per_second * (seconds + 1.0));
        (got as f64 > allowed).then(|| format!("{got} answers of {} instead of at most {allowed:.0}", self.status))
    }
}

macro_rules! attack {
    ($name:literal, $strike:path, $what:literal) => {
        Attack {
            name: $name,
            what: $what,
            strike: |attacker| Box::pin($strike(attacker)),
            witness: Witness::None,
            limit: None,
            is_without_dns: false,
        }
    };
}

/// The default limit of one address: what isn't a 429 is a 401.
const ONE_ADDRESS: Option<Limit> = limit(401, 20, 10);

/// A limit of answers with this status.
const fn limit(status: u16, burst: u32, per_second: u32) -> Option<Limit> {
    Some(Limit { status, burst: burst as f64, per_second: per_second as f64 })
}

/// All attacks.
pub const ATTACKS: &[Attack] = &[
    attack!("bodies-one-address", bodies::one_address, "100 unfinished bodies of 2 MiB from one address"),
    attack!("bodies-many-addresses", bodies::many_addresses, "200 unfinished bodies of 2 MiB from 50 addresses"),
    attack!("bodies-drip", bodies::drip, "200 bodies that drip a byte a second, from 10 addresses"),
    Attack {
        witness: Witness::Friend,
        // The inbox has room for 1000, and the friend has queued 200.
        limit: limit(200, 800, 0),
        ..attack!("inbox-flood", inbox::flood, "30 made-up accounts fill the inbox of a device that is offline")
    },
    Attack {
        // 64 MiB in an inbox.
        limit: limit(200, 64, 0),
        ..attack!("own-devices", inbox::own_devices, "an account sends 1 MiB messages to its own devices")
    },
    Attack {
        witness: Witness::Group,
        ..attack!("group-member-flood", inbox::member, "one member of a group is flooded by 60 accounts")
    },
    Attack {
        limit: limit(201, 300, 5),
        ..attack!("uploads-one-byte", inbox::uploads, "uploads of one byte at full speed")
    },
    Attack {
        limit: limit(201, 3, 1),
        ..attack!("sign-ups-one-address", accounts::sign_ups_one_address, "sign-ups at full speed from one address")
    },
    Attack {
        limit: limit(201, 200, 0),
        ..attack!("sign-ups-ipv4-neighbours", accounts::sign_ups_ipv4, "sign-ups from 200 addresses of one IPv4 /24")
    },
    Attack {
        limit: limit(201, 200, 0),
        ..attack!("sign-ups-ipv6-neighbours", accounts::sign_ups_ipv6, "sign-ups from 200 /64 networks of one IPv6 /48")
    },
    Attack {
        witness: Witness::Prekeys,
        // Each of the two may fetch 60 times an hour.
        limit: limit(200, 120, 0),
        ..attack!("prekey-drain", keys::drain, "two accounts fetch a third one's prekeys at full speed")
    },
    attack!("signatures", keys::signatures, "200 prekeys under a made-up link id, from 50 addresses"),
    Attack {
        witness: Witness::Owner,
        ..attack!(
            "guess-one-account",
            accounts::guesses,
            "80 password guesses a second at one account, from 100 addresses"
        )
    },
    attack!("log-ins-many-addresses", accounts::log_ins, "240 addresses at the log-in rate they are allowed"),
    Attack {
        limit: ONE_ADDRESS,
        ..attack!("forwarded-untrusted", accounts::forged, "invented X-Forwarded-For of a peer that is no proxy")
    },
    Attack {
        limit: ONE_ADDRESS,
        ..attack!(
            "forwarded-unreadable",
            accounts::unreadable,
            "invented X-Forwarded-For before an unreadable one, by a proxy"
        )
    },
    attack!("silent-management", connections::silent_management, "300 silent connections to the management port"),
    attack!("silent-api", connections::silent_api, "1200 silent connections to the API port from 3 addresses"),
    attack!("slow-sockets", connections::slow_sockets, "64 sockets with 12 MiB of mail each that are never read"),
    attack!("slow-downloads", connections::slow_downloads, "200 downloads of 20 MiB, read at 1 byte a second"),
    attack!("frames-empty", frames::empty, "empty WebSocket frames at full speed"),
    attack!("frames-acks", frames::acks, "acks of unknown ids at full speed"),
    attack!("frames-pings", frames::pings, "pings at full speed"),
    attack!("pipelined-unknown", pipelines::unknown, "unknown paths, pipelined at full speed"),
    attack!("pipelined-document", pipelines::document, "GET /openapi.yaml, pipelined at full speed"),
    attack!("pipelined-refusals", pipelines::refusals, "requests that get 429, pipelined at full speed"),
    Attack {
        is_without_dns: true,
        ..attack!("push-silent-dns", push::endpoints, "60 Web Push endpoints whose names are never resolved")
    },
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_attacks_have_the_same_name() {
        let names: HashSet<&str> = ATTACKS.iter().map(|attack| attack.name).collect();
        assert_eq!(names.len(), ATTACKS.len());
    }
}
