//! A store in a folder of its own, and what can be put into it.

use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use obscura_server::clock::Timestamp;
use obscura_server::config::{Config, Database as DatabaseConfig};
use obscura_server::model::ids::{Address, DeviceId, DeviceNo, Position, UserId};
use obscura_server::model::keys::{KeyId, OneTimePreKey, PreKeys, PublicKey, RegistrationId, Signature, SignedPreKey};
use obscura_server::model::message::{SendRequest, SendResult};
use obscura_server::model::push::PushTarget;
use obscura_server::store::{Limits, NewAccount, NewDevice, NewTicket, OpenError, Registered, SessionGrant, Store};
use obscura_server::telemetry::metrics::Metrics;
use tempfile::TempDir;

use crate::harness::signer::ec_public_key;
use crate::harness::{Database, deployment, unique_name};

/// The time in most tests of the store.
pub const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);

/// An empty store. What it holds goes with [`StateFolder`].
pub struct TestStore {
    store: Store,
    limits: Limits,
    config: DatabaseConfig,
    metrics: Metrics,
    _folder: StateFolder,
}

/// A folder that takes what belongs to it along when it is dropped.
struct StateFolder(TempDir);

impl StateFolder {
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for StateFolder {
    fn drop(&mut self) {
        deployment::drop_state(self.path());
    }
}

impl TestStore {
    /// With the limits of an embedded server.
    pub async fn open() -> Self {
        Self::open_with(|_| {}).await
    }

    /// With other limits.
    pub async fn open_with(change: impl FnOnce(&mut Limits)) -> Self {
        let folder = StateFolder(tempfile::tempdir().expect("a folder for the store"));
        let config = deployment::config(folder.path()).await;
        Self::open_configured(folder, config, change).await
    }

    /// In PostgreSQL, whatever this run is about.
    pub async fn open_in_postgres() -> Self {
        Self::open_in_postgres_with(|_| {}).await
    }

    /// In PostgreSQL, with other limits.
    pub async fn open_in_postgres_with(change: impl FnOnce(&mut Limits)) -> Self {
        let folder = StateFolder(tempfile::tempdir().expect("a folder for the store"));
        let config = deployment::config_of(&deployment::distributed_options(folder.path()).await);
        Self::open_configured(folder, config, change).await
    }

    async fn open_configured(folder: StateFolder, config: Config, change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::of(&config);
        change(&mut limits);
        let config = config.database;
        let metrics = Metrics::unexported();
        let store = Store::open(&config, limits, &metrics).await.expect("a store");
        Self { store, limits, config, metrics, _folder: folder }
    }

    /// The same database after closing it and opening it again, as a restart does.
    pub async fn reopened(self) -> Self {
        self.store.close().await;
        let store = self.open_again().await.expect("a store");
        Self { store, ..self }
    }

    /// The same with other limits from now on.
    pub async fn reopened_with(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.limits);
        self.reopened().await
    }

    /// Settles a group of which nothing is left for later.
    pub async fn commit_group(
        &self,
        sends: &[SendRequest],
        acks: &[(DeviceNo, Position)],
        now: Timestamp,
    ) -> obscura_server::store::Result<Vec<SendResult>> {
        let result = self.store.commit_group(sends, acks, now).await?;
        assert!(result.locked_devices.is_empty(), "acks that need not wait");
        Ok(result.sent.into_iter().map(|sent| sent.expect("a send that needs not wait")).collect())
    }

    /// Opens the same database beside this one.
    pub async fn open_again(&self) -> Result<Store, OpenError> {
        Store::open(&self.config, self.limits, &self.metrics).await
    }

    /// How many waiting messages were counted to find out whether there is room, in all stores on the database.
    pub fn counted(&self) -> u64 {
        self.metrics.counted.value(())
    }

    /// A look at, and a hand in, the database.
    pub async fn database(&self) -> Database {
        Database::open(&self.config).await
    }

    /// A new account with its primary device.
    pub async fn account(&self) -> Person {
        let account = new_account(&unique_name("user"));
        let no = match self.store.register(&account).await.expect("the store works") {
            Registered::Account(no) => no,
            Registered::UsernameTaken => panic!("the name is unique"),
        };
        Person { user: account.user, device: account.device.id, no, account }
    }
}

impl Deref for TestStore {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

/// An account with its primary device.
pub struct Person {
    pub user: UserId,
    pub device: DeviceId,
    pub no: DeviceNo,
    /// What it was made from.
    pub account: NewAccount,
}

impl Person {
    /// Where signals for the primary device go.
    pub fn address(&self) -> Address {
        Address { user: self.user, device: self.no }
    }
}

/// An account that could be registered.
pub fn new_account(username: &str) -> NewAccount {
    NewAccount {
        user: UserId::random(),
        username: username.to_owned(),
        password_hash: format!("the hash of {username}'s password"),
        identity: public_key(1),
        device: new_device(),
        session: grant(NOW),
    }
}

/// A device that could be made, with two one-time prekeys and none for post-quantum.
pub fn new_device() -> NewDevice {
    let signature = Signature::from_bytes(&[7; 64]).expect("64 bytes");
    NewDevice {
        id: DeviceId::random(),
        name: Some("phone".into()),
        registration_id: RegistrationId(4711),
        prekeys: PreKeys {
            signed: SignedPreKey { id: KeyId(1), public_key: public_key(2), signature },
            one_time: (1..=2).map(one_time_pre_key).collect(),
            pq_last_resort: None,
            pq_one_time: Vec::new(),
        },
    }
}

/// A one-time prekey with this id.
pub fn one_time_pre_key(id: i32) -> OneTimePreKey {
    OneTimePreKey { id: KeyId(id), public_key: public_key(1000 + u64::from(id.unsigned_abs())) }
}

/// The same key for the same seed.
pub fn public_key(seed: u64) -> PublicKey {
    PublicKey::from_bytes(&ec_public_key(seed)).expect("a public key")
}

/// A session of a family of its own that expires a day after `now`.
pub fn grant(now: Timestamp) -> SessionGrant {
    let expires_at = now + std::time::Duration::from_hours(24);
    let access_expires_at = now.seconds() + 900;
    SessionGrant { access_expires_at, family: rand::random(), secret_hash: rand::random(), expires_at }
}

/// A phone's push token.
pub fn fcm(token: &str) -> PushTarget {
    PushTarget::Fcm(token.to_owned())
}

/// A gateway ticket of this device that is good for a while, whatever the access token.
pub fn ticket(device: DeviceNo) -> NewTicket {
    let expires_at = NOW + Duration::from_secs(30);
    NewTicket { hash: rand::random(), device, token_expires_at: i64::MAX, expires_at }
}
