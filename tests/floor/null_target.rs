//! A ublk disk over zero copy on which every request succeeds at once.
//!
//! Owns: one device with one queue, whose loop does nothing but commit: every request that is ready is answered by one
//! `io_uring_enter`, which also waits for the next. Never keeps or returns data: reads give what the pages held. Called by
//! `main`. Source: `include/uapi/linux/ublk_cmd.h`, Linux 7.3.
#![allow(unsafe_code)] // Pushing SQEs.

use std::io::{Read as _, stdin};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use ublk_core::abi::{UBLK_F_BATCH_IO, UBLK_IO_RES_ABORT, UBLK_IO_RES_OK};
use ublk_core::control::block_device_path;
use ublk_core::ring::{Sqe, build_queue_ring};
use ublk_core::{ControlDevice, DataPath, Device, DeviceParams, DeviceSpec, IoOp, Queue, TagBuffer};

use super::null_batch;

/// As deep as the product's queues are by default.
const QUEUE_DEPTH: u16 = 128;

/// No I/O of the measurement is split.
const MAX_IO_BYTES: u32 = 1 << 20;

/// Adds the disk, says its path, serves until standard input ends, deletes it.
pub(crate) fn serve(size_mib: u64, is_batched: bool) -> Result<()> {
    let control = ControlDevice::open()?;
    let spec = DeviceSpec {
        dev_id: None,
        nr_hw_queues: 1,
        queue_depth: QUEUE_DEPTH,
        max_io_buf_bytes: MAX_IO_BYTES,
        flags: DataPath::Fused.device_flags() | if is_batched { UBLK_F_BATCH_IO } else { 0 },
        wished_flags: 0,
        ublksrv_flags: 0,
    };
    let mut device = Device::add(&control, &spec, &DeviceParams::new(size_mib << 20))?;
    let queue = device.queue(0)?;
    let char_device = Arc::clone(device.char_device());
    let thread = thread::Builder::new().name("floor-q0".to_owned()).spawn(move || match is_batched {
        true => null_batch::serve_queue(&queue, char_device.as_raw_fd()),
        false => serve_queue(&queue),
    })?;
    device.start()?;
    println!("{}", block_device_path(device.dev_id()).display());
    stdin().read_to_end(&mut Vec::new())?;
    device.stop()?;
    thread.join().map_err(|_| anyhow!("the queue's thread panicked"))??;
    Ok(device.delete()?)
}

/// Answers until every tag has been aborted, which is how a device says that it has been stopped.
fn serve_queue(queue: &Queue) -> Result<()> {
    let depth = queue.queue_depth();
    let mut ring = build_queue_ring(u32::from(depth), u32::from(depth) * 2)?;
    ring.submitter().register_buffers_sparse(u32::from(depth))?;
    for tag in 0..depth {
        push(&mut ring.submission(), tag, queue.fetch_req(tag, TagBuffer::AutoRegister { index: tag }))?;
    }
    let mut live_tags = depth;
    while live_tags > 0 {
        ring.submit_and_wait(1)?;
        let (_, mut submissions, completions) = ring.split();
        for completion in completions {
            let tag = completion.user_data() as u16;
            match completion.result() {
                UBLK_IO_RES_OK => push(&mut submissions, tag, answer(queue, tag))?,
                UBLK_IO_RES_ABORT => live_tags -= 1,
                errno => bail!("tag {tag}: FETCH or COMMIT answered {errno}"),
            }
        }
    }
    Ok(())
}

fn answer(queue: &Queue, tag: u16) -> Sqe {
    queue.commit_and_fetch_req(tag, result(queue, tag), TagBuffer::AutoRegister { index: tag })
}

/// Success, in full length.
pub(crate) fn result(queue: &Queue, tag: u16) -> i32 {
    let desc = queue.io_desc(tag);
    let has_data = matches!(desc.op(), IoOp::Read | IoOp::Write);
    if has_data { desc.len_bytes() as i32 } else { 0 }
}

fn push(submissions: &mut io_uring::SubmissionQueue<'_, Sqe>, tag: u16, sqe: Sqe) -> Result<()> {
    let sqe = sqe.user_data(u64::from(tag));
    // SAFETY: FETCH and COMMIT with automatic registration name the character device, which the queue keeps open, and no
    // memory of ours.
    unsafe { submissions.push(&sqe) }.context("the ring has an entry for each tag")
}
