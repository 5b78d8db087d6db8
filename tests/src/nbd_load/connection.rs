//! One connection of the load: which requests are in flight, what of them has yet to be sent, and where in the stream of
//! replies the next byte belongs.
//!
//! Owns the socket and the requests. Never waits by itself: a socket that would block is left alone until `generator` says
//! that it is ready; where there is one connection only, its socket blocks, which saves a system call for each batch.
//! Invariants: a cookie names a slot and how often that was used, so an old reply matches nothing; every slot is free,
//! waiting to be sent, or in flight.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use proto::nbd::ExportInfo;
use proto::nbd::transmission::{
    Command, CommandFlags, REQUEST_BYTES, Request, SIMPLE_REPLY_BYTES, SimpleReply,
};
use rustix::net::{RecvFlags, recv};

use super::{Load, LoadError, Operation, pattern};
use crate::nbd_client::Client;

/// Payload that is still to come from which on it is received without being copied (`MSG_TRUNC`, see `tcp(7)`). For less, the
/// system call of its own would cost more than the copy.
const UNCOPIED_BYTES_MIN: usize = 64 << 10;

/// Requests that one `writev` takes: a header and a payload each.
const REQUESTS_PER_SEND: usize = 64;

#[derive(Clone)]
struct Slot {
    header: [u8; REQUEST_BYTES],
    cookie: u64,
    offset_bytes: u64,
    sent_at: Option<Instant>,
}

/// What of a reply has come so far.
enum Incoming {
    /// So many bytes of its header.
    Header { bytes: [u8; SIMPLE_REPLY_BYTES], length: usize },
    /// Its header, and all but so many bytes of its payload.
    Payload { slot: u16, missing_bytes: usize },
}

/// A request that was answered.
pub(super) struct Answered {
    /// When it had been sent.
    pub(super) sent_at: Instant,
}

/// One connection in the transmission phase.
pub(super) struct Connection {
    stream: TcpStream,
    operation: Operation,
    block_bytes: usize,
    /// The seed of the data, where it is to be proved.
    seed: Option<u64>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    to_send: VecDeque<u16>,
    /// Bytes of the first of `to_send` that have left.
    sent_of_first_bytes: usize,
    incoming: Incoming,
    /// The payload that is coming, where it is looked at.
    arrived: Vec<u8>,
    uses: u64,
}

impl Connection {
    /// Connects and opens the export.
    pub(super) fn open(load: &Load, seed: Option<u64>) -> Result<(Self, ExportInfo), LoadError> {
        let Client { stream, info, .. } = Client::open(load.address, &load.export)?;
        let slot = Slot { header: [0; REQUEST_BYTES], cookie: 0, offset_bytes: 0, sent_at: None };
        let depth = load.depth as u16;
        let connection = Self {
            stream,
            operation: load.operation,
            block_bytes: load.block_bytes as usize,
            seed,
            slots: vec![slot; usize::from(depth)],
            free: (0..depth).rev().collect(),
            to_send: VecDeque::with_capacity(usize::from(depth)),
            sent_of_first_bytes: 0,
            incoming: Incoming::Header { bytes: [0; SIMPLE_REPLY_BYTES], length: 0 },
            arrived: Vec::new(),
            uses: 0,
        };
        Ok((connection, info))
    }

    /// The socket.
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether another request may be put in flight.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is in flight or waits to be sent.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Puts a request for the block at `offset_bytes` in line.
    ///
    /// # Panics
    /// When there is no room.
    pub(super) fn ask(&mut self, offset_bytes: u64) {
        let Some(index) = self.free.pop() else { panic!("ask: every slot is in use") };
        self.uses += 1;
        let cookie = self.uses << 16 | u64::from(index);
        let command = match self.operation {
            Operation::Read => Command::Read,
            Operation::Write => Command::Write,
        };
        let (flags, length_bytes) = (CommandFlags::NONE, self.block_bytes as u64);
        let request = Request { flags, command, cookie, offset_bytes, length_bytes };
        self.slots[usize::from(index)] =
            Slot { header: request.encode(), cookie, offset_bytes, sent_at: None };
        self.to_send.push_back(index);
    }

    /// Sends what is in line, as far as the socket takes it. `payload` is a block that all WRITEs send, unless the data is to
    /// be proved.
    pub(super) fn send(&mut self, payload: &[u8], now: Instant) -> Result<(), LoadError> {
        for index in &self.to_send {
            self.slots[usize::from(*index)].sent_at.get_or_insert(now);
        }
        while !self.to_send.is_empty() {
            let sent = match self.seed {
                Some(seed) if self.operation == Operation::Write => self.send_pattern(seed),
                _ => self.send_some(payload),
            };
            match sent {
                Ok(sent_bytes) => self.take_off(sent_bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(LoadError::Io { doing: "sending", source }),
            }
        }
        Ok(())
    }

    fn message_bytes(&self) -> usize {
        let payload_bytes = if self.operation == Operation::Write { self.block_bytes } else { 0 };
        REQUEST_BYTES + payload_bytes
    }

    /// Sends as many requests as one call takes.
    fn send_some(&self, payload: &[u8]) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); 2 * REQUESTS_PER_SEND];
        let mut used = 0;
        let mut skipped_bytes = self.sent_of_first_bytes;
        for index in self.to_send.iter().take(REQUESTS_PER_SEND) {
            let header = &self.slots[usize::from(*index)].header;
            let body = if self.operation == Operation::Write { payload } else { &[] };
            for part in [&header[..], body] {
                let from = skipped_bytes.min(part.len());
                skipped_bytes -= from;
                slices[used] = IoSlice::new(&part[from..]);
                used += usize::from(from < part.len());
            }
        }
        (&self.stream).write_vectored(&slices[..used])
    }

    /// Sends the first request with the data that belongs to its place.
    fn send_pattern(&self, seed: u64) -> io::Result<usize> {
        let Some(slot) = self.to_send.front().map(|index| &self.slots[usize::from(*index)]) else {
            return Ok(0);
        };
        let mut message = slot.header.to_vec();
        message.resize(REQUEST_BYTES + self.block_bytes, 0);
        pattern::fill(&mut message[REQUEST_BYTES..], slot.offset_bytes, seed);
        (&self.stream).write(&message[self.sent_of_first_bytes..])
    }

    fn take_off(&mut self, sent_bytes: usize) {
        let sent_bytes = self.sent_of_first_bytes + sent_bytes;
        let messages = sent_bytes / self.message_bytes();
        self.to_send.drain(..messages);
        self.sent_of_first_bytes = sent_bytes % self.message_bytes();
    }

    /// Receives what has come, as long as `buffer` is filled, and hands over every request that was answered. On a blocking
    /// socket it receives once.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8],
        is_blocking: bool,
        answered: &mut Vec<Answered>,
    ) -> Result<(), LoadError> {
        loop {
            let (asked_bytes, flags) = match self.incoming {
                Incoming::Payload { missing_bytes, .. }
                    if missing_bytes >= UNCOPIED_BYTES_MIN && self.seed.is_none() =>
                {
                    (missing_bytes.min(buffer.len()), RecvFlags::TRUNC)
                }
                _ => (buffer.len(), RecvFlags::empty()),
            };
            let arrived = match recv(&self.stream, &mut buffer[..asked_bytes], flags) {
                Ok((_, 0)) => return Err(LoadError::Closed),
                Ok((_, arrived)) => arrived,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) if !is_blocking => return Ok(()),
                Err(error) => return Err(LoadError::Io { doing: "receiving", source: error.into() }),
            };
            self.take_in(&buffer[..arrived], answered)?;
            if is_blocking || arrived < asked_bytes {
                return Ok(());
            }
        }
    }

    fn take_in(&mut self, mut bytes: &[u8], answered: &mut Vec<Answered>) -> Result<(), LoadError> {
        while !bytes.is_empty() {
            match &mut self.incoming {
                Incoming::Header { bytes: header, length } => {
                    let taken = bytes.len().min(SIMPLE_REPLY_BYTES - *length);
                    header[*length..*length + taken].copy_from_slice(&bytes[..taken]);
                    *length += taken;
                    bytes = &bytes[taken..];
                    if *length == SIMPLE_REPLY_BYTES {
                        let header = *header;
                        self.take_header(&header, answered)?;
                    }
                }
                Incoming::Payload { slot, missing_bytes } => {
                    let taken = bytes.len().min(*missing_bytes);
                    *missing_bytes -= taken;
                    let (slot, is_complete) = (*slot, *missing_bytes == 0);
                    if self.seed.is_some() {
                        self.arrived.extend_from_slice(&bytes[..taken]);
                    }
                    bytes = &bytes[taken..];
                    if is_complete {
                        self.take_payload(slot, answered)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn take_header(
        &mut self,
        header: &[u8; SIMPLE_REPLY_BYTES],
        answered: &mut Vec<Answered>,
    ) -> Result<(), LoadError> {
        let reply = SimpleReply::decode(header)?;
        let index = reply.cookie as u16;
        let slot = self.slots.get(usize::from(index)).filter(|slot| slot.cookie == reply.cookie);
        let slot = slot.filter(|slot| slot.sent_at.is_some()).ok_or(LoadError::Cookie(reply.cookie))?;
        if reply.error != 0 {
            return Err(LoadError::Refused { offset_bytes: slot.offset_bytes, error: reply.error });
        }
        if self.operation == Operation::Read {
            self.incoming = Incoming::Payload { slot: index, missing_bytes: self.block_bytes };
        } else {
            self.finish(index, answered);
        }
        Ok(())
    }

    fn take_payload(&mut self, index: u16, answered: &mut Vec<Answered>) -> Result<(), LoadError> {
        let offset_bytes = self.slots[usize::from(index)].offset_bytes;
        if self.seed.is_some_and(|seed| !pattern::is_at(&self.arrived, offset_bytes, seed)) {
            return Err(LoadError::Data(offset_bytes));
        }
        self.arrived.clear();
        self.finish(index, answered);
        Ok(())
    }

    /// The request was answered in full: its slot is free, and its cookie matches nothing any more.
    fn finish(&mut self, index: u16, answered: &mut Vec<Answered>) {
        self.incoming = Incoming::Header { bytes: [0; SIMPLE_REPLY_BYTES], length: 0 };
        let slot = &mut self.slots[usize::from(index)];
        slot.cookie = 0;
        answered.extend(slot.sent_at.take().map(|sent_at| Answered { sent_at }));
        self.free.push(index);
    }

    /// Says goodbye; the server closes.
    pub(super) fn close(self) {
        let request = Request {
            flags: CommandFlags::NONE,
            command: Command::Disconnect,
            cookie: 0,
            offset_bytes: 0,
            length_bytes: 0,
        };
        // A server that has gone first has nothing to be told.
        let _ = (&self.stream).write_all(&request.encode());
    }
}
