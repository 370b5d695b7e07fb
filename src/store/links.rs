//! Link sessions: how a new device joins an account.

use crate::clock::Timestamp;
use crate::model::ids::{DeviceNo, UserId};
use crate::model::keys::PublicKey;
use crate::store::database::{Tx, on, reading, run};
use crate::store::shares::Rows;
use crate::store::{NewDevice, Result, SessionGrant, Store, devices, prekeys, sessions};

/// What became of an approval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Approved {
    /// The parcel is stored.
    Stored,
    /// The account has no such link session (any more).
    Unknown,
    /// It had been approved before; that parcel stays.
    Already,
}

/// What a link session holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkBody {
    /// There is no such link session (any more).
    Unknown,
    /// Nothing yet.
    Waiting,
    /// What the primary device left for the new one.
    Approved(Vec<u8>),
}

/// What became of linking a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linked {
    /// The device exists and is logged in; the link session is used up.
    Device {
        /// The account.
        user: UserId,
        /// The device's number.
        no: DeviceNo,
    },
    /// The link session is unknown, expired, not approved or used.
    SessionInvalid,
    /// The account has all the devices it may have.
    LimitReached {
        /// How many that are.
        max: u32,
    },
    /// The new device has another identity key than the account.
    IdentityDiffers,
    /// The approving device has asked for a proof, and there is none.
    ProofMissing,
}

/// What the primary device says to a link session.
#[derive(Clone, Copy)]
pub struct Approval<'a> {
    /// What it leaves for the new device.
    pub parcel: &'a [u8],
    /// True when the new device has to prove that it holds the identity key.
    pub proof_required: bool,
}

/// A device that wants to join.
#[derive(Clone, Debug)]
pub struct NewLink {
    /// SHA-256 of the link session's id.
    pub hash: [u8; 32],
    /// The identity key that the device names.
    pub identity: PublicKey,
    /// True when it has proven that it holds the private half.
    pub is_proven: bool,
    /// The device.
    pub device: NewDevice,
    /// Its first session.
    pub session: SessionGrant,
}

impl Store {
    /// Opens a link session. It replaces the account's one that waits for approval; approved ones stay.
    pub async fn open_link(&self, user: UserId, hash: &[u8; 32], expires_at: Timestamp, now: Timestamp) -> Result<()> {
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        devices::lock_account(&mut tx, user).await?;
        let replaced = "DELETE FROM link_sessions WHERE user_id = $1 AND (approval IS NULL OR expires_at <= $2)";
        run!(&mut tx, sqlx::query(replaced).bind(user).bind(now))?;
        let opened = "INSERT INTO link_sessions (hash, user_id, expires_at) VALUES ($1, $2, $3)";
        run!(&mut tx, sqlx::query(opened).bind(&hash[..]).bind(user).bind(expires_at))?;
        tx.commit().await
    }

    /// Approves a link session of the account and leaves a parcel in it for the new device.
    pub async fn approve_link(
        &self,
        user: UserId,
        hash: &[u8; 32],
        approval: Approval<'_>,
        now: Timestamp,
    ) -> Result<Approved> {
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        devices::lock_account(&mut tx, user).await?;
        let statement = "SELECT approval IS NOT NULL FROM link_sessions \
                         WHERE hash = $1 AND user_id = $2 AND expires_at > $3";
        let is_approved =
            on!(&mut tx, |db| sqlx::query_scalar(statement).bind(&hash[..]).bind(user).bind(now).fetch_optional(db))?;
        let approved = match is_approved {
            None => Approved::Unknown,
            Some(true) => Approved::Already,
            Some(false) => {
                let statement = "UPDATE link_sessions SET approval = $2, proof_required = $3 WHERE hash = $1";
                let Approval { parcel, proof_required } = approval;
                run!(&mut tx, sqlx::query(statement).bind(&hash[..]).bind(parcel).bind(proof_required))?;
                Approved::Stored
            }
        };
        tx.commit().await?;
        Ok(approved)
    }

    /// What the link session holds. Reading changes nothing.
    pub async fn link_body(&self, hash: &[u8; 32], now: Timestamp) -> Result<LinkBody> {
        let statement = "SELECT approval FROM link_sessions WHERE hash = $1 AND expires_at > $2";
        let found = reading!(self, |db| sqlx::query_scalar(statement).bind(&hash[..]).bind(now).fetch_optional(db))?;
        Ok(match found {
            None => LinkBody::Unknown,
            Some(None) => LinkBody::Waiting,
            Some(Some(parcel)) => LinkBody::Approved(parcel),
        })
    }

    /// Makes a device of the account that approved the link session, logs it in and uses the link session up.
    ///
    /// Unless the link session itself is invalid, a refusal leaves it usable.
    pub async fn link_device(&self, link: &NewLink, now: Timestamp) -> Result<Linked> {
        // Ids that never were must not keep the one writer busy: every client may try.
        let statement = "SELECT user_id FROM link_sessions WHERE hash = $1 AND expires_at > $2";
        let found: Option<UserId> =
            reading!(self, |db| sqlx::query_scalar(statement).bind(&link.hash[..]).bind(now).fetch_optional(db))?;
        let Some(user) = found else { return Ok(Linked::SessionInvalid) };
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        devices::lock_account(&mut tx, user).await?;
        let linked = self.join(&mut tx, link, now).await?;
        tx.commit().await?;
        Ok(linked)
    }

    async fn join(&self, tx: &mut Tx, link: &NewLink, now: Timestamp) -> Result<Linked> {
        let statement = "\
            SELECT u.id, u.identity_key, (SELECT count(*) FROM devices d WHERE d.user_id = u.id), l.proof_required \
            FROM link_sessions l JOIN users u ON u.id = l.user_id \
            WHERE l.hash = $1 AND l.approval IS NOT NULL AND l.expires_at > $2";
        let found = on!(tx, |db| sqlx::query_as(statement).bind(&link.hash[..]).bind(now).fetch_optional(db))?;
        let Some(found) = found else { return Ok(Linked::SessionInvalid) };
        let (user, identity, devices, proof_required): (UserId, Vec<u8>, i64, bool) = found;
        let max = self.limits.max_devices;
        if devices >= i64::from(max) {
            return Ok(Linked::LimitReached { max });
        }
        if identity != link.identity.as_bytes() {
            return Ok(Linked::IdentityDiffers);
        }
        if proof_required && !link.is_proven {
            return Ok(Linked::ProofMissing);
        }
        run!(tx, sqlx::query("DELETE FROM link_sessions WHERE hash = $1").bind(&link.hash[..]))?;
        prekeys::lock(tx, user).await?;
        let no = devices::insert(tx, user, &link.device, false).await?;
        sessions::open(tx, no, &link.session).await?;
        Ok(Linked::Device { user, no })
    }

    /// Forgets at most `limit` link sessions that have expired, or to which a wrong clock has given a day or more. Returns how
    /// many.
    pub async fn expire_links(&self, now: Timestamp, limit: u32) -> Result<u64> {
        let mut tx = self.begin().await?;
        let statement = "DELETE FROM link_sessions WHERE hash IN ( \
                             SELECT hash FROM link_sessions WHERE expires_at <= $1 OR expires_at > $1 + 86400000 LIMIT $2)";
        let done = run!(&mut tx, sqlx::query(statement).bind(now).bind(i64::from(limit)))?;
        tx.commit().await?;
        Ok(done)
    }
}
