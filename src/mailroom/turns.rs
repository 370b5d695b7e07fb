//! Which accounts get mail from groups under way, and the sends that wait for them: what is stored for one account is stored in
//! one order, so a second group for it would only wait for the first one, and others with it. The same goes for a send that
//! is repeated while it is being stored.

use std::collections::{HashSet, VecDeque};

use crate::mailroom::group::{Group, Waiting};
use crate::model::ids::{DeviceNo, IdempotencyKey, UserId};
use crate::model::mail::Outgoing;

/// Who may go into the next group.
#[derive(Default)]
pub(super) struct Turns {
    busy: HashSet<UserId>,
    /// The sends themselves that are under way.
    keys: HashSet<(DeviceNo, IdempotencyKey)>,
    waiting: VecDeque<Waiting>,
    /// The accounts of those who wait. Whoever comes later does not overtake them there, so that each has its turn.
    awaited: HashSet<UserId>,
}

impl Turns {
    /// Puts a send into the group, or has it wait.
    pub fn let_in(&mut self, send: Waiting, group: &mut Group) {
        let is_held = |user| self.busy.contains(&user) || self.awaited.contains(&user);
        if send.mail.accounts().any(is_held) || self.keys.contains(&(send.mail.sender.no, send.mail.key)) {
            self.awaited.extend(send.mail.accounts());
            self.waiting.push_back(send);
        } else {
            group.add_send(send);
        }
    }

    /// Puts those into the group that have waited and whose accounts are free, until it is full.
    pub fn let_in_who_waited(&mut self, group: &mut Group, most: usize) {
        self.awaited.clear();
        for send in std::mem::take(&mut self.waiting) {
            if group.is_full(most) {
                self.awaited.extend(send.mail.accounts());
                self.waiting.push_back(send);
            } else {
                self.let_in(send, group);
            }
        }
    }

    /// Says that this group is under way.
    pub fn begin(&mut self, group: &Group) {
        self.busy.extend(group.sends.iter().flat_map(Outgoing::accounts));
        self.keys.extend(group.sends.iter().map(|mail| (mail.sender.no, mail.key)));
    }

    /// Says that it no longer is.
    pub fn end(&mut self, group: &Group) {
        for user in group.sends.iter().flat_map(Outgoing::accounts) {
            self.busy.remove(&user);
        }
        for mail in &group.sends {
            self.keys.remove(&(mail.sender.no, mail.key));
        }
    }

    /// How many sends wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes all that wait.
    pub fn give_up(&mut self) -> impl Iterator<Item = Waiting> {
        self.awaited.clear();
        std::mem::take(&mut self.waiting).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::{Semaphore, oneshot};

    use super::*;
    use crate::mailroom::group::Slip;
    use crate::model::ids::DeviceId;
    use crate::model::mail::{Recipient, Sender};
    use crate::telemetry::traces::Span;

    /// A send by this number to these accounts.
    fn send(number: i64, users: &[UserId]) -> Waiting {
        let sender = Sender { user: UserId::random(), device: DeviceId::random(), no: DeviceNo(number) };
        let recipients =
            users.iter().map(|user| Recipient { user: *user, submissions: Vec::new(), busy_for: None }).collect();
        Waiting {
            mail: Outgoing { sender, key: IdempotencyKey::random(), digest: [0; 16], recipients },
            slip: Slip {
                _room: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
                reply: oneshot::channel().0,
                left_since: None,
                span: Span::within("a test"),
            },
        }
    }

    fn numbers(group: &Group) -> Vec<i64> {
        group.sends.iter().map(|mail| mail.sender.no.0).collect()
    }

    /// A group of whoever may go of these.
    fn begun(turns: &mut Turns, sends: impl IntoIterator<Item = Waiting>) -> Group {
        let mut group = Group::default();
        sends.into_iter().for_each(|send| turns.let_in(send, &mut group));
        turns.begin(&group);
        group
    }

    fn let_in_who_waited(turns: &mut Turns, most: usize) -> Vec<i64> {
        let mut group = Group::default();
        turns.let_in_who_waited(&mut group, most);
        numbers(&group)
    }

    #[test]
    fn no_two_groups_under_way_write_to_the_same_account() {
        let [a, b] = [UserId::random(), UserId::random()];
        let mut turns = Turns::default();
        let first = begun(&mut turns, [send(1, &[a]), send(2, &[a])]);
        assert_eq!(numbers(&first), [1, 2], "one group may do so as often as it likes");
        let second = begun(&mut turns, [send(3, &[a]), send(4, &[b])]);
        assert_eq!((numbers(&second), turns.waiting()), (vec![4], 1));
        turns.end(&second);
        assert!(let_in_who_waited(&mut turns, 10).is_empty());
        turns.end(&first);
        assert_eq!(let_in_who_waited(&mut turns, 10), [3]);
        assert_eq!(turns.waiting(), 0);
    }

    #[test]
    fn who_waits_for_several_accounts_is_not_overtaken_at_any_of_them() {
        let [a, b] = [UserId::random(), UserId::random()];
        let mut turns = Turns::default();
        let first = begun(&mut turns, [send(1, &[a])]);
        assert!(begun(&mut turns, [send(2, &[a, b]), send(3, &[b])]).is_empty());
        turns.end(&first);
        assert_eq!(let_in_who_waited(&mut turns, 10), [2, 3], "in the order in which they came");
    }

    #[test]
    fn a_send_that_is_repeated_while_it_is_under_way_waits_also_when_it_names_other_accounts() {
        let mut turns = Turns::default();
        let (first, mut again) = (send(1, &[UserId::random()]), send(1, &[UserId::random()]));
        again.mail.sender = first.mail.sender;
        again.mail.key = first.mail.key;
        let first = begun(&mut turns, [first]);
        assert!(begun(&mut turns, [again]).is_empty());
        turns.end(&first);
        assert_eq!(let_in_who_waited(&mut turns, 10), [1]);
    }

    #[test]
    fn those_for_whom_the_group_has_no_room_keep_their_turn() {
        let a = UserId::random();
        let mut turns = Turns::default();
        let first = begun(&mut turns, [send(1, &[a])]);
        begun(&mut turns, [send(2, &[a]), send(3, &[a])]);
        turns.end(&first);
        assert_eq!(let_in_who_waited(&mut turns, 1), [2]);
        assert!(begun(&mut turns, [send(4, &[a])]).is_empty(), "3 came before");
        assert_eq!(let_in_who_waited(&mut turns, 10), [3, 4]);
    }

    #[test]
    fn when_all_have_given_up_the_accounts_are_free() {
        let [a, b] = [UserId::random(), UserId::random()];
        let mut turns = Turns::default();
        let first = begun(&mut turns, [send(1, &[a])]);
        begun(&mut turns, [send(2, &[a, b])]);
        assert_eq!(turns.give_up().count(), 1);
        assert_eq!(numbers(&begun(&mut turns, [send(3, &[b])])), [3]);
        turns.end(&first);
        assert_eq!(numbers(&begun(&mut turns, [send(4, &[a])])), [4]);
    }
}
