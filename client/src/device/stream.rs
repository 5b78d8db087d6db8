//! How far the bytes of one connection got, in each direction.
//!
//! ```text
//!   incoming:  header ─► header ─► payload ─► header ─► …        outgoing:  piece ─► piece ─► piece (one batch)
//!              one operation for each, linked to the next where the next is known
//! ```
//!
//! An operation may move only a part of what it was asked for (READ_FIXED and WRITE_FIXED always may, RECV and SEND with
//! MSG_WAITALL when the stream ends). The kernel then cancels what is linked behind it, and the caller goes on where it
//! stopped. So there is one rule for every way of moving bytes: count what was moved, and when nothing is out any more,
//! ask for the rest.
//!
//! Pure state, without I/O; called by `queue_loop.rs`, which tells completions in the order of the stream. Nothing here
//! allocates after construction.

use std::io;

use proto::nbd::transmission::SIMPLE_REPLY_BYTES;

use super::connection::Piece;

/// The connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other side closed it.
    #[error("the server closed the connection")]
    Closed,
    /// The socket failed.
    #[error(transparent)]
    Socket(io::Error),
    /// An operation went on behind one that had stopped short: bytes are in the wrong place.
    #[error("the kernel went on behind an operation that had stopped short")]
    OutOfStep,
}

/// A part of the stream and how much of it was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    len_bytes: u32,
    done_bytes: u32,
}

impl Stretch {
    /// Nothing of `len_bytes` was moved yet.
    pub const fn new(len_bytes: u32) -> Self {
        Self { len_bytes, done_bytes: 0 }
    }

    /// Where the rest begins.
    pub const fn done_bytes(self) -> u32 {
        self.done_bytes
    }

    /// What has to be moved yet.
    pub const fn rest_bytes(self) -> u32 {
        self.len_bytes - self.done_bytes
    }

    const fn is_done(self) -> bool {
        self.done_bytes == self.len_bytes
    }
}

/// The operations of one direction that are out, each linked to the one pushed after it.
#[derive(Debug, Default)]
struct Chain {
    operations_out: usize,
    has_moved: bool,
    is_broken: bool,
}

impl Chain {
    /// Takes the result of the oldest operation that is out; `stretch` is what it was asked to move.
    fn completed(&mut self, stretch: &mut Stretch, result: i32) -> Result<(), StreamError> {
        self.operations_out -= 1;
        // The first of a chain is never cancelled: that would be a chain which gets nowhere, over and over.
        if result == -libc::ECANCELED && self.has_moved {
            self.is_broken = true;
        } else if result < 0 {
            return Err(StreamError::Socket(io::Error::from_raw_os_error(-result)));
        } else if result == 0 {
            return Err(StreamError::Closed);
        } else if self.is_broken || result as u32 > stretch.rest_bytes() {
            return Err(StreamError::OutOfStep);
        } else {
            stretch.done_bytes += result as u32;
            self.has_moved = true;
            self.is_broken = !stretch.is_done();
        }
        if self.operations_out == 0 {
            *self = Self::default();
        }
        Ok(())
    }
}

/// What is being received: a reply's header, and before it the payload that the last header announced.
#[derive(Debug)]
pub struct Incoming {
    payload: Option<(u16, Stretch)>,
    header: Stretch,
    chain: Chain,
}

impl Default for Incoming {
    /// Before the first reply.
    fn default() -> Self {
        Self { payload: None, header: Self::HEADER, chain: Chain::default() }
    }
}

impl Incoming {
    const HEADER: Stretch = Stretch::new(SIMPLE_REPLY_BYTES as u32);

    /// Operations that are not reaped.
    pub fn operations_out(&self) -> usize {
        self.chain.operations_out
    }

    /// A header announced the tag's payload.
    pub fn expect_payload(&mut self, tag: u16, len_bytes: u32) {
        debug_assert!(self.payload.is_none() && self.header == Self::HEADER);
        self.payload = Some((tag, Stretch::new(len_bytes)));
    }

    /// What to receive next, the payload linked to the header, and what of each; the operations then count as out.
    pub fn push(&mut self) -> (Option<(u16, Stretch)>, Stretch) {
        self.chain.operations_out += 1 + usize::from(self.payload.is_some());
        (self.payload, self.header)
    }

    /// A RECV of the header completed; whether all of it is there.
    ///
    /// # Errors
    /// [`StreamError`], by cause.
    pub fn header_completed(&mut self, result: i32) -> Result<bool, StreamError> {
        self.chain.completed(&mut self.header, result)?;
        let is_done = self.header.is_done();
        if is_done {
            self.header = Self::HEADER;
        }
        Ok(is_done)
    }

    /// A receive of the payload completed; whether all of it is there.
    ///
    /// # Errors
    /// [`StreamError`], by cause.
    pub fn payload_completed(&mut self, result: i32) -> Result<bool, StreamError> {
        let Some((_, stretch)) = &mut self.payload else { return Err(StreamError::OutOfStep) };
        self.chain.completed(stretch, result)?;
        let is_done = stretch.is_done();
        if is_done {
            self.payload = None;
        }
        Ok(is_done)
    }
}

/// What is being sent: one batch.
#[derive(Debug)]
pub struct Outgoing {
    pieces: Vec<Piece>,
    /// Which piece has bytes to be sent yet; `pieces.len()` when none has.
    index: usize,
    /// How far that piece got.
    stretch: Stretch,
    chain: Chain,
}

impl Outgoing {
    /// Nothing to send; a batch has at most `pieces_max` pieces.
    pub fn new(pieces_max: usize) -> Self {
        let pieces = Vec::with_capacity(pieces_max);
        Self { pieces, index: 0, stretch: Stretch::new(0), chain: Chain::default() }
    }

    /// Operations that are not reaped.
    pub fn operations_out(&self) -> usize {
        self.chain.operations_out
    }

    /// Whether the whole batch was sent.
    pub fn is_done(&self) -> bool {
        self.index == self.pieces.len()
    }

    /// Replaces the batch, which is done, by what `fill` puts into it.
    pub fn next_batch(&mut self, fill: impl FnOnce(&mut Vec<Piece>)) {
        assert!(self.is_done() && self.chain.operations_out == 0, "a batch is being sent");
        fill(&mut self.pieces);
        self.enter(0);
    }

    /// The pieces that have bytes to be sent yet, each with what is left of it.
    pub fn rest(&self) -> impl Iterator<Item = (Piece, Stretch)> + '_ {
        let pieces = self.pieces[self.index..].iter().copied();
        pieces.enumerate().map(|(position, piece)| match position {
            0 => (piece, self.stretch),
            _ => (piece, Stretch::new(piece.len_bytes())),
        })
    }

    /// Every piece of [`Outgoing::rest`] was pushed, each linked to the next.
    pub fn pushed(&mut self) {
        self.chain.operations_out += self.pieces.len() - self.index;
    }

    /// The oldest operation completed; whether the batch is done.
    ///
    /// # Errors
    /// [`StreamError`], by cause.
    pub fn completed(&mut self, result: i32) -> Result<bool, StreamError> {
        self.chain.completed(&mut self.stretch, result)?;
        if self.stretch.is_done() && !self.is_done() {
            self.enter(self.index + 1);
        }
        Ok(self.is_done())
    }

    fn enter(&mut self, index: usize) {
        self.index = index;
        self.stretch = Stretch::new(self.pieces.get(index).map_or(0, Piece::len_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANCELED: i32 = -libc::ECANCELED;

    fn batch(pieces: &[Piece]) -> Outgoing {
        let mut outgoing = Outgoing::new(8);
        outgoing.next_batch(|batch| batch.extend_from_slice(pieces));
        outgoing.pushed();
        outgoing
    }

    fn write(tag: u16) -> [Piece; 2] {
        [Piece::Headers { start: 0, len: 28 }, Piece::Payload { tag, len_bytes: 4096 }]
    }

    /// Piece, bytes done and bytes left of everything that is to be sent yet.
    fn rest(outgoing: &Outgoing) -> Vec<(Piece, u32, u32)> {
        outgoing.rest().map(|(piece, stretch)| (piece, stretch.done_bytes(), stretch.rest_bytes())).collect()
    }

    #[test]
    fn a_batch_is_done_when_its_last_byte_is() {
        let mut outgoing = batch(&write(3));
        assert!(!outgoing.completed(28).unwrap());
        assert!(outgoing.completed(4096).unwrap());
        assert_eq!((outgoing.operations_out(), rest(&outgoing)), (0, vec![]));
    }

    #[test]
    fn a_short_send_is_taken_up_where_it_stopped() {
        let pieces = [write(3), write(4)].concat();
        let mut outgoing = batch(&pieces);
        for (result, out) in [(28, 3), (1000, 2), (CANCELED, 1), (CANCELED, 0)] {
            assert!(!outgoing.completed(result).unwrap());
            assert_eq!(outgoing.operations_out(), out);
        }
        assert_eq!(rest(&outgoing), [(pieces[1], 1000, 3096), (pieces[2], 0, 28), (pieces[3], 0, 4096)]);
        outgoing.pushed();
        for result in [3095, CANCELED, CANCELED] {
            assert!(!outgoing.completed(result).unwrap());
        }
        assert_eq!(rest(&outgoing)[0], (pieces[1], 4095, 1));
        outgoing.pushed();
        assert!(!outgoing.completed(1).unwrap() && !outgoing.completed(28).unwrap());
        assert!(outgoing.completed(4096).unwrap());
    }

    #[test]
    fn bytes_behind_a_short_send_are_an_error() {
        let mut outgoing = batch(&write(3));
        assert!(!outgoing.completed(20).unwrap());
        assert!(matches!(outgoing.completed(4096), Err(StreamError::OutOfStep)));
        let mut outgoing = batch(&write(3));
        assert!(matches!(outgoing.completed(29), Err(StreamError::OutOfStep)), "more than was asked for");
    }

    #[test]
    fn a_chain_that_gets_nowhere_is_an_error() {
        let mut outgoing = batch(&write(3));
        assert!(matches!(outgoing.completed(CANCELED), Err(StreamError::Socket(_))));
        assert!(matches!(batch(&write(3)).completed(0), Err(StreamError::Closed)));
        let Err(StreamError::Socket(error)) = batch(&write(3)).completed(-libc::EPIPE) else { panic!() };
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn a_payload_in_pieces_comes_before_the_next_header() {
        let mut incoming = Incoming::default();
        assert_eq!(incoming.push(), (None, Incoming::HEADER));
        assert!(!incoming.header_completed(1).unwrap());
        assert_eq!(incoming.push().1.done_bytes(), 1);
        assert!(incoming.header_completed(15).unwrap());
        incoming.expect_payload(5, 4096);
        assert_eq!(incoming.push(), (Some((5, Stretch::new(4096))), Incoming::HEADER));
        assert_eq!(incoming.operations_out(), 2);
        assert!(!incoming.payload_completed(4000).unwrap());
        assert!(!incoming.header_completed(CANCELED).unwrap());
        assert_eq!(incoming.operations_out(), 0);
        let (payload, header) = incoming.push();
        assert_eq!(payload.map(|(_, stretch)| stretch.rest_bytes()), Some(96));
        assert_eq!(header, Incoming::HEADER);
        assert!(incoming.payload_completed(96).unwrap());
        assert!(incoming.header_completed(16).unwrap());
        assert_eq!(incoming.push().0, None);
    }

    #[test]
    fn a_link_that_breaks_behind_a_whole_payload_costs_the_header_only() {
        let mut incoming = Incoming::default();
        incoming.expect_payload(0, 512);
        incoming.push();
        assert!(incoming.payload_completed(512).unwrap());
        assert!(!incoming.header_completed(CANCELED).unwrap());
        assert_eq!(incoming.push(), (None, Incoming::HEADER));
    }

    #[test]
    fn a_header_behind_a_short_payload_is_an_error() {
        let mut incoming = Incoming::default();
        incoming.expect_payload(0, 512);
        incoming.push();
        assert!(!incoming.payload_completed(511).unwrap());
        assert!(matches!(incoming.header_completed(16), Err(StreamError::OutOfStep)));
    }
}
