//! One connection on its ring: moves bytes between the socket, the session and the volume.
//!
//! Owns: its wire (`ring/wire.rs`), its requests (`in_flight.rs`), which operation of the socket is in flight, and when it is over.
//! Never: parses (`session.rs` does), decides what a request needs (`volume/request.rs` does), or waits.
//! Called by: `io/run.rs`, with the results of operations and, once in a pass, [`SessionIo::advance`].
//!
//! ```text
//!   Open ──DISC, EOF, refused EXPORT_NAME, protocol error──► Finishing ──all replies sent──► Closing ──drained──► (gone)
//!     └──────────────── fenced, socket error ──────────────────────┴───────────────────────────▲
//! ```
//! Invariants: at most one receive and one send in flight; nothing is received while a request waits for a buffer, while
//! all slots are in use, or while the export is being opened, so the peer is held back by TCP; once Closing, no operation
//! is submitted any more, and the connection is gone only when all that were have completed.

mod handshake;
mod turns;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::nbd::handshake::server::{Open, TlsState};
use proto::nbd::replies::ReplyHead;
use proto::nbd::transmission::{Command, NbdError};
use tls::kernel::ControlRecord;
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::backend::VolumeOp;
use crate::data::address::Peer;
use crate::data::admission::{NotAdmitted, Place};
use crate::data::dirty_bitmaps::{SelectedBitmaps, StatusAnswer};
use crate::data::io::buffers::{Buffer, HeldBuffers};
use crate::data::io::in_flight::InFlight;
use crate::data::io::ring::Ring;
use crate::data::io::ring::completion::{OpKind, Outcome};
use crate::data::io::ring::wire::Wire;
use crate::data::io::throttle::Throttle;
use crate::data::session::{Action, Session};
use crate::ids::{ConnectionId, RequestSlot};
use crate::limits::{BULK_BYTES, IN_FLIGHT_REQUESTS_MAX, Limits};
use crate::tls::rights::Rights;
use crate::volume::request::{Next, RequestProgress};
use crate::volume::snapshot::copy_before_write::HeldRequest;

/// From this many missing bytes on, a payload is received straight into its place; below, one bulk receive that may bring
/// the next requests along is cheaper.
const DIRECT_RECEIVE_BYTES_MIN: u32 = 16 << 10;

/// At most this is received at a time, so that a slow peer is seen to make progress.
const DIRECT_RECEIVE_BYTES_MAX: u32 = 1 << 20;

/// A WRITE of this many bytes makes the next receive a short one: what a bulk receive takes of the next payload has to be
/// copied.
const LARGE_WRITE_BYTES: u32 = 64 << 10;
/// Enough for the headers that may stand between two large payloads.
const SHORT_RECEIVE_BYTES: usize = 4 << 10;

/// Bytes of buffers that one connection may hold, beyond its first request; of each class no more than its share of what
/// others leave ([`BufferPool::may_take`](crate::data::io::buffers::BufferPool::may_take)). So clients that stand still do not take what
/// others need.
const HELD_BYTES_MAX: usize = 16 << 20;

/// So many replies, or so many bytes of them, are sent before the other connections of the ring have their turn.
const TURN_REPLIES_MAX: usize = 512;
const TURN_BYTES_MAX: u64 = 4 << 20;

/// What the session wants from the rest of the server.
#[derive(Debug)]
pub enum Ask {
    /// An export is to be opened.
    Open(Open),
    /// The volume is to be marked as written.
    Mark,
    /// The public exports are to be listed.
    List,
    /// TLS is to be started: everything was sent, and nothing is in flight.
    StartTls,
}

/// Where a connection is with TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    /// It does not start just now.
    Idle,
    /// The acknowledgement has to leave first.
    Acknowledging,
    /// The handshake has the socket.
    Starting,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Finishing,
    Closing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Nothing,
    Bulk,
    Payload,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// No request waits for a buffer.
    No,
    /// This one waits in the pool's queue.
    ByPool(RequestSlot),
    /// This one waits until the connection itself holds less.
    ByOwnShare(RequestSlot),
    /// This one waits until its volume is marked as written, durably.
    ByMark(RequestSlot),
}

/// One connection.
pub struct SessionIo {
    id: ConnectionId,
    wire: Wire,
    peer: Peer,
    phase: Phase,
    session: Session,
    /// Given back with the connection.
    place: Place,
    bulk_start: usize,
    bulk_end: usize,
    receive_bytes: usize,
    /// What the receive that is in flight, or was the last, asked for.
    asked_bytes: usize,
    /// The last receive got less than it asked for.
    has_emptied_socket: bool,
    receiving: Receiving,
    is_paused: bool,
    is_sending: bool,
    sending: Vec<RequestSlot>,
    /// Of the reply that is being put together.
    head: ReplyHead,
    requests: Box<[InFlight]>,
    held: Held,
    throttle: Throttle,
    /// It asks for the mark in this pass.
    asks_for_mark: bool,
    /// The attachment that it is served on; `None`: by the volume's name.
    attachment_id: Option<Uuid>,
    /// What the client has selected to compare with.
    bitmaps: Option<Arc<SelectedBitmaps>>,
    is_probe: bool,
    held_bytes: usize,
    held_buffers: HeldBuffers,
    tls: Tls,
    rights: Arc<Rights>,
    handshake_deadline: Instant,
    progressed_at: Instant,
    /// Sent in this turn.
    turn_replies: usize,
    turn_bytes: u64,
    /// Set while the connection is in the loop's list of connections to advance.
    pub is_listed: bool,
}

impl SessionIo {
    /// A connection that was just accepted.
    pub fn new(
        id: ConnectionId,
        wire: Wire,
        peer: Peer,
        place: Place,
        now: Instant,
        limits: &Limits,
        tls: TlsState,
    ) -> Self {
        Self {
            id,
            wire,
            peer,
            phase: Phase::Open,
            session: Session::new().with_tls(tls).with_options_max(limits.handshake_options_max),
            place,
            bulk_start: 0,
            bulk_end: 0,
            // Options are short; what one that is long needs at most is bounded by this and by its own limit.
            receive_bytes: SHORT_RECEIVE_BYTES,
            asked_bytes: 0,
            has_emptied_socket: false,
            receiving: Receiving::Nothing,
            is_paused: false,
            is_sending: false,
            sending: Vec::with_capacity(IN_FLIGHT_REQUESTS_MAX),
            head: ReplyHead::default(),
            requests: (0..IN_FLIGHT_REQUESTS_MAX).map(|_| InFlight::default()).collect(),
            held: Held::No,
            throttle: Throttle::default(),
            asks_for_mark: false,
            attachment_id: None,
            bitmaps: None,
            is_probe: false,
            held_bytes: 0,
            held_buffers: HeldBuffers::default(),
            tls: Tls::Idle,
            rights: Arc::new(Rights::everything()),
            handshake_deadline: now + limits.handshake_timeout,
            progressed_at: now,
            turn_replies: 0,
            turn_bytes: 0,
            is_listed: false,
        }
    }

    /// The connection's identity, unique in the life of the server.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Whether it is over: nothing of it is in flight any more.
    pub fn is_drained(&self) -> bool {
        self.phase == Phase::Closing && self.wire.is_drained()
    }

    /// Its socket and memory.
    pub fn wire(&mut self) -> &mut Wire {
        &mut self.wire
    }

    /// Whether it has taken too long to get to the transmission phase, or as a guest.
    pub fn is_late(&self, now: Instant) -> bool {
        self.has_to_end() && now >= self.handshake_deadline
    }

    /// Whether the handshake still goes on, or it is a guest.
    pub fn has_to_end(&self) -> bool {
        self.phase != Phase::Closing && (!self.session.is_transmitting() || self.beyond().is_some())
    }

    /// The limit that was reached when it came, if it is a guest.
    pub fn beyond(&self) -> Option<NotAdmitted> {
        self.place.beyond()
    }

    /// For how long the peer has neither taken nor sent a byte while buffers are held for it; `None` if none are.
    pub fn stalled_for(&self, now: Instant) -> Option<Duration> {
        let waits_for_payload =
            self.receiving != Receiving::Nothing && self.session.missing_payload().is_some();
        let waits_for_peer = self.is_sending || waits_for_payload;
        let is_stalled = self.phase != Phase::Closing && self.held_bytes > 0 && waits_for_peer;
        is_stalled.then(|| now.saturating_duration_since(self.progressed_at))
    }

    /// Takes the result of one of its operations.
    pub fn completed(&mut self, ring: &mut Ring, outcome: Outcome, now: Instant) {
        match outcome.kind {
            OpKind::ReceiveBulk => {
                self.receiving = Receiving::Nothing;
                if self.received(ring, outcome.result, now) {
                    self.bulk_end += outcome.result as usize;
                    self.has_emptied_socket = (outcome.result as usize) < self.asked_bytes;
                }
            }
            OpKind::ReceivePayload => {
                self.receiving = Receiving::Nothing;
                if self.received(ring, outcome.result, now)
                    && self.session.payload_received(outcome.result as u32)
                {
                    self.begin(ring, outcome.slot);
                }
            }
            OpKind::RoomToSend => {
                self.progressed_at = now;
                if self.phase != Phase::Closing {
                    self.send_on(ring);
                }
            }
            OpKind::Volume => self.volume_completed(ring, outcome.slot, outcome.result),
            OpKind::Cancel | OpKind::Wakeup | OpKind::Sync => {}
        }
    }

    /// The pool has found a buffer for the request that waited.
    pub fn granted(&mut self, ring: &mut Ring, buffer: Buffer) {
        match self.held {
            Held::ByPool(slot) => {
                self.held = Held::No;
                self.give_buffer(ring, slot, buffer);
            }
            Held::No | Held::ByOwnShare(_) | Held::ByMark(_) => ring.pool().release(buffer),
        }
    }

    /// Takes no more requests; what is in flight is finished and answered, then the connection closes.
    pub fn finish(&mut self, ring: &mut Ring) {
        if self.phase != Phase::Open {
            return;
        }
        self.phase = Phase::Finishing;
        // A request that waits for its buffer was accepted and is still answered, unless its payload has yet to come.
        let dropped = self.session.end_input();
        let held = match self.held {
            Held::No => None,
            Held::ByPool(slot) | Held::ByOwnShare(slot) | Held::ByMark(slot) => Some(slot),
        };
        if dropped.is_some() && held == dropped {
            ring.pool().forget_waiter(self.wire.index());
            self.held = Held::No;
        }
        if let Some(slot) = dropped {
            self.waits_no_more(slot);
        }
        // While a receive is in flight the payload's place is lent to the kernel: `release_all` gives it back.
        if let Some(slot) = dropped.filter(|_| self.receiving != Receiving::Payload) {
            self.release_buffer(ring, slot);
        }
    }

    /// Closes at once: nothing more is submitted, and what is in flight is waited for.
    pub fn close(&mut self, ring: &mut Ring) {
        if self.phase == Phase::Closing {
            return;
        }
        debug!(peer = %self.peer, connection = self.id.0, "connection closes");
        self.phase = Phase::Closing;
        self.forget_turn();
        ring.push_cancel(&mut self.wire);
        ring.pool().forget_waiter(self.wire.index());
    }

    /// Gives back every buffer and all held pages; the connection is drained and about to be dropped.
    pub fn release_all(&mut self, ring: &mut Ring) {
        for slot in 0..self.requests.len() as u8 {
            self.release_buffer(ring, RequestSlot(slot));
        }
    }

    /// Does what can be done now: parses, sends what is due, receives more, closes when finished. Of requests that are answered
    /// at once as many as there are in a turn: see [`SessionIo::waits_for_turn`].
    pub fn advance(&mut self, ring: &mut Ring) -> Option<Ask> {
        (self.turn_replies, self.turn_bytes) = (0, 0);
        if self.is_throttled() {
            self.take_turns(ring);
        }
        let mut ask = self.parse(ring);
        while self.send(ring) && ask.is_none() && self.phase == Phase::Open && !self.waits_for_turn() {
            // What left made room for requests that were held back.
            ask = self.parse(ring);
        }
        if self.is_throttled() {
            // What waited for a buffer may have it, and what is behind has no other time to be woken at.
            self.take_turns(ring);
        }
        if self.tls == Tls::Acknowledging && !self.is_sending && self.phase == Phase::Open {
            self.tls = Tls::Starting;
            ask = Some(Ask::StartTls);
        }
        if std::mem::take(&mut self.asks_for_mark) {
            ask = Some(Ask::Mark);
        }
        self.receive(ring);
        if self.phase == Phase::Finishing && self.session.is_idle() && !self.is_sending {
            self.close(ring);
        }
        ask
    }

    /// Whether it has had its turn and would go on: it wants to be advanced after the others, without news of its own.
    pub fn waits_for_turn(&self) -> bool {
        let is_held_back = self.is_paused || matches!(self.held, Held::ByOwnShare(_));
        let would_go_on = is_held_back || self.session.has_output();
        self.has_had_its_turn() && would_go_on && self.phase != Phase::Closing && !self.is_sending
    }

    fn has_had_its_turn(&self) -> bool {
        self.turn_replies >= TURN_REPLIES_MAX || self.turn_bytes >= TURN_BYTES_MAX
    }

    fn parse(&mut self, ring: &mut Ring) -> Option<Ask> {
        self.is_paused = false;
        if let Held::ByOwnShare(slot) = self.held {
            self.held = Held::No;
            self.prepare(ring, slot);
        }
        while self.phase == Phase::Open && !self.holds_stream() && self.receiving == Receiving::Nothing {
            if self.is_sending && !self.session.is_transmitting() {
                // Who does not read what a handshake answers makes it no longer by asking for more.
                self.is_paused = true;
                break;
            }
            if let Some((slot, missing_bytes)) = self.session.missing_payload() {
                if !self.store_payload(ring, slot, missing_bytes) {
                    break;
                }
                continue;
            }
            let parsed = self.session.advance(self.wire.bulk(self.bulk_start..self.bulk_end));
            let (used_bytes, action) = match parsed {
                Ok(parsed) => parsed,
                Err(error) => {
                    info!(peer = %self.peer, %error, "connection ends");
                    self.finish(ring);
                    break;
                }
            };
            self.bulk_start += used_bytes;
            match action {
                Action::NextBytes => {}
                Action::NeedsBytes => break,
                Action::Paused => {
                    self.is_paused = true;
                    break;
                }
                Action::Begin(slot) | Action::TakePayload(slot) => self.take_in(ring, slot),
                Action::End => self.finish(ring),
                Action::Open(open) => {
                    self.is_paused = true;
                    return Some(Ask::Open(open));
                }
                Action::List => {
                    self.is_paused = true;
                    return Some(Ask::List);
                }
                Action::StartTls => {
                    self.is_paused = true;
                    self.tls = Tls::Acknowledging;
                    break;
                }
            }
        }
        None
    }

    /// Sends what is due in one message, as far as its turn goes. True: it has left, and its slots are free.
    fn send(&mut self, ring: &mut Ring) -> bool {
        let has_nothing = self.has_had_its_turn() || !self.session.has_output();
        if self.is_sending || self.phase == Phase::Closing || has_nothing {
            return false;
        }
        let text = self.session.take_output();
        if !text.is_empty() {
            self.wire.add_text(text);
        }
        while !self.has_had_its_turn()
            && let Some(reply) = self.session.next_reply(&mut self.head)
        {
            self.wire.add_header(self.head.bytes());
            if reply.payload_bytes > 0 {
                let place = self.requests[usize::from(reply.slot.0)].place(self.session.request(reply.slot));
                ring.add_payload(&mut self.wire, place, reply.payload_bytes);
            }
            self.sending.push(reply.slot);
            self.turn_replies += 1;
            self.turn_bytes += u64::from(reply.payload_bytes);
        }
        self.send_on(ring)
    }

    /// Sends what is left of a message. True: nothing is, and slots are free.
    fn send_on(&mut self, ring: &mut Ring) -> bool {
        match ring.send(&mut self.wire) {
            Ok(is_sent) => self.is_sending = !is_sent,
            Err(error) => {
                debug!(peer = %self.peer, %error, "cannot send");
                self.close(ring);
                return false;
            }
        }
        if self.is_sending {
            return false;
        }
        let mut sent = std::mem::take(&mut self.sending);
        for slot in sent.drain(..) {
            self.release_buffer(ring, slot);
            self.session.reply_sent(slot);
        }
        self.sending = sent;
        true
    }

    /// Starts the next receive, unless the peer has to be held back.
    fn receive(&mut self, ring: &mut Ring) {
        let is_held_back = self.holds_stream() || self.is_paused;
        if self.phase != Phase::Open || self.receiving != Receiving::Nothing || is_held_back {
            return;
        }
        if let Some((slot, missing_bytes)) = self.session.missing_payload()
            && missing_bytes >= DIRECT_RECEIVE_BYTES_MIN
        {
            let done_bytes = self.session.payload_bytes(slot) - missing_bytes;
            let length_bytes = missing_bytes.min(DIRECT_RECEIVE_BYTES_MAX);
            let place = self.requests[usize::from(slot.0)].place(self.session.request(slot));
            ring.push_receive_payload(&mut self.wire, slot, place, done_bytes, length_bytes);
            self.has_emptied_socket = false;
            self.receiving = Receiving::Payload;
            return;
        }
        // What is left is less than a header, so moving it to the front costs nothing.
        let left_bytes = self.bulk_end - self.bulk_start;
        if self.bulk_start > 0 {
            self.wire.bulk_mut().copy_within(self.bulk_start..self.bulk_end, 0);
            (self.bulk_start, self.bulk_end) = (0, left_bytes);
        }
        let end = (left_bytes + self.receive_bytes).min(BULK_BYTES);
        self.asked_bytes = end - left_bytes;
        ring.push_receive_bulk(&mut self.wire, left_bytes..end, self.has_emptied_socket);
        self.receiving = Receiving::Bulk;
    }

    /// Looks at a receive's result. True: bytes have arrived and belong to somebody.
    fn received(&mut self, ring: &mut Ring, result: i32, now: Instant) -> bool {
        self.progressed_at = now;
        if self.phase != Phase::Open {
            return false;
        }
        match result {
            1.. => true,
            0 => {
                // Who left without a word is not to have anything begun any more that waits.
                if self.is_throttled() || self.requests.iter().any(|request| request.held.is_some()) {
                    self.close(ring);
                } else {
                    self.finish(ring);
                }
                false
            }
            errno if errno == -libc::EINTR => false,
            errno => {
                match self.wire.take_control_record().filter(|_| errno == -libc::EIO) {
                    // As the end of the stream: what is in flight is answered.
                    Some(ControlRecord::CloseNotify) => self.finish(ring),
                    record => {
                        let record = record.map(|record| record.to_string());
                        debug!(peer = %self.peer, errno = -errno, record, "cannot receive");
                        self.close(ring);
                    }
                }
                false
            }
        }
    }

    /// Copies what has arrived of a payload to its place. False: more has to be received.
    fn store_payload(&mut self, ring: &mut Ring, slot: RequestSlot, missing_bytes: u32) -> bool {
        let taken_bytes = (self.bulk_end - self.bulk_start).min(missing_bytes as usize);
        if taken_bytes == 0 {
            return false;
        }
        let range = self.bulk_start..self.bulk_start + taken_bytes;
        self.bulk_start = range.end;
        let done_bytes = self.session.payload_bytes(slot) - missing_bytes;
        let place = self.requests[usize::from(slot.0)].place(self.session.request(slot));
        ring.store_payload(&self.wire, range, place, done_bytes);
        let is_complete = self.session.payload_received(taken_bytes as u32);
        if is_complete {
            self.begin(ring, slot);
        }
        is_complete
    }

    /// Finds the place of a request's payload; begins it if none of it has to arrive first.
    fn prepare(&mut self, ring: &mut Ring, slot: RequestSlot) {
        let request = self.session.request(slot);
        let length_bytes = self.session.payload_bytes(slot);
        let has_payload = length_bytes > 0;
        if request.command == Command::Write
            && let Some(memory) = self.wire.volume().and_then(|volume| volume.memory())
        {
            memory.expect_write(request.offset_bytes, length_bytes);
        }
        if has_payload {
            let is_large = request.command == Command::Write && length_bytes >= LARGE_WRITE_BYTES;
            self.receive_bytes = if is_large { SHORT_RECEIVE_BYTES } else { BULK_BYTES };
        }
        let is_in_place = request.command != Command::BlockStatus
            && self.wire.volume().is_some_and(|volume| volume.memory().is_some());
        if !has_payload || is_in_place {
            self.begin_unless_payload_is_missing(ring, slot);
            return;
        }
        if request.command == Command::Read
            && let Some(volume) = self.wire.volume()
            && let Some(pages) = ring.hold_pages(volume, request.offset_bytes, length_bytes)
        {
            self.requests[usize::from(slot.0)].pages = Some(pages);
            self.session.complete(slot);
            return;
        }
        let length_bytes = length_bytes as usize;
        let is_too_much = self.held_bytes > 0 && self.held_bytes + length_bytes > HELD_BYTES_MAX;
        if is_too_much || !ring.pool().may_take(length_bytes, &self.held_buffers) {
            // It holds some, so it is looked at again when it gives one back.
            self.held = Held::ByOwnShare(slot);
            return;
        }
        match ring.pool().take(length_bytes, self.wire.index()) {
            Some(buffer) => self.give_buffer(ring, slot, buffer),
            None => self.held = Held::ByPool(slot),
        }
    }

    fn give_buffer(&mut self, ring: &mut Ring, slot: RequestSlot, buffer: Buffer) {
        let buffer_bytes = self.session.payload_bytes(slot) as usize;
        self.held_bytes += buffer_bytes;
        self.held_buffers.add(&buffer);
        let request = &mut self.requests[usize::from(slot.0)];
        (request.buffer, request.buffer_bytes) = (Some(buffer), buffer_bytes);
        self.begin_unless_payload_is_missing(ring, slot);
    }

    fn begin_unless_payload_is_missing(&mut self, ring: &mut Ring, slot: RequestSlot) {
        if self.session.missing_payload().is_none_or(|(missing, _)| missing != slot) {
            self.begin(ring, slot);
        }
    }

    fn begin(&mut self, ring: &mut Ring, slot: RequestSlot) {
        if self.phase == Phase::Closing {
            return;
        }
        if self.throttle.has_arrived(slot) {
            return self.take_turns(ring);
        }
        if self.session.request(slot).command == Command::BlockStatus {
            ring.find_extents(&mut self.wire, slot, self.bitmaps.clone(), self.session.status_query(slot));
            return;
        }
        let Some(volume) = self.wire.volume() else { panic!("a request without a volume") };
        let (progress, next) = RequestProgress::begin(volume, self.session.request(slot));
        self.requests[usize::from(slot.0)].progress = Some(progress);
        self.follow(ring, slot, next);
    }

    /// The extents that a BLOCK_STATUS asked for, as its reply's payload.
    pub fn extents_found(&mut self, ring: &mut Ring, slot: RequestSlot, answer: Option<&StatusAnswer>) {
        if self.phase == Phase::Closing {
            return;
        }
        let Some(StatusAnswer { payload, first_bytes }) = answer else {
            return self.session.fail(slot, NbdError::Eio, None);
        };
        let Some(buffer) = &self.requests[usize::from(slot.0)].buffer else {
            panic!("extents for a request without a buffer")
        };
        ring.fill(buffer, payload);
        self.session.complete_status(slot, *first_bytes, payload.len() as u32);
    }

    fn volume_completed(&mut self, ring: &mut Ring, slot: RequestSlot, result: i32) {
        let (Some(volume), Some(progress)) =
            (self.wire.volume(), self.requests[usize::from(slot.0)].progress.as_mut())
        else {
            panic!("a result for a request that was not begun");
        };
        // Even when nobody wants the answer any more: a failed sync has to be noticed.
        let next = progress.completed(volume, result);
        if self.phase != Phase::Closing {
            self.follow(ring, slot, next);
        }
    }

    fn follow(&mut self, ring: &mut Ring, slot: RequestSlot, next: Next) {
        match next {
            Next::Submit(op) if self.holds(ring, slot, op) => {}
            Next::Submit(op) => {
                let buffer = self.requests[usize::from(slot.0)].buffer.as_ref();
                ring.push_volume_op(&mut self.wire, slot, op, buffer);
            }
            Next::Done(result) => self.done(ring, slot, result),
            Next::Disconnect => {
                warn!(connection = self.id.0, "closed without an answer: what it would say is not recorded");
                self.close(ring);
            }
        }
    }

    /// Whether an operation has to wait until what it changes is copied; it is kept for [`Self::go_on`].
    fn holds(&mut self, ring: &Ring, slot: RequestSlot, op: VolumeOp) -> bool {
        let request = HeldRequest { ring: ring.number(), connection: self.id, slot };
        let holds = self.wire.volume().is_some_and(|volume| volume.copy_before_write().holds(&op, request));
        if holds {
            self.requests[usize::from(slot.0)].held = Some(op);
        }
        holds
    }

    /// The operation of a request that waited for a copy may be tried again.
    pub fn go_on(&mut self, ring: &mut Ring, slot: RequestSlot) {
        let held = self.requests[usize::from(slot.0)].held.take();
        if let Some(op) = held.filter(|_| self.phase != Phase::Closing) {
            self.follow(ring, slot, Next::Submit(op));
        }
    }

    fn done(&mut self, ring: &mut Ring, slot: RequestSlot, result: Result<(), NbdError>) {
        let is_read = self.session.request(slot).command == Command::Read;
        match result {
            Ok(()) => {
                if !is_read {
                    self.release_buffer(ring, slot);
                }
                self.session.complete(slot);
            }
            Err(error) => {
                let progress = self.requests[usize::from(slot.0)].progress.as_ref();
                let at_bytes = progress.and_then(RequestProgress::failed_at_bytes);
                self.release_buffer(ring, slot);
                self.session.fail(slot, error, at_bytes);
            }
        }
    }

    fn release_buffer(&mut self, ring: &mut Ring, slot: RequestSlot) {
        let request = &mut self.requests[usize::from(slot.0)];
        request.progress = None;
        if let Some(buffer) = request.buffer.take() {
            self.held_bytes -= request.buffer_bytes;
            self.held_buffers.remove(&buffer);
            ring.pool().release(buffer);
        }
        if let Some(pages) = request.pages.take() {
            ring.pipes().release(pages);
        }
    }
}
