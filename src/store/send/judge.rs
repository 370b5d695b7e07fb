//! Decides about the sends of a group: which are repeats, which messages need room, and what is queued. Pure.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::Duration;

use crate::model::ids::{Address, DeviceNo, IdempotencyKey};
use crate::model::mail::{Outcome, Outgoing, Refused, Replay, Sent, Shortage};
use crate::store::notices::{Counts, TakenBack};
use crate::store::outcome::{self, Queued};
use crate::store::room::{Candidate, Verdict};
use crate::store::send::{Former, Found};

/// The `Retry-After` of an outcome that a repeat can't change.
const SHORTEST_WAIT: Duration = Duration::from_secs(60);

/// What a send is, compared with former sends and with the devices that there are.
pub(super) enum Case<'a> {
    /// It is left for a later group.
    Later,
    /// A repeat that queues nothing. It wakes the receivers once more: the node that stored the first send may have died
    /// before it could.
    Repeat { outcome: Outcome, replay: Replay, woken: Vec<Address> },
    /// The same as another send of the group.
    Twin { of: usize, replay: Replay },
    /// No repeat. These messages are queued if there is room.
    New { outcome: Outcome, queued: Vec<Queued<'a>> },
    /// A repeat of a send of which messages had been refused. These are queued if there is room.
    Rest { outcome: Outcome, queued: Vec<Queued<'a>>, former: &'a Former },
}

impl<'a> Case<'a> {
    fn queued(&self) -> &[Queued<'a>] {
        match self {
            Self::New { queued, .. } | Self::Rest { queued, .. } => queued,
            Self::Later | Self::Repeat { .. } | Self::Twin { .. } => &[],
        }
    }
}

/// The decision about a group, before anything is written.
#[derive(Default)]
pub(super) struct Judgement<'a> {
    /// An answer for each send that was judged.
    pub(super) sent: Vec<Option<Sent>>,
    /// The messages to queue, each with its send.
    pub(super) rows: Vec<(&'a Outgoing, Queued<'a>)>,
    /// The sends that are no repeats.
    pub(super) judged: Vec<Judged<'a>>,
    /// Outcomes that change with a repeat.
    pub(super) changed: Vec<Changed<'a>>,
    /// How many messages were refused for each device for the first time.
    pub(super) refused: Counts,
    /// How many messages for each device are queued now that had been refused. See [`TakenBack`].
    pub(super) taken_back: TakenBack,
}

/// A repeat that changes an outcome.
pub(super) struct Changed<'a> {
    pub(super) mail: &'a Outgoing,
    pub(super) outcome: Vec<u8>,
}

/// A send that is no repeat.
pub(super) struct Judged<'a> {
    pub(super) mail: &'a Outgoing,
    pub(super) outcome: Outcome,
    /// Those of the group's messages that are its own.
    pub(super) rows: Range<usize>,
}

/// Compares each send with former sends and with the devices that there are, except those that are left for later.
pub(super) fn cases<'a>(
    sends: &'a [Outgoing],
    found: &'a Found,
    is_later: impl Fn(&Outgoing) -> bool,
) -> Vec<Case<'a>> {
    let mut first: HashMap<(DeviceNo, IdempotencyKey), usize> = HashMap::new();
    let case = |(n, mail): (usize, &'a Outgoing)| {
        if is_later(mail) {
            return Case::Later;
        }
        let id = (mail.sender.no, mail.key);
        let of = *first.entry(id).or_insert(n);
        let former = found.known.get(&id);
        let digest = former.map_or(sends[of].digest, |former| former.digest);
        let replay = if digest == mail.digest { Replay::SameBody } else { Replay::OtherBody };
        match former {
            _ if of != n => Case::Twin { of, replay },
            Some(former) if replay == Replay::SameBody && !former.outcome.refused.is_empty() => {
                let (outcome, queued) = outcome::rest(mail, &former.outcome, &found.devices);
                Case::Rest { outcome, queued, former }
            }
            Some(former) => {
                let (_, queued) = outcome::evaluate(mail, &found.devices);
                Case::Repeat { outcome: former.outcome.clone(), replay, woken: addresses(&queued) }
            }
            None => {
                let (outcome, queued) = outcome::evaluate(mail, &found.devices);
                Case::New { outcome, queued }
            }
        }
    };
    sends.iter().enumerate().map(case).collect()
}

fn addresses(queued: &[Queued<'_>]) -> Vec<Address> {
    queued.iter().map(|row| Address { user: row.user, device: row.device }).collect()
}

/// The messages that need room, in order. Messages to an account that gets too many sends at the moment are left out.
pub(super) fn candidates(sends: &[Outgoing], cases: &[Case<'_>]) -> Vec<Candidate> {
    let of_send = |(mail, case): (&Outgoing, &Case<'_>)| {
        let sender = mail.sender.user;
        let asking = case.queued().iter().filter(|row| row.busy_for.is_none());
        asking
            .map(|row| Candidate { user: row.user, device: row.device, sender, bytes: row.sealed.0.len() as u64 })
            .collect::<Vec<_>>()
    };
    sends.iter().zip(cases).flat_map(of_send).collect()
}

/// The sends with a message for one of these devices.
pub(super) fn waiting_for(
    sends: &[Outgoing],
    cases: &[Case<'_>],
    devices: &HashSet<DeviceNo>,
) -> Vec<(DeviceNo, IdempotencyKey)> {
    let waits = |case: &Case<'_>| case.queued().iter().any(|row| devices.contains(&row.device));
    let waiting = sends.iter().zip(cases).filter(|(_, case)| waits(case));
    waiting.map(|(mail, _)| (mail.sender.no, mail.key)).collect()
}

/// Decides what is queued. `verdicts` are those on the candidates, in their order.
pub(super) fn judge<'a>(
    sends: &'a [Outgoing],
    cases: Vec<Case<'a>>,
    verdicts: impl IntoIterator<Item = Verdict>,
) -> Judgement<'a> {
    let mut verdicts = verdicts.into_iter();
    let mut judgement = Judgement { sent: Vec::with_capacity(sends.len()), ..Judgement::default() };
    for (mail, case) in sends.iter().zip(cases) {
        let sent = match case {
            Case::Later => None,
            Case::Repeat { outcome, replay, woken } => {
                let retry_after = (!outcome.refused.is_empty()).then_some(SHORTEST_WAIT);
                Some(Sent { outcome, woken, replay: Some(replay), retry_after })
            }
            Case::Twin { of, replay } => judgement.sent[of].clone().map(|first| Sent { replay: Some(replay), ..first }),
            Case::New { outcome, queued } => Some(judgement.add(mail, outcome, queued, None, &mut verdicts)),
            Case::Rest { outcome, queued, former } => {
                Some(judgement.add(mail, outcome, queued, Some(former), &mut verdicts))
            }
        };
        judgement.sent.push(sent);
    }
    judgement
}

impl<'a> Judgement<'a> {
    /// True when there is nothing to write but messages and new outcomes.
    pub(super) fn is_plain(&self) -> bool {
        self.changed.is_empty() && self.refused.is_empty() && self.taken_back.is_empty()
    }

    /// Queues the messages for which there is room, and records the rest as refused.
    fn add(
        &mut self,
        mail: &'a Outgoing,
        mut outcome: Outcome,
        queued: Vec<Queued<'a>>,
        former: Option<&Former>,
        verdicts: &mut impl Iterator<Item = Verdict>,
    ) -> Sent {
        let first = self.rows.len();
        let (mut woken, mut retry_after) = (Vec::with_capacity(queued.len()), None::<Duration>);
        for row in queued {
            let verdict = match row.busy_for {
                Some(wait) => Err((Shortage::Target, wait)),
                None => verdicts.next().expect("each candidate was judged"),
            };
            match verdict {
                Ok(()) => {
                    woken.push(Address { user: row.user, device: row.device });
                    if let Some(former) = former {
                        let (count, first) = self.taken_back.entry(row.device).or_insert((0, former.first));
                        (*count, *first) = (*count + 1, former.first.min(*first));
                    }
                    self.rows.push((mail, row));
                }
                Err((shortage, wait)) => {
                    retry_after = Some(retry_after.unwrap_or(wait).min(wait));
                    if former.is_none() {
                        *self.refused.entry(row.device).or_default() += 1;
                    }
                    outcome.refused.push(Refused { user: row.user, device: row.id, shortage });
                }
            }
        }
        match former {
            None => self.judged.push(Judged { mail, outcome: outcome.clone(), rows: first..self.rows.len() }),
            // Also when nothing was queued: the client acts on a mismatch that it is told, so it must stand.
            Some(former) => {
                let changed = outcome::encode(&outcome);
                if changed != outcome::encode(&former.outcome) {
                    self.changed.push(Changed { mail, outcome: changed });
                }
            }
        }
        Sent { outcome, woken, replay: former.map(|_| Replay::SameBody), retry_after }
    }
}
