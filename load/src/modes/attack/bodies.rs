//! Bodies that are never finished.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::attacker::Attacker;
use crate::origin::Origin;

/// Bytes of a body, as much as a server takes.
const BODY: usize = 2 << 20;
/// How long an unfinished body is left as it is.
const HOLDING: Duration = Duration::from_secs(60);
/// Between two bytes of a body that drips.
const DRIP: Duration = Duration::from_secs(1);
/// A route that takes a body and needs no token.
const ROUTE: &str = "/v1/devices";

pub async fn one_address(attacker: Attacker) -> Result<()> {
    attacker.begin().await;
    attacker.many(100, |attacker, _| unfinished(attacker, Origin::direct(1, 1))).await
}

pub async fn many_addresses(attacker: Attacker) -> Result<()> {
    attacker.begin().await;
    attacker.many(200, |attacker, n| unfinished(attacker, Origin::direct(2 + n as u8 % 50, 1))).await
}

pub async fn drip(attacker: Attacker) -> Result<()> {
    attacker.begin().await;
    attacker.many(200, |attacker, n| dripping(attacker, Origin::direct(60 + n as u8 % 10, 1))).await
}

async fn unfinished(attacker: Attacker, origin: Origin) -> Result<()> {
    let mut stream = begin(&attacker, &origin).await?;
    let body = vec![b' '; BODY - 1];
    let (mut reading, mut writing) = stream.split();
    let answer = async {
        let status = first_status(&mut reading).await;
        attacker.answer(status);
    };
    // The server may answer before it has everything, or close: then it begins again.
    let holding = async {
        let _ = writing.write_all(&body).await;
        tokio::time::sleep(HOLDING).await;
    };
    tokio::select! {
        () = answer => {}
        () = holding => {}
    }
    Ok(())
}

async fn dripping(attacker: Attacker, origin: Origin) -> Result<()> {
    let mut stream = begin(&attacker, &origin).await?;
    let (mut reading, mut writing) = stream.split();
    let drips = async {
        while writing.write_all(b" ").await.is_ok() {
            tokio::time::sleep(DRIP).await;
        }
    };
    let status = tokio::select! {
        status = first_status(&mut reading) => status,
        () = drips => None,
    };
    attacker.answer(status);
    Ok(())
}

/// A connection on which the head of a request has been sent.
async fn begin(attacker: &Attacker, origin: &Origin) -> Result<TcpStream> {
    attacker.attempts(1);
    let mut stream = origin.connect(attacker.api(), None).await?;
    let head = format!(
        "POST {ROUTE} HTTP/1.1\r\nhost: {}\r\n{}content-type: application/json\r\ncontent-length: {BODY}\r\n\r\n",
        attacker.api(),
        origin.fields(),
    );
    stream.write_all(head.as_bytes()).await.context("the head of a request")?;
    Ok(stream)
}

/// The status of the answer, once it comes. `None`: the connection was closed without one.
pub async fn first_status(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<u16> {
    let mut head = [0; 12];
    stream.read_exact(&mut head).await.ok()?;
    std::str::from_utf8(&head[9..]).ok()?.parse().ok()
}
