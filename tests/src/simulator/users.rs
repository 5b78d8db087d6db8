//! What users ask a disk for, and what the oracle is to be told of it.

use std::time::Instant;

use client::device::queue::block_request::BlockRequest;
use fastrand::Rng;
use proto::nbd::transmission::{Command, CommandFlags};

use super::client::{Bio, Note};
use crate::block_history::{BLOCK_BYTES, BlockHistory, Blocks, Pattern};

const BLOCKS_OF_A_REQUEST_MAX: usize = 3;

/// One more request; `None`: what was chosen cannot be asked for now.
pub(super) fn any_request(
    history: &mut BlockHistory,
    has_cache: bool,
    now: Instant,
    rng: &mut Rng,
) -> Option<Bio> {
    let count = if rng.bool() { 1 } else { rng.usize(1..=BLOCKS_OF_A_REQUEST_MAX) };
    let blocks = Blocks { first: rng.usize(..=history.block_count() - count), count };
    let kind = rng.u8(..16);
    let is_fua = has_cache && rng.u8(..4) == 0;
    let (command, pattern) = match kind {
        0..=5 => return Some(read(history, blocks, now)),
        6..=11 => (Command::Write, Pattern::Stamped),
        12 => (Command::WriteZeroes, Pattern::Zeroes),
        13 => (Command::Trim, Pattern::Zeroes),
        _ => return has_cache.then(|| flush(history, now)),
    };
    if !history.is_idle(blocks) {
        return None;
    }
    let (write, data) = history.send_write(blocks, pattern);
    let request = BlockRequest {
        command,
        flags: if is_fua { CommandFlags::FUA } else { CommandFlags::NONE },
        offset_bytes: blocks.offset_bytes(),
        length_bytes: blocks.length_bytes(),
    };
    let note = Note::Write { write, is_durable: is_fua || !has_cache };
    Some(Bio { request, data, note, submitted_at: now })
}

/// A READ of those blocks.
pub(super) fn read(history: &BlockHistory, blocks: Blocks, now: Instant) -> Bio {
    let request = BlockRequest {
        command: Command::Read,
        flags: CommandFlags::NONE,
        offset_bytes: blocks.offset_bytes(),
        length_bytes: blocks.length_bytes(),
    };
    let data = vec![0xee; BLOCK_BYTES * blocks.count];
    Bio { request, data, note: Note::Read(history.send_read(blocks)), submitted_at: now }
}

/// A FLUSH.
pub(super) fn flush(history: &BlockHistory, now: Instant) -> Bio {
    let note = Note::Flush(history.send_flush());
    Bio { request: BlockRequest::FLUSH, data: Vec::new(), note, submitted_at: now }
}
