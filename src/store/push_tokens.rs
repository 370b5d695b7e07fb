//! Push tokens: how the push provider knows a device.

use crate::model::ids::DeviceNo;
use crate::store::database::run;
use crate::store::{Result, Store};

impl Store {
    /// Remembers the push token of a device that called with an access token which expires at `token_expires_at`, in place
    /// of the one before. Answers false when meanwhile the device has been removed or that access token has become void:
    /// a log-out that forgets the push token is not outlived by one on its way.
    pub async fn set_push_token(&self, no: DeviceNo, token_expires_at: i64, token: &str) -> Result<bool> {
        let mut tx = self.begin().await?;
        // The row is held where others could end the session at this moment.
        let statement = tx.either(
            "INSERT INTO push_tokens (device_no, token) \
             SELECT no, $3 FROM devices WHERE no = $1 AND tokens_void_to < $2 \
             ON CONFLICT (device_no) DO UPDATE SET token = excluded.token",
            "INSERT INTO push_tokens (device_no, token) \
             SELECT no, $3 FROM devices WHERE no = $1 AND tokens_void_to < $2 FOR SHARE \
             ON CONFLICT (device_no) DO UPDATE SET token = excluded.token",
        );
        let stored = run!(&mut tx, sqlx::query(statement).bind(no).bind(token_expires_at).bind(token))? == 1;
        tx.commit().await?;
        Ok(stored)
    }
}
