//! The memory that parts of uploads to a bucket have, and its shares.
//!
//! A part has to be held until it is full, which takes minutes with a slow line. So a part takes memory only as its bytes
//! come in: from `pieces`. A part that finds none there takes all that it will need from `wholes`, and gives its pieces back.
//! It never waits again, so parts that each hold a piece can't wait for each other for ever. That holds for small ones, too: an
//! account may send many at once, which together need more than its share.

use std::time::Duration;

use bytes::Bytes;
use object_store::{PutPayload, PutPayloadMut};

use crate::limits::{LimitSubject, NoRoom, ResourceLimit, ResourceLimitConfig, ResourcePermit, Scope, kib};

/// The smallest part that S3 allows. All but the last have this size; a body that fits into one is not cut.
pub(super) const PART_BYTES: usize = 5 << 20;
/// A part takes memory in blocks of this size.
const BLOCK_BYTES: usize = 64 << 10;

/// Memory for what has come in of parts that grow, in KiB.
const PIECES_KIB: u32 = 44 << 10;
/// The share of an account …
const PIECES_OF_ACCOUNT_KIB: u32 = 12 << 10;
/// … of an address …
const PIECES_OF_ADDRESS_KIB: u32 = 16 << 10;
/// … and of a network (/24, /48).
const PIECES_OF_NETWORK_KIB: u32 = 24 << 10;
/// The part of it that is reserved for small parts, in KiB.
const RESERVE_KIB: u32 = 8 << 10;
/// The largest small part, in KiB.
const SMALL_KIB: u32 = 1 << 10;

/// Memory for parts that have found no room to grow, in KiB: four of the largest.
const WHOLES_KIB: u32 = 4 * PART_KIB;
/// The share of an account …
const WHOLES_OF_ACCOUNT_KIB: u32 = PART_KIB;
/// … and of an address or a network.
const WHOLES_OF_ADDRESS_KIB: u32 = 2 * PART_KIB;
const PART_KIB: u32 = 5 << 10;

/// How long a part waits for memory.
const TURN: Duration = Duration::from_secs(20);
/// Parts that may wait for memory at a time.
const WAITING: usize = 1024;

/// The memory of all parts on this node. Cloning gives the same memory.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pieces: ResourceLimit,
    wholes: ResourceLimit,
}

impl Memory {
    /// All of it is free.
    pub fn new() -> Self {
        let pieces = ResourceLimitConfig {
            shares: vec![
                (Scope::Own, PIECES_OF_ACCOUNT_KIB),
                (Scope::Client, PIECES_OF_ADDRESS_KIB),
                (Scope::Block, PIECES_OF_NETWORK_KIB),
            ],
            reserve: RESERVE_KIB,
            small: SMALL_KIB,
            max_waiting: WAITING,
            ..ResourceLimitConfig::total(PIECES_KIB)
        };
        let wholes = ResourceLimitConfig {
            shares: vec![
                (Scope::Own, WHOLES_OF_ACCOUNT_KIB),
                (Scope::Client, WHOLES_OF_ADDRESS_KIB),
                (Scope::Block, WHOLES_OF_ADDRESS_KIB),
            ],
            max_waiting: WAITING,
            ..ResourceLimitConfig::total(WHOLES_KIB)
        };
        Self { pieces: ResourceLimit::new(pieces), wholes: ResourceLimit::new(wholes) }
    }

    /// A part of this subject, without any bytes yet, for the next of the `missing` bytes of its upload.
    pub fn part(&self, subject: LimitSubject, missing: u64) -> Part {
        let bytes = PutPayloadMut::new().with_block_size(BLOCK_BYTES);
        let final_size = usize::try_from(missing).unwrap_or(usize::MAX).min(PART_BYTES);
        Part { bytes, final_size, pieces: self.pieces.holder(subject), whole: self.wholes.holder(subject) }
    }
}

/// Bytes on their way, and their memory.
pub(super) struct Part {
    bytes: PutPayloadMut,
    /// Bytes that it will have in the end, if its upload has as many as announced.
    final_size: usize,
    pieces: ResourcePermit,
    whole: ResourcePermit,
}

impl Part {
    /// Bytes that have come in.
    pub fn length(&self) -> usize {
        self.bytes.content_length()
    }

    /// True when nothing more fits.
    pub fn is_full(&self) -> bool {
        self.length() == PART_BYTES
    }

    /// Takes as much as fits. It is copied, because a client that sends single bytes would make a list of them
    /// expensive.
    pub async fn take_in(&mut self, bytes: &mut Bytes) -> Result<(), NoRoom> {
        let bytes = bytes.split_to(bytes.len().min(PART_BYTES - self.length()));
        self.grow_to(self.length() + bytes.len()).await?;
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn grow_to(&mut self, length: usize) -> Result<(), NoRoom> {
        if self.whole.units() >= blocks(length) || self.pieces.try_grow_to(blocks(length)) {
            return Ok(());
        }
        self.whole.grow_to(blocks(length.max(self.final_size)), TURN).await?;
        self.pieces.shrink_to(0);
        Ok(())
    }

    /// The bytes, and their memory, which is to be kept for as long as they are.
    pub fn finish(self) -> (PutPayload, [ResourcePermit; 2]) {
        (self.bytes.freeze(), [self.pieces, self.whole])
    }
}

/// The memory of so many bytes, in KiB.
fn blocks(bytes: usize) -> u32 {
    kib(bytes.next_multiple_of(BLOCK_BYTES))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures_util::future::join_all;

    use super::*;
    use crate::model::ids::UserId;

    const WHOLE: u64 = PART_BYTES as u64;

    /// An account of its own at this address.
    fn account(address: [u8; 4]) -> LimitSubject {
        LimitSubject::AccountAt(UserId::random(), Ipv4Addr::from(address).into())
    }

    /// So many accounts in networks of their own.
    fn strangers(memory: &Memory, count: u8) -> Vec<Part> {
        (0..count).map(|network| memory.part(account([198, 51, network, 1]), WHOLE)).collect()
    }

    async fn fill(part: &mut Part, bytes: usize) -> Result<(), NoRoom> {
        let mut piece = Bytes::from(vec![7; bytes - part.length()]);
        while !piece.is_empty() {
            part.take_in(&mut piece.split_to(piece.len().min(BLOCK_BYTES))).await?;
        }
        Ok(())
    }

    /// Parts of this subject that stop a byte before they are full, until there is no room for a further one.
    async fn hoard(memory: &Memory, mut subject: impl FnMut(u8) -> LimitSubject) -> Vec<Part> {
        let mut held = Vec::new();
        for number in 0..100 {
            let mut part = memory.part(subject(number), WHOLE);
            if fill(&mut part, PART_BYTES - 1).await.is_err() {
                return held;
            }
            held.push(part);
        }
        panic!("there is no bound");
    }

    #[tokio::test(start_paused = true)]
    async fn neither_an_account_nor_an_address_nor_a_network_holds_the_memory_of_others() {
        let memory = Memory::new();
        let one = account([192, 0, 2, 1]);
        let of_account = hoard(&memory, |_| one).await;
        assert_eq!(of_account.len(), 3);
        let of_address = hoard(&memory, |_| account([192, 0, 2, 1])).await;
        assert_eq!(of_account.len() + of_address.len(), 5);
        let of_network = hoard(&memory, |host| account([192, 0, 2, host.saturating_add(2)])).await;
        assert_eq!(of_account.len() + of_address.len() + of_network.len(), 6);
        let begun = tokio::time::Instant::now();
        fill(&mut memory.part(account([198, 51, 100, 1]), WHOLE), PART_BYTES).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO, "a stranger doesn't even wait");
        drop((of_account, of_address, of_network));
        assert_eq!((memory.pieces.taken(), memory.wholes.taken()), (0, 0));
    }

    /// With all of them equally slow, which is the worst that can be.
    #[tokio::test(start_paused = true)]
    async fn eleven_slow_uploads_have_room_at_once_and_small_ones_beside_them() {
        let memory = Memory::new();
        let mut slow = strangers(&memory, 11);
        for bytes in (BLOCK_BYTES..=PART_BYTES).step_by(BLOCK_BYTES) {
            for part in &mut slow {
                fill(part, bytes).await.unwrap();
            }
        }
        assert!(slow.iter().all(Part::is_full));
        let small = memory.part(account([203, 0, 113, 1]), 1 << 20);
        fill(&mut { small }, 1 << 20).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn parts_that_each_hold_a_piece_never_wait_for_each_other_for_ever() {
        let memory = Memory::new();
        let mut parts = strangers(&memory, 44);
        for part in &mut parts {
            fill(part, 1 << 20).await.unwrap();
        }
        let full = join_all(parts.into_iter().map(|mut part| async move {
            fill(&mut part, PART_BYTES).await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await; // the service takes it
        }));
        tokio::time::timeout(TURN, full).await.unwrap();
        assert_eq!((memory.pieces.taken(), memory.wholes.taken()), (0, 0));
    }

    /// An album of one account, of which all pictures come in at the same pace.
    #[tokio::test(start_paused = true)]
    async fn many_small_uploads_of_one_account_at_once_all_have_their_turn() {
        let memory = Memory::new();
        let one = account([192, 0, 2, 1]);
        let full = join_all((0..60).map(|_| async {
            let mut part = memory.part(one, 300_000);
            for bytes in [50_000, 100_000, 150_000, 200_000, 250_000, 300_000] {
                fill(&mut part, bytes).await.unwrap();
                tokio::task::yield_now().await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await; // the service takes it
        }));
        tokio::time::timeout(TURN, full).await.unwrap();
        assert_eq!((memory.pieces.taken(), memory.wholes.taken()), (0, 0));
    }
}
