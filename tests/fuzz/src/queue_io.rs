//! What stands for a queue's ring where a fuzzer is the server: every send is taken at once, and a receive brings what the server sent.
//!
//! Never: judges; what may come of the bytes says `client_replies.rs`.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::time::Duration;

use client::device::queue::connection::{Origin, PayloadSource};
use client::device::queue::core::QueueCore;
use client::device::queue::io::{Pages, QueueIo};
use client::device::queue::stream::Stretch;
use proto::nbd::transmission::SIMPLE_REPLY_BYTES;

/// Room for what is received, in bytes; small, so that it is soon full.
const INBOX_BYTES: usize = 64;
const OUTBOX_BYTES: usize = 1024;
/// What every byte of a WRITE's payload is.
pub(crate) const PAYLOAD_BYTE: u8 = 0x5a;
/// What the kernel says of an operation whose predecessor stopped short (`ECANCELED`).
const CANCELED: i32 = -125;
/// And of a send on a socket that is shut down (`EPIPE`).
const PIPE: i32 = -32;

#[derive(Clone, Copy)]
enum Receive {
    Payload(Pages),
    Inbox(usize, usize),
}

#[derive(Clone, Copy)]
struct Send {
    /// Whose pages, if any.
    tag: Option<u16>,
    bytes: u32,
}

/// One connection.
pub(crate) struct Wire {
    inbox: [u8; INBOX_BYTES],
    outbox: [u8; OUTBOX_BYTES],
    receives: VecDeque<Receive>,
    sends: VecDeque<Send>,
    /// Sent by the server and not yet received.
    pub(crate) coming: VecDeque<u8>,
    /// Sent by the client and not yet looked at.
    pub(crate) leaving: Vec<u8>,
    /// By this side or by the server.
    pub(crate) is_shut_down: bool,
}

impl Wire {
    pub(crate) fn new() -> Self {
        Self {
            inbox: [0; INBOX_BYTES],
            outbox: [0; OUTBOX_BYTES],
            receives: VecDeque::new(),
            sends: VecDeque::new(),
            coming: VecDeque::new(),
            leaving: Vec::new(),
            is_shut_down: false,
        }
    }
}

/// All that the queue's core is given.
pub(crate) struct Io {
    pub(crate) wires: Vec<Wire>,
    /// By tag: a READ's pages.
    pub(crate) pages: Vec<Vec<u8>>,
    /// What was given back: a tag, and bytes or a negative errno.
    pub(crate) commits: Vec<(u16, i32)>,
    pub(crate) origin: Origin,
}

pub(crate) struct Source(Origin);

impl PayloadSource for Source {
    type Error = io::Error;

    fn gather(&mut self, _: u16, payload: &mut [u8]) -> io::Result<()> {
        payload.fill(PAYLOAD_BYTE);
        Ok(())
    }

    fn stage(&mut self, _: u16, _: u32) -> io::Result<Option<Origin>> {
        Ok(Some(self.0))
    }
}

impl Io {
    fn wire(&mut self, connection: u16) -> &mut Wire {
        &mut self.wires[usize::from(connection)]
    }

    /// The server takes it at once.
    fn take(&mut self, connection: u16, bytes: &[u8]) -> io::Result<u32> {
        let wire = self.wire(connection);
        if wire.is_shut_down {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        wire.leaving.extend_from_slice(bytes);
        Ok(bytes.len() as u32)
    }

    fn push(&mut self, connection: u16, tag: Option<u16>, bytes: &[u8]) {
        let wire = self.wire(connection);
        wire.leaving.extend_from_slice(bytes);
        wire.sends.push_back(Send { tag, bytes: bytes.len() as u32 });
    }
}

impl QueueIo for Io {
    type Socket = ();
    type Source<'a> = Source;

    fn fetch(&mut self, _: u16) {}

    fn commit_and_fetch(&mut self, tag: u16, result: i32) {
        self.commits.push((tag, result));
    }

    fn submit(&mut self) -> io::Result<()> {
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
        self.wires[usize::from(connection)].inbox[place].try_into().expect("a whole header")
    }

    fn scatter(&mut self, connection: u16, place: Range<usize>, tag: u16) -> io::Result<()> {
        let from = &self.wires[usize::from(connection)].inbox[place];
        self.pages[usize::from(tag)][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn compact_inbox(&mut self, connection: u16, left: Range<usize>) {
        self.wire(connection).inbox.copy_within(left, 0);
    }

    fn receive_inbox(&mut self, connection: u16, part: Range<usize>, _: bool) {
        self.wire(connection).receives.push_back(Receive::Inbox(part.start, part.end));
    }

    fn receive_payload(&mut self, connection: u16, pages: Pages) {
        self.wire(connection).receives.push_back(Receive::Payload(pages));
    }

    fn outbox(&mut self, connection: u16) -> (&mut [u8], Source) {
        let source = Source(self.origin);
        (&mut self.wire(connection).outbox, source)
    }

    fn send_outbox_now(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) -> io::Result<u32> {
        let place = start + rest.done_bytes() as usize..;
        let bytes = self.wire(connection).outbox[place][..rest.rest_bytes() as usize].to_vec();
        self.take(connection, &bytes)
    }

    fn send_staged_now(&mut self, connection: u16, _: u16, rest: Stretch) -> io::Result<u32> {
        self.take(connection, &vec![PAYLOAD_BYTE; rest.rest_bytes() as usize])
    }

    fn wait_for_room(&mut self, _: u16) {
        panic!("there is always room");
    }

    fn send_outbox(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) {
        let place = start + rest.done_bytes() as usize..;
        let bytes = self.wire(connection).outbox[place][..rest.rest_bytes() as usize].to_vec();
        self.push(connection, None, &bytes);
    }

    fn send_payload(&mut self, connection: u16, pages: Pages, _: bool) {
        let bytes = vec![PAYLOAD_BYTE; pages.rest.rest_bytes() as usize];
        self.push(connection, Some(pages.tag), &bytes);
    }

    fn shut_down(&mut self, connection: u16) {
        self.wire(connection).is_shut_down = true;
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
        let wire = self.wire(connection);
        assert!(
            wire.receives.is_empty() && wire.sends.is_empty(),
            "a connection is let go of while it is in use"
        );
    }

    fn renew_staging(&mut self) {}

    fn replace_socket(&mut self, connection: u16, (): ()) -> io::Result<()> {
        let wire = self.wire(connection);
        assert!(wire.is_shut_down && wire.receives.is_empty(), "a connection is replaced while it is in use");
        *wire = Wire::new();
        Ok(())
    }
}

/// The operations that are out on a connection go on; false: none can.
pub(crate) fn go_on(core: &mut QueueCore, io: &mut Io, connection: u16) -> bool {
    sends_go_on(core, io, connection) | receive_goes_on(core, io, connection)
}

fn sends_go_on(core: &mut QueueCore, io: &mut Io, connection: u16) -> bool {
    let wire = io.wire(connection);
    let is_shut_down = wire.is_shut_down;
    let sends: Vec<Send> = wire.sends.drain(..).collect();
    let has_sent = !sends.is_empty();
    for (index, send) in sends.into_iter().enumerate() {
        let result = match (is_shut_down, index) {
            (false, _) => send.bytes as i32,
            (true, 0) => PIPE,
            (true, _) => CANCELED,
        };
        core.handle_sent(io, connection, send.tag, result);
    }
    has_sent
}

fn receive_goes_on(core: &mut QueueCore, io: &mut Io, connection: u16) -> bool {
    let wire = io.wire(connection);
    let is_over = wire.is_shut_down;
    if wire.coming.is_empty() && !is_over {
        return false;
    }
    let Some(receive) = wire.receives.pop_front() else { return false };
    let wanted = match receive {
        Receive::Payload(pages) => pages.rest.rest_bytes() as usize,
        Receive::Inbox(start, end) => end - start,
    };
    let count = if is_over { 0 } else { wanted.min(wire.coming.len()) };
    let bytes: Vec<u8> = wire.coming.drain(..count).collect();
    match receive {
        Receive::Payload(Pages { tag, rest, .. }) => {
            let start = rest.done_bytes() as usize;
            io.pages[usize::from(tag)][start..start + count].copy_from_slice(&bytes);
            core.handle_payload(io, connection, tag, count as i32);
            if count < wanted && io.wire(connection).receives.pop_front().is_some() {
                core.handle_inbox(io, connection, CANCELED);
            }
        }
        Receive::Inbox(start, _) => {
            wire.inbox[start..start + count].copy_from_slice(&bytes);
            core.handle_inbox(io, connection, count as i32);
        }
    }
    true
}
