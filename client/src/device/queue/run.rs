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
//! With SEND_ZC, large WRITEs are sent as on the second line by a path that would stage them; the pages are the kernel's to keep
//! until the socket does not refer to them any more, whatever the loop does with the tag meanwhile.
//!
//! What moves a payload, and what has to be done before and after it, differs by data path (`payload.rs`); the loop is
//! the same for all. An operation on the socket may stop short: `stream.rs` knows what is left.
//!
//! A request goes to the connection with the fewest in flight and stays on it. A FLUSH may go to any: the block layer
//! issues it when the writes it covers have completed, and none completes before its reply, whichever connection it
//! was on.
//!
//! Called by `attachment.rs`, which starts one thread for each queue. When a connection is lost, the sockets of all are
//! shut down; once every operation on them is reaped, and only then, the main thread is told: no late byte can reach a page
//! any more. Requests wait and are sent again on the connections that `QueueCommand::Connect` brings, each on the slot where it
//! was, or end with EIO after `QueueCommand::GiveUp`.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::Timespec;
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES};
use ublk_core::abi::{UBLK_IO_RES_ABORT, UBLK_IO_RES_OK};
use ublk_core::{TagError, TagTable};

use super::balance::Balance;
use super::block_request;
use super::connection::{Completion, Connection, Follows, Operation, Piece, Resend};
use super::parts::{QueueCommand, QueueCommands, QueueError, QueueEvent, QueueParts};
use super::payload::Payloads;
use super::quiet::{self, Patience, Quiet};
use super::ring::{Completed, Link, Operation as RingOperation, QueueRing};
use super::stream::{Incoming, Outgoing, StreamError};
use super::unflushed::Unflushed;
use crate::device::connect::data_socket::DataSocket;
use crate::device::connect::dial::NETWORK_TIMEOUT;

/// Most pieces of one batch: enough that a full queue leaves in a few, bounded so that replies are not kept waiting.
const BATCH_PIECES_MAX: usize = 32;
/// Ended READs are given back together while the next payload is already there, up to this many bytes: some 100 µs of
/// copying. Whoever waits for them is woken once, and answers with as many requests at once.
const HELD_BYTES_MAX: u32 = 512 << 10;
/// How long the last FLUSH may take when the device goes away.
const FINAL_FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a socket that was shut down may take to give its operations back.
const REAP_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that refuses all it is asked for so soon after it was reached was not back.
const JUST_OPENED: Duration = Duration::from_secs(10);

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
    quiet: Quiet,
    /// The server broke the protocol on it.
    is_distrusted: bool,
}

impl Lane {
    fn new(queue_depth: u16, small_bytes_max: u32) -> Self {
        Self {
            // One more than the device has: for the loop's own FLUSH.
            connection: Connection::new(queue_depth + 1, small_bytes_max),
            incoming: Incoming::default(),
            outgoing: Outgoing::new(BATCH_PIECES_MAX),
            quiet: Quiet::default(),
            is_distrusted: false,
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
    resend: Resend,
    patience: Patience,
    /// The main thread was told that connections are silent.
    is_told_silent: bool,
    busy_poll: Duration,
    key_bytes_max: u64,
    unflushed: Arc<Unflushed>,
    /// By tag: what its FLUSH covers, a counter for each queue of the device.
    covered: Box<[u64]>,
    commands: QueueCommands,
    is_tick_out: bool,
    connected_at: Instant,
    /// Requests stood waiting when the connections came.
    was_awaited: bool,
    /// Why the connections were lost; until they are reaped.
    loss: Option<(u16, String)>,
    /// Payloads that were received since requests were last given back; while it is not 0 ended requests are held back.
    held_bytes: u32,
    final_flush: Option<Result<(), i32>>,
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
        let QueueParts { data_path, transfer, has_user_copy, max_io_bytes, unflushed, .. } = parts;
        let payloads = Payloads::new(data_path, transfer, has_user_copy, depth, max_io_bytes)?;
        let flush = Operation {
            command: Command::Flush,
            flags: CommandFlags::NONE,
            offset_bytes: 0,
            length_bytes: 0,
        };
        let nr_connections = parts.sockets.len();
        let ring = QueueRing::new(parts.queue, payloads, parts.sockets, parts.send_zc)?;
        let small_bytes_max = ring.small_bytes_max();
        Ok(Self {
            ring,
            tags: TagTable::new(depth),
            lanes: (0..nr_connections).map(|_| Lane::new(depth, small_bytes_max)).collect(),
            balance: Balance::new(nr_connections, depth + 1),
            requests: vec![flush; usize::from(depth) + 1].into_boxed_slice(),
            volatile_cache: parts.volatile_cache,
            resend: parts.resend,
            patience: Patience::new(parts.reply_timeout, parts.resend == Resend::Everything),
            is_told_silent: false,
            busy_poll: parts.busy_poll,
            key_bytes_max: parts.key_bytes_max,
            covered: vec![0; (usize::from(depth) + 1) * unflushed.nr_queues()].into_boxed_slice(),
            unflushed,
            commands: parts.commands,
            is_tick_out: false,
            connected_at: Instant::now(),
            was_awaited: false,
            loss: None,
            held_bytes: 0,
            final_flush: None,
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
        self.ring.wait_for_command(self.commands.eventfd.as_fd());
        (self.on_event)(QueueEvent::Ready);
        while !self.tags.is_finished() {
            self.pass(None)?;
        }
        self.finish()
    }

    /// One pass: submit and wait, reap, advance, push.
    fn pass(&mut self, timeout: Option<Timespec>) -> Result<(), QueueError> {
        match self.held_bytes {
            0 => self.wait(timeout)?,
            _ => self.ring.submit_and_look()?,
        }
        let held_before_bytes = self.held_bytes;
        while let Some(completed) = self.ring.reap() {
            self.advance(completed)?;
        }
        if self.held_bytes == held_before_bytes || !self.has_more_to_receive() {
            self.held_bytes = 0;
        }
        if self.loss.is_some() && self.lanes.iter().all(|lane| lane.operations_out() == 0) {
            self.reaped();
        }
        if self.held_bytes == 0 {
            for connection in self.connections() {
                self.commit_completed(connection);
            }
        }
        // What ended on one connection may have made room for what waits on another.
        for connection in self.connections() {
            self.receive(connection);
            self.send(connection);
        }
        if !self.is_tick_out && self.lanes.iter().any(|lane| lane.connection.in_flight() > 0) {
            self.is_tick_out = true;
            self.ring.start_tick();
        }
        Ok(())
    }

    /// Submits, and waits for a completion: awake at first, where that was asked for.
    fn wait(&mut self, timeout: Option<Timespec>) -> Result<(), QueueError> {
        if !self.busy_poll.is_zero() {
            let until = Instant::now() + self.busy_poll;
            while Instant::now() < until {
                self.ring.submit_and_look()?;
                if self.ring.has_completed() {
                    return Ok(());
                }
            }
        }
        Ok(self.ring.submit_and_wait(timeout)?)
    }

    /// Whether a reply whose payload is large has begun to arrive, and ended requests may wait for it.
    fn has_more_to_receive(&self) -> bool {
        let has_payload = self.lanes.iter().any(|lane| lane.incoming.has_payload());
        has_payload && self.held_bytes < HELD_BYTES_MAX && self.is_up()
    }

    fn connections(&self) -> std::ops::Range<u16> {
        0..self.lanes.len() as u16
    }

    // ------------------------------------------------------------------------------------------------- advance

    fn advance(&mut self, completed: Completed) -> Result<(), QueueError> {
        let (operation, result) = match completed {
            Completed::Operation(operation, result) => (operation, result),
            Completed::Notification { connection, was_copied } => {
                if self.ring.notified(connection, was_copied) {
                    (self.on_event)(QueueEvent::SentByReference { was_copied });
                }
                return Ok(());
            }
        };
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
            RingOperation::Command => self.command_came()?,
            RingOperation::Tick => self.tick_passed(),
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
        if operation.command == Command::Flush {
            if self.unflushed.take_doubt() {
                return self.commit(tag, -libc::EIO);
            }
            self.unflushed.flush_begins(covered_by(&mut self.covered, &self.unflushed, tag));
        }
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
            Ok(()) if lane.connection.is_up() => lane.quiet.something_came(),
            Ok(()) => return,
            Err(error) => return self.fail(connection, describe("reply", &error)),
        }
        while let Some(place) = self.lanes[usize::from(connection)].incoming.take_header() {
            if let Err(reason) = self.header_received(connection, place) {
                self.lanes[usize::from(connection)].is_distrusted = true;
                return self.fail(connection, reason);
            }
        }
        let left = self.lanes[usize::from(connection)].incoming.compact();
        self.ring.compact_inbox(connection, left);
        self.leave_a_server_that_ends();
    }

    /// It has said on a connection that it is shutting down. The replies that it still owes are waited for, on all of them:
    /// they are lost together.
    fn leave_a_server_that_ends(&mut self) {
        let told = (0..).zip(&self.lanes).find(|(_, lane)| lane.connection.is_leaving());
        let Some((connection, _)) = told else { return };
        for lane in &mut self.lanes {
            lane.connection.leave();
        }
        if !self.lanes.iter().any(|lane| lane.connection.is_owed_replies()) {
            self.fail(connection, "the server is shutting down".to_owned());
        }
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
        lane.quiet.payload_came();
        match lane.incoming.payload_completed(result) {
            Ok(true) => {
                lane.connection.payload_received(tag);
                self.held_bytes += self.requests[usize::from(tag)].length_bytes;
                self.leave_a_server_that_ends();
            }
            Ok(false) => {}
            Err(error) => self.fail(connection, describe("payload", &error)),
        }
    }

    /// The pieces of a batch are linked, so they complete in their order.
    fn send_completed(&mut self, connection: u16, result: i32) {
        let lane = &mut self.lanes[usize::from(connection)];
        match lane.outgoing.completed(result) {
            Ok(true) if lane.connection.is_up() => {
                lane.connection.batch_sent();
                // Its replies may have come before.
                self.leave_a_server_that_ends();
            }
            Ok(_) => {}
            Err(error) => self.fail(connection, describe("send", &error)),
        }
    }

    /// A connection is lost, and with it the others of the queue: shut all down so that their operations end.
    fn fail(&mut self, connection: u16, reason: String) {
        if !self.is_up() {
            return;
        }
        // Where the kernel does the records it only says EIO of one that is not data.
        let record = self.ring.socket(connection).take_control_record();
        let reason = record.map_or(reason, |record| record.to_string());
        tracing::warn!(queue_id = self.ring.queue().q_id(), connection, reason, "the connection is lost");
        self.shut_down();
        self.loss = Some((connection, reason));
    }

    fn shut_down(&mut self) {
        for (connection, lane) in (0..).zip(&mut self.lanes) {
            lane.connection.fail();
            // ENOTCONN: the peer was first.
            let _ = self.ring.socket(connection).shut_down();
        }
    }

    /// Connections are lost, and come, together.
    fn is_up(&self) -> bool {
        self.lanes.iter().all(|lane| lane.connection.is_up())
    }

    /// Nothing can come from the lost connections any more.
    fn reaped(&mut self) {
        let Some((connection, reason)) = self.loss.take() else { return };
        let has_served = self.lanes.iter().any(|lane| lane.connection.has_served());
        let is_refusal = self.lanes.iter().any(|lane| lane.connection.is_leaving());
        let is_owed = self.lanes.iter().any(|lane| lane.connection.is_owed_replies());
        let was_of_no_use =
            (is_refusal && self.connected_at.elapsed() < JUST_OPENED) || (is_owed && self.was_awaited);
        let served_nothing = was_of_no_use && !has_served;
        if self.resend == Resend::ReadsOnly {
            self.unflushed.connection_lost();
        }
        for lane in &mut self.lanes {
            let is_distrusted = std::mem::take(&mut lane.is_distrusted);
            lane.connection.reaped(if is_distrusted { Resend::Nothing } else { self.resend });
            lane.incoming = Incoming::default();
            lane.outgoing.abandon();
        }
        for connection in self.connections() {
            if let Err(error) = self.ring.drop_references(connection) {
                tracing::warn!(connection, %error, "a lost connection's socket cannot be closed yet");
            }
        }
        // Counted before the main thread hears of the loss: it may look at once whether anything was unflushed.
        for connection in self.connections() {
            self.commit_completed(connection);
        }
        let (queue_id, oldest) = (self.ring.queue().q_id(), self.oldest());
        self.is_told_silent = false;
        (self.on_event)(QueueEvent::Disconnected { queue_id, connection, reason, served_nothing, oldest });
    }

    fn command_came(&mut self) -> Result<(), QueueError> {
        // Cleared before the commands are taken, so that none is slept over.
        let _ = rustix::io::read(&self.commands.eventfd, &mut [0; 8]);
        self.ring.wait_for_command(self.commands.eventfd.as_fd());
        while let Ok(command) = self.commands.commands.try_recv() {
            match command {
                QueueCommand::Connect(sockets) => self.connect(sockets)?,
                QueueCommand::Disconnect(reason) => {
                    // Of silence the connection that was silent for longest is the cause.
                    let silent = (0..).zip(&self.lanes).max_by_key(|(connection, lane)| {
                        (lane.quiet.silent_ticks(), std::cmp::Reverse(*connection))
                    });
                    self.fail(silent.map_or(0, |(connection, _)| connection), reason);
                }
                QueueCommand::GiveUp => self.lanes.iter_mut().for_each(|lane| lane.connection.give_up()),
            }
        }
        Ok(())
    }

    fn connect(&mut self, sockets: Vec<DataSocket>) -> Result<(), QueueError> {
        assert_eq!(sockets.len(), self.lanes.len(), "a connection for each lane");
        // What was given up is committed first: its memory is replaced next.
        for connection in self.connections() {
            self.commit_completed(connection);
        }
        if let Err(error) = self.ring.renew_staging() {
            tracing::warn!(%error, "memory of writes that were given up cannot be replaced yet");
        }
        for (connection, socket) in (0..).zip(sockets) {
            self.ring.replace_socket(connection, socket)?;
            let lane = &mut self.lanes[usize::from(connection)];
            lane.connection.connected();
            lane.quiet.connected();
        }
        self.connected_at = Instant::now();
        self.was_awaited = self.lanes.iter().any(|lane| lane.connection.in_flight() > 0);
        Ok(())
    }

    /// For how long the oldest request that waits has been known to a server.
    fn oldest(&self) -> Option<Duration> {
        quiet::oldest(self.lanes.iter().map(|lane| &lane.connection))
    }

    /// Looks for connections on which replies are due and nothing comes. What is to be done about them, the main thread says.
    fn tick_passed(&mut self) {
        self.is_tick_out = false;
        let patience = self.patience;
        self.lanes.iter_mut().for_each(|lane| lane.quiet.tick(&mut lane.connection, patience));
        let lanes = self.lanes.iter().map(|lane| (&lane.quiet, &lane.connection));
        let silence = quiet::of_queue(lanes, patience).filter(|_| self.is_up());
        if silence.is_some() || self.is_told_silent {
            self.is_told_silent = silence.is_some();
            (self.on_event)(QueueEvent::Silent { queue_id: self.ring.queue().q_id(), silence });
        }
        let cut = self.connections().find(|connection| {
            let is_quiet = self.lanes[usize::from(*connection)].quiet.is_quiet();
            let unacknowledged = || self.ring.socket(*connection).unacknowledged_for();
            is_quiet && unacknowledged().is_some_and(|silent| silent >= NETWORK_TIMEOUT)
        });
        if let Some(connection) = cut {
            self.fail(connection, "the network acknowledges nothing".to_owned());
        }
        let worn = self
            .connections()
            .find(|connection| self.ring.socket(*connection).key_bytes() > self.key_bytes_max);
        if let Some(connection) = worn {
            self.fail(connection, "its keys have encrypted as much as is good".to_owned());
        }
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
            // Without a connection, an error may be our own, of a request that the server may still be taking in.
            self.ring.release(tag, result.is_ok() || self.is_up());
            let operation = self.requests[usize::from(tag)];
            if result.is_ok() {
                self.note_durability(tag, &operation);
            }
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

    /// Counts what a server without power would forget; before the commit, because a FLUSH may follow it at once.
    fn note_durability(&mut self, tag: u16, operation: &Operation) {
        match operation.command {
            Command::Write | Command::WriteZeroes | Command::Trim
                if self.volatile_cache && !operation.flags.contains(CommandFlags::FUA) =>
            {
                self.unflushed.acknowledged(self.ring.queue().q_id());
            }
            Command::Flush => {
                self.unflushed.flush_succeeded(covered_by(&mut self.covered, &self.unflushed, tag));
            }
            _ => {}
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
        if lane.incoming.operations_out() > 0 || !lane.connection.is_up() {
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
            if lane.outgoing.operations_out() > 0 || !lane.connection.is_up() {
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
            if lane.outgoing.has_payloads() && !self.ring.stages(connection) {
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
        self.leave_a_server_that_ends();
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
        // Where requests were given up, their users were told by EIO.
        let has_given_up = self.lanes.iter().any(|lane| lane.connection.has_given_up());
        if self.volatile_cache && self.unflushed.any() && !has_given_up {
            outcome = self.flush_finally();
        }
        if self.is_up() {
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

    /// Puts what was acknowledged on stable storage, on whichever connections there are by then.
    fn flush_finally(&mut self) -> Result<(), QueueError> {
        if self.unflushed.take_doubt() {
            return Err(QueueError::FinalFlush("the connection was lost meanwhile".to_owned()));
        }
        let flush_tag = self.flush_tag();
        self.unflushed.flush_begins(covered_by(&mut self.covered, &self.unflushed, flush_tag));
        let connection = self.balance.choose(flush_tag);
        let lane = &mut self.lanes[usize::from(connection)];
        lane.connection.submit(flush_tag, self.requests[usize::from(flush_tag)]);
        self.send(connection);
        let deadline = Instant::now() + FINAL_FLUSH_TIMEOUT;
        let outcome = loop {
            self.pass_for(Duration::from_millis(100))?;
            match self.final_flush {
                Some(result) => {
                    break result.map_err(|errno| io::Error::from_raw_os_error(errno).to_string());
                }
                None if Instant::now() < deadline => {}
                None => break Err(format!("no answer within {} s", FINAL_FLUSH_TIMEOUT.as_secs())),
            }
        };
        if outcome.is_ok() {
            self.unflushed.flush_succeeded(covered_by(&mut self.covered, &self.unflushed, flush_tag));
        }
        outcome.map_err(QueueError::FinalFlush)
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

/// The counters that the tag's FLUSH remembers.
fn covered_by<'a>(covered: &'a mut [u64], unflushed: &Unflushed, tag: u16) -> &'a mut [u64] {
    let nr_queues = unflushed.nr_queues();
    &mut covered[usize::from(tag) * nr_queues..][..nr_queues]
}

fn describe(what: &str, error: &StreamError) -> String {
    format!("{what}: {error}")
}
