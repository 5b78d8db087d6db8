//! The server's side of the handshake.
//!
//! ```text
//!   ClientFlags ──► Options ──Open──► Opening ──ok──► Transmission
//!        │          │ ▲ │ ▲               │
//!        │          │ │ │ └──refused/INFO─┘
//!        │          │ │ └──ABORT──► Closed
//!        │          │ └─tls_started── StartingTls
//!        └──► error └──STARTTLS──────────▲
//! ```
//!
//! Owned by `server/src/session.rs`. The machine asks its owner to open an export ([`Event::Open`]) and takes no further
//! bytes until it is answered, because opening may wait (for the I/O of a fenced connection to finish). Bytes that arrive
//! meanwhile are kept; those after the end of the handshake are the transmission phase's ([`ServerHandshake::leftover`]).
//! What is kept is bounded by [`OPTION_BYTES_MAX`] and what its owner feeds at a time.

use super::super::wire::{be_u16, be_u32, be_u64};
use super::super::{
    ExportInfo, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_BYTES_MAX, handshake_flags, info,
    option, reply,
};
use super::{OPTION_BYTES_MAX, take};

/// Most options in one handshake; a client that wants more is not negotiating.
pub const OPTIONS_MAX: u32 = 64;

/// The client broke the protocol: close the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServerHandshakeError {
    /// Client flags that this server did not offer.
    #[error("the client sent unknown handshake flags {0:#x}")]
    ClientFlags(u32),
    /// An option does not begin with the option magic.
    #[error("an option begins with {0:#018x}, not with the option magic")]
    OptionMagic(u64),
    /// An option's data is longer than [`OPTION_BYTES_MAX`].
    #[error("an option carries {0} bytes; at most {OPTION_BYTES_MAX} are taken")]
    OptionTooLong(u32),
    /// More than [`OPTIONS_MAX`] options.
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// EXPORT_NAME asked for what cannot be opened; the protocol has no other answer than to close.
    #[error("EXPORT_NAME was refused: {0}")]
    ExportNameRefused(String),
    /// Bytes came behind STARTTLS without waiting for its answer. Whoever sent them, they would be taken for the client's
    /// own once the connection is trusted.
    #[error("{0} bytes came behind STARTTLS, before it was answered")]
    BytesBehindStartTls(usize),
}

/// Whether the connection can, must, or does use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsState {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// The client may choose.
    Allowed,
    /// Nothing but STARTTLS and ABORT is answered before.
    Required,
    /// TLS has started.
    Active,
}

/// How an export was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenKind {
    /// INFO: tell about it; nothing is opened.
    Info,
    /// GO: open it.
    Go,
    /// EXPORT_NAME: open it, the old way.
    ExportName,
}

/// An export to tell about or to open.
#[derive(Clone, PartialEq, Eq)]
pub struct Open {
    /// What for.
    pub kind: OpenKind,
    /// Which; may carry a secret, so it is not in `Debug`.
    pub name: String,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// What the owner has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Look the export up and call [`ServerHandshake::answer_open`].
    Open(Open),
    /// Call [`ServerHandshake::answer_list`] with the names to show.
    List,
    /// Send what was put out, then close: the client is done.
    Abort,
    /// Send what was put out, then start TLS and call [`ServerHandshake::tls_started`].
    StartTls,
}

/// Why an export is not opened; goes to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    reply: u32,
    text: String,
}

impl Refusal {
    /// No such export, or not for this client.
    pub fn unknown(text: impl Into<String>) -> Self {
        Self { reply: reply::ERR_UNKNOWN, text: text.into() }
    }

    /// It is there, but policy forbids it.
    pub fn policy(text: impl Into<String>) -> Self {
        Self { reply: reply::ERR_POLICY, text: text.into() }
    }

    /// The server is going down, or cannot serve it now.
    pub fn shutdown(text: impl Into<String>) -> Self {
        Self { reply: reply::ERR_SHUTDOWN, text: text.into() }
    }

    /// The words that the client is told.
    pub fn text(&self) -> &str {
        &self.text
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    ClientFlags,
    Options,
    Opening { kind: OpenKind, wants_description: bool },
    Listing,
    StartingTls,
    Transmission,
    Closed,
}

/// The server's side of one connection's handshake.
#[derive(Debug)]
pub struct ServerHandshake {
    state: State,
    no_zeroes: bool,
    options_seen: u32,
    tls: TlsState,
    input: Vec<u8>,
}

impl ServerHandshake {
    /// Begins: the greeting is appended to `out`.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        let flags = handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES;
        out.extend_from_slice(&flags.to_be_bytes());
        let (state, tls, input) = (State::ClientFlags, TlsState::Off, Vec::new());
        Self { state, no_zeroes: false, options_seen: 0, tls, input }
    }

    /// The same, for a server that allows or requires TLS.
    #[must_use]
    pub fn with_tls(self, tls: TlsState) -> Self {
        Self { tls, ..self }
    }

    /// TLS has started: what comes from now on is the same client, and nothing that was negotiated before counts.
    ///
    /// # Panics
    /// When no [`Event::StartTls`] is waiting for it: the caller is wrong.
    pub fn tls_started(&mut self) {
        assert_eq!(self.state, State::StartingTls, "tls_started: nobody asked for TLS");
        let (no_zeroes, options_seen) = (self.no_zeroes, self.options_seen);
        // All but the client's flags, which it does not repeat, and what bounds it.
        *self = Self { no_zeroes, options_seen, ..Self::new(&mut Vec::new()) };
        self.state = State::Options;
        self.tls = TlsState::Active;
    }

    /// Takes bytes that arrived, appends what has to be sent to `out`, and tells what the owner has to do, if anything.
    /// After an event was answered, call again with no bytes: more options may be waiting.
    ///
    /// # Errors
    /// [`ServerHandshakeError`]: send what is in `out`, if anything, and close.
    pub fn handle_bytes(
        &mut self,
        arrived: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event>, ServerHandshakeError> {
        self.input.extend_from_slice(arrived);
        loop {
            match self.state {
                State::ClientFlags => {
                    let Some(flags) = take::<4>(&self.input).map(u32::from_be_bytes) else { return Ok(None) };
                    self.input.drain(..4);
                    self.take_client_flags(flags)?;
                }
                State::Options => match self.take_option(out)? {
                    Progress::NeedsBytes => return Ok(None),
                    Progress::Done => {}
                    Progress::Event(event) => return Ok(Some(event)),
                },
                State::Opening { .. }
                | State::Listing
                | State::StartingTls
                | State::Transmission
                | State::Closed => {
                    return Ok(None);
                }
            }
        }
    }

    /// Answers [`Event::Open`]. True: the handshake is over and transmission begins.
    ///
    /// # Errors
    /// [`ServerHandshakeError::ExportNameRefused`]: EXPORT_NAME cannot be refused but by closing.
    ///
    /// # Panics
    /// When no `Open` is waiting for its answer: the caller is wrong.
    pub fn answer_open(
        &mut self,
        answer: Result<&ExportInfo, Refusal>,
        out: &mut Vec<u8>,
    ) -> Result<bool, ServerHandshakeError> {
        let State::Opening { kind, wants_description } = self.state else {
            panic!("answer_open: no export is being opened");
        };
        self.state = State::Options;
        let option = if kind == OpenKind::Info { option::INFO } else { option::GO };
        match (kind, answer) {
            (OpenKind::ExportName, Err(refusal)) => {
                self.state = State::Closed;
                return Err(ServerHandshakeError::ExportNameRefused(refusal.text));
            }
            (OpenKind::ExportName, Ok(export)) => {
                out.extend_from_slice(&export.size_bytes.to_be_bytes());
                out.extend_from_slice(&export.flags.0.to_be_bytes());
                if !self.no_zeroes {
                    out.resize(out.len() + 124, 0);
                }
                self.state = State::Transmission;
            }
            (_, Err(refusal)) => put_reply(out, option, refusal.reply, refusal.text.as_bytes()),
            (kind, Ok(export)) => {
                put_export_info(out, option, export, wants_description);
                put_reply(out, option, reply::ACK, &[]);
                if kind == OpenKind::Go {
                    self.state = State::Transmission;
                }
            }
        }
        Ok(self.state == State::Transmission)
    }

    /// Answers [`Event::List`] with the names of the exports that everybody may see.
    ///
    /// # Panics
    /// When no `List` is waiting for its answer: the caller is wrong.
    pub fn answer_list(&mut self, names: &[String], out: &mut Vec<u8>) {
        assert_eq!(self.state, State::Listing, "answer_list: nobody asked for the list");
        self.state = State::Options;
        for name in names {
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend_from_slice(name.as_bytes());
            put_reply(out, option::LIST, reply::SERVER, &data);
        }
        put_reply(out, option::LIST, reply::ACK, &[]);
    }

    /// Whether the transmission phase has begun.
    pub fn is_done(&self) -> bool {
        self.state == State::Transmission
    }

    /// Bytes that arrived after the handshake's end; they are handed over once.
    pub fn leftover(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.input)
    }

    fn take_client_flags(&mut self, flags: u32) -> Result<(), ServerHandshakeError> {
        let known = u32::from(handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES);
        // Without FIXED_NEWSTYLE a client may still send EXPORT_NAME, and nothing else would be understood by it.
        if flags & !known != 0 {
            return Err(ServerHandshakeError::ClientFlags(flags));
        }
        self.no_zeroes = flags & u32::from(handshake_flags::NO_ZEROES) != 0;
        self.state = State::Options;
        Ok(())
    }

    fn take_option(&mut self, out: &mut Vec<u8>) -> Result<Progress, ServerHandshakeError> {
        let Some(header) = take::<16>(&self.input) else { return Ok(Progress::NeedsBytes) };
        let (magic, number, length_bytes) = (be_u64(&header, 0), be_u32(&header, 8), be_u32(&header, 12));
        if magic != OPTION_MAGIC {
            return Err(ServerHandshakeError::OptionMagic(magic));
        }
        if length_bytes as usize > OPTION_BYTES_MAX {
            return Err(ServerHandshakeError::OptionTooLong(length_bytes));
        }
        let end = header.len() + length_bytes as usize;
        if self.input.len() < end {
            return Ok(Progress::NeedsBytes);
        }
        self.options_seen += 1;
        if self.options_seen > OPTIONS_MAX {
            return Err(ServerHandshakeError::TooManyOptions);
        }
        let data: Vec<u8> = self.input.drain(..end).skip(header.len()).collect();
        self.handle_option(number, &data, out)
    }

    fn handle_option(
        &mut self,
        number: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Progress, ServerHandshakeError> {
        if self.tls == TlsState::Required && !matches!(number, option::STARTTLS | option::ABORT) {
            return refuse_without_tls(number, out);
        }
        match number {
            option::STARTTLS => self.start_tls(data, out),
            option::EXPORT_NAME => match export_name(data) {
                Some(name) => Ok(self.open(OpenKind::ExportName, name, false)),
                None => Err(ServerHandshakeError::ExportNameRefused("the name is not valid".into())),
            },
            option::GO | option::INFO => {
                let kind = if number == option::GO { OpenKind::Go } else { OpenKind::Info };
                match parse_info_request(data) {
                    Ok((name, wants_description)) => Ok(self.open(kind, name, wants_description)),
                    Err((error, text)) => {
                        put_reply(out, number, error, text.as_bytes());
                        Ok(Progress::Done)
                    }
                }
            }
            option::LIST if data.is_empty() => {
                self.state = State::Listing;
                Ok(Progress::Event(Event::List))
            }
            option::LIST => {
                put_reply(out, number, reply::ERR_INVALID, b"LIST takes no data");
                Ok(Progress::Done)
            }
            option::ABORT => {
                put_reply(out, number, reply::ACK, &[]);
                self.state = State::Closed;
                Ok(Progress::Event(Event::Abort))
            }
            _ => {
                put_reply(out, number, reply::ERR_UNSUP, b"this option is not supported");
                Ok(Progress::Done)
            }
        }
    }

    fn start_tls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<Progress, ServerHandshakeError> {
        let refusal: Option<(u32, &[u8])> = match self.tls {
            TlsState::Off => Some((reply::ERR_POLICY, b"this server does not use TLS")),
            TlsState::Active => Some((reply::ERR_INVALID, b"TLS has started already")),
            _ if !data.is_empty() => Some((reply::ERR_INVALID, b"STARTTLS takes no data")),
            TlsState::Allowed | TlsState::Required => None,
        };
        if let Some((error, text)) = refusal {
            put_reply(out, option::STARTTLS, error, text);
            return Ok(Progress::Done);
        }
        if !self.input.is_empty() {
            return Err(ServerHandshakeError::BytesBehindStartTls(self.input.len()));
        }
        put_reply(out, option::STARTTLS, reply::ACK, &[]);
        self.state = State::StartingTls;
        Ok(Progress::Event(Event::StartTls))
    }

    fn open(&mut self, kind: OpenKind, name: String, wants_description: bool) -> Progress {
        self.state = State::Opening { kind, wants_description };
        Progress::Event(Event::Open(Open { kind, name }))
    }
}

/// An option that needs TLS, which has not started.
fn refuse_without_tls(number: u32, out: &mut Vec<u8>) -> Result<Progress, ServerHandshakeError> {
    const REASON: &str = "this server requires TLS: send STARTTLS first";
    if number == option::EXPORT_NAME {
        return Err(ServerHandshakeError::ExportNameRefused(REASON.into()));
    }
    put_reply(out, number, reply::ERR_TLS_REQD, REASON.as_bytes());
    Ok(Progress::Done)
}

enum Progress {
    NeedsBytes,
    Done,
    Event(Event),
}

fn export_name(data: &[u8]) -> Option<String> {
    if data.len() > STRING_BYTES_MAX {
        return None;
    }
    String::from_utf8(data.to_vec()).ok()
}

/// Reads INFO's and GO's data: the name, and whether the description was asked for.
fn parse_info_request(data: &[u8]) -> Result<(String, bool), (u32, &'static str)> {
    const SHORT: (u32, &str) = (reply::ERR_INVALID, "the option's data is too short");
    let name_bytes = take::<4>(data).map(u32::from_be_bytes).ok_or(SHORT)? as usize;
    if name_bytes > STRING_BYTES_MAX {
        return Err((reply::ERR_TOO_BIG, "an export name has at most 4096 bytes"));
    }
    let name = data.get(4..4 + name_bytes).ok_or(SHORT)?;
    let name = export_name(name).ok_or((reply::ERR_INVALID, "the export name is not UTF-8"))?;
    let rest = &data[4 + name_bytes..];
    let count = take::<2>(rest).map(u16::from_be_bytes).ok_or(SHORT)? as usize;
    let requests = &rest[2..];
    if requests.len() != count * 2 {
        return Err((reply::ERR_INVALID, "the number of information requests is off"));
    }
    let wants_description = requests.chunks_exact(2).any(|item| be_u16(item, 0) == info::DESCRIPTION);
    Ok((name, wants_description))
}

fn put_export_info(out: &mut Vec<u8>, option: u32, export: &ExportInfo, wants_description: bool) {
    let mut data = info::EXPORT.to_be_bytes().to_vec();
    data.extend_from_slice(&export.size_bytes.to_be_bytes());
    data.extend_from_slice(&export.flags.0.to_be_bytes());
    put_reply(out, option, reply::INFO, &data);
    if let Some(sizes) = &export.block_sizes {
        // Sent whether asked for or not, as the specification allows: a client that reads it will keep to it.
        let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for bytes in [sizes.minimum_bytes, sizes.preferred_bytes, sizes.maximum_bytes] {
            data.extend_from_slice(&bytes.to_be_bytes());
        }
        put_reply(out, option, reply::INFO, &data);
    }
    if let Some(description) = export.description.as_ref().filter(|_| wants_description) {
        let mut data = info::DESCRIPTION.to_be_bytes().to_vec();
        data.extend_from_slice(description.as_bytes());
        put_reply(out, option, reply::INFO, &data);
    }
}

fn put_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun() -> ServerHandshake {
        let mut out = Vec::new();
        let mut server = ServerHandshake::new(&mut out);
        assert_eq!(out.len(), 18);
        assert_eq!(server.handle_bytes(&[0, 0, 0, 3], &mut out), Ok(None));
        server
    }

    fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn only_reply(out: &[u8]) -> u32 {
        assert_eq!(be_u64(out, 0), OPTION_REPLY_MAGIC);
        assert_eq!(out.len(), 20 + be_u32(out, 16) as usize, "one reply");
        be_u32(out, 12)
    }

    #[test]
    fn unknown_options_are_refused_and_the_session_goes_on() {
        for number in [0, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS, 77, u32::MAX] {
            let (mut server, mut out) = (begun(), Vec::new());
            assert_eq!(server.handle_bytes(&option_bytes(number, b"data"), &mut out), Ok(None));
            assert_eq!(only_reply(&out), reply::ERR_UNSUP);
            out.clear();
            let event = server.handle_bytes(&option_bytes(option::ABORT, &[]), &mut out);
            assert_eq!(event, Ok(Some(Event::Abort)));
            assert_eq!(only_reply(&out), reply::ACK);
        }
    }

    #[test]
    fn malformed_go_is_refused_and_the_session_goes_on() {
        let cases: [&[u8]; 5] =
            [b"", b"\0\0\0\x05ab", b"\0\0\0\x01a", b"\0\0\0\x01a\0\x02\0\x03", b"\0\0\0\x01\xff\0\0"];
        for data in cases {
            let (mut server, mut out) = (begun(), Vec::new());
            assert_eq!(server.handle_bytes(&option_bytes(option::GO, data), &mut out), Ok(None), "{data:?}");
            assert_eq!(only_reply(&out), reply::ERR_INVALID, "{data:?}");
        }
    }

    #[test]
    fn hostile_bytes_end_the_session() {
        let mut out = Vec::new();
        assert!(matches!(
            ServerHandshake::new(&mut out).handle_bytes(&[0xff; 4], &mut out),
            Err(ServerHandshakeError::ClientFlags(_))
        ));
        assert!(matches!(
            begun().handle_bytes(&[7; 16], &mut out),
            Err(ServerHandshakeError::OptionMagic(_))
        ));
        let mut long = option_bytes(option::GO, &[]);
        long[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(begun().handle_bytes(&long, &mut out), Err(ServerHandshakeError::OptionTooLong(_))));
        let many: Vec<u8> = (0..=OPTIONS_MAX).flat_map(|_| option_bytes(77, &[])).collect();
        assert_eq!(begun().handle_bytes(&many, &mut out), Err(ServerHandshakeError::TooManyOptions));
    }

    #[test]
    fn export_name_answers_with_zeroes_unless_told_not_to() {
        let export =
            ExportInfo { size_bytes: 5, flags: Default::default(), block_sizes: None, description: None };
        for (client_flags, answer_bytes) in [(3u8, 10), (1, 134), (0, 134)] {
            let mut out = Vec::new();
            let mut server = ServerHandshake::new(&mut out);
            out.clear();
            let mut input = vec![0, 0, 0, client_flags];
            input.extend(option_bytes(option::EXPORT_NAME, b"a"));
            input.extend(b"first request");
            let event = server.handle_bytes(&input, &mut out).unwrap();
            assert_eq!(event, Some(Event::Open(Open { kind: OpenKind::ExportName, name: "a".into() })));
            assert_eq!(server.answer_open(Ok(&export), &mut out), Ok(true));
            assert_eq!(out.len(), answer_bytes);
            assert_eq!(server.leftover(), b"first request");
        }
    }

    #[test]
    fn info_tells_and_does_not_open() {
        let export =
            ExportInfo { size_bytes: 5, flags: Default::default(), block_sizes: None, description: None };
        let (mut server, mut out) = (begun(), Vec::new());
        let event = server.handle_bytes(&option_bytes(option::INFO, b"\0\0\0\x01a\0\0"), &mut out).unwrap();
        assert_eq!(event, Some(Event::Open(Open { kind: OpenKind::Info, name: "a".into() })));
        assert_eq!(server.answer_open(Ok(&export), &mut out), Ok(false));
        assert!(!server.is_done());
    }

    #[test]
    fn list_shows_what_the_owner_gives() {
        let (mut server, mut out) = (begun(), Vec::new());
        let event = server.handle_bytes(&option_bytes(option::LIST, &[]), &mut out).unwrap();
        assert_eq!(event, Some(Event::List));
        server.answer_list(&["a".into()], &mut out);
        assert_eq!(be_u32(&out, 12), reply::SERVER);
        assert_eq!(out.len(), 20 + 5 + 20);
    }

    fn with_tls(tls: TlsState) -> ServerHandshake {
        begun().with_tls(tls)
    }

    const EVERY_OTHER_OPTION: [u32; 8] = [
        option::LIST,
        option::INFO,
        option::GO,
        option::STRUCTURED_REPLY,
        option::LIST_META_CONTEXT,
        option::SET_META_CONTEXT,
        option::EXTENDED_HEADERS,
        u32::MAX,
    ];

    #[test]
    fn starttls_is_refused_where_there_is_no_tls() {
        let (mut server, mut out) = (with_tls(TlsState::Off), Vec::new());
        assert_eq!(server.handle_bytes(&option_bytes(option::STARTTLS, &[]), &mut out), Ok(None));
        assert_eq!(only_reply(&out), reply::ERR_POLICY);
    }

    #[test]
    fn starttls_is_acknowledged_and_nothing_from_before_counts() {
        for tls in [TlsState::Allowed, TlsState::Required] {
            let (mut server, mut out) = (with_tls(tls), Vec::new());
            let event = server.handle_bytes(&option_bytes(option::STARTTLS, &[]), &mut out);
            assert_eq!(event, Ok(Some(Event::StartTls)));
            assert_eq!(only_reply(&out), reply::ACK);
            server.tls_started();
            assert!(server.leftover().is_empty());
            // The client's flags are not repeated; options go on, among them no second STARTTLS.
            out.clear();
            assert_eq!(server.handle_bytes(&option_bytes(option::STARTTLS, &[]), &mut out), Ok(None));
            assert_eq!(only_reply(&out), reply::ERR_INVALID);
            let event = server.handle_bytes(&option_bytes(option::LIST, &[]), &mut out);
            assert_eq!(event, Ok(Some(Event::List)));
        }
    }

    #[test]
    fn starttls_with_data_is_invalid() {
        let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
        assert_eq!(server.handle_bytes(&option_bytes(option::STARTTLS, b"x"), &mut out), Ok(None));
        assert_eq!(only_reply(&out), reply::ERR_INVALID);
    }

    #[test]
    fn whatever_comes_behind_starttls_ends_the_session() {
        for behind in [&b"\x16\x03\x01"[..], &option_bytes(option::LIST, &[]), b"\0"] {
            let (mut server, mut out) = (with_tls(TlsState::Allowed), Vec::new());
            let bytes = [&option_bytes(option::STARTTLS, &[]), behind].concat();
            let injected = server.handle_bytes(&bytes, &mut out);
            assert_eq!(injected, Err(ServerHandshakeError::BytesBehindStartTls(behind.len())));
            assert!(out.is_empty(), "nothing is acknowledged");
        }
    }

    #[test]
    fn where_tls_is_required_nothing_else_is_answered_before() {
        for number in EVERY_OTHER_OPTION {
            let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
            assert_eq!(server.handle_bytes(&option_bytes(number, b"\0\0\0\0\0\0"), &mut out), Ok(None));
            assert_eq!(only_reply(&out), reply::ERR_TLS_REQD, "option {number}");
        }
        let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
        let refused = server.handle_bytes(&option_bytes(option::EXPORT_NAME, b"a"), &mut out);
        assert!(matches!(refused, Err(ServerHandshakeError::ExportNameRefused(_))), "{refused:?}");
        let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
        let event = server.handle_bytes(&option_bytes(option::ABORT, &[]), &mut out);
        assert_eq!(event, Ok(Some(Event::Abort)));
    }
}
