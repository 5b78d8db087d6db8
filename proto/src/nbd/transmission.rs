//! Requests and simple replies of the transmission phase, encoded and decoded.
//!
//! Used by the client's `client/src/device/queue/connection.rs` (encodes requests, decodes replies) and the server's `server/src/data/session.rs` (the other
//! way round). Replies in chunks are in `replies.rs`. Nothing here allocates.
//! Source: NBD `doc/proto.md`, "Transmission phase"; extended headers: the same file on branch `extension-ext-header`.

use super::wire::{be_u16, be_u32, be_u64};
use super::{EXTENDED_REQUEST_MAGIC, HeaderStyle, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC};

/// Length of a compact request's header on the wire, in bytes.
pub const REQUEST_BYTES: usize = 28;
/// Length of an extended request's header on the wire, in bytes.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Length of a simple reply's header on the wire, in bytes.
pub const SIMPLE_REPLY_BYTES: usize = 16;

/// Command flags (`NBD_CMD_FLAG_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CommandFlags(pub u16);

impl CommandFlags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// The data is on stable storage before the reply.
    pub const FUA: Self = Self(1 << 0);
    /// WRITE_ZEROES may not make a hole.
    pub const NO_HOLE: Self = Self(1 << 1);
    /// A structured read may not be split.
    pub const DF: Self = Self(1 << 2);
    /// BLOCK_STATUS gives one extent.
    pub const REQ_ONE: Self = Self(1 << 3);
    /// WRITE_ZEROES fails rather than be as slow as a write.
    pub const FAST_ZERO: Self = Self(1 << 4);
    /// With extended headers: the length is that of a payload which follows.
    pub const PAYLOAD_LEN: Self = Self(1 << 5);

    /// Whether every flag of `other` is set here.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Commands (`NBD_CMD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read `length` bytes.
    Read,
    /// Write `length` bytes, which follow the header.
    Write,
    /// End the session; has no reply.
    Disconnect,
    /// Put every answered write on stable storage.
    Flush,
    /// The bytes are not needed any more.
    Trim,
    /// Prefetch.
    Cache,
    /// Make the bytes read as zeroes.
    WriteZeroes,
    /// Tell holes from data.
    BlockStatus,
    /// A number this program does not know.
    Unknown(u16),
}

impl Command {
    /// From its number on the wire.
    pub const fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    /// Its number on the wire.
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// The peer does not speak the protocol: its connection must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// A request does not begin with the request magic.
    #[error("a request begins with {0:#010x}, not with the request magic")]
    RequestMagic(u32),
    /// A reply does not begin with the simple reply magic.
    #[error("a reply begins with {0:#010x}, not with the simple reply magic")]
    ReplyMagic(u32),
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Flags of the command.
    pub flags: CommandFlags,
    /// What to do.
    pub command: Command,
    /// Chosen by the client, returned by the reply.
    pub cookie: u64,
    /// First byte concerned.
    pub offset_bytes: u64,
    /// How many bytes are concerned; below 2^32 where headers are compact. With [`CommandFlags::PAYLOAD_LEN`], how many
    /// follow.
    pub length_bytes: u64,
}

impl Request {
    /// The compact header as it goes on the wire.
    ///
    /// # Panics
    /// When the length does not fit into 32 bits: only extended headers can say it.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let Ok(length_bytes) = u32::try_from(self.length_bytes) else {
            panic!("a compact header cannot say {} bytes", self.length_bytes)
        };
        let mut wire = [0u8; REQUEST_BYTES];
        wire[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        wire[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        wire[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        wire[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        wire[16..24].copy_from_slice(&self.offset_bytes.to_be_bytes());
        wire[24..28].copy_from_slice(&length_bytes.to_be_bytes());
        wire
    }

    /// Reads a compact header off the wire.
    ///
    /// # Errors
    /// [`TransmissionError::RequestMagic`]: the stream is out of step; close it.
    pub fn decode(wire: &[u8; REQUEST_BYTES]) -> Result<Self, TransmissionError> {
        Self::decode_header(wire, REQUEST_MAGIC, u64::from(be_u32(wire, 24)))
    }

    /// Reads an extended header off the wire.
    ///
    /// # Errors
    /// [`TransmissionError::RequestMagic`]: the stream is out of step; close it.
    pub fn decode_extended(wire: &[u8; EXTENDED_REQUEST_BYTES]) -> Result<Self, TransmissionError> {
        Self::decode_header(wire, EXTENDED_REQUEST_MAGIC, be_u64(wire, 24))
    }

    /// The two headers differ in their magic, and in the width of the length, which stands at the end of both.
    fn decode_header(wire: &[u8], expected_magic: u32, length_bytes: u64) -> Result<Self, TransmissionError> {
        let magic = be_u32(wire, 0);
        if magic != expected_magic {
            return Err(TransmissionError::RequestMagic(magic));
        }
        Ok(Self {
            flags: CommandFlags(be_u16(wire, 4)),
            command: Command::from_wire(be_u16(wire, 6)),
            cookie: be_u64(wire, 8),
            offset_bytes: be_u64(wire, 16),
            length_bytes,
        })
    }

    /// Bytes that follow the header on the wire: a WRITE's, and with extended headers those of any request that says so.
    ///
    /// With extended headers a WRITE has to say so as well, but QEMU's client (8.2 to 10.0 at least) does not, and sends
    /// its payload all the same; a WRITE without one would make no sense.
    pub fn payload_bytes(&self, headers: HeaderStyle) -> u64 {
        let says_so = headers == HeaderStyle::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        let has_payload = says_so || self.command == Command::Write;
        if has_payload { self.length_bytes } else { 0 }
    }
}

/// A simple reply's header; a successful READ's payload follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an error number of [`NbdError`]'s.
    pub error: u32,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// The header as it goes on the wire.
    pub fn encode(&self) -> [u8; SIMPLE_REPLY_BYTES] {
        let mut wire = [0u8; SIMPLE_REPLY_BYTES];
        wire[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        wire[4..8].copy_from_slice(&self.error.to_be_bytes());
        wire[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        wire
    }

    /// Reads a header off the wire.
    ///
    /// # Errors
    /// [`TransmissionError::ReplyMagic`]: the stream is out of step; close it.
    pub fn decode(wire: &[u8; SIMPLE_REPLY_BYTES]) -> Result<Self, TransmissionError> {
        let magic = be_u32(wire, 0);
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(TransmissionError::ReplyMagic(magic));
        }
        Ok(Self { error: be_u32(wire, 4), cookie: be_u64(wire, 8) })
    }
}

/// Error numbers that NBD allows in a reply. They are Linux's, but only these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: a write to a read-only export.
    Eperm = 1,
    /// Input/output error.
    Eio = 5,
    /// Out of memory.
    Enomem = 12,
    /// The request is not valid.
    Einval = 22,
    /// No space left, or a write past the end.
    Enospc = 28,
    /// The request is too large.
    Eoverflow = 75,
    /// Not supported: a FAST_ZERO that would be slow.
    Enotsup = 95,
    /// The server is shutting down.
    Eshutdown = 108,
}

impl NbdError {
    /// The NBD error for a Linux errno (positive) of the storage; what NBD cannot say becomes EIO. So do EOVERFLOW and
    /// EOPNOTSUPP, which in a reply speak of the request's length and of FAST_ZERO.
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            1 => Self::Eperm,
            12 => Self::Enomem,
            22 => Self::Einval,
            28 | 122 | 27 => Self::Enospc, // ENOSPC, EDQUOT, EFBIG
            108 => Self::Eshutdown,
            _ => Self::Eio,
        }
    }

    /// What people are told about it where a reply carries words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Eperm => "this is not permitted",
            Self::Eio => "the storage failed",
            Self::Enomem => "the server is out of memory",
            Self::Einval => "the request is not valid",
            Self::Enospc => "no space is left on the storage",
            Self::Eoverflow => "the request is too large",
            Self::Enotsup => "this cannot be done fast here",
            Self::Eshutdown => "the server is shutting down",
        }
    }

    /// The Linux errno (positive) for an error number off the wire; an unknown number is EINVAL, as the specification
    /// asks.
    pub const fn errno_from_wire(number: u32) -> i32 {
        match number {
            1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => number as i32,
            _ => 22,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_the_specified_layout() {
        let request = Request {
            flags: CommandFlags::FUA,
            command: Command::Write,
            cookie: 0x0102_0304_0506_0708,
            offset_bytes: 0x1112_1314_1516_1718,
            length_bytes: 0x2122_2324,
        };
        let wire = request.encode();
        let expected: [u8; REQUEST_BYTES] = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16,
            0x17, 0x18, 0x21, 0x22, 0x23, 0x24,
        ];
        assert_eq!(wire, expected);
        assert_eq!(Request::decode(&wire), Ok(request));
    }

    #[test]
    fn extended_request_has_the_specified_layout() {
        let wire: [u8; EXTENDED_REQUEST_BYTES] = [
            0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15,
            0x16, 0x17, 0x18, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28,
        ];
        let request = Request {
            flags: CommandFlags::PAYLOAD_LEN,
            command: Command::Write,
            cookie: 0x0102_0304_0506_0708,
            offset_bytes: 0x1112_1314_1516_1718,
            length_bytes: 0x2122_2324_2526_2728,
        };
        assert_eq!(Request::decode_extended(&wire), Ok(request));
        let mut compact = wire;
        compact[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        assert_eq!(Request::decode_extended(&compact), Err(TransmissionError::RequestMagic(REQUEST_MAGIC)));
    }

    #[test]
    fn who_has_a_payload_depends_on_the_header_style() {
        let request =
            |command, flags| Request { flags, command, cookie: 0, offset_bytes: 0, length_bytes: 9 };
        let write = request(Command::Write, CommandFlags::NONE);
        assert_eq!(write.payload_bytes(HeaderStyle::Simple), 9);
        assert_eq!(write.payload_bytes(HeaderStyle::Structured), 9);
        assert_eq!(write.payload_bytes(HeaderStyle::Extended), 9, "even if it does not say so");
        let trim = request(Command::Trim, CommandFlags::NONE);
        assert_eq!(trim.payload_bytes(HeaderStyle::Extended), 0, "without the flag it is an effect length");
        for command in [Command::Read, Command::Write, Command::BlockStatus, Command::Unknown(77)] {
            let flagged = request(command, CommandFlags::PAYLOAD_LEN);
            assert_eq!(flagged.payload_bytes(HeaderStyle::Extended), 9, "{command:?}");
        }
        let flagged = request(Command::Read, CommandFlags::PAYLOAD_LEN);
        assert_eq!(flagged.payload_bytes(HeaderStyle::Simple), 0, "compact headers do not know the flag");
    }

    #[test]
    fn simple_reply_has_the_specified_layout() {
        let reply = SimpleReply { error: 28, cookie: 0x0102_0304_0506_0708 };
        let wire = reply.encode();
        assert_eq!(wire, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(SimpleReply::decode(&wire), Ok(reply));
    }

    #[test]
    fn wrong_magic_is_an_error() {
        assert_eq!(Request::decode(&[0; 28]), Err(TransmissionError::RequestMagic(0)));
        assert_eq!(SimpleReply::decode(&[0xff; 16]), Err(TransmissionError::ReplyMagic(u32::MAX)));
    }

    #[test]
    fn command_numbers_survive_a_round_trip() {
        for number in 0..=u16::MAX {
            assert_eq!(Command::from_wire(number).to_wire(), number);
        }
    }

    #[test]
    fn errors_outside_the_specification_are_mapped() {
        assert_eq!(NbdError::from_errno(122), NbdError::Enospc);
        assert_eq!(NbdError::from_errno(9), NbdError::Eio);
        assert_eq!(NbdError::errno_from_wire(4096), 22);
        assert_eq!(NbdError::errno_from_wire(5), 5);
    }
}
