use super::inbox::{FIRST_PAUSE, LONGEST_PAUSE};
use super::*;

const MESSAGES: u64 = 20;
const BYTES: u64 = 2000;

/// Of a node that sees all mail leave.
fn inbox_limiter(bytes_per_day: u64) -> InboxLimiter {
    InboxLimiter::new(&limits(bytes_per_day), true)
}

fn limits(bytes_per_day: u64) -> Limits {
    Limits {
        retention: DAY * 30,
        max_inbox_size: MESSAGES as u32,
        inbox_max_bytes: BYTES,
        sender_share_percent: 25,
        sender_bytes_per_day: bytes_per_day,
        idempotency_lifetime: DAY,
        max_prekeys: 100,
        max_devices: 10,
    }
}

fn empty(inbox_limiter: &InboxLimiter, device: DeviceNo) {
    count(inbox_limiter, device, &[]);
}

fn count(inbox_limiter: &InboxLimiter, device: DeviceNo, found: &[Counted]) {
    inbox_limiter.counted([(device, AccountBound::default())], found);
}

fn uncertain(inbox_limiter: &InboxLimiter, incoming: &[Candidate]) -> Unsure {
    inbox_limiter.uncertain(incoming, |_| Some(AccountBound::default()))
}

/// An inbox with as many messages as it may hold, all of one sender.
fn full(device: DeviceNo) -> [Counted; 1] {
    [(device, UserId::random(), InboxLoad { messages: MESSAGES, bytes: 20 })]
}

const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);
const DAY: Duration = Duration::from_hours(24);

/// What a group is that has not been committed.
fn charged(inbox_limiter: &InboxLimiter, one: Candidate) -> (Result<(), RefusalReason>, Charges) {
    let (mut admissions, charges) = inbox_limiter.admit(&[one], NOW, |_| Some(AccountRow::default())).unwrap();
    (admissions.remove(0).map_err(|(reason, _)| reason), charges)
}

fn taken(inbox_limiter: &InboxLimiter, one: Candidate) -> Result<(), RefusalReason> {
    let (admission, charges) = charged(inbox_limiter, one);
    charges.commit();
    admission
}

/// Whatever comes in whatever order: no inbox passes its limits, no other account passes its share but by what it had
/// below the half, and nothing is refused for which all of that would leave room.
#[test]
fn limits_and_shares_hold_whatever_comes() {
    for _ in 0..200 {
        let (inbox_limiter, device, owner) = (inbox_limiter(0), DeviceNo(1), UserId::random());
        empty(&inbox_limiter, device);
        let senders: Vec<UserId> = (0..4).map(|_| UserId::random()).chain([owner]).collect();
        let (mut total, mut of_senders) = (InboxLoad::default(), HashMap::<UserId, InboxLoad>::new());
        for _ in 0..60 {
            let sender = senders[rand::random_range(0..senders.len())];
            let bytes = rand::random_range(1..300);
            let load = of_senders.get(&sender).copied().unwrap_or_default();
            let fits = total.messages < MESSAGES && total.bytes + bytes <= BYTES;
            let is_over_half = total.messages > MESSAGES / 2 || total.bytes > BYTES / 2;
            let has_share = load.messages == 0
                || (load.messages < MESSAGES / 4 && load.bytes + bytes <= BYTES / 4)
                || sender == owner
                || !is_over_half;
            let expected = match (fits, has_share) {
                (false, _) => Err(RefusalReason::Inbox),
                (true, false) => Err(RefusalReason::Share),
                (true, true) => Ok(()),
            };
            // Shares are known only for an inbox that was counted when it was about half full.
            let uncertain = uncertain(&inbox_limiter, &[Candidate { user: owner, device, sender, bytes }]);
            assert_eq!(uncertain.stale, [], "nothing has left it");
            if !uncertain.unknown.is_empty() {
                let found: Vec<Counted> = of_senders.iter().map(|(sender, load)| (device, *sender, *load)).collect();
                count(&inbox_limiter, device, &found);
            }
            assert_eq!(taken(&inbox_limiter, Candidate { user: owner, device, sender, bytes }), expected);
            if expected.is_ok() {
                total = total.plus(InboxLoad::one(bytes));
                of_senders.insert(sender, load.plus(InboxLoad::one(bytes)));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_inbox_is_counted_again_only_when_mail_has_left_it() {
    let (inbox_limiter, user, device) = (inbox_limiter(0), UserId::random(), DeviceNo(1));
    let one = Candidate { user, device, sender: UserId::random(), bytes: 1 };
    assert_eq!(uncertain(&inbox_limiter, &[one]).unknown, [(user, device)], "nothing is known of it");
    count(&inbox_limiter, device, &full(device));
    for _ in 0..1000 {
        assert_eq!(taken(&inbox_limiter, one), Err(RefusalReason::Inbox));
        assert_eq!(uncertain(&inbox_limiter, &[one]), Unsure::default());
        tokio::time::advance(LONGEST_PAUSE).await;
    }
    count(&inbox_limiter, device, &full(device));
    inbox_limiter.left([(device, 1)]);
    assert_eq!(uncertain(&inbox_limiter, &[one]), Unsure::default(), "little has left, and it was counted just now");
    inbox_limiter.left([(device, 1)]);
    assert_eq!(uncertain(&inbox_limiter, &[one]).stale, [(user, device)], "a sixteenth has left");
    count(&inbox_limiter, device, &full(device));
    inbox_limiter.left([(device, 1)]);
    tokio::time::advance(LONGEST_PAUSE).await;
    assert_eq!(
        uncertain(&inbox_limiter, &[one]).stale,
        [(user, device)],
        "however little it is, it is found out after a while"
    );
    empty(&inbox_limiter, device);
    assert_eq!(taken(&inbox_limiter, one), Ok(()));
    assert_eq!(uncertain(&inbox_limiter, &[one]), Unsure::default());
}

#[tokio::test(start_paused = true)]
async fn a_full_inbox_from_which_other_nodes_may_take_mail_is_counted_more_and_more_seldom() {
    let (inbox_limiter, user, device) = (InboxLimiter::new(&limits(0), false), UserId::random(), DeviceNo(1));
    let one = Candidate { user, device, sender: UserId::random(), bytes: 1 };
    let mut pauses = Vec::new();
    for _ in 0..9 {
        count(&inbox_limiter, device, &full(device));
        let counted_at = Instant::now();
        while uncertain(&inbox_limiter, &[one]).stale.is_empty() {
            assert_eq!(taken(&inbox_limiter, one), Err(RefusalReason::Inbox));
            tokio::time::advance(FIRST_PAUSE).await;
        }
        pauses.push(counted_at.elapsed().as_secs());
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    // A node that sees much leave counts at once, and soon again.
    inbox_limiter.left([(device, 2)]);
    assert_eq!(uncertain(&inbox_limiter, &[one]).stale, [(user, device)]);
    count(&inbox_limiter, device, &[(device, one.sender, InboxLoad { messages: MESSAGES - 2, bytes: 20 })]);
    tokio::time::advance(FIRST_PAUSE).await;
    assert_eq!(
        uncertain(&inbox_limiter, &[one]).stale,
        [(user, device)],
        "its share was taken when it was counted; mail may have left since"
    );
}

#[tokio::test(start_paused = true)]
async fn the_inbox_that_was_counted_first_is_counted_again_first() {
    let (inbox_limiter, user) = (InboxLimiter::new(&limits(0), false), UserId::random());
    let devices = [3, 1, 2].map(DeviceNo);
    for device in devices {
        count(&inbox_limiter, device, &full(device));
        tokio::time::advance(FIRST_PAUSE).await;
    }
    let incoming =
        [1, 2, 3, 9, 8].map(|no| Candidate { user, device: DeviceNo(no), sender: UserId::random(), bytes: 1 });
    let Unsure { unknown, stale } = uncertain(&inbox_limiter, &incoming);
    assert_eq!(stale, devices.map(|device| (user, device)));
    assert_eq!(unknown, [9, 8].map(|no| (user, DeviceNo(no))), "in the order of the messages");
}

/// Its sender's day is over, so nothing comes above the half.
#[test]
fn a_half_full_inbox_is_not_counted_for_each_message_that_is_refused_for_other_reasons() {
    let (inbox_limiter, user, device) = (inbox_limiter(4), UserId::random(), DeviceNo(1));
    let one = Candidate { user, device, sender: UserId::random(), bytes: 4 };
    let half = InboxLoad { messages: MESSAGES / 2, bytes: 20 };
    empty(&inbox_limiter, DeviceNo(2));
    taken(&inbox_limiter, Candidate { device: DeviceNo(2), ..one }).unwrap();
    count(&inbox_limiter, device, &[(device, UserId::random(), half)]);
    for number in 0..10 {
        assert_eq!(taken(&inbox_limiter, one), Err(RefusalReason::Day));
        let incoming = vec![one; 1 + number % 2];
        assert_eq!(uncertain(&inbox_limiter, &incoming), Unsure::default(), "{number}");
    }
}

#[test]
fn a_row_that_another_node_has_written_is_not_believed() {
    let (inbox_limiter, owner, device) = (inbox_limiter(0), UserId::random(), DeviceNo(1));
    let one = Candidate { user: owner, device, sender: UserId::random(), bytes: 1 };
    inbox_limiter.counted([(device, (12, 12))], &[(device, one.sender, InboxLoad { messages: 1, bytes: 1 })]);
    assert_eq!(inbox_limiter.uncertain(&[one], |_| Some((12, 12))), Unsure::default());
    assert_eq!(inbox_limiter.uncertain(&[one], |_| Some((13, 13))).unknown, [(owner, device)]);
    assert_eq!(inbox_limiter.uncertain(&[one], |_| None), Unsure::default(), "it is not half full");
}

/// Another node has queued mail. Here a message is refused for its size, so nothing is counted.
#[test]
fn a_row_that_another_node_has_written_is_not_believed_after_a_refusal() {
    let (inbox_limiter, user, device) = (inbox_limiter(0), UserId::random(), DeviceNo(1));
    let large = Candidate { user, device, sender: UserId::random(), bytes: BYTES };
    let found: Vec<Counted> =
        (1..MESSAGES).map(|_| (device, UserId::random(), InboxLoad { messages: 1, bytes: 1 })).collect();
    let row = |more: i32| (19 + more, i64::from(19 + more));
    inbox_limiter.counted([(device, row(0))], &found);
    assert_eq!(
        inbox_limiter.uncertain(&[large], |_| Some(row(1))),
        Unsure::default(),
        "it is refused whatever the other one did"
    );
    let admitted = inbox_limiter.admit(&[large], NOW, |_| Some(AccountRow { before: row(1), now: row(2) })).unwrap();
    assert!(admitted.0[0].is_err());
    let small = Candidate { bytes: 1, ..large };
    assert_eq!(
        inbox_limiter.uncertain(&[small], |_| Some(row(2))).unknown,
        [(user, device)],
        "there may be no room for it"
    );
}

/// Two nodes have counted an account with a full device. One queues mail for the other device and writes the row.
#[test]
fn mail_for_one_device_shows_in_the_row_though_another_device_has_more() {
    let (here, there, user) = (inbox_limiter(0), inbox_limiter(0), UserId::random());
    let devices = [DeviceNo(1), DeviceNo(2)];
    let full: Vec<Counted> =
        (0..MESSAGES).map(|_| (devices[0], UserId::random(), InboxLoad { messages: 1, bytes: 1 })).collect();
    let count = |inbox_limiter: &InboxLimiter, row: AccountBound| {
        inbox_limiter.counted(devices.map(|device| (device, row)), &full)
    };
    count(&here, (0, 0));
    let row = here.new_account_bound(&devices).unwrap();
    count(&there, row);
    let one = Candidate { user, device: devices[1], sender: UserId::random(), bytes: 1 };
    assert!(there.admit(&[one], NOW, |_| Some(AccountRow { before: row, now: row })).unwrap().0[0].is_ok());
    assert_ne!(there.new_account_bound(&devices), Some(row));
}

/// A group for which nothing is queued leaves the row as it was.
#[test]
fn a_row_that_refusals_did_not_raise_is_believed() {
    let (inbox_limiter, user, device) = (inbox_limiter(0), UserId::random(), DeviceNo(1));
    let large = Candidate { user, device, sender: UserId::random(), bytes: BYTES };
    inbox_limiter
        .counted([(device, (19, 19))], &[(device, UserId::random(), InboxLoad { messages: MESSAGES - 1, bytes: 19 })]);
    let row = AccountRow { before: (19, 19), now: (20, 2019) };
    assert!(inbox_limiter.admit(&[large], NOW, |_| Some(row)).unwrap().0[0].is_err());
    inbox_limiter.restored([device], row);
    let small = Candidate { bytes: 1, ..large };
    assert_eq!(inbox_limiter.uncertain(&[small], |_| Some((19, 19))), Unsure::default());
}

/// Each of these inboxes is full, and together they have more senders than are remembered.
#[test]
fn an_inbox_is_not_taken_for_empty_when_too_many_are_remembered() {
    let inbox_limiter = inbox_limiter(0);
    let full: Vec<Counted> =
        (0..MESSAGES).map(|_| (DeviceNo(0), UserId::random(), InboxLoad { messages: 1, bytes: 1 })).collect();
    let inboxes = REMEMBERED_SENDERS as i64 / MESSAGES as i64 + 2;
    let incoming: Vec<Candidate> = (0..inboxes)
        .map(|no| Candidate { user: UserId::random(), device: DeviceNo(no), sender: UserId::random(), bytes: 1 })
        .collect();
    for one in &incoming {
        let found: Vec<Counted> = full.iter().map(|(_, sender, load)| (one.device, *sender, *load)).collect();
        count(&inbox_limiter, one.device, &found);
    }
    let small = Candidate { device: DeviceNo(-1), ..incoming[0] };
    empty(&inbox_limiter, small.device);
    taken(&inbox_limiter, small).unwrap();
    let admitted = || inbox_limiter.admit(&incoming, NOW, |_| Some(AccountRow::default()));
    assert!(admitted().unwrap().0.iter().all(Result::is_err), "all of them are full");
    inbox_limiter.evict();
    assert!(admitted().is_none(), "they have to be counted again");
    assert_eq!(uncertain(&inbox_limiter, &incoming).unknown.len(), incoming.len());
    assert_eq!(uncertain(&inbox_limiter, &[small]), Unsure::default(), "one without senders is still remembered");
}

/// Two groups are under way: whatever one of them does to what is remembered, the other one writes no row that says less than
/// what waits.
#[test]
fn a_row_never_says_less_than_waits_whatever_another_group_forgets() {
    for _ in 0..500 {
        let (inbox_limiter, owner, sender) = (inbox_limiter(0), UserId::random(), UserId::random());
        let devices = [DeviceNo(1), DeviceNo(2)];
        let waiting: Vec<Counted> = devices
            .iter()
            .map(|device| (*device, sender, InboxLoad { messages: rand::random_range(0..=MESSAGES), bytes: 20 }))
            .collect();
        let count = || inbox_limiter.counted(devices.map(|device| (device, AccountBound::default())), &waiting);
        count();
        let mut most = waiting.iter().map(|(.., load)| load.messages).max().unwrap();
        if rand::random() {
            inbox_limiter.clear(&devices);
        }
        let incoming = devices.map(|device| Candidate { user: owner, device, sender: UserId::random(), bytes: 1 });
        if inbox_limiter.admit(&incoming, NOW, |_| Some(AccountRow::default())).is_none() {
            count();
            inbox_limiter.admit(&incoming, NOW, |_| Some(AccountRow::default())).unwrap();
        }
        most = (most + 1).min(MESSAGES);
        match rand::random_range(0..3) {
            0 => inbox_limiter.clear(&devices[..1]),
            // Another account of the other group.
            1 => empty(&inbox_limiter, DeviceNo(3)),
            _ => {}
        }
        if let Some((messages, _)) = inbox_limiter.new_account_bound(&devices) {
            assert!(u64::from(messages.unsigned_abs()) >= most, "{messages} instead of {most}");
        }
    }
}

#[test]
fn an_inbox_that_is_counted_often_fills_no_memory() {
    let (inbox_limiter, device) = (inbox_limiter(0), DeviceNo(1));
    let found: Vec<Counted> =
        (0..MESSAGES).map(|_| (device, UserId::random(), InboxLoad { messages: 1, bytes: 1 })).collect();
    for _ in 0..=REMEMBERED_SENDERS as u64 / MESSAGES {
        count(&inbox_limiter, device, &found);
    }
    assert_eq!(inbox_limiter.state().senders, found.len());
    inbox_limiter.evict();
    assert!(inbox_limiter.new_account_bound(&[device]).is_some(), "it is still remembered");
    empty(&inbox_limiter, device);
    let one = Candidate { user: UserId::random(), device, sender: UserId::random(), bytes: 1 };
    taken(&inbox_limiter, one).unwrap();
    assert_eq!(inbox_limiter.state().senders, 0, "an inbox with room remembers no senders");
}

#[test]
fn a_day_is_charged_with_what_is_admitted_and_written_down_in_parts() {
    let (inbox_limiter, owner, sender, device) = (inbox_limiter(640), UserId::random(), UserId::random(), DeviceNo(1));
    empty(&inbox_limiter, device);
    let one = Candidate { user: owner, device, sender, bytes: 5 };
    let (admission, mut charges) = charged(&inbox_limiter, one);
    assert_eq!((admission, charges.debts()), (Ok(()), vec![]), "half of a 64th");
    charges.commit();
    let part = i64::try_from(DAY.as_millis() / 64).unwrap();
    for _ in 0..2 {
        let (admission, mut charges) = charged(&inbox_limiter, one);
        assert_eq!((admission, charges.debts()), (Ok(()), vec![(sender, part)]));
        charges.written(&[(sender, NOW + DAY)]);
        // The commit failed: it is to be written down again.
    }
    let (_, mut charges) = charged(&inbox_limiter, one);
    assert_eq!(charges.debts(), [(sender, part)]);
    charges.written(&[(sender, NOW + DAY - Duration::from_millis(1))]);
    charges.commit();
    assert_eq!(taken(&inbox_limiter, one), Err(RefusalReason::Day));
}

/// Whatever groups of whatever size are under way, and however they end: a day is charged with what was queued, and two
/// groups together admit no more than one.
#[test]
fn a_day_is_charged_with_what_was_committed() {
    for _ in 0..200 {
        let (inbox_limiter, sender, device) = (inbox_limiter(640), UserId::random(), DeviceNo(1));
        let (mut queued, mut stored, mut under_way) = (0, 0_i64, Vec::<(u64, Charges, i64)>::new());
        for _ in 0..200 {
            if under_way.len() < 2 && rand::random() {
                empty(&inbox_limiter, device);
                let one = Candidate { user: UserId::random(), device, sender, bytes: rand::random_range(1..30) };
                let (admission, mut charges) = charged(&inbox_limiter, one);
                let bytes = if admission.is_ok() { one.bytes } else { 0 };
                let waiting: u64 = under_way.iter().map(|(bytes, ..)| bytes).sum();
                assert_eq!(admission.is_ok(), queued + waiting + one.bytes <= 640);
                let debt = charges.debts().first().map_or(0, |(_, cost)| *cost);
                under_way.push((bytes, charges, debt));
            } else if let Some((bytes, mut charges, debt)) = under_way.pop()
                && rand::random()
            {
                queued += bytes;
                stored += debt;
                if debt > 0 {
                    charges.written(&[(sender, NOW + Duration::from_millis(stored.unsigned_abs()))]);
                }
                charges.commit();
            }
        }
        under_way.clear();
        let (unwritten, per_byte) = (inbox_limiter.state().days.unwritten(sender), DAY.as_millis() / 640);
        assert_eq!(u128::from(stored.unsigned_abs()) + u128::from(unwritten) * per_byte, u128::from(queued) * per_byte);
    }
}
