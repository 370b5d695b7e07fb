use super::*;

const MESSAGES: u64 = 20;
const BYTES: u64 = 2000;

fn rooms(bytes_per_day: u64) -> Rooms {
    let limits = Limits {
        retention: DAY * 30,
        max_inbox_size: MESSAGES as u32,
        inbox_max_bytes: BYTES,
        sender_share_percent: 25,
        sender_bytes_per_day: bytes_per_day,
        idempotency_lifetime: DAY,
        max_prekeys: 100,
        max_devices: 10,
    };
    Rooms::new(&limits)
}

fn empty(rooms: &Rooms, device: DeviceNo) {
    rooms.counted([device], &[], Stamp::default());
}

const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);
const DAY: Duration = Duration::from_hours(24);

/// What a group is that has not been committed.
fn charged(rooms: &Rooms, one: Candidate) -> (Result<(), Shortage>, Charges) {
    let (mut verdicts, charges) = rooms.judge(&[one], NOW, |_| Some(Stamp::default())).unwrap();
    (verdicts.remove(0).map_err(|(shortage, _)| shortage), charges)
}

fn taken(rooms: &Rooms, one: Candidate) -> Result<(), Shortage> {
    let (verdict, charges) = charged(rooms, one);
    charges.settle();
    verdict
}

/// Whatever comes in whatever order: no inbox passes its limits, no other account passes its share but by what it had
/// below the half, and nothing is refused for which all of that would leave room.
#[test]
fn limits_and_shares_hold_whatever_comes() {
    for _ in 0..200 {
        let (rooms, device, owner) = (rooms(0), DeviceNo(1), UserId::random());
        empty(&rooms, device);
        let senders: Vec<UserId> = (0..4).map(|_| UserId::random()).chain([owner]).collect();
        let (mut total, mut of_senders) = (Load::default(), HashMap::<UserId, Load>::new());
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
                (false, _) => Err(Shortage::Inbox),
                (true, false) => Err(Shortage::Share),
                (true, true) => Ok(()),
            };
            // Shares are known only for an inbox that was counted when it was about half full.
            let unsure = rooms.unsure(&[Candidate { user: owner, device, sender, bytes }], |_| Some(Stamp::default()));
            if !unsure.is_empty() {
                let found: Vec<Counted> = of_senders.iter().map(|(sender, load)| (device, *sender, *load)).collect();
                rooms.counted([device], &found, Stamp::default());
            }
            assert_eq!(taken(&rooms, Candidate { user: owner, device, sender, bytes }), expected);
            if expected.is_ok() {
                total = total.plus(Load::one(bytes));
                of_senders.insert(sender, load.plus(Load::one(bytes)));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_inbox_is_counted_once_in_a_second_and_one_with_room_whenever_it_seems_full() {
    let (rooms, owner, sender, device) = (rooms(0), UserId::random(), UserId::random(), DeviceNo(1));
    let one = Candidate { user: owner, device, sender, bytes: 1 };
    let is_unsure = || !rooms.unsure(&[one], |_| Some(Stamp::default())).is_empty();
    assert!(is_unsure(), "nothing is known of it");
    let full = [(device, sender, Load { messages: MESSAGES, bytes: 20 })];
    rooms.counted([device], &full, Stamp::default());
    assert!(is_unsure());
    assert_eq!(taken(&rooms, one), Err(Shortage::Inbox));
    assert!(!is_unsure());
    tokio::time::advance(FULL_FOR).await;
    assert!(is_unsure(), "there may be room by now");
    empty(&rooms, device);
    assert_eq!(taken(&rooms, one), Ok(()));
    assert!(!is_unsure());
}

#[test]
fn a_row_that_another_node_has_written_is_not_believed() {
    let (rooms, owner, device) = (rooms(0), UserId::random(), DeviceNo(1));
    let one = Candidate { user: owner, device, sender: UserId::random(), bytes: 1 };
    rooms.counted([device], &[(device, one.sender, Load { messages: 1, bytes: 1 })], (12, 12));
    assert!(rooms.unsure(&[one], |_| Some((12, 12))).is_empty());
    assert_eq!(rooms.unsure(&[one], |_| Some((13, 13))), [(owner, device)]);
    assert!(rooms.unsure(&[one], |_| None).is_empty(), "it is not half full");
}

/// Each of these inboxes is full, and together they have more senders than are remembered.
#[test]
fn an_inbox_is_not_taken_for_empty_when_too_many_are_remembered() {
    let rooms = rooms(0);
    let full: Vec<Counted> =
        (0..MESSAGES).map(|_| (DeviceNo(0), UserId::random(), Load { messages: 1, bytes: 1 })).collect();
    let inboxes = REMEMBERED_SENDERS as i64 / MESSAGES as i64 + 2;
    let coming: Vec<Candidate> = (0..inboxes)
        .map(|no| Candidate { user: UserId::random(), device: DeviceNo(no), sender: UserId::random(), bytes: 1 })
        .collect();
    for one in &coming {
        let found: Vec<Counted> = full.iter().map(|(_, sender, load)| (one.device, *sender, *load)).collect();
        rooms.counted([one.device], &found, Stamp::default());
    }
    let judged = || rooms.judge(&coming, NOW, |_| Some(Stamp::default()));
    assert!(judged().unwrap().0.iter().all(Result::is_err), "all of them are full");
    rooms.bound();
    assert!(judged().is_none(), "they have to be counted again");
    assert_eq!(rooms.unsure(&coming, |_| Some(Stamp::default())).len(), coming.len());
}

/// Two groups are under way: whatever one of them does to what is remembered, the other one writes no row that says less than
/// what waits.
#[test]
fn a_row_never_says_less_than_waits_whatever_another_group_forgets() {
    for _ in 0..500 {
        let (rooms, owner, sender) = (rooms(0), UserId::random(), UserId::random());
        let devices = [DeviceNo(1), DeviceNo(2)];
        let waiting: Vec<Counted> = devices
            .iter()
            .map(|device| (*device, sender, Load { messages: rand::random_range(0..=MESSAGES), bytes: 20 }))
            .collect();
        rooms.counted(devices, &waiting, Stamp::default());
        let mut most = waiting.iter().map(|(.., load)| load.messages).max().unwrap();
        if rand::random() {
            rooms.forget();
        }
        let coming = devices.map(|device| Candidate { user: owner, device, sender: UserId::random(), bytes: 1 });
        if rooms.judge(&coming, NOW, |_| Some(Stamp::default())).is_none() {
            rooms.counted(devices, &waiting, Stamp::default());
            rooms.judge(&coming, NOW, |_| Some(Stamp::default())).unwrap();
        }
        most = (most + 1).min(MESSAGES);
        match rand::random_range(0..3) {
            0 => rooms.forget(),
            // Another account of the other group.
            1 => empty(&rooms, DeviceNo(3)),
            _ => {}
        }
        if let Some((messages, _)) = rooms.stamped(owner, &devices) {
            assert!(u64::from(messages.unsigned_abs()) >= most, "{messages} instead of {most}");
        }
    }
}

#[test]
fn an_inbox_that_is_counted_often_fills_no_memory() {
    let (rooms, device) = (rooms(0), DeviceNo(1));
    let found: Vec<Counted> =
        (0..MESSAGES).map(|_| (device, UserId::random(), Load { messages: 1, bytes: 1 })).collect();
    for _ in 0..=REMEMBERED_SENDERS as u64 / MESSAGES {
        rooms.counted([device], &found, Stamp::default());
    }
    assert_eq!(rooms.state().senders, found.len());
    rooms.bound();
    assert!(rooms.stamped(UserId::random(), &[device]).is_some(), "it is still remembered");
    empty(&rooms, device);
    let one = Candidate { user: UserId::random(), device, sender: UserId::random(), bytes: 1 };
    taken(&rooms, one).unwrap();
    assert_eq!(rooms.state().senders, 0, "an inbox with room remembers no senders");
}

#[test]
fn a_day_is_charged_with_what_is_admitted_and_written_down_in_parts() {
    let (rooms, owner, sender, device) = (rooms(640), UserId::random(), UserId::random(), DeviceNo(1));
    empty(&rooms, device);
    let one = Candidate { user: owner, device, sender, bytes: 5 };
    let (verdict, mut charges) = charged(&rooms, one);
    assert_eq!((verdict, charges.debts()), (Ok(()), vec![]), "half of a 64th");
    charges.settle();
    let part = i64::try_from(DAY.as_millis() / 64).unwrap();
    for _ in 0..2 {
        let (verdict, mut charges) = charged(&rooms, one);
        assert_eq!((verdict, charges.debts()), (Ok(()), vec![(sender, part)]));
        charges.written(&[(sender, NOW + DAY)]);
        // The commit failed: it is to be written down again.
    }
    let (_, mut charges) = charged(&rooms, one);
    assert_eq!(charges.debts(), [(sender, part)]);
    charges.written(&[(sender, NOW + DAY - Duration::from_millis(1))]);
    charges.settle();
    assert_eq!(taken(&rooms, one), Err(Shortage::Day));
}

/// Whatever groups of whatever size are under way, and however they end: a day is charged with what was queued, and two
/// groups together admit no more than one.
#[test]
fn a_day_is_charged_with_what_was_committed() {
    for _ in 0..200 {
        let (rooms, sender, device) = (rooms(640), UserId::random(), DeviceNo(1));
        let (mut queued, mut stored, mut under_way) = (0, 0_i64, Vec::<(u64, Charges, i64)>::new());
        for _ in 0..200 {
            if under_way.len() < 2 && rand::random() {
                empty(&rooms, device);
                let one = Candidate { user: UserId::random(), device, sender, bytes: rand::random_range(1..30) };
                let (verdict, mut charges) = charged(&rooms, one);
                let bytes = if verdict.is_ok() { one.bytes } else { 0 };
                let waiting: u64 = under_way.iter().map(|(bytes, ..)| bytes).sum();
                assert_eq!(verdict.is_ok(), queued + waiting + one.bytes <= 640);
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
                charges.settle();
            }
        }
        under_way.clear();
        let (unwritten, per_byte) = (rooms.state().days.unwritten(sender), DAY.as_millis() / 640);
        assert_eq!(u128::from(stored.unsigned_abs()) + u128::from(unwritten) * per_byte, u128::from(queued) * per_byte);
    }
}
