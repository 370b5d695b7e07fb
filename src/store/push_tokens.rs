//! Push tokens: how the push provider knows a device.

use crate::model::ids::DeviceNo;
use crate::store::{Result, Store};

impl Store {
    /// Remembers the device's push token in place of the one before. Answers false when the device has been removed.
    pub async fn set_push_token(&self, no: DeviceNo, token: &str) -> Result<bool> {
        let statement = "INSERT INTO push_tokens (device_no, token) SELECT no, $2 FROM devices WHERE no = $1 \
                         ON CONFLICT (device_no) DO UPDATE SET token = excluded.token";
        let done = sqlx::query(statement).bind(no).bind(token).execute(&self.write).await?;
        Ok(done.rows_affected() == 1)
    }
}
