//! What a server puts on the wire before a reply's payload, in each header style; and a chunk's header as a client reads it.
//!
//! Owned by the server's `server/src/data/session.rs`, which reuses one [`ReplyHead`] for reply after reply; the payload itself never
//! passes through here. Nothing allocates. [`ChunkHead`] is read by `client/src/image/nbd/`.
//!
//! | outcome | simple | structured | extended |
//! | --- | --- | --- | --- |
//! | done, no payload | simple reply | simple reply | chunk NONE |
//! | READ's data | simple reply | one chunk OFFSET_DATA | the same |
//! | extents | never | a chunk BLOCK_STATUS for each context | a chunk BLOCK_STATUS_EXT for each |
//! | error | simple reply | chunk ERROR, or ERROR_OFFSET where the place is known | the same |
//!
//! Every reply is one message: its only chunk, or the last of several contexts, carries DONE. A payload is complete in memory before its head is made, so no
//! error can be found out while it is sent. Source: NBD `doc/proto.md`, "Structured reply chunk message"; branch
//! `extension-ext-header`, "Extended reply chunk message".

use super::transmission::{Request, SIMPLE_REPLY_BYTES, SimpleReply, TransmissionError};
use super::wire::{be_u16, be_u32, be_u64};
use super::{EXTENDED_REPLY_MAGIC, HeaderStyle, STRUCTURED_REPLY_MAGIC};

/// Types of chunks (`NBD_REPLY_TYPE_*`).
pub mod chunk {
    /// Nothing; ends a successful reply.
    pub const NONE: u16 = 0;
    /// An offset and the bytes from there on.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a length: zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context's extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// A context's extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error: number and words.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// An error with the offset at which it occurred.
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
}

/// A structured chunk's header, as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHead {
    /// [`REPLY_FLAG_DONE`] and what later versions know.
    pub flags: u16,
    /// One of [`chunk`]'s, or another.
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// Bytes of payload that follow.
    pub length_bytes: u32,
}

impl ChunkHead {
    /// Reads a header off the wire.
    ///
    /// # Errors
    /// [`TransmissionError::ReplyMagic`]: the stream is out of step; close it.
    pub fn decode(wire: &[u8; STRUCTURED_CHUNK_BYTES]) -> Result<Self, TransmissionError> {
        let magic = be_u32(wire, 0);
        if magic != STRUCTURED_REPLY_MAGIC {
            return Err(TransmissionError::ReplyMagic(magic));
        }
        Ok(Self {
            flags: be_u16(wire, 4),
            kind: be_u16(wire, 6),
            cookie: be_u64(wire, 8),
            length_bytes: be_u32(wire, 16),
        })
    }

    /// Whether its reply ends with it.
    pub fn is_last(&self) -> bool {
        self.flags & REPLY_FLAG_DONE != 0
    }
}

/// `NBD_REPLY_FLAG_DONE`: the last chunk of its reply.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;
/// Length of a structured chunk's header on the wire, in bytes.
pub const STRUCTURED_CHUNK_BYTES: usize = 20;
/// Length of an extended chunk's header on the wire, in bytes.
pub const EXTENDED_CHUNK_BYTES: usize = 32;
/// Where a chunk's flags are in its header, in bytes.
const FLAGS_AT: usize = 4;
/// Longest words of an error, in bytes; what is longer is cut. The protocol would take 4096, people take less.
pub const ERROR_WORDS_BYTES_MAX: usize = 74;
/// Longest head: an extended error with words and offset, in bytes.
pub const REPLY_HEAD_BYTES_MAX: usize = EXTENDED_CHUNK_BYTES + 6 + ERROR_WORDS_BYTES_MAX + 8;

/// The bytes that go on the wire before a reply's payload.
#[derive(Debug, Clone)]
pub struct ReplyHead {
    bytes: [u8; REPLY_HEAD_BYTES_MAX],
    used_bytes: usize,
}

impl Default for ReplyHead {
    fn default() -> Self {
        Self { bytes: [0; REPLY_HEAD_BYTES_MAX], used_bytes: 0 }
    }
}

impl ReplyHead {
    /// What was put last.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used_bytes]
    }

    /// The request is done, and nothing follows.
    pub fn put_done(&mut self, headers: HeaderStyle, request: &Request) {
        match headers {
            HeaderStyle::Simple | HeaderStyle::Structured => self.put_simple(0, request),
            HeaderStyle::Extended => self.put_chunk(headers, request, chunk::NONE, 0),
        }
    }

    /// A READ's bytes follow, all of them.
    pub fn put_data(&mut self, headers: HeaderStyle, request: &Request) {
        if headers == HeaderStyle::Simple {
            return self.put_simple(0, request);
        }
        self.put_chunk(headers, request, chunk::OFFSET_DATA, 8 + request.length_bytes);
        self.put(&request.offset_bytes.to_be_bytes());
    }

    /// A BLOCK_STATUS's extents follow, of one context, as `block_status.rs` encoded them; behind them those of the next, unless it is
    /// the last.
    pub fn put_status(&mut self, headers: HeaderStyle, request: &Request, payload_bytes: u32, is_last: bool) {
        let kind = match headers {
            HeaderStyle::Extended => chunk::BLOCK_STATUS_EXT,
            HeaderStyle::Simple | HeaderStyle::Structured => chunk::BLOCK_STATUS,
        };
        self.put_chunk(headers, request, kind, u64::from(payload_bytes));
        if !is_last {
            self.bytes[FLAGS_AT..FLAGS_AT + 2].copy_from_slice(&0u16.to_be_bytes());
        }
    }

    /// The request failed with this error number (not 0): `at` is the offset from which on nothing was done, where that
    /// is known.
    pub fn put_error(
        &mut self,
        headers: HeaderStyle,
        request: &Request,
        error: u32,
        words: &str,
        at: Option<u64>,
    ) {
        if headers == HeaderStyle::Simple {
            return self.put_simple(error, request);
        }
        let end = words.floor_char_boundary(ERROR_WORDS_BYTES_MAX);
        let words = &words.as_bytes()[..end];
        let (kind, offset_bytes) = if at.is_some() { (chunk::ERROR_OFFSET, 8) } else { (chunk::ERROR, 0) };
        self.put_chunk(headers, request, kind, (6 + words.len() + offset_bytes) as u64);
        self.put(&error.to_be_bytes());
        self.put(&(words.len() as u16).to_be_bytes());
        self.put(words);
        if let Some(offset_bytes) = at {
            self.put(&offset_bytes.to_be_bytes());
        }
    }

    fn put_simple(&mut self, error: u32, request: &Request) {
        let reply = SimpleReply { error, cookie: request.cookie }.encode();
        self.bytes[..SIMPLE_REPLY_BYTES].copy_from_slice(&reply);
        self.used_bytes = SIMPLE_REPLY_BYTES;
    }

    fn put_chunk(&mut self, headers: HeaderStyle, request: &Request, kind: u16, payload_bytes: u64) {
        let is_extended = headers == HeaderStyle::Extended;
        let magic = if is_extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        self.used_bytes = 0;
        self.put(&magic.to_be_bytes());
        self.put(&REPLY_FLAG_DONE.to_be_bytes());
        self.put(&kind.to_be_bytes());
        self.put(&request.cookie.to_be_bytes());
        if is_extended {
            self.put(&request.offset_bytes.to_be_bytes());
            self.put(&payload_bytes.to_be_bytes());
        } else {
            self.put(&(payload_bytes as u32).to_be_bytes());
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = self.used_bytes + bytes.len();
        self.bytes[self.used_bytes..end].copy_from_slice(bytes);
        self.used_bytes = end;
    }
}

#[cfg(test)]
mod tests {
    use super::super::transmission::{Command, CommandFlags};
    use super::*;

    const COOKIE: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    fn read() -> Request {
        Request {
            flags: CommandFlags::NONE,
            command: Command::Read,
            cookie: u64::from_be_bytes(COOKIE),
            offset_bytes: 0x1000,
            length_bytes: 0x200,
        }
    }

    fn head(put: impl FnOnce(&mut ReplyHead)) -> Vec<u8> {
        let mut head = ReplyHead::default();
        // What an earlier reply left must not show.
        head.put_error(HeaderStyle::Extended, &read(), 5, &"x".repeat(100), Some(7));
        put(&mut head);
        head.bytes().to_vec()
    }

    #[test]
    fn simple_heads_have_the_specified_layout() {
        let ok = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], &COOKIE[..]].concat();
        assert_eq!(head(|head| head.put_done(HeaderStyle::Simple, &read())), ok);
        assert_eq!(head(|head| head.put_data(HeaderStyle::Simple, &read())), ok);
        assert_eq!(head(|head| head.put_done(HeaderStyle::Structured, &read())), ok);
        let failed = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22], &COOKIE[..]].concat();
        assert_eq!(head(|head| head.put_error(HeaderStyle::Simple, &read(), 22, "no", Some(1))), failed);
    }

    #[test]
    fn structured_data_has_the_specified_layout() {
        let expected =
            [&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1], &COOKIE[..], &[0, 0, 2, 8, 0, 0, 0, 0, 0, 0, 0x10, 0]]
                .concat();
        assert_eq!(head(|head| head.put_data(HeaderStyle::Structured, &read())), expected);
    }

    #[test]
    fn structured_errors_have_the_specified_layout() {
        let expected = [
            &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1],
            &COOKIE[..],
            &[0, 0, 0, 8, 0, 0, 0, 22, 0, 2],
            &b"no"[..],
        ]
        .concat();
        assert_eq!(head(|head| head.put_error(HeaderStyle::Structured, &read(), 22, "no", None)), expected);
        let expected = [
            &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 2],
            &COOKIE[..],
            &[0, 0, 0, 16, 0, 0, 0, 5, 0, 2],
            &b"no"[..],
            &[0, 0, 0, 0, 0, 0, 0x10, 1],
        ]
        .concat();
        let at = Some(0x1001);
        assert_eq!(head(|head| head.put_error(HeaderStyle::Structured, &read(), 5, "no", at)), expected);
    }

    #[test]
    fn extended_heads_have_the_specified_layout() {
        let chunk = |kind: [u8; 2], length: u8| {
            let start = [&[0x6e, 0x8a, 0x27, 0x8c, 0, 1], &kind[..], &COOKIE].concat();
            [&start[..], &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, length]].concat()
        };
        assert_eq!(head(|head| head.put_done(HeaderStyle::Extended, &read())), chunk([0, 0], 0));
        assert_eq!(head(|head| head.put_status(HeaderStyle::Extended, &read(), 24, true)), chunk([0, 6], 24));
        let mut not_last = chunk([0, 6], 24);
        not_last[5] = 0;
        assert_eq!(head(|head| head.put_status(HeaderStyle::Extended, &read(), 24, false)), not_last);
        let error = [&chunk([0x80, 1], 8)[..], &[0, 0, 0, 22, 0, 2], b"no"].concat();
        assert_eq!(head(|head| head.put_error(HeaderStyle::Extended, &read(), 22, "no", None)), error);
        let data = [&chunk([0, 1], 8)[..], &[0, 0, 0, 0, 0, 0, 0x10, 0]].concat();
        let mut expected = data.clone();
        expected[30] = 2; // 8 + 512 bytes.
        assert_eq!(head(|head| head.put_data(HeaderStyle::Extended, &read())), expected);
    }

    #[test]
    fn long_words_are_cut_between_characters() {
        let words = "ä".repeat(100);
        let error = head(|head| head.put_error(HeaderStyle::Structured, &read(), 22, &words, None));
        let length = usize::from(error[STRUCTURED_CHUNK_BYTES + 5]);
        assert!(length <= ERROR_WORDS_BYTES_MAX);
        assert!(std::str::from_utf8(&error[STRUCTURED_CHUNK_BYTES + 6..]).is_ok());
        assert_eq!(error.len(), STRUCTURED_CHUNK_BYTES + 6 + length);
    }
}
