//! What a queue's rules (`core.rs`) have done for them: by the driver for a tag, by a socket for a connection, by memory for a
//! payload.
//!
//! Done by `ring.rs`, and in the simulator by a network of its own.

use std::io;
use std::ops::Range;
use std::time::Duration;

use proto::nbd::transmission::SIMPLE_REPLY_BYTES;

use super::connection::PayloadSource;
use super::stream::Stretch;

/// What a queue wants done. Whatever is begun here
/// completes later, by a call of the queue's `handle_*`; what is done at once says how it went.
pub trait QueueIo {
    /// A connection in the transmission phase.
    type Socket;
    /// Where the data of a connection's WRITEs comes from.
    type Source<'a>: PayloadSource<Error = io::Error>
    where
        Self: 'a;

    /// Waits for the tag's first request.
    fn fetch(&mut self, tag: u16);
    /// Gives the tag's request back with this result, bytes or a negative errno, and waits for the next.
    fn commit_and_fetch(&mut self, tag: u16, result: i32);
    /// Has everything begin that was asked for: when this returns, who waits for requests that were given back may know of it. Errors:
    /// not all of it has begun.
    fn submit(&mut self) -> io::Result<()>;
    /// Whether the tag's pages, which hold a request with data, have to be put into the buffer table by
    /// [`QueueIo::register`].
    fn needs_registration(&self, tag: u16) -> bool;
    /// Puts the tag's pages into the buffer table.
    fn register(&mut self, tag: u16);
    /// Undoes that, before a commit that is asked for next: the ring starts what is pushed in order, and the driver does this at once.
    fn unregister(&mut self, tag: u16);
    /// The tag's request has ended, by a reply or without one.
    fn release(&mut self, tag: u16, has_reply: bool);
    /// Before a READ that was received is given back. Errors: the data did not get to its pages.
    fn copy_to_request(&mut self, tag: u16, len_bytes: u32) -> io::Result<()>;

    /// How much an inbox holds.
    fn inbox_bytes(&self) -> usize;
    /// A header in a connection's inbox, into which no receive is out; as in the next two.
    fn header(&self, connection: u16, place: Range<usize>) -> [u8; SIMPLE_REPLY_BYTES];
    /// Moves the first bytes of the tag's READ from there to where they belong. Errors: they cannot be.
    fn scatter(&mut self, connection: u16, place: Range<usize>, tag: u16) -> io::Result<()>;
    /// Moves what is left in the inbox to its begin.
    fn compact_inbox(&mut self, connection: u16, left: Range<usize>);
    /// Receives what comes, into a part of the connection's inbox. `is_idle`: nothing can have come yet.
    fn receive_inbox(&mut self, connection: u16, part: Range<usize>, is_idle: bool);
    /// Receives the rest of the tag's payload; what is asked for next starts when all of it has come.
    fn receive_payload(&mut self, connection: u16, pages: Pages);

    /// A connection's outbox, from which no send is out, and where payloads come from.
    fn outbox(&mut self, connection: u16) -> (&mut [u8], Self::Source<'_>);
    /// Sends at once of the outbox's bytes from `start` on what the socket takes: how many bytes. Errors: send's, `EAGAIN` when it
    /// took none.
    fn send_outbox_now(
        &mut self,
        connection: u16,
        start: usize,
        rest: Stretch,
        has_more: bool,
    ) -> io::Result<u32>;
    /// The same of the tag's staged payload.
    fn send_staged_now(&mut self, connection: u16, tag: u16, rest: Stretch) -> io::Result<u32>;
    /// Waits until the connection's socket takes more.
    fn wait_for_room(&mut self, connection: u16);
    /// Sends the rest of the outbox's bytes from `start` on. `has_more`: what is asked for next starts when all of it has left.
    fn send_outbox(&mut self, connection: u16, start: usize, rest: Stretch, has_more: bool);
    /// The same of the tag's payload, from its pages.
    fn send_payload(&mut self, connection: u16, pages: Pages, has_more: bool);

    /// Every operation on the connection's socket ends soon.
    fn shut_down(&mut self, connection: u16);
    /// What TLS said on it instead of data, for people.
    fn take_control_record(&mut self, connection: u16) -> Option<String>;
    /// For how long the peer has acknowledged nothing of what it was sent.
    fn unacknowledged_for(&self, connection: u16) -> Option<Duration>;
    /// Whether so much was encrypted under its keys that it needs others.
    fn are_keys_worn(&self, connection: u16) -> bool;
    /// It was lost, and its operations are reaped: its socket lets go of the pages that it may still refer to, or their requests would
    /// not end before its peer is given up.
    fn drop_references(&mut self, connection: u16);
    /// Memory of WRITEs that were given up is replaced, if it can be.
    fn renew_staging(&mut self);
    /// Puts a socket in the place of one whose operations were all reaped. Errors: the queue cannot go on.
    fn replace_socket(&mut self, connection: u16, socket: Self::Socket) -> io::Result<()>;
}

/// A part of a request's pages, between which and the socket bytes move.
#[derive(Debug, Clone, Copy)]
pub struct Pages {
    /// Whose.
    pub tag: u16,
    /// Whether they are in the buffer table because [`QueueIo::register`] put them there.
    pub by_hand: bool,
    /// What has to be moved yet.
    pub rest: Stretch,
}
