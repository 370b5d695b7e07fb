//! Push tokens: how a push provider knows a device. Of all that a device may have, the last one counts.

use crate::clock::Timestamp;
use crate::model::ids::DeviceNo;
use crate::model::push::{PushTarget, Subscription};
use crate::store::database::{on, run};
use crate::store::shares::Rows;
use crate::store::{Result, Store};

const FCM: i32 = 0;
const APNS: i32 = 1;
const WEB_PUSH: i32 = 2;

impl Store {
    /// Remembers how to wake a device that called with an access token which expires at `token_expires_at`, in place
    /// of what was known before. Answers false when meanwhile the device has been removed or that access token has become
    /// void: a log-out that forgets the push token is not outlived by one on its way.
    pub async fn set_push_target(&self, no: DeviceNo, token_expires_at: i64, target: &PushTarget) -> Result<bool> {
        let (provider, keys) = match target {
            PushTarget::Fcm(_) => (FCM, None),
            PushTarget::Apns(_) => (APNS, None),
            PushTarget::WebPush(subscription) => (WEB_PUSH, Some((&subscription.p256dh[..], &subscription.auth[..]))),
        };
        let mut tx = self.begin_on(Rows::OfDevice(no)).await?;
        // The row is held where others could end the session at this moment.
        let statement = tx.sql(SET, SET_IN_POSTGRES);
        let stored = run!(
            &mut tx,
            sqlx::query(statement)
                .bind(no)
                .bind(token_expires_at)
                .bind(target.token())
                .bind(provider)
                .bind(keys.map(|keys| keys.0))
                .bind(keys.map(|keys| keys.1))
        )? == 1;
        tx.commit().await?;
        Ok(stored)
    }

    /// Forgets how to wake a device.
    pub async fn delete_push_target(&self, no: DeviceNo) -> Result<()> {
        let mut tx = self.begin_on(Rows::OfDevice(no)).await?;
        run!(&mut tx, sqlx::query("DELETE FROM push_tokens WHERE device_no = $1").bind(no))?;
        tx.commit().await
    }

    /// Forgets tokens that their provider has called dead. One that was replaced meanwhile is left alone. Answers how
    /// many are gone.
    pub async fn delete_dead_tokens(&self, dead: &[(DeviceNo, String)]) -> Result<u64> {
        let mut tx = self.begin().await?;
        let mut gone = 0;
        for (device, token) in dead {
            let statement = "DELETE FROM push_tokens WHERE device_no = $1 AND token = $2";
            gone += run!(&mut tx, sqlx::query(statement).bind(*device).bind(token))?;
        }
        tx.commit().await?;
        Ok(gone)
    }

    /// Writes down, to the hour, since when these targets have been unknown to their provider; `None` when it knows them
    /// again. A target that was replaced meanwhile is left alone.
    pub async fn mark_push_targets(&self, targets: &[(DeviceNo, String)], missing: Option<Timestamp>) -> Result<()> {
        if targets.is_empty() {
            return Ok(());
        }
        let hour = |at: Timestamp| Timestamp::from_seconds(at.seconds() / 3600 * 3600);
        let since = missing.map_or(Timestamp::from_seconds(0), hour);
        // In one order on all nodes, so that two never wait for each other.
        let mut targets: Vec<_> = targets.iter().collect();
        targets.sort_unstable();
        let mut tx = self.begin().await?;
        for (device, token) in targets {
            let statement = "UPDATE push_tokens SET missing_since = $3 WHERE device_no = $1 AND token = $2";
            run!(&mut tx, sqlx::query(statement).bind(*device).bind(token).bind(since))?;
        }
        tx.commit().await
    }

    /// The key of this name that all nodes share; `made`, if there is none yet.
    pub async fn server_key(&self, name: &str, made: &[u8]) -> Result<Vec<u8>> {
        let mut tx = self.begin().await?;
        let insert = "INSERT INTO server_keys (name, secret) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
        run!(&mut tx, sqlx::query(insert).bind(name).bind(made))?;
        let select = "SELECT secret FROM server_keys WHERE name = $1";
        let key = on!(&mut tx, |db| sqlx::query_scalar(select).bind(name).fetch_one(db))?;
        tx.commit().await?;
        Ok(key)
    }
}

/// What a row says; `None` if it was written by a later version of the server.
pub(super) fn target(
    provider: i32,
    token: String,
    p256dh: Option<Vec<u8>>,
    auth: Option<Vec<u8>>,
) -> Option<PushTarget> {
    Some(match (provider, p256dh, auth) {
        (FCM, ..) => PushTarget::Fcm(token),
        (APNS, ..) => PushTarget::Apns(token),
        (WEB_PUSH, Some(p256dh), Some(auth)) => PushTarget::WebPush(Subscription { endpoint: token, p256dh, auth }),
        _ => return None,
    })
}

const SET: &str = "\
    INSERT INTO push_tokens (device_no, token, provider, p256dh, auth) \
    SELECT no, $3, $4, $5, $6 FROM devices WHERE no = $1 AND tokens_void_to < $2 \
    ON CONFLICT (device_no) DO UPDATE SET \
        provider = excluded.provider, p256dh = excluded.p256dh, auth = excluded.auth, \
        pushed_to = CASE WHEN push_tokens.token = excluded.token THEN push_tokens.pushed_to ELSE 0 END, \
        token = excluded.token, missing_since = 0";

const SET_IN_POSTGRES: &str = "\
    INSERT INTO push_tokens (device_no, token, provider, p256dh, auth) \
    SELECT no, $3, $4, $5, $6 FROM devices WHERE no = $1 AND tokens_void_to < $2 FOR SHARE \
    ON CONFLICT (device_no) DO UPDATE SET \
        provider = excluded.provider, p256dh = excluded.p256dh, auth = excluded.auth, \
        pushed_to = CASE WHEN push_tokens.token = excluded.token THEN push_tokens.pushed_to ELSE 0 END, \
        token = excluded.token, missing_since = 0";
