//! `healthcheck`: asks the server that runs with the same options whether it is ready. For containers, which have neither a
//! shell nor a program that speaks HTTP.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::commands::reachable;
use crate::config::Server;

/// A check that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(3);
/// The answer of `/readyz` is much shorter.
const MAX_ANSWER_BYTES: usize = 16 * 1024;

/// One word when the server is ready, otherwise one sentence as the error.
pub(super) fn run(server: &Server) -> anyhow::Result<String> {
    if server.management_port == 0 {
        bail!("--mgmt-port is 0, which lets the server take any free port: give the port that it has taken");
    }
    let address = reachable(SocketAddr::new(server.management_host, server.management_port));
    let answer = exchange(address, Instant::now() + LIMIT)
        .with_context(|| format!("no answer from the server's management port, {address}"))?;
    match answer.split_ascii_whitespace().nth(1) {
        Some("200") => Ok(match away(&answer) {
            parts if parts.is_empty() => "ready".into(),
            parts => format!("ready, though {parts} can't be used"),
        }),
        Some("503") => bail!("the server at {address} is not ready: {}", reason(&answer)),
        _ => bail!("what listens on --mgmt-port, {address}, is not this server's management port"),
    }
}

/// Why the server is not ready.
fn reason(answer: &str) -> String {
    match away(answer) {
        _ if body(answer)["status"] == "starting" => "it is starting".into(),
        parts if parts.is_empty() => "it is stopping".into(),
        parts => format!("{parts} can't be used"),
    }
}

/// The parts that the answer finds fault with, separated by commas.
fn away(answer: &str) -> String {
    let body = body(answer);
    let parts = body.as_object().into_iter().flatten();
    let away = parts.filter(|(part, state)| *part != "status" && *state == "error").map(|(part, _)| part.as_str());
    away.collect::<Vec<_>>().join(", ")
}

fn body(answer: &str) -> Value {
    let body = answer.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str(body).ok());
    body.unwrap_or_default()
}

/// The whole answer to `GET /readyz`, which the server ends by closing the connection.
fn exchange(address: SocketAddr, deadline: Instant) -> io::Result<String> {
    let mut connection = TcpStream::connect_timeout(&address, left(deadline)?)?;
    connection.set_write_timeout(Some(left(deadline)?))?;
    write!(connection, "GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 1024]);
    loop {
        connection.set_read_timeout(Some(left(deadline)?))?;
        match connection.read(&mut buffer) {
            Ok(0) => return Ok(String::from_utf8_lossy(&answer).into_owned()),
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(late()),
            Err(error) => return Err(error),
        }
        if answer.len() > MAX_ANSWER_BYTES {
            return Err(ErrorKind::FileTooLarge.into());
        }
    }
}

/// The time that is left, never zero.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(late()) } else { Ok(left) }
}

fn late() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, format!("{} seconds have passed", LIMIT.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_names_the_parts_that_are_away() {
        let answer = |body: &str| format!("HTTP/1.1 503 Service Unavailable\r\nx: y\r\n\r\n{body}");
        let away = r#"{"status":"error","database":"error","storage":"ok","pubsub":"error"}"#;
        assert_eq!(reason(&answer(away)), "database, pubsub can't be used");
        let stopping = r#"{"status":"error","database":"ok","storage":"ok","pubsub":"ok"}"#;
        assert_eq!(reason(&answer(stopping)), "it is stopping");
        let starting = r#"{"status":"starting","database":"ok","storage":"starting","pubsub":"starting"}"#;
        assert_eq!(reason(&answer(starting)), "it is starting");
    }
}
