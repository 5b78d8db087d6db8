//! The rules of a queue: which connection takes a request, when a connection is left, what is sent again, what a FLUSH covers.
//!
//! ```text
//!   kernel's request ─► Connection::submit ─► take_batch ─► send outbox, and payloads that were staged, at once
//!                                                      └──► send outbox ─link─► send payload (the request's pages)
//!   inbox received    ─► header_received ─┬─► COMMIT
//!                                         └─► receive payload (the request's pages) ─link─► inbox ─► COMMIT
//! ```
//! It sees no ring, no socket, no page and no clock: `handle_*` tells it what completed, and what it wants done it says through
//! [`QueueIo`], at once and without an allocation. `run.rs` drives it with a ring, the simulator with a network of its own: so what is
//! simulated is what runs.
//!
//! Small payloads are copied between the pages and inbox or outbox, so that one receive or send moves everything there is:
//! the queue then gives many requests back at once, and gets as many at once. An operation on the socket may stop short:
//! `stream.rs` knows what is left.
//!
//! A request goes to the connection with the fewest in flight and stays on it. A FLUSH may go to any: the block layer
//! issues it when the writes it covers have completed, and none completes before its reply, whichever connection it
//! was on.
//!
//! When a connection is lost, the sockets of all are shut down; once every operation on them is reaped, and only then, requests end,
//! or wait to be sent again, and the main thread is told: no late byte can reach a page any more. Requests wait until
//! [`QueueCore::connect`], each on the slot where it was, or end with EIO after [`QueueCore::give_up`].

mod finish;
mod receiving;
mod sending;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::nbd::transmission::{Command, CommandFlags};
use ublk_core::{TagError, TagTable};

use super::balance::Balance;
use super::begun_after::BegunAfter;
use super::block_request::{self, BlockRequest};
use super::connection::{Connection, Follows, Says};
use super::io::QueueIo;
use super::link::{LinkEvent, Loss, Lost, QueueLink};
use super::quiet::{self, Patience, Quiet, TICK};
use super::requests::{Completion, Requests, Resend};
use super::stream::{Incoming, Outgoing};
use super::unflushed::Unflushed;
use crate::device::connect::dial::NETWORK_TIMEOUT;

/// Most pieces of one batch: enough that a full queue leaves in a few, bounded so that replies are not kept waiting.
const BATCH_PIECES_MAX: usize = 32;
/// Ended READs are given back together while the next payload is already there, up to this many bytes: some 100 µs of
/// copying. Whoever waits for them is woken once, and answers with as many requests at once.
const HELD_READ_BYTES_MAX: u32 = 512 << 10;

/// One connection: what is said on it, and how far its bytes got.
#[derive(Debug)]
struct Lane {
    connection: Connection,
    incoming: Incoming,
    outgoing: Outgoing,
    quiet: Quiet,
}

impl Lane {
    fn new(index: u16, tags: u16, small_bytes_max: u32) -> Self {
        Self {
            connection: Connection::new(index, tags, small_bytes_max),
            incoming: Incoming::default(),
            outgoing: Outgoing::new(BATCH_PIECES_MAX),
            quiet: Quiet::default(),
        }
    }

    /// Operations on the socket that are not reaped.
    fn operations_out(&self) -> usize {
        self.incoming.operations_out() + self.outgoing.operations_out()
    }
}

/// What a queue is made of.
#[derive(Debug)]
pub struct QueueSpec {
    /// Which of the device's.
    pub queue_id: u16,
    /// Requests that the driver can have under way on it.
    pub queue_depth: u16,
    /// How many connections it has, at least one.
    pub nr_connections: u16,
    /// Payloads up to this size go through inbox and outbox.
    pub small_bytes_max: u32,
    /// Whether the server may lose what was not flushed.
    pub volatile_cache: bool,
    /// What becomes of requests on connections that are lost.
    pub resend: Resend,
    /// After half of this without any reply while some are due, the main thread is told at each tick.
    pub reply_timeout: Duration,
    /// What has been acknowledged and not flushed, by all queues.
    pub unflushed: Arc<Unflushed>,
}

/// The state of a queue.
#[derive(Debug)]
pub struct QueueCore {
    queue_id: u16,
    volatile_cache: bool,
    resend: Resend,
    patience: Patience,
    unflushed: Arc<Unflushed>,
    begun_after: BegunAfter,
    /// The next FLUSH may stand for users who began theirs while one was under way that has failed since.
    flush_may_be_held: bool,
    tags: TagTable,
    requests: Requests,
    lanes: Box<[Lane]>,
    balance: Balance,
    link: QueueLink,
    /// The main thread was told that connections are silent.
    is_told_silent: bool,
    events: VecDeque<LinkEvent>,
    /// Payloads that were received since requests were last given back; while it is not 0 ended requests are held back.
    held_read_bytes: u32,
    held_before_bytes: u32,
    final_flush: Option<Result<(), i32>>,
    /// The device is gone, and nobody is told of anything any more.
    is_closed: bool,
}

/// The tag table only fails when this queue is wrong; a wrong byte may be next, so the process ends.
fn assert_ours<T>(outcome: Result<T, TagError>) -> T {
    match outcome {
        Ok(value) => value,
        Err(error) => panic!("the queue broke its own rule: {error}"),
    }
}

impl QueueCore {
    /// A queue whose connections are there.
    pub fn new(spec: QueueSpec, now: Instant) -> Self {
        let QueueSpec { queue_depth, nr_connections, small_bytes_max, .. } = spec;
        // One more than the device has: for the queue's own FLUSH.
        let tags = queue_depth + 1;
        Self {
            queue_id: spec.queue_id,
            volatile_cache: spec.volatile_cache,
            resend: spec.resend,
            patience: Patience::new(spec.reply_timeout, spec.resend == Resend::Everything),
            tags: TagTable::new(queue_depth),
            requests: Requests::new(tags, nr_connections, spec.unflushed.nr_counters()),
            begun_after: BegunAfter::new(queue_depth, nr_connections),
            // A process that takes a device on counts what the one before it was told, whose FLUSH has failed with it.
            flush_may_be_held: spec.unflushed.any(),
            unflushed: spec.unflushed,
            lanes: (0..nr_connections).map(|index| Lane::new(index, tags, small_bytes_max)).collect(),
            balance: Balance::new(nr_connections),
            link: QueueLink::up(now, false),
            is_told_silent: false,
            events: VecDeque::new(),
            held_read_bytes: 0,
            held_before_bytes: 0,
            final_flush: None,
            is_closed: false,
        }
    }

    /// Waits for every tag's first request.
    pub fn start<Io: QueueIo>(&mut self, io: &mut Io) {
        for tag in 0..self.tags.queue_depth() {
            assert_ours(self.tags.fetch_submitted(tag));
            io.fetch(tag);
        }
        for connection in self.connections() {
            self.receive(io, connection);
        }
    }

    /// What is to be told the main thread, oldest first; nothing while requests are served without an error.
    pub fn take_event(&mut self) -> Option<LinkEvent> {
        self.events.pop_front()
    }

    /// Whether every tag has been given back for good: the device is gone.
    pub fn is_finished(&self) -> bool {
        self.tags.is_finished()
    }

    /// Whether its connections are there.
    pub fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// Whether operations on its sockets are out.
    pub fn has_operations_out(&self) -> bool {
        self.lanes.iter().any(|lane| lane.operations_out() > 0)
    }

    /// Whether requests are in flight, so that a tick has to pass.
    pub fn awaits_replies(&self) -> bool {
        self.lanes.iter().any(|lane| lane.connection.in_flight() > 0)
    }

    /// Whether to look again, without waiting: ended requests are held back, because the next payload has begun to arrive; or
    /// connections were lost, and requests may have begun before that of which the kernel has not told yet.
    pub fn looks_again(&self) -> bool {
        self.held_read_bytes > 0 || self.begun_after.needs_pass()
    }

    /// The cookie of the tag's request, as the server last knew it; for those who look on.
    pub fn cookie(&self, tag: u16) -> u64 {
        self.requests.of(tag).cookie
    }

    fn connections(&self) -> Range<u16> {
        0..self.lanes.len() as u16
    }

    fn lane(&mut self, connection: u16) -> &mut Lane {
        &mut self.lanes[usize::from(connection)]
    }

    // -------------------------------------------------------------------------------------------- requests come

    /// Something has completed, whatever it is: to be told before what it is.
    pub fn completion_came(&mut self) {
        self.begun_after.completion_came();
    }

    /// A tag brought a request; `Err`: one that this device does not know, by its positive errno.
    pub fn handle_request<Io: QueueIo>(&mut self, io: &mut Io, tag: u16, request: Result<BlockRequest, i32>) {
        assert_ours(self.tags.request_arrived(tag));
        self.begun_after.request_came();
        let request = match request {
            Ok(request) => request,
            Err(errno) => return self.commit(io, tag, -errno),
        };
        if request.command == Command::Flush {
            // First what it covers: of a loss that is noticed from here on it is told in the end.
            self.unflushed.flush_begins(self.requests.covered_mut(tag));
            let is_held = std::mem::take(&mut self.flush_may_be_held);
            let known_losses = self.begun_after.losses();
            if self.unflushed.fails_flush(if is_held { 0 } else { known_losses }) {
                // Whoever asked while this one was on its way may have asked before the loss.
                self.flush_may_be_held = known_losses < self.unflushed.losses();
                return self.commit(io, tag, -libc::EIO);
            }
        }
        let has_data = matches!(request.command, Command::Read | Command::Write);
        if has_data && io.needs_registration(tag) {
            self.requests.of_mut(tag).request = request;
            return io.register(tag);
        }
        self.submit(io, tag, request);
    }

    /// The tag's pages are in the buffer table, or `result` says why not.
    pub fn handle_registered<Io: QueueIo>(&mut self, io: &mut Io, tag: u16, result: i32) {
        if result < 0 {
            return self.commit(io, tag, -libc::EIO);
        }
        assert_ours(self.tags.buffer_registered(tag));
        let request = self.requests.of(tag).request;
        self.submit(io, tag, request);
    }

    /// The driver took the tag back: the device goes away.
    pub fn handle_abort(&mut self, tag: u16) {
        assert_ours(self.tags.abort_completed(tag));
    }

    fn submit<Io: QueueIo>(&mut self, io: &mut Io, tag: u16, request: BlockRequest) {
        if self.link.gives_up() {
            return self.commit(io, tag, -libc::EIO);
        }
        self.put_on_connection(tag, request);
    }

    fn put_on_connection(&mut self, tag: u16, request: BlockRequest) {
        let chosen = self.balance.choose(self.lanes.iter().map(|lane| lane.connection.in_flight()));
        self.lanes[usize::from(chosen)].connection.submit(&mut self.requests, tag, request);
    }

    // --------------------------------------------------------------------------------------------- replies come

    /// A receive into the connection's inbox completed.
    pub fn handle_inbox<Io: QueueIo>(&mut self, io: &mut Io, connection: u16, result: i32) {
        let is_up = self.is_up();
        let lane = self.lane(connection);
        match lane.incoming.inbox_completed(result) {
            Ok(()) if is_up => lane.quiet.something_came(),
            Ok(()) => return,
            Err(error) => return self.fail(io, connection, Loss::Socket { what: "reply", error }),
        }
        while let Some(place) = self.lane(connection).incoming.take_header() {
            if let Err(loss) = self.take_reply(io, connection, place) {
                return self.fail(io, connection, loss);
            }
        }
        let left = self.lane(connection).incoming.compact();
        io.compact_inbox(connection, left);
        self.leave_a_server_that_ends(io);
    }

    /// A reply's header is in the inbox; its payload may be, too, or a part of it.
    fn take_reply<Io: QueueIo>(
        &mut self,
        io: &mut Io,
        connection: u16,
        place: Range<usize>,
    ) -> Result<(), Loss> {
        let header = io.header(connection, place);
        let lane = &mut self.lanes[usize::from(connection)];
        let (follows, says) = lane.connection.header_received(&mut self.requests, &header)?;
        match says {
            Says::Pong => {}
            Says::Served => self.link.served(),
            Says::Leaving => self.link.leave(connection),
        }
        let Follows::Payload { tag, len_bytes } = follows else { return Ok(()) };
        let (here, is_all) = lane.incoming.take_payload(tag, len_bytes);
        if !here.is_empty() {
            io.scatter(connection, here, tag).map_err(Loss::Scatter)?;
        }
        if is_all {
            lane.connection.payload_received(&mut self.requests, tag);
        }
        Ok(())
    }

    /// A receive of the tag's payload into its pages completed.
    pub fn handle_payload<Io: QueueIo>(&mut self, io: &mut Io, connection: u16, tag: u16, result: i32) {
        assert_ours(self.tags.operation_completed(tag));
        let lane = &mut self.lanes[usize::from(connection)];
        lane.quiet.payload_came();
        match lane.incoming.payload_completed(result) {
            Ok(true) => {
                lane.connection.payload_received(&mut self.requests, tag);
                self.held_read_bytes += self.requests.of(tag).request.length_bytes;
                self.leave_a_server_that_ends(io);
            }
            Ok(false) => {}
            Err(error) => self.fail(io, connection, Loss::Socket { what: "payload", error }),
        }
    }

    /// A send completed; one from a request's pages says whose. The pieces of a batch are linked, so they complete in their order.
    pub fn handle_sent<Io: QueueIo>(&mut self, io: &mut Io, connection: u16, tag: Option<u16>, result: i32) {
        if let Some(tag) = tag {
            assert_ours(self.tags.operation_completed(tag));
        }
        let is_up = self.is_up();
        let lane = &mut self.lanes[usize::from(connection)];
        match lane.outgoing.completed(result) {
            Ok(true) if is_up => {
                lane.connection.batch_sent(&mut self.requests);
                // Its replies may have come before.
                self.leave_a_server_that_ends(io);
            }
            Ok(_) => {}
            Err(error) => self.fail(io, connection, Loss::Socket { what: "send", error }),
        }
    }

    /// The connection's socket takes more, or is shut down: the next send tells.
    pub fn handle_room(&mut self, connection: u16) {
        self.lane(connection).outgoing.room_came();
    }

    /// A tick has passed: looks for connections on which replies are due and nothing comes. What is to be done about them, the main
    /// thread says.
    pub fn handle_tick<Io: QueueIo>(&mut self, io: &mut Io) {
        self.requests.tick();
        if !self.is_up() {
            if std::mem::take(&mut self.is_told_silent) {
                self.events.push_back(LinkEvent::Silent(None));
            }
            return;
        }
        let (patience, requests) = (self.patience, &mut self.requests);
        for lane in &mut self.lanes {
            lane.quiet.tick(&mut lane.connection, requests, patience);
        }
        let silence = quiet::of_queue(self.lanes.iter().map(|lane| &lane.quiet), &self.requests, patience);
        if silence.is_some() || self.is_told_silent {
            self.is_told_silent = silence.is_some();
            self.events.push_back(LinkEvent::Silent(silence));
        }
        let is_unacknowledged = |connection: &u16| {
            let is_quiet = self.lanes[usize::from(*connection)].quiet.is_quiet();
            is_quiet && io.unacknowledged_for(*connection).is_some_and(|silent| silent >= NETWORK_TIMEOUT)
        };
        if let Some(connection) = self.connections().find(is_unacknowledged) {
            return self.fail(io, connection, Loss::Unacknowledged);
        }
        if let Some(connection) = self.connections().find(|connection| io.are_keys_worn(*connection)) {
            self.fail(io, connection, Loss::KeysWorn);
        }
    }

    // ------------------------------------------------------------------------------------------ losses, and ends

    /// The server may have said that it is shutting down. The replies that it still owes are waited for, on all connections: they are lost
    /// together.
    fn leave_a_server_that_ends<Io: QueueIo>(&mut self, io: &mut Io) {
        if let Some(connection) = self.link.leaving()
            && !self.requests.are_owed_replies()
        {
            self.fail(io, connection, Loss::Leaving);
        }
    }

    /// The server is shutting down, as another queue was told: nothing more is sent, and the connections are dropped once no reply is owed.
    pub fn leave<Io: QueueIo>(&mut self, io: &mut Io) {
        self.link.leave(0);
        self.leave_a_server_that_ends(io);
    }

    /// Drops the connections, for this reason. Of silence the connection that was silent for longest is the cause.
    pub fn disconnect<Io: QueueIo>(&mut self, io: &mut Io, reason: String) {
        let longest = |connection: &u16| {
            (self.lanes[usize::from(*connection)].quiet.silent_ticks(), std::cmp::Reverse(*connection))
        };
        let silent = self.connections().max_by_key(longest).unwrap_or_default();
        self.fail(io, silent, Loss::Told(reason));
    }

    /// A connection is lost, and with it the others of the queue: shut all down so that their operations end.
    fn fail<Io: QueueIo>(&mut self, io: &mut Io, connection: u16, loss: Loss) {
        if !self.is_up() {
            return;
        }
        let loss = match loss {
            // Where the kernel does the records it only says EIO of one that is not data.
            Loss::Socket { .. } => io.take_control_record(connection).map_or(loss, Loss::Tls),
            loss => loss,
        };
        tracing::warn!(queue_id = self.queue_id, connection, reason = %loss, "the connection is lost");
        self.link.fail(connection, loss);
        for connection in self.connections() {
            io.shut_down(connection);
        }
    }

    /// Nothing can come from the lost connections any more.
    fn reaped<Io: QueueIo>(&mut self, io: &mut Io, now: Instant) {
        let is_owed = self.requests.are_owed_replies();
        let Some(reaped) = self.link.reaped(now, is_owed) else { return };
        for (connection, lane) in (0..).zip(&mut self.lanes) {
            let resend = match connection == reaped.connection {
                true => reaped.loss.resend(self.resend),
                false => self.resend,
            };
            lane.connection.lost(&mut self.requests, resend);
            if reaped.gives_up {
                lane.connection.give_up(&mut self.requests);
            }
            lane.incoming = Incoming::default();
            lane.outgoing.abandon();
            io.drop_references(connection);
        }
        // Counted before anybody asks whether something was unflushed: here, and the main thread, which hears of the loss.
        self.commit_completed(io);
        if self.is_closed {
            return;
        }
        if self.resend == Resend::ReadsOnly {
            // Nor before the users know of it: else a FLUSH that tells of the loss could begin before.
            if let Err(error) = io.submit() {
                tracing::error!(queue_id = self.queue_id, %error, "cannot give requests back");
            }
            self.unflushed.connection_lost(self.queue_id);
        }
        self.is_told_silent = false;
        let oldest = self.requests.oldest_ticks().map(|ticks| TICK * ticks);
        let (connection, loss, served_nothing) = (reaped.connection, reaped.loss, reaped.served_nothing);
        self.events.push_back(LinkEvent::Disconnected(Lost { connection, loss, served_nothing, oldest }));
    }

    /// Without connections, requests end with EIO until there are some; with them, nothing changes.
    pub fn give_up(&mut self) {
        self.link.give_up();
        if self.link.gives_up() && !self.link.is_failing() {
            for lane in &mut self.lanes {
                lane.connection.give_up(&mut self.requests);
            }
        }
    }

    /// Here are all connections anew, in the transmission phase, each on the slot of the one before it. They were lost before, and the
    /// main thread was told so.
    ///
    /// # Errors
    /// Those of [`QueueIo::replace_socket`].
    pub fn connect<Io: QueueIo>(
        &mut self,
        io: &mut Io,
        sockets: Vec<Io::Socket>,
        now: Instant,
    ) -> io::Result<()> {
        assert_eq!(sockets.len(), self.lanes.len(), "a connection for each lane");
        assert!(matches!(self.link, QueueLink::Down { .. }), "connections replace those that were reaped");
        // What was given up is committed first: its memory is replaced next.
        self.commit_completed(io);
        io.renew_staging();
        for (connection, socket) in (0..).zip(sockets) {
            io.replace_socket(connection, socket)?;
            let lane = self.lane(connection);
            lane.quiet.connected(&lane.connection);
        }
        self.link = QueueLink::up(now, self.awaits_replies());
        Ok(())
    }

    // ------------------------------------------------------------------------------------------- every pass's end

    /// Everything that had completed was told: gives requests back, receives and sends. To be called when no completion is
    /// left; `now` is asked for only after a loss.
    pub fn end_of_pass<Io: QueueIo>(&mut self, io: &mut Io, now: impl FnOnce() -> Instant) {
        if self.held_read_bytes == self.held_before_bytes || !self.has_more_to_receive() {
            self.held_read_bytes = 0;
        }
        self.held_before_bytes = self.held_read_bytes;
        if self.link.is_failing() && !self.has_operations_out() {
            self.reaped(io, now());
        }
        if self.held_read_bytes == 0 {
            self.commit_completed(io);
        }
        // What ended on one connection may have made room for what waits on another.
        for connection in self.connections() {
            self.receive(io, connection);
            self.send(io, connection);
        }
        // Others have nothing to tell of: the counter that all queues share is left alone.
        let losses = if self.resend == Resend::ReadsOnly { self.unflushed.losses() } else { 0 };
        self.begun_after.end_of_pass(losses);
    }

    /// Whether a reply whose payload is large has begun to arrive, and ended requests may wait for it.
    fn has_more_to_receive(&self) -> bool {
        let has_payload = self.lanes.iter().any(|lane| lane.incoming.has_payload());
        has_payload && self.held_read_bytes < HELD_READ_BYTES_MAX && self.is_up()
    }

    /// Gives ended requests back to the block layer: no operation on their pages is out.
    fn commit_completed<Io: QueueIo>(&mut self, io: &mut Io) {
        while let Some(Completion { tag, result }) = self.requests.take_completion() {
            if tag == self.flush_tag() {
                self.final_flush = Some(result);
                continue;
            }
            // Without a connection, an error may be our own, of a request that the server may still be taking in.
            io.release(tag, result.is_ok() || self.is_up());
            let request = self.requests.of(tag).request;
            let is_believed = result.is_err() || self.note_durability(tag, &request);
            let result = if is_believed { result } else { Err(libc::EIO) };
            self.flush_may_be_held |= request.command == Command::Flush && result.is_err();
            let mut result = block_request::commit_result(&request, result);
            if result > 0
                && request.command == Command::Read
                && let Err(error) = io.copy_to_request(tag, request.length_bytes)
            {
                tracing::error!(tag, %error, "cannot copy a READ's data into its pages");
                result = -libc::EIO;
            }
            self.commit(io, tag, result);
        }
    }

    /// Counts what a server without power would forget; before the commit, because a FLUSH may follow it at once. False: it is a FLUSH
    /// that is not to be believed.
    fn note_durability(&self, tag: u16, request: &BlockRequest) -> bool {
        match request.command {
            Command::Write | Command::WriteZeroes | Command::Trim
                if self.volatile_cache && !request.flags.contains(CommandFlags::FUA) =>
            {
                self.unflushed.acknowledged(self.queue_id);
                true
            }
            Command::Flush => self.unflushed.flush_succeeded(self.requests.covered(tag)),
            _ => true,
        }
    }

    fn commit<Io: QueueIo>(&mut self, io: &mut Io, tag: u16, result: i32) {
        if assert_ours(self.tags.is_registered_by_hand(tag)) {
            assert_ours(self.tags.buffer_unregistered(tag));
            io.unregister(tag);
        }
        assert_ours(self.tags.commit_submitted(tag));
        io.commit_and_fetch(tag, result);
    }

    /// The tag after the device's last: the queue's own.
    fn flush_tag(&self) -> u16 {
        self.tags.queue_depth()
    }
}

#[cfg(test)]
mod tests;
