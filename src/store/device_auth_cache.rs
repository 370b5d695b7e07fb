//! Where devices stand, which every request asks first.
//!
//! Questions that come at the same time are asked in one statement. With SQLite, where no other process writes, answers are
//! also remembered, and a change can't be missed: a transaction registers it before it commits, and only once the commit
//! is known to have happened, or not, are answers remembered again. An answer that was read beside a change is not
//! remembered at all, and what was remembered of the device before is not used any more when the change returns.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::ids::{DeviceId, DeviceNo};
use crate::store::Result;
use crate::store::batcher::QueryBatcher;
use crate::store::devices::DeviceAuth;

/// Statements at the same time that ask for the auth of devices.
const CONCURRENT_BATCHES: usize = 2;
/// Questions in one statement.
const QUERIES_PER_BATCH: usize = 128;
/// Parts of the memory, each with a lock of its own.
const SHARDS: usize = 16;
/// Devices that are remembered in one part. A full one is emptied: what is asked for often comes back at once.
const DEVICES_IN_SHARD: usize = 4096;
/// Counters of changes. Devices that share one forget together.
const COUNTERS: usize = 4096;

/// What is asked and what is remembered. Cloning gives the same.
#[derive(Clone)]
pub(super) struct DeviceAuthCache {
    batcher: Arc<QueryBatcher<DeviceId, Option<DeviceAuth>>>,
    /// `None` when other nodes may change the database.
    cache: Option<Arc<Cache>>,
}

impl DeviceAuthCache {
    /// `is_caching` is only for a database that no other process writes to.
    pub(super) fn new(is_caching: bool) -> Self {
        let cache = is_caching.then(Arc::<Cache>::default);
        Self { batcher: Arc::new(QueryBatcher::new(CONCURRENT_BATCHES, QUERIES_PER_BATCH)), cache }
    }

    /// The auth of `device`; `load` answers for many at once, in their order.
    pub(super) async fn of(
        &self,
        device: DeviceId,
        load: impl AsyncFnOnce(&[DeviceId]) -> Result<Vec<Option<DeviceAuth>>>,
    ) -> Result<Option<DeviceAuth>> {
        let Some(cache) = &self.cache else { return self.batcher.run(device, load).await };
        if let Some(device_auth) = cache.get(device) {
            return Ok(Some(device_auth));
        }
        let quiescent_point = cache.quiescent_point();
        let device_auth = self.batcher.run(device, load).await?;
        if let (Some(quiescent_point), Some(device_auth)) = (quiescent_point, device_auth) {
            cache.insert(device, device_auth, quiescent_point);
        }
        Ok(device_auth)
    }

    /// The changes of one transaction that is about to begin.
    pub(super) fn changes(&self) -> AuthChanges {
        AuthChanges { cache: self.cache.clone(), devices: Vec::new(), is_uncertain: false }
    }
}

/// A moment at which no change was under way.
#[derive(Clone, Copy, PartialEq, Eq)]
struct QuiescentPoint(u64);

#[derive(Default)]
struct Cache {
    shards: [Mutex<HashMap<DeviceId, CachedAuth>>; SHARDS],
    counters: Counters,
    /// Transactions that have registered a change.
    begun: AtomicU64,
    /// Those of them whose end is known.
    ended: AtomicU64,
}

struct Counters(Box<[AtomicU64]>);

impl Default for Counters {
    fn default() -> Self {
        Self((0..COUNTERS).map(|_| AtomicU64::default()).collect())
    }
}

struct CachedAuth {
    device_auth: DeviceAuth,
    /// Of the device's counter, when it was read.
    changes: u64,
}

impl Cache {
    fn get(&self, device: DeviceId) -> Option<DeviceAuth> {
        let shard = self.shard(device);
        let found = shard.get(&device)?;
        (found.changes == self.change_count(found.device_auth.no)).then_some(found.device_auth)
    }

    /// `None` while a change is under way, or when one has been given up without its end being known.
    fn quiescent_point(&self) -> Option<QuiescentPoint> {
        let ended = self.ended.load(Ordering::SeqCst);
        let begun = self.begun.load(Ordering::SeqCst);
        (ended == begun).then_some(QuiescentPoint(begun))
    }

    /// Remembers what was read since `quiescent_point`, unless a change has begun in between.
    fn insert(&self, device: DeviceId, device_auth: DeviceAuth, quiescent_point: QuiescentPoint) {
        // Before the look at `begun`: a change that begins after it raises the counter later.
        let changes = self.change_count(device_auth.no);
        if self.begun.load(Ordering::SeqCst) != quiescent_point.0 {
            return;
        }
        let mut shard = self.shard(device);
        if shard.len() >= DEVICES_IN_SHARD {
            shard.clear();
        }
        shard.insert(device, CachedAuth { device_auth, changes });
    }

    fn change_count(&self, no: DeviceNo) -> u64 {
        self.counter(no).load(Ordering::SeqCst)
    }

    fn counter(&self, no: DeviceNo) -> &AtomicU64 {
        &self.counters.0[(no.0.unsigned_abs() % COUNTERS as u64) as usize]
    }

    /// No code panics while it holds a part.
    fn shard(&self, device: DeviceId) -> MutexGuard<'_, HashMap<DeviceId, CachedAuth>> {
        // Ids are random, so any of their bytes will do.
        let shard = &self.shards[usize::from(device.as_bytes()[15]) % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a transaction changes about devices. It has to live as long as the transaction.
pub(super) struct AuthChanges {
    cache: Option<Arc<Cache>>,
    devices: Vec<DeviceNo>,
    /// Whether the transaction may be committed or not; it is not known yet.
    is_uncertain: bool,
}

impl AuthChanges {
    /// Registers that the transaction changes where these devices stand. Before the commit.
    pub(super) fn register(&mut self, devices: &[DeviceNo]) {
        let Some(cache) = &self.cache else { return };
        if self.devices.is_empty() && !devices.is_empty() {
            cache.begun.fetch_add(1, Ordering::SeqCst);
        }
        self.devices.extend(devices);
    }

    /// The commit begins. If it is given up before [`AuthChanges::ended`], nothing is remembered from then on.
    pub(super) fn committing(&mut self) {
        self.is_uncertain = true;
    }

    /// The transaction has ended, in one way or the other.
    pub(super) fn ended(&mut self) {
        self.is_uncertain = false;
    }
}

impl Drop for AuthChanges {
    /// A transaction that is dropped before its commit is rolled back, so its end is known as well.
    fn drop(&mut self) {
        let Some(cache) = &self.cache else { return };
        if self.devices.is_empty() {
            return;
        }
        for device in &self.devices {
            cache.counter(*device).fetch_add(1, Ordering::SeqCst);
        }
        if !self.is_uncertain {
            cache.ended.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::UserId;

    const NO: DeviceNo = DeviceNo(7);

    fn device() -> DeviceId {
        DeviceId::from_bytes(&[7; 16]).unwrap()
    }

    fn device_auth(tokens_revoked_until: i64) -> DeviceAuth {
        DeviceAuth { no: NO, user: UserId::from_bytes(&[1; 16]).unwrap(), is_primary: true, tokens_revoked_until }
    }

    /// What the cache says while the database says `read`; `None` when it doesn't ask it.
    async fn asked(device_auth_cache: &DeviceAuthCache, read: i64) -> (i64, bool) {
        let mut is_asked = false;
        let found = device_auth_cache.of(device(), async |_| {
            is_asked = true;
            Ok(vec![Some(device_auth(read))])
        });
        let tokens_revoked_until = found.await.unwrap().unwrap().tokens_revoked_until;
        (tokens_revoked_until, is_asked)
    }

    fn change(device_auth_cache: &DeviceAuthCache) -> AuthChanges {
        let mut changes = device_auth_cache.changes();
        changes.register(&[NO]);
        changes
    }

    #[tokio::test]
    async fn what_was_read_once_is_not_asked_again_until_it_changes() {
        let device_auth_cache = DeviceAuthCache::new(true);
        assert_eq!(asked(&device_auth_cache, 1).await, (1, true));
        assert_eq!(asked(&device_auth_cache, 2).await, (1, false));
        drop(change(&device_auth_cache));
        assert_eq!(asked(&device_auth_cache, 2).await, (2, true));
        assert_eq!(asked(&device_auth_cache, 3).await, (2, false));
    }

    #[tokio::test]
    async fn what_is_read_beside_a_change_is_not_remembered() {
        let device_auth_cache = DeviceAuthCache::new(true);
        let mut changes = None;
        let found = device_auth_cache.of(device(), async |_| {
            changes = Some(change(&device_auth_cache));
            Ok(vec![Some(device_auth(1))])
        });
        found.await.unwrap();
        assert_eq!(asked(&device_auth_cache, 1).await, (1, true), "begun in between");
        drop(changes);
        assert_eq!(asked(&device_auth_cache, 2).await, (2, true), "read while the change was under way");
        assert_eq!(asked(&device_auth_cache, 3).await, (2, false));
    }

    #[tokio::test]
    async fn a_change_that_came_and_went_during_the_reading_is_noticed() {
        let device_auth_cache = DeviceAuthCache::new(true);
        let found = device_auth_cache.of(device(), async |_| {
            drop(change(&device_auth_cache));
            Ok(vec![Some(device_auth(1))])
        });
        found.await.unwrap();
        assert_eq!(asked(&device_auth_cache, 2).await, (2, true));
    }

    #[tokio::test]
    async fn after_a_commit_with_an_unknown_result_nothing_is_cached() {
        let device_auth_cache = DeviceAuthCache::new(true);
        assert_eq!(asked(&device_auth_cache, 0).await, (0, true));
        let mut given_up = change(&device_auth_cache);
        given_up.committing();
        drop(given_up);
        assert_eq!(asked(&device_auth_cache, 1).await, (1, true));
        assert_eq!(asked(&device_auth_cache, 2).await, (2, true));

        let device_auth_cache = DeviceAuthCache::new(true);
        let mut known = change(&device_auth_cache);
        known.committing();
        known.ended();
        drop(known);
        assert_eq!(asked(&device_auth_cache, 1).await, (1, true));
        assert_eq!(asked(&device_auth_cache, 2).await, (1, false));
    }

    #[tokio::test]
    async fn nothing_is_remembered_of_a_database_that_others_write_to() {
        let device_auth_cache = DeviceAuthCache::new(false);
        assert_eq!(asked(&device_auth_cache, 1).await, (1, true));
        assert_eq!(asked(&device_auth_cache, 2).await, (2, true));
    }
}
