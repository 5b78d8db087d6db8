//! The ring of one queue thread together with everything its operations point at: the sockets, their inboxes and
//! outboxes (headers, and the small payloads between them), the tags' data (`payload.rs`).
//!
//! Owns: the memory, and the building of submissions. Never: decides what to submit; `core.rs` does, by [`QueueIo`], and `run.rs`
//! waits and reaps. It is the client's one place of `unsafe` on the data path, and holds what makes that sound:
//! - the ring is dropped before the memory its operations name (field order), and only after they were reaped
//!   (`operations_out` is 0), else it is leaked;
//! - inbox and outbox are lent to the loop only while no operation that names them is out (`*_out` counts, asserted).
//!
//! Sources: `include/uapi/linux/ublk_cmd.h`, `io_uring.h`, Linux 7.3. MSG_WAITALL is on every SEND and RECV, because
//! without it a short transfer counts as success and the link behind it goes on; READ_FIXED and WRITE_FIXED break it. On a
//! kTLS socket, where MSG_WAITALL is refused, there is READ and WRITE in all places ([`Transfer::over_ktls`]).
#![allow(unsafe_code)] // Submissions name memory by address.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::Duration;

use io_uring::{cqueue, opcode, squeue, types};
use proto::nbd::transmission::SIMPLE_REPLY_BYTES;
use rustix::net::SendFlags;
use ublk_core::ring::{self, Sqe};
use ublk_core::{Place, Queue, Transfer};

use super::by_reference::ByReference;
use super::connection::{Origin, PayloadSource};
use super::io::{Pages, QueueIo};
use super::operation::{IS_SURE, Operation};
use super::payload::Payloads;
use super::quiet::TICK;
use super::restricted_ring;
use super::staging::Staging;
use super::stream::Stretch;
use crate::device::connect::data_socket::DataSocket;

/// `IORING_ENTER_GETEVENTS`: run what completions wait for.
const IORING_ENTER_GETEVENTS: u32 = 1;
/// `IORING_RECVSEND_POLL_FIRST`: wait for the socket before looking at it.
const IORING_RECVSEND_POLL_FIRST: u16 = 1;
/// `IORING_NOTIF_USAGE_ZC_COPIED`, the uppermost bit of a notification's result.
const IORING_NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;
/// Bytes of a connection's inbox, and of its outbox: 31 headers with payloads of 4 KiB.
const BOX_BYTES: usize = 128 << 10;

/// A completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completed {
    /// What it belongs to, and its result: bytes, or a negative errno.
    Operation(Operation, i32),
    /// A connection's socket does not refer any more to the pages of a payload.
    Notification {
        /// Of this connection.
        connection: u16,
        /// Whether it ever did: the kernel may have copied them instead (`IORING_NOTIF_USAGE_ZC_COPIED`).
        was_copied: bool,
        /// Whether that can be believed of any payload, and not of a connection's first alone.
        is_sure: bool,
    },
}

/// A connection's socket and the memory of its headers.
struct Wire {
    socket: DataSocket,
    outbox: Box<[u8]>,
    inbox: Box<[u8]>,
    sends_out: usize,
    inbox_receives_out: usize,
    /// Which payloads are sent by reference.
    by_reference: ByReference,
    /// Whether any was, so that the socket may refer to pages of requests.
    may_refer: bool,
}

impl Wire {
    fn new(socket: DataSocket, zc_bytes_min: Option<u32>) -> io::Result<Self> {
        let mut wire = Self {
            socket,
            // Zeroed by the kernel when first touched: an idle connection has no memory here.
            outbox: vec![0; BOX_BYTES].into_boxed_slice(),
            inbox: vec![0; BOX_BYTES].into_boxed_slice(),
            sends_out: 0,
            inbox_receives_out: 0,
            by_reference: ByReference::default(),
            may_refer: false,
        };
        wire.prepare(zc_bytes_min)?;
        Ok(wire)
    }

    /// The socket is a new one: sends by reference if that is wanted and it can.
    fn prepare(&mut self, zc_bytes_min: Option<u32>) -> io::Result<()> {
        // For what is sent without the ring; the ring's own operations wait all the same.
        self.socket.set_nonblocking()?;
        self.may_refer = false;
        self.by_reference = ByReference::new(zc_bytes_min.filter(|_| self.socket.takes_references()));
        Ok(())
    }

    /// Before a payload of so many bytes is sent from the request's pages: whether by reference. The first that is changes how the socket
    /// is closed: if this process is killed, the next gets the requests only when no socket refers to their pages.
    fn begin_payload(&mut self, payload_bytes: u32) -> bool {
        if !self.by_reference.takes(payload_bytes) {
            return false;
        }
        if !self.may_refer
            && let Err(error) = self.socket.drop_unsent_when_closed()
        {
            tracing::warn!(%error, "zero-copy is off: the socket would keep pages after its end");
            self.by_reference.end();
            return false;
        }
        self.may_refer = true;
        true
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.socket.as_raw_fd())
    }

    fn received(&self, place: Range<usize>) -> &[u8] {
        assert_eq!(self.inbox_receives_out, 0, "the inbox is being received into");
        &self.inbox[place]
    }
}

/// Where the data of a connection's WRITEs comes from.
pub struct Source<'a> {
    queue: &'a Queue,
    payloads: &'a mut Payloads,
    by_reference: ByReference,
}

impl PayloadSource for Source<'_> {
    type Error = io::Error;

    fn gather(&mut self, tag: u16, payload: &mut [u8]) -> io::Result<()> {
        self.payloads.gather(self.queue, tag, payload)
    }

    fn stage(&mut self, tag: u16, len_bytes: u32) -> io::Result<Option<Origin>> {
        match self.payloads.staging_mut() {
            Some(staging) if !self.by_reference.takes(len_bytes) => {
                let has_room = staging.stage(self.queue, tag, len_bytes)?;
                Ok(has_room.then_some(Origin::Staging))
            }
            _ => Ok(Some(Origin::Pages)),
        }
    }
}

/// A queue thread's ring and what its operations name.
pub struct QueueRing {
    // First, so that it is dropped before the memory below.
    ring: std::mem::ManuallyDrop<ring::QueueRing>,
    queue: Queue,
    payloads: Payloads,
    wires: Box<[Wire]>,
    operations_out: usize,
    /// From how many bytes on payloads are to be sent by reference, where a socket can; `None`: none is.
    zc_bytes_min: Option<u32>,
    /// After so many bytes under one key a connection that the kernel encrypts needs another.
    key_bytes_max: u64,
}

impl QueueRing {
    /// Makes the ring. Must be called on the thread that will use it (single issuer). With `zc_bytes_min` the transfer has to be
    /// [`Transfer::RecvSendFixed`].
    ///
    /// Errors: those of io_uring_setup and of registering the buffer table.
    pub fn new(
        queue: Queue,
        payloads: Payloads,
        sockets: Vec<DataSocket>,
        zc_bytes_min: Option<u32>,
        key_bytes_max: u64,
    ) -> io::Result<Self> {
        let depth = u32::from(queue.queue_depth());
        let nr_connections = sockets.len() as u32;
        let wires =
            sockets.into_iter().map(|socket| Wire::new(socket, zc_bytes_min)).collect::<io::Result<_>>()?;
        // In one pass a tag can bring a commit with the unregistration before it, or two sends, and a connection two
        // receives and a poll; and each is one completion, or two
        // where it is sent by reference. The 8 hold the command's poll and the tick.
        let entries = (depth * 3 + nr_connections * 3 + 8).next_power_of_two();
        // The upper half is for buffers registered by hand: the automatic ones own the index of their tag.
        let ring = restricted_ring::build(entries, payloads.uses_buffer_table().then_some(depth * 2))?;
        Ok(Self {
            ring: std::mem::ManuallyDrop::new(ring),
            queue,
            payloads,
            wires,
            operations_out: 0,
            zc_bytes_min,
            key_bytes_max,
        })
    }

    /// The connections' sockets.
    pub fn sockets(&self) -> impl Iterator<Item = &DataSocket> {
        self.wires.iter().map(|wire| &wire.socket)
    }

    /// The ublk queue whose requests the ring carries.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Payloads up to this size go through inbox and outbox.
    pub fn small_bytes_max(&self) -> u32 {
        self.payloads.small_bytes_max()
    }

    /// Waits until the eventfd is raised. It names no memory, so it may be left behind.
    pub fn wait_for_command(&mut self, eventfd: BorrowedFd<'_>) {
        let sqe = opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).build();
        self.push(Operation::Command, sqe.into(), false);
    }

    /// Completes after [`TICK`]. Its memory is read when it is submitted, so it may be left behind.
    pub fn start_tick(&mut self) {
        static TICK_TIMESPEC: types::Timespec =
            types::Timespec::new().sec(TICK.as_secs()).nsec(TICK.subsec_nanos());
        self.push(Operation::Tick, opcode::Timeout::new(&TICK_TIMESPEC).build().into(), false);
    }

    /// What a notification says. True: that is news ([`ByReference::notified`]).
    pub fn notified(&mut self, connection: u16, was_copied: bool, is_sure: bool) -> bool {
        self.wire_mut(connection).by_reference.notified(was_copied, is_sure)
    }

    /// How payloads move on a connection.
    fn transfer(&self, connection: u16) -> Transfer {
        let transfer = self.payloads.transfer();
        if self.wire(connection).socket.is_ktls() { transfer.over_ktls() } else { transfer }
    }

    /// Submits everything pushed and waits for a completion, at most until `timeout` where one is given.
    ///
    /// Errors: `ETIME` when the time was up; others are ours to fix.
    pub fn submit_and_wait(&mut self, timeout: Option<types::Timespec>) -> io::Result<()> {
        let submitter = self.ring.submitter();
        let outcome = match &timeout {
            None => submitter.submit_and_wait(1),
            Some(timespec) => submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(timespec)),
        };
        unless_interrupted(outcome)
    }

    /// Submits everything pushed and lets what is ready complete, without waiting.
    ///
    /// Errors: ours to fix.
    pub fn submit_and_look(&mut self) -> io::Result<()> {
        let to_submit = self.ring.submission().len() as u32;
        let submitter = self.ring.submitter();
        // SAFETY: no argument is passed by address; what the entries name is kept as `push` says. The crate's own calls
        // leave GETEVENTS out where nothing is waited for, and without it linked operations do not go on.
        let outcome =
            unsafe { submitter.enter::<libc::sigset_t>(to_submit, 0, IORING_ENTER_GETEVENTS, None) };
        unless_interrupted(outcome)
    }

    /// Whether [`Self::reap`] will give something.
    pub fn has_completed(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Takes the next completion, if one has come.
    pub fn reap(&mut self) -> Option<Completed> {
        let cqe = self.ring.completion().next()?;
        let operation = Operation::from_user_data(cqe.user_data());
        if let Operation::SendPayload(connection, _) = operation
            && cqueue::notif(cqe.flags())
        {
            let was_copied = cqe.result() as u32 & IORING_NOTIF_USAGE_ZC_COPIED != 0;
            let is_sure = cqe.user_data() & IS_SURE != 0;
            return Some(Completed::Notification { connection, was_copied, is_sure });
        }
        self.operations_out -= usize::from(operation.names_memory());
        match operation {
            Operation::ReceiveInbox(connection) => self.wire_mut(connection).inbox_receives_out -= 1,
            Operation::SendOutbox(connection) | Operation::SendPayload(connection, _) => {
                self.wire_mut(connection).sends_out -= 1;
            }
            _ => {}
        }
        Some(Completed::Operation(operation, cqe.result()))
    }

    fn wire(&self, connection: u16) -> &Wire {
        &self.wires[usize::from(connection)]
    }

    fn wire_mut(&mut self, connection: u16) -> &mut Wire {
        &mut self.wires[usize::from(connection)]
    }

    fn by_hand_index(&self, tag: u16) -> u16 {
        self.queue.queue_depth() + tag
    }

    fn place(&self, pages: Pages) -> Place {
        let Pages { tag, by_hand, rest } = pages;
        let buf_index = if by_hand { self.by_hand_index(tag) } else { tag };
        self.payloads.place(tag, buf_index, rest.done_bytes()..rest.done_bytes() + rest.rest_bytes())
    }

    fn push(&mut self, operation: Operation, sqe: Sqe, has_more: bool) {
        self.push_with(operation, operation.to_user_data(), sqe, has_more);
    }

    fn push_with(&mut self, operation: Operation, user_data: u64, sqe: Sqe, has_more: bool) {
        let mut sqe = sqe.user_data(user_data);
        if has_more {
            sqe = sqe.flags(squeue::Flags::IO_LINK);
        }
        // SAFETY: the entry names a socket, an inbox or outbox, or a tag's buffer. All are owned by `self` and live
        // until after the ring (`drop` leaks them with the ring while an operation is out); inbox and outbox are
        // not touched while an operation that names them is out (`outbox`, `received`, `compact_inbox`); a tag's buffer is touched
        // by nobody else between the tag's dispatch and its commit.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        assert!(pushed.is_ok(), "the submission queue was sized for everything a pass can push");
        self.operations_out += usize::from(operation.names_memory());
    }
}

impl QueueIo for QueueRing {
    type Socket = DataSocket;
    type Source<'a> = Source<'a>;

    fn fetch(&mut self, tag: u16) {
        let sqe = self.queue.fetch_req(tag, self.payloads.tag_buffer(tag));
        self.push(Operation::Tag(tag), sqe, false);
    }

    fn commit_and_fetch(&mut self, tag: u16, result: i32) {
        let sqe = self.queue.commit_and_fetch_req(tag, result, self.payloads.tag_buffer(tag));
        self.push(Operation::Tag(tag), sqe, false);
    }

    fn submit(&mut self) -> io::Result<()> {
        // The driver commits within the call. It may take fewer entries than there are.
        while !self.ring.submission().is_empty() {
            unless_interrupted(self.ring.submitter().submit())?;
        }
        Ok(())
    }

    fn needs_registration(&self, tag: u16) -> bool {
        self.payloads.registers_by_hand() || self.queue.io_desc(tag).needs_buffer_registration()
    }

    fn register(&mut self, tag: u16) {
        let sqe = self.queue.register_io_buf(tag, self.by_hand_index(tag));
        self.push(Operation::Register(tag), sqe, false);
    }

    fn unregister(&mut self, tag: u16) {
        let sqe = self.queue.unregister_io_buf(tag, self.by_hand_index(tag));
        self.push(Operation::Unregister(tag), sqe, false);
    }

    fn release(&mut self, tag: u16, has_reply: bool) {
        if let Some(staging) = self.payloads.staging_mut() {
            staging.release(tag, has_reply);
        }
    }

    fn copy_to_request(&mut self, tag: u16, len_bytes: u32) -> io::Result<()> {
        self.payloads.copy_to_request(&self.queue, tag, len_bytes)
    }

    fn inbox_bytes(&self) -> usize {
        BOX_BYTES
    }

    fn header(&self, connection: u16, place: Range<usize>) -> [u8; SIMPLE_REPLY_BYTES] {
        let mut header = [0; SIMPLE_REPLY_BYTES];
        header.copy_from_slice(self.wire(connection).received(place));
        header
    }

    fn scatter(&mut self, connection: u16, place: Range<usize>, tag: u16) -> io::Result<()> {
        let payload = self.wires[usize::from(connection)].received(place);
        self.payloads.scatter(&self.queue, tag, payload)
    }

    fn compact_inbox(&mut self, connection: u16, left: Range<usize>) {
        let wire = self.wire_mut(connection);
        assert_eq!(wire.inbox_receives_out, 0, "the inbox is being received into");
        wire.inbox.copy_within(left, 0);
    }

    fn receive_inbox(&mut self, connection: u16, part: Range<usize>, is_idle: bool) {
        let socket = self.wire(connection).fd();
        let wire = self.wire_mut(connection);
        let place = &mut wire.inbox[part];
        let receive = opcode::Recv::new(socket, place.as_mut_ptr(), place.len() as u32);
        let sqe = receive.ioprio(if is_idle { IORING_RECVSEND_POLL_FIRST } else { 0 }).build();
        wire.inbox_receives_out += 1;
        self.push(Operation::ReceiveInbox(connection), sqe.into(), false);
    }

    fn receive_payload(&mut self, connection: u16, pages: Pages) {
        let place = self.place(pages);
        let sqe = self.transfer(connection).receive(self.wire(connection).fd(), place);
        self.push(Operation::ReceivePayload(connection, pages.tag), sqe, true);
    }

    fn outbox(&mut self, connection: u16) -> (&mut [u8], Source<'_>) {
        let wire = &mut self.wires[usize::from(connection)];
        assert_eq!(wire.sends_out, 0, "the outbox is being sent");
        let by_reference = wire.by_reference;
        (&mut wire.outbox, Source { queue: &self.queue, payloads: &mut self.payloads, by_reference })
    }

    fn send_outbox_now(
        &mut self,
        connection: u16,
        start: usize,
        rest: Stretch,
        has_more: bool,
    ) -> io::Result<u32> {
        let wire = self.wire(connection);
        let place = &wire.outbox[start + rest.done_bytes() as usize..][..rest.rest_bytes() as usize];
        let more = if has_more { SendFlags::MORE } else { SendFlags::empty() };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL | more;
        Ok(rustix::net::send(&wire.socket, place, flags)? as u32)
    }

    fn send_staged_now(&mut self, connection: u16, tag: u16, rest: Stretch) -> io::Result<u32> {
        let Some(staging) = self.payloads.staging() else { panic!("payloads are not staged") };
        staging.send(&self.wire(connection).socket, tag, rest)
    }

    fn wait_for_room(&mut self, connection: u16) {
        let sqe = opcode::PollAdd::new(self.wire(connection).fd(), libc::POLLOUT as u32).build();
        self.push(Operation::RoomToSend(connection), sqe.into(), false);
    }

    fn send_outbox(&mut self, connection: u16, start: usize, rest: Stretch, has_more: bool) {
        let wire = self.wire_mut(connection);
        wire.sends_out += 1;
        let place = &wire.outbox[start + rest.done_bytes() as usize..][..rest.rest_bytes() as usize];
        if wire.socket.is_ktls() {
            let sqe = opcode::Write::new(wire.fd(), place.as_ptr(), rest.rest_bytes()).build();
            return self.push(Operation::SendOutbox(connection), sqe.into(), has_more);
        }
        let send = opcode::Send::new(wire.fd(), place.as_ptr(), rest.rest_bytes());
        let sqe = send.flags(libc::MSG_WAITALL | send_flags(has_more)).build();
        self.push(Operation::SendOutbox(connection), sqe.into(), has_more);
    }

    fn send_payload(&mut self, connection: u16, pages: Pages, has_more: bool) {
        let place = self.place(pages);
        let socket = self.wire(connection).fd();
        let payload_bytes = pages.rest.done_bytes() + pages.rest.rest_bytes();
        let operation = Operation::SendPayload(connection, pages.tag);
        let flags = send_flags(has_more);
        let (sqe, user_data) = match self.wire_mut(connection).begin_payload(payload_bytes) {
            true => {
                let sqe = ring::send_zc_fixed(socket, place.buf_index, place.addr, place.len_bytes, flags);
                // What is left of a payload may share a buffer with what was sent of it before.
                let is_sure = ByReference::is_sure_of(pages.rest.rest_bytes());
                (sqe, operation.to_user_data() | if is_sure { IS_SURE } else { 0 })
            }
            false => (self.transfer(connection).send(socket, place, flags), operation.to_user_data()),
        };
        self.wire_mut(connection).sends_out += 1;
        self.push_with(operation, user_data, sqe, has_more);
    }

    fn shut_down(&mut self, connection: u16) {
        // ENOTCONN: the peer was first.
        let _ = self.wire(connection).socket.shut_down();
    }

    fn take_control_record(&mut self, connection: u16) -> Option<String> {
        self.wire(connection).socket.take_control_record().map(|record| record.to_string())
    }

    fn unacknowledged_for(&self, connection: u16) -> Option<Duration> {
        self.wire(connection).socket.unacknowledged_for()
    }

    fn are_keys_worn(&self, connection: u16) -> bool {
        self.wire(connection).socket.key_bytes() > self.key_bytes_max
    }

    fn drop_references(&mut self, connection: u16) {
        if !self.wire(connection).may_refer {
            return;
        }
        let dropped = DataSocket::disconnected().and_then(|nowhere| self.replace_socket(connection, nowhere));
        if let Err(error) = dropped {
            tracing::warn!(connection, %error, "cannot close a lost connection's socket yet");
        }
    }

    fn renew_staging(&mut self) {
        let renewed = self.payloads.staging_mut().map_or(Ok(()), Staging::renew);
        if let Err(error) = renewed {
            tracing::warn!(%error, "cannot replace the memory of failed writes yet; trying again later");
        }
    }

    fn replace_socket(&mut self, connection: u16, socket: DataSocket) -> io::Result<()> {
        let zc_bytes_min = self.zc_bytes_min;
        let wire = self.wire_mut(connection);
        assert_eq!((wire.sends_out, wire.inbox_receives_out), (0, 0), "the connection is in use");
        std::mem::replace(&mut wire.socket, socket).abort();
        wire.prepare(zc_bytes_min)
    }
}

impl Drop for QueueRing {
    fn drop(&mut self) {
        if self.operations_out > 0 {
            // The kernel may still write to our memory: closing the ring would only begin to cancel. Better leak.
            std::mem::forget(std::mem::take(&mut self.wires));
            std::mem::forget(self.payloads.take());
            return;
        }
        // SAFETY: dropped here and nowhere else; `self.ring` is not used after this.
        unsafe { std::mem::ManuallyDrop::drop(&mut self.ring) };
    }
}

/// A signal, or task work of another ring: the caller comes again.
fn unless_interrupted(outcome: io::Result<usize>) -> io::Result<()> {
    match outcome {
        Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
        other => other.map(drop),
    }
}

/// `MSG_MORE` where more of the stream follows at once.
const fn send_flags(has_more: bool) -> i32 {
    if has_more { libc::MSG_MORE | libc::MSG_NOSIGNAL } else { libc::MSG_NOSIGNAL }
}
