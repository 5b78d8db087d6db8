//! Where requests and a WRITE's payload leave: what a queue sends next, on a connection that is there.

use std::io;

use super::{BATCH_PIECES_MAX, QueueCore, assert_ours};
use crate::device::queue::connection::Piece;
use crate::device::queue::io::{Pages, QueueIo};
use crate::device::queue::link::Loss;
use crate::device::queue::stream::{StreamError, Stretch};

impl QueueCore {
    /// Sends what waits, or the rest of what stopped short: one batch at a time for each socket.
    pub(super) fn send<Io: QueueIo>(&mut self, io: &mut Io, connection: u16) {
        loop {
            let (is_up, takes_requests) = (self.is_up(), self.link.takes_requests());
            let lane = &mut self.lanes[usize::from(connection)];
            if lane.outgoing.operations_out() > 0 || !is_up {
                return;
            }
            if lane.outgoing.is_done() {
                if !takes_requests {
                    return;
                }
                let (outbox, source) = io.outbox(connection);
                let requests = &mut self.requests;
                let filled = lane.outgoing.next_batch(|pieces| {
                    lane.connection.take_batch(requests, outbox, pieces, BATCH_PIECES_MAX, source)
                });
                if let Err(error) = filled {
                    return self.fail(io, connection, Loss::Gather(error));
                }
                if lane.outgoing.is_done() {
                    return;
                }
            }
            if lane.outgoing.has_pages() {
                return self.push_batch(io, connection);
            }
            if let Err(error) = self.send_now(io, connection) {
                return self.fail(io, connection, Loss::Socket { what: "send", error });
            }
        }
    }

    /// Sends as much of the batch as the socket takes; where that is not all, an operation waits for room.
    fn send_now<Io: QueueIo>(&mut self, io: &mut Io, connection: u16) -> Result<(), StreamError> {
        let lane = &mut self.lanes[usize::from(connection)];
        while let Some((piece, rest, has_more)) = lane.outgoing.next() {
            let sent = match piece {
                Piece::Outbox { start, .. } => io.send_outbox_now(connection, start, rest, has_more),
                Piece::Payload { tag, .. } => io.send_staged_now(connection, tag, rest),
            };
            match sent {
                Ok(bytes) => lane.outgoing.sent(bytes)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    lane.outgoing.waits_for_room();
                    io.wait_for_room(connection);
                    return Ok(());
                }
                Err(error) => return Err(StreamError::Socket(error)),
            }
        }
        lane.connection.batch_sent(&mut self.requests);
        self.leave_a_server_that_ends(io);
        Ok(())
    }

    /// Sends the rest of a batch by operations that name the requests' pages, in one chain.
    fn push_batch<Io: QueueIo>(&mut self, io: &mut Io, connection: u16) {
        let lane = &self.lanes[usize::from(connection)];
        let mut rest = lane.outgoing.rest().peekable();
        while let Some((piece, rest_of_piece)) = rest.next() {
            let has_more = rest.peek().is_some();
            match piece {
                Piece::Outbox { start, .. } => io.send_outbox(connection, start, rest_of_piece, has_more),
                Piece::Payload { tag, .. } => {
                    let pages = self.pages(tag, rest_of_piece);
                    assert_ours(self.tags.operation_submitted(tag));
                    io.send_payload(connection, pages, has_more);
                }
            }
        }
        drop(rest);
        self.lane(connection).outgoing.pushed();
    }

    pub(super) fn pages(&self, tag: u16, rest: Stretch) -> Pages {
        Pages { tag, by_hand: assert_ours(self.tags.is_registered_by_hand(tag)), rest }
    }
}
