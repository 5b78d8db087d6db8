//! The client's replies: any server behind an honest handshake.

use std::collections::VecDeque;
use std::ops::Range;

use client::device::queue::block_request::BlockRequest;
use client::device::queue::connection::{Connection, Follows, Says};
use client::device::queue::requests::{Completion, Requests, Resend};
use client::device::queue::stream::Incoming;
use proto::nbd::transmission::{
    Command, CommandFlags, NbdError, REQUEST_BYTES, SIMPLE_REPLY_BYTES, SimpleReply,
};

use crate::split_first;

const TAGS: u16 = 4;
/// Length of every READ and WRITE, in bytes; no multiple of anything.
const LENGTH_BYTES: u32 = 11;
/// Room for what is received, in bytes; small, so that it is soon full.
const INBOX_BYTES: usize = 64;
/// What the kernel says of an operation whose predecessor stopped short (`ECANCELED`).
const CANCELED: i32 = -125;

/// A request as the block layer sees it.
#[derive(Debug, Clone, Copy, Default)]
struct InFlight {
    cookie: u64,
    is_sent: bool,
    /// The server is shutting down and has not done it.
    is_refused: bool,
    is_read: bool,
    /// How a reply said that it went.
    told: Option<Result<(), i32>>,
    /// Of a READ's payload.
    received_bytes: u32,
}

struct World {
    requests: Requests,
    connection: Connection,
    /// The server has said that it is shutting down: nothing more is sent.
    is_leaving: bool,
    incoming: Incoming,
    inbox: [u8; INBOX_BYTES],
    /// Sent by the server and not yet received.
    wire: VecDeque<u8>,
    /// Where the receive into the inbox that is out puts its bytes.
    receiving: Option<Range<usize>>,
    by_tag: [Option<InFlight>; TAGS as usize],
}

/// Each pair of bytes is a step: a kind and an argument. Kinds submit a request, or let the server send: an honest reply, an
/// error, a reply with a cookie that is a bit off, payload bytes, or any byte at all.
///
/// # Panics
/// When a request ends twice, with another result than the server told, or before all of it came; or never.
pub fn client_replies(bytes: &[u8]) {
    let (control, steps) = split_first(bytes);
    let small_bytes_max = if control & 1 == 0 { 0 } else { LENGTH_BYTES };
    let mut world = World {
        requests: Requests::new(TAGS, 1, 1),
        connection: Connection::new(0, TAGS, small_bytes_max),
        is_leaving: false,
        incoming: Incoming::default(),
        inbox: [0; INBOX_BYTES],
        wire: VecDeque::new(),
        receiving: None,
        by_tag: [None; TAGS as usize],
    };
    for step in steps.chunks_exact(2) {
        let goes_on = world.step(step[0], step[1]);
        world.take_completions();
        if !goes_on {
            break;
        }
    }
    world.end();
}

impl World {
    /// False: the peer broke the protocol.
    fn step(&mut self, kind: u8, argument: u8) -> bool {
        let tag = u16::from(argument) % TAGS;
        let cookie = self.by_tag[usize::from(tag)].map_or(u64::from(argument), |request| request.cookie);
        match kind % 8 {
            0 | 1 => {
                self.submit(tag, [Command::Read, Command::Write, Command::Flush][usize::from(kind) / 8 % 3]);
                true
            }
            2 => self.receive(&SimpleReply { error: 0, cookie }.encode()),
            3 => {
                let error = if kind < 128 { u32::from(kind) } else { NbdError::Eshutdown as u32 };
                self.receive(&SimpleReply { error, cookie }.encode())
            }
            4 => self.receive(&SimpleReply { error: 0, cookie: cookie ^ 1 << (argument % 64) }.encode()),
            5 => self.receive(&[0xaa; 12][..usize::from(argument) % 13]),
            6 => self.receive(
                &SimpleReply { error: 0, cookie }.encode()
                    [..usize::from(argument) % (SIMPLE_REPLY_BYTES + 1)],
            ),
            _ => self.receive(&[argument]),
        }
    }

    fn submit(&mut self, tag: u16, command: Command) {
        let place = &mut self.by_tag[usize::from(tag)];
        if place.is_some() {
            return;
        }
        let is_read = command == Command::Read;
        *place = Some(InFlight { is_read, ..InFlight::default() });
        let length_bytes = if command == Command::Flush { 0 } else { LENGTH_BYTES };
        let request = BlockRequest { command, flags: CommandFlags::NONE, offset_bytes: 0, length_bytes };
        self.connection.submit(&mut self.requests, tag, request);
        if self.is_leaving {
            // It waits for the next connection.
            return;
        }
        let (mut outbox, mut pieces) = ([0; 1024], Vec::new());
        let no_payload = |_, _: &mut [u8]| Ok(());
        let gathered =
            self.connection.take_batch(&mut self.requests, &mut outbox, &mut pieces, 16, no_payload);
        gathered.unwrap_or_else(|(): ()| unreachable!("nothing can fail"));
        // A single request, whose header comes first.
        let header = &outbox[..REQUEST_BYTES];
        let cookie = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
        if let Some(request) = &mut self.by_tag[usize::from(tag)] {
            (request.cookie, request.is_sent) = (cookie, true);
        }
        self.connection.batch_sent(&mut self.requests);
    }

    /// Lets the stream bring `bytes`, as the queue's loop does; false: the peer broke the protocol.
    fn receive(&mut self, bytes: &[u8]) -> bool {
        self.wire.extend(bytes);
        while !self.wire.is_empty() {
            let Some(place) = self.receiving.take() else {
                self.start_receiving();
                continue;
            };
            let count = self.wire.len().min(place.len());
            for (to, byte) in self.inbox[place].iter_mut().zip(self.wire.drain(..count)) {
                *to = byte;
            }
            self.incoming.inbox_completed(count as i32).expect("no more than was asked for");
            if !self.parse() {
                return false;
            }
        }
        true
    }

    /// A receive into the inbox, behind one of the payload that is missing, if any.
    fn start_receiving(&mut self) {
        let (payload, place) = self.incoming.push(INBOX_BYTES);
        self.receiving = Some(place);
        let Some((tag, stretch)) = payload else { return };
        let count = self.wire.len().min(stretch.rest_bytes() as usize);
        self.wire.drain(..count);
        let is_all = self.incoming.payload_completed(count as i32).expect("no more than was asked for");
        self.payload_came(tag, count, is_all);
        if !is_all {
            self.receiving = None;
            self.incoming.inbox_completed(CANCELED).expect("what is linked behind a short one is cancelled");
        }
    }

    /// Takes every whole reply out of the inbox; false: the peer broke the protocol.
    fn parse(&mut self) -> bool {
        while let Some(place) = self.incoming.take_header() {
            let header: [u8; SIMPLE_REPLY_BYTES] = self.inbox[place].try_into().expect("a whole header");
            let received = self.connection.header_received(&mut self.requests, &header);
            let Ok((follows, says)) = received else { return false };
            self.is_leaving |= says == Says::Leaving;
            let reply = SimpleReply::decode(&header).expect("the connection could decode it");
            let of = |request: &&mut InFlight| request.is_sent && request.cookie == reply.cookie;
            let asked = self.by_tag.iter_mut().flatten().find(of).expect("a reply to nothing is accepted");
            assert!(asked.told.is_none() && !asked.is_refused, "a second reply is accepted");
            assert_eq!(asked.received_bytes, 0, "a second payload is accepted");
            match follows {
                Follows::Header if reply.error == NbdError::Eshutdown as u32 => asked.is_refused = true,
                Follows::Header => {
                    assert!(!asked.is_read || reply.error != 0, "a READ without its payload");
                    let errno = NbdError::errno_from_wire(reply.error);
                    asked.told = Some(if reply.error == 0 { Ok(()) } else { Err(errno) });
                }
                Follows::Payload { tag, len_bytes } => {
                    assert!(asked.is_read && len_bytes == LENGTH_BYTES);
                    let (here, is_all) = self.incoming.take_payload(tag, len_bytes);
                    self.payload_came(tag, here.len(), is_all);
                }
            }
        }
        let left = self.incoming.compact();
        self.inbox.copy_within(left, 0);
        let is_left = self.is_leaving && !self.requests.are_owed_replies();
        let is_owed = |request: &InFlight| request.is_sent && request.told.is_none() && !request.is_refused;
        assert!(!is_left || !self.by_tag.iter().flatten().any(is_owed), "a server that owes replies is left");
        !is_left
    }

    fn payload_came(&mut self, tag: u16, count: usize, is_all: bool) {
        let request = self.by_tag[usize::from(tag)].as_mut().expect("a payload of nothing");
        request.received_bytes += count as u32;
        assert_eq!(is_all, request.received_bytes == LENGTH_BYTES);
        if is_all {
            request.told = Some(Ok(()));
            self.connection.payload_received(&mut self.requests, tag);
        }
    }

    fn take_completions(&mut self) {
        while let Some(Completion { tag, result }) = self.requests.take_completion() {
            let request = self.by_tag[usize::from(tag)].take().expect("a request ended twice");
            assert_eq!(request.told, Some(result), "tag {tag} ended in another way than the server told");
        }
    }

    /// The connection breaks: what is left fails, and nothing is lost.
    fn end(mut self) {
        self.take_completions();
        self.connection.lost(&mut self.requests, Resend::Nothing);
        while let Some(Completion { tag, result }) = self.requests.take_completion() {
            let request = self.by_tag[usize::from(tag)].take().expect("a request ended twice");
            assert!(request.is_sent && !request.is_refused, "what was not done waits");
            assert_eq!(result, request.told.unwrap_or(Err(NbdError::Eio as i32)));
        }
        self.connection.give_up(&mut self.requests);
        while let Some(Completion { tag, result }) = self.requests.take_completion() {
            self.by_tag[usize::from(tag)].take().expect("a request ended twice");
            assert_eq!(result, Err(NbdError::Eio as i32));
        }
        assert!(self.by_tag.iter().all(Option::is_none), "a request never ended");
    }
}
