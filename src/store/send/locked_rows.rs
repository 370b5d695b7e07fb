//! Acknowledged messages whose rows another session of the database holds: an operator's `SELECT … FOR UPDATE`, or a node
//! that is frozen in the middle of a group. They are left for later, so that the rest of the group doesn't wait for them.

use crate::model::ids::DeviceNo;
use crate::store::Result;
use crate::store::database::PostgresTx;
use crate::store::send::Locking;
use crate::store::send::postgres::SortedAcks;

/// Deletes those of the messages ($1 devices, $2 positions) that are not held. `OFFSET 0` and the comparison of whole rows
/// keep each look-up on the primary key, as in the statement that waits.
const DELETE_UNLOCKED: &str = "
    WITH free AS MATERIALIZED (
        SELECT found.place FROM unnest($1, $2) AS gone (device_no, position) CROSS JOIN LATERAL (
            SELECT m.ctid AS place FROM messages m
            WHERE (m.device_no, m.position) >= (gone.device_no, gone.position)
              AND (m.device_no, m.position) <= (gone.device_no, gone.position)
            OFFSET 0 FOR UPDATE SKIP LOCKED) found)
    DELETE FROM messages WHERE ctid = ANY (ARRAY (SELECT place FROM free))";

/// The devices of those that are still there.
const REMAINING_DEVICES: &str = "
    SELECT DISTINCT found.device_no FROM unnest($1, $2) AS gone (device_no, position) CROSS JOIN LATERAL (
        SELECT m.device_no FROM messages m
        WHERE (m.device_no, m.position) >= (gone.device_no, gone.position)
          AND (m.device_no, m.position) <= (gone.device_no, gone.position) OFFSET 0) found";

impl PostgresTx {
    /// Deletes acknowledged messages. Returns how many, and the devices of which some are held.
    pub(super) async fn delete_acked(&mut self, acks: &SortedAcks, locking: Locking) -> Result<(u64, Vec<DeviceNo>)> {
        let deleted = if locking == Locking::Wait { self.delete_once(acks).await? } else { 0 };
        self.delete_remaining(acks, deleted, locking).await
    }

    /// Deletes those that a first statement has left; it has deleted `deleted` of them.
    pub(super) async fn delete_remaining(
        &mut self,
        acks: &SortedAcks,
        deleted: u64,
        locking: Locking,
    ) -> Result<(u64, Vec<DeviceNo>)> {
        match locking {
            Locking::SkipLocked => self.delete_unlocked(acks).await,
            Locking::Wait if deleted < acks.1.len() as u64 => Ok((deleted + self.delete_once(acks).await?, Vec::new())),
            Locking::Wait => Ok((deleted, Vec::new())),
        }
    }

    /// Deletes acknowledged messages without waiting for any. Returns how many, and the devices of which some are still
    /// there: they are held, or were moved at this moment, as the correction of a clock does.
    async fn delete_unlocked(&mut self, (devices, positions): &SortedAcks) -> Result<(u64, Vec<DeviceNo>)> {
        if positions.is_empty() {
            return Ok((0, Vec::new()));
        }
        let deleted = self.run(sqlx::query(DELETE_UNLOCKED).bind(devices).bind(positions)).await?;
        if deleted == positions.len() as u64 {
            return Ok((deleted, Vec::new()));
        }
        let locked_devices: Vec<(DeviceNo,)> =
            self.all(sqlx::query_as(REMAINING_DEVICES).bind(devices).bind(positions)).await?;
        Ok((deleted, locked_devices.into_iter().map(|(device,)| device).collect()))
    }
}
