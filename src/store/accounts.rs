//! Accounts: names, passwords' hashes, identity keys.

use sqlx::FromRow;

use crate::model::ids::{Address, DeviceNo, UserId};
use crate::model::keys::PublicKey;
use crate::store::database::{on, reading, run};
use crate::store::shares::Rows;
use crate::store::{NewDevice, Result, SessionGrant, Store, devices, prekeys, sessions, spent_prekeys, usage};
use crate::telemetry::metrics::Left;

/// What a log-in is checked against.
#[derive(Clone, FromRow)]
pub struct Credentials {
    /// The account.
    #[sqlx(rename = "id")]
    pub user: UserId,
    /// Argon2id, in PHC form.
    pub password_hash: String,
}

/// An account that is about to be made, with its primary device.
#[derive(Clone)]
pub struct NewAccount {
    /// Its id.
    pub user: UserId,
    /// Its name, in lower case.
    pub username: String,
    /// Argon2id, in PHC form.
    pub password_hash: String,
    /// The key that all its devices share.
    pub identity: PublicKey,
    /// Its primary device.
    pub device: NewDevice,
    /// That device's session.
    pub session: SessionGrant,
}

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// The account exists; this is its primary device.
    Account(DeviceNo),
    /// Another account has the name.
    UsernameTaken,
}

/// What a reset has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The new primary device.
    pub no: DeviceNo,
    /// The devices that are gone.
    pub removed: Vec<Address>,
}

impl Store {
    /// The credentials of the account with this name, which is given in lower case.
    pub async fn credentials(&self, username: &str) -> Result<Option<Credentials>> {
        let statement = "SELECT id, password_hash FROM users WHERE username = $1";
        reading!(self, |db| sqlx::query_as(statement).bind(username).fetch_optional(db))
    }

    /// Makes an account with its primary device, and logs that in.
    pub async fn register(&self, account: &NewAccount) -> Result<Registered> {
        let mut tx = self.begin().await?;
        let statement = "INSERT INTO users (id, username, password_hash, identity_key, used_on, is_unused) \
                         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (username) DO NOTHING";
        let inserted = run!(
            &mut tx,
            sqlx::query(statement)
                .bind(account.user)
                .bind(&account.username)
                .bind(&account.password_hash)
                .bind(&account.identity.as_bytes()[..])
                .bind(self.usage.day())
                // Without a date it could not expire as one that was never used.
                .bind(self.usage.day().is_some())
        )?;
        let registered = if inserted == 0 {
            Registered::UsernameTaken
        } else {
            devices::make_lock(&mut tx, account.user).await?;
            let no = devices::insert(&mut tx, account.user, &account.device, true).await?;
            sessions::open(&mut tx, no, &account.session).await?;
            Registered::Account(no)
        };
        tx.commit().await?;
        Ok(registered)
    }

    /// Starts the account over: forgets all its devices and link sessions, gives it a new identity key and a new primary
    /// device, and logs that in. Used prekeys stay remembered, and if the identity key is the one that the account had, the signed
    /// prekeys of the former devices are too: their signatures are still good.
    pub async fn reset(
        &self,
        user: UserId,
        identity: &PublicKey,
        device: &NewDevice,
        session: &SessionGrant,
    ) -> Result<Reset> {
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        devices::lock_account(&mut tx, user).await?;
        // Held, so that no upload replaces a signed prekey that would not be remembered then.
        let statement = tx.sql(
            "SELECT no FROM devices WHERE user_id = $1 ORDER BY no",
            "SELECT no FROM devices WHERE user_id = $1 ORDER BY no FOR NO KEY UPDATE",
        );
        let gone: Vec<DeviceNo> = on!(&mut tx, |db| sqlx::query_scalar(statement).bind(user).fetch_all(db))?;
        let statement = "SELECT identity_key FROM users WHERE id = $1";
        let former: Option<Vec<u8>> = on!(&mut tx, |db| sqlx::query_scalar(statement).bind(user).fetch_optional(db))?;
        // Hand-outs under way are over then, and what they hand out is recorded.
        prekeys::lock(&mut tx, user).await?;
        if former.is_some_and(|former| former == identity.as_bytes()) {
            spent_prekeys::record_signed(&mut tx, user, None).await?;
        }
        let mail = devices::delete_devices(&mut tx, &gone).await?;
        run!(&mut tx, sqlx::query("DELETE FROM link_sessions WHERE user_id = $1").bind(user))?;
        let replace = "UPDATE users SET identity_key = $2 WHERE id = $1";
        run!(&mut tx, sqlx::query(replace).bind(user).bind(&identity.as_bytes()[..]))?;
        usage::mark(&mut tx, user, self.usage.day()).await?;
        let no = devices::insert(&mut tx, user, device, true).await?;
        sessions::open(&mut tx, no, session).await?;
        tx.commit().await?;
        self.metrics.left.add(Left::Removed, mail);
        Ok(Reset { no, removed: gone.into_iter().map(|device| Address { user, device }).collect() })
    }
}
