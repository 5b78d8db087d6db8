//! The data path: one thread, one ublk hardware queue, one ring, one or more connections.
//!
//! Each pass: **reap** what completed → **advance** the state machines (tags, connection) → **push** what they ask for →
//! **one submit**, which also waits. No lock, no allocation, no log above `trace` while nothing goes wrong.
//!
//! ```text
//!   FETCH/COMMIT done ─► connection.submit ─► take_batch ─► send outbox, and payloads as they were staged, at once
//!                                                      └──► send outbox ─link─► send payload (the request's pages)
//!   inbox received    ─► header_received ─┬─► COMMIT
//!                                         └─► receive payload (the request's pages) ─link─► inbox ─► COMMIT
//! ```
//!
//! Small payloads are copied between the pages and inbox or outbox, so that one receive or send moves everything there is:
//! the loop then gives many requests back at once, and gets as many at once. What needs no page of a request is sent without
//! the ring: it has left when the call returns, and the ring is entered only to wait.
//!
//! What moves a payload, and what has to be done before and after it, differs by data path (`payload.rs`); the loop is
//! the same for all. An operation on the socket may stop short: `stream.rs` knows what is left.
//!
//! A request goes to the connection with the fewest in flight and stays on it. A FLUSH may go to any: the block layer
//! issues it when the writes it covers have completed, and none completes before its reply, whichever connection it
//! was on.
//!
//! Called by `attachment.rs`, which starts one thread for each queue. When a connection fails, the sockets of all are
//! shut down; once every operation on one of them is reaped, and only then, its requests in flight end with EIO: no late
//! byte can reach a page that was given back. From then on the queue answers EIO until its device is detached.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use io_uring::types::Timespec;
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES};
use ublk_core::abi::{UBLK_IO_RES_ABORT, UBLK_IO_RES_OK};
use ublk_core::{TagError, TagTable};

use super::balance::Balance;
use super::block_request;
use super::connection::{Completion, Connection, Follows, Operation, Piece};
use super::payload::Payloads;
pub use super::queue_parts::{QueueError, QueueEvent, QueueParts};
use super::queue_ring::{Completed, Link, Operation as RingOperation, QueueRing};
use super::stream::{Incoming, Outgoing, StreamError};

/// Most pieces of one batch: enough that a full queue leaves in a few, bounded so that replies are not kept waiting.
const BATCH_PIECES_MAX: usize = 32;
/// Ended READs are given back together while the next payload is already there, up to this many bytes: some 100 µs of
/// copying. Whoever waits for them is woken once, and answers with as many requests at once.
const HELD_BYTES_MAX: u32 = 512 << 10;
/// How long the last FLUSH may take when the device goes away.
const FINAL_FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a socket that was shut down may take to give its operations back.
const REAP_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a queue until its device is gone. To be called on the queue's own thread, as `on_event` is then; that happens
/// never while requests are served without an error.
pub fn run(parts: QueueParts, on_event: &dyn Fn(QueueEvent)) {
    let queue_id = parts.queue.q_id();
    let outcome = QueueLoop::new(parts, on_event).and_then(QueueLoop::run);
    on_event(QueueEvent::Ended { queue_id, outcome });
}

/// One connection: what is said on it, and how far its bytes got.
struct Lane {
    connection: Connection,
    incoming: Incoming,
    outgoing: Outgoing,
}

impl Lane {
    fn new(queue_depth: u16, small_bytes_max: u32) -> Self {
        Self {
            // One more than the device has: for the loop's own FLUSH.
            connection: Connection::new(queue_depth + 1, small_bytes_max),
            incoming: Incoming::default(),
            outgoing: Outgoing::new(BATCH_PIECES_MAX),
        }
    }

    /// Operations on the socket that are not reaped.
    fn operations_out(&self) -> usize {
        self.incoming.operations_out() + self.outgoing.operations_out()
    }
}

struct QueueLoop<'a> {
    ring: QueueRing,
    tags: TagTable,
    lanes: Box<[Lane]>,
    balance: Balance,
    /// By tag: what its request is; the last one is the loop's own FLUSH.
    requests: Box<[Operation]>,
    volatile_cache: bool,
    /// Payloads that were received since requests were last given back; while it is not 0 ended requests are held back.
    held_bytes: u32,
    final_flush: Option<Result<(), i32>>,
    failure: Option<String>,
    on_event: &'a dyn Fn(QueueEvent),
}

/// The tag table only fails when this loop is wrong; a wrong byte may be next, so the process ends.
fn assert_ours<T>(outcome: Result<T, TagError>) -> T {
    match outcome {
        Ok(value) => value,
        Err(error) => panic!("the queue loop broke its own rule: {error}"),
    }
}

impl<'a> QueueLoop<'a> {
    fn new(parts: QueueParts, on_event: &'a dyn Fn(QueueEvent)) -> Result<Self, QueueError> {
        let depth = parts.queue.queue_depth();
        let QueueParts { data_path, transfer, has_user_copy, max_io_bytes, .. } = parts;
        let payloads = Payloads::new(data_path, transfer, has_user_copy, depth, max_io_bytes)?;
        let flush = Operation {
            command: Command::Flush,
            flags: CommandFlags::NONE,
            offset_bytes: 0,
            length_bytes: 0,
        };
        let nr_connections = parts.sockets.len();
        let ring = QueueRing::new(parts.queue, payloads, parts.sockets)?;
        let small_bytes_max = ring.small_bytes_max();
        Ok(Self {
            ring,
            tags: TagTable::new(depth),
            lanes: (0..nr_connections).map(|_| Lane::new(depth, small_bytes_max)).collect(),
            balance: Balance::new(nr_connections, depth + 1),
            requests: vec![flush; usize::from(depth) + 1].into_boxed_slice(),
            volatile_cache: parts.volatile_cache,
            held_bytes: 0,
            final_flush: None,
            failure: None,
            on_event,
        })
    }

    fn run(mut self) -> Result<(), QueueError> {
        for tag in 0..self.tags.queue_depth() {
            assert_ours(self.tags.fetch_submitted(tag));
            self.ring.fetch(tag);
        }
        for connection in self.connections() {
            self.receive(connection);
        }
        (self.on_event)(QueueEvent::Ready);
        while !self.tags.is_finished() {
            self.pass(None)?;
        }
        self.finish()
    }

    /// One pass: submit and wait, reap, advance, push.
    fn pass(&mut self, timeout: Option<Timespec>) -> Result<(), QueueError> {
        match self.held_bytes {
            0 => self.ring.submit_and_wait(timeout)?,
            _ => self.ring.submit_and_look()?,
        }
        let held_before_bytes = self.held_bytes;
        while let Some(completed) = self.ring.reap() {
            self.advance(completed)?;
        }
        if self.held_bytes == held_before_bytes || !self.has_more_to_receive() {
            self.held_bytes = 0;
        }
        for connection in self.connections() {
            let lane = &mut self.lanes[usize::from(connection)];
            if lane.connection.has_failed() && lane.operations_out() == 0 {
                lane.connection.reaped();
            }
            if self.held_bytes == 0 {
                self.commit_completed(connection);
            }
        }
        // What ended on one connection may have made room for what waits on another.
        for connection in self.connections() {
            self.receive(connection);
            self.send(connection);
        }
        Ok(())
    }

    /// Whether a reply whose payload is large has begun to arrive, and ended requests may wait for it.
    fn has_more_to_receive(&self) -> bool {
        let has_payload = self.lanes.iter().any(|lane| lane.incoming.has_payload());
        has_payload && self.held_bytes < HELD_BYTES_MAX && !self.has_failed()
    }

    fn connections(&self) -> std::ops::Range<u16> {
        0..self.lanes.len() as u16
    }

    // ------------------------------------------------------------------------------------------------- advance

    fn advance(&mut self, (operation, result): Completed) -> Result<(), QueueError> {
        match operation {
            RingOperation::Tag(tag) => return self.tag_completed(tag, result),
            RingOperation::Register(tag) => self.registered(tag, result),
            RingOperation::Unregister(tag) => assert_eq!(result, 0, "tag {tag} was registered"),
            RingOperation::ReceiveInbox(connection) => self.inbox_completed(connection, result),
            RingOperation::ReceivePayload(connection, tag) => self.payload_completed(connection, tag, result),
            RingOperation::SendOutbox(connection) => self.send_completed(connection, result),
            RingOperation::SendPayload(connection, tag) => {
                assert_ours(self.tags.operation_completed(tag));
                self.send_completed(connection, result);
            }
            // Whether there is room, or the socket is shut down: the next send tells.
            RingOperation::RoomToSend(connection) => {
                self.lanes[usize::from(connection)].outgoing.room_came();
            }
        }
        Ok(())
    }

    fn tag_completed(&mut self, tag: u16, result: i32) -> Result<(), QueueError> {
        if result == UBLK_IO_RES_OK {
            assert_ours(self.tags.request_arrived(tag));
            self.dispatch(tag);
            return Ok(());
        }
        if result == UBLK_IO_RES_ABORT {
            assert_ours(self.tags.abort_completed(tag));
            return Ok(());
        }
        Err(QueueError::Driver { tag, source: io::Error::from_raw_os_error(-result) })
    }

    /// A tag brought a request.
    fn dispatch(&mut self, tag: u16) {
        let descriptor = self.ring.queue().io_desc(tag);
        let operation = match block_request::operation(&descriptor) {
            Ok(operation) => operation,
            Err(errno) => return self.commit(tag, -errno),
        };
        self.requests[usize::from(tag)] = operation;
        let has_data = matches!(operation.command, Command::Read | Command::Write);
        if has_data && self.ring.needs_registration(tag) {
            return self.ring.register(tag);
        }
        self.submit(tag, operation);
    }

    fn submit(&mut self, tag: u16, operation: Operation) {
        let connection = self.balance.choose(tag);
        self.lanes[usize::from(connection)].connection.submit(tag, operation);
    }

    fn registered(&mut self, tag: u16, result: i32) {
        if result < 0 {
            self.commit(tag, -libc::EIO);
            return;
        }
        assert_ours(self.tags.buffer_registered(tag));
        self.submit(tag, self.requests[usize::from(tag)]);
    }

    fn inbox_completed(&mut self, connection: u16, result: i32) {
        let lane = &mut self.lanes[usize::from(connection)];
        match lane.incoming.inbox_completed(result) {
            Ok(()) if !lane.connection.has_failed() => {}
            Ok(()) => return,
            Err(error) => return self.fail(connection, describe("reply", &error)),
        }
        while let Some(place) = self.lanes[usize::from(connection)].incoming.take_header() {
            if let Err(reason) = self.header_received(connection, place) {
                return self.fail(connection, reason);
            }
        }
        let left = self.lanes[usize::from(connection)].incoming.compact();
        self.ring.compact_inbox(connection, left);
    }

    /// A reply's header is in the inbox; its payload may be, too, or a part of it.
    fn header_received(&mut self, connection: u16, place: Range<usize>) -> Result<(), String> {
        let lane = &mut self.lanes[usize::from(connection)];
        let header = self.ring.header(connection, place);
        let follows = lane.connection.header_received(&header).map_err(|error| error.to_string())?;
        let Follows::Payload { tag, len_bytes } = follows else { return Ok(()) };
        let (here, is_all) = lane.incoming.take_payload(tag, len_bytes);
        if !here.is_empty() {
            let moved = self.ring.scatter(connection, here, tag);
            moved.map_err(|error| format!("a READ's data cannot be copied to its pages: {error}"))?;
        }
        if is_all {
            lane.connection.payload_received(tag);
        }
        Ok(())
    }

    fn payload_completed(&mut self, connection: u16, tag: u16, result: i32) {
        assert_ours(self.tags.operation_completed(tag));
        let lane = &mut self.lanes[usize::from(connection)];
        match lane.incoming.payload_completed(result) {
            Ok(true) => {
                lane.connection.payload_received(tag);
                self.held_bytes += self.requests[usize::from(tag)].length_bytes;
            }
            Ok(false) => {}
            Err(error) => self.fail(connection, describe("payload", &error)),
        }
    }

    /// The pieces of a batch are linked, so they complete in their order.
    fn send_completed(&mut self, connection: u16, result: i32) {
        let lane = &mut self.lanes[usize::from(connection)];
        match lane.outgoing.completed(result) {
            Ok(true) if !lane.connection.has_failed() => lane.connection.batch_sent(),
            Ok(_) => {}
            Err(error) => self.fail(connection, describe("send", &error)),
        }
    }

    /// A connection is of no use any more, and with it the queue: shut all down so that their operations end.
    fn fail(&mut self, connection: u16, reason: String) {
        if self.has_failed() {
            return;
        }
        // Where the kernel does the records it only says EIO of one that is not data.
        let record = self.ring.socket(connection).take_control_record();
        let reason = record.map_or(reason, |record| record.to_string());
        let queue_id = self.ring.queue().q_id();
        tracing::error!(queue_id, connection, reason, "the connection is lost: I/O gets EIO");
        self.shut_down();
        (self.on_event)(QueueEvent::ConnectionFailed { queue_id, connection, reason: reason.clone() });
        self.failure = Some(reason);
    }

    fn shut_down(&mut self) {
        for (connection, lane) in (0..).zip(&mut self.lanes) {
            lane.connection.fail();
            // ENOTCONN: the peer was first.
            let _ = self.ring.socket(connection).shut_down();
        }
    }

    /// Connections fail together.
    fn has_failed(&self) -> bool {
        self.lanes.iter().any(|lane| lane.connection.has_failed())
    }

    // ---------------------------------------------------------------------------------------------------- push

    /// Gives a connection's ended requests back to the block layer.
    fn commit_completed(&mut self, connection: u16) {
        while let Some(Completion { tag, result }) =
            self.lanes[usize::from(connection)].connection.take_completion()
        {
            self.balance.ended(tag);
            if tag == self.flush_tag() {
                self.final_flush = Some(result);
                continue;
            }
            self.ring.release(tag);
            let operation = self.requests[usize::from(tag)];
            let mut result = block_request::commit_result(&operation, result);
            if result > 0
                && operation.command == Command::Read
                && let Err(error) = self.ring.copy_to_request(tag, operation.length_bytes)
            {
                tracing::error!(tag, %error, "a READ's data cannot be copied to its pages");
                result = -libc::EIO;
            }
            self.commit(tag, result);
        }
    }

    fn commit(&mut self, tag: u16, result: i32) {
        if assert_ours(self.tags.is_registered_by_hand(tag)) {
            assert_ours(self.tags.buffer_unregistered(tag));
            self.ring.unregister(tag);
        }
        assert_ours(self.tags.commit_submitted(tag));
        self.ring.commit_and_fetch(tag, result);
    }

    /// Receives what the stream holds next, or the rest of what stopped short.
    fn receive(&mut self, connection: u16) {
        let lane = &mut self.lanes[usize::from(connection)];
        if lane.incoming.operations_out() > 0 || lane.connection.has_failed() {
            return;
        }
        let inbox_end = match lane.connection.expects_large_payload() {
            true => SIMPLE_REPLY_BYTES,
            false => QueueRing::inbox_bytes(),
        };
        let (payload, part) = lane.incoming.push(inbox_end);
        let is_idle = lane.connection.in_flight() == usize::from(payload.is_some());
        if let Some((tag, rest)) = payload {
            assert_ours(self.tags.operation_submitted(tag));
            self.ring.receive_payload(connection, tag, rest);
        }
        self.ring.receive_inbox(connection, part, is_idle);
    }

    /// Sends what waits, or the rest of what stopped short: one batch at a time for each socket.
    fn send(&mut self, connection: u16) {
        loop {
            let lane = &mut self.lanes[usize::from(connection)];
            if lane.outgoing.operations_out() > 0 || lane.connection.has_failed() {
                return;
            }
            if lane.outgoing.is_done() {
                let (outbox, source) = self.ring.outbox(connection);
                let filled = lane.outgoing.next_batch(|pieces| {
                    lane.connection.take_batch(outbox, pieces, BATCH_PIECES_MAX, source)
                });
                if let Err(error) = filled {
                    let reason = format!("a WRITE's data cannot be copied from its pages: {error}");
                    return self.fail(connection, reason);
                }
                if lane.outgoing.is_done() {
                    return;
                }
            }
            if lane.outgoing.has_payloads() && !self.ring.stages() {
                return self.push_batch(connection);
            }
            if let Err(error) = self.send_now(connection) {
                return self.fail(connection, describe("send", &error));
            }
        }
    }

    /// Sends as much of the batch as the socket takes; where that is not all, an operation waits for room.
    fn send_now(&mut self, connection: u16) -> Result<(), StreamError> {
        let lane = &mut self.lanes[usize::from(connection)];
        while let Some((piece, rest, has_more)) = lane.outgoing.next() {
            let sent = match piece {
                Piece::Outbox { start, .. } => self.ring.send_outbox_now(connection, start, rest, has_more),
                Piece::Payload { tag, .. } => self.ring.send_staged_now(connection, tag, rest),
            };
            match sent {
                Ok(bytes) => lane.outgoing.sent(bytes)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    lane.outgoing.waits_for_room();
                    self.ring.wait_for_room(connection);
                    return Ok(());
                }
                Err(error) => return Err(StreamError::Socket(error)),
            }
        }
        lane.connection.batch_sent();
        Ok(())
    }

    /// Sends the rest of a batch by operations that name the requests' pages, in one chain.
    fn push_batch(&mut self, connection: u16) {
        let lane = &mut self.lanes[usize::from(connection)];
        let mut rest = lane.outgoing.rest().peekable();
        while let Some((piece, rest_of_piece)) = rest.next() {
            let link = if rest.peek().is_some() { Link::ToNext } else { Link::None };
            match piece {
                Piece::Outbox { start, .. } => self.ring.send_outbox(connection, start, rest_of_piece, link),
                Piece::Payload { tag, .. } => {
                    assert_ours(self.tags.operation_submitted(tag));
                    self.ring.send_payload(connection, tag, rest_of_piece, link);
                }
            }
        }
        drop(rest);
        lane.outgoing.pushed();
    }

    // -------------------------------------------------------------------------------------------------- finish

    /// The device is gone: put everything on stable storage, say goodbye, and reap the rest.
    fn finish(mut self) -> Result<(), QueueError> {
        let mut outcome = Ok(());
        // Where a connection was lost before there is nothing to ask: its users were told by EIO.
        if self.volatile_cache && !self.has_failed() {
            outcome = self.flush_finally();
        }
        if !self.has_failed() {
            let goodbye = Request {
                flags: CommandFlags::NONE,
                command: Command::Disconnect,
                cookie: 0,
                offset_bytes: 0,
                length_bytes: 0,
            };
            for connection in self.connections() {
                // The server needs no goodbye: closing says the same.
                let _ = self.ring.socket(connection).write_all(&goodbye.encode());
            }
            self.shut_down();
        }
        let deadline = Instant::now() + REAP_TIMEOUT;
        while self.lanes.iter().any(|lane| lane.operations_out() > 0) && Instant::now() < deadline {
            self.pass_for(Duration::from_millis(100))?;
        }
        outcome
    }

    fn flush_finally(&mut self) -> Result<(), QueueError> {
        let flush_tag = self.flush_tag();
        let connection = self.balance.choose(flush_tag);
        let lane = &mut self.lanes[usize::from(connection)];
        lane.connection.submit(flush_tag, self.requests[usize::from(flush_tag)]);
        self.send(connection);
        let deadline = Instant::now() + FINAL_FLUSH_TIMEOUT;
        while self.final_flush.is_none() {
            if Instant::now() >= deadline {
                self.fail(
                    connection,
                    format!("no answer to FLUSH within {} s", FINAL_FLUSH_TIMEOUT.as_secs()),
                );
            }
            self.pass_for(Duration::from_millis(100))?;
        }
        match self.final_flush {
            Some(Ok(())) | None => Ok(()),
            Some(Err(errno)) => {
                let reason = self.failure.clone();
                let text = reason.unwrap_or_else(|| io::Error::from_raw_os_error(errno).to_string());
                Err(QueueError::FinalFlush(text))
            }
        }
    }

    fn pass_for(&mut self, wait: Duration) -> Result<(), QueueError> {
        match self.pass(Some(Timespec::from(wait))) {
            Err(QueueError::Ring(error)) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            other => other,
        }
    }

    /// The tag after the device's last: the loop's own.
    fn flush_tag(&self) -> u16 {
        self.tags.queue_depth()
    }
}

fn describe(what: &str, error: &StreamError) -> String {
    format!("{what}: {error}")
}
