//! The heartbeat: checks that the Valkey server is a primary, and that it delivers what is published.
//!
//! A replica answers PING, takes subscriptions and confirms a PUBLISH that reaches no other node. So each heartbeat has two
//! parts that such a server fails: a write, and a greeting to the channel of all nodes, to which this node subscribes as well.

use redis::aio::MultiplexedConnection;
use redis::{RedisError, Value};

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionLost {
    /// Valkey said no, or the connection broke.
    #[error(transparent)]
    Valkey(#[from] RedisError),
    /// The connection ended.
    #[error("it was closed")]
    Closed,
    /// The server takes no writes, so what is published there doesn't reach the other nodes.
    #[error("it takes no writes: it is a replica, or a primary that was replaced")]
    NotPrimary,
    /// A greeting was confirmed and not delivered.
    #[error("what is published there does not come back")]
    NoEcho,
}

impl ConnectionLost {
    /// True when this host answers but another host may be the primary.
    pub(super) fn is_wrong_host(&self) -> bool {
        matches!(self, Self::NotPrimary | Self::NoEcho)
    }
}

/// Fails unless the server is a primary, or a member of a cluster, of which each member passes on what is published.
///
/// The write removes a member that is never there from the sorted set `key`. It changes nothing, needs no memory, and is a
/// command that the push queue needs anyway. If the user may not do that, or a cluster has the key on another host, the answer
/// says nothing about the role of the server; then only the role in its answer to HELLO counts.
pub(super) async fn check_primary(connection: &mut MultiplexedConnection, key: &str) -> Result<(), ConnectionLost> {
    let mut write = redis::cmd("ZREM");
    write.arg(key).arg("");
    let written = write.query_async::<Value>(connection).await;
    match written {
        Err(error) if is_of_replica(&error) => return Err(ConnectionLost::NotPrimary),
        // An error without a code is no answer of the server.
        Err(error) if error.code().is_none() => return Err(error.into()),
        _ => {}
    }
    match redis::cmd("HELLO").query_async::<Value>(connection).await {
        Ok(facts) if is_replica(&facts) => Err(ConnectionLost::NotPrimary),
        Err(error) if error.code().is_none() => Err(error.into()),
        _ => Ok(()),
    }
}

/// True for the error of a replica on a write, and for that of a primary that has lost the replicas it must have.
fn is_of_replica(error: &RedisError) -> bool {
    matches!(error.code(), Some("READONLY" | "NOREPLICAS" | "MASTERDOWN"))
}

/// Whether the facts that HELLO answers are those of a replica outside of a cluster.
fn is_replica(facts: &Value) -> bool {
    let Value::Map(facts) = facts else { return false };
    let is = |name: &str, expected: &[&str]| {
        let text = |value: &Value| match value {
            Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::SimpleString(text) => text.clone(),
            _ => String::new(),
        };
        facts.iter().any(|(key, value)| text(key) == name && expected.contains(&text(value).as_str()))
    };
    is("role", &["replica", "slave"]) && !is("mode", &["cluster"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_known_by_its_role_unless_it_is_a_member_of_a_cluster() {
        let facts = |role: &str, mode: &str| {
            let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
            Value::Map(vec![(text("proto"), Value::Int(3)), (text("mode"), text(mode)), (text("role"), text(role))])
        };
        assert!(is_replica(&facts("replica", "standalone")) && is_replica(&facts("slave", "standalone")));
        assert!(!is_replica(&facts("master", "standalone")) && !is_replica(&facts("replica", "cluster")));
        assert!(!is_replica(&Value::Okay));
    }
}
