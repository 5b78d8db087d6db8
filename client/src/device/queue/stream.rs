//! How far the bytes of one connection got, in each direction.
//!
//! ```text
//!   incoming:  inbox ─► payload (into its pages) ─► inbox ─► …     outgoing:  piece ─► piece ─► piece (one batch)
//!              one operation for each, linked to the next where the next is known
//! ```
//! The inbox takes headers and whatever follows them, up to what was asked for; of a payload that begins there the rest
//! is received into its pages.
//!
//! An operation may move only a part of what it was asked for (READ_FIXED and WRITE_FIXED always may, RECV and SEND with
//! MSG_WAITALL when the stream ends). The kernel then cancels what is linked behind it, and the caller goes on where it
//! stopped. So there is one rule for every way of moving bytes: count what was moved, and when nothing is out any more,
//! ask for the rest.
//!
//! Pure state, without I/O; called by `core.rs`, which tells completions in the order of the stream. Nothing here
//! allocates after construction.

use std::io;
use std::ops::Range;

use proto::nbd::transmission::SIMPLE_REPLY_BYTES;

use super::connection::{Origin, Piece};

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
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
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
        // Nothing was moved: a receive that is to wait for the socket first ends so when a kernel worker runs it, because a
        // worker does not wait that way. It gets there behind an operation that had to wait 128 times (seen on 7.3.4).
        if result == -libc::EAGAIN {
            self.is_broken = true;
        // The first of a chain is never cancelled: that would be a chain which gets nowhere, over and over.
        } else if result == -libc::ECANCELED && self.has_moved {
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

/// What is being received: bytes of the inbox, and before them the rest of the payload that the last header announced.
///
/// The inbox's memory is the ring's; this knows which part of it holds bytes that were not taken yet.
#[derive(Debug, Default)]
pub struct Incoming {
    payload: Option<(u16, Stretch)>,
    inbox: Range<usize>,
    receiving: Stretch,
    chain: Chain,
}

impl Incoming {
    /// Operations that are not reaped.
    pub fn operations_out(&self) -> usize {
        self.chain.operations_out
    }

    /// Whether a payload is to be received into its pages next.
    pub fn has_payload(&self) -> bool {
        self.payload.is_some()
    }

    /// What to receive next: the rest of a payload, linked to the inbox up to byte `inbox_end`; the operations then count
    /// as out. With bytes before `inbox_end` in the inbox, fewer are asked for.
    pub fn push(&mut self, inbox_end: usize) -> (Option<(u16, Stretch)>, Range<usize>) {
        debug_assert!(self.inbox.end < inbox_end, "no room in the inbox");
        self.chain.operations_out += 1 + usize::from(self.payload.is_some());
        self.receiving = Stretch::new((inbox_end - self.inbox.end) as u32);
        (self.payload, self.inbox.end..inbox_end)
    }

    /// A RECV into the inbox completed; how many bytes came is the sender's business.
    ///
    /// # Errors
    /// [`StreamError`], by cause.
    pub fn inbox_completed(&mut self, result: i32) -> Result<(), StreamError> {
        self.chain.completed(&mut self.receiving, result)?;
        self.inbox.end += std::mem::take(&mut self.receiving).done_bytes() as usize;
        Ok(())
    }

    /// Takes the next reply's header out of the inbox, if all of it is there: where it is.
    pub fn take_header(&mut self) -> Option<Range<usize>> {
        let is_here = self.payload.is_none() && self.inbox.len() >= SIMPLE_REPLY_BYTES;
        is_here.then(|| self.take(SIMPLE_REPLY_BYTES))
    }

    /// The header announced the tag's payload. Takes what is there of it out of the inbox: where that is, and whether it
    /// is all. If not, the rest is received next.
    pub fn take_payload(&mut self, tag: u16, len_bytes: u32) -> (Range<usize>, bool) {
        debug_assert!(self.payload.is_none());
        let here = self.take(self.inbox.len().min(len_bytes as usize));
        let stretch = Stretch { len_bytes, done_bytes: here.len() as u32 };
        self.payload = (!stretch.is_done()).then_some((tag, stretch));
        (here, stretch.is_done())
    }

    /// Lets the inbox begin at its first byte again: what has to be moved there.
    pub fn compact(&mut self) -> Range<usize> {
        let left = self.inbox.clone();
        self.inbox = 0..left.len();
        left
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

    fn take(&mut self, len: usize) -> Range<usize> {
        let taken = self.inbox.start..self.inbox.start + len;
        self.inbox.start = taken.end;
        taken
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
        Self { pieces, index: 0, stretch: Stretch::default(), chain: Chain::default() }
    }

    /// Operations that are not reaped.
    pub fn operations_out(&self) -> usize {
        self.chain.operations_out
    }

    /// Forgets the batch, whose connection was lost and reaped.
    pub fn abandon(&mut self) {
        assert_eq!(self.chain.operations_out, 0, "a batch is being sent");
        self.pieces.clear();
        self.chain = Chain::default();
        self.enter(0);
    }

    /// Whether the whole batch was sent.
    pub fn is_done(&self) -> bool {
        self.index == self.pieces.len()
    }

    /// Replaces the batch, which is done, by what `fill` puts into it; after an error it is empty.
    pub fn next_batch<E>(&mut self, fill: impl FnOnce(&mut Vec<Piece>) -> Result<(), E>) -> Result<(), E> {
        assert!(self.is_done() && self.chain.operations_out == 0, "a batch is being sent");
        let outcome = fill(&mut self.pieces);
        if outcome.is_err() {
            self.pieces.clear();
        }
        self.enter(0);
        outcome
    }

    /// Whether data of WRITEs in it is sent from the requests' own pages.
    pub fn has_pages(&self) -> bool {
        self.pieces.iter().any(|piece| matches!(piece, Piece::Payload { origin: Origin::Pages, .. }))
    }

    /// The piece to go on with, what is left of it, and whether more follows; `None` when the batch is done.
    pub fn next(&self) -> Option<(Piece, Stretch, bool)> {
        let piece = *self.pieces.get(self.index)?;
        Some((piece, self.stretch, self.index + 1 < self.pieces.len()))
    }

    /// The socket took bytes of that piece, without an operation.
    ///
    /// # Errors
    /// It took none, or more than there were.
    pub fn sent(&mut self, bytes: u32) -> Result<(), StreamError> {
        match bytes {
            0 => return Err(StreamError::Closed),
            _ if bytes > self.stretch.rest_bytes() => return Err(StreamError::OutOfStep),
            _ => self.stretch.done_bytes += bytes,
        }
        if self.stretch.is_done() {
            self.enter(self.index + 1);
        }
        Ok(())
    }

    /// The socket was full, and an operation waits for room.
    pub fn waits_for_room(&mut self) {
        self.chain.operations_out += 1;
    }

    /// That operation completed.
    pub fn room_came(&mut self) {
        self.chain.operations_out -= 1;
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
        let mut outgoing = unpushed_batch(pieces);
        outgoing.pushed();
        outgoing
    }

    fn unpushed_batch(pieces: &[Piece]) -> Outgoing {
        let mut outgoing = Outgoing::new(8);
        let filled: Result<(), ()> = outgoing.next_batch(|batch| {
            batch.extend_from_slice(pieces);
            Ok(())
        });
        filled.unwrap();
        outgoing
    }

    fn write(tag: u16) -> [Piece; 2] {
        [Piece::Outbox { start: 0, len: 28 }, Piece::Payload { tag, len_bytes: 4096, origin: Origin::Pages }]
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
    fn what_the_socket_takes_at_once_needs_no_operation() {
        let pieces = write(3);
        let mut outgoing = unpushed_batch(&pieces);
        assert!(outgoing.has_pages());
        outgoing.sent(28).unwrap();
        let (piece, rest, has_more) = outgoing.next().unwrap();
        assert_eq!((piece, rest.done_bytes(), rest.rest_bytes(), has_more), (pieces[1], 0, 4096, false));
        outgoing.sent(96).unwrap();
        outgoing.waits_for_room();
        assert_eq!((outgoing.operations_out(), outgoing.is_done()), (1, false));
        outgoing.room_came();
        assert!(matches!(outgoing.sent(0), Err(StreamError::Closed)));
        assert!(matches!(outgoing.sent(4001), Err(StreamError::OutOfStep)));
        outgoing.sent(4000).unwrap();
        assert!(outgoing.is_done() && outgoing.next().is_none() && outgoing.operations_out() == 0);
    }

    #[test]
    fn an_inbox_gives_headers_and_the_payloads_behind_them() {
        let mut incoming = Incoming::default();
        assert_eq!(incoming.push(1024), (None, 0..1024));
        incoming.inbox_completed(16 + 512 + 16 + 100).unwrap();
        assert_eq!(incoming.take_header(), Some(0..16));
        assert_eq!(incoming.take_payload(7, 512), (16..528, true));
        assert_eq!(incoming.take_header(), Some(528..544));
        assert_eq!(incoming.take_payload(8, 4096), (544..644, false), "the rest is not here yet");
        assert_eq!((incoming.take_header(), incoming.compact()), (None, 644..644));
        let (payload, part) = incoming.push(1024);
        let (tag, rest) = payload.expect("the rest is received into its pages");
        assert_eq!((tag, rest.done_bytes(), rest.rest_bytes(), part), (8, 100, 3996, 0..1024));
        assert!(incoming.payload_completed(3996).unwrap());
        incoming.inbox_completed(16).unwrap();
        assert_eq!(incoming.take_header(), Some(0..16));
    }

    #[test]
    fn a_header_may_come_byte_by_byte() {
        let mut incoming = Incoming::default();
        for have in 0..16 {
            assert_eq!(incoming.take_header(), None);
            assert_eq!(incoming.compact(), 0..have);
            assert_eq!(incoming.push(16), (None, have..16));
            incoming.inbox_completed(1).unwrap();
        }
        assert_eq!((incoming.take_header(), incoming.compact()), (Some(0..16), 16..16));
    }

    #[test]
    fn a_payload_in_pieces_comes_before_the_next_header() {
        let mut incoming = incoming_with_payload(4096);
        assert_eq!(incoming.operations_out(), 2);
        assert!(!incoming.payload_completed(4000).unwrap());
        incoming.inbox_completed(CANCELED).unwrap();
        assert_eq!((incoming.operations_out(), incoming.take_header()), (0, None));
        let (payload, part) = incoming.push(16);
        assert_eq!((payload.map(|(_, stretch)| stretch.rest_bytes()), part), (Some(96), 0..16));
        assert!(incoming.payload_completed(96).unwrap());
        incoming.inbox_completed(16).unwrap();
        assert_eq!((incoming.take_header(), incoming.has_payload()), (Some(0..16), false));
    }

    #[test]
    fn a_link_that_breaks_behind_a_whole_payload_costs_the_header_only() {
        let mut incoming = incoming_with_payload(512);
        assert!(incoming.payload_completed(512).unwrap());
        incoming.inbox_completed(CANCELED).unwrap();
        assert_eq!(incoming.push(16), (None, 0..16));
    }

    #[test]
    fn a_receive_that_a_worker_would_not_wait_for_is_asked_for_again() {
        let mut incoming = incoming_with_payload(512);
        assert!(incoming.payload_completed(512).unwrap());
        incoming.inbox_completed(-libc::EAGAIN).unwrap();
        assert_eq!((incoming.operations_out(), incoming.take_header()), (0, None));
        assert_eq!(incoming.push(16), (None, 0..16));
        incoming.inbox_completed(16).unwrap();
        assert_eq!(incoming.take_header(), Some(0..16));
    }

    #[test]
    fn a_header_behind_a_short_payload_is_an_error() {
        let mut incoming = incoming_with_payload(512);
        assert!(!incoming.payload_completed(511).unwrap());
        assert!(matches!(incoming.inbox_completed(16), Err(StreamError::OutOfStep)));
        let mut incoming = Incoming::default();
        incoming.push(16);
        assert!(
            matches!(incoming.inbox_completed(17), Err(StreamError::OutOfStep)),
            "more than was asked for"
        );
    }

    /// A payload and the header behind it are being received.
    fn incoming_with_payload(len_bytes: u32) -> Incoming {
        let mut incoming = Incoming::default();
        assert_eq!(incoming.take_payload(5, len_bytes), (0..0, false));
        incoming.push(16);
        incoming
    }
}
