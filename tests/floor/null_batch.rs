//! The null target once more, with the driver's commands for many tags at once (`UBLK_F_BATCH_IO`, Linux 7.0): what they would
//! save.
//!
//! ```text
//!   FETCH_IO_CMDS, once ─► arrays of tags, in buffers of a ring of them ─► one COMMIT_IO_CMDS for all that a pass brought
//! ```
//! Owns the loop; the device is `null_target.rs`'s. Source: `include/uapi/linux/ublk_cmd.h`, `drivers/block/ublk_drv.c`, Linux 7.3.
#![allow(unsafe_code)] // Submissions name memory by address, and the kernel fills buffers of ours.

use std::alloc::Layout;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use io_uring::types::BufRingEntry;
use io_uring::{cqueue, opcode, squeue, types};
use ublk_core::Queue;
use ublk_core::abi::UBLK_IO_RES_ABORT;
use ublk_core::ring::{QueueRing, Sqe, build_queue_ring};

use super::null_target::result;

const UBLK_U_IO_PREP_IO_CMDS: u32 = 0xc010_7525;
const UBLK_U_IO_COMMIT_IO_CMDS: u32 = 0xc010_7526;
const UBLK_U_IO_FETCH_IO_CMDS: u32 = 0xc010_7527;

/// `IORING_URING_CMD_MULTISHOT` in `sqe->uring_cmd_flags`, which the crate cannot set.
const IORING_URING_CMD_MULTISHOT: u32 = 1 << 1;
/// Where that field is in `struct io_uring_sqe`.
const SQE_FLAGS_OFFSET_BYTES: usize = 28;

const FETCH: u64 = 0;
const PREP: u64 = 1;
const COMMIT: u64 = 2;

/// Buffers for arrays of tags; the driver puts at most 128 into one.
const BUFFERS: u16 = 16;
const TAGS_OF_A_BUFFER: usize = 128;
const BUFFER_GROUP: u16 = 0;

/// `struct ublk_elem_header`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Element {
    tag: u16,
    buf_index: u16,
    result: i32,
}

/// Arrays of tags that the kernel fills, and the ring in which they are given to it.
struct TagBuffers {
    entries: *mut BufRingEntry,
    tags: Box<[[u16; TAGS_OF_A_BUFFER]]>,
    tail: u16,
}

impl TagBuffers {
    fn register(ring: &QueueRing) -> Result<Self> {
        let layout = Layout::from_size_align(usize::from(BUFFERS) * size_of::<BufRingEntry>(), 4096)?;
        // SAFETY: the layout is not empty. It is never given back: the process ends with the loop.
        let entries = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<BufRingEntry>();
        ensure!(!entries.is_null(), "no memory");
        // SAFETY: the memory is page-aligned, of this many entries, and outlives the ring.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(entries as u64, BUFFERS, BUFFER_GROUP, 0)?;
        }
        let tags = vec![[0; TAGS_OF_A_BUFFER]; usize::from(BUFFERS)].into_boxed_slice();
        let mut buffers = Self { entries, tags, tail: 0 };
        (0..BUFFERS).for_each(|id| buffers.give(id));
        Ok(buffers)
    }

    fn give(&mut self, id: u16) {
        let address = self.tags[usize::from(id)].as_mut_ptr() as u64;
        let place = self.entries.wrapping_add(usize::from(self.tail % BUFFERS));
        // SAFETY: the index is below the number of entries; the kernel does not read this entry before the tail moves.
        let entry = unsafe { &mut *place };
        entry.set_addr(address);
        entry.set_len(size_of::<[u16; TAGS_OF_A_BUFFER]>() as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the ring's base, as it was registered.
        let tail = unsafe { BufRingEntry::tail(self.entries) };
        // SAFETY: the ring's tail is an aligned u16 that the kernel only reads.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

/// `struct ublk_batch_io` for so many elements of the type.
fn header<T>(q_id: u16, elements: usize) -> [u8; 16] {
    let mut header = [0; 16];
    header[0..2].copy_from_slice(&q_id.to_ne_bytes());
    header[4..6].copy_from_slice(&(elements as u16).to_ne_bytes());
    header[6] = size_of::<T>() as u8;
    header
}

fn command(char_device: RawFd, cmd_op: u32, q_id: u16, elements: &[Element]) -> Sqe {
    let builder = opcode::UringCmd16::new(types::Fd(char_device), cmd_op);
    let builder = builder.cmd(header::<Element>(q_id, elements.len()));
    builder.addr(Some(elements.as_ptr() as u64)).build().into()
}

fn fetch(char_device: RawFd, q_id: u16) -> Sqe {
    let builder = opcode::UringCmd16::new(types::Fd(char_device), UBLK_U_IO_FETCH_IO_CMDS);
    let builder = builder.cmd(header::<u16>(q_id, 0));
    let sqe = builder.buf_index(Some(BUFFER_GROUP)).build().flags(squeue::Flags::BUFFER_SELECT);
    let mut sqe = Sqe::from(sqe);
    let flags = std::ptr::from_mut(&mut sqe).cast::<u8>().wrapping_add(SQE_FLAGS_OFFSET_BYTES).cast::<u32>();
    // SAFETY: the field is an aligned u32 inside this entry, which is plain bytes and ours alone.
    unsafe { flags.write(IORING_URING_CMD_MULTISHOT) };
    sqe.user_data(FETCH)
}

/// Answers until the device is stopped.
pub(crate) fn serve_queue(queue: &Queue, char_device: RawFd) -> Result<()> {
    let depth = queue.queue_depth();
    let mut ring = build_queue_ring(8, u32::from(depth) * 4)?;
    ring.submitter().register_buffers_sparse(u32::from(depth))?;
    let mut buffers = TagBuffers::register(&ring)?;
    let mut elements: Vec<Element> =
        (0..depth).map(|tag| Element { tag, buf_index: tag, result: 0 }).collect();
    let prepare = command(char_device, UBLK_U_IO_PREP_IO_CMDS, queue.q_id(), &elements);
    push(&mut ring.submission(), prepare.user_data(PREP))?;
    ring.submit_and_wait(1)?;
    let prepared = ring.completion().next().context("an answer to PREP_IO_CMDS")?.result();
    ensure!(prepared == 0, "PREP_IO_CMDS answered {prepared}");
    push(&mut ring.submission(), fetch(char_device, queue.q_id()))?;
    loop {
        // Commits are done when this returns: the driver does them as they are submitted.
        ring.submit_and_wait(1)?;
        elements.clear();
        let (_, mut submissions, completions) = ring.split();
        for completion in completions {
            match (completion.user_data(), completion.result()) {
                (FETCH, UBLK_IO_RES_ABORT) => return Ok(()),
                (FETCH, bytes) if bytes >= 0 => {
                    let id = cqueue::buffer_select(completion.flags()).context("a buffer with tags")?;
                    let tags = &buffers.tags[usize::from(id)][..bytes as usize / size_of::<u16>()];
                    elements.extend(tags.iter().map(|&tag| Element {
                        tag,
                        buf_index: tag,
                        result: result(queue, tag),
                    }));
                    buffers.give(id);
                    if !cqueue::more(completion.flags()) {
                        push(&mut submissions, fetch(char_device, queue.q_id()))?;
                    }
                }
                (command, errno) => bail!("command {command} answered {errno}"),
            }
        }
        if !elements.is_empty() {
            let commit = command(char_device, UBLK_U_IO_COMMIT_IO_CMDS, queue.q_id(), &elements);
            // Its answer would only say that all is well.
            push(&mut submissions, commit.user_data(COMMIT).flags(squeue::Flags::SKIP_SUCCESS))?;
        }
    }
}

fn push(submissions: &mut io_uring::SubmissionQueue<'_, Sqe>, sqe: Sqe) -> Result<()> {
    // SAFETY: what it names outlives the ring: the character device, the elements, which are not touched before the submission
    // has returned, and the buffers.
    unsafe { submissions.push(&sqe) }.context("the ring has an entry for each command")
}
