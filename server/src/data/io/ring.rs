//! One io_uring, with the memory that its connections share.
//!
//! Owns: the ring and the payload buffers; `ring/wire.rs` has what is a connection's own. Never: decides what to do;
//! `session_io.rs` and `io/run.rs` do, in safe code.
//! Called by: `io/run.rs` and `session_io.rs`, on the ring's own thread only (`SINGLE_ISSUER`).
//! Invariants, which make the safe methods sound:
//! - every address in a submission lies in memory that this value or the connection's wire owns, or in a volume that the wire or
//!   a running sync holds;
//! - an operation of a connection is counted by its wire until it has ended, and by the ring;
//! - if the ring is dropped with operations in flight, its memory is leaked rather than freed under the kernel.
//!
//! Source: `include/uapi/linux/io_uring.h`; needs Linux 6.1 for `DEFER_TASKRUN`.
#![allow(unsafe_code)] // Submissions carry addresses; see the invariants above.

pub mod completion;
pub mod restricted;
mod send_area;
pub mod wire;

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use crate::backend::callback::{CompletionSink, Ended, Operation};
use crate::backend::memory::MemoryVolume;
use crate::backend::{Allocation, VolumeOp};
use crate::data::block_status::{ExtentFinder, StatusQuery};
use crate::data::dirty_bitmaps::SelectedBitmaps;
use crate::data::io::buffers::{Buffer, BufferPool};
use crate::data::io::page_pipes::{PagePipes, PipeId};
use crate::data::io::sync_groups::{Begin, Member, SyncGroups};
use crate::data::mailbox::Mailbox;
use crate::ids::RequestSlot;
use crate::limits::PAGES_BYTES_MIN;
use crate::limits::{IN_FLIGHT_REQUESTS_MAX, MemoryPlan, ZEROES_BYTES_MAX};
use crate::region::Region;
use crate::volume::{Backend, Volume};
use completion::{Completion, OpKind};
use send_area::PagesPlace;
use wire::Wire;

/// `IORING_RECVSEND_POLL_FIRST`: wait for the socket before looking at it.
const IORING_RECVSEND_POLL_FIRST: u16 = 1;

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

/// Everything that submissions point into.
struct Memory {
    pool: BufferPool,
    zeroes: Region,
    wakeup_value: Box<u64>,
}

/// A ring and its memory.
pub struct Ring {
    number: usize,
    io: IoUring,
    memory: ManuallyDrop<Memory>,
    pipes: PagePipes,
    syncs: SyncGroups,
    /// Volumes of which a sync runs, each held until none does; a sync's completion has the index.
    synced_volumes: Vec<Option<Arc<Volume>>>,
    synced: Vec<Member>,
    extents: ExtentFinder,
    /// Where backends that complete by call-back report to.
    sink: Arc<dyn CompletionSink>,
    /// Those that name its memory: all but the wakeup's.
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
            wakeup_value: Box::new(0),
        };
        Ok(Self {
            number,
            io,
            memory: ManuallyDrop::new(memory),
            pipes: PagePipes::new(plan.page_pipes),
            syncs: SyncGroups::default(),
            synced_volumes: Vec::new(),
            synced: Vec::with_capacity(IN_FLIGHT_REQUESTS_MAX),
            extents: ExtentFinder::start(number, Arc::clone(mailbox))?,
            sink: Arc::clone(mailbox) as Arc<dyn CompletionSink>,
            ops_in_flight: 0,
        })
    }

    /// Its number among the server's.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The payload buffers.
    pub fn pool(&mut self) -> &mut BufferPool {
        &mut self.memory.pool
    }

    /// Pages held for replies.
    pub fn pipes(&mut self) -> &mut PagePipes {
        &mut self.pipes
    }

    /// Takes hold of what a READ wants of the volume, if that goes without reading; it has to be given back.
    pub fn hold_pages(&mut self, volume: &Volume, offset_bytes: u64, length_bytes: u32) -> Option<PipeId> {
        match &volume.backend {
            Backend::File(file) => self.pipes.hold(file, offset_bytes, length_bytes),
            Backend::Memory(_) | Backend::Callback(_) => None,
        }
    }

    /// Whether a request waits for a buffer.
    pub fn has_waiters(&self) -> bool {
        self.memory.pool.has_waiters()
    }

    /// Copies received bytes to where a payload belongs, `done_bytes` into it.
    pub fn store_payload(
        &mut self,
        wire: &Wire,
        range: Range<usize>,
        place: PayloadPlace<'_>,
        done_bytes: u32,
    ) {
        let source = wire.bulk(range);
        match place {
            PayloadPlace::Buffer(buffer) => {
                let target = self.memory.pool.address(buffer, done_bytes as usize, source.len());
                // SAFETY: `address` checked the target's range; the buffer belongs to this request, for which no
                // operation is in flight while its payload is being copied; the two memories are distinct mappings.
                unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) };
            }
            PayloadPlace::Volume(offset_bytes) => {
                wire.volume_memory().write(offset_bytes + u64::from(done_bytes), source);
            }
            PayloadPlace::Pages(_) => panic!("held pages are not written"),
        }
    }

    /// Has the extents of the connection's volume looked up; comes back as [`crate::data::mailbox::RingMessage::ExtentsFound`], which has to be
    /// brought to [`Self::extents_found`].
    ///
    /// # Panics
    /// When the connection has no volume.
    pub fn find_extents(
        &mut self,
        wire: &mut Wire,
        slot: RequestSlot,
        bitmaps: Option<Arc<SelectedBitmaps>>,
        query: StatusQuery,
    ) {
        let Some(volume) = wire.volume().cloned() else { panic!("the connection has no volume") };
        wire.begin_op();
        self.extents.ask(wire.index(), slot, volume, bitmaps, query);
    }

    /// A question has been answered: it is not in flight any more.
    pub fn extents_found(&mut self, wire: &mut Wire) {
        self.extents.answer_taken();
        wire.end_op();
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
    pub fn push_receive_bulk(&mut self, wire: &mut Wire, range: Range<usize>, was_empty: bool) {
        let target = wire.lend_bulk(&range);
        let receive = opcode::Recv::new(wire.fd(), target, range.len() as u32);
        let op = receive.ioprio(if was_empty { IORING_RECVSEND_POLL_FIRST } else { 0 }).build();
        self.push(op, OpKind::ReceiveBulk, wire, RequestSlot(0));
    }

    /// Receives exactly `length_bytes` of a payload (fewer only at the stream's end), `done_bytes` into its place.
    pub fn push_receive_payload(
        &mut self,
        wire: &mut Wire,
        slot: RequestSlot,
        place: PayloadPlace<'_>,
        done_bytes: u32,
        length_bytes: u32,
    ) {
        let target = self.payload_address(wire, place, done_bytes, length_bytes);
        let op = opcode::Recv::new(wire.fd(), target, length_bytes).flags(libc::MSG_WAITALL).build();
        self.push(op, OpKind::ReceivePayload, wire, slot);
    }

    /// Adds a READ's payload.
    pub fn add_payload(&mut self, wire: &mut Wire, place: PayloadPlace<'_>, length_bytes: u32) {
        let source = match place {
            PayloadPlace::Volume(offset_bytes) if length_bytes >= PAGES_BYTES_MIN => {
                let place = PagesPlace::Volume(offset_bytes);
                wire.idle_send().add_pages(place, length_bytes as usize);
                return;
            }
            PayloadPlace::Pages(pipe) => {
                let place = PagesPlace::Pipe(pipe.index());
                wire.idle_send().add_pages(place, length_bytes as usize);
                return;
            }
            PayloadPlace::Volume(offset_bytes)
                if !wire.volume_memory().may_hold_data(offset_bytes, length_bytes) =>
            {
                self.memory.zeroes.address(0, length_bytes as usize)
            }
            _ => self.payload_address(wire, place, 0, length_bytes),
        };
        wire.idle_send().add(source, length_bytes as usize);
    }

    /// Sends what was added, as far as the socket takes it at once. True: all of it. False: there comes a completion when
    /// the socket has room; call again.
    ///
    /// Not through the ring: what the socket takes at once, and mostly it does, is then sent when this returns, and the
    /// ring is entered only to wait.
    ///
    /// # Errors
    /// Those of sendmsg(2), sendfile(2) and splice(2); the connection is of no use any more.
    pub fn send(&mut self, wire: &mut Wire) -> io::Result<bool> {
        let (send, socket, memory) = wire.sending();
        let sent = send.send(socket, memory.map(MemoryVolume::file), &mut self.pipes);
        if !matches!(sent, Ok(false)) {
            return sent;
        }
        send.waits_for_room = true;
        let op = opcode::PollAdd::new(wire.fd(), libc::POLLOUT as u32).build();
        self.push(op, OpKind::RoomToSend, wire, RequestSlot(0));
        Ok(false)
    }

    /// Does an operation of the connection's volume for a request.
    ///
    /// # Panics
    /// When the connection has no volume, or a READ or WRITE of a file no buffer.
    pub fn push_volume_op(
        &mut self,
        wire: &mut Wire,
        slot: RequestSlot,
        op: VolumeOp,
        buffer: Option<&Buffer>,
    ) {
        let Some(volume) = wire.volume() else { panic!("the connection has no volume") };
        if let VolumeOp::Sync { metadata } = op {
            if let Some(begin) = self.syncs.join(sync_key(volume), (wire.index(), slot), metadata) {
                let index = self.hold_synced(Arc::clone(volume));
                self.push_sync(index, &begin);
            }
            // Counted for the request from now on, whether its sync begins now or after the one that runs.
            return wire.begin_op();
        }
        if let VolumeOp::Allocate { mode: Allocation::Discard, offset_bytes, length_bytes } = op {
            let volume = Arc::clone(volume);
            return self.discard(wire, slot, volume, offset_bytes, length_bytes);
        }
        let file = match &volume.backend {
            Backend::File(file) => file.file(),
            Backend::Memory(memory) => memory.file(),
            Backend::Callback(backend) => {
                let token = Completion::user_data(OpKind::Volume, wire.index(), slot);
                backend.submit(self.operation(op, buffer, token));
                return wire.begin_op();
            }
        };
        let entry = self.file_op(types::Fd(file.as_raw_fd()), op, buffer);
        self.push(entry, OpKind::Volume, wire, slot);
    }

    /// Has a device give space back, for which io_uring has no operation before Linux 6.12, on a thread of the volume's own.
    fn discard(
        &mut self,
        wire: &mut Wire,
        slot: RequestSlot,
        volume: Arc<Volume>,
        offset_bytes: u64,
        length_bytes: u64,
    ) {
        let op = VolumeOp::Allocate { mode: Allocation::Discard, offset_bytes, length_bytes };
        let token = Completion::user_data(OpKind::Volume, wire.index(), slot);
        let operation = self.operation(op, None, token);
        wire.begin_op();
        let on = Arc::clone(&volume);
        let work = move || {
            let result = match &volume.backend {
                Backend::File(file) => file.discard(offset_bytes, length_bytes),
                Backend::Memory(_) | Backend::Callback(_) => Ok(()),
            };
            // Let go of before the ring is told: it may be the last to hold the volume.
            drop(volume);
            operation.finish(result.map_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO), |()| 0));
        };
        if let Backend::File(file) = &on.backend {
            file.in_background(Box::new(work));
        }
    }

    /// An operation for a backend that completes by call-back; comes back to [`Self::reap_ended`].
    fn operation(&mut self, op: VolumeOp, buffer: Option<&Buffer>, token: u64) -> Operation {
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
        self.ops_in_flight += 1;
        // SAFETY: a part of the pool, which is mapped and was zeroed by the kernel, and stays so while the ring has operations in
        // flight; it is of a buffer that belongs to this request, which nobody touches before it was reaped.
        unsafe { Operation::new(op, memory, token, Arc::clone(&self.sink)) }
    }

    /// Ends the connection's socket operations, now or soon: shuts the socket down and cancels what waits for it.
    pub fn push_cancel(&mut self, wire: &mut Wire) {
        wire.shut_down();
        let target = types::CancelBuilder::fd(wire.fd()).all();
        self.push(opcode::AsyncCancel2::new(target).build(), OpKind::Cancel, wire, RequestSlot(0));
    }

    /// Waits for the mailbox's eventfd.
    pub fn push_wakeup(&mut self, eventfd: &OwnedFd) {
        let target = (&raw mut *self.memory.wakeup_value).cast::<u8>();
        let op = opcode::Read::new(types::Fd(eventfd.as_raw_fd()), target, 8).offset(u64::MAX).build();
        let user_data = Completion::user_data(OpKind::Wakeup, 0, RequestSlot(0));
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
        for at in 0..completions.len() {
            let (kind, index) = (completions[at].kind(), completions[at].index());
            // The wakeup's was never counted.
            self.ops_in_flight -= u32::from(kind != OpKind::Wakeup);
            if kind == OpKind::Sync {
                self.reap_sync(index, completions[at].result(), completions);
            }
        }
        completions.retain(|completion| completion.kind() != OpKind::Sync);
    }

    /// The same for an operation that a backend has ended, which the mailbox brought: it, or one for each request that waited for a
    /// sync.
    pub fn reap_ended(&mut self, ended: &Ended, completions: &mut Vec<Completion>) {
        self.ops_in_flight -= 1;
        let completion = Completion::from_cqe(ended.token(), ended.result());
        if completion.kind() == OpKind::Sync {
            self.reap_sync(completion.index(), completion.result(), completions);
        } else {
            completions.push(completion);
        }
    }

    /// A sync has ended: each request it was for gets its result, and the next one begins.
    fn reap_sync(&mut self, index: u32, result: i32, completions: &mut Vec<Completion>) {
        let mut synced = std::mem::take(&mut self.synced);
        match self.syncs.ended(sync_key(self.synced_volume(index)), &mut synced) {
            Some(begin) => self.push_sync(index, &begin),
            None => self.synced_volumes[index as usize] = None,
        }
        let of_request = |(index, slot)| Completion::new(OpKind::Volume, index, slot, result);
        completions.extend(synced.drain(..).map(of_request));
        self.synced = synced;
    }

    fn hold_synced(&mut self, volume: Arc<Volume>) -> u32 {
        let free = self.synced_volumes.iter().position(Option::is_none);
        let index = free.unwrap_or(self.synced_volumes.len());
        if free.is_none() {
            self.synced_volumes.push(None);
        }
        self.synced_volumes[index] = Some(volume);
        index as u32
    }

    fn synced_volume(&self, index: u32) -> &Arc<Volume> {
        match self.synced_volumes.get(index as usize).and_then(Option::as_ref) {
            Some(volume) => volume,
            None => panic!("no sync {index} is running"),
        }
    }

    /// Begins a sync of the volume that is held under this index.
    fn push_sync(&mut self, index: u32, begin: &Begin) {
        let metadata = begin.metadata;
        let user_data = Completion::user_data(OpKind::Sync, index, RequestSlot(0));
        let volume = Arc::clone(self.synced_volume(index));
        let file = match &volume.backend {
            Backend::File(file) => file,
            Backend::Callback(backend) => {
                return backend.submit(self.operation(VolumeOp::Sync { metadata }, None, user_data));
            }
            Backend::Memory(_) => panic!("memory is not synced"),
        };
        let file = types::Fd(file.sync_file(self.number).as_raw_fd());
        let flags = if metadata { types::FsyncFlags::empty() } else { types::FsyncFlags::DATASYNC };
        self.ops_in_flight += 1;
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
                    Allocation::Discard => panic!("a discard is done on a thread of its own"),
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
        wire: &Wire,
        place: PayloadPlace<'_>,
        done_bytes: u32,
        length_bytes: u32,
    ) -> *mut u8 {
        match place {
            PayloadPlace::Buffer(buffer) => {
                self.memory.pool.address(buffer, done_bytes as usize, length_bytes as usize)
            }
            PayloadPlace::Volume(offset_bytes) => {
                wire.volume_memory().address(offset_bytes + u64::from(done_bytes), length_bytes)
            }
            PayloadPlace::Pages(_) => panic!("held pages have no address"),
        }
    }

    fn push(&mut self, entry: squeue::Entry, kind: OpKind, wire: &mut Wire, slot: RequestSlot) {
        wire.begin_op();
        self.ops_in_flight += 1;
        self.push_entry(entry.user_data(Completion::user_data(kind, wire.index(), slot)));
    }

    fn push_entry(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: every entry is built in this file, of memory that stays valid until its completion was reaped:
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
}

/// What syncs of a volume are joined by, while it is held.
fn sync_key(volume: &Arc<Volume>) -> usize {
    Arc::as_ptr(volume) as usize
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The wakeup alone is let go: an eventfd's read completes only when somebody writes, and its 8 bytes are leaked.
        if self.ops_in_flight > 0 {
            tracing::warn!(self.ops_in_flight, "a ring ends with operations in flight; its memory stays");
            return;
        }
        // SAFETY: taken once, here; `memory` is not used again.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        Box::leak(memory.wakeup_value);
    }
}
