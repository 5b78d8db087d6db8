//! A disk in a file, served through ublk-core alone: what the tests and the `null` example run.
//!
//! Owns: a queue loop that is as plain as one can be. Never: used by the product; no attention to speed.
//! Called by: `tests/ublk.rs` and `examples/null.rs`.
//! Invariants: every move of a tag goes through `TagTable`, so a loop that breaks its rules stops with an error.
#![allow(unsafe_code)] // Pushing SQEs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, ensure};
use io_uring::{opcode, types};
use ublk_core::abi::{UBLK_IO_RES_ABORT, UBLK_IO_RES_OK};
use ublk_core::ring::{QueueRing, Sqe, build_queue_ring};
use ublk_core::{
    ControlDevice, DataPath, Device, DeviceParams, DeviceSpec, IoDesc, IoOp, Queue, TagBuffer, TagTable,
    UserBuffers,
};

/// Where the data is.
#[derive(Clone)]
pub(crate) enum Store {
    /// Nowhere: every request succeeds at once. Reads give whatever the pages held, so never for real data.
    #[allow(dead_code)] // Only the example runs it.
    Null,
    /// In a file of the device's capacity.
    File(Arc<File>),
}

impl Store {
    /// A sparse file in memory.
    pub(crate) fn memory(capacity_bytes: u64) -> Result<Self> {
        let fd = rustix::fs::memfd_create("ram-disk", rustix::fs::MemfdFlags::CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(capacity_bytes)?;
        Ok(Self::File(Arc::new(file)))
    }
}

/// Requests seen, by kind.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) fua_writes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) write_zeroes: AtomicU64,
    pub(crate) write_zeroes_no_unmap: AtomicU64,
    pub(crate) registered_by_hand: AtomicU64,
    pub(crate) largest_bytes: AtomicU64,
}

/// How a queue serves.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) data_path: DataPath,
    pub(crate) store: Store,
    /// Name a buffer index that the ring does not have, so that every automatic registration fails.
    pub(crate) spoil_auto_registration: bool,
    pub(crate) counters: Arc<Counters>,
}

impl Service {
    pub(crate) fn new(data_path: DataPath, store: Store) -> Self {
        Self { data_path, store, spoil_auto_registration: false, counters: Arc::default() }
    }
}

/// A live device with its queues' threads.
pub(crate) struct RamDisk {
    pub(crate) device: Device,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl RamDisk {
    /// Adds a device and starts it.
    pub(crate) fn start(
        control: &ControlDevice,
        spec: &DeviceSpec,
        params: &DeviceParams,
        service: &Service,
    ) -> Result<Self> {
        let device = Device::add(control, spec, params)?;
        Self::serve(device, service)
    }

    /// Spawns the queues of a device that was added or taken on, and starts it.
    pub(crate) fn serve(device: Device, service: &Service) -> Result<Self> {
        let mut threads = Vec::new();
        for q_id in 0..device.info().nr_hw_queues {
            let queue = device.queue(q_id)?;
            let service = service.clone();
            let max_io_bytes = device.info().max_io_buf_bytes;
            threads.push(thread::spawn(move || {
                QueueLoop::new(queue, service, max_io_bytes)?.run().inspect_err(|error| {
                    eprintln!("queue {q_id}: {error:#}");
                })
            }));
        }
        let mut disk = Self { device, threads };
        disk.device.start()?;
        Ok(disk)
    }

    /// Stops and deletes the device; an error if a queue's thread failed.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.device.stop()?;
        self.finish()
    }

    /// Waits for the queues' threads, which end when the device has been stopped, then deletes it.
    pub(crate) fn finish(self) -> Result<()> {
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a queue's thread panicked"))??;
        }
        self.device.delete()?;
        Ok(())
    }
}

/// What a completion belongs to; in the upper half of `user_data`, above the tag.
const FETCH: u64 = 0;
const TRANSFER: u64 = 1;
const REGISTER: u64 = 2;
const UNREGISTER: u64 = 3;

struct QueueLoop {
    // Before the buffers and the queue, so that it is dropped, and its operations ended, before them.
    ring: QueueRing,
    queue: Queue,
    tags: TagTable,
    buffers: Option<UserBuffers>,
    /// What to commit once the pages are out of the buffer table again.
    results: Vec<i32>,
    service: Service,
}

impl QueueLoop {
    fn new(queue: Queue, service: Service, max_io_bytes: u32) -> Result<Self> {
        let depth = queue.queue_depth();
        let ring = build_queue_ring(u32::from(depth) * 2, u32::from(depth) * 4)?;
        let buffers = match service.data_path {
            DataPath::Mapped | DataPath::UserCopy => Some(UserBuffers::new(depth, max_io_bytes)?),
            _ => {
                ring.submitter().register_buffers_sparse(u32::from(depth))?;
                None
            }
        };
        let results = vec![0; usize::from(depth)];
        Ok(Self { ring, queue, tags: TagTable::new(depth), buffers, results, service })
    }

    fn run(mut self) -> Result<()> {
        for tag in 0..self.queue.queue_depth() {
            self.tags.fetch_submitted(tag)?;
            let sqe = self.queue.fetch_req(tag, self.tag_buffer(tag));
            self.push(FETCH, tag, sqe)?;
        }
        let mut completions = Vec::new();
        while !self.tags.is_finished() {
            self.ring.submit_and_wait(1)?;
            completions.extend(self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result())));
            for (user_data, result) in completions.drain(..) {
                let tag = (user_data & 0xffff) as u16;
                self.completed(user_data >> 16, tag, result).with_context(|| format!("tag {tag}"))?;
            }
        }
        Ok(())
    }

    fn completed(&mut self, kind: u64, tag: u16, result: i32) -> Result<()> {
        match kind {
            FETCH => match result {
                UBLK_IO_RES_OK => {
                    self.tags.request_arrived(tag)?;
                    self.request(tag)
                }
                UBLK_IO_RES_ABORT => Ok(self.tags.abort_completed(tag)?),
                errno => Err(anyhow!("FETCH or COMMIT answered {errno}")),
            },
            REGISTER => {
                ensure!(result == 0, "REGISTER_IO_BUF answered {result}");
                self.tags.operation_completed(tag)?;
                self.tags.buffer_registered(tag)?;
                self.transfer(tag)
            }
            UNREGISTER => {
                ensure!(result == 0, "UNREGISTER_IO_BUF answered {result}");
                self.tags.operation_completed(tag)?;
                self.tags.buffer_unregistered(tag)?;
                self.commit(tag, self.results[usize::from(tag)])
            }
            _ => {
                self.tags.operation_completed(tag)?;
                self.transferred(tag, result)
            }
        }
    }

    fn request(&mut self, tag: u16) -> Result<()> {
        let desc = self.queue.io_desc(tag);
        self.count(&desc);
        let has_data = matches!(desc.op(), IoOp::Read | IoOp::Write);
        if matches!(self.service.store, Store::Null) {
            return self.commit(tag, if has_data { desc.len_bytes() as i32 } else { 0 });
        }
        if desc.op() == IoOp::Write
            && let (DataPath::UserCopy, Some(buffers)) = (self.service.data_path, &mut self.buffers)
        {
            self.queue.copy_from_request(tag, buffers, desc.len_bytes() as u32)?;
        }
        if has_data && self.registers_by_hand(&desc) {
            self.service.counters.registered_by_hand.fetch_add(1, Ordering::Relaxed);
            self.tags.operation_submitted(tag)?;
            let sqe = self.queue.register_io_buf(tag, tag);
            return self.push(REGISTER, tag, sqe);
        }
        self.transfer(tag)
    }

    /// Moves the request's data, or starts what stands for it in a file.
    fn transfer(&mut self, tag: u16) -> Result<()> {
        let Store::File(file) = &self.service.store else {
            return Err(anyhow!("a null disk has no transfers"));
        };
        let fd = types::Fd(file.as_raw_fd());
        let desc = self.queue.io_desc(tag);
        let (offset, len) = (desc.offset_bytes(), desc.len_bytes());
        let sqe: Sqe = match (desc.op(), &self.buffers) {
            (IoOp::Flush, _) => return self.commit(tag, 0),
            (IoOp::Read, None) => {
                opcode::ReadFixed::new(fd, ptr::null_mut(), len as u32, tag).offset(offset).build()
            }
            (IoOp::Write, None) => {
                opcode::WriteFixed::new(fd, ptr::null(), len as u32, tag).offset(offset).build()
            }
            (IoOp::Read, Some(buffers)) => {
                let place = ptr::with_exposed_provenance_mut(buffers.address(tag) as usize);
                opcode::Read::new(fd, place, len as u32).offset(offset).build()
            }
            (IoOp::Write, Some(buffers)) => {
                let place = ptr::with_exposed_provenance(buffers.address(tag) as usize);
                opcode::Write::new(fd, place, len as u32).offset(offset).build()
            }
            (IoOp::Discard | IoOp::WriteZeroes, _) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            (IoOp::Other(_), _) => return self.commit(tag, -libc::EOPNOTSUPP),
        }
        .into();
        self.tags.operation_submitted(tag)?;
        self.push(TRANSFER, tag, sqe)
    }

    fn transferred(&mut self, tag: u16, result: i32) -> Result<()> {
        let desc = self.queue.io_desc(tag);
        let has_data = matches!(desc.op(), IoOp::Read | IoOp::Write);
        let expected = if has_data { desc.len_bytes() as i32 } else { 0 };
        // A file in memory moves everything or fails; anything between is an error to the requester.
        let result = if result == expected || result < 0 { result } else { -libc::EIO };
        if desc.op() == IoOp::Read
            && let (DataPath::UserCopy, Some(buffers)) = (self.service.data_path, &self.buffers)
        {
            self.queue.copy_to_request(tag, buffers, desc.len_bytes() as u32)?;
        }
        if has_data && self.registers_by_hand(&desc) {
            self.results[usize::from(tag)] = result;
            self.tags.operation_submitted(tag)?;
            let sqe = self.queue.unregister_io_buf(tag, tag);
            return self.push(UNREGISTER, tag, sqe);
        }
        self.commit(tag, result)
    }

    fn commit(&mut self, tag: u16, result: i32) -> Result<()> {
        self.tags.commit_submitted(tag)?;
        let sqe = self.queue.commit_and_fetch_req(tag, result, self.tag_buffer(tag));
        self.push(FETCH, tag, sqe)
    }

    fn registers_by_hand(&self, desc: &IoDesc) -> bool {
        self.service.data_path == DataPath::Registered || desc.needs_buffer_registration()
    }

    fn tag_buffer(&self, tag: u16) -> TagBuffer {
        match &self.buffers {
            _ if matches!(self.service.data_path, DataPath::Registered | DataPath::UserCopy) => {
                TagBuffer::None
            }
            Some(buffers) => TagBuffer::UserAddress(buffers.address(tag)),
            None if self.service.spoil_auto_registration => TagBuffer::AutoRegister { index: u16::MAX },
            None => TagBuffer::AutoRegister { index: tag },
        }
    }

    fn push(&mut self, kind: u64, tag: u16, sqe: Sqe) -> Result<()> {
        let sqe = sqe.user_data(kind << 16 | u64::from(tag));
        // SAFETY: files, buffers and descriptors that the SQE names belong to this value and outlive the ring.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        pushed.context("the ring has room for two SQEs of every tag")
    }

    fn count(&self, desc: &IoDesc) {
        let counters = &self.service.counters;
        let counter = match desc.op() {
            IoOp::Read => &counters.reads,
            IoOp::Write if desc.fua() => &counters.fua_writes,
            IoOp::Write => &counters.writes,
            IoOp::Flush => &counters.flushes,
            IoOp::Discard => &counters.discards,
            IoOp::WriteZeroes if desc.no_unmap() => &counters.write_zeroes_no_unmap,
            IoOp::WriteZeroes => &counters.write_zeroes,
            IoOp::Other(_) => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if matches!(desc.op(), IoOp::Read | IoOp::Write) {
            counters.largest_bytes.fetch_max(desc.len_bytes(), Ordering::Relaxed);
        }
    }
}
