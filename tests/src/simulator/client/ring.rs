//! What stands for a queue's ring: operations on sockets and pages, which are out until the world lets them go on, byte by byte if it
//! likes. No rule is here: what to do, and what comes of it, `QueueCore` says.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::time::Duration;

use client::device::queue::connection::{Origin, PayloadSource};
use client::device::queue::core::QueueCore;
use client::device::queue::io::{Pages, QueueIo};
use client::device::queue::stream::Stretch;
use client::device::queue::unflushed::Unflushed;
use fastrand::Rng;
use proto::nbd::transmission::{Command, SIMPLE_REPLY_BYTES};

use super::bio::{Bio, EndedBio};
use super::spec::Origins;
use crate::simulator::coverage::Coverage;
use crate::simulator::network::{End, Link, LinkId};

const INBOX_BYTES: usize = 1024;
const OUTBOX_BYTES: usize = 16 << 10;
/// What the kernel says of an operation behind one that stopped short.
const CANCELED: i32 = -rustix::io::Errno::CANCELED.raw_os_error();
const PIPE: i32 = -rustix::io::Errno::PIPE.raw_os_error();

/// An operation on a socket that is out.
#[derive(Debug, Clone, Copy)]
pub(super) enum Receive {
    Payload(Pages),
    Inbox(usize, usize),
}

#[derive(Debug, Clone, Copy)]
enum Send {
    Outbox { start: usize, rest: Stretch },
    Payload(Pages),
}

impl Receive {
    fn wanted(&self) -> usize {
        match self {
            Self::Payload(pages) => pages.rest.rest_bytes() as usize,
            Self::Inbox(start, end) => end - start,
        }
    }
}

impl Send {
    /// Whose pages it names, if any.
    fn tag(&self) -> Option<u16> {
        match self {
            Self::Outbox { .. } => None,
            Self::Payload(pages) => Some(pages.tag),
        }
    }

    fn rest(&self) -> Stretch {
        match self {
            Self::Outbox { rest, .. } => *rest,
            Self::Payload(pages) => pages.rest,
        }
    }
}

/// A request that the queue has given back, and of which nobody knows before the ring is entered the next time.
#[derive(Debug)]
pub(super) struct GivenBack {
    tag: u16,
    result: Result<(), i32>,
    was_lost: bool,
}

/// A connection's socket, its memory, and what is out on it.
pub(super) struct Wire {
    pub(super) link: Option<LinkId>,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    pub(super) receives: VecDeque<Receive>,
    sends: VecDeque<Send>,
    waits_for_room: bool,
}

pub(super) struct BioSource<'a> {
    bios: &'a [Option<Bio>],
    origins: Origins,
}

impl PayloadSource for BioSource<'_> {
    type Error = io::Error;

    fn gather(&mut self, tag: u16, payload: &mut [u8]) -> Result<(), Self::Error> {
        let bio = self.bios[usize::from(tag)].as_ref().expect("it is in flight");
        payload.copy_from_slice(&bio.data);
        Ok(())
    }

    fn stage(&mut self, tag: u16, _: u32) -> Result<Option<Origin>, Self::Error> {
        Ok(Some(self.origins.of(tag)))
    }
}

/// What a queue's core is given for its ring.
pub(super) struct Io<'a> {
    pub(super) wires: &'a mut [Wire],
    /// Receives into pages that nobody waits for any more.
    pub(super) forgotten: &'a mut Vec<(LinkId, Pages)>,
    pub(super) links: &'a mut Vec<Link>,
    /// By tag.
    pub(super) bios: &'a mut [Option<Bio>],
    pub(super) given_back: &'a mut Vec<GivenBack>,
    /// By tag: how often the queue had lost its connections when the request came.
    pub(super) came_after: &'a mut [u64],
    /// How often it has.
    pub(super) losses: &'a mut u64,
    pub(super) ended: &'a mut Vec<EndedBio>,
    pub(super) rng: &'a mut Rng,
    pub(super) coverage: &'a mut Coverage,
    pub(super) room_bytes: usize,
    pub(super) origins: Origins,
    /// By tag: what the header of a reply is made to carry, for [`Mutant::TagOnlyCookie`].
    pub(super) cookies: Option<Vec<u64>>,
    /// The counters of the device, and of a FLUSH, for [`Mutant::FlushCoversTooMuch`].
    pub(super) covers_too_much: Option<(&'a Unflushed, Vec<u64>)>,
    /// The counters of the device, for [`Mutant::FlushTellsOfAll`].
    pub(super) tells_of_all: Option<&'a Unflushed>,
    /// Tags of replies that tell of success, for [`Mutant::FlushBelieved`].
    pub(super) believed: Option<&'a RefCell<Vec<u16>>>,
    pub(super) has_sent: bool,
}

impl QueueIo for Io<'_> {
    type Socket = LinkId;
    type Source<'a>
        = BioSource<'a>
    where
        Self: 'a;

    fn fetch(&mut self, _: u16) {}

    fn commit_and_fetch(&mut self, tag: u16, result: i32) {
        let command = self.bios[usize::from(tag)].as_ref().expect("it is in flight").request.command;
        if let Some((unflushed, covered)) = &mut self.covers_too_much
            && command == Command::Flush
            && result == 0
        {
            unflushed.flush_begins(covered);
            let _ = unflushed.flush_succeeded(covered);
        }
        let is_failed_flush = command == Command::Flush && result < 0;
        if let Some(unflushed) = self.tells_of_all.filter(|_| is_failed_flush) {
            unflushed.fails_flush(unflushed.losses());
        }
        let is_believed = self.believed.is_some_and(|believed| {
            let mut believed = believed.borrow_mut();
            let before = believed.len();
            believed.retain(|other| *other != tag);
            believed.len() < before
        });
        let result = if is_failed_flush && is_believed { 0 } else { result };
        let result = if result < 0 { Err(-result) } else { Ok(()) };
        let was_lost = *self.losses > self.came_after[usize::from(tag)];
        self.given_back.push(GivenBack { tag, result, was_lost });
        self.has_sent = true;
    }

    fn submit(&mut self) -> io::Result<()> {
        hand_over(self.given_back, self.bios, self.ended);
        Ok(())
    }

    fn needs_registration(&self, _: u16) -> bool {
        false
    }

    fn register(&mut self, _: u16) {}

    fn unregister(&mut self, _: u16) {}

    fn release(&mut self, _: u16, _: bool) {}

    fn copy_to_request(&mut self, _: u16, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn inbox_bytes(&self) -> usize {
        INBOX_BYTES
    }

    fn header(&self, connection: u16, place: Range<usize>) -> [u8; SIMPLE_REPLY_BYTES] {
        let mut header = [0; SIMPLE_REPLY_BYTES];
        header.copy_from_slice(&self.wires[usize::from(connection)].inbox[place]);
        if let Some(cookies) = &self.cookies {
            let tag = usize::from(u16::from_be_bytes([header[14], header[15]]));
            let cookie = cookies.get(tag).copied().unwrap_or_default();
            header[8..].copy_from_slice(&cookie.to_be_bytes());
        }
        if let Some(believed) = self.believed.filter(|_| header[4..8] == [0; 4]) {
            believed.borrow_mut().push(u16::from_be_bytes([header[14], header[15]]));
        }
        header
    }

    fn scatter(&mut self, connection: u16, place: Range<usize>, tag: u16) -> io::Result<()> {
        let bio = self.bios[usize::from(tag)].as_mut().expect("it is in flight");
        bio.data[..place.len()].copy_from_slice(&self.wires[usize::from(connection)].inbox[place]);
        Ok(())
    }

    fn compact_inbox(&mut self, connection: u16, left: Range<usize>) {
        self.wires[usize::from(connection)].inbox.copy_within(left, 0);
    }

    fn receive_inbox(&mut self, connection: u16, part: Range<usize>, _: bool) {
        self.wires[usize::from(connection)].receives.push_back(Receive::Inbox(part.start, part.end));
    }

    fn receive_payload(&mut self, connection: u16, pages: Pages) {
        self.wires[usize::from(connection)].receives.push_back(Receive::Payload(pages));
    }

    fn outbox(&mut self, connection: u16) -> (&mut [u8], Self::Source<'_>) {
        let source = BioSource { bios: self.bios, origins: self.origins };
        (&mut self.wires[usize::from(connection)].outbox, source)
    }

    fn send_outbox_now(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) -> io::Result<u32> {
        self.send_now(connection, Send::Outbox { start, rest })
    }

    fn send_staged_now(&mut self, connection: u16, tag: u16, rest: Stretch) -> io::Result<u32> {
        self.send_now(connection, Send::Payload(Pages { tag, by_hand: false, rest }))
    }

    fn wait_for_room(&mut self, connection: u16) {
        self.wires[usize::from(connection)].waits_for_room = true;
    }

    fn send_outbox(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) {
        self.wires[usize::from(connection)].sends.push_back(Send::Outbox { start, rest });
        self.has_sent = true;
    }

    fn send_payload(&mut self, connection: u16, pages: Pages, _: bool) {
        self.wires[usize::from(connection)].sends.push_back(Send::Payload(pages));
        self.has_sent = true;
    }

    fn shut_down(&mut self, connection: u16) {
        *self.losses += 1;
        if let Some(link) = self.wires[usize::from(connection)].link {
            abandon(&mut self.links[link], self.rng);
        }
    }

    fn take_control_record(&mut self, _: u16) -> Option<String> {
        None
    }

    fn unacknowledged_for(&self, _: u16) -> Option<Duration> {
        None
    }

    fn are_keys_worn(&self, _: u16) -> bool {
        false
    }

    fn drop_references(&mut self, connection: u16) {
        self.wires[usize::from(connection)].link = None;
    }

    fn renew_staging(&mut self) {}

    fn replace_socket(&mut self, connection: u16, link: LinkId) -> io::Result<()> {
        let wire = &mut self.wires[usize::from(connection)];
        assert!(wire.receives.is_empty() && wire.sends.is_empty() && !wire.waits_for_room, "it is in use");
        wire.link = Some(link);
        Ok(())
    }
}

/// The ring is entered: who waits for what was given back knows of it. False: there was nothing.
pub(super) fn hand_over(
    given_back: &mut Vec<GivenBack>,
    bios: &mut [Option<Bio>],
    ended: &mut Vec<EndedBio>,
) -> bool {
    let has_any = !given_back.is_empty();
    for GivenBack { tag, result, was_lost } in given_back.drain(..) {
        let bio = bios[usize::from(tag)].take().expect("it was in flight");
        ended.push(EndedBio { bio, result, was_lost });
    }
    has_any
}

impl Io<'_> {
    /// A request comes to the queue.
    pub(super) fn request_comes(&mut self, tag: u16) {
        self.came_after[usize::from(tag)] = *self.losses;
    }

    /// What the socket takes at once.
    fn send_now(&mut self, connection: u16, send: Send) -> io::Result<u32> {
        let room = self.room(connection).ok_or(io::ErrorKind::BrokenPipe)?;
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.has_sent = true;
        Ok(self.send_part(connection, send, room) as u32)
    }

    /// How much the socket takes; `None`: it is no use any more.
    fn room(&self, connection: u16) -> Option<usize> {
        let link = self.wires[usize::from(connection)].link?;
        let pipe = &self.links[link].to_server;
        pipe.is_open().then(|| pipe.room(self.room_bytes))
    }

    /// Moves some of it, at most `room` bytes: how many.
    fn send_part(&mut self, connection: u16, send: Send, room: usize) -> usize {
        let wire = &self.wires[usize::from(connection)];
        let Some(link) = wire.link else { return 0 };
        let rest = send.rest();
        let bytes = part(room.min(rest.rest_bytes() as usize), self.rng);
        let from = rest.done_bytes() as usize..rest.done_bytes() as usize + bytes;
        let pipe = &mut self.links[link].to_server;
        match send {
            Send::Outbox { start, .. } => pipe.write(&wire.outbox[start..][from]),
            // The pages as they are now.
            Send::Payload(Pages { tag, .. }) => match &self.bios[usize::from(tag)] {
                Some(bio) => pipe.write(&bio.data[from]),
                None => panic!("pages of a request that has ended are being sent"),
            },
        }
        bytes
    }
}

/// An operation that sends goes on; false: none can.
pub(super) fn send_step(core: &mut QueueCore, io: &mut Io<'_>, connection: u16) -> bool {
    let room = io.room(connection);
    let wire = &mut io.wires[usize::from(connection)];
    if room == Some(0) {
        return false;
    }
    if std::mem::take(&mut wire.waits_for_room) {
        core.handle_room(connection);
        return true;
    }
    let Some(send) = wire.sends.pop_front() else { return false };
    let result = room.map_or(PIPE, |room| io.send_part(connection, send, room) as i32);
    core.handle_sent(io, connection, send.tag(), result);
    if result != send.rest().rest_bytes() as i32 {
        let behind: Vec<Send> = io.wires[usize::from(connection)].sends.drain(..).collect();
        for send in behind {
            core.handle_sent(io, connection, send.tag(), CANCELED);
        }
    }
    true
}

/// An operation that receives goes on; false: none can.
pub(super) fn receive_step(core: &mut QueueCore, io: &mut Io<'_>, connection: u16) -> bool {
    let wire = &mut io.wires[usize::from(connection)];
    let (Some(link), Some(receive)) = (wire.link, wire.receives.front().copied()) else {
        return false;
    };
    let pipe = &mut io.links[link].to_client;
    let readable = pipe.readable();
    // Shut down by this side, it gives what has arrived, or nothing.
    let is_over = pipe.end().is_some() || pipe.is_unread && (readable.is_empty() || io.rng.bool());
    if readable.is_empty() && !is_over {
        return false;
    }
    wire.receives.pop_front();
    let wanted = receive.wanted();
    let bytes = if is_over { 0 } else { part(readable.len().min(wanted), io.rng) };
    let brought = &readable[..bytes];
    if bytes > 0 && !core.is_up() {
        io.coverage.count("bytes come after a loss");
    }
    match receive {
        Receive::Payload(Pages { tag, rest, .. }) => {
            if let Some(bio) = &mut io.bios[usize::from(tag)] {
                let start = rest.done_bytes() as usize;
                bio.data[start..start + bytes].copy_from_slice(brought);
            }
            pipe.consume(bytes);
            core.handle_payload(io, connection, tag, bytes as i32);
            let wire = &mut io.wires[usize::from(connection)];
            if bytes < wanted
                && let Some(Receive::Inbox(..)) = wire.receives.pop_front()
            {
                core.handle_inbox(io, connection, CANCELED);
            }
        }
        Receive::Inbox(start, _) => {
            wire.inbox[start..start + bytes].copy_from_slice(brought);
            pipe.consume(bytes);
            core.handle_inbox(io, connection, bytes as i32);
        }
    }
    true
}

/// Every operation that is out is said to have ended, though its bytes may still come.
pub(super) fn forget_operations(core: &mut QueueCore, io: &mut Io<'_>) {
    for connection in 0..io.wires.len() as u16 {
        let wire = &mut io.wires[usize::from(connection)];
        let (link, waited_for_room) = (wire.link, std::mem::take(&mut wire.waits_for_room));
        let receives: Vec<Receive> = wire.receives.drain(..).collect();
        let sends: Vec<Send> = wire.sends.drain(..).collect();
        for receive in receives {
            match receive {
                Receive::Payload(pages) => {
                    io.forgotten.extend(link.map(|link| (link, pages)));
                    core.handle_payload(io, connection, pages.tag, CANCELED);
                }
                Receive::Inbox(..) => core.handle_inbox(io, connection, CANCELED),
            }
        }
        for send in sends {
            core.handle_sent(io, connection, send.tag(), CANCELED);
        }
        if waited_for_room {
            core.handle_room(connection);
        }
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            link: None,
            inbox: vec![0; INBOX_BYTES],
            outbox: vec![0; OUTBOX_BYTES],
            receives: VecDeque::new(),
            sends: VecDeque::new(),
            waits_for_room: false,
        }
    }
}

/// A receive that nobody waits for any more brings bytes into the pages it was for.
pub(super) fn forgotten_step(io: &mut Io<'_>) -> bool {
    let index = io.rng.usize(..io.forgotten.len());
    let (link, Pages { tag, rest, .. }) = io.forgotten[index];
    let pipe = &mut io.links[link].to_client;
    if pipe.readable().is_empty() {
        return false;
    }
    io.forgotten.swap_remove(index);
    let bytes = pipe.readable().len().min(rest.rest_bytes() as usize);
    if let Some(bio) = &mut io.bios[usize::from(tag)] {
        let start = rest.done_bytes() as usize;
        let bytes = bytes.min(bio.data.len().saturating_sub(start));
        if bytes > 0 {
            bio.data[start..start + bytes].copy_from_slice(&pipe.readable()[..bytes]);
        }
    }
    true
}

/// This side is done with a connection: what it sent may arrive, at any time, or not.
pub(in crate::simulator) fn abandon(link: &mut Link, rng: &mut Rng) {
    link.to_client.is_unread = true;
    link.delay = if rng.u8(..3) == 0 { rng.u32(..500) } else { 0 };
    if rng.bool() {
        link.to_server.close(End::Fin);
    } else {
        link.to_server.cut(rng.bool());
    }
}

/// All of it, or a part.
fn part(bytes: usize, rng: &mut Rng) -> usize {
    if bytes < 2 || rng.u8(..4) > 0 { bytes } else { rng.usize(1..bytes) }
}
