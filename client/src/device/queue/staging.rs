//! The data of large WRITEs on its way into a socket, where the driver lets us copy it.
//!
//! ```text
//!   request's pages ─ pread, the one copy ─► pieces of a memory file ─ sendfile, by reference ─► socket ─► server
//! ```
//! Sent from the request's pages, a payload is copied as well: into pages of the socket, which the kernel makes and clears
//! for every one of them. Here they are used again and again.
//!
//! Owns: the memory, and which pieces hold which tag's data. Called by: `payload.rs` (by `ring.rs`). Invariant: pieces
//! are free again only when the reply to their WRITE has come, because until then the socket may send them, for the first
//! time or again. A server that has replied has taken all of the payload, so what is sent again later is thrown away by its
//! TCP. After a connection was lost nobody knows what is still under way, and a server on this machine reads out of these
//! very pages. What is sent again is sent from where it lies. The pieces of a WRITE that is not are never used again: all memory
//! is replaced ([`Staging::renew`]) as soon as none of it is in use. But for that, nothing here allocates after construction.

use std::io;

use rustix::fs::sendfile;
use ublk_core::{Queue, StagingMemory};

use super::stream::Stretch;
use crate::device::connect::data_socket::DataSocket;

/// Bytes of a piece: the size of many a large WRITE.
const PIECE_BYTES: usize = 128 << 10;
/// Pieces of a queue, 16 MiB, one for each bit of a word: more in flight gains nothing on any network; a WRITE that finds
/// no room waits.
const PIECES: u16 = u128::BITS as u16;

/// The memory of one queue's WRITEs.
#[derive(Debug)]
pub struct Staging {
    memory: StagingMemory,
    /// By bit: whether the piece is free. The lowest are taken first, so few are ever touched where few are needed.
    free: u128,
    /// By tag: the pieces of its data, by bit; they lie side by side.
    taken: Box<[u128]>,
    /// Pieces whose WRITE ended without a reply.
    doubtful: u128,
}

impl Staging {
    /// Makes the memory; it becomes resident as it is used. Errors: `ENOMEM`, `EMFILE`.
    pub fn new(queue_depth: u16) -> io::Result<Self> {
        Ok(Self {
            memory: StagingMemory::new(PIECES, PIECE_BYTES)?,
            free: u128::MAX,
            taken: vec![0; usize::from(queue_depth)].into_boxed_slice(),
            doubtful: 0,
        })
    }

    /// Copies the data of the tag's WRITE, unless it lies here already because it is sent again; false: there is no room
    /// yet. Errors: those of [`Queue::stage_request`].
    ///
    /// # Panics
    /// When the tag has no data, or more than fits at all.
    pub fn stage(&mut self, queue: &Queue, tag: u16, len_bytes: u32) -> io::Result<bool> {
        if self.taken[usize::from(tag)] != 0 {
            return Ok(true);
        }
        let count = len_bytes.div_ceil(PIECE_BYTES as u32);
        let found = match side_by_side(self.free, count) {
            None if self.doubtful != 0 => {
                self.renew()?;
                side_by_side(self.free, count)
            }
            found => found,
        };
        let Some(pieces) = found else { return Ok(false) };
        self.free &= !pieces;
        self.taken[usize::from(tag)] = pieces;
        queue.stage_request(tag, len_bytes, &mut self.memory, pieces.trailing_zeros() as u16)?;
        Ok(true)
    }

    /// Hands the socket what it takes of the rest of the tag's data: how many bytes. Errors: sendfile's, `EAGAIN` when it
    /// takes none.
    ///
    /// # Panics
    /// When the tag has no data here.
    pub fn send(&self, socket: &DataSocket, tag: u16, rest: Stretch) -> io::Result<u32> {
        let pieces = self.taken[usize::from(tag)];
        assert_ne!(pieces, 0, "tag {tag} is not staged");
        let start_bytes = self.memory.offset_bytes(pieces.trailing_zeros() as u16);
        let mut from_bytes = start_bytes + u64::from(rest.done_bytes());
        let len_bytes = rest.rest_bytes() as usize;
        let sent_bytes = sendfile(socket, self.memory.file(), Some(&mut from_bytes), len_bytes)?;
        Ok(sent_bytes as u32)
    }

    /// The tag's request has ended. Its pieces, if it has any, are free if the server has replied.
    pub fn release(&mut self, tag: u16, has_reply: bool) {
        let pieces = std::mem::take(&mut self.taken[usize::from(tag)]);
        match has_reply {
            true => self.free |= pieces,
            false => self.doubtful |= pieces,
        }
    }

    /// Replaces the memory if a part of it may still be under way on a former connection and none is in use. The pages of
    /// the old one live as long as a socket refers to them. Errors: as [`Staging::new`]; nothing has changed then.
    pub fn renew(&mut self) -> io::Result<()> {
        let is_in_use = self.taken.iter().any(|&pieces| pieces != 0);
        if self.doubtful != 0 && !is_in_use {
            self.memory = StagingMemory::new(PIECES, PIECE_BYTES)?;
            (self.free, self.doubtful) = (u128::MAX, 0);
        }
        Ok(())
    }
}

/// The lowest `count` set bits of `free` that are side by side.
///
/// # Panics
/// When `count` is 0, or more than there are bits.
fn side_by_side(free: u128, count: u32) -> Option<u128> {
    assert!((1..=u128::BITS).contains(&count), "{count} pieces");
    let starts = (1..count).fold(free, |starts, distance| starts & (free >> distance));
    (starts != 0).then(|| (u128::MAX >> (u128::BITS - count)) << starts.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_room_that_is_wide_enough_is_taken() {
        assert_eq!(side_by_side(u128::MAX, 1), Some(1));
        assert_eq!(side_by_side(u128::MAX, 128), Some(u128::MAX));
        assert_eq!(side_by_side(0b1110_1101, 1), Some(0b1));
        assert_eq!(side_by_side(0b1110_1101, 2), Some(0b1100));
        assert_eq!(side_by_side(0b1110_1101, 3), Some(0b1110_0000));
        assert_eq!(side_by_side(0b1110_1101, 4), None);
        assert_eq!(side_by_side(0b111 << 125, 3), Some(0b111 << 125));
        assert_eq!(side_by_side(0b111 << 125, 4), None, "nothing beyond the last");
        assert_eq!(side_by_side(0, 1), None);
    }
}
