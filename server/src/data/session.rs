//! One connection's session: the handshake, then requests in and replies out, without any I/O.
//!
//! Owns: what state the conversation is in, which requests are in flight in which slot, and which replies are due. Never:
//! touches a socket, a file or a buffer; its owner (`session_io.rs`) feeds it the bytes that arrived, carries out the
//! [`Action`]s and tells it when requests are done. Tests drive it with plain byte strings.
//!
//! ```text
//!   Handshake ──Open/List/STARTTLS──► Waiting ──opened, listed, tls_started──► Handshake or Transmission ──DISC──► Ended
//!       └───────ABORT────────────────────────────────────────────────────────────────────────┘
//!   in Transmission:  header ──WRITE──► accepting its payload ──► in flight ──► reply due ──► reply sent, slot free
//!                        │ └─refused WRITE──► discarding its payload ────────────────▲
//!                        └─other──► in flight, or refused ───────────────────────────┘
//! ```
//! Invariants: a slot is in one state at a time; every request but DISC gets exactly one reply; with all slots in use
//! nothing is parsed, so the peer is held back by TCP; a stream that cannot be parsed is an error and never resumed.

use std::collections::VecDeque;

use proto::nbd::block_status::{Contexts, StatusPayload, extents_in};
use proto::nbd::handshake::server::{
    Event, ListedExport, Open, Refusal, ServerHandshake, ServerHandshakeError, TlsState,
};
use proto::nbd::replies::{EXTENDED_CHUNK_BYTES, ReplyHead};
use proto::nbd::transmission::{
    Command, CommandFlags, EXTENDED_REQUEST_BYTES, NbdError, REQUEST_BYTES, Request, TransmissionError,
};
use proto::nbd::validate::{
    PayloadTooLong, Refused, RequestLimits, take_status_payload, validate_payload, validate_request,
};
use proto::nbd::{ExportInfo, HeaderStyle};
use tracing::debug;

use crate::data::block_status::StatusQuery;
use crate::ids::RequestSlot;
use crate::limits::{IN_FLIGHT_REQUESTS_MAX, STATUS_REPLY_BYTES_MAX};

/// Room for the only extent that REQ_ONE wants, in bytes; as much for each context, and a head between two.
const STATUS_REPLY_ONE_BYTES: u32 = 24;

/// Longest head of a chunk that follows another, in bytes.
const HEAD_BYTES: u32 = EXTENDED_CHUNK_BYTES as u32;

/// The conversation cannot go on: close the connection, after sending what is left to send.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// In the handshake.
    #[error(transparent)]
    Handshake(#[from] ServerHandshakeError),
    /// In the transmission phase.
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
    /// An answer to what the peer does not wait for: this server is wrong, and the peer must not be told what it did not ask.
    #[error("an answer came that nobody waited for")]
    UnexpectedAnswer,
    /// A payload that nobody would send in good faith.
    #[error(transparent)]
    PayloadTooLong(#[from] PayloadTooLong),
}

/// What the owner has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Bring more bytes.
    NeedsBytes,
    /// Nothing; go on with the bytes that are left.
    NextBytes,
    /// Nothing can be parsed until a slot is free or the open or list was answered.
    Paused,
    /// Find the export and call [`Session::opened`].
    Open(Open),
    /// Find the public exports and call [`Session::listed`].
    List,
    /// Send the output, start TLS and call [`Session::tls_started`].
    StartTls,
    /// Begin this request; it needs no payload from the peer.
    Begin(RequestSlot),
    /// Take this WRITE's payload from the stream: see [`Session::payload_received`].
    TakePayload(RequestSlot),
    /// The peer is done: finish what is in flight, send every reply, close.
    End,
}

/// A reply that is due; what goes on the wire first is in the [`ReplyHead`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Whose; to be given back with [`Session::reply_sent`].
    pub slot: RequestSlot,
    /// How much of a READ's or BLOCK_STATUS's payload follows, in bytes.
    pub payload_bytes: u32,
}

#[derive(Debug)]
enum Stage {
    Handshake,
    Waiting(Awaited),
    Transmission(RequestLimits),
    Ended,
}

/// What the handshake waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Open,
    List,
    Tls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Payload {
    None,
    Accepting { slot: RequestSlot, remaining_bytes: u32 },
    Discarding { slot: RequestSlot, remaining_bytes: u32 },
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    request: Option<Request>,
    outcome: Outcome,
    /// What a BLOCK_STATUS is about.
    contexts: Contexts,
}

/// How a request ended, or will if nothing else happens.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Done,
    StatusFound { first_bytes: u32, payload_bytes: u32 },
    Refused(Refused),
    Failed { error: NbdError, at_bytes: Option<u64> },
}

/// The state of one conversation.
#[derive(Debug)]
pub struct Session {
    stage: Stage,
    handshake: ServerHandshake,
    headers: HeaderStyle,
    /// Of the export that is open.
    minimum_block_bytes: u32,
    out: Vec<u8>,
    slots: Box<[Slot]>,
    free_slots: Vec<RequestSlot>,
    payload: Payload,
    due: VecDeque<RequestSlot>,
}

impl Session {
    /// Begins; the greeting is in [`Self::take_output`].
    pub fn new() -> Self {
        let mut out = Vec::new();
        let handshake = ServerHandshake::new(&mut out);
        Self {
            stage: Stage::Handshake,
            handshake,
            headers: HeaderStyle::Simple,
            minimum_block_bytes: 1,
            out,
            slots: vec![
                Slot { request: None, outcome: Outcome::Done, contexts: Contexts::NONE };
                IN_FLIGHT_REQUESTS_MAX
            ]
            .into_boxed_slice(),
            free_slots: (0..IN_FLIGHT_REQUESTS_MAX as u8).rev().map(RequestSlot).collect(),
            payload: Payload::None,
            due: VecDeque::with_capacity(IN_FLIGHT_REQUESTS_MAX),
        }
    }

    /// The same, for a server that allows or requires TLS.
    #[must_use]
    pub fn with_tls(mut self, tls: TlsState) -> Self {
        self.handshake = self.handshake.with_tls(tls);
        self
    }

    /// The same, for a handshake of at most so many options.
    #[must_use]
    pub fn with_options_max(mut self, options_max: u32) -> Self {
        self.handshake = self.handshake.with_options_max(options_max);
        self
    }

    /// Parses some of `bytes`; tells how many were used and what to do. Call again with the rest unless the action is
    /// [`Action::NeedsBytes`], [`Action::Paused`] or [`Action::End`].
    ///
    /// # Errors
    /// [`SessionError`]: the peer broke the protocol.
    ///
    /// # Panics
    /// While a payload is being taken: the caller is wrong.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<(usize, Action), SessionError> {
        match &self.stage {
            Stage::Handshake => {
                let event = self.handshake.handle_bytes(bytes, &mut self.out)?;
                Ok((bytes.len(), self.take_event(event)))
            }
            Stage::Waiting(_) => Ok((0, Action::Paused)),
            Stage::Transmission(limits) => {
                let limits = *limits;
                self.advance_transmission(bytes, &limits)
            }
            Stage::Ended => Ok((0, Action::End)),
        }
    }

    /// The open was answered. True: transmission has begun, and the bytes in [`Self::leftover`] come first.
    ///
    /// # Errors
    /// EXPORT_NAME was refused, which can only be said by closing; or [`SessionError::UnexpectedAnswer`].
    pub fn opened(
        &mut self,
        answer: Result<(&ExportInfo, RequestLimits), Refusal>,
    ) -> Result<bool, SessionError> {
        self.take_answer(Awaited::Open)?;
        let limits = answer.as_ref().ok().map(|(_, limits)| *limits);
        let is_open = self.handshake.answer_open(answer.map(|(export, _)| export), &mut self.out)?;
        if let (true, Some(limits)) = (is_open, limits) {
            let limits = limits.for_client(self.handshake.negotiated());
            self.headers = limits.negotiated.headers;
            self.minimum_block_bytes = limits.block_sizes.minimum_bytes;
            self.stage = Stage::Transmission(limits);
        }
        Ok(is_open)
    }

    /// The export that the next [`Self::opened`] is about has these bitmaps.
    pub fn offer_bitmaps(&mut self, names: Vec<String>) {
        self.handshake.offer_bitmaps(names);
    }

    /// The bitmaps that the client has selected of the export that is open.
    pub fn selected_bitmaps(&self) -> &[String] {
        self.handshake.selected_bitmaps()
    }

    /// The list was answered.
    ///
    /// # Errors
    /// [`SessionError::UnexpectedAnswer`]
    pub fn listed(&mut self, exports: &[ListedExport]) -> Result<(), SessionError> {
        self.take_answer(Awaited::List)?;
        self.handshake.answer_list(exports, &mut self.out);
        Ok(())
    }

    /// TLS has started: the bytes to come are what it carries.
    ///
    /// # Errors
    /// [`SessionError::UnexpectedAnswer`]
    pub fn tls_started(&mut self) -> Result<(), SessionError> {
        self.take_answer(Awaited::Tls)?;
        self.handshake.tls_started();
        Ok(())
    }

    /// Goes on with the handshake, if it waits for this: an answer to nothing must neither be told nor end the server.
    fn take_answer(&mut self, answered: Awaited) -> Result<(), SessionError> {
        if !matches!(self.stage, Stage::Waiting(awaited) if awaited == answered) {
            return Err(SessionError::UnexpectedAnswer);
        }
        self.stage = Stage::Handshake;
        Ok(())
    }

    /// Bytes that arrived after the handshake; given once.
    pub fn leftover(&mut self) -> Vec<u8> {
        self.handshake.leftover()
    }

    /// Handshake bytes to be sent, once.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// Whether the handshake is over.
    pub fn is_transmitting(&self) -> bool {
        matches!(self.stage, Stage::Transmission(_))
    }

    /// Whether the peer's next bytes belong to a payload, to whom, and how many of it are missing.
    pub fn missing_payload(&self) -> Option<(RequestSlot, u32)> {
        match self.payload {
            Payload::Accepting { slot, remaining_bytes } => Some((slot, remaining_bytes)),
            _ => None,
        }
    }

    /// `bytes` of the payload were stored. True: it is complete, begin the request.
    ///
    /// # Panics
    /// When no payload is being taken, or not that much is missing: the caller is wrong.
    pub fn payload_received(&mut self, bytes: u32) -> bool {
        let Payload::Accepting { remaining_bytes, .. } = &mut self.payload else {
            panic!("payload_received: no payload is being taken");
        };
        assert!(*remaining_bytes >= bytes, "more payload than the request has");
        *remaining_bytes -= bytes;
        let is_complete = *remaining_bytes == 0;
        if is_complete {
            self.payload = Payload::None;
        }
        is_complete
    }

    /// The request in a slot.
    ///
    /// # Panics
    /// When the slot is free.
    pub fn request(&self, slot: RequestSlot) -> &Request {
        match &self.slots[usize::from(slot.0)].request {
            Some(request) => request,
            None => panic!("slot {} is free", slot.0),
        }
    }

    /// Bytes of the payload that the request brings, or room for the one that its reply may have.
    pub fn payload_bytes(&self, slot: RequestSlot) -> u32 {
        let request = self.request(slot);
        match request.command {
            // Validated to be no longer than the largest payload that was announced.
            Command::Read | Command::Write => request.length_bytes as u32,
            Command::BlockStatus if request.flags.contains(CommandFlags::REQ_ONE) => {
                let count = self.contexts(slot).count() as u32;
                STATUS_REPLY_ONE_BYTES * count + HEAD_BYTES * count.saturating_sub(1)
            }
            Command::BlockStatus => STATUS_REPLY_BYTES_MAX,
            _ => 0,
        }
    }

    /// What a BLOCK_STATUS asks.
    pub fn status_query(&self, slot: RequestSlot) -> StatusQuery {
        let request = self.request(slot);
        let wants_one = request.flags.contains(CommandFlags::REQ_ONE);
        let contexts = self.contexts(slot);
        let count = contexts.count().max(1) as u32;
        let room = (self.payload_bytes(slot) - HEAD_BYTES * (count - 1)) / count;
        let room = extents_in(room as usize, self.headers);
        StatusQuery {
            offset_bytes: request.offset_bytes,
            length_bytes: request.length_bytes,
            extents_max: if wants_one { 1 } else { room },
            alignment_bytes: u64::from(self.minimum_block_bytes),
            headers: self.headers,
            contexts,
            request: *request,
        }
    }

    fn contexts(&self, slot: RequestSlot) -> Contexts {
        self.slots[usize::from(slot.0)].contexts
    }

    /// The request is done; its reply becomes due.
    pub fn complete(&mut self, slot: RequestSlot) {
        self.finish(slot, Outcome::Done);
    }

    /// The extents of a BLOCK_STATUS are in its buffer, those of the first context before the heads and the extents of others; its reply
    /// becomes due.
    pub fn complete_status(&mut self, slot: RequestSlot, first_bytes: u32, payload_bytes: u32) {
        self.finish(slot, Outcome::StatusFound { first_bytes, payload_bytes });
    }

    /// The request failed, at a place if that is known; its reply becomes due.
    pub fn fail(&mut self, slot: RequestSlot, error: NbdError, at_bytes: Option<u64>) {
        self.finish(slot, Outcome::Failed { error, at_bytes });
    }

    fn finish(&mut self, slot: RequestSlot, outcome: Outcome) {
        self.slots[usize::from(slot.0)].outcome = outcome;
        self.due.push_back(slot);
    }

    /// The next reply that is due; puts what goes first into `head`.
    pub fn next_reply(&mut self, head: &mut ReplyHead) -> Option<Reply> {
        let slot = self.due.pop_front()?;
        let (headers, request) = (self.headers, self.request(slot));
        let mut payload_bytes = 0;
        match self.slots[usize::from(slot.0)].outcome {
            Outcome::Done if request.command == Command::Read => {
                payload_bytes = self.payload_bytes(slot);
                head.put_data(headers, request);
            }
            Outcome::Done => head.put_done(headers, request),
            Outcome::StatusFound { first_bytes, payload_bytes: found_bytes } => {
                payload_bytes = found_bytes;
                head.put_status(headers, request, first_bytes, first_bytes == found_bytes);
            }
            Outcome::Refused(reason) => {
                head.put_error(headers, request, reason.error() as u32, reason.words(), None);
            }
            Outcome::Failed { error, at_bytes } => {
                head.put_error(headers, request, error as u32, error.words(), at_bytes);
            }
        }
        Some(Reply { slot, payload_bytes })
    }

    /// The reply has left: its slot is free again.
    pub fn reply_sent(&mut self, slot: RequestSlot) {
        self.slots[usize::from(slot.0)].request = None;
        self.free_slots.push(slot);
    }

    /// Whether a reply or handshake bytes wait to be sent.
    pub fn has_output(&self) -> bool {
        !self.due.is_empty() || !self.out.is_empty()
    }

    /// Whether no request is in flight and nothing waits to be sent.
    pub fn is_idle(&self) -> bool {
        self.free_slots.len() == self.slots.len() && self.out.is_empty()
    }

    /// The peer has closed its side, or is not listened to any more: no further request is parsed, and a WRITE of which
    /// only a part has arrived is dropped. Gives the slot of that WRITE, which the caller frees of its buffer.
    pub fn end_input(&mut self) -> Option<RequestSlot> {
        self.stage = Stage::Ended;
        let dropped = match std::mem::replace(&mut self.payload, Payload::None) {
            Payload::None => None,
            Payload::Accepting { slot, .. } | Payload::Discarding { slot, .. } => Some(slot),
        };
        if let Some(slot) = dropped {
            self.reply_sent(slot);
        }
        dropped
    }

    fn take_event(&mut self, event: Option<Event>) -> Action {
        match event {
            None => Action::NeedsBytes,
            Some(Event::Open(open)) => {
                self.stage = Stage::Waiting(Awaited::Open);
                Action::Open(open)
            }
            Some(Event::List) => {
                self.stage = Stage::Waiting(Awaited::List);
                Action::List
            }
            Some(Event::StartTls) => {
                self.stage = Stage::Waiting(Awaited::Tls);
                Action::StartTls
            }
            Some(Event::Abort) => {
                self.stage = Stage::Ended;
                Action::End
            }
        }
    }

    fn advance_transmission(
        &mut self,
        bytes: &[u8],
        limits: &RequestLimits,
    ) -> Result<(usize, Action), SessionError> {
        match self.payload {
            Payload::Accepting { .. } => panic!("advance: a payload is being taken"),
            Payload::Discarding { slot, remaining_bytes } => {
                return Ok(self.discard(slot, remaining_bytes, bytes));
            }
            Payload::None => {}
        }
        let Some((request, header_bytes)) = decode(bytes, self.headers)? else {
            return Ok((0, Action::NeedsBytes));
        };
        if self.free_slots.is_empty() {
            return Ok((0, Action::Paused));
        }
        if request.command == Command::Disconnect {
            self.stage = Stage::Ended;
            return Ok((header_bytes, Action::End));
        }
        let payload_bytes = validate_payload(&request, limits)?;
        if request.command == Command::BlockStatus && StatusPayload::is_length(payload_bytes as usize) {
            let wire = bytes[header_bytes..].get(..payload_bytes as usize);
            let Some(payload) = wire.and_then(StatusPayload::decode) else {
                return Ok((0, Action::NeedsBytes));
            };
            let used = header_bytes + payload_bytes as usize;
            return Ok((used, self.accept_status_payload(request, payload, limits)));
        }
        let verdict = validate_request(&request, limits);
        let contexts = limits.negotiated.contexts;
        Ok((header_bytes, self.accept(request, contexts, payload_bytes, verdict)))
    }

    /// A BLOCK_STATUS whose payload names contexts; it was taken in with its header.
    fn accept_status_payload(
        &mut self,
        request: Request,
        payload: StatusPayload,
        limits: &RequestLimits,
    ) -> Action {
        let taken = take_status_payload(&request, payload, limits);
        let verdict = taken.and_then(|(taken, _)| validate_request(&taken, limits));
        let (request, contexts) = taken.unwrap_or((request, Contexts::NONE));
        self.accept(request, contexts, 0, verdict)
    }

    /// Puts a request into a slot; what is refused is answered without reaching the volume.
    fn accept(
        &mut self,
        request: Request,
        contexts: Contexts,
        payload_bytes: u32,
        verdict: Result<(), Refused>,
    ) -> Action {
        let Some(slot) = self.free_slots.pop() else { panic!("accept: no slot is free") };
        let outcome = verdict.map_or_else(Outcome::Refused, |()| Outcome::Done);
        self.slots[usize::from(slot.0)] = Slot { request: Some(request), outcome, contexts };
        if let Err(reason) = verdict {
            debug!(?request, %reason, "a request is refused");
            if payload_bytes == 0 {
                self.due.push_back(slot);
            } else {
                self.payload = Payload::Discarding { slot, remaining_bytes: payload_bytes };
            }
            return Action::NextBytes;
        }
        if payload_bytes == 0 {
            return Action::Begin(slot);
        }
        self.payload = Payload::Accepting { slot, remaining_bytes: payload_bytes };
        Action::TakePayload(slot)
    }

    fn discard(&mut self, slot: RequestSlot, remaining_bytes: u32, bytes: &[u8]) -> (usize, Action) {
        let taken_bytes = bytes.len().min(remaining_bytes as usize);
        let remaining_bytes = remaining_bytes - taken_bytes as u32;
        if remaining_bytes > 0 {
            self.payload = Payload::Discarding { slot, remaining_bytes };
            return (taken_bytes, Action::NeedsBytes);
        }
        self.payload = Payload::None;
        self.due.push_back(slot);
        (taken_bytes, Action::NextBytes)
    }
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads a request's header; `None`: it is not there yet. Gives its length too.
fn decode(bytes: &[u8], headers: HeaderStyle) -> Result<Option<(Request, usize)>, TransmissionError> {
    Ok(match headers {
        HeaderStyle::Simple | HeaderStyle::Structured => match bytes.first_chunk::<REQUEST_BYTES>() {
            Some(header) => Some((Request::decode(header)?, REQUEST_BYTES)),
            None => None,
        },
        HeaderStyle::Extended => match bytes.first_chunk::<EXTENDED_REQUEST_BYTES>() {
            Some(header) => Some((Request::decode_extended(header)?, EXTENDED_REQUEST_BYTES)),
            None => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use proto::nbd::handshake::client::ClientHandshake;
    use proto::nbd::handshake::server::OpenKind;
    use proto::nbd::transmission::CommandFlags;
    use proto::nbd::transmission::SimpleReply;
    use proto::nbd::{BlockSizes, Negotiated, TransmissionFlags};

    use super::*;

    const SIZE_BYTES: u64 = 1 << 20;

    fn limits() -> RequestLimits {
        let flags = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH);
        let block_sizes = BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes: 32 << 20 };
        RequestLimits { size_bytes: SIZE_BYTES, flags, block_sizes, negotiated: Negotiated::default() }
    }

    fn export() -> ExportInfo {
        let limits = limits();
        ExportInfo {
            size_bytes: limits.size_bytes,
            flags: limits.flags,
            block_sizes: Some(limits.block_sizes),
            description: None,
        }
    }

    /// A session that a real client has brought to transmission.
    fn transmitting() -> Session {
        let mut session = Session::new();
        let mut client = ClientHandshake::new("vol").unwrap();
        let mut to_server = Vec::new();
        client.handle_bytes(&session.take_output(), &mut to_server).unwrap();
        let (used, action) = session.advance(&to_server).unwrap();
        assert_eq!(used, to_server.len());
        assert!(matches!(action, Action::Open(open) if open.name == "vol"));
        assert_eq!(session.advance(b"").unwrap(), (0, Action::Paused));
        assert!(session.opened(Ok((&export(), limits()))).unwrap());
        assert_eq!(client.handle_bytes(&session.take_output(), &mut to_server).unwrap(), Some(export()));
        session
    }

    fn request(command: Command, cookie: u64, offset_bytes: u64, length_bytes: u64) -> Vec<u8> {
        Request { flags: CommandFlags::NONE, command, cookie, offset_bytes, length_bytes }.encode().to_vec()
    }

    fn reply(session: &mut Session) -> (u64, u32, u32) {
        let mut head = ReplyHead::default();
        let reply = session.next_reply(&mut head).expect("a reply is due");
        let header = SimpleReply::decode(head.bytes().try_into().unwrap()).unwrap();
        session.reply_sent(reply.slot);
        (header.cookie, header.error, reply.payload_bytes)
    }

    #[test]
    fn replies_go_out_in_the_order_of_completion() {
        let mut session = transmitting();
        let stream = [request(Command::Read, 1, 0, 512), request(Command::Read, 2, 512, 1024)].concat();
        let (used, action) = session.advance(&stream).unwrap();
        let Action::Begin(first) = action else { panic!("{action:?}") };
        let (_, action) = session.advance(&stream[used..]).unwrap();
        let Action::Begin(second) = action else { panic!("{action:?}") };
        session.complete(second);
        session.fail(first, NbdError::Eio, None);
        assert_eq!(reply(&mut session), (2, 0, 1024));
        assert_eq!(reply(&mut session), (1, 5, 0), "an error carries no payload");
        assert!(session.is_idle());
    }

    #[test]
    fn a_header_may_come_in_pieces() {
        let mut session = transmitting();
        let header = request(Command::Read, 1, 0, 512);
        for end in 0..header.len() {
            assert_eq!(session.advance(&header[..end]).unwrap(), (0, Action::NeedsBytes));
        }
        assert!(matches!(session.advance(&header).unwrap(), (REQUEST_BYTES, Action::Begin(_))));
    }

    #[test]
    fn a_write_begins_when_its_payload_is_complete() {
        let mut session = transmitting();
        let (_, action) = session.advance(&request(Command::Write, 1, 0, 1024)).unwrap();
        let Action::TakePayload(slot) = action else { panic!("{action:?}") };
        assert_eq!(session.missing_payload(), Some((slot, 1024)));
        assert!(!session.payload_received(1000));
        assert!(session.payload_received(24));
        assert_eq!(session.missing_payload(), None);
    }

    #[test]
    fn a_refused_writes_payload_is_discarded_before_its_reply() {
        let mut session = transmitting();
        let next = request(Command::Read, 2, 0, 512);
        let stream = [request(Command::Write, 1, SIZE_BYTES, 1024), vec![0x25; 1024], next].concat();
        assert_eq!(session.advance(&stream).unwrap(), (REQUEST_BYTES, Action::NextBytes));
        assert_eq!(session.advance(&stream[28..528]).unwrap(), (500, Action::NeedsBytes));
        assert!(!session.has_output());
        assert_eq!(session.advance(&stream[528..]).unwrap(), (524, Action::NextBytes));
        assert_eq!(reply(&mut session), (1, NbdError::Enospc as u32, 0));
        assert!(matches!(session.advance(&stream[1052..]).unwrap(), (REQUEST_BYTES, Action::Begin(_))));
    }

    #[test]
    fn an_absurd_payload_ends_the_connection() {
        let mut session = transmitting();
        let error = session.advance(&request(Command::Write, 1, 0, u32::MAX.into())).unwrap_err();
        assert!(matches!(error, SessionError::PayloadTooLong(_)));
    }

    #[test]
    fn a_stream_out_of_step_ends_the_connection() {
        let error = transmitting().advance(&[0x55; 200]).unwrap_err();
        assert!(matches!(error, SessionError::Transmission(TransmissionError::RequestMagic(0x5555_5555))));
    }

    #[test]
    fn unknown_commands_are_answered_and_the_connection_lives() {
        let mut session = transmitting();
        session.advance(&request(Command::Unknown(99), 7, 0, 0)).unwrap();
        assert_eq!(reply(&mut session), (7, NbdError::Einval as u32, 0));
        assert!(session.is_transmitting());
    }

    #[test]
    fn with_all_slots_in_use_nothing_is_parsed() {
        let mut session = transmitting();
        for cookie in 0..IN_FLIGHT_REQUESTS_MAX as u64 {
            let (_, action) = session.advance(&request(Command::Read, cookie, 0, 512)).unwrap();
            assert!(matches!(action, Action::Begin(_)));
        }
        let one_more = request(Command::Read, 1000, 0, 512);
        assert_eq!(session.advance(&one_more).unwrap(), (0, Action::Paused));
        session.complete(RequestSlot(5));
        reply(&mut session);
        assert_eq!(session.advance(&one_more).unwrap(), (REQUEST_BYTES, Action::Begin(RequestSlot(5))));
    }

    #[test]
    fn disconnect_ends_parsing_but_not_what_is_in_flight() {
        let mut session = transmitting();
        let (_, action) = session.advance(&request(Command::Read, 1, 0, 512)).unwrap();
        let Action::Begin(slot) = action else { panic!("{action:?}") };
        let end = session.advance(&request(Command::Disconnect, 2, 0, 0)).unwrap();
        assert_eq!(end, (REQUEST_BYTES, Action::End));
        assert_eq!(session.advance(&request(Command::Read, 3, 0, 512)).unwrap(), (0, Action::End));
        assert!(!session.is_idle());
        session.complete(slot);
        assert_eq!(reply(&mut session), (1, 0, 512));
        assert!(session.is_idle());
    }

    #[test]
    fn end_of_stream_inside_a_payload_drops_the_write() {
        for offset_bytes in [0, SIZE_BYTES] {
            let mut session = transmitting();
            session.advance(&request(Command::Write, 1, offset_bytes, 1024)).unwrap();
            assert!(session.end_input().is_some());
            assert!(session.is_idle(), "neither written nor answered");
        }
    }

    #[test]
    fn a_refused_open_may_be_tried_again() {
        let mut session = Session::new();
        let mut client = ClientHandshake::new("vol").unwrap();
        let mut to_server = Vec::new();
        client.handle_bytes(&session.take_output(), &mut to_server).unwrap();
        session.advance(&to_server).unwrap();
        assert!(!session.opened(Err(Refusal::unknown("no such export"))).unwrap());
        let (_, action) = session.advance(&to_server[4..]).unwrap();
        assert!(matches!(action, Action::Open(_)));
    }

    #[test]
    fn an_answer_that_nobody_waits_for_ends_the_connection_and_tells_the_peer_nothing() {
        for mut session in [Session::new(), transmitting()] {
            session.take_output();
            let opened = session.opened(Ok((&export(), limits())));
            assert!(matches!(opened, Err(SessionError::UnexpectedAnswer)), "{opened:?}");
            let refused = session.opened(Err(Refusal::unknown("no such export")));
            assert!(matches!(refused, Err(SessionError::UnexpectedAnswer)), "{refused:?}");
            assert!(matches!(session.listed(&[]), Err(SessionError::UnexpectedAnswer)));
            assert!(matches!(session.tls_started(), Err(SessionError::UnexpectedAnswer)));
            assert!(session.take_output().is_empty());
        }
    }

    #[test]
    fn requests_sent_ahead_of_the_handshakes_end_are_kept() {
        let mut session = Session::new();
        let mut client = ClientHandshake::new("vol").unwrap();
        let mut to_server = Vec::new();
        client.handle_bytes(&session.take_output(), &mut to_server).unwrap();
        let early = request(Command::Read, 1, 0, 512);
        to_server.extend_from_slice(&early);
        session.advance(&to_server).unwrap();
        session.opened(Ok((&export(), limits()))).unwrap();
        assert_eq!(session.leftover(), early);
    }

    fn option(number: u8, data: &[u8]) -> Vec<u8> {
        [&b"IHAVEOPT\0\0\0"[..], &[number, 0, 0, 0, data.len() as u8], data].concat()
    }

    /// A session with extended headers, in which `base:allocation` was selected.
    fn transmitting_extended() -> Session {
        let mut session = Session::new();
        session.advance(&[&[0, 0, 0, 3][..], &option(11, b"")].concat()).unwrap();
        let select = option(10, b"\0\0\0\x03vol\0\0\0\x01\0\0\0\x0fbase:allocation");
        assert!(
            matches!(session.advance(&select).unwrap().1, Action::Open(open) if open.kind == OpenKind::Info)
        );
        assert!(!session.opened(Ok((&export(), limits()))).unwrap());
        assert!(matches!(session.advance(&option(7, b"\0\0\0\x03vol\0\0")).unwrap().1, Action::Open(_)));
        assert!(session.opened(Ok((&export(), limits()))).unwrap());
        session.take_output();
        session
    }

    fn extended(command: Command, flags: CommandFlags, length_bytes: u64) -> Vec<u8> {
        let mut wire = vec![0x21, 0xe4, 0x1c, 0x71];
        wire.extend(flags.0.to_be_bytes());
        wire.extend(command.to_wire().to_be_bytes());
        wire.extend(7u64.to_be_bytes());
        wire.extend(4096u64.to_be_bytes());
        wire.extend(length_bytes.to_be_bytes());
        wire
    }

    #[test]
    fn a_status_payload_is_taken_in_with_its_header_however_it_comes() {
        let mut session = transmitting_extended();
        let payload = [&8192u64.to_be_bytes()[..], &1u32.to_be_bytes()].concat();
        let wire = [extended(Command::BlockStatus, CommandFlags::PAYLOAD_LEN, 12), payload].concat();
        for end in 0..wire.len() {
            assert_eq!(session.advance(&wire[..end]).unwrap(), (0, Action::NeedsBytes), "{end} bytes");
        }
        let (used, action) = session.advance(&wire).unwrap();
        let Action::Begin(slot) = action else { panic!("{action:?}") };
        assert_eq!(used, wire.len());
        let query = session.status_query(slot);
        assert_eq!((query.offset_bytes, query.length_bytes), (4096, 8192));
        assert_eq!(query.headers, HeaderStyle::Extended);
        session.complete_status(slot, 24, 24);
        let mut head = ReplyHead::default();
        let reply = session.next_reply(&mut head).unwrap();
        assert_eq!((reply.payload_bytes, head.bytes().len()), (24, 32));
    }

    #[test]
    fn several_contexts_share_the_room_and_a_request_may_name_some() {
        let mut session = Session::new();
        session.advance(&[&[0, 0, 0, 3][..], &option(11, b"")].concat()).unwrap();
        let queries = [&b"\0\0\0\x15qemu:dirty-bitmap:mon"[..], b"\0\0\0\x0fbase:allocation"].concat();
        let select = option(10, &[&b"\0\0\0\x03vol\0\0\0\x02"[..], &queries].concat());
        session.advance(&select).unwrap();
        session.offer_bitmaps(vec!["sun".to_owned(), "mon".to_owned()]);
        assert!(!session.opened(Ok((&export(), limits()))).unwrap());
        session.advance(&option(7, b"\0\0\0\x03vol\0\0")).unwrap();
        assert!(session.opened(Ok((&export(), limits()))).unwrap());
        assert_eq!(session.selected_bitmaps(), ["mon"]);
        let begin = |session: &mut Session, ids: &[u32], flags: CommandFlags| {
            let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
            let payload = [&8192u64.to_be_bytes()[..], &ids].concat();
            let header = extended(Command::BlockStatus, flags, payload.len() as u64);
            let (_, action) = session.advance(&[header, payload].concat()).unwrap();
            let Action::Begin(slot) = action else { panic!("{action:?}") };
            (slot, session.status_query(slot))
        };
        let (slot, query) = begin(&mut session, &[1, 2], CommandFlags::PAYLOAD_LEN);
        assert_eq!(query.contexts.ids().collect::<Vec<_>>(), [1, 2]);
        let room = session.payload_bytes(slot) as usize;
        assert!(2 * (8 + 16 * query.extents_max) + EXTENDED_CHUNK_BYTES <= room, "{query:?}");
        let one = CommandFlags::PAYLOAD_LEN.with(CommandFlags::REQ_ONE);
        let (of_one, query) = begin(&mut session, &[1, 2], one);
        assert_eq!((query.extents_max, session.payload_bytes(of_one)), (1, 24 + 32 + 24));
        let (_, query) = begin(&mut session, &[2], CommandFlags::PAYLOAD_LEN);
        assert_eq!(query.contexts.ids().collect::<Vec<_>>(), [2]);
        session.complete_status(of_one, 24, 24 + 32 + 24);
        let mut head = ReplyHead::default();
        assert_eq!(session.next_reply(&mut head).unwrap().payload_bytes, 80);
        assert_eq!((&head.bytes()[4..6], head.bytes()[31]), (&[0, 0][..], 24), "not the last chunk");
    }

    #[test]
    fn an_extended_reply_tells_the_offset_of_its_request() {
        let mut session = transmitting_extended();
        let (_, action) = session.advance(&extended(Command::Read, CommandFlags::NONE, 512)).unwrap();
        let Action::Begin(slot) = action else { panic!("{action:?}") };
        session.fail(slot, NbdError::Eio, Some(4096 + 100));
        let mut head = ReplyHead::default();
        assert_eq!(session.next_reply(&mut head).unwrap().payload_bytes, 0, "an error carries no payload");
        let (header, rest) = head.bytes().split_at(32);
        assert_eq!(header[16..24], 4096u64.to_be_bytes());
        assert_eq!(rest[rest.len() - 8..], (4096u64 + 100).to_be_bytes());
    }
}
