//! How much at a time: bytes of bodies, places at a processor, connections.
//!
//! A resource limit has a total, a share for each scope of a subject, and a reserve that only small holders may use. Requests
//! that find no room wait in a bounded queue, in which subjects take turns: the next unit goes to the subject that was
//! served the longest time ago, and a full queue drops a request of the subject that has the most in it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::limits::subject::{Key, LimitSubject, Scope};

/// Scopes that an amount can have shares for.
const MAX_SHARES: usize = 3;

/// Other holders have taken all of it, or this subject has taken its share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// What an amount allows. The unit is the user's: bytes, KiB, places.
#[derive(Clone, Debug)]
pub struct ResourceLimitConfig {
    /// Units in all.
    pub total: u32,
    /// The most that the holders of one scope may have together; at most three scopes.
    pub shares: Vec<(Scope, u32)>,
    /// The last units of the total, for holders of at most `small` units …
    pub reserve: u32,
    /// … each.
    pub small: u32,
    /// Requests that may wait at a time.
    pub max_waiting: usize,
    /// Who takes turns while they wait.
    pub fairness: Scope,
    /// True if units that become free are kept for the request whose turn it is. Otherwise it can be overtaken by smaller
    /// ones, without end.
    pub in_turn: bool,
}

impl ResourceLimitConfig {
    /// A total without shares, reserve or queue.
    pub fn total(total: u32) -> Self {
        Self { total, shares: Vec::new(), reserve: 0, small: 0, max_waiting: 0, fairness: Scope::Own, in_turn: false }
    }
}

/// Something of which there is a limited amount. Cloning gives the same amount.
#[derive(Clone)]
pub struct ResourceLimit {
    inner: Arc<Inner>,
}

struct Inner {
    config: ResourceLimitConfig,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    taken: u32,
    /// Units by key; a key without any has no entry.
    held: HashMap<Key, u32>,
    /// In the order of their arrival.
    waiting: Vec<WaitingRequest>,
    /// When a subject that still waits was served last.
    served: HashMap<Key, u64>,
    turn: u64,
}

/// A request that has found no room.
struct WaitingRequest {
    subject: LimitSubject,
    charged: Charged,
    turn: Key,
    /// What its holder has already.
    has: u32,
    units: u32,
    answer: oneshot::Sender<ResourcePermit>,
}

/// The keys that a subject's units count for, with the share of each.
type Charged = [Option<(Key, u32)>; MAX_SHARES];

impl ResourceLimit {
    /// All of it is free.
    pub fn new(config: ResourceLimitConfig) -> Self {
        debug_assert!(config.shares.len() <= MAX_SHARES);
        Self { inner: Arc::new(Inner { config, state: Mutex::default() }) }
    }

    /// A holder that has nothing yet.
    pub fn holder(&self, subject: LimitSubject) -> ResourcePermit {
        ResourcePermit { of: self.clone(), subject, units: 0 }
    }

    /// Takes units that can be had at once.
    pub fn try_take(&self, subject: LimitSubject, units: u32) -> Option<ResourcePermit> {
        let mut held = self.holder(subject);
        held.try_grow(units).then_some(held)
    }

    /// Takes units, and waits for them in turn, no longer than `patience`.
    pub async fn take(&self, subject: LimitSubject, units: u32, patience: Duration) -> Result<ResourcePermit, NoRoom> {
        let mut held = self.holder(subject);
        held.grow_to(units, patience).await?;
        Ok(held)
    }

    /// Units that are taken.
    pub fn taken(&self) -> u32 {
        self.state().taken
    }

    fn charged(&self, subject: LimitSubject) -> Charged {
        let mut shares = self.inner.config.shares.iter();
        std::array::from_fn(|_| shares.next().and_then(|(scope, share)| Some((subject.key(*scope)?, *share))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, subject: LimitSubject, units: u32) {
        let charged = self.charged(subject);
        let mut state = self.state();
        state.release(&charged, units);
        self.serve(state);
    }

    /// Serves those that wait, and unlocks.
    fn serve(&self, mut state: MutexGuard<'_, State>) {
        let granted = if state.waiting.is_empty() { Vec::new() } else { self.grant(&mut state) };
        drop(state);
        // After the unlock: a request that has stopped waiting drops what it is sent here, which locks again.
        granted.into_iter().for_each(|(answer, held)| drop(answer.send(held)));
    }

    /// Serves those that wait, for as long as one of them fits.
    fn grant(&self, state: &mut State) -> Vec<(oneshot::Sender<ResourcePermit>, ResourcePermit)> {
        state.waiting.retain(|waiting| !waiting.answer.is_closed());
        let mut granted = Vec::new();
        while let Some(index) = state.next(&self.inner.config) {
            let WaitingRequest { subject, charged, turn, units, answer, .. } = state.waiting.remove(index);
            state.take(&charged, units);
            state.turn += 1;
            state.served.insert(turn, state.turn);
            granted.push((answer, ResourcePermit { of: self.clone(), subject, units }));
        }
        let State { served, waiting, .. } = state;
        served.retain(|key, _| waiting.iter().any(|waiting| waiting.turn == *key));
        granted
    }
}

impl State {
    fn fits(&self, config: &ResourceLimitConfig, charged: &Charged, has: u32, units: u32) -> bool {
        self.has_room(config, has, units) && self.is_within_shares(charged, units)
    }

    fn has_room(&self, config: &ResourceLimitConfig, has: u32, units: u32) -> bool {
        let is_small = has.saturating_add(units) <= config.small;
        let room = if is_small { config.total } else { config.total.saturating_sub(config.reserve) };
        self.taken.saturating_add(units) <= room
    }

    fn is_within_shares(&self, charged: &Charged, units: u32) -> bool {
        charged.iter().flatten().all(|(key, share)| self.of(*key).saturating_add(units) <= *share)
    }

    /// True if a waiting request needs units that a holder with these keys would take. For [`ResourceLimitConfig::in_turn`].
    fn is_owed_to_others(&self, charged: &Charged) -> bool {
        let counts_for = |key: Key| charged.iter().flatten().any(|(own, _)| *own == key);
        self.waiting.iter().filter(|waiting| !waiting.answer.is_closed()).any(|waiting| {
            let mut exceeded = waiting
                .charged
                .iter()
                .flatten()
                .filter(|(key, share)| self.of(*key).saturating_add(waiting.units) > *share);
            // A request within its shares waits for the total, which every holder takes from. One that lacks a share waits for
            // those alone whose units count for the same share.
            match exceeded.next() {
                None => true,
                Some((key, _)) => counts_for(*key) || exceeded.any(|(key, _)| counts_for(*key)),
            }
        })
    }

    fn of(&self, key: Key) -> u32 {
        self.held.get(&key).copied().unwrap_or_default()
    }

    fn take(&mut self, charged: &Charged, units: u32) {
        self.taken += units;
        charged.iter().flatten().for_each(|(key, _)| *self.held.entry(*key).or_default() += units);
    }

    fn release(&mut self, charged: &Charged, units: u32) {
        self.taken -= units;
        for (key, _) in charged.iter().flatten() {
            let Entry::Occupied(mut held) = self.held.entry(*key) else { continue };
            *held.get_mut() -= units;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }

    /// Which request that waits is served next: of those that fit, the one whose subject was served the longest time ago.
    /// With [`ResourceLimitConfig::in_turn`] the total need not have room for it yet; the others then wait as well.
    fn next(&self, config: &ResourceLimitConfig) -> Option<usize> {
        let fits = |w: &WaitingRequest| {
            self.is_within_shares(&w.charged, w.units) && (config.in_turn || self.has_room(config, w.has, w.units))
        };
        let fitting = self.waiting.iter().enumerate().filter(|(_, waiting)| fits(waiting));
        let next = fitting.min_by_key(|(index, w)| (self.served.get(&w.turn).copied().unwrap_or_default(), *index));
        next.filter(|(_, waiting)| self.has_room(config, waiting.has, waiting.units)).map(|(index, _)| index)
    }

    /// Makes room for one more request of this subject in the queue. Returns false if it is full and
    /// no other subject has at least two requests more in it.
    fn make_room(&mut self, turn: Key, max_waiting: usize) -> bool {
        self.waiting.retain(|waiting| !waiting.answer.is_closed());
        if self.waiting.len() < max_waiting {
            return true;
        }
        let mut counts = HashMap::<Key, usize>::new();
        self.waiting.iter().for_each(|waiting| *counts.entry(waiting.turn).or_default() += 1);
        let own = counts.get(&turn).copied().unwrap_or_default();
        let Some((most, count)) = counts.into_iter().max_by_key(|(_, count)| *count) else { return false };
        let last = self.waiting.iter().rposition(|waiting| waiting.turn == most);
        // Dropping the sender tells the request that there is no room.
        last.filter(|_| count > own + 1).map(|last| self.waiting.remove(last)).is_some()
    }
}

impl fmt::Debug for ResourceLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ResourceLimit({} of {})", self.taken(), self.inner.config.total)
    }
}

/// Ends the waiting of a request, however it ends. With [`ResourceLimitConfig::in_turn`] those behind it may have waited for it alone.
struct EndOfWait<'a>(&'a ResourceLimit);

impl Drop for EndOfWait<'_> {
    fn drop(&mut self) {
        self.0.serve(self.0.state());
    }
}

/// What one holder has taken. Dropping it gives it back.
pub struct ResourcePermit {
    of: ResourceLimit,
    subject: LimitSubject,
    units: u32,
}

impl ResourcePermit {
    /// Grows to `units`, and waits for its turn, no longer than `patience`. On an error the holder keeps what it has.
    pub async fn grow_to(&mut self, units: u32, patience: Duration) -> Result<(), NoRoom> {
        let missing = units.saturating_sub(self.units);
        if self.try_grow(missing) {
            return Ok(());
        }
        let answer = self.queue(missing).ok_or(NoRoom)?;
        let amount = self.of.clone();
        let _end = EndOfWait(&amount);
        let Ok(Ok(mut more)) = timeout(patience, answer).await else { return Err(NoRoom) };
        self.units += std::mem::take(&mut more.units);
        Ok(())
    }

    /// Gives back what goes beyond `units`.
    pub fn shrink_to(&mut self, units: u32) {
        let excess = self.units.saturating_sub(units);
        if excess > 0 {
            self.units -= excess;
            self.of.release(self.subject, excess);
        }
    }

    /// Takes so many more that it has `units`, if they can be had at once.
    pub fn try_grow_to(&mut self, units: u32) -> bool {
        self.try_grow(units.saturating_sub(self.units))
    }

    /// Units that it has.
    pub fn units(&self) -> u32 {
        self.units
    }

    fn try_grow(&mut self, units: u32) -> bool {
        if units == 0 {
            return true;
        }
        let charged = self.of.charged(self.subject);
        let mut state = self.of.state();
        let config = &self.of.inner.config;
        let fits =
            state.fits(config, &charged, self.units, units) && !(config.in_turn && state.is_owed_to_others(&charged));
        if fits {
            state.take(&charged, units);
            self.units += units;
        }
        fits
    }

    fn queue(&self, units: u32) -> Option<oneshot::Receiver<ResourcePermit>> {
        let config = &self.of.inner.config;
        let turn = self.subject.key(config.fairness).or_else(|| self.subject.key(Scope::Own)).unwrap_or(Key(0));
        let (answer, answered) = oneshot::channel();
        let charged = self.of.charged(self.subject);
        let mut state = self.of.state();
        // A request that is above its share, or finds the queue full, is refused at once.
        let can_fit = charged.iter().flatten().all(|(_, share)| self.units.saturating_add(units) <= *share);
        if !can_fit || !state.make_room(turn, config.max_waiting) {
            return None;
        }
        let (subject, has) = (self.subject, self.units);
        state.waiting.push(WaitingRequest { subject, charged, turn, has, units, answer });
        // Room may have been made since it was looked for.
        let granted = self.of.grant(&mut state);
        drop(state);
        granted.into_iter().for_each(|(answer, held)| drop(answer.send(held)));
        Some(answered)
    }
}

impl Drop for ResourcePermit {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

impl fmt::Debug for ResourcePermit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Held({})", self.units)
    }
}

#[cfg(test)]
mod tests;
