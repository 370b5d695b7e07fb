//! What happens to a refresh token that a client presents: it is exchanged, repeated, refused or taken for stolen.

use crate::clock::Timestamp;
use crate::model::ids::{Address, DeviceNo, IdempotencyKey};
use crate::store::Result;
use crate::store::database::{Tx, on, run};
use crate::store::sessions::{RACE_WINDOW, REPEAT_WINDOW, Refresh, Refreshed, Session, end, open};

/// The presented token belongs to this living session: it is its current one, or one that was exchanged before.
pub(super) async fn exchange(tx: &mut Tx, session: &Session, wish: &Refresh, now: Timestamp) -> Result<Refreshed> {
    let holder = session.holder;
    if session.secret_hash == wish.secret_hash {
        open(tx, holder.no, &wish.next).await?;
        remember_use(tx, holder.no, wish, now).await?;
        return Ok(Refreshed::Rotated(holder));
    }
    let statement = "SELECT idempotency_key, used_at FROM refresh_uses WHERE secret_hash = $1 AND device_no = $2";
    let used: Option<(Option<IdempotencyKey>, Timestamp)> =
        on!(tx, |db| sqlx::query_as(statement).bind(&wish.secret_hash[..]).bind(holder.no).fetch_optional(db))?;
    if let Some((key, used_at)) = used {
        let is_same_wish = wish.key.is_some() && wish.key == key;
        if is_same_wish && used_at > now - REPEAT_WINDOW {
            // No token has a hash of another length, so none fits it.
            let secret_hash = session.secret_hash[..].try_into().unwrap_or_default();
            return Ok(Refreshed::Repeated { holder, used_at, secret_hash });
        }
        if used_at > now - RACE_WINDOW {
            return Ok(Refreshed::Refused);
        }
    }
    end(tx, holder.no, wish.revoked_until).await?;
    Ok(Refreshed::Stolen(Address { user: holder.user, device: holder.no }))
}

async fn remember_use(tx: &mut Tx, no: DeviceNo, wish: &Refresh, now: Timestamp) -> Result<()> {
    let statement =
        "INSERT INTO refresh_uses (secret_hash, device_no, idempotency_key, used_at) VALUES ($1, $2, $3, $4)";
    run!(tx, sqlx::query(statement).bind(&wish.secret_hash[..]).bind(no).bind(wish.key).bind(now))?;
    Ok(())
}
