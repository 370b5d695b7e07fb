//! Where the bytes that a client has sent end: in the middle of a message, or between two. The library doesn't tell.

/// Bytes of the longest head of a frame: two, a length and a mask.
const LONGEST_HEAD: usize = 14;

/// Follows the frames of one client. It checks nothing; what isn't WebSocket ends the socket elsewhere.
#[derive(Default)]
pub(super) struct Framing {
    head: [u8; LONGEST_HEAD],
    /// Bytes of the head that have come.
    known: usize,
    /// Bytes of the payload that are still to come.
    left: u64,
    /// A fragmented message has begun and not ended.
    in_message: bool,
    /// The payloads of the message under way, or of the last one, as far as they were announced; in bytes.
    message: u64,
    /// The largest message or control frame so far, in bytes.
    largest: u64,
}

impl Framing {
    /// The client has sent these bytes.
    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
        while let Some((first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let skipped = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                self.left -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            self.head[self.known] = *first;
            self.known += 1;
            bytes = rest;
            if self.known >= 2 && self.known == self.head_length() {
                self.begin_payload();
            }
        }
    }

    /// True if the bytes so far are whole messages.
    pub(super) fn is_between_messages(&self) -> bool {
        self.known == 0 && self.left == 0 && !self.in_message
    }

    /// The size of the largest message or control frame so far, by the heads of its frames, in bytes.
    pub(super) fn largest(&self) -> u64 {
        self.largest
    }

    /// How long the head is, by its first two bytes.
    fn head_length(&self) -> usize {
        let length = match self.head[1] & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let mask = if self.head[1] & 0x80 == 0 { 0 } else { 4 };
        2 + length + mask
    }

    fn begin_payload(&mut self) {
        let long = |bytes: &[u8]| bytes.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        self.left = match self.head[1] & 0x7f {
            126 => long(&self.head[2..4]),
            127 => long(&self.head[2..10]),
            short => u64::from(short),
        };
        // Control frames may come between the parts of a message.
        let is_control = self.head[0] & 0x08 != 0;
        if !is_control {
            let before = if self.in_message { self.message } else { 0 };
            self.message = before.saturating_add(self.left);
            self.in_message = self.head[0] & 0x80 == 0;
        }
        // The library takes a control frame that is too long, too, before it refuses it.
        self.largest = self.largest.max(if is_control { self.left } else { self.message });
        self.known = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A masked frame whose first byte is given.
    fn frame(first: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![first];
        match payload {
            0..=125 => frame.push(0x80 | payload as u8),
            126..=0xffff => frame.extend([0x80 | 126, (payload >> 8) as u8, payload as u8]),
            _ => frame.extend([0xff].into_iter().chain((payload as u64).to_be_bytes())),
        }
        frame.extend([7; 4]);
        frame.resize(frame.len() + payload, 0xff);
        frame
    }

    #[test]
    fn whole_messages_end_where_they_end_however_their_bytes_come() {
        let messages = [
            frame(0x82, 0),
            frame(0x82, 125),
            frame(0x89, 3),
            frame(0x82, 126),
            frame(0x82, 70_000),
            // A message of three parts with a ping between them.
            [frame(0x02, 300), frame(0x00, 0), frame(0x89, 1), frame(0x80, 5)].concat(),
        ];
        let (bytes, mut ends, mut end) = (messages.concat(), Vec::new(), 0);
        for message in &messages {
            end += message.len();
            ends.push(end);
        }
        for piece in [1, 2, 5, 13, 1024] {
            let (mut framing, mut passed) = (Framing::default(), 0);
            for part in bytes.chunks(piece) {
                framing.pass(part);
                passed += part.len();
                assert_eq!(framing.is_between_messages(), ends.contains(&passed), "{passed} bytes, {piece} at a time");
            }
            assert_eq!(framing.largest(), 70_000);
        }
    }

    #[test]
    fn a_message_is_as_large_as_its_parts_together() {
        let mut framing = Framing::default();
        framing.pass(&frame(0x82, 600));
        framing.pass(&frame(0x02, 500));
        framing.pass(&frame(0x89, 125));
        framing.pass(&frame(0x00, 400));
        assert_eq!((framing.largest(), framing.is_between_messages()), (900, false));
        framing.pass(&frame(0x80, 300)[..20]);
        assert_eq!(framing.largest(), 1200, "as soon as they are announced");
        let mut framing = Framing::default();
        framing.pass(&frame(0x89, 2000)[..10]);
        assert_eq!((framing.largest(), framing.is_between_messages()), (2000, false), "a ping, which is too long");
    }
}
