//! Which accounts get mail from groups under way, and the sends that wait for them: what is stored for one account is stored in
//! one order, so a second group for it would only wait for the first one, and others with it. The same goes for a send that
//! is repeated while it is being stored.

use std::collections::{HashSet, VecDeque};

use crate::delivery::group::{Group, QueuedSend};
use crate::model::ids::{DeviceNo, IdempotencyKey, UserId};
use crate::model::message::SendRequest;

/// Who may go into the next group.
#[derive(Default)]
pub(super) struct AccountSchedule {
    busy: HashSet<UserId>,
    /// The sends themselves that are under way.
    keys: HashSet<(DeviceNo, IdempotencyKey)>,
    waiting: VecDeque<QueuedSend>,
    /// The accounts of the sends that wait. A later send does not overtake them there, so that each has its turn.
    reserved: HashSet<UserId>,
}

impl AccountSchedule {
    /// Puts a send into the group, or has it wait.
    pub fn admit(&mut self, queued: QueuedSend, group: &mut Group) {
        let is_held = |user| self.busy.contains(&user) || self.reserved.contains(&user);
        if queued.send.accounts().any(is_held) || self.keys.contains(&(queued.send.sender.no, queued.send.key)) {
            self.reserved.extend(queued.send.accounts());
            self.waiting.push_back(queued);
        } else {
            group.add_send(queued);
        }
    }

    /// Puts those into the group that have waited and whose accounts are free, until it is full.
    pub fn admit_waiting(&mut self, group: &mut Group, max_requests: usize) {
        self.reserved.clear();
        for queued in std::mem::take(&mut self.waiting) {
            if group.is_full(max_requests) {
                self.reserved.extend(queued.send.accounts());
                self.waiting.push_back(queued);
            } else {
                self.admit(queued, group);
            }
        }
    }

    /// Says that this group is under way.
    pub fn start(&mut self, group: &Group) {
        self.busy.extend(group.sends.iter().flat_map(SendRequest::accounts));
        self.keys.extend(group.sends.iter().map(|send| (send.sender.no, send.key)));
    }

    /// Says that it no longer is.
    pub fn finish(&mut self, group: &Group) {
        for user in group.sends.iter().flat_map(SendRequest::accounts) {
            self.busy.remove(&user);
        }
        for send in &group.sends {
            self.keys.remove(&(send.sender.no, send.key));
        }
    }

    /// How many sends wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes all that wait.
    pub fn take_waiting(&mut self) -> impl Iterator<Item = QueuedSend> {
        self.reserved.clear();
        std::mem::take(&mut self.waiting).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::{Semaphore, oneshot};

    use super::*;
    use crate::delivery::group::PendingSend;
    use crate::model::ids::DeviceId;
    use crate::model::message::{Recipient, Sender};
    use crate::telemetry::traces::Span;

    /// A send by this number to these accounts.
    fn send(number: i64, users: &[UserId]) -> QueuedSend {
        let sender = Sender { user: UserId::random(), device: DeviceId::random(), no: DeviceNo(number) };
        let recipients =
            users.iter().map(|user| Recipient { user: *user, submissions: Vec::new(), throttled_for: None }).collect();
        QueuedSend {
            send: SendRequest { sender, key: IdempotencyKey::random(), digest: [0; 16], recipients },
            pending: PendingSend {
                _memory: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
                reply: oneshot::channel().0,
                deferred_since: None,
                span: Span::within("a test"),
            },
        }
    }

    fn numbers(group: &Group) -> Vec<i64> {
        group.sends.iter().map(|send| send.sender.no.0).collect()
    }

    /// A group of those of these that may go.
    fn started(schedule: &mut AccountSchedule, sends: impl IntoIterator<Item = QueuedSend>) -> Group {
        let mut group = Group::default();
        sends.into_iter().for_each(|queued| schedule.admit(queued, &mut group));
        schedule.start(&group);
        group
    }

    fn admit_waiting(schedule: &mut AccountSchedule, max_requests: usize) -> Vec<i64> {
        let mut group = Group::default();
        schedule.admit_waiting(&mut group, max_requests);
        numbers(&group)
    }

    #[test]
    fn no_two_groups_under_way_write_to_the_same_account() {
        let [a, b] = [UserId::random(), UserId::random()];
        let mut schedule = AccountSchedule::default();
        let first = started(&mut schedule, [send(1, &[a]), send(2, &[a])]);
        assert_eq!(numbers(&first), [1, 2], "one group may do so as often as it likes");
        let second = started(&mut schedule, [send(3, &[a]), send(4, &[b])]);
        assert_eq!((numbers(&second), schedule.waiting()), (vec![4], 1));
        schedule.finish(&second);
        assert!(admit_waiting(&mut schedule, 10).is_empty());
        schedule.finish(&first);
        assert_eq!(admit_waiting(&mut schedule, 10), [3]);
        assert_eq!(schedule.waiting(), 0);
    }

    #[test]
    fn a_send_that_waits_for_several_accounts_is_not_overtaken_at_any_of_them() {
        let [a, b] = [UserId::random(), UserId::random()];
        let mut schedule = AccountSchedule::default();
        let first = started(&mut schedule, [send(1, &[a])]);
        assert!(started(&mut schedule, [send(2, &[a, b]), send(3, &[b])]).is_empty());
        schedule.finish(&first);
        assert_eq!(admit_waiting(&mut schedule, 10), [2, 3], "in the order in which they came");
    }

    #[test]
    fn a_send_that_is_repeated_while_it_is_under_way_waits_also_when_it_names_other_accounts() {
        let mut schedule = AccountSchedule::default();
        let (first, mut again) = (send(1, &[UserId::random()]), send(1, &[UserId::random()]));
        again.send.sender = first.send.sender;
        again.send.key = first.send.key;
        let first = started(&mut schedule, [first]);
        assert!(started(&mut schedule, [again]).is_empty());
        schedule.finish(&first);
        assert_eq!(admit_waiting(&mut schedule, 10), [1]);
    }

    #[test]
    fn sends_that_do_not_fit_into_the_group_keep_their_place() {
        let a = UserId::random();
        let mut schedule = AccountSchedule::default();
        let first = started(&mut schedule, [send(1, &[a])]);
        started(&mut schedule, [send(2, &[a]), send(3, &[a])]);
        schedule.finish(&first);
        assert_eq!(admit_waiting(&mut schedule, 1), [2]);
        assert!(started(&mut schedule, [send(4, &[a])]).is_empty(), "3 came before");
        assert_eq!(admit_waiting(&mut schedule, 10), [3, 4]);
    }

    #[test]
    fn after_taking_all_waiting_sends_the_accounts_are_free() {
        let [a, b] = [UserId::random(), UserId::random()];
        let mut schedule = AccountSchedule::default();
        let first = started(&mut schedule, [send(1, &[a])]);
        started(&mut schedule, [send(2, &[a, b])]);
        assert_eq!(schedule.take_waiting().count(), 1);
        assert_eq!(numbers(&started(&mut schedule, [send(3, &[b])])), [3]);
        schedule.finish(&first);
        assert_eq!(numbers(&started(&mut schedule, [send(4, &[a])])), [4]);
    }
}
