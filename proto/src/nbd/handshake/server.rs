//! The server's side of the handshake.
//!
//! ```text
//!   ClientFlags ──► Options ──Open──► Opening ──ok──► Transmission
//!        │          │ ▲ │ ▲               │
//!        │          │ │ │ ├──refused/INFO─┘
//!        │          │ │ │ └──LIST answered, contexts told
//!        │          │ │ └──ABORT──► Closed
//!        │          │ └─tls_started── StartingTls
//!        └──► error └──STARTTLS──────────▲
//! ```
//!
//! Owned by `server/src/data/session.rs`. The machine asks its owner to open an export ([`Event::Open`]) and takes no further
//! bytes until it is answered, because opening may wait (for the I/O of a fenced connection to finish). Bytes that arrive
//! meanwhile are kept; those after the end of the handshake are the transmission phase's ([`ServerHandshake::leftover`]).
//! What is kept is bounded by [`OPTION_BYTES_MAX`] and what its owner feeds at a time. The two options about metadata
//! contexts ask for an [`Event::Open`] as INFO does: whether there is such an export is the owner's to know.
//! Everything that options before GO have settled is in one `Negotiation`, so that it can be dropped at once.

mod contexts;

use super::super::block_status::Contexts;
use super::super::wire::{be_u16, be_u32, be_u64};
use super::super::{
    ExportInfo, HeaderStyle, INIT_MAGIC, Negotiated, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_BYTES_MAX,
    TransmissionFlags, handshake_flags, info, option, reply,
};
use super::meta_context::{MetaContextRequest, QueryKind};
use super::{OPTION_BYTES_MAX, take};

/// Most options in one handshake unless its owner says otherwise; a client that wants more is not negotiating.
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
    /// More options than it may ask for.
    #[error("more than {0} options")]
    TooManyOptions(u32),
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
    /// INFO, or a question about its metadata contexts: tell about it; nothing is opened.
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
    /// Call [`ServerHandshake::answer_list`] with the exports to show.
    List,
    /// Send what was put out, then close: the client is done.
    Abort,
    /// Send what was put out, then start TLS and call [`ServerHandshake::tls_started`].
    StartTls,
}

/// An export as LIST shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// For people; the same that INFO tells. May be empty.
    pub description: String,
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

    /// The same refusal in other words.
    #[must_use]
    pub fn map_text(self, words: impl FnOnce(&str) -> String) -> Self {
        Self { text: words(&self.text), ..self }
    }

    /// The words that the client is told.
    pub fn text(&self) -> &str {
        &self.text
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    ClientFlags,
    Options,
    Opening { kind: OpenKind, wants_description: bool, negotiated: Negotiated },
    Querying { kind: QueryKind },
    Listing,
    StartingTls,
    Transmission,
    Closed,
}

/// What the client's options have settled so far.
#[derive(Default)]
struct Negotiation {
    headers: HeaderStyle,
    /// For which export contexts are selected; may carry a secret.
    contexts_export: Option<String>,
    contexts: Contexts,
    /// The bitmaps among them, in order.
    bitmaps: Vec<String>,
    /// What an option asks for whose export is being looked up.
    query: Option<MetaContextRequest>,
}

impl Negotiation {
    /// What holds for a client that opens this export.
    fn for_export(&self, name: &str) -> Negotiated {
        let is_of_export = self.contexts_export.as_deref() == Some(name);
        let contexts = if is_of_export { self.contexts } else { Contexts::NONE };
        Negotiated { headers: self.headers, contexts }
    }

    fn select(&mut self, export: Option<String>, contexts: Contexts, bitmaps: Vec<String>) {
        (self.contexts_export, self.contexts, self.bitmaps) = (export, contexts, bitmaps);
    }
}

/// The server's side of one connection's handshake.
pub struct ServerHandshake {
    state: State,
    offers_chunks: bool,
    no_zeroes: bool,
    options_max: u32,
    options_seen: u32,
    tls: TlsState,
    negotiation: Negotiation,
    negotiated: Negotiated,
    /// Of the export that is being looked up.
    offered_bitmaps: Vec<String>,
    input: Vec<u8>,
}

impl std::fmt::Debug for ServerHandshake {
    /// Neither names nor bytes of the peer: both may carry a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let options_seen = self.options_seen;
        f.debug_struct("ServerHandshake")
            .field("state", &self.state)
            .field("options_seen", &options_seen)
            .finish_non_exhaustive()
    }
}

impl ServerHandshake {
    /// Begins: the greeting is appended to `out`.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        let flags = handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES;
        out.extend_from_slice(&flags.to_be_bytes());
        Self {
            state: State::ClientFlags,
            offers_chunks: true,
            no_zeroes: false,
            options_max: OPTIONS_MAX,
            options_seen: 0,
            tls: TlsState::Off,
            negotiation: Negotiation::default(),
            negotiated: Negotiated::default(),
            offered_bitmaps: Vec::new(),
            input: Vec::new(),
        }
    }

    /// The same, with another limit than [`OPTIONS_MAX`].
    #[must_use]
    pub fn with_options_max(self, options_max: u32) -> Self {
        Self { options_max, ..self }
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
        let Self { offers_chunks, no_zeroes, options_max, options_seen, .. } = *self;
        // All but what the server offers, the client's flags, which it does not repeat, and what bounds it.
        *self = Self { offers_chunks, no_zeroes, options_max, options_seen, ..Self::new(&mut Vec::new()) };
        self.state = State::Options;
        self.tls = TlsState::Active;
    }

    /// As [`Self::new`], for an owner that answers with simple replies only: options that would change them are unknown.
    pub fn with_simple_replies_only(out: &mut Vec<u8>) -> Self {
        Self { offers_chunks: false, ..Self::new(out) }
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
                | State::Querying { .. }
                | State::Listing
                | State::StartingTls
                | State::Transmission
                | State::Closed => {
                    return Ok(None);
                }
            }
        }
    }

    /// The export that the next [`Self::answer_open`] is about has these bitmaps, which clients may ask for as metadata contexts.
    pub fn offer_bitmaps(&mut self, names: Vec<String>) {
        self.offered_bitmaps = names;
    }

    /// The bitmaps that were selected for the export that is open, in the order of their ids.
    pub fn selected_bitmaps(&self) -> &[String] {
        let count = self.negotiated.contexts.without_allocation().count();
        self.negotiation.bitmaps.get(..count).unwrap_or_default()
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
        let (kind, wants_description, negotiated) = match self.state {
            State::Opening { kind, wants_description, negotiated } => (kind, wants_description, negotiated),
            State::Querying { kind } => {
                self.answer_query(kind, answer, out);
                return Ok(false);
            }
            _ => panic!("answer_open: no export is being opened"),
        };
        self.state = State::Options;
        self.offered_bitmaps.clear();
        let option = if kind == OpenKind::Info { option::INFO } else { option::GO };
        match (kind, answer) {
            (OpenKind::ExportName, Err(refusal)) => {
                self.state = State::Closed;
                return Err(ServerHandshakeError::ExportNameRefused(refusal.text));
            }
            (OpenKind::ExportName, Ok(export)) => {
                out.extend_from_slice(&export.size_bytes.to_be_bytes());
                out.extend_from_slice(&negotiated.announce(export.flags).0.to_be_bytes());
                if !self.no_zeroes {
                    out.resize(out.len() + 124, 0);
                }
                self.state = State::Transmission;
            }
            (_, Err(refusal)) => put_reply(out, option, refusal.reply, refusal.text.as_bytes()),
            (kind, Ok(export)) => {
                let flags = negotiated.announce(export.flags);
                put_export_info(out, option, export, flags, wants_description);
                put_reply(out, option, reply::ACK, &[]);
                if kind == OpenKind::Go {
                    self.state = State::Transmission;
                }
            }
        }
        let is_open = self.state == State::Transmission;
        if is_open {
            self.negotiated = negotiated;
        }
        Ok(is_open)
    }

    /// What was settled, once transmission has begun.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Answers [`Event::List`] with the exports that everybody may see.
    ///
    /// # Panics
    /// When no `List` is waiting for its answer: the caller is wrong.
    pub fn answer_list(&mut self, exports: &[ListedExport], out: &mut Vec<u8>) {
        assert_eq!(self.state, State::Listing, "answer_list: nobody asked for the list");
        self.state = State::Options;
        for ListedExport { name, description } in exports {
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend_from_slice(name.as_bytes());
            data.extend_from_slice(description.as_bytes());
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
        if self.options_seen > self.options_max {
            return Err(ServerHandshakeError::TooManyOptions(self.options_max));
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
            option::EXPORT_NAME if self.negotiation.headers == HeaderStyle::Extended => {
                let why = "after EXTENDED_HEADERS only GO opens an export";
                Err(ServerHandshakeError::ExportNameRefused(why.into()))
            }
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
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if self.offers_chunks => {
                let (reply, text) = self.choose_headers(number, data);
                put_reply(out, number, reply, text.as_bytes());
                Ok(Progress::Done)
            }
            option::LIST_META_CONTEXT if self.offers_chunks => {
                Ok(self.query_contexts(QueryKind::List, data, out))
            }
            option::SET_META_CONTEXT if self.offers_chunks => {
                Ok(self.query_contexts(QueryKind::Set, data, out))
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
        let negotiated = self.negotiation.for_export(&name);
        self.state = State::Opening { kind, wants_description, negotiated };
        Progress::Event(Event::Open(Open { kind, name }))
    }

    /// STRUCTURED_REPLY or EXTENDED_HEADERS; there is no way back from the latter.
    fn choose_headers(&mut self, number: u32, data: &[u8]) -> (u32, &'static str) {
        if !data.is_empty() {
            return (reply::ERR_INVALID, "this option takes no data");
        }
        if number == option::EXTENDED_HEADERS {
            self.negotiation.headers = HeaderStyle::Extended;
        } else if self.negotiation.headers == HeaderStyle::Extended {
            return (reply::ERR_EXT_HEADER_REQD, "extended headers are in use");
        } else {
            self.negotiation.headers = HeaderStyle::Structured;
        }
        (reply::ACK, "")
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

/// A string as the protocol has them: UTF-8 without NUL, not too long.
pub(super) fn export_name(data: &[u8]) -> Option<String> {
    if data.len() > STRING_BYTES_MAX || data.contains(&0) {
        return None;
    }
    String::from_utf8(data.to_vec()).ok()
}

/// Reads INFO's and GO's data: the name, and whether the description was asked for.
fn parse_info_request(data: &[u8]) -> Result<(String, bool), (u32, &'static str)> {
    const SHORT: (u32, &str) = (reply::ERR_INVALID, "the option's data is too short");
    let name_bytes = take::<4>(data).map(u32::from_be_bytes).ok_or(SHORT)? as usize;
    let name = data[4..].get(..name_bytes).ok_or(SHORT)?;
    if name_bytes > STRING_BYTES_MAX {
        return Err((reply::ERR_TOO_BIG, "an export name has at most 4096 bytes"));
    }
    let name = export_name(name).ok_or((reply::ERR_INVALID, "the export name is not a string"))?;
    let rest = &data[4 + name_bytes..];
    let count = take::<2>(rest).map(u16::from_be_bytes).ok_or(SHORT)? as usize;
    let requests = &rest[2..];
    if requests.len() != count * 2 {
        return Err((reply::ERR_INVALID, "the number of information requests is off"));
    }
    let wants_description = requests.chunks_exact(2).any(|item| be_u16(item, 0) == info::DESCRIPTION);
    Ok((name, wants_description))
}

fn put_export_info(
    out: &mut Vec<u8>,
    option: u32,
    export: &ExportInfo,
    flags: TransmissionFlags,
    wants_description: bool,
) {
    let mut data = info::EXPORT.to_be_bytes().to_vec();
    data.extend_from_slice(&export.size_bytes.to_be_bytes());
    data.extend_from_slice(&flags.0.to_be_bytes());
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
mod tests;
