//! The requests of a connection that wait for answers, and what their replies say.
//!
//! I/O-free: told of each header and payload that arrives, in either reply style. Every length and offset is checked here before
//! anything is believed: the server may be anybody.
//! Owned by `mod.rs`. Source: NBD `doc/proto.md`, "Structured reply chunk message".

use std::collections::HashMap;

use proto::nbd::block_status::{Extent, decode_extents};
use proto::nbd::replies::{ChunkHead, chunk};
use proto::nbd::transmission::{CommandFlags, NbdError, SimpleReply};

pub(super) use proto::nbd::transmission::{Command, Request};

/// Longest payload of a chunk that carries no data, in bytes: some thousands of extents, or an error's words.
const OTHER_PAYLOAD_BYTES_MAX: u32 = 1 << 20;

/// The server's answer to one request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Data(Vec<u8>),
    Extents(Vec<Extent>),
    /// Linux's errno (positive), and the server's words if it has some.
    Error(i32, String),
}

#[derive(Debug)]
struct Pending {
    request: Request,
    data: Vec<u8>,
    covered_bytes: u64,
    extents: Vec<Extent>,
    error: Option<(i32, String)>,
}

/// Requests that wait.
#[derive(Debug, Default)]
pub(super) struct Replies {
    context_id: Option<u32>,
    last_cookie: u64,
    pending: HashMap<u64, Pending>,
}

impl Replies {
    pub(super) fn new(context_id: Option<u32>) -> Self {
        Self { context_id, ..Self::default() }
    }

    /// A request that is about to be sent.
    pub(super) fn begin(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Request {
        self.last_cookie += 1;
        let cookie = self.last_cookie;
        let request = Request { flags, command, cookie, offset_bytes, length_bytes };
        let data = if command == Command::Read { vec![0; length_bytes as usize] } else { Vec::new() };
        let pending = Pending { request, data, covered_bytes: 0, extents: Vec::new(), error: None };
        self.pending.insert(cookie, pending);
        request
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// How many bytes of payload follow a simple reply.
    pub(super) fn simple_payload_bytes(&self, reply: &SimpleReply) -> Result<usize, &'static str> {
        let pending = self.pending.get(&reply.cookie).ok_or(UNASKED)?;
        match pending.request.command {
            Command::BlockStatus if reply.error == 0 => Err("a simple reply cannot tell extents"),
            Command::Read if reply.error == 0 => Ok(pending.data.len()),
            _ => Ok(0),
        }
    }

    /// A simple reply has arrived with its payload.
    pub(super) fn take_simple(
        &mut self,
        reply: &SimpleReply,
        payload: Vec<u8>,
    ) -> Result<(u64, Answer), &'static str> {
        let pending = self.pending.remove(&reply.cookie).ok_or(UNASKED)?;
        let answer = match (reply.error, pending.request.command) {
            (0, Command::Read) => Answer::Data(payload),
            (0, _) => Answer::Done,
            (error, _) => Answer::Error(NbdError::errno_from_wire(error), String::new()),
        };
        Ok((reply.cookie, answer))
    }

    /// Whether so long a payload is allowed behind this header.
    pub(super) fn check_chunk(&self, head: &ChunkHead) -> Result<(), &'static str> {
        let pending = self.pending.get(&head.cookie).ok_or(UNASKED)?;
        let max = match head.kind {
            chunk::OFFSET_DATA => (pending.data.len() as u32).saturating_add(8),
            _ => OTHER_PAYLOAD_BYTES_MAX,
        };
        if head.length_bytes <= max { Ok(()) } else { Err("a chunk is too long") }
    }

    /// A chunk has arrived with its payload; gives the answer once it is whole.
    pub(super) fn take_chunk(
        &mut self,
        head: &ChunkHead,
        payload: &[u8],
    ) -> Result<Option<(u64, Answer)>, &'static str> {
        let pending = self.pending.get_mut(&head.cookie).ok_or(UNASKED)?;
        match head.kind {
            chunk::NONE if payload.is_empty() && head.is_last() => {}
            chunk::OFFSET_DATA => {
                let (offset, data) =
                    payload.split_first_chunk::<8>().ok_or("a chunk of data has no offset")?;
                let into = pending.place(u64::from_be_bytes(*offset), data.len() as u64)?;
                into.copy_from_slice(data);
            }
            chunk::OFFSET_HOLE => {
                let (offset, length) = payload.split_first_chunk::<8>().ok_or("a hole has no offset")?;
                let length: [u8; 4] = length.try_into().map_err(|_| "a hole has a wrong length")?;
                let length = u64::from(u32::from_be_bytes(length));
                pending.place(u64::from_be_bytes(*offset), length)?.fill(0);
            }
            chunk::BLOCK_STATUS if pending.request.command == Command::BlockStatus => {
                let (context_id, extents) = decode_extents(payload).ok_or("extents make no sense")?;
                if Some(context_id) == self.context_id {
                    pending.extents = extents;
                }
            }
            error if error & chunk::ERROR_BIT != 0 => pending.take_error(payload)?,
            _ => return Err("a chunk of a kind that was not asked for"),
        }
        if !head.is_last() {
            return Ok(None);
        }
        let pending = self.pending.remove(&head.cookie).ok_or(UNASKED)?;
        Ok(Some((head.cookie, pending.finish()?)))
    }
}

const UNASKED: &str = "a reply to what was not asked";

impl Pending {
    /// Where bytes of a READ belong.
    fn place(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<&mut [u8], &'static str> {
        let start =
            offset_bytes.checked_sub(self.request.offset_bytes).ok_or("data before what was asked for")?;
        let end = start.checked_add(length_bytes).filter(|end| *end <= self.data.len() as u64);
        let end = end.ok_or("data behind what was asked for")?;
        self.covered_bytes += length_bytes;
        Ok(&mut self.data[start as usize..end as usize])
    }

    fn take_error(&mut self, payload: &[u8]) -> Result<(), &'static str> {
        let (error, rest) = payload.split_first_chunk::<4>().ok_or("an error has no number")?;
        let (length, rest) = rest.split_first_chunk::<2>().ok_or("an error has no words")?;
        let words =
            rest.get(..usize::from(u16::from_be_bytes(*length))).ok_or("an error's words are cut off")?;
        let words = String::from_utf8_lossy(words).into_owned();
        self.error.get_or_insert((NbdError::errno_from_wire(u32::from_be_bytes(*error)), words));
        Ok(())
    }

    fn finish(self) -> Result<Answer, &'static str> {
        if let Some((errno, words)) = self.error {
            return Ok(Answer::Error(errno, words));
        }
        match self.request.command {
            Command::Read if self.covered_bytes != self.data.len() as u64 => {
                Err("not all was read that was asked for")
            }
            Command::Read => Ok(Answer::Data(self.data)),
            Command::BlockStatus if self.extents.is_empty() => Err("an answer without extents"),
            Command::BlockStatus => Ok(Answer::Extents(self.extents)),
            _ => Ok(Answer::Done),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::nbd::block_status::ExtentState;
    use proto::nbd::replies::REPLY_FLAG_DONE;

    use super::*;

    fn head(kind: u16, cookie: u64, payload: &[u8], is_last: bool) -> ChunkHead {
        let flags = if is_last { REPLY_FLAG_DONE } else { 0 };
        ChunkHead { flags, kind, cookie, length_bytes: payload.len() as u32 }
    }

    fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
        [&offset.to_be_bytes()[..], bytes].concat()
    }

    fn read(replies: &mut Replies) -> u64 {
        replies.begin(Command::Read, CommandFlags::NONE, 100, 10).cookie
    }

    #[test]
    fn a_read_may_come_in_pieces_and_in_any_order() {
        let mut replies = Replies::new(None);
        let cookie = read(&mut replies);
        let hole = data(100, &4u32.to_be_bytes());
        let rest = data(104, b"abcdef");
        assert_eq!(replies.take_chunk(&head(chunk::OFFSET_DATA, cookie, &rest, false), &rest), Ok(None));
        let answer = replies.take_chunk(&head(chunk::OFFSET_HOLE, cookie, &hole, true), &hole);
        assert_eq!(answer, Ok(Some((cookie, Answer::Data(b"\0\0\0\0abcdef".to_vec())))));
        assert!(replies.is_empty());
    }

    #[test]
    fn what_a_server_may_not_say_ends_the_connection() {
        for (kind, payload) in [
            (chunk::OFFSET_DATA, data(99, b"x")),
            (chunk::OFFSET_DATA, data(109, b"xy")),
            (chunk::OFFSET_DATA, data(u64::MAX, b"x")),
            (chunk::OFFSET_DATA, b"short".to_vec()),
            (chunk::OFFSET_HOLE, data(105, &100u32.to_be_bytes())),
            (chunk::BLOCK_STATUS, vec![0; 12]),
            (chunk::NONE, Vec::new()),
            (77, Vec::new()),
            (chunk::ERROR, vec![0, 0, 0, 5, 0, 9, b'x']),
        ] {
            let mut replies = Replies::new(Some(1));
            let cookie = read(&mut replies);
            let told = replies.take_chunk(&head(kind, cookie, &payload, true), &payload);
            assert!(told.is_err(), "{kind} {payload:?}: {told:?}");
            assert!(replies.take_chunk(&head(kind, cookie + 1, &[], true), &[]).is_err(), "not asked for");
        }
        let mut replies = Replies::new(None);
        let cookie = read(&mut replies);
        let long = ChunkHead { length_bytes: 19, ..head(chunk::OFFSET_DATA, cookie, &[], true) };
        assert!(replies.check_chunk(&long).is_err());
        assert!(replies.simple_payload_bytes(&SimpleReply { error: 0, cookie: 7 }).is_err());
    }

    #[test]
    fn errors_and_extents_are_told() {
        let mut replies = Replies::new(Some(3));
        let cookie = read(&mut replies);
        let words = [&5u32.to_be_bytes()[..], &4u16.to_be_bytes(), b"oops"].concat();
        let answer = replies.take_chunk(&head(chunk::ERROR, cookie, &words, true), &words);
        assert_eq!(answer, Ok(Some((cookie, Answer::Error(5, "oops".to_owned())))));
        let cookie = replies.begin(Command::BlockStatus, CommandFlags::NONE, 0, 4096).cookie;
        let other = [&9u32.to_be_bytes()[..], &[0, 0, 1, 0], &[0, 0, 0, 0]].concat();
        let ours = [&3u32.to_be_bytes()[..], &[0, 0, 1, 0], &[0, 0, 0, 3]].concat();
        assert_eq!(replies.take_chunk(&head(chunk::BLOCK_STATUS, cookie, &other, false), &other), Ok(None));
        let answer = replies.take_chunk(&head(chunk::BLOCK_STATUS, cookie, &ours, true), &ours);
        let extent = Extent { length_bytes: 256, state: ExtentState::HOLE };
        assert_eq!(answer, Ok(Some((cookie, Answer::Extents(vec![extent])))));
        let cookie = read(&mut replies);
        assert_eq!(replies.simple_payload_bytes(&SimpleReply { error: 0, cookie }), Ok(10));
        let failed = SimpleReply { error: 28, cookie };
        assert_eq!(replies.simple_payload_bytes(&failed), Ok(0));
        assert_eq!(replies.take_simple(&failed, Vec::new()), Ok((cookie, Answer::Error(28, String::new()))));
    }
}
