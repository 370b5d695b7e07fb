//! Requests that are written without waiting for any answer.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::attacker::Attacker;
use crate::origin::Origin;

/// Connections of the attacker.
const CONNECTIONS: usize = 8;
/// Requests that are written at a time.
const AT_ONCE: usize = 64;
/// How long a server may leave a connection without reading and answering.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn unknown(attacker: Attacker) -> Result<()> {
    pipeline(attacker, 170, "/there/is/nothing").await
}

pub async fn document(attacker: Attacker) -> Result<()> {
    pipeline(attacker, 171, "/openapi.yaml").await
}

pub async fn refusals(attacker: Attacker) -> Result<()> {
    pipeline(attacker, 172, "/v1/devices").await
}

async fn pipeline(attacker: Attacker, network: u8, path: &'static str) -> Result<()> {
    attacker.begin().await;
    attacker.many(CONNECTIONS, move |attacker, _| one(attacker, Origin::direct(network, 1), path)).await
}

async fn one(attacker: Attacker, origin: Origin, path: &'static str) -> Result<()> {
    let mut stream = origin.connect(attacker.api(), None).await?;
    let (mut reading, mut writing) = stream.split();
    let requests = format!("GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", attacker.api()).repeat(AT_ONCE);
    let asking = async {
        loop {
            writing.write_all(requests.as_bytes()).await?;
            attacker.attempts(AT_ONCE as u64);
        }
    };
    let hearing = async {
        let (mut statuses, mut buffer) = (Statuses::default(), vec![0; 256 << 10]);
        loop {
            match tokio::time::timeout(PATIENCE, reading.read(&mut buffer)).await? {
                Ok(0) => bail!("closed"),
                Ok(read) => statuses.read(&buffer[..read], |status| attacker.answer(Some(status))),
                Err(error) => bail!(error),
            }
        }
    };
    tokio::select! {
        asked = asking => asked,
        heard = hearing => heard,
    }
}

/// Finds the statuses in a stream of answers, without reading what else there is.
#[derive(Default)]
struct Statuses {
    /// How much of the beginning of an answer was seen.
    matched: usize,
    /// The digits after it.
    digits: Vec<u8>,
}

const BEGINNING: &[u8] = b"HTTP/1.1 ";

impl Statuses {
    fn read(&mut self, bytes: &[u8], mut found: impl FnMut(u16)) {
        for byte in bytes {
            if self.matched == BEGINNING.len() {
                self.digits.push(*byte);
                if self.digits.len() == 3 {
                    let status = std::str::from_utf8(&self.digits).ok().and_then(|digits| digits.parse().ok());
                    status.into_iter().for_each(&mut found);
                    self.digits.clear();
                    self.matched = 0;
                }
            } else if *byte == BEGINNING[self.matched] {
                self.matched += 1;
            } else {
                self.matched = usize::from(*byte == BEGINNING[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_found_wherever_the_stream_is_cut() {
        let stream =
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\nHTTP/1.1 429 Too Many\r\n\r\nHHTTP/1.1 200 OK";
        for cut in 0..stream.len() {
            let (mut statuses, mut found) = (Statuses::default(), Vec::new());
            statuses.read(&stream[..cut], |status| found.push(status));
            statuses.read(&stream[cut..], |status| found.push(status));
            assert_eq!(found, [404, 429, 200], "{cut}");
        }
    }
}
