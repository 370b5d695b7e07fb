//! What is stored for others, or for oneself.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use uuid::Uuid;

use super::attacker::{Attacker, Request, elsewhere};
use crate::http::{Connection, bearer};
use crate::people::{Device, Registrar};
use crate::wire::{DeviceMessage, LABEL, Label, put_request};

/// Accounts that fill one inbox, and accounts that flood a member of a group.
const FILLERS: usize = 30;
const FLOODERS: usize = 60;
/// Sends that use up what a target takes at once, before the measurement begins: that many addresses, and sends from each.
const ADDRESSES: usize = 120;
const FROM_EACH: usize = 20;
/// Bytes of a message to one's own device.
const LARGE: usize = 1 << 20;

pub async fn flood(attacker: Attacker) -> Result<()> {
    let devices: Arc<[Device]> = attacker.sign_up(FILLERS).await?.into();
    let target = attacker.scene.target.device.clone();
    attacker.begin().await;
    let request = move |worker: usize| message(&devices[worker], &target, 1);
    attacker.hammer((0..FILLERS).map(|n| elsewhere(43_000 + n)).collect(), Duration::ZERO, request).await
}

pub async fn member(attacker: Attacker) -> Result<()> {
    let devices: Arc<[Device]> = attacker.sign_up(FLOODERS).await?.into();
    let target = attacker.scene.target.device.clone();
    for n in 0..ADDRESSES {
        let mut connection = Connection::open_from(attacker.api(), &elsewhere(44_000 + n)).await?;
        for _ in 0..FROM_EACH {
            let one = message(&devices[n % FLOODERS], &target, 1);
            connection.request(one.method, &one.path, &one.fields, &one.body).await?;
        }
    }
    attacker.begin().await;
    let request = move |worker: usize| message(&devices[worker], &target, 1);
    attacker.hammer((0..FLOODERS).map(|n| elsewhere(45_000 + n)).collect(), Duration::ZERO, request).await
}

pub async fn own_devices(attacker: Attacker) -> Result<()> {
    let registrar = Registrar::new();
    let mut connection = Connection::open_from(attacker.api(), &elsewhere(1)).await?;
    let devices: Arc<[Device]> = registrar.sign_up_with(&mut connection, 0, 2).await?.into();
    attacker.begin().await;
    let request = move |_| message(&devices[0], &devices[1], LARGE);
    // As many addresses as the limit of an account makes use of.
    attacker.hammer((0..40).map(|n| elsewhere(46_000 + n)).collect(), Duration::ZERO, request).await
}

pub async fn uploads(attacker: Attacker) -> Result<()> {
    let device = attacker.sign_up(1).await?.swap_remove(0);
    attacker.begin().await;
    let request = move |_| Request::post("/v1/attachments", bearer(&device.token), *b"1");
    attacker.hammer((0..8).map(|n| elsewhere(47_000 + n)).collect(), Duration::ZERO, request).await
}

/// Queues a message, before the measurement: number `n` of those that this attack queues, so that only a few come
/// from one address.
pub async fn queue(attacker: &Attacker, n: usize, from: &Device, to: &Device, size: usize) -> Result<()> {
    let mut connection = Connection::open_from(attacker.api(), &elsewhere(49_000 + n / FROM_EACH)).await?;
    let one = message(from, to, size);
    connection.request(one.method, &one.path, &one.fields, &one.body).await?.expect(200)
}

/// A send of this many bytes under a new key.
fn message(from: &Device, to: &Device, size: usize) -> Request {
    let mut body = Vec::new();
    put_request(&mut body, &[DeviceMessage::to(to, Label::default())], &vec![0; size.saturating_sub(LABEL)]);
    let fields = format!("{}idempotency-key: {}\r\n", bearer(&from.token), Uuid::from_bytes(rand::random()));
    Request::post("/v1/messages", fields, body)
}
