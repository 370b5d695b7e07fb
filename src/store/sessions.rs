//! Sessions of devices: refresh tokens and gateway tickets.
//!
//! A device has at most one session. It ends when the device logs in again or out, or when its refresh token turns out to
//! be stolen.

mod ended;
mod exchange;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::FromRow;

use crate::clock::Timestamp;
use crate::model::ids::{Address, DeviceId, DeviceNo, IdempotencyKey, UserId};
use crate::store::batcher::QueryBatcher;
use crate::store::database::{Database, Tx, on, reading, run};
use crate::store::messages::CLOCK_TOLERANCE;
use crate::store::shares::Rows;
use crate::store::{Result, Store, devices, usage};

/// A refresh token that is presented again so soon is a client racing itself, and no sign of theft.
const RACE_WINDOW: Duration = Duration::from_secs(10);

/// How long an exchange can be repeated under its key. What was used longer ago than this may be forgotten.
pub const REPEAT_WINDOW: Duration = Duration::from_secs(60);

/// Tickets that share one commit.
const TICKETS: usize = 64;

/// The session that a device is about to get, as the store knows its refresh token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SessionGrant {
    /// The Unix second in which the access token expires that comes with it.
    pub access_expires_at: i64,
    /// The half of the token that stays through refreshes.
    pub family: [u8; 16],
    /// SHA-256 of the half that changes.
    pub secret_hash: [u8; 32],
    /// When the token expires.
    pub expires_at: Timestamp,
}

impl fmt::Debug for SessionGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionGrant(…)")
    }
}

/// A gateway ticket that is about to be issued.
#[derive(Clone, Copy)]
pub struct NewTicket {
    /// SHA-256 of it.
    pub hash: [u8; 32],
    /// Whose it is.
    pub device: DeviceNo,
    /// The Unix second in which the access token expires that it was asked for with.
    pub token_expires_at: i64,
    /// From when on it is worth nothing.
    pub expires_at: Timestamp,
}

/// The hash of a ticket, and when it was presented.
type Presented = ([u8; 32], Timestamp);

/// Devices that come back all at once. On SQLite, where one writes at a time, their tickets share the wait for the disk.
pub(super) struct Tickets {
    issued: Arc<QueryBatcher<NewTicket, bool>>,
    redeemed: Arc<QueryBatcher<Presented, Option<SessionHolder>>>,
}

impl Tickets {
    pub(super) fn new() -> Self {
        Self { issued: Arc::new(QueryBatcher::new(1, TICKETS)), redeemed: Arc::new(QueryBatcher::new(1, TICKETS)) }
    }
}

/// A device that has proven who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct SessionHolder {
    /// The account.
    #[sqlx(rename = "user_id")]
    pub user: UserId,
    /// The device.
    #[sqlx(rename = "id")]
    pub device: DeviceId,
    /// The device's number.
    pub no: DeviceNo,
    /// Access tokens that expire at or before this Unix second are void. It changes when the device's session is ended.
    #[sqlx(rename = "tokens_void_to")]
    pub tokens_revoked_until: i64,
}

/// A wish to exchange a refresh token for the next one of its family.
#[derive(Clone, Copy, Debug)]
pub struct Refresh {
    /// SHA-256 of the changing half of the presented token.
    pub secret_hash: [u8; 32],
    /// The client's name for this wish, if it wants to be able to repeat it.
    pub key: Option<IdempotencyKey>,
    /// The next token.
    pub next: SessionGrant,
    /// Should the presented token turn out to be stolen: access tokens that expire at or before this second are void.
    pub revoked_until: i64,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The next token is good now, and the presented one is used.
    Rotated(SessionHolder),
    /// The token was exchanged a moment ago under the same key. The same answer is due.
    Repeated {
        /// Whose token it is.
        holder: SessionHolder,
        /// When it was exchanged.
        used_at: Timestamp,
        /// SHA-256 of the changing half of the device's current refresh token. The repeated answer has to contain this token.
        secret_hash: [u8; 32],
    },
    /// No such session, or it has expired, or the token was used just now.
    Refused,
    /// The token had been used before, so two have it. The device's session has been ended.
    Stolen(Address),
}

#[derive(FromRow)]
struct Session {
    #[sqlx(flatten)]
    holder: SessionHolder,
    secret_hash: Vec<u8>,
    expires_at: Timestamp,
}

impl Store {
    /// Gives a device of the account a new session, and ends the one it may have: that one's refresh token and tickets
    /// are forgotten, and its access tokens are void. The push token stays, since the device does. `None`, and nothing
    /// has changed, when the account has no such device.
    pub async fn log_in(&self, user: UserId, device: DeviceId, grant: &SessionGrant) -> Result<Option<SessionHolder>> {
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        // Held, so that it can't be removed before it has its session.
        let statement = tx.sql(
            "SELECT user_id, id, no, tokens_void_to FROM devices WHERE id = $1 AND user_id = $2",
            "SELECT user_id, id, no, tokens_void_to FROM devices WHERE id = $1 AND user_id = $2 FOR NO KEY UPDATE",
        );
        let holder: Option<SessionHolder> =
            on!(&mut tx, |db| sqlx::query_as(statement).bind(device).bind(user).fetch_optional(db))?;
        let Some(holder) = holder else { return Ok(None) };
        let revoked_until = revoke_tokens(&mut tx, holder.no, grant.access_expires_at).await?;
        open(&mut tx, holder.no, grant).await?;
        usage::mark(&mut tx, user, self.usage.day()).await?;
        tx.commit().await?;
        Ok(Some(SessionHolder { tokens_revoked_until: revoked_until.unwrap_or(holder.tokens_revoked_until), ..holder }))
    }

    /// Exchanges a refresh token.
    pub async fn refresh(&self, wish: &Refresh, now: Timestamp) -> Result<Refreshed> {
        // Tokens that never were must not keep the one writer busy.
        let statement = "SELECT device_no FROM sessions WHERE family = $1";
        let known: Option<DeviceNo> =
            reading!(self, |db| sqlx::query_scalar(statement).bind(&wish.next.family[..]).fetch_optional(db))?;
        let Some(no) = known else { return Ok(Refreshed::Refused) };
        let mut tx = self.begin_on(Rows::OfDevice(no)).await?;
        devices::lock(&mut tx, no).await?;
        let refreshed = match session_of(&mut tx, &wish.next.family).await? {
            Some(session) if session.expires_at > now => exchange::exchange(&mut tx, &session, wish, now).await?,
            _ => Refreshed::Refused,
        };
        match refreshed {
            Refreshed::Rotated(holder) if !self.usage.is_recorded(holder.user) => {
                usage::mark(&mut tx, holder.user, self.usage.day()).await?;
                tx.commit().await?;
                self.usage.set_recorded(holder.user);
            }
            _ => tx.commit().await?,
        }
        Ok(refreshed)
    }

    /// The device whose current refresh token this is, if it has not expired at `now`. Asking changes nothing.
    pub async fn session_holder(
        &self,
        family: &[u8; 16],
        secret_hash: &[u8; 32],
        now: Timestamp,
    ) -> Result<Option<SessionHolder>> {
        let statement = "SELECT d.user_id, d.id, d.no, d.tokens_void_to FROM sessions s JOIN devices d ON d.no = s.device_no \
                         WHERE s.family = $1 AND s.secret_hash = $2 AND s.expires_at > $3";
        reading!(self, |db| sqlx::query_as(statement)
            .bind(&family[..])
            .bind(&secret_hash[..])
            .bind(now)
            .fetch_optional(db))
    }

    /// Ends the device's session: its refresh token, its tickets and its push token are forgotten, and its access tokens
    /// that expire at or before the Unix second `revoked_until` are void. The device, its keys and its queued messages stay.
    pub async fn log_out(&self, no: DeviceNo, revoked_until: i64) -> Result<()> {
        let mut tx = self.begin_on(Rows::OfDevice(no)).await?;
        end(&mut tx, no, revoked_until).await?;
        tx.commit().await
    }

    /// Remembers a gateway ticket. Answers false when meanwhile its device has been removed or the access token it was
    /// asked for with has become void. To be awaited to the end.
    pub async fn issue_ticket(&self, ticket: NewTicket) -> Result<bool> {
        match &self.database {
            Database::Sqlite(_) => {
                self.tickets.issued.run(ticket, async |tickets| issue(self.begin().await?, tickets).await).await
            }
            Database::Postgres(_) => {
                let tx = self.begin_on(Rows::OfDevice(ticket.device)).await?;
                Ok(issue(tx, &[ticket]).await?.contains(&true))
            }
        }
    }

    /// Uses a gateway ticket up. `None` when it is unknown, used or expired, or its device is gone or logged out. To be
    /// awaited to the end.
    pub async fn redeem_ticket(&self, hash: &[u8; 32], now: Timestamp) -> Result<Option<SessionHolder>> {
        let statement = "SELECT device_no FROM gateway_tickets WHERE hash = $1";
        let known: Option<DeviceNo> =
            reading!(self, |db| sqlx::query_scalar(statement).bind(&hash[..]).fetch_optional(db))?;
        let Some(no) = known else { return Ok(None) };
        let presented = (*hash, now);
        match &self.database {
            Database::Sqlite(_) => {
                self.tickets.redeemed.run(presented, async |all| redeem(self.begin().await?, all).await).await
            }
            Database::Postgres(_) => {
                let tx = self.begin_on(Rows::OfDevice(no)).await?;
                Ok(redeem(tx, &[presented]).await?.pop().flatten())
            }
        }
    }

    /// Forgets refresh tokens that have expired, at most `limit`. Answers how many. None lives longer than until `longest`:
    /// one that would was issued while the clock was wrong.
    pub async fn expire_sessions(&self, now: Timestamp, longest: Timestamp, limit: u32) -> Result<u64> {
        let shorten = "UPDATE sessions SET expires_at = $1 WHERE expires_at > $3 AND device_no IN \
                       (SELECT device_no FROM sessions WHERE expires_at > $3 ORDER BY expires_at LIMIT $2)";
        let mut tx = self.begin().await?;
        let ahead = longest + CLOCK_TOLERANCE;
        run!(&mut tx, sqlx::query(shorten).bind(longest).bind(i64::from(limit)).bind(ahead))?;
        tx.commit().await?;
        // Compared twice, because a device may get a new session in between.
        let statement = "DELETE FROM sessions WHERE expires_at <= $1 AND device_no IN \
                         (SELECT device_no FROM sessions WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)";
        self.sweep(statement, now, limit).await
    }

    /// Forgets gateway tickets that have expired, or that a wrong clock has given a day or more, at most `limit`. Answers how
    /// many.
    pub async fn expire_tickets(&self, now: Timestamp, limit: u32) -> Result<u64> {
        let statement = "DELETE FROM gateway_tickets WHERE hash IN \
                         (SELECT hash FROM gateway_tickets WHERE expires_at <= $1 OR expires_at > $1 + 86400000 LIMIT $2)";
        self.sweep(statement, now, limit).await
    }

    /// Forgets which refresh tokens were used at or before `until`, at most `limit`. Answers how many.
    ///
    /// `until` lies at least [`REPEAT_WINDOW`] back: a token of a living session that is not remembered counts as stolen.
    pub async fn expire_refresh_uses(&self, until: Timestamp, limit: u32) -> Result<u64> {
        let statement = "DELETE FROM refresh_uses WHERE secret_hash IN \
                         (SELECT secret_hash FROM refresh_uses WHERE used_at <= $1 OR used_at > $1 + 86400000 LIMIT $2)";
        self.sweep(statement, until, limit).await
    }

    async fn sweep(&self, statement: &'static str, until: Timestamp, limit: u32) -> Result<u64> {
        let mut tx = self.begin().await?;
        let swept = run!(&mut tx, sqlx::query(statement).bind(until).bind(i64::from(limit)))?;
        tx.commit().await?;
        Ok(swept)
    }
}

async fn issue(mut tx: Tx, tickets: &[NewTicket]) -> Result<Vec<bool>> {
    let statement = tx.sql(
        "INSERT INTO gateway_tickets (hash, device_no, expires_at) \
         SELECT $1, no, $2 FROM devices WHERE no = $3 AND tokens_void_to < $4",
        "INSERT INTO gateway_tickets (hash, device_no, expires_at) \
         SELECT $1, no, $2 FROM devices WHERE no = $3 AND tokens_void_to < $4 FOR SHARE",
    );
    let mut issued = Vec::with_capacity(tickets.len());
    for NewTicket { hash, device, token_expires_at, expires_at } in tickets {
        let insert =
            run!(&mut tx, sqlx::query(statement).bind(&hash[..]).bind(expires_at).bind(device).bind(token_expires_at));
        issued.push(insert? == 1);
    }
    tx.commit().await?;
    Ok(issued)
}

async fn redeem(mut tx: Tx, presented: &[Presented]) -> Result<Vec<Option<SessionHolder>>> {
    let mut holders = Vec::with_capacity(presented.len());
    for (hash, now) in presented {
        let statement = "DELETE FROM gateway_tickets WHERE hash = $1 RETURNING device_no, expires_at";
        let ticket: Option<(DeviceNo, Timestamp)> =
            on!(&mut tx, |db| sqlx::query_as(statement).bind(&hash[..]).fetch_optional(db))?;
        holders.push(match ticket {
            Some((no, expires_at)) if expires_at > *now => {
                let statement = "SELECT user_id, id, no, tokens_void_to FROM devices WHERE no = $1";
                on!(&mut tx, |db| sqlx::query_as(statement).bind(no).fetch_optional(db))?
            }
            _ => None,
        });
    }
    tx.commit().await?;
    Ok(holders)
}

/// Gives the device this session in place of the one it may have.
pub(super) async fn open(tx: &mut Tx, no: DeviceNo, grant: &SessionGrant) -> Result<()> {
    let statement = "INSERT INTO sessions (device_no, family, secret_hash, expires_at) VALUES ($1, $2, $3, $4) \
                     ON CONFLICT (device_no) DO UPDATE SET family = excluded.family, \
                     secret_hash = excluded.secret_hash, expires_at = excluded.expires_at";
    run!(
        tx,
        sqlx::query(statement).bind(no).bind(&grant.family[..]).bind(&grant.secret_hash[..]).bind(grant.expires_at)
    )?;
    // Remembered rather than reckoned at log-out: the clock or the configured lifetime may be another one by then.
    let statement = tx.sql(
        "UPDATE devices SET tokens_issued_to = MAX(tokens_issued_to, $2, tokens_void_to + 1) WHERE no = $1",
        "UPDATE devices SET tokens_issued_to = GREATEST(tokens_issued_to, $2, tokens_void_to + 1) WHERE no = $1",
    );
    run!(tx, sqlx::query(statement).bind(no).bind(grant.access_expires_at))?;
    Ok(())
}

async fn session_of(tx: &mut Tx, family: &[u8; 16]) -> Result<Option<Session>> {
    let statement = "SELECT devices.user_id, devices.id, devices.no, devices.tokens_void_to, \
                     sessions.secret_hash, sessions.expires_at \
                     FROM sessions JOIN devices ON devices.no = sessions.device_no WHERE sessions.family = $1";
    on!(tx, |db| sqlx::query_as(statement).bind(&family[..]).fetch_optional(db))
}

/// Ends the device's session, if it has one, and voids its access tokens and tickets in any case. Its push token goes too.
async fn end(tx: &mut Tx, no: DeviceNo, revoked_until: i64) -> Result<()> {
    revoke_tokens(tx, no, revoked_until).await?;
    run!(tx, sqlx::query("DELETE FROM push_tokens WHERE device_no = $1").bind(no))?;
    Ok(())
}

/// Ends the device's session, if it has one, and voids its access tokens and tickets in any case. Answers up to which
/// second access tokens are void now; `None` when the device is gone.
async fn revoke_tokens(tx: &mut Tx, no: DeviceNo, revoked_until: i64) -> Result<Option<i64>> {
    tx.register_auth_change(&[no]);
    // First, so that whatever is about to be kept for this session waits, and then finds it ended. The number always
    // grows: gateway sockets notice by it that the session they began in has ended. It may be the second of a clock that was
    // wrong, and stays it, since a token of that clock would be good by then. What is issued until then says so.
    let statement = tx.sql(
        "UPDATE devices SET tokens_void_to = MAX(tokens_void_to + 1, tokens_issued_to, $2) WHERE no = $1 \
         RETURNING tokens_void_to",
        "UPDATE devices SET tokens_void_to = GREATEST(tokens_void_to + 1, tokens_issued_to, $2) WHERE no = $1 \
         RETURNING tokens_void_to",
    );
    let revoked_until = on!(tx, |db| sqlx::query_scalar(statement).bind(no).bind(revoked_until).fetch_optional(db))?;
    for statement in [
        "DELETE FROM sessions WHERE device_no = $1",
        "DELETE FROM refresh_uses WHERE device_no = $1",
        "DELETE FROM gateway_tickets WHERE device_no = $1",
    ] {
        run!(tx, sqlx::query(statement).bind(no))?;
    }
    Ok(revoked_until)
}
