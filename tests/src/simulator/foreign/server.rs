//! A server that is somebody else's, and what it stores to: it does what it is asked for at once, answers later, grants as many connections
//! as it likes, and says nothing of who it is.
//!
//! A process of it dies with all that it has not put on stable storage, or leaves that to the next one. What a client has left is dropped
//! unread: real ones promise even less, and then a WRITE that failed may land later (`docs/foreign.md`).

use std::collections::VecDeque;

use fastrand::Rng;
use proto::nbd::replies::ReplyHead;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use proto::nbd::validate::RequestLimits;
use proto::nbd::{BlockSizes, ExportInfo, Negotiated, TransmissionFlags};
use server::data::session::{Action, Session};
use server::ids::RequestSlot;
use server::limits::IN_FLIGHT_REQUESTS_MAX;

use crate::block_history::BLOCK_BYTES;
use crate::lying_disk::SECTOR_BYTES;
use crate::simulator::network::{End, Link, LinkId};

/// What the server's processes have one after the other.
#[derive(Debug)]
pub(super) struct Storage {
    cached: Vec<u8>,
    stable: Vec<u8>,
}

impl Storage {
    pub(super) fn new(capacity_bytes: usize) -> Self {
        Self { cached: vec![0; capacity_bytes], stable: vec![0; capacity_bytes] }
    }

    /// What a power cut leaves.
    pub(super) fn stable(&self) -> &[u8] {
        &self.stable
    }

    fn write(&mut self, at: usize, bytes: &[u8], is_fua: bool) {
        self.cached[at..at + bytes.len()].copy_from_slice(bytes);
        if is_fua {
            self.stable[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn flush(&mut self) {
        self.stable.copy_from_slice(&self.cached);
    }

    /// A sector becomes stable that nobody asked for.
    pub(super) fn write_back(&mut self, rng: &mut Rng) {
        let at = rng.usize(..self.cached.len() / SECTOR_BYTES) * SECTOR_BYTES;
        let place = at..at + SECTOR_BYTES;
        self.stable[place.clone()].copy_from_slice(&self.cached[place]);
    }

    /// What is not stable is kept or not, sector by sector; or nothing of it is.
    pub(super) fn forget(&mut self, rng: &mut Rng) {
        let keeps_some = rng.bool();
        let sectors = self.cached.chunks_mut(SECTOR_BYTES).zip(self.stable.chunks_mut(SECTOR_BYTES));
        for (cached, stable) in sectors {
            match keeps_some && rng.bool() {
                true => stable.copy_from_slice(cached),
                false => cached.copy_from_slice(stable),
            }
        }
    }

    /// What is not stable is lost.
    pub(super) fn forget_all(&mut self) {
        self.cached.copy_from_slice(&self.stable);
    }
}

/// What a step of the server may touch.
pub(super) struct Surroundings<'a> {
    pub(super) links: &'a mut [Link],
    pub(super) storage: &'a mut Storage,
    pub(super) rng: &'a mut Rng,
    pub(super) room_bytes: usize,
}

struct Connection {
    link: LinkId,
    session: Session,
    buffers: Vec<Vec<u8>>,
    /// Requests that are done and not answered.
    done: Vec<RequestSlot>,
    output: VecDeque<u8>,
}

/// A process of the server.
pub(super) struct ForeignServer {
    connections: Vec<Connection>,
    /// It refuses what it is asked for from now on.
    is_ending: bool,
}

impl ForeignServer {
    pub(super) fn new() -> Self {
        Self { connections: Vec::new(), is_ending: false }
    }

    /// Takes a connection, if it has fewer than that; false: it is refused.
    pub(super) fn accept(&mut self, link: LinkId, connections_max: usize, links: &mut [Link]) -> bool {
        if self.connections.len() >= connections_max || self.is_ending {
            links[link].to_client.close(End::Reset);
            links[link].to_server.is_unread = true;
            return false;
        }
        let connection = Connection {
            link,
            session: Session::new(),
            buffers: vec![Vec::new(); IN_FLIGHT_REQUESTS_MAX],
            done: Vec::new(),
            output: VecDeque::new(),
        };
        self.connections.push(connection);
        true
    }

    /// It ends in order: whoever asks for something is told so.
    pub(super) fn begin_end(&mut self) {
        self.is_ending = true;
    }

    /// While it ends in order: whether all clients have left.
    pub(super) fn is_left(&self) -> Option<bool> {
        self.is_ending.then_some(self.connections.is_empty())
    }

    pub(super) fn links(&self) -> impl Iterator<Item = LinkId> {
        self.connections.iter().map(|connection| connection.link)
    }

    /// The process dies. What it has answered may be on its way for long, and of some connections nobody is told that they are over: these
    /// are given back.
    pub(super) fn die(self, links: &mut [Link], rng: &mut Rng) -> Vec<LinkId> {
        let mut untold = Vec::new();
        for connection in self.connections {
            let link = &mut links[connection.link];
            match rng.u8(..4) {
                0 => {
                    link.to_server.is_unread = true;
                    link.to_client.cut(rng.bool());
                }
                1 | 2 => {
                    link.to_server.is_unread = true;
                    link.to_client.close(End::Fin);
                    link.delay = rng.u32(..300);
                }
                _ => untold.push(connection.link),
            }
        }
        untold
    }

    /// One of the things it could do now; false: there was nothing.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> bool {
        if self.connections.is_empty() {
            return false;
        }
        let index = world.rng.usize(..self.connections.len());
        let connection = &mut self.connections[index];
        let is_left = world.links[connection.link].to_client.is_unread;
        let Some(has_parsed) = (if is_left { None } else { connection.parse(self.is_ending, world) }) else {
            let link = &mut world.links[connection.link];
            link.to_client.close(End::Reset);
            link.to_server.is_unread = true;
            self.connections.swap_remove(index);
            return true;
        };
        let has_answered = connection.answer(world.rng);
        connection.send(world) | has_answered | has_parsed
    }
}

impl Connection {
    /// Takes what has arrived; `None`: the connection is over.
    fn parse(&mut self, is_ending: bool, world: &mut Surroundings<'_>) -> Option<bool> {
        let mut has_parsed = false;
        loop {
            let pipe = &mut world.links[self.link].to_server;
            let readable = pipe.readable();
            if readable.is_empty() {
                return pipe.end().is_none().then_some(has_parsed);
            }
            if let Some((slot, missing_bytes)) = self.session.missing_payload() {
                let bytes = readable.len().min(missing_bytes as usize);
                self.buffers[usize::from(slot.0)].extend_from_slice(&readable[..bytes]);
                pipe.consume(bytes);
                has_parsed = true;
                if self.session.payload_received(bytes as u32) {
                    self.begin(slot, is_ending, world.storage);
                }
                continue;
            }
            let (used_bytes, action) = self.session.advance(readable).ok()?;
            pipe.consume(used_bytes);
            has_parsed |= used_bytes > 0;
            match action {
                Action::NextBytes => {}
                Action::NeedsBytes if pipe.is_cut_off() => return None,
                Action::NeedsBytes | Action::Paused => return Some(has_parsed),
                Action::TakePayload(slot) => self.buffers[usize::from(slot.0)].clear(),
                Action::Begin(slot) => self.begin(slot, is_ending, world.storage),
                Action::Open(_) => {
                    let (export, limits) = export(world.storage.cached.len());
                    let opened = self.session.opened(Ok((&export, limits)));
                    assert!(opened.expect("GO is answered in words"), "a GO opens");
                }
                Action::End => return None,
                Action::List | Action::StartTls => panic!("nobody here asks for that"),
            }
        }
    }

    /// Does what a request asks for. Its answer comes later.
    fn begin(&mut self, slot: RequestSlot, is_ending: bool, storage: &mut Storage) {
        if is_ending {
            return self.session.fail(slot, NbdError::Eshutdown, None);
        }
        let request = *self.session.request(slot);
        let (at, length) = (request.offset_bytes as usize, request.length_bytes as usize);
        let is_fua = request.flags.contains(CommandFlags::FUA);
        let buffer = &mut self.buffers[usize::from(slot.0)];
        match request.command {
            Command::Read => *buffer = storage.cached[at..at + length].to_vec(),
            Command::Write => storage.write(at, buffer, is_fua),
            Command::WriteZeroes | Command::Trim => storage.write(at, &vec![0; length], is_fua),
            Command::Flush => storage.flush(),
            other => panic!("nobody here asks for {other:?}"),
        }
        self.done.push(slot);
    }

    fn answer(&mut self, rng: &mut Rng) -> bool {
        let has_any = !self.done.is_empty();
        if has_any && rng.bool() {
            let slot = self.done.swap_remove(rng.usize(..self.done.len()));
            self.session.complete(slot);
        }
        has_any
    }

    fn send(&mut self, world: &mut Surroundings<'_>) -> bool {
        self.output.extend(self.session.take_output());
        let mut head = ReplyHead::default();
        while let Some(reply) = self.session.next_reply(&mut head) {
            self.output.extend(head.bytes());
            let payload = &self.buffers[usize::from(reply.slot.0)];
            self.output.extend(&payload[..reply.payload_bytes as usize]);
            self.session.reply_sent(reply.slot);
        }
        let pipe = &mut world.links[self.link].to_client;
        let room = pipe.room(world.room_bytes).min(self.output.len());
        if room > 0 {
            pipe.write(&self.output.make_contiguous()[..room]);
            self.output.drain(..room);
        }
        room > 0
    }
}

/// What is told of the export: all that a disk can use, and nothing of the server.
fn export(capacity_bytes: usize) -> (ExportInfo, RequestLimits) {
    let flags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::SEND_FUA)
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::CAN_MULTI_CONN);
    let block_sizes = BlockSizes {
        minimum_bytes: SECTOR_BYTES as u32,
        preferred_bytes: BLOCK_BYTES as u32,
        maximum_bytes: 32 << 20,
    };
    let size_bytes = capacity_bytes as u64;
    let limits = RequestLimits { size_bytes, flags, block_sizes, negotiated: Negotiated::default() };
    (ExportInfo { size_bytes, flags, block_sizes: Some(block_sizes), description: None }, limits)
}
