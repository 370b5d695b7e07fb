//! Decides what a send queues, and writes its outcome down for repeats. Pure: no database in here.

use std::collections::HashMap;
use std::time::Duration;

use crate::model::ids::{DeviceId, DeviceNo, UserId};
use crate::model::message::{Outcome, Recipient, RefusalReason, Refused, Sealed, SendRequest};

/// The devices of some accounts at one moment.
pub(super) type Devices = HashMap<UserId, Vec<(DeviceId, DeviceNo)>>;

/// A message that is to be queued, if there is room for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queued<'a> {
    pub(super) user: UserId,
    pub(super) id: DeviceId,
    pub(super) device: DeviceNo,
    pub(super) sealed: &'a Sealed,
    /// Set when its account gets too many sends at the moment.
    pub(super) throttled_for: Option<Duration>,
}

impl<'a> Queued<'a> {
    fn new(recipient: &'a Recipient, (id, device): (DeviceId, DeviceNo), sealed: &'a Sealed) -> Self {
        Self { user: recipient.user, id, device, sealed, throttled_for: recipient.throttled_for }
    }
}

/// Holds a send against the devices that there are: for each recipient either all its devices are covered and get
/// their message, or none do. The sending device is never counted.
pub(super) fn match_devices<'a>(send: &'a SendRequest, devices: &Devices) -> (Outcome, Vec<Queued<'a>>) {
    let (mut outcome, mut queued) = (Outcome::default(), Vec::new());
    for recipient in &send.recipients {
        match_recipient(send, recipient, devices, &mut outcome, &mut queued);
    }
    (outcome, queued)
}

fn match_recipient<'a>(
    send: &SendRequest,
    recipient: &'a Recipient,
    devices: &Devices,
    outcome: &mut Outcome,
    queued: &mut Vec<Queued<'a>>,
) {
    let current = devices.get(&recipient.user).map_or(&[][..], Vec::as_slice);
    let current = || current.iter().filter(|(id, _)| *id != send.sender.device);
    let (mut valid, mut covered) = (Vec::with_capacity(recipient.submissions.len()), 0);
    for (target, sealed) in &recipient.submissions {
        match current().find(|(id, _)| id == target) {
            Some(found) => {
                valid.push(Queued::new(recipient, *found, sealed));
                covered += 1;
            }
            None => outcome.invalid_devices.push(*target),
        }
    }
    if covered == current().count() {
        queued.append(&mut valid);
        return;
    }
    let is_missing = |id: &DeviceId| !recipient.submissions.iter().any(|(target, _)| target == id);
    let mut missing: Vec<DeviceId> = current().map(|(id, _)| *id).filter(is_missing).collect();
    missing.sort_unstable();
    outcome.mismatches.push((recipient.user, missing));
}

/// The rest of a repeated send of which messages had been refused. A recipient without a refused message keeps its part of
/// the outcome. Any other recipient is compared with its present devices. If the send covers them, the refused messages ask
/// for room again. If not, nothing more is queued for it under this key, and its part of the outcome becomes a mismatch.
/// Devices that are gone become invalid, unless their message had been queued.
pub(super) fn retry_refused<'a>(
    send: &'a SendRequest,
    former: &Outcome,
    devices: &Devices,
) -> (Outcome, Vec<Queued<'a>>) {
    let (mut outcome, mut queued) = (Outcome::default(), Vec::new());
    let was_refused = |id: &DeviceId| former.refused.iter().any(|refused| refused.device == *id);
    let was_invalid = |id: &DeviceId| former.invalid_devices.contains(id);
    for recipient in &send.recipients {
        let (mut now, mut messages) = (Outcome::default(), Vec::new());
        if recipient.submissions.iter().any(|(target, _)| was_refused(target)) {
            match_recipient(send, recipient, devices, &mut now, &mut messages);
        } else {
            now.invalid_devices.extend(recipient.submissions.iter().map(|(target, _)| *target));
            now.mismatches.extend(former.mismatches.iter().filter(|(user, _)| *user == recipient.user).cloned());
        }
        let is_invalid = |id: &DeviceId| was_refused(id) || was_invalid(id);
        outcome.invalid_devices.extend(now.invalid_devices.into_iter().filter(is_invalid));
        outcome.mismatches.append(&mut now.mismatches);
        queued.extend(messages.into_iter().filter(|message| was_refused(&message.id)));
    }
    (outcome, queued)
}

/// The stored form of an outcome: empty when everything was queued, else counts (big-endian `u32`) and 16-byte ids.
///
/// Refused devices are stored as a mismatch of their account, with the first device twice, which no other mismatch has. A node
/// of the former version takes them for missing devices. Its client then encrypts for them once more and sends under another
/// key, so that no client takes a message for queued that is not.
pub(super) fn encode(outcome: &Outcome) -> Vec<u8> {
    if *outcome == Outcome::default() {
        return Vec::new();
    }
    let mut bytes = Vec::new();
    push_ids(&mut bytes, &outcome.invalid_devices);
    let refused: Vec<&[Refused]> = outcome.refused.chunk_by(|one, next| one.user == next.user).collect();
    push_count(&mut bytes, outcome.mismatches.len() + refused.len());
    for (user, missing) in &outcome.mismatches {
        bytes.extend_from_slice(user.as_bytes());
        push_ids(&mut bytes, missing);
    }
    for refused in refused {
        bytes.extend_from_slice(refused[0].user.as_bytes());
        let devices = refused.iter().map(|refused| refused.device);
        push_ids(&mut bytes, &std::iter::once(refused[0].device).chain(devices).collect::<Vec<_>>());
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
    let mut outcome = Outcome { invalid_devices, ..Outcome::default() };
    for _ in 0..take_count(&mut rest)? {
        let (user, devices) = (UserId::from_bytes(rest.split_off(..16)?)?, take_ids(&mut rest)?);
        match &devices[..] {
            [first, refused @ ..] if refused.first() == Some(first) => {
                let refused =
                    refused.iter().map(|device| Refused { user, device: *device, reason: RefusalReason::Inbox });
                outcome.refused.extend(refused);
            }
            _ => outcome.mismatches.push((user, devices)),
        }
    }
    rest.is_empty().then_some(outcome)
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::model::ids::IdempotencyKey;
    use crate::model::message::Sender;

    fn device(n: u8) -> DeviceId {
        DeviceId::from_bytes(&[n; 16]).unwrap()
    }

    fn user(n: u8) -> UserId {
        UserId::from_bytes(&[n; 16]).unwrap()
    }

    fn refused(n: u8, of_device: u8) -> Refused {
        Refused { user: user(n), device: device(of_device), reason: RefusalReason::Inbox }
    }

    fn send(recipients: &[(u8, &[u8])]) -> SendRequest {
        let submissions = |ids: &[u8]| ids.iter().map(|n| (device(*n), Sealed(Bytes::from_static(b"x")))).collect();
        SendRequest {
            sender: Sender { user: user(1), device: device(10), no: DeviceNo(10) },
            key: IdempotencyKey::random(),
            digest: [0; 16],
            recipients: recipients
                .iter()
                .map(|(n, ids)| Recipient { user: user(*n), submissions: submissions(ids), throttled_for: None })
                .collect(),
        }
    }

    fn devices(of: &[(u8, &[u8])]) -> Devices {
        let list = |ids: &[u8]| ids.iter().map(|n| (device(*n), DeviceNo(i64::from(*n)))).collect();
        of.iter().map(|(n, ids)| (user(*n), list(ids))).collect()
    }

    fn queued(send: &SendRequest, devices: &Devices) -> (Outcome, Vec<i64>) {
        let (outcome, queued) = match_devices(send, devices);
        (outcome, queued.iter().map(|message| message.device.0).collect())
    }

    #[test]
    fn a_send_that_covers_every_device_queues_all() {
        let result = queued(&send(&[(2, &[21, 20])]), &devices(&[(2, &[20, 21])]));
        assert_eq!(result, (Outcome::default(), vec![21, 20]));
    }

    #[test]
    fn an_uncovered_device_stops_the_messages_to_its_user_only() {
        let result = queued(&send(&[(2, &[20]), (3, &[30])]), &devices(&[(2, &[22, 20, 21]), (3, &[30])]));
        let mismatches = vec![(user(2), vec![device(21), device(22)])];
        assert_eq!(result, (Outcome { mismatches, ..Outcome::default() }, vec![30]));
    }

    #[test]
    fn a_stale_target_is_reported_and_the_rest_is_queued() {
        let result = queued(&send(&[(2, &[29, 20])]), &devices(&[(2, &[20])]));
        assert_eq!(result, (Outcome { invalid_devices: vec![device(29)], ..Outcome::default() }, vec![20]));
    }

    #[test]
    fn the_sending_device_is_left_out_of_its_own_account() {
        let own = devices(&[(1, &[10])]);
        assert_eq!(queued(&send(&[(1, &[])]), &own), (Outcome::default(), vec![]));
    }

    #[test]
    fn a_probe_reports_the_devices_of_a_user_who_has_some() {
        let found = devices(&[(2, &[20])]);
        let mismatches = vec![(user(2), vec![device(20)])];
        assert_eq!(queued(&send(&[(2, &[]), (3, &[])]), &found).0, Outcome { mismatches, ..Outcome::default() });
    }

    #[test]
    fn an_outcome_survives_being_written_down() {
        let outcome = Outcome {
            invalid_devices: vec![device(1), device(2)],
            mismatches: vec![(user(3), vec![device(4)]), (user(5), vec![])],
            refused: vec![refused(6, 7), refused(6, 8), refused(9, 10)],
        };
        let bytes = encode(&outcome);
        assert_eq!(decode(&bytes), Some(outcome));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode(&encode(&Outcome::default())), Some(Outcome::default()));
    }

    #[test]
    fn a_node_of_the_former_version_takes_refused_devices_for_missing_ones() {
        let bytes = encode(&Outcome { refused: vec![refused(6, 7)], ..Outcome::default() });
        let mut former = &bytes[..];
        assert_eq!(take_ids(&mut former), Some(vec![]), "no invalid devices");
        assert_eq!(take_count(&mut former), Some(1));
        assert_eq!(former.split_off(..16), Some(&user(6).as_bytes()[..]));
        assert_eq!(take_ids(&mut former), Some(vec![device(7), device(7)]));
        assert!(former.is_empty());
    }

    fn left(send: &SendRequest, former: &Outcome, devices: &Devices) -> (Outcome, Vec<i64>) {
        let (outcome, queued) = retry_refused(send, former, devices);
        (outcome, queued.iter().map(|message| message.device.0).collect())
    }

    #[test]
    fn the_rest_is_what_was_refused_and_is_still_there() {
        let send = send(&[(2, &[20, 21, 22]), (3, &[30])]);
        let former = Outcome { refused: vec![refused(2, 20), refused(2, 22)], ..Outcome::default() };
        let result = left(&send, &former, &devices(&[(2, &[20, 21]), (3, &[30, 31])]));
        assert_eq!(result, (Outcome { invalid_devices: vec![device(22)], ..Outcome::default() }, vec![20]));
        let result = left(&send, &former, &devices(&[(2, &[20, 22]), (3, &[30])]));
        assert_eq!(result, (Outcome::default(), vec![20, 22]), "a device that has its message may go");
    }

    #[test]
    fn a_device_that_came_after_a_refusal_makes_the_rest_a_mismatch() {
        let both = send(&[(2, &[20, 21]), (3, &[30])]);
        let nothing = Outcome { refused: vec![refused(2, 20), refused(2, 21), refused(3, 30)], ..Outcome::default() };
        let part = Outcome { refused: vec![refused(2, 21), refused(3, 30)], ..Outcome::default() };
        let mismatches = vec![(user(2), vec![device(19), device(22)])];
        for former in [&nothing, &part] {
            let result = left(&both, former, &devices(&[(2, &[20, 22, 21, 19]), (3, &[30])]));
            assert_eq!(result, (Outcome { mismatches: mismatches.clone(), ..Outcome::default() }, vec![30]));
        }
        // The account was started over.
        let result = left(&send(&[(2, &[20])]), &nothing, &devices(&[(2, &[23])]));
        let expected = Outcome {
            invalid_devices: vec![device(20)],
            mismatches: vec![(user(2), vec![device(23)])],
            ..Outcome::default()
        };
        assert_eq!(result, (expected, vec![]));
    }

    #[test]
    fn what_was_not_refused_keeps_its_part_of_the_outcome_in_the_order_of_the_request() {
        let send = send(&[(2, &[29, 20]), (3, &[39, 30]), (4, &[49, 40]), (1, &[12])]);
        let former = Outcome {
            invalid_devices: vec![device(29), device(39), device(49)],
            mismatches: vec![(user(2), vec![device(28)])],
            refused: vec![refused(3, 30), refused(1, 12)],
        };
        // The mismatch stands, though the send would succeed now; the sending device is not counted.
        let found = devices(&[(2, &[20]), (3, &[30, 31]), (4, &[40, 41]), (1, &[10, 12])]);
        let expected = Outcome {
            invalid_devices: former.invalid_devices.clone(),
            mismatches: vec![(user(2), vec![device(28)]), (user(3), vec![device(31)])],
            refused: vec![],
        };
        assert_eq!(left(&send, &former, &found), (expected, vec![12]));
    }

    /// Whatever was refused, and whatever has happened to the devices: both lists are empty exactly when all devices that
    /// there are have their message, or ask for room for it; and no recipient is in both states.
    #[test]
    fn a_repeat_tells_of_every_device_that_it_leaves_out() {
        let some = |of: &[u8]| of.iter().copied().filter(|_| rand::random()).collect::<Vec<u8>>();
        for _ in 0..2000 {
            let targets = some(&[20, 21, 22, 23]);
            let send = send(&[(2, &targets)]);
            let (outcome, queued) = match_devices(&send, &devices(&[(2, &targets)]));
            assert_eq!(outcome, Outcome::default());
            let refused_now = some(&targets);
            if refused_now.is_empty() {
                continue;
            }
            let got: Vec<i64> =
                queued.iter().map(|row| row.device.0).filter(|no| !refused_now.contains(&(*no as u8))).collect();
            let former =
                Outcome { refused: refused_now.iter().map(|no| refused(2, *no)).collect(), ..Outcome::default() };
            let present = some(&[20, 21, 22, 23, 24]);
            let (outcome, queued) = left(&send, &former, &devices(&[(2, &present)]));
            let has = |no: &u8| got.contains(&i64::from(*no)) || queued.contains(&i64::from(*no));
            assert_eq!(outcome.mismatches.is_empty(), present.iter().all(has));
            assert!(outcome.mismatches.is_empty() || queued.is_empty());
            assert!(queued.iter().all(|no| !got.contains(no)), "nothing is queued twice");
            let gone = targets.iter().filter(|no| refused_now.contains(no) && !present.contains(no));
            assert_eq!(outcome.invalid_devices, gone.map(|no| device(*no)).collect::<Vec<_>>());
        }
    }
}
