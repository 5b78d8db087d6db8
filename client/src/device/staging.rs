//! The data of large WRITEs on its way into a socket, where the driver lets us copy it.
//!
//! ```text
//!   request's pages ─ pread, the one copy ─► pieces of a memory file ─ sendfile, by reference ─► socket ─► server
//! ```
//! Sent from the request's pages, a payload is copied as well: into pages of the socket, which the kernel makes and clears
//! for every one of them. Here they are used again and again.
//!
//! Owns: the memory, and which pieces hold which tag's data. Called by: `payload.rs` (by `queue_ring.rs`). Invariant: pieces
//! are free again only when the reply to their WRITE has come, because until then the socket may send them, for the first
//! time or again. A server that has replied has taken all of the payload, so what is sent again later is thrown away by its
//! TCP. Pieces sent on a connection that was lost are never used again: the queue sends nothing any more. Nothing here
//! allocates after construction.

use std::io;

use rustix::fs::sendfile;
use ublk_core::{Queue, StagingMemory};

use super::data_socket::DataSocket;
use super::stream::Stretch;

/// Bytes of a piece: the size of many a large WRITE.
const PIECE_BYTES: usize = 128 << 10;
/// Pieces of a queue, 16 MiB: more in flight gains nothing on any network; a WRITE that finds none free waits.
const PIECES: u16 = 128;
/// No piece.
const NONE: u16 = u16::MAX;

/// The memory of one queue's WRITEs.
#[derive(Debug)]
pub struct Staging {
    memory: StagingMemory,
    /// The last is taken first, so few are ever touched where few are needed.
    free: Vec<u16>,
    /// By tag: the first piece of its data.
    first: Box<[u16]>,
    /// By piece: the one that follows it.
    next: Box<[u16]>,
}

impl Staging {
    /// Makes the memory; it becomes resident as it is used. Errors: `ENOMEM`, `EMFILE`.
    pub fn new(queue_depth: u16) -> io::Result<Self> {
        Ok(Self {
            memory: StagingMemory::new(PIECES, PIECE_BYTES)?,
            free: (0..PIECES).rev().collect(),
            first: vec![NONE; usize::from(queue_depth)].into_boxed_slice(),
            next: vec![NONE; usize::from(PIECES)].into_boxed_slice(),
        })
    }

    /// Copies the data of the tag's WRITE; false: there is no room yet. Errors: those of [`Queue::stage_request`].
    ///
    /// # Panics
    /// When the tag has data here, or more than fits at all.
    pub fn stage(&mut self, queue: &Queue, tag: u16, len_bytes: u32) -> io::Result<bool> {
        assert_eq!(self.first[usize::from(tag)], NONE, "tag {tag} is staged");
        let pieces = (len_bytes as usize).div_ceil(PIECE_BYTES);
        assert!(pieces <= usize::from(PIECES), "a WRITE of {len_bytes} bytes does not fit");
        if self.free.len() < pieces {
            return Ok(false);
        }
        let mut last = NONE;
        for done_bytes in (0..len_bytes).step_by(PIECE_BYTES) {
            let Some(piece) = self.free.pop() else { return Ok(false) };
            self.next[usize::from(piece)] = NONE;
            match last {
                NONE => self.first[usize::from(tag)] = piece,
                _ => self.next[usize::from(last)] = piece,
            }
            last = piece;
            let piece_bytes = PIECE_BYTES.min((len_bytes - done_bytes) as usize);
            queue.stage_request(tag, done_bytes, piece_bytes, &mut self.memory, piece)?;
        }
        Ok(true)
    }

    /// Hands the socket what it takes of the rest of the tag's data: how many bytes. Errors: sendfile's, `EAGAIN` when it
    /// takes none.
    ///
    /// # Panics
    /// When the tag has no data here.
    pub fn send(&self, socket: &DataSocket, tag: u16, rest: Stretch) -> io::Result<u32> {
        let done_bytes = rest.done_bytes() as usize;
        let mut piece = self.first[usize::from(tag)];
        for _ in 0..done_bytes / PIECE_BYTES {
            piece = self.next[usize::from(piece)];
        }
        assert_ne!(piece, NONE, "tag {tag} is not staged");
        let in_piece_bytes = done_bytes % PIECE_BYTES;
        let len_bytes = (PIECE_BYTES - in_piece_bytes).min(rest.rest_bytes() as usize);
        let mut offset_bytes = self.memory.offset_bytes(piece) + in_piece_bytes as u64;
        let sent_bytes = sendfile(socket, self.memory.file(), Some(&mut offset_bytes), len_bytes)?;
        Ok(sent_bytes as u32)
    }

    /// The reply to the tag's WRITE has come: its pieces, if it has any, are free.
    pub fn release(&mut self, tag: u16) {
        let mut piece = std::mem::replace(&mut self.first[usize::from(tag)], NONE);
        while piece != NONE {
            self.free.push(piece);
            piece = self.next[usize::from(piece)];
        }
    }
}
