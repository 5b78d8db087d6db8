//! Memory in which the data of WRITEs lies while a socket refers to it.
//!
//! Owns: a memory file (memfd), mapped, in pieces of one size. What was copied there from a request's pages can be sent as
//! pages of the file (sendfile(2)): the socket takes references, so the one copy is all, and no page is allocated for it.
//! Never: decides which piece is whose, or when one is free again; the client's `staging.rs` does.
//! Called by: the client's data path where the driver lets it copy (`UBLK_F_USER_COPY`).
//! Invariant: a piece that was sent must keep its bytes until the peer has taken them.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::mapping::{HUGE_PAGE_BYTES, Mapping};

/// A memory file in pieces.
#[derive(Debug)]
pub struct StagingMemory {
    file: File,
    mapping: Mapping,
    /// Where in the mapping the file begins.
    start_bytes: usize,
    piece_bytes: usize,
    len_bytes: usize,
    /// Up to here the memory was asked to be of huge pages.
    prepared_bytes: usize,
}

impl StagingMemory {
    /// Makes `pieces` of `piece_bytes`, together whole huge pages; they become resident as they are used. Errors: `ENOMEM`,
    /// `EMFILE`.
    ///
    /// # Panics
    /// When together they are not whole huge pages.
    pub fn new(pieces: u16, piece_bytes: usize) -> io::Result<Self> {
        let len_bytes = usize::from(pieces) * piece_bytes;
        assert!(len_bytes.is_multiple_of(HUGE_PAGE_BYTES), "not whole huge pages");
        let file = File::from(memfd_create("volnode-staging", MemfdFlags::CLOEXEC)?);
        file.set_len(len_bytes as u64)?;
        let (mapping, start_bytes) = Mapping::of_file(&file, len_bytes)?;
        Ok(Self { file, mapping, start_bytes, piece_bytes, len_bytes, prepared_bytes: 0 })
    }

    /// The memory file that the staged bytes lie in.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where in the file a piece begins.
    pub fn offset_bytes(&self, piece: u16) -> u64 {
        (usize::from(piece) * self.piece_bytes) as u64
    }

    /// Fills the memory from the start of `piece` on, further pieces included. Errors: pread's; `UnexpectedEof`.
    pub(crate) fn read_from(
        &mut self,
        piece: u16,
        len_bytes: u32,
        from: &File,
        from_bytes: u64,
    ) -> io::Result<()> {
        let len_bytes = len_bytes as usize;
        let at_bytes = usize::from(piece) * self.piece_bytes;
        assert!(at_bytes + len_bytes <= self.len_bytes, "{len_bytes} bytes at piece {piece} are too many");
        while self.prepared_bytes < at_bytes + len_bytes {
            self.mapping.make_huge(self.start_bytes + self.prepared_bytes);
            self.prepared_bytes += HUGE_PAGE_BYTES;
        }
        self.mapping.read_from(self.start_bytes + at_bytes, len_bytes, from, from_bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn what_is_staged_is_in_the_file() {
        let mut memory = StagingMemory::new(32, 128 << 10).unwrap();
        let mut source = File::from(memfd_create("source", MemfdFlags::CLOEXEC).unwrap());
        let bytes: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
        source.write_all(&bytes).unwrap();
        source.rewind().unwrap();
        for piece in [0, 17, 30] {
            memory.read_from(piece, 150_000, &source, 1000).unwrap();
            let mut staged = vec![0; 150_000];
            memory.file().read_exact_at(&mut staged, memory.offset_bytes(piece)).unwrap();
            assert!(staged == bytes[1000..151_000]);
        }
    }

    #[test]
    #[should_panic(expected = "too many")]
    fn nothing_is_read_past_the_last_piece() {
        let mut memory = StagingMemory::new(16, 128 << 10).unwrap();
        let source = File::from(memfd_create("source", MemfdFlags::CLOEXEC).unwrap());
        let _ = memory.read_from(15, (128 << 10) + 1, &source, 0);
    }
}
