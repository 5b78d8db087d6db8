//! The ring of one queue thread together with everything its operations point at: the socket, the header buffers, the
//! tags' data.
//!
//! Owns: the memory, and the building of submissions. Never: decides what to submit; that is `queue_loop.rs`, its only
//! caller. It is the client's one place of `unsafe` on the data path, and holds what makes that sound:
//! - the ring is dropped before the memory its operations name (field order), and only after they were reaped
//!   (`operations_out` is 0), else it is leaked;
//! - the header buffers are lent to the loop only while no operation that names them is out (`*_out` flags, asserted).
//!
//! Sources: `include/uapi/linux/ublk_cmd.h`, `io_uring.h`, Linux 7.3. MSG_WAITALL is on every SEND and
//! RECV, because without it a short transfer counts as success and the link behind it goes on.
#![allow(unsafe_code)] // Submissions name memory by address.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;

use io_uring::{opcode, squeue, types};
use proto::nbd::transmission::SIMPLE_REPLY_BYTES;
use ublk_core::ring::{self, Sqe};
use ublk_core::{DataPath, Queue, TagBuffer, UserBuffers};

/// Bytes of the buffer for outgoing headers: 32 of 28 bytes, with room to spare.
pub const HEADER_BUFFER_BYTES: usize = 1024;

/// Where the data of the tags lies.
#[derive(Debug)]
pub enum TagData {
    /// In the request's own pages, in the ring's buffer table at the tag's index (`fused`).
    Registered,
    /// In a buffer of ours (`mapped`).
    User(UserBuffers),
}

impl TagData {
    /// Makes the buffers that a data path needs. Errors: `ENOMEM`.
    pub fn new(data_path: DataPath, queue_depth: u16, max_io_bytes: u32) -> io::Result<Self> {
        match data_path {
            DataPath::Mapped => Ok(Self::User(UserBuffers::new(queue_depth, max_io_bytes)?)),
            _ => Ok(Self::Registered),
        }
    }

    /// What FETCH and COMMIT say about the tag's data.
    fn tag_buffer(&self, tag: u16) -> TagBuffer {
        match self {
            Self::Registered => TagBuffer::AutoRegister { index: tag },
            Self::User(buffers) => TagBuffer::UserAddress(buffers.address(tag)),
        }
    }
}

/// What a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// FETCH or COMMIT of a tag.
    Tag(u16),
    /// RECV of a reply's header.
    ReceiveHeader,
    /// RECV of a tag's payload.
    ReceivePayload(u16),
    /// SEND of request headers.
    SendHeaders,
    /// SEND of a tag's payload.
    SendPayload(u16),
    /// REGISTER_IO_BUF of a tag, where the driver could not do it by itself.
    Register(u16),
    /// UNREGISTER_IO_BUF of a tag.
    Unregister(u16),
}

impl Operation {
    const fn to_user_data(self) -> u64 {
        let (kind, tag) = match self {
            Self::Tag(tag) => (0, tag),
            Self::ReceiveHeader => (1, 0),
            Self::ReceivePayload(tag) => (2, tag),
            Self::SendHeaders => (3, 0),
            Self::SendPayload(tag) => (4, tag),
            Self::Register(tag) => (5, tag),
            Self::Unregister(tag) => (6, tag),
        };
        (kind as u64) << 16 | tag as u64
    }

    fn from_user_data(user_data: u64) -> Self {
        let tag = user_data as u16;
        match user_data >> 16 {
            0 => Self::Tag(tag),
            1 => Self::ReceiveHeader,
            2 => Self::ReceivePayload(tag),
            3 => Self::SendHeaders,
            4 => Self::SendPayload(tag),
            5 => Self::Register(tag),
            6 => Self::Unregister(tag),
            kind => unreachable!("completion of kind {kind}, which is never submitted"),
        }
    }
}

/// A completion: what it belongs to, and its result (bytes, or a negative errno).
pub type Completed = (Operation, i32);

/// How a submission stands to the one pushed after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// The next starts only when this one has succeeded.
    ToNext,
    /// Nothing depends on this one.
    None,
}

/// A queue thread's ring and what its operations name.
pub struct QueueRing {
    // First, so that it is dropped before the memory below.
    ring: std::mem::ManuallyDrop<ring::QueueRing>,
    queue: Queue,
    data: TagData,
    socket: TcpStream,
    headers_out: Box<[u8; HEADER_BUFFER_BYTES]>,
    header_in: Box<[u8; SIMPLE_REPLY_BYTES]>,
    operations_out: usize,
    sends_out: usize,
    header_receives_out: usize,
}

impl QueueRing {
    /// Makes the ring. Must be called on the thread that will use it (single issuer).
    ///
    /// Errors: those of io_uring_setup and of registering the buffer table.
    pub fn new(queue: Queue, data: TagData, socket: TcpStream) -> io::Result<Self> {
        let depth = u32::from(queue.queue_depth());
        // In one pass a tag can bring a commit, two sends and, for the connection, two receives; and each is one
        // completion.
        let entries = (depth * 3 + 8).next_power_of_two();
        let ring = ring::build_queue_ring(entries, entries * 2)?;
        if matches!(data, TagData::Registered) {
            // The upper half is for buffers registered by hand: the automatic ones own the index of their tag.
            ring.submitter().register_buffers_sparse(depth * 2)?;
        }
        Ok(Self {
            ring: std::mem::ManuallyDrop::new(ring),
            queue,
            data,
            socket,
            headers_out: Box::new([0; HEADER_BUFFER_BYTES]),
            header_in: Box::new([0; SIMPLE_REPLY_BYTES]),
            operations_out: 0,
            sends_out: 0,
            header_receives_out: 0,
        })
    }

    /// The queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The buffer for outgoing headers. Panics while a SEND that names it is out.
    pub fn headers_mut(&mut self) -> &mut [u8] {
        assert_eq!(self.sends_out, 0, "the header buffer is being sent");
        &mut self.headers_out[..]
    }

    /// The header that was received. Panics while a RECV that names it is out.
    pub fn header(&self) -> [u8; SIMPLE_REPLY_BYTES] {
        assert_eq!(self.header_receives_out, 0, "the header is being received");
        *self.header_in
    }

    /// Waits for the tag's first request.
    pub fn fetch(&mut self, tag: u16) {
        let sqe = self.queue.fetch_req(tag, self.data.tag_buffer(tag));
        self.push(Operation::Tag(tag), sqe, Link::None);
    }

    /// Completes the tag's request and waits for the next.
    pub fn commit_and_fetch(&mut self, tag: u16, result: i32) {
        let sqe = self.queue.commit_and_fetch_req(tag, result, self.data.tag_buffer(tag));
        self.push(Operation::Tag(tag), sqe, Link::None);
    }

    /// Registers the tag's pages by hand.
    pub fn register(&mut self, tag: u16) {
        let sqe = self.queue.register_io_buf(tag, self.by_hand_index(tag));
        self.push(Operation::Register(tag), sqe, Link::None);
    }

    /// Undoes [`QueueRing::register`].
    pub fn unregister(&mut self, tag: u16) {
        let sqe = self.queue.unregister_io_buf(tag, self.by_hand_index(tag));
        self.push(Operation::Unregister(tag), sqe, Link::None);
    }

    /// Receives the next reply's header.
    pub fn receive_header(&mut self) {
        let place = self.header_in.as_mut_ptr();
        let sqe = opcode::Recv::new(self.socket_fd(), place, SIMPLE_REPLY_BYTES as u32)
            .flags(libc::MSG_WAITALL)
            .build();
        self.header_receives_out += 1;
        self.push(Operation::ReceiveHeader, sqe.into(), Link::None);
    }

    /// Receives the tag's whole payload into its pages, then the next header.
    pub fn receive_payload_and_header(&mut self, tag: u16, len_bytes: u32, registered_by_hand: bool) {
        let sqe = match &self.data {
            TagData::Registered => {
                let index = self.buffer_index(tag, registered_by_hand);
                ring::recv_fixed(self.socket_fd(), index, 0, len_bytes, 0)
            }
            TagData::User(buffers) => {
                let place = self.user_place(buffers, tag, len_bytes);
                opcode::Recv::new(self.socket_fd(), place, len_bytes).flags(libc::MSG_WAITALL).build().into()
            }
        };
        self.push(Operation::ReceivePayload(tag), sqe, Link::ToNext);
        self.receive_header();
    }

    /// Sends these bytes of the header buffer.
    pub fn send_headers(&mut self, start: usize, len: usize, link: Link) {
        let place = self.headers_out[start..start + len].as_ptr();
        let sqe = opcode::Send::new(self.socket_fd(), place, len as u32).flags(send_flags(link)).build();
        self.sends_out += 1;
        self.push(Operation::SendHeaders, sqe.into(), link);
    }

    /// Sends the tag's whole payload from its pages.
    pub fn send_payload(&mut self, tag: u16, len_bytes: u32, registered_by_hand: bool, link: Link) {
        let flags = send_flags(link);
        let sqe = match &self.data {
            TagData::Registered => {
                let index = self.buffer_index(tag, registered_by_hand);
                ring::send_fixed(self.socket_fd(), index, 0, len_bytes, flags)
            }
            TagData::User(buffers) => {
                let place = self.user_place(buffers, tag, len_bytes);
                opcode::Send::new(self.socket_fd(), place, len_bytes).flags(flags).build().into()
            }
        };
        self.sends_out += 1;
        self.push(Operation::SendPayload(tag), sqe, link);
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
        match outcome {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Takes the next completion, if one has come.
    pub fn reap(&mut self) -> Option<Completed> {
        let cqe = self.ring.completion().next()?;
        let operation = Operation::from_user_data(cqe.user_data());
        self.operations_out -= 1;
        match operation {
            Operation::ReceiveHeader => self.header_receives_out -= 1,
            Operation::SendHeaders | Operation::SendPayload(_) => self.sends_out -= 1,
            _ => {}
        }
        Some((operation, cqe.result()))
    }

    fn socket_fd(&self) -> types::Fd {
        types::Fd(self.socket.as_raw_fd())
    }

    fn by_hand_index(&self, tag: u16) -> u16 {
        self.queue.queue_depth() + tag
    }

    fn buffer_index(&self, tag: u16, registered_by_hand: bool) -> u16 {
        if registered_by_hand { self.by_hand_index(tag) } else { tag }
    }

    fn user_place(&self, buffers: &UserBuffers, tag: u16, len_bytes: u32) -> *mut u8 {
        assert!(len_bytes as usize <= buffers.buffer_bytes(), "a request is larger than its buffer");
        std::ptr::with_exposed_provenance_mut(buffers.address(tag) as usize)
    }

    fn push(&mut self, operation: Operation, sqe: Sqe, link: Link) {
        let mut sqe = sqe.user_data(operation.to_user_data());
        if link == Link::ToNext {
            sqe = sqe.flags(squeue::Flags::IO_LINK);
        }
        // SAFETY: the entry names the socket, a header buffer, or a tag's buffer. All are owned by `self` and live
        // until after the ring (`drop` leaks them with the ring while an operation is out); the header buffers are
        // not touched while an operation that names them is out (`headers_mut`, `header`); a tag's buffer is touched
        // by nobody else between the tag's dispatch and its commit.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        assert!(pushed.is_ok(), "the submission queue was sized for everything a pass can push");
        self.operations_out += 1;
    }
}

impl Drop for QueueRing {
    fn drop(&mut self) {
        if self.operations_out > 0 {
            // The kernel may still write to our memory: closing the ring would only begin to cancel. Better leak.
            let header_in = std::mem::replace(&mut self.header_in, Box::new([0; SIMPLE_REPLY_BYTES]));
            std::mem::forget(header_in);
            let headers_out = std::mem::replace(&mut self.headers_out, Box::new([0; HEADER_BUFFER_BYTES]));
            std::mem::forget(headers_out);
            std::mem::forget(std::mem::replace(&mut self.data, TagData::Registered));
            return;
        }
        // SAFETY: dropped here and nowhere else; `self.ring` is not used after this.
        unsafe { std::mem::ManuallyDrop::drop(&mut self.ring) };
    }
}

/// `MSG_MORE` where more of the stream follows at once.
const fn send_flags(link: Link) -> i32 {
    match link {
        Link::ToNext => libc::MSG_WAITALL | libc::MSG_MORE | libc::MSG_NOSIGNAL,
        Link::None => libc::MSG_WAITALL | libc::MSG_NOSIGNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_survives_a_round_trip() {
        let operations = [
            Operation::Tag(4095),
            Operation::ReceiveHeader,
            Operation::ReceivePayload(1),
            Operation::SendHeaders,
            Operation::SendPayload(2),
            Operation::Register(3),
            Operation::Unregister(u16::MAX),
        ];
        for operation in operations {
            assert_eq!(Operation::from_user_data(operation.to_user_data()), operation);
        }
    }
}
