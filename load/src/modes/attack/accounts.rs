//! Sign-ups, passwords, and addresses that are made up.

use std::net::Ipv6Addr;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::attacker::{Attacker, Request};
use crate::http::Connection;
use crate::origin::Origin;
use crate::people::Registrar;
use crate::signer::Identity;

/// Between two requests of one client that uses what one address is allowed.
const ALLOWED: Duration = Duration::from_secs(1);
/// Addresses that guess, and the pause of each, which makes eighty guesses a second.
const GUESSERS: usize = 100;
const GUESSING: Duration = Duration::from_millis(1250);

pub async fn sign_ups_one_address(attacker: Attacker) -> Result<()> {
    sign_ups(attacker, vec![Origin::direct(70, 1); 4], Duration::ZERO).await
}

pub async fn sign_ups_ipv4(attacker: Attacker) -> Result<()> {
    sign_ups(attacker, (1..=200).map(|host| Origin::direct(71, host)).collect(), ALLOWED).await
}

pub async fn sign_ups_ipv6(attacker: Attacker) -> Result<()> {
    // 2a01:db8:1::/48 is taken, each /64 of it by one client.
    let neighbour = |n| Origin::behind_proxy(Ipv6Addr::new(0x2a01, 0xdb8, 1, n, 0, 0, 0, 1));
    sign_ups(attacker, (1..=200).map(neighbour).collect(), ALLOWED).await
}

/// Every sign-up has a name of its own. Their keys are the same, which saves the attacker the work.
async fn sign_ups(attacker: Attacker, origins: Vec<Origin>, pause: Duration) -> Result<()> {
    let account = Registrar::new().account(0, &Identity::generate());
    attacker.begin().await;
    let request = move |_| {
        let mut account = account.clone();
        account["username"] = format!("a{}", Uuid::from_bytes(rand::random()).simple()).into();
        Request::post_json("/v1/users", &account)
    };
    attacker.hammer(origins, pause, request).await
}

pub async fn guesses(attacker: Attacker) -> Result<()> {
    let target = &attacker.scene.target;
    let (name, device) = (target.name.clone(), Uuid::from_bytes(target.device.id).to_string());
    attacker.begin().await;
    let origins = (0..GUESSERS).map(|n| Origin::direct(80 + n as u8 / 10, 1 + n as u8 % 10)).collect();
    let request = move |_| {
        let password = Uuid::from_bytes(rand::random()).to_string();
        Request::post_json("/v1/session", &json!({"username": name, "password": password, "deviceId": device}))
    };
    attacker.hammer(origins, GUESSING, request).await
}

pub async fn log_ins(attacker: Attacker) -> Result<()> {
    attacker.begin().await;
    let origins = (0..240).map(|n| Origin::direct(90 + n as u8 / 24, 1 + n as u8 % 24)).collect();
    let request = |_| {
        let unknown = Uuid::from_bytes(rand::random());
        let (name, device) = (format!("u{}", unknown.simple()), unknown.to_string());
        Request::post_json("/v1/session", &json!({"username": name, "password": device, "deviceId": device}))
    };
    attacker.hammer(origins, ALLOWED, request).await
}

pub async fn forged(attacker: Attacker) -> Result<()> {
    invented(attacker, |address| Origin::forged(100, 1, address)).await
}

pub async fn unreadable(attacker: Attacker) -> Result<()> {
    invented(attacker, |address| Origin::behind_proxy(format!("{address}, unix:"))).await
}

/// Requests without a token, each from an address that is made up.
async fn invented(attacker: Attacker, origin: fn(String) -> Origin) -> Result<()> {
    attacker.begin().await;
    let mut work = JoinSet::new();
    for _ in 0..4 {
        let attacker = attacker.clone();
        work.spawn(async move {
            loop {
                let [a, b, c]: [u8; 3] = rand::random();
                attacker.attempts(1);
                let asking = async {
                    let origin = origin(format!("{}.{a}.{b}.{c}", 20 + a % 80));
                    let mut connection = Connection::open_from(attacker.api(), &origin).await?;
                    anyhow::Ok(connection.get("/v1/devices").await?.status)
                };
                attacker.answer(asking.await.ok());
            }
        });
    }
    while work.join_next().await.is_some() {}
    Ok(())
}
