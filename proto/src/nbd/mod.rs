//! The NBD protocol: its numbers, and who speaks which part.
//!
//! Source: `doc/proto.md` of github.com/NetworkBlockDevice/nbd. All integers on the wire are big-endian.
//!
//! - [`transmission`]: requests and simple replies, encoded and decoded.
//! - [`replies`]: what a server puts before a payload, in the header style that was negotiated.
//! - [`block_status`]: the extents of metadata contexts, and which contexts a request asks for.
//! - [`validate`]: every check of a request in one place, one errno each.
//! - [`handshake`]: the fixed newstyle handshake of both sides.
//!
//! No I/O, no clock: the callers own the sockets.

pub mod block_status;
pub mod handshake;
pub mod replies;
pub mod transmission;
pub mod validate;
mod wire;

/// `NBDMAGIC`, the first eight bytes a server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle negotiation; also begins every option request.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins every request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins every request after EXTENDED_HEADERS.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Begins every chunk of a reply after EXTENDED_HEADERS.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The port that IANA gave to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// Longest string (export name, description, error text) in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// Largest payload that any client may take for granted when no block sizes were told, in bytes.
pub const PAYLOAD_BYTES_MAX_DEFAULT: u32 = 32 << 20;

/// Flags of the handshake (`NBD_FLAG_FIXED_NEWSTYLE`, `NBD_FLAG_NO_ZEROES`); the client's have the same bits.
pub mod handshake_flags {
    /// The fixed newstyle protocol is spoken.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeroes after EXPORT_NAME's answer are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Option numbers (`NBD_OPT_*`).
pub mod option {
    /// Choose an export and go to transmission; cannot be refused but by closing.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Tell about an export.
    pub const INFO: u32 = 6;
    /// Choose an export and go to transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types (`NBD_REP_*`).
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One information item about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known here.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The server's policy forbids it.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option's data is off.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// TLS has to be started first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client has to ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// The request is larger than the server takes.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Only with extended headers, or no way back from them.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Information items (`NBD_INFO_*`).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// A description for people (and, between our own pair, the storage incarnation).
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do (`NBD_FLAG_*`), sent with its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransmissionFlags(pub u16);

impl TransmissionFlags {
    /// Always set.
    pub const HAS_FLAGS: Self = Self(1 << 0);
    /// Writes are refused.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// FLUSH is understood.
    pub const SEND_FLUSH: Self = Self(1 << 2);
    /// FUA is understood.
    pub const SEND_FUA: Self = Self(1 << 3);
    /// The disk turns.
    pub const ROTATIONAL: Self = Self(1 << 4);
    /// TRIM is understood.
    pub const SEND_TRIM: Self = Self(1 << 5);
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: Self = Self(1 << 6);
    /// DF is understood.
    pub const SEND_DF: Self = Self(1 << 7);
    /// A flush on one connection covers the writes that were answered on any other.
    pub const CAN_MULTI_CONN: Self = Self(1 << 8);
    /// CACHE is understood.
    pub const SEND_CACHE: Self = Self(1 << 10);
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: Self = Self(1 << 11);
    /// BLOCK_STATUS takes a payload that names the contexts.
    pub const BLOCK_STATUS_PAYLOAD: Self = Self(1 << 12);

    /// Whether every flag of `other` is set here.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These flags but those of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// What requests and replies look like; the client chooses in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeaderStyle {
    /// Compact requests, simple replies: what holds when nothing was negotiated.
    #[default]
    Simple,
    /// Compact requests, replies in chunks where they carry a payload or an error (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Requests and chunks with 64-bit lengths (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

/// What a handshake has settled beside the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negotiated {
    /// How requests and replies look.
    pub headers: HeaderStyle,
    /// The metadata contexts that were selected for the very export that was opened.
    pub contexts: block_status::Contexts,
}

impl Negotiated {
    /// The flags to announce of an export that can do `flags`: what makes sense only in a certain header style is added
    /// there, and nowhere else.
    #[must_use]
    pub fn announce(self, flags: TransmissionFlags) -> TransmissionFlags {
        let flags =
            flags.without(TransmissionFlags::SEND_DF).without(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        match self.headers {
            HeaderStyle::Simple => flags,
            HeaderStyle::Extended if !self.contexts.is_empty() => {
                flags.with(TransmissionFlags::SEND_DF).with(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
            }
            HeaderStyle::Structured | HeaderStyle::Extended => flags.with(TransmissionFlags::SEND_DF),
        }
    }
}

/// Block size constraints of an export, in bytes (`NBD_INFO_BLOCK_SIZE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two.
    pub minimum_bytes: u32,
    /// Smaller requests may be slower.
    pub preferred_bytes: u32,
    /// Largest payload of a READ or WRITE.
    pub maximum_bytes: u32,
}

/// What opening an export tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
    /// Its block sizes; `None` where a server does not say.
    pub block_sizes: Option<BlockSizes>,
    /// Its description; `None` where a server has none or was not asked.
    pub description: Option<String>,
}
