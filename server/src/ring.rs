//! One io_uring, with all the memory its operations use.
//!
//! Owns: the ring, the payload buffers, and for each connection its socket, its receive memory, its send vectors and a
//! hold on its volume. Never: decides what to do; `connection.rs` and `io_loop.rs` do, in safe code.
//! Called by: `io_loop.rs` and `connection.rs`, on the ring's own thread only (`SINGLE_ISSUER`).
//! Invariants, which make the safe methods sound:
//! - every address in a submission lies in memory that this value owns, or in a volume that the connection holds;
//! - operations in flight are counted for each connection, and nothing of a connection is freed before its count is 0;
//! - receive memory is lent out as a slice only while no receive into it is in flight;
//! - if the ring is dropped with operations in flight, its memory is leaked rather than freed under the kernel.
//!
//! Source: `include/uapi/linux/io_uring.h`; needs Linux 6.1 for `DEFER_TASKRUN`.
#![allow(unsafe_code)] // Submissions carry addresses; see the invariants above.

pub mod restricted;
mod send_area;

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use crate::backend::callback::{CompletionSink, Ended, Operation};
use crate::backend::memory::MemoryVolume;
use crate::backend::{Allocation, VolumeOp};
use crate::block_status::{ExtentFinder, StatusQuery};
use crate::buffers::{Buffer, BufferPool, Region};
use crate::ids::SlotId;
use crate::limits::{BULK_BYTES, PAGES_BYTES_MIN};
use crate::limits::{IN_FLIGHT_REQUESTS_MAX, MemoryPlan, ZEROES_BYTES_MAX};
use crate::mailbox::Mailbox;
use crate::page_pipes::{PagePipes, PipeId};
use crate::sync_groups::{Begin, Member, SyncGroups};
use crate::volume::{Backend, Volume};
use send_area::{PagesPlace, SendArea};
use tls::kernel::{self, ControlRecord};
use tls::stream::Carrier;

/// `IORING_RECVSEND_POLL_FIRST`: wait for the socket before looking at it.
const IORING_RECVSEND_POLL_FIRST: u16 = 1;

/// What an operation was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// Somebody posted to the mailbox.
    Wakeup,
    /// Bytes into the connection's receive memory.
    ReceiveBulk,
    /// Bytes of a WRITE's payload into its place.
    ReceivePayload,
    /// The socket can take more of the replies.
    RoomToSend,
    /// An operation of a volume.
    Volume,
    /// A sync that is done for several requests; comes out as one `Volume` for each.
    Sync,
    /// The cancellation of a connection's socket operations.
    Cancel,
}

impl OpKind {
    const ALL: [Self; 7] = [
        Self::Wakeup,
        Self::ReceiveBulk,
        Self::ReceivePayload,
        Self::RoomToSend,
        Self::Volume,
        Self::Sync,
        Self::Cancel,
    ];
}

/// A finished operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// What it was.
    pub kind: OpKind,
    /// Whose: an index of this ring. Not meaningful for a wakeup.
    pub connection: u32,
    /// For which request, where there is one.
    pub slot: SlotId,
    /// Bytes or 0, or a negative errno.
    pub result: i32,
}

impl Completion {
    fn user_data(kind: OpKind, connection: u32, slot: SlotId) -> u64 {
        let number = OpKind::ALL.iter().position(|other| *other == kind).unwrap_or(0) as u64;
        number << 40 | u64::from(slot.0) << 32 | u64::from(connection)
    }

    fn from_cqe(user_data: u64, result: i32) -> Self {
        let kind = OpKind::ALL[(user_data >> 40) as usize];
        Self { kind, connection: user_data as u32, slot: SlotId((user_data >> 32) as u8), result }
    }
}

/// Where a payload is, or belongs.
#[derive(Debug, Clone, Copy)]
pub enum PayloadPlace<'a> {
    /// In a buffer, from its first byte.
    Buffer(&'a Buffer),
    /// In the memory of the connection's volume, from this byte.
    Volume(u64),
    /// Pages that are held: only to be sent.
    Pages(&'a PipeId),
}

struct ConnectionMemory {
    socket: OwnedFd,
    /// The kernel encrypts what goes through the socket.
    is_ktls: bool,
    bulk: Region,
    bulk_is_lent_to_kernel: bool,
    send: SendArea,
    volume: Option<Arc<Volume>>,
    ops_in_flight: u32,
}

/// Everything that submissions point into.
struct Memory {
    pool: BufferPool,
    zeroes: Region,
    connections: Vec<Option<Box<ConnectionMemory>>>,
    wakeup_value: Box<u64>,
}

/// A ring and its memory.
pub struct Ring {
    number: usize,
    io: IoUring,
    memory: ManuallyDrop<Memory>,
    free_indices: Vec<u32>,
    pipes: PagePipes,
    syncs: SyncGroups,
    synced: Vec<Member>,
    extents: ExtentFinder,
    /// Where backends that complete by call-back report to.
    sink: Arc<dyn CompletionSink>,
    ops_in_flight: u32,
}

impl Ring {
    /// Makes ring number `number` of the server, whose mailbox this is; on the thread that will use it.
    ///
    /// # Errors
    /// `EPERM` or `ENOSYS`: io_uring is switched off (sysctl, container profile) or missing; `EINVAL`: a kernel before
    /// 6.1; `ENOMEM`.
    pub fn new(number: usize, mailbox: &Arc<Mailbox>, plan: MemoryPlan) -> io::Result<Self> {
        let io = restricted::build()?;
        let memory = Memory {
            pool: BufferPool::new(plan.pool, plan.connections_per_ring)?,
            zeroes: Region::new(ZEROES_BYTES_MAX as usize)?,
            connections: Vec::new(),
            wakeup_value: Box::new(0),
        };
        Ok(Self {
            number,
            io,
            memory: ManuallyDrop::new(memory),
            free_indices: Vec::new(),
            pipes: PagePipes::new(plan.page_pipes),
            syncs: SyncGroups::default(),
            synced: Vec::with_capacity(IN_FLIGHT_REQUESTS_MAX),
            extents: ExtentFinder::start(number, Arc::clone(mailbox))?,
            sink: Arc::clone(mailbox) as Arc<dyn CompletionSink>,
            ops_in_flight: 0,
        })
    }

    /// The payload buffers.
    pub fn pool(&mut self) -> &mut BufferPool {
        &mut self.memory.pool
    }

    /// Pages held for replies.
    pub fn pipes(&mut self) -> &mut PagePipes {
        &mut self.pipes
    }

    /// Takes hold of what a READ wants of the connection's volume, if that goes without reading; it has to be given back.
    pub fn hold_pages(&mut self, connection: u32, offset_bytes: u64, length_bytes: u32) -> Option<PipeId> {
        let volume = self.memory.connection(connection).volume.as_deref()?;
        match &volume.backend {
            Backend::File(file) => self.pipes.hold(file, offset_bytes, length_bytes),
            Backend::Memory(_) | Backend::Callback(_) => None,
        }
    }

    /// Whether a request waits for a buffer.
    pub fn has_waiters(&self) -> bool {
        self.memory.pool.has_waiters()
    }

    /// Takes a connection in; gives its index here. Allocates.
    ///
    /// # Errors
    /// `ENOMEM`
    pub fn add_connection(&mut self, socket: OwnedFd) -> io::Result<u32> {
        // For sendfile, which has no flag for it; operations of the ring wait all the same.
        rustix::io::ioctl_fionbio(&socket, true)?;
        let memory = Box::new(ConnectionMemory {
            socket,
            is_ktls: false,
            bulk: Region::new(BULK_BYTES)?,
            bulk_is_lent_to_kernel: false,
            send: SendArea::new()?,
            volume: None,
            ops_in_flight: 0,
        });
        let index = self.free_indices.pop().unwrap_or(self.memory.connections.len() as u32);
        if index as usize == self.memory.connections.len() {
            self.memory.connections.push(None);
        }
        self.memory.connections[index as usize] = Some(memory);
        Ok(index)
    }

    /// Lets a connection go: closes its socket and its hold on the volume.
    ///
    /// # Panics
    /// While operations of it are in flight.
    pub fn remove_connection(&mut self, connection: u32) {
        assert_eq!(self.connection(connection).ops_in_flight, 0, "operations are in flight");
        self.memory.connections[connection as usize] = None;
        self.free_indices.push(connection);
    }

    /// The connection's socket once more, for a TLS handshake.
    ///
    /// # Errors
    /// `EMFILE` and the like.
    pub fn clone_socket(&self, connection: u32) -> io::Result<OwnedFd> {
        self.connection(connection).socket.try_clone()
    }

    /// The connection's socket, for its options.
    pub fn socket(&self, connection: u32) -> BorrowedFd<'_> {
        self.connection(connection).socket.as_fd()
    }

    /// The connection's bytes are carried by TLS from now on.
    ///
    /// # Errors
    /// The socket is not one any more.
    ///
    /// # Panics
    /// While operations of it are in flight: they would bring bytes from before.
    pub fn set_carrier(&mut self, connection: u32, carrier: Carrier) -> io::Result<()> {
        let memory = self.connection_mut(connection);
        assert_eq!(memory.ops_in_flight, 0, "operations are in flight");
        match carrier {
            Carrier::Kernel(_same_socket) => memory.is_ktls = true,
            Carrier::Relay(near_end) => memory.socket = near_end,
        }
        // As in `add_connection`; the handshake has waited on it.
        rustix::io::ioctl_fionbio(&memory.socket, true)?;
        Ok(())
    }

    /// After EIO: the TLS record that is not data, if that was the cause.
    pub fn take_control_record(&self, connection: u32) -> Option<ControlRecord> {
        let memory = self.connection(connection);
        memory.is_ktls.then(|| kernel::take_control_record(&memory.socket)).flatten()
    }

    /// The connection's requests are for this volume from now on.
    pub fn set_volume(&mut self, connection: u32, volume: Arc<Volume>) {
        self.connection_mut(connection).volume = Some(volume);
    }

    /// Operations of the connection that have not finished.
    pub fn ops_in_flight(&self, connection: u32) -> u32 {
        self.connection(connection).ops_in_flight
    }

    /// What was received in bulk.
    ///
    /// # Panics
    /// While a bulk receive is in flight.
    pub fn bulk(&self, connection: u32, range: Range<usize>) -> &[u8] {
        let memory = self.connection(connection);
        assert!(!memory.bulk_is_lent_to_kernel, "a receive is in flight");
        let start = memory.bulk.address(range.start, range.len());
        // SAFETY: `address` checked the range; the region outlives the borrow of `self`; no receive into it is in flight
        // and every Rust access goes through this method or `bulk_mut`, under the borrow of `self`.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    /// The receive memory, to be written.
    ///
    /// # Panics
    /// While a bulk receive is in flight.
    pub fn bulk_mut(&mut self, connection: u32) -> &mut [u8] {
        let memory = self.connection_mut(connection);
        assert!(!memory.bulk_is_lent_to_kernel, "a receive is in flight");
        let start = memory.bulk.address(0, BULK_BYTES);
        // SAFETY: as in `bulk`, and the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, BULK_BYTES) }
    }

    /// Copies received bytes to where a payload belongs, `done_bytes` into it.
    pub fn store_payload(
        &mut self,
        connection: u32,
        range: Range<usize>,
        place: PayloadPlace<'_>,
        done_bytes: u32,
    ) {
        let source = self.bulk(connection, range);
        match place {
            PayloadPlace::Buffer(buffer) => {
                let target = self.memory.pool.address(buffer, done_bytes as usize, source.len());
                // SAFETY: `address` checked the target's range; the buffer belongs to this request, for which no
                // operation is in flight while its payload is being copied; the two memories are distinct mappings.
                unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) };
            }
            PayloadPlace::Volume(offset_bytes) => {
                self.volume_memory(connection).write(offset_bytes + u64::from(done_bytes), source);
            }
            PayloadPlace::Pages(_) => panic!("held pages are not written"),
        }
    }

    /// Has the extents of the connection's volume looked up; comes back as [`crate::mailbox::RingMessage::ExtentsFound`], which has to be
    /// brought to [`Self::extents_found`].
    ///
    /// # Panics
    /// When the connection has no volume.
    pub fn find_extents(&mut self, connection: u32, slot: SlotId, query: StatusQuery) {
        let Some(volume) = self.connection(connection).volume.clone() else {
            panic!("the connection has no volume")
        };
        self.connection_mut(connection).ops_in_flight += 1;
        self.extents.ask(connection, slot, volume, query);
    }

    /// A question has been answered: it is not in flight any more.
    pub fn extents_found(&mut self, connection: u32) {
        self.extents.answer_taken();
        self.connection_mut(connection).ops_in_flight -= 1;
    }

    /// Fills the beginning of a buffer.
    pub fn fill(&mut self, buffer: &Buffer, bytes: &[u8]) {
        let target = self.memory.pool.address(buffer, 0, bytes.len());
        // SAFETY: `address` checked the target's range; the buffer belongs to a request for which no operation is in
        // flight; `bytes` is Rust's own memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// Receives up to the end of `range` into the receive memory. Where `was_empty` says that the last receive emptied the
    /// socket, the kernel does not look again before it waits.
    pub fn push_receive_bulk(&mut self, connection: u32, range: Range<usize>, was_empty: bool) {
        let memory = self.connection_mut(connection);
        let target = memory.bulk.address(range.start, range.len());
        memory.bulk_is_lent_to_kernel = true;
        let receive = opcode::Recv::new(types::Fd(memory.socket.as_raw_fd()), target, range.len() as u32);
        let op = receive.ioprio(if was_empty { IORING_RECVSEND_POLL_FIRST } else { 0 }).build();
        self.push(op, OpKind::ReceiveBulk, connection, SlotId(0));
    }

    /// Receives exactly `length_bytes` of a payload (fewer only at the stream's end), `done_bytes` into its place.
    pub fn push_receive_payload(
        &mut self,
        connection: u32,
        slot: SlotId,
        place: PayloadPlace<'_>,
        done_bytes: u32,
        length_bytes: u32,
    ) {
        let target = self.payload_address(connection, place, done_bytes, length_bytes);
        let socket = types::Fd(self.connection(connection).socket.as_raw_fd());
        let op = opcode::Recv::new(socket, target, length_bytes).flags(libc::MSG_WAITALL).build();
        self.push(op, OpKind::ReceivePayload, connection, slot);
    }

    /// Adds bytes to what the next [`Self::send`] sends, before any reply.
    ///
    /// # Panics
    /// While what was added before is not sent, as in the next two.
    pub fn add_text(&mut self, connection: u32, text: Vec<u8>) {
        let send = self.idle_send(connection);
        send.text = text;
        let (start, length) = (send.text.as_mut_ptr(), send.text.len());
        send.add(start, length);
    }

    /// Adds a reply's header.
    pub fn add_header(&mut self, connection: u32, header: &[u8]) {
        let send = self.idle_send(connection);
        let target = send.headers.address(send.headers_used_bytes, header.len());
        send.headers_used_bytes += header.len();
        // SAFETY: `address` checked the target's range; what was sent from the headers has left, so nobody else uses them.
        unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), target, header.len()) };
        send.add(target, header.len());
    }

    /// Adds a READ's payload.
    pub fn add_payload(&mut self, connection: u32, place: PayloadPlace<'_>, length_bytes: u32) {
        let source = match place {
            PayloadPlace::Volume(offset_bytes) if length_bytes >= PAGES_BYTES_MIN => {
                let place = PagesPlace::Volume(offset_bytes);
                self.idle_send(connection).add_pages(place, length_bytes as usize);
                return;
            }
            PayloadPlace::Pages(pipe) => {
                let place = PagesPlace::Pipe(pipe.index());
                self.idle_send(connection).add_pages(place, length_bytes as usize);
                return;
            }
            PayloadPlace::Volume(offset_bytes)
                if !self.volume_memory(connection).may_hold_data(offset_bytes, length_bytes) =>
            {
                self.memory.zeroes.address(0, length_bytes as usize)
            }
            _ => self.payload_address(connection, place, 0, length_bytes),
        };
        self.idle_send(connection).add(source, length_bytes as usize);
    }

    /// Sends what was added, as far as the socket takes it at once. True: all of it. False: there comes a completion when
    /// the socket has room; call again.
    ///
    /// Not through the ring: what the socket takes at once, and mostly it does, is then sent when this returns, and the
    /// ring is entered only to wait.
    ///
    /// # Errors
    /// Those of sendmsg(2), sendfile(2) and splice(2); the connection is of no use any more.
    pub fn send(&mut self, connection: u32) -> io::Result<bool> {
        let memory = self.memory.connection_mut(connection);
        let file = memory.volume.as_deref().and_then(Volume::memory).map(MemoryVolume::file);
        let sent = memory.send.send(&memory.socket, file, &mut self.pipes);
        if !matches!(sent, Ok(false)) {
            return sent;
        }
        memory.send.waits_for_room = true;
        let op = opcode::PollAdd::new(types::Fd(memory.socket.as_raw_fd()), libc::POLLOUT as u32).build();
        self.push(op, OpKind::RoomToSend, connection, SlotId(0));
        Ok(false)
    }

    /// Does an operation of the connection's volume for a request.
    ///
    /// # Panics
    /// When the connection has no volume, or a READ or WRITE of a file no buffer.
    pub fn push_volume_op(&mut self, connection: u32, slot: SlotId, op: VolumeOp, buffer: Option<&Buffer>) {
        let Some(volume) = &self.connection(connection).volume else {
            panic!("the connection has no volume")
        };
        if let VolumeOp::Sync { metadata } = op {
            let key = Arc::as_ptr(volume) as usize;
            // Counted for the request from now on, whether its sync begins now or after the one that runs.
            self.connection_mut(connection).ops_in_flight += 1;
            if let Some(begin) = self.syncs.join(key, (connection, slot), metadata) {
                self.push_sync(begin);
            }
            return;
        }
        let file = match &volume.backend {
            Backend::File(file) => file.file(),
            Backend::Memory(memory) => memory.file(),
            Backend::Callback(_) => {
                self.connection_mut(connection).ops_in_flight += 1;
                return self.submit_to_backend(OpKind::Volume, connection, slot, op, buffer);
            }
        };
        let entry = self.file_op(types::Fd(file.as_raw_fd()), op, buffer);
        self.push(entry, OpKind::Volume, connection, slot);
    }

    /// Has a backend do it that completes by call-back; comes back to [`Self::reap_ended`]. Counted for a connection already.
    fn submit_to_backend(
        &mut self,
        kind: OpKind,
        connection: u32,
        slot: SlotId,
        op: VolumeOp,
        buffer: Option<&Buffer>,
    ) {
        let memory = match (op, buffer) {
            (VolumeOp::Read { buffer_offset_bytes, length_bytes, .. }, Some(buffer))
            | (VolumeOp::Write { buffer_offset_bytes, length_bytes, .. }, Some(buffer)) => {
                let (at, length) = (buffer_offset_bytes as usize, length_bytes as usize);
                std::ptr::slice_from_raw_parts_mut(self.memory.pool.address(buffer, at, length), length)
            }
            (VolumeOp::Read { .. } | VolumeOp::Write { .. }, None) => panic!("the request has no buffer"),
            _ => std::ptr::from_mut::<[u8]>(&mut []),
        };
        let Some(memory) = NonNull::new(memory) else { panic!("a buffer at address zero") };
        let token = Completion::user_data(kind, connection, slot);
        // SAFETY: a part of the pool, which is mapped and was zeroed by the kernel, and stays so while the connection has operations in
        // flight; it is of a buffer that belongs to this request, which nobody touches before it was reaped.
        let operation = unsafe { Operation::new(op, memory, token, Arc::clone(&self.sink)) };
        self.ops_in_flight += 1;
        let volume = self.memory.connection(connection).volume.as_deref();
        let Some(Volume { backend: Backend::Callback(backend), .. }) = volume else {
            panic!("the connection's volume completes on the ring")
        };
        backend.submit(operation);
    }

    /// Ends the connection's socket operations, now or soon: shuts the socket down and cancels what waits for it.
    pub fn push_cancel(&mut self, connection: u32) {
        let memory = self.connection(connection);
        // An error means that it is not connected any more, which is what is wanted.
        let _ = rustix::net::shutdown(&memory.socket, rustix::net::Shutdown::Both);
        let target = types::CancelBuilder::fd(types::Fd(memory.socket.as_raw_fd())).all();
        self.push(opcode::AsyncCancel2::new(target).build(), OpKind::Cancel, connection, SlotId(0));
    }

    /// Waits for the mailbox's eventfd.
    pub fn push_wakeup(&mut self, eventfd: &OwnedFd) {
        let target = (&raw mut *self.memory.wakeup_value).cast::<u8>();
        let op = opcode::Read::new(types::Fd(eventfd.as_raw_fd()), target, 8).offset(u64::MAX).build();
        let user_data = Completion::user_data(OpKind::Wakeup, 0, SlotId(0));
        self.push_entry(op.user_data(user_data));
    }

    /// Submits what was pushed and waits for a completion, or for the time to pass.
    ///
    /// # Errors
    /// What `io_uring_enter` says, but for interruptions, the time-out and a full completion queue.
    pub fn submit_and_wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let result = match timeout {
            None => self.io.submit_and_wait(1),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&timespec);
                self.io.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY)) => {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Moves all finished operations into `completions`, which is empty, as far as its capacity goes.
    pub fn reap(&mut self, completions: &mut Vec<Completion>) {
        assert!(completions.is_empty(), "results of the pass before are left");
        let room = completions.capacity();
        let finished =
            self.io.completion().take(room).map(|cqe| Completion::from_cqe(cqe.user_data(), cqe.result()));
        completions.extend(finished);
        for index in 0..completions.len() {
            self.ops_in_flight -= 1;
            let completion = completions[index];
            match completion.kind {
                OpKind::Wakeup => {}
                OpKind::Sync => self.reap_sync(completion, completions),
                _ => self.account(completion),
            }
        }
        completions.retain(|completion| completion.kind != OpKind::Sync);
    }

    /// The same for an operation that a backend has ended, which the mailbox brought: it, or one for each request that waited for a
    /// sync.
    pub fn reap_ended(&mut self, ended: &Ended, completions: &mut Vec<Completion>) {
        self.ops_in_flight -= 1;
        let completion = Completion::from_cqe(ended.token(), ended.result());
        if completion.kind == OpKind::Sync {
            return self.reap_sync(completion, completions);
        }
        self.account(completion);
        completions.push(completion);
    }

    /// A sync has ended: each request it was for gets its result, and the next one begins.
    fn reap_sync(&mut self, sync: Completion, completions: &mut Vec<Completion>) {
        let Some(volume) = &self.connection(sync.connection).volume else {
            panic!("a sync without a volume")
        };
        let key = Arc::as_ptr(volume) as usize;
        let mut synced = std::mem::take(&mut self.synced);
        if let Some(begin) = self.syncs.ended(key, &mut synced) {
            self.push_sync(begin);
        }
        for (connection, slot) in synced.drain(..) {
            let completion = Completion { kind: OpKind::Volume, connection, slot, result: sync.result };
            self.account(completion);
            completions.push(completion);
        }
        self.synced = synced;
    }

    fn account(&mut self, completion: Completion) {
        let memory = self.connection_mut(completion.connection);
        memory.ops_in_flight -= 1;
        match completion.kind {
            OpKind::ReceiveBulk => memory.bulk_is_lent_to_kernel = false,
            OpKind::RoomToSend => memory.send.waits_for_room = false,
            _ => {}
        }
    }

    /// Begins a sync, in the name of a request that waits for it and so keeps the volume.
    fn push_sync(&mut self, begin: Begin) {
        let (connection, slot) = begin.leader;
        let volume = self.connection(connection).volume.as_deref();
        let file = match volume.map(|volume| &volume.backend) {
            Some(Backend::File(file)) => file,
            Some(Backend::Callback(_)) => {
                let op = VolumeOp::Sync { metadata: begin.metadata };
                return self.submit_to_backend(OpKind::Sync, connection, slot, op, None);
            }
            Some(Backend::Memory(_)) | None => panic!("memory is not synced"),
        };
        let file = types::Fd(file.sync_file(self.number).as_raw_fd());
        let flags = if begin.metadata { types::FsyncFlags::empty() } else { types::FsyncFlags::DATASYNC };
        let user_data = Completion::user_data(OpKind::Sync, connection, slot);
        self.push_entry(opcode::Fsync::new(file).flags(flags).build().user_data(user_data));
    }

    fn file_op(&self, file: types::Fd, op: VolumeOp, buffer: Option<&Buffer>) -> squeue::Entry {
        let address = |at: u32, length: u32| match buffer {
            Some(buffer) => self.memory.pool.address(buffer, at as usize, length as usize),
            None => panic!("the request has no buffer"),
        };
        match op {
            VolumeOp::Read { offset_bytes, length_bytes, buffer_offset_bytes } => {
                let target = address(buffer_offset_bytes, length_bytes);
                opcode::Read::new(file, target, length_bytes).offset(offset_bytes).build()
            }
            VolumeOp::Write { offset_bytes, length_bytes, buffer_offset_bytes, durable } => {
                let source = address(buffer_offset_bytes, length_bytes);
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Write::new(file, source, length_bytes).offset(offset_bytes).rw_flags(flags).build()
            }
            VolumeOp::WriteZeroes { offset_bytes, length_bytes } => {
                let source = self.memory.zeroes.address(0, length_bytes as usize);
                opcode::Write::new(file, source, length_bytes).offset(offset_bytes).build()
            }
            VolumeOp::Allocate { mode, offset_bytes, length_bytes } => {
                let mode = match mode {
                    Allocation::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    Allocation::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                    Allocation::Fill => 0,
                };
                opcode::Fallocate::new(file, length_bytes).offset(offset_bytes).mode(mode).build()
            }
            VolumeOp::Prefetch { offset_bytes, length_bytes } => {
                let length_bytes = libc::off_t::from(length_bytes);
                opcode::Fadvise::new(file, length_bytes, libc::POSIX_FADV_WILLNEED)
                    .offset(offset_bytes)
                    .build()
            }
            VolumeOp::Sync { .. } => panic!("a sync is of the volume, not of one request"),
        }
    }

    fn payload_address(
        &self,
        connection: u32,
        place: PayloadPlace<'_>,
        done_bytes: u32,
        length_bytes: u32,
    ) -> *mut u8 {
        match place {
            PayloadPlace::Buffer(buffer) => {
                self.memory.pool.address(buffer, done_bytes as usize, length_bytes as usize)
            }
            PayloadPlace::Volume(offset_bytes) => {
                let memory = self.volume_memory(connection);
                memory.address(offset_bytes + u64::from(done_bytes), length_bytes)
            }
            PayloadPlace::Pages(_) => panic!("held pages have no address"),
        }
    }

    fn push(&mut self, entry: squeue::Entry, kind: OpKind, connection: u32, slot: SlotId) {
        self.connection_mut(connection).ops_in_flight += 1;
        self.push_entry(entry.user_data(Completion::user_data(kind, connection, slot)));
    }

    fn push_entry(&mut self, entry: squeue::Entry) {
        self.ops_in_flight += 1;
        loop {
            // SAFETY: every entry is built in this file from memory that stays valid until its completion was reaped:
            // see the invariants at the top.
            let pushed = unsafe { self.io.submission().push(&entry) };
            if pushed.is_ok() {
                return;
            }
            // The queue is full. EBUSY and EINTR pass: the kernel takes entries as soon as it can.
            if let Err(error) = self.io.submit()
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                panic!("io_uring_enter: {error}");
            }
        }
    }

    fn connection(&self, connection: u32) -> &ConnectionMemory {
        self.memory.connection(connection)
    }

    fn connection_mut(&mut self, connection: u32) -> &mut ConnectionMemory {
        self.memory.connection_mut(connection)
    }

    fn idle_send(&mut self, connection: u32) -> &mut SendArea {
        let send = &mut self.connection_mut(connection).send;
        assert!(!send.waits_for_room, "the replies before are not sent");
        send
    }

    fn volume_memory(&self, connection: u32) -> &MemoryVolume {
        match self.connection(connection).volume.as_deref().and_then(Volume::memory) {
            Some(memory) => memory,
            None => panic!("the connection's volume is not in memory"),
        }
    }
}

impl Memory {
    fn connection(&self, connection: u32) -> &ConnectionMemory {
        match self.connections.get(connection as usize).and_then(Option::as_deref) {
            Some(memory) => memory,
            None => panic!("connection {connection} is gone"),
        }
    }

    fn connection_mut(&mut self, connection: u32) -> &mut ConnectionMemory {
        match self.connections.get_mut(connection as usize).and_then(Option::as_deref_mut) {
            Some(memory) => memory,
            None => panic!("connection {connection} is gone"),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The wakeup alone is let go: an eventfd's read completes only when somebody writes, and its 8 bytes are leaked.
        let others_in_flight =
            self.memory.connections.iter().flatten().any(|memory| memory.ops_in_flight > 0);
        if others_in_flight {
            tracing::warn!(self.ops_in_flight, "a ring ends with operations in flight; its memory stays");
            return;
        }
        // SAFETY: taken once, here; `memory` is not used again.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        Box::leak(memory.wakeup_value);
    }
}
