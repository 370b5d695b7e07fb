//! Decides what a send queues, and writes its outcome down for repeats. Pure: no database in here.

use std::collections::HashMap;

use crate::model::ids::{DeviceId, DeviceNo, UserId};
use crate::model::mail::{Outcome, Outgoing, Sealed};

/// The devices of some accounts at one moment.
pub(super) type Devices = HashMap<UserId, Vec<(DeviceId, DeviceNo)>>;

/// A message that is to be queued.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queued<'a> {
    pub(super) user: UserId,
    pub(super) device: DeviceNo,
    pub(super) sealed: &'a Sealed,
}

/// Holds a send against the devices that there are: for each recipient either all its devices are covered and get
/// their message, or none do. The sending device is never counted.
pub(super) fn evaluate<'a>(mail: &'a Outgoing, devices: &Devices) -> (Outcome, Vec<Queued<'a>>) {
    let mut outcome = Outcome::default();
    let mut queued = Vec::new();
    for recipient in &mail.recipients {
        let current = devices.get(&recipient.user).map_or(&[][..], Vec::as_slice);
        let current = || current.iter().filter(|(id, _)| *id != mail.sender.device);
        let (mut valid, mut covered) = (Vec::with_capacity(recipient.submissions.len()), 0);
        for (target, sealed) in &recipient.submissions {
            match current().find(|(id, _)| id == target) {
                Some((_, device)) => {
                    valid.push(Queued { user: recipient.user, device: *device, sealed });
                    covered += 1;
                }
                None => outcome.invalid_devices.push(*target),
            }
        }
        if covered == current().count() {
            queued.append(&mut valid);
            continue;
        }
        let is_missing = |id: &DeviceId| !recipient.submissions.iter().any(|(target, _)| target == id);
        let mut missing: Vec<DeviceId> = current().map(|(id, _)| *id).filter(is_missing).collect();
        missing.sort_unstable();
        outcome.mismatches.push((recipient.user, missing));
    }
    (outcome, queued)
}

/// The stored form of an outcome: empty when everything was queued, else counts (big-endian `u32`) and 16-byte ids.
pub(super) fn encode(outcome: &Outcome) -> Vec<u8> {
    if *outcome == Outcome::default() {
        return Vec::new();
    }
    let mut bytes = Vec::new();
    push_ids(&mut bytes, &outcome.invalid_devices);
    push_count(&mut bytes, outcome.mismatches.len());
    for (user, missing) in &outcome.mismatches {
        bytes.extend_from_slice(user.as_bytes());
        push_ids(&mut bytes, missing);
    }
    bytes
}

/// Reads the stored form; `None` when it isn't one.
pub(super) fn decode(bytes: &[u8]) -> Option<Outcome> {
    if bytes.is_empty() {
        return Some(Outcome::default());
    }
    let mut rest = bytes;
    let invalid_devices = take_ids(&mut rest)?;
    let mismatches = (0..take_count(&mut rest)?)
        .map(|_| Some((UserId::from_bytes(rest.split_off(..16)?)?, take_ids(&mut rest)?)))
        .collect::<Option<_>>()?;
    rest.is_empty().then_some(Outcome { invalid_devices, mismatches })
}

fn push_count(bytes: &mut Vec<u8>, count: usize) {
    let count = u32::try_from(count).expect("a body of 2 MiB has no room for that many ids");
    bytes.extend_from_slice(&count.to_be_bytes());
}

fn push_ids(bytes: &mut Vec<u8>, ids: &[DeviceId]) {
    push_count(bytes, ids.len());
    ids.iter().for_each(|id| bytes.extend_from_slice(id.as_bytes()));
}

fn take_count(rest: &mut &[u8]) -> Option<usize> {
    let bytes = rest.split_off(..4)?;
    usize::try_from(u32::from_be_bytes(bytes.try_into().ok()?)).ok()
}

fn take_ids(rest: &mut &[u8]) -> Option<Vec<DeviceId>> {
    (0..take_count(rest)?).map(|_| DeviceId::from_bytes(rest.split_off(..16)?)).collect()
}

/// Which messages of an over-full inbox go, so that `max` are left: first the expired ones, then again and again the
/// oldest of the account that has the most waiting. So nobody can flush another's mail by sending much.
///
/// `inbox` is (position, sending account, whether expired), oldest first.
pub(super) fn cut<P: Copy>(inbox: &[(P, UserId, bool)], max: usize) -> Vec<P> {
    let mut gone: Vec<P> = inbox.iter().filter(|(_, _, expired)| *expired).map(|(position, ..)| *position).collect();
    let alive: Vec<_> = inbox.iter().filter(|(_, _, expired)| !expired).collect();
    let mut waiting: HashMap<UserId, usize> = HashMap::new();
    alive.iter().for_each(|(_, sender, _)| *waiting.entry(*sender).or_default() += 1);
    let mut taken: HashMap<UserId, usize> = HashMap::new();
    for _ in 0..alive.len().saturating_sub(max) {
        let Some(most) = waiting.values().max().copied() else { break };
        // Among equals the one whose message has waited longest gives way.
        let Some((_, sender, _)) = alive.iter().find(|(_, sender, _)| waiting.get(sender) == Some(&most)) else {
            break;
        };
        *waiting.entry(*sender).or_default() -= 1;
        *taken.entry(*sender).or_default() += 1;
    }
    for (position, sender, _) in alive {
        if let Some(left) = taken.get_mut(sender).filter(|left| **left > 0) {
            *left -= 1;
            gone.push(*position);
        }
    }
    gone
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::model::ids::IdempotencyKey;
    use crate::model::mail::{Recipient, Sender};

    fn device(n: u8) -> DeviceId {
        DeviceId::from_bytes(&[n; 16]).unwrap()
    }

    fn user(n: u8) -> UserId {
        UserId::from_bytes(&[n; 16]).unwrap()
    }

    fn mail(recipients: &[(u8, &[u8])]) -> Outgoing {
        let submissions = |ids: &[u8]| ids.iter().map(|n| (device(*n), Sealed(Bytes::from_static(b"x")))).collect();
        Outgoing {
            sender: Sender { user: user(1), device: device(10), no: DeviceNo(10) },
            key: IdempotencyKey::random(),
            digest: [0; 16],
            recipients: recipients
                .iter()
                .map(|(n, ids)| Recipient { user: user(*n), submissions: submissions(ids) })
                .collect(),
        }
    }

    fn devices(of: &[(u8, &[u8])]) -> Devices {
        let list = |ids: &[u8]| ids.iter().map(|n| (device(*n), DeviceNo(i64::from(*n)))).collect();
        of.iter().map(|(n, ids)| (user(*n), list(ids))).collect()
    }

    fn queued(mail: &Outgoing, devices: &Devices) -> (Outcome, Vec<i64>) {
        let (outcome, queued) = evaluate(mail, devices);
        (outcome, queued.iter().map(|message| message.device.0).collect())
    }

    #[test]
    fn a_send_that_covers_every_device_queues_all() {
        let result = queued(&mail(&[(2, &[21, 20])]), &devices(&[(2, &[20, 21])]));
        assert_eq!(result, (Outcome::default(), vec![21, 20]));
    }

    #[test]
    fn an_uncovered_device_stops_its_user_and_nobody_else() {
        let result = queued(&mail(&[(2, &[20]), (3, &[30])]), &devices(&[(2, &[22, 20, 21]), (3, &[30])]));
        let mismatches = vec![(user(2), vec![device(21), device(22)])];
        assert_eq!(result, (Outcome { invalid_devices: vec![], mismatches }, vec![30]));
    }

    #[test]
    fn a_stale_target_is_reported_and_the_rest_is_queued() {
        let result = queued(&mail(&[(2, &[29, 20])]), &devices(&[(2, &[20])]));
        assert_eq!(result, (Outcome { invalid_devices: vec![device(29)], mismatches: vec![] }, vec![20]));
    }

    #[test]
    fn the_sending_device_is_left_out_of_its_own_account() {
        let own = devices(&[(1, &[10])]);
        assert_eq!(queued(&mail(&[(1, &[])]), &own), (Outcome::default(), vec![]));
    }

    #[test]
    fn a_probe_reports_the_devices_of_a_user_who_has_some() {
        let found = devices(&[(2, &[20])]);
        let mismatches = vec![(user(2), vec![device(20)])];
        assert_eq!(queued(&mail(&[(2, &[]), (3, &[])]), &found).0, Outcome { invalid_devices: vec![], mismatches });
    }

    #[test]
    fn an_outcome_survives_being_written_down() {
        let outcome = Outcome {
            invalid_devices: vec![device(1), device(2)],
            mismatches: vec![(user(3), vec![device(4)]), (user(5), vec![])],
        };
        let bytes = encode(&outcome);
        assert_eq!(decode(&bytes), Some(outcome));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode(&encode(&Outcome::default())), Some(Outcome::default()));
    }

    #[test]
    fn a_flood_cuts_only_the_sender_who_floods() {
        let inbox: Vec<_> = (0..10).map(|n| (n, if n < 2 { user(2) } else { user(3) }, false)).collect();
        assert_eq!(cut(&inbox, 8), vec![2, 3]);
    }

    #[test]
    fn among_equal_senders_the_oldest_message_goes() {
        let inbox: Vec<_> = [4, 5, 4, 5].into_iter().enumerate().map(|(n, who)| (n, user(who), false)).collect();
        assert_eq!(cut(&inbox, 3), vec![0]);
        assert_eq!(cut(&inbox, 2), vec![0, 1]);
    }

    #[test]
    fn expired_messages_go_before_all_others() {
        let inbox = [(1, user(2), true), (2, user(3), false), (3, user(3), false)];
        assert_eq!(cut(&inbox, 2), vec![1]);
        assert_eq!(cut(&inbox, 5), vec![1]);
    }
}
