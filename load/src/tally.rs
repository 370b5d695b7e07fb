//! What came of the messages from one device to another: they carry numbers from 0 on, in the order of their sending.

use std::collections::BTreeSet;

/// Counts in memory that grows with what is missing, not with what came.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// One more than the highest number that came.
    next: u32,
    /// Lower numbers that have not come.
    missing: BTreeSet<u32>,
    pub repeated: u64,
    /// Came after one that was sent later.
    pub reordered: u64,
}

impl Tally {
    /// Counts one that came; answers whether it is the first time.
    pub fn take(&mut self, number: u32) -> bool {
        if number >= self.next {
            self.missing.extend(self.next..number);
            self.next = number + 1;
        } else if self.missing.remove(&number) {
            self.reordered += 1;
        } else {
            self.repeated += 1;
            return false;
        }
        true
    }

    /// How many of the first `sent` have not come.
    pub fn lost(&self, sent: u32) -> u64 {
        self.missing.len() as u64 + u64::from(sent.saturating_sub(self.next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_repeated_and_reordered_messages_are_told_apart() {
        let mut tally = Tally::default();
        let are_new = [0, 1, 4, 4, 2, 6].map(|number| tally.take(number));
        assert_eq!(are_new, [true, true, true, false, true, true]);
        assert_eq!((tally.repeated, tally.reordered), (1, 1));
        // 3, 5, 7, 8 and 9.
        assert_eq!(tally.lost(10), 5);
        assert_eq!(Tally::default().lost(2), 2);
    }
}
