//! The client's replies: any server behind an honest handshake, and a whole queue of the device in front of it.
//!
//! The queue's rules (`QueueCore`) run as in the product, over operations that exist only here (`queue_io.rs`). What a request may end
//! with, a second reading of the server's bytes says, which knows nothing of how the queue receives them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use client::device::queue::block_request::BlockRequest;
use client::device::queue::connection::Origin;
use client::device::queue::core::{QueueCore, QueueSpec};
use client::device::queue::link::{LinkEvent, Loss};
use client::device::queue::requests::Resend;
use client::device::queue::unflushed::Unflushed;
use proto::nbd::transmission::{
    Command, CommandFlags, NbdError, REQUEST_BYTES, Request, SIMPLE_REPLY_BYTES, SimpleReply,
};

use crate::queue_io::{Io, PAYLOAD_BYTE, Wire, go_on};
use crate::split_first;

const TAGS: u16 = 4;
/// Length of every READ and WRITE, in bytes; no multiple of anything.
const LENGTH_BYTES: u32 = 11;
/// More passes than any step can make.
const PASSES_MAX: u32 = 10_000;
const EIO: i32 = NbdError::Eio as i32;

/// A request as the block layer sees it.
#[derive(Debug, Clone)]
struct InFlight {
    command: Command,
    /// As the server saw it last, and on which connection; `None`: not on these connections.
    sent: Option<(u16, u64)>,
    /// The server is shutting down and has not done it.
    is_refused: bool,
    /// How a reply said that it went, and a READ's payload so far.
    told: Option<Result<(), i32>>,
    payload: Vec<u8>,
    /// It may end with EIO whatever the server said.
    may_fail: bool,
}

/// What comes next of a connection's bytes, as the protocol has it.
#[derive(Debug, Clone, Default)]
struct Reader {
    header: Vec<u8>,
    /// Whose payload.
    payload_of: Option<u16>,
    /// The queue's own request on it that waits for a reply.
    ping: Option<u64>,
    /// The server has broken the protocol.
    is_broken: bool,
}

struct World {
    core: QueueCore,
    io: Io,
    now: Instant,
    resend: Resend,
    readers: Vec<Reader>,
    by_tag: [Option<InFlight>; TAGS as usize],
    /// No connection is there, and none is wanted: what is asked for ends with EIO.
    is_given_up: bool,
    /// A FLUSH cannot tell any more what was lost.
    has_lost_connections: bool,
}

/// The first byte says how the queue is made: small payloads, what is sent again, one connection or two, a write cache, and where
/// payloads are sent from. Each pair of bytes behind it is a step: a kind and an argument. Kinds submit a request, or let the server
/// send: an honest reply, an error, a reply with a cookie that is a bit off, payload bytes, or any byte at all; or else connections break,
/// come back, are left or given up, and time passes.
///
/// # Panics
/// When a request ends twice, with another result than the server told, with other data, or before all of it came; or never; when
/// what leaves is no request, and when a server that broke the protocol is believed, or one that owes replies is left.
pub fn client_replies(bytes: &[u8]) {
    let (control, steps) = split_first(bytes);
    let mut world = World::new(control);
    for step in steps.chunks_exact(2) {
        world.step(step[0], step[1]);
        world.run();
    }
    world.end();
}

impl World {
    fn new(control: u8) -> Self {
        let has = |bit: u8| control & bit != 0;
        let resend = if has(2) { Resend::ReadsOnly } else { Resend::Everything };
        let nr_connections = if has(4) { 2 } else { 1 };
        let now = Instant::now();
        let spec = QueueSpec {
            queue_id: 0,
            queue_depth: TAGS,
            nr_connections,
            small_bytes_max: if has(1) { LENGTH_BYTES } else { 0 },
            volatile_cache: has(8),
            resend,
            reply_timeout: Duration::from_secs(20),
            unflushed: Arc::new(Unflushed::new(1)),
        };
        let io = Io {
            wires: (0..nr_connections).map(|_| Wire::new()).collect(),
            pages: vec![vec![0; LENGTH_BYTES as usize]; usize::from(TAGS)],
            commits: Vec::new(),
            origin: if has(16) { Origin::Staging } else { Origin::Pages },
        };
        let mut world = Self {
            core: QueueCore::new(spec, now),
            io,
            now,
            resend,
            readers: vec![Reader::default(); usize::from(nr_connections)],
            by_tag: std::array::from_fn(|_| None),
            is_given_up: false,
            has_lost_connections: false,
        };
        world.core.start(&mut world.io);
        world
    }

    fn step(&mut self, kind: u8, argument: u8) {
        let tag = u16::from(argument) % TAGS;
        let sent = self.by_tag[usize::from(tag)].as_ref().and_then(|request| request.sent);
        let any = u16::from(argument >> 7) % self.readers.len() as u16;
        let (connection, cookie) = sent.unwrap_or((any, u64::from(argument)));
        let reply = |error, cookie| SimpleReply { error, cookie }.encode();
        match kind % 8 {
            0 | 1 => {
                self.submit(tag, [Command::Read, Command::Write, Command::Flush][usize::from(kind) / 8 % 3]);
            }
            2 if kind >= 128 => {
                // What follows in the same stretch, whether it is asked for or not.
                let more = usize::from(argument >> 2) % (LENGTH_BYTES as usize + 3);
                self.server_sends(connection, &[&reply(0, cookie)[..], &vec![argument; more]].concat());
            }
            2 => self.server_sends(connection, &reply(0, cookie)),
            3 => {
                let error = if kind < 128 { u32::from(kind) } else { NbdError::Eshutdown as u32 };
                self.server_sends(connection, &reply(error, cookie));
            }
            4 => self.server_sends(any, &reply(0, cookie ^ 1 << (argument % 64))),
            5 if argument.is_multiple_of(13) => self.something_else(argument / 13, any),
            5 => self.server_sends(any, &[0xaa; 12][..usize::from(argument) % 13]),
            6 => {
                let bytes = usize::from(argument) % (SIMPLE_REPLY_BYTES + 1);
                self.server_sends(connection, &reply(0, cookie)[..bytes]);
            }
            _ => self.server_sends(any, &[argument]),
        }
    }

    fn something_else(&mut self, what: u8, connection: u16) {
        match what % 8 {
            0 => self.io.wires[usize::from(connection)].is_shut_down = true,
            1 | 2 => self.connect(),
            3 => {
                self.now += Duration::from_secs(1);
                self.core.handle_tick(&mut self.io);
            }
            4 => self.core.disconnect(&mut self.io, "the main thread says so".to_owned()),
            5 => self.give_up(),
            _ => {
                if let Some(cookie) = self.readers[usize::from(connection)].ping {
                    self.server_sends(
                        connection,
                        &SimpleReply { error: NbdError::Einval as u32, cookie }.encode(),
                    );
                }
            }
        }
    }

    fn submit(&mut self, tag: u16, command: Command) {
        let place = &mut self.by_tag[usize::from(tag)];
        if place.is_some() {
            return;
        }
        let is_doubtful = command == Command::Flush && self.has_lost_connections;
        *place = Some(InFlight {
            command,
            sent: None,
            is_refused: false,
            told: None,
            payload: Vec::new(),
            may_fail: self.is_given_up || is_doubtful,
        });
        let length_bytes = if command == Command::Flush { 0 } else { LENGTH_BYTES };
        let request = BlockRequest { command, flags: CommandFlags::NONE, offset_bytes: 0, length_bytes };
        self.core.handle_request(&mut self.io, tag, Ok(request));
    }

    fn connect(&mut self) {
        if self.core.is_up() || self.core.has_operations_out() {
            return;
        }
        self.is_given_up = false;
        self.readers.fill(Reader::default());
        for request in self.by_tag.iter_mut().flatten() {
            (request.sent, request.is_refused, request.told) = (None, false, None);
            request.payload.clear();
        }
        let sockets = vec![(); self.readers.len()];
        self.core.connect(&mut self.io, sockets, self.now).expect("nothing fails here");
    }

    fn give_up(&mut self) {
        self.core.give_up();
        if !self.core.is_up() {
            self.is_given_up = true;
            self.all_may_fail(|_| true);
        }
    }

    fn all_may_fail(&mut self, which: impl Fn(&InFlight) -> bool) {
        for request in self.by_tag.iter_mut().flatten().filter(|request| which(request)) {
            request.may_fail = true;
        }
    }

    // ------------------------------------------------------------------------------------------ what the server says

    fn server_sends(&mut self, connection: u16, bytes: &[u8]) {
        let is_heard = self.core.is_up() && !self.io.wires[usize::from(connection)].is_shut_down;
        if !is_heard {
            return;
        }
        self.io.wires[usize::from(connection)].coming.extend(bytes);
        for byte in bytes {
            self.read_byte(connection, *byte);
        }
    }

    /// What the protocol makes of it.
    fn read_byte(&mut self, connection: u16, byte: u8) {
        let reader = &mut self.readers[usize::from(connection)];
        if reader.is_broken {
            return;
        }
        if let Some(tag) = reader.payload_of {
            let request = self.by_tag[usize::from(tag)].as_mut().expect("its payload is still coming");
            request.payload.push(byte);
            if request.payload.len() == LENGTH_BYTES as usize {
                (reader.payload_of, request.told) = (None, Some(Ok(())));
            }
            return;
        }
        reader.header.push(byte);
        if reader.header.len() < SIMPLE_REPLY_BYTES {
            return;
        }
        let header: [u8; SIMPLE_REPLY_BYTES] = reader.header.as_slice().try_into().expect("a whole header");
        reader.header.clear();
        let decoded = SimpleReply::decode(&header).ok();
        if let Some(cookie) = reader.ping
            && decoded.as_ref().is_some_and(|reply| reply.cookie == cookie)
        {
            reader.ping = None;
            return;
        }
        let waiting = |request: &InFlight| request.told.is_none() && !request.is_refused;
        let asked = decoded.and_then(|reply| {
            let is_it =
                |request: &InFlight| request.sent == Some((connection, reply.cookie)) && waiting(request);
            let tag = self.by_tag.iter().position(|request| request.as_ref().is_some_and(is_it))?;
            Some((tag, reply.error))
        });
        let Some((tag, error)) = asked else {
            reader.is_broken = true;
            // Whatever else it has said on this connection may be wrong, too.
            let is_there = |request: &InFlight| request.sent.is_some_and(|(place, _)| place == connection);
            return self.all_may_fail(is_there);
        };
        let Some(request) = &mut self.by_tag[tag] else { return };
        if error == NbdError::Eshutdown as u32 {
            request.is_refused = true;
        } else if error != 0 {
            request.told = Some(Err(NbdError::errno_from_wire(error)));
        } else if request.command == Command::Read {
            reader.payload_of = Some(tag as u16);
        } else {
            request.told = Some(Ok(()));
        }
    }

    // ------------------------------------------------------------------------------------------ what the queue does

    /// Until nothing goes on any more.
    fn run(&mut self) {
        for pass in 0.. {
            assert!(pass < PASSES_MAX, "the queue never rests");
            let mut has_done = false;
            for connection in 0..self.readers.len() as u16 {
                has_done |= go_on(&mut self.core, &mut self.io, connection);
            }
            let now = self.now;
            self.note_losses();
            self.core.end_of_pass(&mut self.io, || now);
            self.look_at_what_leaves();
            self.take_commits();
            self.take_events();
            if !has_done && !self.core.looks_again() {
                break;
            }
        }
        let is_broken = self.readers.iter().any(|reader| reader.is_broken);
        assert!(!is_broken || !self.core.is_up(), "a server that broke the protocol is believed");
    }

    /// What was sent on connections that are lost may fail, where the server promises nothing.
    fn note_losses(&mut self) {
        if self.core.is_up() {
            return;
        }
        if self.resend == Resend::ReadsOnly {
            self.has_lost_connections = true;
            let flushes_or_sent =
                |request: &InFlight| request.command == Command::Flush || request.sent.is_some();
            self.all_may_fail(|request| request.command != Command::Read && flushes_or_sent(request));
        }
    }

    /// Whole requests leave, one after the other, for tags that wait.
    fn look_at_what_leaves(&mut self) {
        for (connection, wire) in (0u16..).zip(&mut self.io.wires) {
            while let Some(header) = wire.leaving.first_chunk::<REQUEST_BYTES>() {
                let request = Request::decode(header).expect("a request leaves");
                let payload_bytes =
                    if request.command == Command::Write { request.length_bytes as usize } else { 0 };
                if wire.leaving.len() < REQUEST_BYTES + payload_bytes {
                    break;
                }
                let payload: Vec<u8> =
                    wire.leaving.drain(..REQUEST_BYTES + payload_bytes).skip(REQUEST_BYTES).collect();
                assert!(payload.iter().all(|byte| *byte == PAYLOAD_BYTE), "another payload leaves");
                let tag = usize::from(request.cookie as u16);
                let Some(Some(known)) = self.by_tag.get_mut(tag) else {
                    self.readers[usize::from(connection)].ping = Some(request.cookie);
                    continue;
                };
                assert_eq!(known.command, request.command, "another request leaves");
                assert_eq!(known.sent, None, "a request is sent twice");
                known.sent = Some((connection, request.cookie));
            }
        }
    }

    fn take_commits(&mut self) {
        for (tag, result) in std::mem::take(&mut self.io.commits) {
            let request = self.by_tag[usize::from(tag)].take().expect("a request ended twice");
            if result < 0 && request.may_fail && result == -EIO {
                continue;
            }
            let told = request
                .told
                .unwrap_or_else(|| panic!("tag {tag} ended with {result} before it was told: {request:?}"));
            assert_eq!(
                result.min(0),
                told.err().map_or(0, |errno| -errno),
                "tag {tag} ended in another way than told"
            );
            if request.command == Command::Read && result > 0 {
                assert_eq!(result as u32, LENGTH_BYTES);
                assert_eq!(self.io.pages[usize::from(tag)], request.payload, "tag {tag} read something else");
            }
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.core.take_event() {
            let LinkEvent::Disconnected(lost) = event else { continue };
            let is_broken = self.readers.iter().any(|reader| reader.is_broken);
            match lost.loss {
                Loss::Protocol(error) => assert!(is_broken, "an honest server is left: {error}"),
                Loss::Leaving => {
                    let is_owed = |request: &InFlight| {
                        request.sent.is_some() && request.told.is_none() && !request.is_refused
                    };
                    assert!(!self.by_tag.iter().flatten().any(is_owed), "a server that owes replies is left");
                }
                _ => {}
            }
        }
    }

    /// The connections break, and nobody is to wait any more: nothing is lost, and nothing ends before that without a reason.
    fn end(mut self) {
        self.core.disconnect(&mut self.io, "the end".to_owned());
        self.run();
        self.give_up();
        self.run();
        assert!(self.by_tag.iter().all(Option::is_none), "a request never ended");
    }
}
