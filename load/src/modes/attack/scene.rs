//! The accounts of a run: ten honest clients, and the accounts that attacks are aimed at.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use super::record::Record;
use crate::http::Connection;
use crate::origin::Origin;
use crate::people::{Device, Registrar};
use crate::server::Server;

/// Honest clients.
pub const CLIENTS: usize = 10;
/// Sign-ups at a time.
const AT_ONCE: usize = 4;

/// Everything that the honest clients and the attacker need to know.
pub struct Scene {
    pub api: SocketAddr,
    pub management: SocketAddr,
    pub clients: Vec<Client>,
    /// An honest account whose only device is offline, and a friend who writes to it.
    pub target: Account,
    pub friend: Account,
    pub registrar: Registrar,
    pub record: Record,
}

/// One honest client: a device with a socket, and an account that logs in now and then.
pub struct Client {
    pub device: Account,
    pub other: Account,
}

/// An account with one device, and the tokens that it has now.
pub struct Account {
    pub name: String,
    pub origin: Origin,
    pub device: Device,
    tokens: Mutex<(String, String)>,
}

impl Account {
    fn new(name: String, origin: Origin, device: Device) -> Self {
        let tokens = Mutex::new((device.token.clone(), device.refresh_token.clone()));
        Self { name, origin, device, tokens }
    }

    /// The access token.
    pub fn token(&self) -> String {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// The refresh token.
    pub fn refresh_token(&self) -> String {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// Takes the tokens of a refresh or a log-in.
    pub fn renew(&self, device: Device) {
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = (device.token, device.refresh_token);
    }

    /// The device with the access token that it has now.
    pub fn current(&self) -> Device {
        Device { token: self.token(), ..self.device.clone() }
    }

    /// A new connection from where this account is.
    pub async fn connect(&self, api: SocketAddr) -> Result<Connection> {
        Connection::open_from(api, &self.origin).await
    }
}

impl Scene {
    /// Signs up all accounts of the scene on a fresh server.
    pub async fn prepare(server: &Server) -> Result<Self> {
        let api = server.api;
        let registrar = Registrar::new();
        let mut accounts = sign_up(api, &registrar, 2 * CLIENTS + 2).await?.into_iter();
        let mut next = || accounts.next().context("too few accounts");
        let (target, friend) = (next()?, next()?);
        let client = |_| anyhow::Ok(Client { device: next()?, other: next()? });
        let clients = (0..CLIENTS).map(client).collect::<Result<_>>()?;
        let management = server.management().context("the management port is not known")?;
        Ok(Self { api, management, clients, target, friend, registrar, record: Record::new() })
    }
}

/// Half of them speak through a proxy, the others directly; each is in a network of its own.
fn origin(client: usize) -> Origin {
    let number = client as u8 + 1;
    match client % 2 {
        0 => Origin::behind_proxy(format!("81.{number}.7.1")),
        _ => Origin::direct(200 + number, 1),
    }
}

/// The accounts in the order of their numbers. Those of client n are numbers 2n + 2 and 2n + 3.
async fn sign_up(api: SocketAddr, registrar: &Registrar, count: usize) -> Result<Vec<Account>> {
    let place = |n: usize| if n < 2 { Origin::behind_proxy(format!("82.{n}.7.1")) } else { origin((n - 2) / 2) };
    let mut work = JoinSet::new();
    for first in 0..AT_ONCE {
        let registrar = registrar.clone();
        work.spawn(async move {
            let mut accounts = Vec::new();
            for n in (first..count).step_by(AT_ONCE) {
                let mut connection = Connection::open_from(api, &place(n)).await?;
                let device = registrar.sign_up(&mut connection, n).await.context("an honest sign-up")?;
                accounts.push((n, Account::new(registrar.name(n), place(n), device)));
            }
            anyhow::Ok(accounts)
        });
    }
    let mut all =
        work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    all.sort_by_key(|(n, _)| *n);
    Ok(all.into_iter().map(|(_, account)| account).collect())
}
