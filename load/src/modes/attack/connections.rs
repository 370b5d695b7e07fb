//! Connections on which nothing happens, or hardly anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::attacker::{Attacker, elsewhere};
use super::frames::socket;
use super::inbox::queue;
use crate::http::{Connection, bearer};
use crate::modes::attachments::upload_one;
use crate::origin::Origin;
use crate::people::Device;
use crate::sender::random_bytes;

/// Bytes of the attachment that is read slowly.
const ATTACHMENT: usize = 20 << 20;
/// Accounts whose mail is never read, and how much each has.
const READERS: usize = 8;
const BACKLOG: usize = 12;
const MESSAGE: usize = 1 << 20;
/// Sockets of one account.
const SOCKETS: usize = 8;
/// As small as the system lets it be.
const SMALL: u32 = 4096;
/// Between two bytes that are read.
const DRIP: Duration = Duration::from_secs(1);

pub async fn silent_management(attacker: Attacker) -> Result<()> {
    let management = attacker.scene.management;
    attacker.begin().await;
    attacker.many(300, move |attacker, _| silent(attacker, management, Origin::direct(180, 1))).await
}

pub async fn silent_api(attacker: Attacker) -> Result<()> {
    let api = attacker.api();
    attacker.begin().await;
    attacker.many(1200, move |attacker, n| silent(attacker, api, Origin::direct(181 + n as u8 % 3, 1))).await
}

/// Holds a connection until the other side closes it.
async fn silent(attacker: Attacker, address: SocketAddr, origin: Origin) -> Result<()> {
    attacker.attempts(1);
    let mut stream = origin.connect(address, None).await?;
    let status = super::bodies::first_status(&mut stream).await;
    attacker.answer(status);
    // A server that closes at once need not be asked a thousand times a second.
    tokio::time::sleep(DRIP).await;
    Ok(())
}

pub async fn slow_sockets(attacker: Attacker) -> Result<()> {
    let devices: Arc<[Device]> = attacker.sign_up(READERS + 1).await?.into();
    let (from, readers) = (&devices[0], &devices[1..]);
    for (reader, device) in readers.iter().enumerate() {
        for message in 0..BACKLOG {
            queue(&attacker, reader * BACKLOG + message, from, device, MESSAGE).await?;
        }
    }
    attacker.begin().await;
    attacker
        .many(READERS * SOCKETS, move |attacker, n| {
            let devices = devices.clone();
            async move {
                attacker.attempts(1);
                let mut stream =
                    socket(&attacker, &elsewhere(42_000 + n), &devices[1 + n % READERS], Some(SMALL)).await?;
                drip(&mut stream).await
            }
        })
        .await
}

pub async fn slow_downloads(attacker: Attacker) -> Result<()> {
    let device = attacker.sign_up(1).await?.swap_remove(0);
    let mut connection = Connection::open_from(attacker.api(), &elsewhere(0)).await?;
    let id = upload_one(&mut connection, &device.token, &random_bytes(ATTACHMENT)).await?;
    let fields = bearer(&device.token);
    attacker.begin().await;
    attacker
        .many(200, move |attacker, n| {
            let (id, fields) = (id.clone(), fields.clone());
            async move {
                attacker.attempts(1);
                let origin = Origin::direct(190 + n as u8 % 10, 1 + n as u8 / 10);
                let mut stream = origin.connect(attacker.api(), Some(SMALL)).await?;
                let request = format!("GET /v1/attachments/{id} HTTP/1.1\r\nhost: {}\r\n{fields}\r\n", attacker.api());
                stream.write_all(request.as_bytes()).await?;
                attacker.answer(super::bodies::first_status(&mut stream).await);
                drip(&mut stream).await
            }
        })
        .await
}

/// Reads a byte a second.
async fn drip(stream: &mut (impl AsyncReadExt + Unpin)) -> Result<()> {
    let mut byte = [0; 1];
    loop {
        ensure!(stream.read(&mut byte).await? > 0, "closed");
        tokio::time::sleep(DRIP).await;
    }
}
