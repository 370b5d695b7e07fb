//! Decides about the sends of a group: which are repeats, which messages need room, and what is queued. Pure.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::Duration;

use crate::model::ids::{Address, DeviceNo, IdempotencyKey};
use crate::model::message::{Outcome, RefusalReason, Refused, Replay, SendRequest, SendResult};
use crate::store::inbox_limiter::{Admission, Candidate};
use crate::store::notices::{Counts, RetractedRefusals};
use crate::store::outcome::{self, Queued};
use crate::store::send::{GroupContext, PreviousSend};

/// The `Retry-After` of an outcome that a repeat can't change.
const SHORTEST_WAIT: Duration = Duration::from_secs(60);

/// What a send is, compared with former sends and with the devices that there are.
pub(super) enum SendCase<'a> {
    /// It is left for a later group.
    Deferred,
    /// A repeat that queues nothing. It wakes the receivers once more: the node that stored the first send may have died
    /// before it could.
    Repeat { outcome: Outcome, replay: Replay, receivers: Vec<Address> },
    /// The same as another send of the group.
    Duplicate { of: usize, replay: Replay },
    /// No repeat. These messages are queued if there is room.
    New { outcome: Outcome, queued: Vec<Queued<'a>> },
    /// A repeat of a send of which messages had been refused. These are queued if there is room.
    RetryRefused { outcome: Outcome, queued: Vec<Queued<'a>>, previous: &'a PreviousSend },
}

impl<'a> SendCase<'a> {
    fn queued(&self) -> &[Queued<'a>] {
        match self {
            Self::New { queued, .. } | Self::RetryRefused { queued, .. } => queued,
            Self::Deferred | Self::Repeat { .. } | Self::Duplicate { .. } => &[],
        }
    }
}

/// The decision about a group, before anything is written.
#[derive(Default)]
pub(super) struct Evaluation<'a> {
    /// An answer for each send that was evaluated.
    pub(super) sent: Vec<Option<SendResult>>,
    /// The messages to queue, each with its send.
    pub(super) rows: Vec<(&'a SendRequest, Queued<'a>)>,
    /// The sends that are no repeats.
    pub(super) new_sends: Vec<NewSend<'a>>,
    /// Outcomes that change with a repeat.
    pub(super) changed: Vec<Changed<'a>>,
    /// How many messages were refused for each device for the first time.
    pub(super) refused: Counts,
    /// How many messages for each device are queued now that had been refused. See [`RetractedRefusals`].
    pub(super) retracted: RetractedRefusals,
}

/// A repeat that changes an outcome.
pub(super) struct Changed<'a> {
    pub(super) send: &'a SendRequest,
    pub(super) outcome: Vec<u8>,
}

/// A send that is no repeat.
pub(super) struct NewSend<'a> {
    pub(super) send: &'a SendRequest,
    pub(super) outcome: Outcome,
    /// Those of the group's messages that are its own.
    pub(super) rows: Range<usize>,
}

/// Compares each send with former sends and with the devices that there are, except those that are left for later.
pub(super) fn classify<'a>(
    sends: &'a [SendRequest],
    found: &'a GroupContext,
    is_deferred: impl Fn(&SendRequest) -> bool,
) -> Vec<SendCase<'a>> {
    let mut first: HashMap<(DeviceNo, IdempotencyKey), usize> = HashMap::new();
    let case = |(n, send): (usize, &'a SendRequest)| {
        if is_deferred(send) {
            return SendCase::Deferred;
        }
        let id = (send.sender.no, send.key);
        let of = *first.entry(id).or_insert(n);
        let previous = found.previous_sends.get(&id);
        let digest = previous.map_or(sends[of].digest, |previous| previous.digest);
        let replay = if digest == send.digest { Replay::SameBody } else { Replay::OtherBody };
        match previous {
            _ if of != n => SendCase::Duplicate { of, replay },
            Some(previous) if replay == Replay::SameBody && !previous.outcome.refused.is_empty() => {
                let (outcome, queued) = outcome::retry_refused(send, &previous.outcome, &found.devices);
                SendCase::RetryRefused { outcome, queued, previous }
            }
            Some(previous) => {
                let (_, queued) = outcome::match_devices(send, &found.devices);
                SendCase::Repeat { outcome: previous.outcome.clone(), replay, receivers: addresses(&queued) }
            }
            None => {
                let (outcome, queued) = outcome::match_devices(send, &found.devices);
                SendCase::New { outcome, queued }
            }
        }
    };
    sends.iter().enumerate().map(case).collect()
}

fn addresses(queued: &[Queued<'_>]) -> Vec<Address> {
    queued.iter().map(|row| Address { user: row.user, device: row.device }).collect()
}

/// The messages that need room, in order. Messages to an account that gets too many sends at the moment are left out.
pub(super) fn candidates(sends: &[SendRequest], cases: &[SendCase<'_>]) -> Vec<Candidate> {
    let of_send = |(send, case): (&SendRequest, &SendCase<'_>)| {
        let sender = send.sender.user;
        let asking = case.queued().iter().filter(|row| row.throttled_for.is_none());
        asking
            .map(|row| Candidate { user: row.user, device: row.device, sender, bytes: row.sealed.0.len() as u64 })
            .collect::<Vec<_>>()
    };
    sends.iter().zip(cases).flat_map(of_send).collect()
}

/// The sends with a message for one of these devices.
pub(super) fn waiting_for(
    sends: &[SendRequest],
    cases: &[SendCase<'_>],
    devices: &HashSet<DeviceNo>,
) -> Vec<(DeviceNo, IdempotencyKey)> {
    let waits = |case: &SendCase<'_>| case.queued().iter().any(|row| devices.contains(&row.device));
    let waiting = sends.iter().zip(cases).filter(|(_, case)| waits(case));
    waiting.map(|(send, _)| (send.sender.no, send.key)).collect()
}

/// Decides what is queued. `admissions` are those on the candidates, in their order.
pub(super) fn evaluate<'a>(
    sends: &'a [SendRequest],
    cases: Vec<SendCase<'a>>,
    admissions: impl IntoIterator<Item = Admission>,
) -> Evaluation<'a> {
    let mut admissions = admissions.into_iter();
    let mut evaluation = Evaluation { sent: Vec::with_capacity(sends.len()), ..Evaluation::default() };
    for (send, case) in sends.iter().zip(cases) {
        let sent = match case {
            SendCase::Deferred => None,
            SendCase::Repeat { outcome, replay, receivers } => {
                let retry_after = (!outcome.refused.is_empty()).then_some(SHORTEST_WAIT);
                Some(SendResult { outcome, receivers, replay: Some(replay), retry_after })
            }
            SendCase::Duplicate { of, replay } => {
                evaluation.sent[of].clone().map(|first| SendResult { replay: Some(replay), ..first })
            }
            SendCase::New { outcome, queued } => Some(evaluation.add(send, outcome, queued, None, &mut admissions)),
            SendCase::RetryRefused { outcome, queued, previous } => {
                Some(evaluation.add(send, outcome, queued, Some(previous), &mut admissions))
            }
        };
        evaluation.sent.push(sent);
    }
    evaluation
}

impl<'a> Evaluation<'a> {
    /// True when there is nothing to write but messages and new outcomes.
    pub(super) fn is_plain(&self) -> bool {
        self.changed.is_empty() && self.refused.is_empty() && self.retracted.is_empty()
    }

    /// Queues the messages for which there is room, and records the rest as refused.
    fn add(
        &mut self,
        send: &'a SendRequest,
        mut outcome: Outcome,
        queued: Vec<Queued<'a>>,
        previous: Option<&PreviousSend>,
        admissions: &mut impl Iterator<Item = Admission>,
    ) -> SendResult {
        let first = self.rows.len();
        let (mut receivers, mut retry_after) = (Vec::with_capacity(queued.len()), None::<Duration>);
        for row in queued {
            let admission = match row.throttled_for {
                Some(wait) => Err((RefusalReason::Target, wait)),
                None => admissions.next().expect("each candidate was judged"),
            };
            match admission {
                Ok(()) => {
                    receivers.push(Address { user: row.user, device: row.device });
                    if let Some(previous) = previous {
                        let (count, first) = self.retracted.entry(row.device).or_insert((0, previous.first));
                        (*count, *first) = (*count + 1, previous.first.min(*first));
                    }
                    self.rows.push((send, row));
                }
                Err((reason, wait)) => {
                    retry_after = Some(retry_after.unwrap_or(wait).min(wait));
                    if previous.is_none() {
                        *self.refused.entry(row.device).or_default() += 1;
                    }
                    outcome.refused.push(Refused { user: row.user, device: row.id, reason });
                }
            }
        }
        match previous {
            None => self.new_sends.push(NewSend { send, outcome: outcome.clone(), rows: first..self.rows.len() }),
            // Also when nothing was queued: the client acts on a mismatch that it is told, so it must stand.
            Some(previous) => {
                let changed = outcome::encode(&outcome);
                if changed != outcome::encode(&previous.outcome) {
                    self.changed.push(Changed { send, outcome: changed });
                }
            }
        }
        SendResult { outcome, receivers, replay: previous.map(|_| Replay::SameBody), retry_after }
    }
}
