//! The memory for the large frames of one socket. It is taken before messages are read and given back when their frame has
//! been written, so what is in memory is always paid for. A message that finds no room waits for its turn. A large message of
//! the client that finds none ends the socket.

use std::future::pending;
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::gateway::socket::MAX_INBOUND_BYTES;
use crate::limits::{FRAMES_OF_ACCOUNT_KIB, LimitSubject, ResourceLimit, ResourcePermit, kib};
use crate::tasks::jittered;

/// A frame with at most this many bytes of messages needs no memory of the budget.
pub(super) const SMALL_FRAME_BYTES: usize = 64 << 10;
/// Where there is no room for as much as the client would take, there may be for a frame of this size.
const SMALLER_BYTES: usize = 256 << 10;
/// What the library needs for the largest message of a client: it joins the parts beside the buffer that it reads into.
const INCOMING_BYTES: usize = 2 * MAX_INBOUND_BYTES;
/// How long a message waits for its turn before the inbox is read again: the message may be gone.
const PATIENCE: Duration = Duration::from_mins(1);
/// The pause before that.
const PAUSE: Duration = Duration::from_secs(1);

/// The memory of one socket.
pub(super) struct FrameMemory {
    limit: ResourceLimit,
    subject: LimitSubject,
    /// For the frame that is made next.
    reserved: Option<Reserved>,
    /// For the frame under way.
    in_use: Option<ResourcePermit>,
    /// For a large message of the client.
    incoming: Option<ResourcePermit>,
    /// Set while a message waits for room. It ends with nothing if there was none in time.
    waiting: Option<BoxFuture<'static, Option<Reserved>>>,
}

struct Reserved {
    bytes: usize,
    /// `None` for a modest frame.
    held: Option<ResourcePermit>,
}

impl FrameMemory {
    /// No memory yet.
    pub(super) fn new(limit: ResourceLimit, subject: LimitSubject) -> Self {
        Self { limit, subject, reserved: None, in_use: None, incoming: None, waiting: None }
    }

    /// A large message of the client begins to need memory (true), or does so no longer. Returns false if there is none.
    pub(super) fn incoming(&mut self, is_large: bool) -> bool {
        self.incoming = if is_large { self.limit.try_take(self.subject, kib(INCOMING_BYTES)) } else { None };
        self.incoming.is_some() == is_large
    }

    /// Takes memory for the next frame, and returns how many bytes of messages it may have. That are at most `most`, unless
    /// memory was reserved for a message.
    pub(super) fn reserve(&mut self, most: usize) -> usize {
        let reserved = self.reserved.take().unwrap_or_else(|| self.for_frame(most));
        self.reserved.insert(reserved).bytes
    }

    fn for_frame(&self, most: usize) -> Reserved {
        let most = most.min((FRAMES_OF_ACCOUNT_KIB as usize) << 10);
        for bytes in [most, SMALLER_BYTES.min(most)] {
            if bytes > SMALL_FRAME_BYTES
                && let Some(held) = self.limit.try_take(self.subject, kib(bytes))
            {
                return Reserved { bytes, held: Some(held) };
            }
        }
        Reserved { bytes: most.min(SMALL_FRAME_BYTES), held: None }
    }

    /// Takes memory for one message that is larger than what was reserved. Returns false if there is none; then the message
    /// waits for it.
    pub(super) fn reserve_for_message(&mut self, bytes: usize) -> bool {
        // A socket that waits holds nothing for frames. Otherwise sockets could wait for each other.
        self.reserved = None;
        if bytes <= SMALL_FRAME_BYTES {
            self.reserved = Some(Reserved { bytes, held: None });
            return true;
        }
        let units = kib(bytes).min(FRAMES_OF_ACCOUNT_KIB);
        if let Some(held) = self.limit.try_take(self.subject, units) {
            self.reserved = Some(Reserved { bytes, held: Some(held) });
            return true;
        }
        let (limit, subject) = (self.limit.clone(), self.subject);
        self.waiting = Some(Box::pin(async move {
            match limit.take(subject, units, PATIENCE).await {
                Ok(held) => Some(Reserved { bytes, held: Some(held) }),
                Err(_) => {
                    tokio::time::sleep(jittered(PAUSE)).await;
                    None
                }
            }
        }));
        false
    }

    /// True while a message waits. Until [`FrameMemory::granted`] ends, the inbox is not to be read.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Ends when the inbox can be read again. Pending if nothing waits. Dropping the future loses nothing.
    pub(super) async fn granted(&mut self) {
        match &mut self.waiting {
            Some(waiting) => {
                self.reserved = waiting.await;
                self.waiting = None;
            }
            None => pending().await,
        }
    }

    /// A frame with so many bytes of messages is under way: keeps its memory, and gives back the rest.
    pub(super) fn keep(&mut self, bytes: usize) {
        let held = self.reserved.take().and_then(|reserved| reserved.held);
        self.in_use = held.filter(|_| bytes > SMALL_FRAME_BYTES);
        if let Some(held) = &mut self.in_use {
            held.shrink_to(kib(bytes));
        }
    }

    /// No frame is made: gives back what was reserved for it.
    pub(super) fn cancel(&mut self) {
        self.reserved = None;
    }

    /// The frame under way has been written.
    pub(super) fn written(&mut self) {
        self.in_use = None;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::limits::ResourceLimitConfig;
    use crate::model::ids::UserId;

    const MIB: usize = 1 << 20;

    /// The memory of another account's socket.
    fn memory(limit: &ResourceLimit) -> FrameMemory {
        FrameMemory::new(limit.clone(), LimitSubject::Account(UserId::random()))
    }

    fn limit(mebibytes: u32) -> ResourceLimit {
        ResourceLimit::new(ResourceLimitConfig {
            max_waiting: 4,
            in_turn: true,
            ..ResourceLimitConfig::total(mebibytes << 10)
        })
    }

    #[test]
    fn a_large_message_of_a_client_takes_memory_until_it_needs_no_more() {
        let limit = limit(1);
        let mut sockets = [memory(&limit), memory(&limit), memory(&limit)];
        let [one, two, three] = &mut sockets;
        assert!(one.incoming(true) && two.incoming(true));
        assert_eq!(limit.taken(), 1 << 10);
        assert!(!three.incoming(true));
        assert!(one.incoming(false) && three.incoming(true));
    }

    #[test]
    fn a_frame_takes_what_it_may_have_then_what_it_has_and_then_nothing() {
        let limit = limit(4);
        let mut one = memory(&limit);
        assert_eq!(one.reserve(MIB), MIB);
        assert_eq!(limit.taken(), 1024);
        one.keep(300 << 10);
        assert_eq!(limit.taken(), 300);
        one.written();
        assert_eq!(one.reserve(MIB), MIB);
        one.keep(SMALL_FRAME_BYTES);
        assert_eq!(limit.taken(), 0, "a modest frame is not charged");
    }

    #[test]
    fn without_room_frames_are_smaller_and_in_the_end_modest() {
        let limit = limit(1);
        let mut sockets: Vec<_> = (0..6).map(|_| memory(&limit)).collect();
        let sizes: Vec<_> = sockets.iter_mut().map(|socket| socket.reserve(700 << 10) >> 10).collect();
        assert_eq!(sizes, [700, 256, 64, 64, 64, 64]);
    }

    #[test]
    fn no_frame_is_larger_than_what_an_account_may_have() {
        let limit = limit(64);
        assert_eq!(memory(&limit).reserve(64 * MIB), (FRAMES_OF_ACCOUNT_KIB as usize) << 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_without_room_waits_and_is_charged_in_full() {
        let limit = limit(4);
        let (mut one, mut other) = (memory(&limit), memory(&limit));
        assert!(one.reserve_for_message(3 * MIB));
        assert_eq!(one.reserve(SMALL_FRAME_BYTES), 3 * MIB);
        one.keep(3 * MIB);
        assert_eq!(other.reserve(MIB), MIB);
        assert!(!other.reserve_for_message(2 * MIB));
        assert_eq!(limit.taken(), 3 << 10, "it holds nothing while it waits");
        assert!(other.is_waiting() && other.granted().now_or_never().is_none());
        one.written();
        other.granted().await;
        assert!(!other.is_waiting());
        assert_eq!((other.reserve(MIB), limit.taken()), (2 * MIB, 2 << 10));
        other.keep(2 * MIB);
        other.written();
        assert_eq!(limit.taken(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_finds_no_room_in_time_is_looked_at_again_after_a_pause() {
        let limit = limit(1);
        let (mut one, mut other) = (memory(&limit), memory(&limit));
        assert!(one.reserve_for_message(MIB));
        let begun = tokio::time::Instant::now();
        assert!(!other.reserve_for_message(MIB));
        other.granted().await;
        assert!(!other.is_waiting() && begun.elapsed() >= PATIENCE + PAUSE / 2);
        assert_eq!(other.reserve(MIB), SMALL_FRAME_BYTES);
    }
}
