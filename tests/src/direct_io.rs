//! Reading and writing a device past the page cache: how it is opened, and memory that the kernel accepts for it.
//!
//! Used by what writes to our disks itself instead of leaving that to fio.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::fs::OFlags;

/// What direct I/O needs of a buffer's address, at most.
const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Opens a device for direct reads and writes.
///
/// # Errors
/// open(2)'s.
pub fn open_direct(device: &Path) -> Result<File> {
    let flags = OFlags::DIRECT.bits() as i32;
    let opened = File::options().read(true).write(true).custom_flags(flags).open(device);
    opened.with_context(|| format!("opening {}", device.display()))
}

/// Memory whose address direct I/O accepts.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    first: usize,
    length_bytes: usize,
}

impl AlignedBuffer {
    /// Zeroes.
    pub fn new(length_bytes: usize) -> Self {
        let memory = vec![0; length_bytes + BUFFER_ALIGNMENT_BYTES];
        let first = memory.as_ptr().align_offset(BUFFER_ALIGNMENT_BYTES);
        Self { memory, first, length_bytes }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.first..self.first + self.length_bytes]
    }
}
