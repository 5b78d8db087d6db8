//! The data path: one thread, one ublk hardware queue, one ring, one connection.
//!
//! Each pass: **reap** what completed → **advance** the state machines (tags, connection) → **push** what they ask for →
//! **one submit**, which also waits. No lock, no allocation, no log above `trace` while nothing goes wrong.
//!
//! ```text
//!   FETCH/COMMIT done ─► connection.submit ─► take_batch ─► SEND headers ─link─► SEND payload (the request's pages)
//!   header RECV done  ─► header_received ─┬─► COMMIT
//!                                         └─► RECV payload (the request's pages) ─link─► next header RECV ─► COMMIT
//! ```
//!
//! Called by `attachment.rs`, which starts one thread for each queue. When the connection fails, its socket is shut
//! down, every operation on it is reaped, and only then the requests in flight end with EIO: no late byte can reach a
//! page that was given back. From then on the device answers EIO until it is detached.

use std::io::{self, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use io_uring::types::Timespec;
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES};
use ublk_core::abi::{UBLK_IO_RES_ABORT, UBLK_IO_RES_OK};
use ublk_core::{DataPath, Queue, TagError, TagTable};

use super::block_request;
use super::connection::{Connection, Follows, Operation, Piece};
use super::queue_ring::{Completed, Link, Operation as RingOperation, QueueRing, TagData};

/// Most pieces of one batch: enough that a full queue leaves in a few, bounded so that replies are not kept waiting.
const BATCH_PIECES_MAX: usize = 32;
/// How long the last FLUSH may take when the device goes away.
const FINAL_FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a socket that was shut down may take to give its operations back.
const REAP_TIMEOUT: Duration = Duration::from_secs(10);

/// What a queue thread tells of itself.
#[derive(Debug)]
pub enum QueueEvent {
    /// The ring is made and every tag is about to be fetched: the device can be started.
    Ready,
    /// The connection is gone: requests end with EIO.
    ConnectionFailed {
        /// Which queue.
        queue_id: u16,
        /// Why, for people.
        reason: String,
    },
    /// The thread ended, because the device went away or because of an error.
    Ended {
        /// Which queue.
        queue_id: u16,
        /// `Err`: what was written may not be on stable storage, or the queue broke.
        outcome: Result<(), QueueError>,
    },
}

/// Why a queue ended badly.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring cannot be made or used.
    #[error("io_uring: {0}")]
    Ring(#[from] io::Error),
    /// The driver refused a command.
    #[error("the ublk driver refused a command of tag {tag}: {source}")]
    Driver {
        /// The tag.
        tag: u16,
        /// Its errno.
        source: io::Error,
    },
    /// The server did not say that everything is on stable storage.
    #[error("the last FLUSH failed: {0}; what was written and not flushed before may be lost")]
    FinalFlush(String),
}

/// What a queue thread is made of.
#[derive(Debug)]
pub struct QueueParts {
    /// The device's queue.
    pub queue: Queue,
    /// How its data travels.
    pub data_path: DataPath,
    /// Largest READ or WRITE, in bytes.
    pub max_io_bytes: u32,
    /// Whether a FLUSH has to end the session.
    pub volatile_cache: bool,
    /// Its connection, in the transmission phase.
    pub socket: TcpStream,
}

/// Runs a queue until its device is gone. To be called on the queue's own thread, as `on_event` is then; that happens
/// never while requests are served without an error.
pub fn run(parts: QueueParts, on_event: &dyn Fn(QueueEvent)) {
    let queue_id = parts.queue.q_id();
    let outcome = QueueLoop::new(parts, on_event).and_then(QueueLoop::run);
    on_event(QueueEvent::Ended { queue_id, outcome });
}

struct QueueLoop<'a> {
    ring: QueueRing,
    tags: TagTable,
    connection: Connection,
    /// By tag: what its request is; the last one is the loop's own FLUSH.
    requests: Box<[TagRequest]>,
    /// The batch that is being sent, and how many pieces of it were.
    pieces: Vec<Piece>,
    pieces_sent: usize,
    /// Operations on the socket that are not reaped.
    socket_operations_out: usize,
    volatile_cache: bool,
    final_flush: Option<Result<(), i32>>,
    failure: Option<String>,
    on_event: &'a dyn Fn(QueueEvent),
}

#[derive(Debug, Clone, Copy)]
struct TagRequest {
    operation: Operation,
    /// Its pages were registered by hand, and what is to be committed once they are not.
    registered_by_hand: bool,
    result: i32,
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
        let data = TagData::new(parts.data_path, depth, parts.max_io_bytes)?;
        let operation = Operation {
            command: Command::Flush,
            flags: CommandFlags::NONE,
            offset_bytes: 0,
            length_bytes: 0,
        };
        let request = TagRequest { operation, registered_by_hand: false, result: 0 };
        Ok(Self {
            ring: QueueRing::new(parts.queue, data, parts.socket)?,
            tags: TagTable::new(depth),
            connection: Connection::new(depth + 1),
            requests: vec![request; usize::from(depth) + 1].into_boxed_slice(),
            pieces: Vec::with_capacity(BATCH_PIECES_MAX),
            pieces_sent: 0,
            socket_operations_out: 0,
            volatile_cache: parts.volatile_cache,
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
        self.receive_header();
        (self.on_event)(QueueEvent::Ready);
        while !self.tags.is_finished() {
            self.pass(None)?;
        }
        self.finish()
    }

    /// One pass: submit and wait, reap, advance, push.
    fn pass(&mut self, timeout: Option<Timespec>) -> Result<(), QueueError> {
        self.ring.submit_and_wait(timeout)?;
        while let Some(completed) = self.ring.reap() {
            self.advance(completed)?;
        }
        if self.connection.has_failed() && self.socket_operations_out == 0 {
            self.connection.reaped();
        }
        self.commit_completed();
        self.send_next_batch();
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------- advance

    fn advance(&mut self, (operation, result): Completed) -> Result<(), QueueError> {
        match operation {
            RingOperation::Tag(tag) => return self.tag_completed(tag, result),
            RingOperation::Register(tag) => self.registered(tag, result),
            RingOperation::Unregister(tag) => self.unregistered(tag, result),
            RingOperation::ReceiveHeader => self.header_completed(result),
            RingOperation::ReceivePayload(tag) => self.payload_completed(tag, result),
            RingOperation::SendHeaders => self.piece_completed(result),
            RingOperation::SendPayload(tag) => {
                assert_ours(self.tags.operation_completed(tag));
                self.piece_completed(result);
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
        match block_request::operation(&descriptor) {
            Ok(operation) => {
                self.requests[usize::from(tag)] =
                    TagRequest { operation, registered_by_hand: false, result: 0 };
                if descriptor.needs_buffer_registration() {
                    self.ring.register(tag);
                } else {
                    self.connection.submit(tag, operation);
                }
            }
            Err(errno) => self.commit(tag, -errno),
        }
    }

    fn registered(&mut self, tag: u16, result: i32) {
        if result < 0 {
            self.commit(tag, -libc::EIO);
            return;
        }
        assert_ours(self.tags.buffer_registered(tag));
        let request = &mut self.requests[usize::from(tag)];
        request.registered_by_hand = true;
        self.connection.submit(tag, request.operation);
    }

    fn unregistered(&mut self, tag: u16, result: i32) {
        assert_eq!(result, 0, "a buffer that was registered is unregistered");
        assert_ours(self.tags.buffer_unregistered(tag));
        self.requests[usize::from(tag)].registered_by_hand = false;
        self.commit(tag, self.requests[usize::from(tag)].result);
    }

    fn header_completed(&mut self, result: i32) {
        self.socket_operations_out -= 1;
        if result != SIMPLE_REPLY_BYTES as i32 {
            self.fail(describe("reply", result));
        }
        if self.connection.has_failed() {
            return;
        }
        let header = self.ring.header();
        match self.connection.header_received(&header) {
            Ok(Follows::Header) => self.receive_header(),
            Ok(Follows::Payload { tag, len_bytes }) => {
                assert_ours(self.tags.operation_submitted(tag));
                let by_hand = self.requests[usize::from(tag)].registered_by_hand;
                self.ring.receive_payload_and_header(tag, len_bytes, by_hand);
                self.socket_operations_out += 2;
            }
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn payload_completed(&mut self, tag: u16, result: i32) {
        self.socket_operations_out -= 1;
        assert_ours(self.tags.operation_completed(tag));
        if i64::from(result) == i64::from(self.requests[usize::from(tag)].operation.length_bytes) {
            self.connection.payload_received(tag);
        } else {
            self.fail(describe("payload", result));
        }
    }

    /// The pieces of a batch are linked, so they complete in their order.
    fn piece_completed(&mut self, result: i32) {
        self.socket_operations_out -= 1;
        let expected_bytes = match self.pieces[self.pieces_sent] {
            Piece::Headers { len, .. } => len as i64,
            Piece::Payload { len_bytes, .. } => i64::from(len_bytes),
        };
        self.pieces_sent += 1;
        if i64::from(result) != expected_bytes {
            self.fail(describe("send", result));
        } else if self.pieces_sent == self.pieces.len() && !self.connection.has_failed() {
            self.connection.batch_sent();
        }
    }

    /// The connection is of no use any more: shut it down so that its operations end.
    fn fail(&mut self, reason: String) {
        if self.connection.has_failed() {
            return;
        }
        self.connection.fail();
        tracing::error!(queue_id = self.ring.queue().q_id(), reason, "the connection is lost: I/O gets EIO");
        // ENOTCONN: the peer was first.
        let _ = self.ring.socket().shutdown(Shutdown::Both);
        let queue_id = self.ring.queue().q_id();
        (self.on_event)(QueueEvent::ConnectionFailed { queue_id, reason: reason.clone() });
        self.failure = Some(reason);
    }

    // ---------------------------------------------------------------------------------------------------- push

    fn receive_header(&mut self) {
        self.ring.receive_header();
        self.socket_operations_out += 1;
    }

    /// Gives ended requests back to the block layer.
    fn commit_completed(&mut self) {
        while let Some(completion) = self.connection.take_completion() {
            let index = usize::from(completion.tag);
            if completion.tag == self.flush_tag() {
                self.final_flush = Some(completion.result);
                continue;
            }
            let request = &mut self.requests[index];
            request.result = block_request::commit_result(&request.operation, completion.result);
            if request.registered_by_hand {
                self.ring.unregister(completion.tag);
            } else {
                self.commit(completion.tag, self.requests[index].result);
            }
        }
    }

    fn commit(&mut self, tag: u16, result: i32) {
        assert_ours(self.tags.commit_submitted(tag));
        self.ring.commit_and_fetch(tag, result);
    }

    /// Sends what waits, once the batch before is out: one chain in flight for each socket.
    fn send_next_batch(&mut self) {
        if self.pieces_sent < self.pieces.len() || self.connection.has_failed() {
            return;
        }
        self.pieces_sent = 0;
        self.connection.take_batch(self.ring.headers_mut(), &mut self.pieces, BATCH_PIECES_MAX);
        let last = self.pieces.len();
        for (index, piece) in self.pieces.iter().enumerate() {
            let link = if index + 1 < last { Link::ToNext } else { Link::None };
            match *piece {
                Piece::Headers { start, len } => self.ring.send_headers(start, len, link),
                Piece::Payload { tag, len_bytes } => {
                    assert_ours(self.tags.operation_submitted(tag));
                    let by_hand = self.requests[usize::from(tag)].registered_by_hand;
                    self.ring.send_payload(tag, len_bytes, by_hand, link);
                }
            }
            self.socket_operations_out += 1;
        }
    }

    // -------------------------------------------------------------------------------------------------- finish

    /// The device is gone: put everything on stable storage, say goodbye, and reap the rest.
    fn finish(mut self) -> Result<(), QueueError> {
        let mut outcome = Ok(());
        // On a connection that was lost before there is nothing to ask: its users were told by EIO.
        if self.volatile_cache && !self.connection.has_failed() {
            outcome = self.flush_finally();
        }
        if !self.connection.has_failed() {
            let goodbye = Request {
                flags: CommandFlags::NONE,
                command: Command::Disconnect,
                cookie: 0,
                offset_bytes: 0,
                length_bytes: 0,
            };
            // The server needs no goodbye: closing says the same.
            let _ = self.ring.socket().write_all(&goodbye.encode());
            self.connection.fail();
            let _ = self.ring.socket().shutdown(Shutdown::Both);
        }
        let deadline = Instant::now() + REAP_TIMEOUT;
        while self.socket_operations_out > 0 && Instant::now() < deadline {
            self.pass_for(Duration::from_millis(100))?;
        }
        outcome
    }

    fn flush_finally(&mut self) -> Result<(), QueueError> {
        let flush_tag = self.flush_tag();
        self.connection.submit(flush_tag, self.requests[usize::from(flush_tag)].operation);
        self.commit_completed();
        self.send_next_batch();
        let deadline = Instant::now() + FINAL_FLUSH_TIMEOUT;
        while self.final_flush.is_none() {
            if Instant::now() >= deadline {
                self.fail(format!("no answer to FLUSH within {} s", FINAL_FLUSH_TIMEOUT.as_secs()));
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

/// Why an operation on the socket did not move all its bytes.
fn describe(what: &str, result: i32) -> String {
    match result {
        0 => format!("{what}: the server closed the connection"),
        errno if errno < 0 => format!("{what}: {}", io::Error::from_raw_os_error(-errno)),
        bytes => format!("{what}: the connection ended after {bytes} bytes"),
    }
}
