//! Data buffers of a queue whose requests are copied: one for each tag.
//!
//! Owns: `queue_depth` page-aligned buffers in one map. Never: decides who uses a buffer when; the tag's state does.
//! Called by: the client's queue loop on the `mapped` and `user-copy` data paths.
//! Invariants: a tag's buffer has one address for the life of the queue and holds the largest request; it must
//! outlive every operation that names its address, so drop it after the ring.

use std::fs::File;
use std::io;

use crate::mapping::{Mapping, round_up_to_pages};

/// One page-aligned buffer for each tag of a queue.
#[derive(Debug)]
pub struct UserBuffers {
    mapping: Mapping,
    buffer_bytes: usize,
}

impl UserBuffers {
    /// Maps `queue_depth` buffers of at least `max_io_bytes`, resident as far as they are used. Errors: `ENOMEM`, also
    /// when the process may lock no more memory.
    pub fn new(queue_depth: u16, max_io_bytes: u32) -> io::Result<Self> {
        let buffer_bytes = round_up_to_pages(max_io_bytes as usize);
        let mapping = Mapping::anonymous(buffer_bytes * usize::from(queue_depth))?;
        Ok(Self { mapping, buffer_bytes })
    }

    /// Bytes of each buffer: the largest request rounded up to whole pages.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Address of the tag's buffer: for FETCH and COMMIT, and for the socket operations on its data.
    pub fn address(&self, tag: u16) -> u64 {
        self.mapping.address(self.offset_bytes(tag, 0, 0))
    }

    /// Copies `data` into the tag's buffer at `at_bytes`. Panics if it does not fit.
    pub fn copy_in(&mut self, tag: u16, at_bytes: usize, data: &[u8]) {
        let offset_bytes = self.offset_bytes(tag, at_bytes, data.len());
        self.mapping.copy_in(offset_bytes, data);
    }

    /// Copies from the tag's buffer at `at_bytes` to `data`. Panics if it is longer than the buffer.
    pub fn copy_out(&self, tag: u16, at_bytes: usize, data: &mut [u8]) {
        let offset_bytes = self.offset_bytes(tag, at_bytes, data.len());
        self.mapping.copy_out(offset_bytes, data);
    }

    /// Fills the start of the tag's buffer from `file`. Errors: pread's; `UnexpectedEof`.
    pub(crate) fn read_from(
        &mut self,
        tag: u16,
        len_bytes: u32,
        file: &File,
        from_bytes: u64,
    ) -> io::Result<()> {
        let offset_bytes = self.offset_bytes(tag, 0, len_bytes as usize);
        self.mapping.read_from(offset_bytes, len_bytes as usize, file, from_bytes)
    }

    /// Writes the start of the tag's buffer to `file`. Errors: pwrite's; `UnexpectedEof`.
    pub(crate) fn write_to(&self, tag: u16, len_bytes: u32, file: &File, to_bytes: u64) -> io::Result<()> {
        let offset_bytes = self.offset_bytes(tag, 0, len_bytes as usize);
        self.mapping.write_to(offset_bytes, len_bytes as usize, file, to_bytes)
    }

    fn offset_bytes(&self, tag: u16, at_bytes: usize, len_bytes: usize) -> usize {
        let start_bytes = usize::from(tag) * self.buffer_bytes;
        assert!(start_bytes < self.mapping.len_bytes(), "tag {tag} is beyond the queue's depth");
        assert!(
            at_bytes <= self.buffer_bytes && len_bytes <= self.buffer_bytes - at_bytes,
            "{len_bytes} bytes at {at_bytes} do not fit a buffer of {} bytes",
            self.buffer_bytes
        );
        start_bytes + at_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_apart() {
        let buffers = UserBuffers::new(3, 5000).unwrap();
        let page_bytes = rustix::param::page_size() as u64;
        assert!(buffers.buffer_bytes() >= 5000);
        for tag in 0..3 {
            assert_eq!(buffers.address(tag) % page_bytes, 0);
        }
        assert_eq!(buffers.address(2) - buffers.address(1), buffers.buffer_bytes() as u64);
    }

    #[test]
    fn a_tag_keeps_its_own_bytes() {
        let mut buffers = UserBuffers::new(2, 4096).unwrap();
        buffers.copy_in(0, 0, &[1; 4096]);
        buffers.copy_in(1, 0, &[2; 4096]);
        let mut seen = [0; 4096];
        buffers.copy_out(0, 0, &mut seen);
        assert_eq!(seen, [1; 4096]);
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn a_copy_cannot_run_into_the_next_tag() {
        let mut buffers = UserBuffers::new(2, 4096).unwrap();
        let page_bytes = rustix::param::page_size();
        buffers.copy_in(0, page_bytes - 1, &[0; 2]);
    }
}
