//! One connection's session: the handshake, then requests in and replies out, without any I/O.
//!
//! Owns: what state the conversation is in, which requests are in flight in which slot, and which replies are due. Never:
//! touches a socket, a file or a buffer; its owner (`connection.rs`) feeds it the bytes that arrived, carries out the
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

use proto::nbd::ExportInfo;
use proto::nbd::handshake::server::{Event, Open, Refusal, ServerHandshake, ServerHandshakeError, TlsState};
use proto::nbd::transmission::{
    Command, NbdError, REQUEST_BYTES, Request, SIMPLE_REPLY_BYTES, SimpleReply, TransmissionError,
};
use proto::nbd::validate::{RequestLimits, validate_request};
use tracing::debug;

/// Requests of one connection that are in flight at once. As many as ublk and the kernel's nbd client put on a queue by
/// default, so that neither is held back; a peer that sends more finds its socket full.
pub const IN_FLIGHT_REQUESTS_MAX: usize = 128;

/// Longest payload of a refused WRITE that is read and thrown away. Twice what is ever announced: a longer one is not a
/// request that went wrong but a stream that did, and ends the connection.
pub const DISCARDED_BYTES_MAX: u32 = 64 << 20;

/// The peer broke the protocol: close its connection, after sending what is left to send.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// In the handshake.
    #[error(transparent)]
    Handshake(#[from] ServerHandshakeError),
    /// In the transmission phase.
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
    /// A WRITE that is refused carries more than [`DISCARDED_BYTES_MAX`].
    #[error("a refused WRITE carries {0} bytes of payload")]
    RefusedPayloadTooLong(u32),
}

/// Which in-flight request: an index below [`IN_FLIGHT_REQUESTS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotId(pub u8);

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
    /// Find the names of the public exports and call [`Session::listed`].
    List,
    /// Send the output, start TLS and call [`Session::tls_started`].
    StartTls,
    /// Begin this request; it needs no payload from the peer.
    Begin(SlotId),
    /// Take this WRITE's payload from the stream: see [`Session::payload_received`].
    TakePayload(SlotId),
    /// The peer is done: finish what is in flight, send every reply, close.
    End,
}

/// A reply that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Whose; to be given back with [`Session::reply_sent`].
    pub slot: SlotId,
    /// What goes on the wire first.
    pub header: [u8; SIMPLE_REPLY_BYTES],
    /// How much of a READ's payload follows, in bytes.
    pub payload_bytes: u32,
}

#[derive(Debug)]
enum Stage {
    Handshake,
    Waiting,
    Transmission(RequestLimits),
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Payload {
    None,
    Accepting { slot: SlotId, remaining_bytes: u32 },
    Discarding { slot: SlotId, remaining_bytes: u32 },
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    request: Option<Request>,
    error: u32,
}

/// The state of one conversation.
#[derive(Debug)]
pub struct Session {
    stage: Stage,
    handshake: ServerHandshake,
    out: Vec<u8>,
    slots: Box<[Slot]>,
    free_slots: Vec<SlotId>,
    payload: Payload,
    due: VecDeque<SlotId>,
}

impl Session {
    /// Begins; the greeting is in [`Self::take_output`].
    pub fn new() -> Self {
        let mut out = Vec::new();
        let handshake = ServerHandshake::new(&mut out);
        Self {
            stage: Stage::Handshake,
            handshake,
            out,
            slots: vec![Slot { request: None, error: 0 }; IN_FLIGHT_REQUESTS_MAX].into_boxed_slice(),
            free_slots: (0..IN_FLIGHT_REQUESTS_MAX as u8).rev().map(SlotId).collect(),
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
            Stage::Waiting => Ok((0, Action::Paused)),
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
    /// EXPORT_NAME was refused, which can only be said by closing.
    pub fn opened(
        &mut self,
        answer: Result<(&ExportInfo, RequestLimits), Refusal>,
    ) -> Result<bool, SessionError> {
        self.stage = Stage::Handshake;
        let limits = answer.as_ref().ok().map(|(_, limits)| *limits);
        let is_open = self.handshake.answer_open(answer.map(|(export, _)| export), &mut self.out)?;
        if let (true, Some(limits)) = (is_open, limits) {
            self.stage = Stage::Transmission(limits);
        }
        Ok(is_open)
    }

    /// The list was answered.
    pub fn listed(&mut self, names: &[String]) {
        self.stage = Stage::Handshake;
        self.handshake.answer_list(names, &mut self.out);
    }

    /// TLS has started: the bytes to come are what it carries.
    pub fn tls_started(&mut self) {
        self.stage = Stage::Handshake;
        self.handshake.tls_started();
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
    pub fn missing_payload(&self) -> Option<(SlotId, u32)> {
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
    pub fn request(&self, slot: SlotId) -> &Request {
        match &self.slots[usize::from(slot.0)].request {
            Some(request) => request,
            None => panic!("slot {} is free", slot.0),
        }
    }

    /// The request is done; its reply becomes due.
    pub fn complete(&mut self, slot: SlotId, result: Result<(), NbdError>) {
        self.slots[usize::from(slot.0)].error = result.map_or_else(|error| error as u32, |()| 0);
        self.due.push_back(slot);
    }

    /// The next reply that is due.
    pub fn next_reply(&mut self) -> Option<Reply> {
        let slot = self.due.pop_front()?;
        let error = self.slots[usize::from(slot.0)].error;
        let request = self.request(slot);
        let header = SimpleReply { error, cookie: request.cookie }.encode();
        let has_payload = request.command == Command::Read && error == 0;
        let payload_bytes = if has_payload { request.length_bytes } else { 0 };
        Some(Reply { slot, header, payload_bytes })
    }

    /// The reply has left: its slot is free again.
    pub fn reply_sent(&mut self, slot: SlotId) {
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
    pub fn end_input(&mut self) -> Option<SlotId> {
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
                self.stage = Stage::Waiting;
                Action::Open(open)
            }
            Some(Event::List) => {
                self.stage = Stage::Waiting;
                Action::List
            }
            Some(Event::StartTls) => {
                self.stage = Stage::Waiting;
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
        let Some(header) = bytes.first_chunk::<REQUEST_BYTES>() else { return Ok((0, Action::NeedsBytes)) };
        if self.free_slots.is_empty() {
            return Ok((0, Action::Paused));
        }
        let request = Request::decode(header)?;
        if request.command == Command::Disconnect {
            self.stage = Stage::Ended;
            return Ok((REQUEST_BYTES, Action::End));
        }
        let action = self.accept(request, limits)?;
        Ok((REQUEST_BYTES, action))
    }

    /// Puts a request into a slot; what is refused is answered without reaching the volume.
    fn accept(&mut self, request: Request, limits: &RequestLimits) -> Result<Action, SessionError> {
        let refused = validate_request(&request, limits);
        let payload_bytes = request.payload_bytes();
        if refused.is_err() && payload_bytes > DISCARDED_BYTES_MAX {
            return Err(SessionError::RefusedPayloadTooLong(payload_bytes));
        }
        let Some(slot) = self.free_slots.pop() else { panic!("accept: no slot is free") };
        self.slots[usize::from(slot.0)] = Slot { request: Some(request), error: 0 };
        if let Err(reason) = refused {
            debug!(?request, %reason, "a request is refused");
            if payload_bytes == 0 {
                self.complete(slot, Err(reason.error()));
            } else {
                self.slots[usize::from(slot.0)].error = reason.error() as u32;
                self.payload = Payload::Discarding { slot, remaining_bytes: payload_bytes };
            }
            return Ok(Action::NextBytes);
        }
        if payload_bytes == 0 {
            return Ok(Action::Begin(slot));
        }
        self.payload = Payload::Accepting { slot, remaining_bytes: payload_bytes };
        Ok(Action::TakePayload(slot))
    }

    fn discard(&mut self, slot: SlotId, remaining_bytes: u32, bytes: &[u8]) -> (usize, Action) {
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

#[cfg(test)]
mod tests {
    use proto::nbd::handshake::client::ClientHandshake;
    use proto::nbd::transmission::CommandFlags;
    use proto::nbd::{BlockSizes, TransmissionFlags};

    use super::*;

    const SIZE_BYTES: u64 = 1 << 20;

    fn limits() -> RequestLimits {
        let flags = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH);
        let block_sizes = BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes: 32 << 20 };
        RequestLimits { size_bytes: SIZE_BYTES, flags, block_sizes }
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

    fn request(command: Command, cookie: u64, offset_bytes: u64, length_bytes: u32) -> Vec<u8> {
        Request { flags: CommandFlags::NONE, command, cookie, offset_bytes, length_bytes }.encode().to_vec()
    }

    fn reply(session: &mut Session) -> (u64, u32, u32) {
        let reply = session.next_reply().expect("a reply is due");
        let header = SimpleReply::decode(&reply.header).unwrap();
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
        session.complete(second, Ok(()));
        session.complete(first, Err(NbdError::Eio));
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
        let error = session.advance(&request(Command::Write, 1, 0, u32::MAX)).unwrap_err();
        assert!(matches!(error, SessionError::RefusedPayloadTooLong(u32::MAX)));
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
        session.complete(SlotId(5), Ok(()));
        reply(&mut session);
        assert_eq!(session.advance(&one_more).unwrap(), (REQUEST_BYTES, Action::Begin(SlotId(5))));
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
        session.complete(slot, Ok(()));
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
}
