//! The client's side of the handshake.
//!
//! ```text
//!   Greeting ──────────────────────────────────► Going ──ACK──► done
//!      │                                            ▲  │
//!      └─with TLS─► StartingTls ─ACK, tls_started───┘  └─ERR_UNSUP──► ExportName ──► done   (servers from before GO)
//!
//!   before Going, where a metadata context is wanted:
//!      Structuring ──ACK──► SelectingContext ──ACK──► Going       (an error leads to Going as well, without)
//! ```
//!
//! Owned by `client/src/device/connect/dial.rs`. A disk asks for nothing that would change the replies: neither structured replies nor
//! extended headers, because a simple reply is the whole payload or an error. Who copies images wants to know what is allocated,
//! which only structured replies tell: [`ClientHandshake::with_context`].

use super::super::wire::{be_u16, be_u32, be_u64};
use super::super::{
    BlockSizes, ExportInfo, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_BYTES_MAX,
    TransmissionFlags, handshake_flags, info, option, reply,
};
use super::{OPTION_BYTES_MAX, take};

/// Most replies to one option; a server that sends more is not answering.
const REPLIES_MAX: u32 = 64;

/// The handshake cannot go on: close the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientHandshakeError {
    /// The name is longer than the protocol allows.
    #[error("an export name has at most {STRING_BYTES_MAX} bytes")]
    NameTooLong,
    /// What answers is not an NBD server.
    #[error("this is not an NBD server: it greets with {0:#018x}")]
    NotNbd(u64),
    /// An NBD server of the oldstyle protocol, or newstyle without "fixed".
    #[error("the NBD server does not speak the fixed newstyle protocol")]
    NotFixedNewstyle,
    /// The server breaks the protocol.
    #[error("the NBD server breaks the protocol: {0}")]
    Protocol(&'static str),
    /// The server does not start TLS, without which we say nothing else.
    #[error("the NBD server does not start TLS: {text} (reply {reply:#x})")]
    TlsRefused {
        /// `NBD_REP_ERR_*`
        reply: u32,
        /// Its words, or ours for the number.
        text: String,
    },
    /// The server does not give us the export.
    #[error("the NBD server refuses the export: {text} (reply {reply:#x})")]
    Refused {
        /// `NBD_REP_ERR_*`
        reply: u32,
        /// Its words, or ours for the number.
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    StartingTls,
    TlsAcknowledged,
    Structuring,
    SelectingContext,
    Going,
    ExportName,
    Done,
}

/// What the client's side has settled beside the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientNegotiated {
    /// READ and BLOCK_STATUS are answered in chunks.
    pub structured_replies: bool,
    /// The number of the metadata context that was wanted, where the server has it for this export.
    pub context_id: Option<u32>,
}

/// The client's side of one connection's handshake.
#[derive(Debug)]
pub struct ClientHandshake {
    state: State,
    name: String,
    no_zeroes: bool,
    wants_tls: bool,
    /// The metadata context that is wanted.
    context: Option<String>,
    negotiated: ClientNegotiated,
    replies_seen: u32,
    input: Vec<u8>,
    size_and_flags: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    description: Option<String>,
}

impl ClientHandshake {
    /// Begins: nothing is sent before the server's greeting.
    ///
    /// # Errors
    /// [`ClientHandshakeError::NameTooLong`]
    pub fn new(export_name: &str) -> Result<Self, ClientHandshakeError> {
        if export_name.len() > STRING_BYTES_MAX {
            return Err(ClientHandshakeError::NameTooLong);
        }
        Ok(Self {
            state: State::Greeting,
            name: export_name.to_owned(),
            no_zeroes: false,
            wants_tls: false,
            context: None,
            negotiated: ClientNegotiated::default(),
            replies_seen: 0,
            input: Vec::new(),
            size_and_flags: None,
            block_sizes: None,
            description: None,
        })
    }

    /// The same, over TLS or not at all: see [`Self::is_tls_acknowledged`].
    #[must_use]
    pub fn with_tls(self) -> Self {
        Self { wants_tls: true, ..self }
    }

    /// The same, with structured replies and this metadata context where the server has them: see [`Self::negotiated`].
    #[must_use]
    pub fn with_context(self, context: &str) -> Self {
        Self { context: Some(context.to_owned()), ..self }
    }

    /// What was settled beside the export; complete once that is open.
    pub fn negotiated(&self) -> ClientNegotiated {
        self.negotiated
    }

    /// Whether the server waits for the TLS handshake: do it, then call [`Self::tls_started`].
    pub fn is_tls_acknowledged(&self) -> bool {
        self.state == State::TlsAcknowledged
    }

    /// Whether the export was asked for: before, the server's answers wait for nobody.
    pub fn has_asked_for_export(&self) -> bool {
        matches!(self.state, State::Going | State::ExportName | State::Done)
    }

    /// TLS has started: asks for the export. What `out` holds and what is handled from now on is what TLS carries.
    ///
    /// # Panics
    /// Unless [`Self::is_tls_acknowledged`]: the caller is wrong.
    pub fn tls_started(&mut self, out: &mut Vec<u8>) {
        assert_eq!(self.state, State::TlsAcknowledged, "tls_started: TLS was not acknowledged");
        self.ask(out);
    }

    /// Takes bytes that arrived and appends what has to be sent to `out`; gives the export once it is open.
    ///
    /// # Errors
    /// [`ClientHandshakeError`], by cause. What is in `out` then (ABORT, where the server refused) is still to be sent.
    pub fn handle_bytes(
        &mut self,
        arrived: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<ExportInfo>, ClientHandshakeError> {
        self.input.extend_from_slice(arrived);
        loop {
            let progressed = match self.state {
                State::Greeting => self.take_greeting(out)?,
                State::StartingTls => self.take_tls_reply(out)?,
                // Whoever is between us and the server could have put it there.
                State::TlsAcknowledged if !self.input.is_empty() => {
                    return Err(ClientHandshakeError::Protocol("bytes came behind the answer to STARTTLS"));
                }
                State::TlsAcknowledged => return Ok(None),
                State::Structuring => self.take_structured_reply(out)?,
                State::SelectingContext => self.take_context_reply(out)?,
                State::Going => self.take_reply(out)?,
                State::ExportName => self.take_export_name_answer(),
                State::Done => return self.finish().map(Some),
            };
            if !progressed {
                return Ok(None);
            }
        }
    }

    /// Bytes that arrived after the handshake's end. An honest server sends none: nothing was asked of it yet.
    pub fn leftover(&self) -> &[u8] {
        &self.input
    }

    fn take_greeting(&mut self, out: &mut Vec<u8>) -> Result<bool, ClientHandshakeError> {
        if let Some(magic) = take::<8>(&self.input).map(u64::from_be_bytes)
            && magic != INIT_MAGIC
        {
            return Err(ClientHandshakeError::NotNbd(magic));
        }
        let Some(greeting) = take::<18>(&self.input) else { return Ok(false) };
        let flags = be_u16(&greeting, 16);
        if be_u64(&greeting, 8) != OPTION_MAGIC || flags & handshake_flags::FIXED_NEWSTYLE == 0 {
            return Err(ClientHandshakeError::NotFixedNewstyle);
        }
        self.input.drain(..greeting.len());
        self.no_zeroes = flags & handshake_flags::NO_ZEROES != 0;
        let zeroes_flag = if self.no_zeroes { handshake_flags::NO_ZEROES } else { 0 };
        out.extend_from_slice(&u32::from(handshake_flags::FIXED_NEWSTYLE | zeroes_flag).to_be_bytes());
        if self.wants_tls {
            put_option(out, option::STARTTLS, &[]);
            self.state = State::StartingTls;
        } else {
            self.ask(out);
        }
        Ok(true)
    }

    /// For what the replies are to be, if for anything; else for the export.
    fn ask(&mut self, out: &mut Vec<u8>) {
        if self.context.is_some() {
            put_option(out, option::STRUCTURED_REPLY, &[]);
            self.state = State::Structuring;
        } else {
            self.go(out);
        }
    }

    fn take_structured_reply(&mut self, out: &mut Vec<u8>) -> Result<bool, ClientHandshakeError> {
        let Some((kind, _)) = self.take_option_reply(option::STRUCTURED_REPLY)? else { return Ok(false) };
        match (kind, self.context.as_deref()) {
            (reply::ACK, Some(context)) => {
                self.negotiated.structured_replies = true;
                let mut data = Vec::new();
                put_string(&mut data, &self.name);
                data.extend_from_slice(&1u32.to_be_bytes());
                put_string(&mut data, context);
                put_option(out, option::SET_META_CONTEXT, &data);
                self.state = State::SelectingContext;
            }
            (error, _) if error & reply::ERROR_BIT != 0 => self.go(out),
            _ => return Err(ClientHandshakeError::Protocol("an option reply of an unknown kind")),
        }
        Ok(true)
    }

    fn take_context_reply(&mut self, out: &mut Vec<u8>) -> Result<bool, ClientHandshakeError> {
        let Some((kind, data)) = self.take_option_reply(option::SET_META_CONTEXT)? else { return Ok(false) };
        match kind {
            reply::META_CONTEXT if data.len() < 4 => {
                return Err(ClientHandshakeError::Protocol("a metadata context has no number"));
            }
            reply::META_CONTEXT if Some(&data[4..]) == self.context.as_deref().map(str::as_bytes) => {
                self.negotiated.context_id = Some(be_u32(&data, 0));
            }
            // Nobody asked for it.
            reply::META_CONTEXT => {}
            reply::ACK => self.go(out),
            error if error & reply::ERROR_BIT != 0 => {
                self.negotiated.context_id = None;
                self.go(out);
            }
            _ => return Err(ClientHandshakeError::Protocol("an option reply of an unknown kind")),
        }
        Ok(true)
    }

    fn go(&mut self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        put_string(&mut data, &self.name);
        data.extend_from_slice(&2u16.to_be_bytes());
        data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        data.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
        put_option(out, option::GO, &data);
        self.state = State::Going;
    }

    fn take_tls_reply(&mut self, out: &mut Vec<u8>) -> Result<bool, ClientHandshakeError> {
        let Some((kind, data)) = self.take_option_reply(option::STARTTLS)? else { return Ok(false) };
        match kind {
            reply::ACK => self.state = State::TlsAcknowledged,
            error if error & reply::ERROR_BIT != 0 => {
                let text = words_of(&data);
                put_option(out, option::ABORT, &[]);
                return Err(ClientHandshakeError::TlsRefused { reply: error, text });
            }
            _ => return Err(ClientHandshakeError::Protocol("an option reply of an unknown kind")),
        }
        Ok(true)
    }

    /// Takes the next reply to this option, once all of it is there: its kind and its data.
    fn take_option_reply(&mut self, option: u32) -> Result<Option<(u32, Vec<u8>)>, ClientHandshakeError> {
        let Some(header) = take::<20>(&self.input) else { return Ok(None) };
        if be_u64(&header, 0) != OPTION_REPLY_MAGIC || be_u32(&header, 8) != option {
            return Err(ClientHandshakeError::Protocol("an option reply has a wrong magic or option"));
        }
        let (kind, length_bytes) = (be_u32(&header, 12), be_u32(&header, 16) as usize);
        if length_bytes > OPTION_BYTES_MAX {
            return Err(ClientHandshakeError::Protocol("an option reply is too long"));
        }
        let end = header.len() + length_bytes;
        if self.input.len() < end {
            return Ok(None);
        }
        self.replies_seen += 1;
        if self.replies_seen > REPLIES_MAX {
            return Err(ClientHandshakeError::Protocol("too many replies to one option"));
        }
        Ok(Some((kind, self.input.drain(..end).skip(header.len()).collect())))
    }

    fn take_reply(&mut self, out: &mut Vec<u8>) -> Result<bool, ClientHandshakeError> {
        let Some((kind, data)) = self.take_option_reply(option::GO)? else { return Ok(false) };
        match kind {
            reply::INFO => self.take_info(&data)?,
            reply::ACK => self.state = State::Done,
            reply::ERR_UNSUP => {
                put_option(out, option::EXPORT_NAME, self.name.as_bytes());
                self.state = State::ExportName;
            }
            error if error & reply::ERROR_BIT != 0 => {
                // Whoever does not want to go on says so before it closes.
                put_option(out, option::ABORT, &[]);
                return Err(refused(error, &data));
            }
            _ => return Err(ClientHandshakeError::Protocol("an option reply of an unknown kind")),
        }
        Ok(true)
    }

    fn take_info(&mut self, data: &[u8]) -> Result<(), ClientHandshakeError> {
        let kind = take::<2>(data).map(u16::from_be_bytes);
        match (kind, data.len()) {
            (Some(info::EXPORT), 12) => {
                self.size_and_flags = Some((be_u64(data, 2), TransmissionFlags(be_u16(data, 10))));
            }
            (Some(info::BLOCK_SIZE), 14) => {
                let sizes = BlockSizes {
                    minimum_bytes: be_u32(data, 2),
                    preferred_bytes: be_u32(data, 6),
                    maximum_bytes: be_u32(data, 10),
                };
                let valid = sizes.minimum_bytes.is_power_of_two()
                    && sizes.minimum_bytes <= 64 << 10
                    && sizes.maximum_bytes >= sizes.minimum_bytes;
                if !valid {
                    return Err(ClientHandshakeError::Protocol("the block sizes make no sense"));
                }
                self.block_sizes = Some(sizes);
            }
            (Some(info::EXPORT | info::BLOCK_SIZE) | None, _) => {
                return Err(ClientHandshakeError::Protocol("an information item has a wrong length"));
            }
            (Some(info::DESCRIPTION), _) => self.description = String::from_utf8(data[2..].to_vec()).ok(),
            (Some(_), _) => {}
        }
        Ok(())
    }

    fn take_export_name_answer(&mut self) -> bool {
        let answer_bytes = if self.no_zeroes { 10 } else { 134 };
        if self.input.len() < answer_bytes {
            return false;
        }
        let flags = TransmissionFlags(be_u16(&self.input, 8));
        self.size_and_flags = Some((be_u64(&self.input, 0), flags));
        self.input.drain(..answer_bytes);
        self.state = State::Done;
        true
    }

    fn finish(&self) -> Result<ExportInfo, ClientHandshakeError> {
        let (size_bytes, flags) = self
            .size_and_flags
            .ok_or(ClientHandshakeError::Protocol("the export was opened without telling its size"))?;
        let description = self.description.clone();
        Ok(ExportInfo { size_bytes, flags, block_sizes: self.block_sizes, description })
    }
}

fn refused(reply: u32, data: &[u8]) -> ClientHandshakeError {
    ClientHandshakeError::Refused { reply, text: words_of(data) }
}

fn words_of(data: &[u8]) -> String {
    let words = String::from_utf8_lossy(data);
    if words.is_empty() { "no reason given".into() } else { words.into_owned() }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting(flags: u16) -> Vec<u8> {
        [&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    fn reply_bytes(kind: u32, data: &[u8]) -> Vec<u8> {
        let length = (data.len() as u32).to_be_bytes();
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &option::GO.to_be_bytes(), &kind.to_be_bytes(), &length, data]
            .concat()
    }

    #[test]
    fn servers_from_before_go_are_asked_by_export_name() {
        for (server_flags, answer_bytes) in [(3u16, 10usize), (1, 134)] {
            let mut client = ClientHandshake::new("x").unwrap();
            let mut out = Vec::new();
            assert_eq!(client.handle_bytes(&greeting(server_flags), &mut out), Ok(None));
            out.clear();
            assert_eq!(client.handle_bytes(&reply_bytes(reply::ERR_UNSUP, b""), &mut out), Ok(None));
            assert_eq!(be_u32(&out, 8), option::EXPORT_NAME);
            let mut answer = vec![0u8; answer_bytes];
            answer[7] = 9;
            answer[9] = 1;
            let info = client.handle_bytes(&answer, &mut out).unwrap().unwrap();
            assert_eq!(info.size_bytes, 9);
        }
    }

    #[test]
    fn what_is_not_a_server_of_ours_is_named() {
        let mut out = Vec::new();
        let http = ClientHandshake::new("x").unwrap().handle_bytes(b"HTTP/1.1 400 Bad", &mut out);
        assert!(matches!(http, Err(ClientHandshakeError::NotNbd(_))));
        let old = ClientHandshake::new("x").unwrap().handle_bytes(&greeting(0), &mut out);
        assert_eq!(old, Err(ClientHandshakeError::NotFixedNewstyle));
    }

    #[test]
    fn a_context_is_had_where_the_server_has_it_and_the_export_is_opened_all_the_same() {
        let answer = |option: u32, kind: u32, data: &[u8]| {
            let mut bytes = reply_bytes(kind, data);
            bytes[8..12].copy_from_slice(&option.to_be_bytes());
            bytes
        };
        let begun = || {
            let mut client = ClientHandshake::new("x").unwrap().with_context("base:allocation");
            let mut out = Vec::new();
            client.handle_bytes(&greeting(3), &mut out).unwrap();
            assert_eq!(be_u32(&out, 12), option::STRUCTURED_REPLY);
            client
        };
        let opened = |mut client: ClientHandshake| {
            let mut export = vec![0u8; 12];
            export[9] = 7;
            let mut out = Vec::new();
            assert_eq!(client.handle_bytes(&reply_bytes(reply::INFO, &export), &mut out), Ok(None));
            assert!(client.handle_bytes(&reply_bytes(reply::ACK, b""), &mut out).unwrap().is_some());
            client.negotiated()
        };
        let (mut client, mut out) = (begun(), Vec::new());
        client.handle_bytes(&answer(option::STRUCTURED_REPLY, reply::ACK, b""), &mut out).unwrap();
        assert_eq!(be_u32(&out, 8), option::SET_META_CONTEXT);
        let other = [&[0, 0, 0, 8][..], b"qemu:allocation-depth"].concat();
        let wanted = [&[0, 0, 0, 9][..], b"base:allocation"].concat();
        for context in [other, wanted] {
            let context = answer(option::SET_META_CONTEXT, reply::META_CONTEXT, &context);
            assert_eq!(client.handle_bytes(&context, &mut out), Ok(None));
        }
        client.handle_bytes(&answer(option::SET_META_CONTEXT, reply::ACK, b""), &mut out).unwrap();
        assert_eq!(opened(client), ClientNegotiated { structured_replies: true, context_id: Some(9) });
        // A server from before structured replies.
        let mut client = begun();
        let unknown = answer(option::STRUCTURED_REPLY, reply::ERR_UNSUP, b"");
        client.handle_bytes(&unknown, &mut out).unwrap();
        assert_eq!(opened(client), ClientNegotiated::default());
        // And one without the context.
        let mut client = begun();
        client.handle_bytes(&answer(option::STRUCTURED_REPLY, reply::ACK, b""), &mut out).unwrap();
        client.handle_bytes(&answer(option::SET_META_CONTEXT, reply::ACK, b""), &mut out).unwrap();
        assert_eq!(opened(client), ClientNegotiated { structured_replies: true, context_id: None });
        let mut client = begun();
        client.handle_bytes(&answer(option::STRUCTURED_REPLY, reply::ACK, b""), &mut out).unwrap();
        let short = answer(option::SET_META_CONTEXT, reply::META_CONTEXT, b"abc");
        assert!(matches!(client.handle_bytes(&short, &mut out), Err(ClientHandshakeError::Protocol(_))));
    }

    #[test]
    fn tls_comes_first_or_nothing_does() {
        let begun = || {
            let mut client = ClientHandshake::new("secret").unwrap().with_tls();
            let mut out = Vec::new();
            client.handle_bytes(&greeting(3), &mut out).unwrap();
            assert_eq!((out.len(), be_u32(&out, 12)), (4 + 16, option::STARTTLS));
            client
        };
        let answer = |kind: u32, behind: &[u8]| {
            let mut bytes = reply_bytes(kind, b"");
            bytes[8..12].copy_from_slice(&option::STARTTLS.to_be_bytes());
            [&bytes[..], behind].concat()
        };
        let (mut client, mut out) = (begun(), Vec::new());
        assert_eq!(client.handle_bytes(&answer(reply::ACK, b""), &mut out), Ok(None));
        assert!(client.is_tls_acknowledged() && out.is_empty());
        client.tls_started(&mut out);
        assert_eq!(be_u32(&out, 8), option::GO);
        // A server without TLS, or somebody in between who says so, does not get to hear the name.
        for refusal in [reply::ERR_UNSUP, reply::ERR_POLICY] {
            let (mut client, mut out) = (begun(), Vec::new());
            let refused = client.handle_bytes(&answer(refusal, b""), &mut out);
            assert!(matches!(refused, Err(ClientHandshakeError::TlsRefused { .. })), "{refused:?}");
            assert_eq!(out, b"IHAVEOPT\0\0\0\x02\0\0\0\0", "nothing but ABORT");
        }
        let (mut client, mut out) = (begun(), Vec::new());
        let injected = client.handle_bytes(&answer(reply::ACK, b"x"), &mut out);
        assert!(matches!(injected, Err(ClientHandshakeError::Protocol(_))), "{injected:?}");
    }

    #[test]
    fn lying_servers_are_refused() {
        let lies: [(u32, &[u8]); 5] = [
            (reply::ACK, b""),
            (reply::INFO, b""),
            (reply::INFO, b"\0\0short"),
            (reply::INFO, b"\0\x03\0\0\0\x03\0\0\0\x03\0\0\0\x03"),
            (12345, b""),
        ];
        for (kind, data) in lies {
            let mut client = ClientHandshake::new("x").unwrap();
            let mut out = Vec::new();
            client.handle_bytes(&greeting(3), &mut out).unwrap();
            let result = client.handle_bytes(&reply_bytes(kind, data), &mut out);
            assert!(matches!(result, Err(ClientHandshakeError::Protocol(_))), "{kind} {data:?}: {result:?}");
        }
    }

    #[test]
    fn a_refusal_is_answered_with_abort() {
        let mut client = ClientHandshake::new("x").unwrap();
        let mut out = Vec::new();
        client.handle_bytes(&greeting(3), &mut out).unwrap();
        out.clear();
        let refused = client.handle_bytes(&reply_bytes(reply::ERR_UNKNOWN, b"no"), &mut out);
        assert!(matches!(refused, Err(ClientHandshakeError::Refused { .. })), "{refused:?}");
        assert_eq!(out, b"IHAVEOPT\0\0\0\x02\0\0\0\0");
    }
}
