//! Bytes to and from a disk past the page cache, by this process: on an emulated processor a `dd` takes as long to start as it
//! takes to move some megabytes. What the disk itself says is the inner result, so that who expects an error can look at it.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::io::Errno;
use testlab::direct_io::{AlignedBuffer, open_direct};

/// What one request has, at most.
const PIECE_BYTES: usize = 1 << 20;

/// Writes `bytes` from `offset_bytes` on.
pub(crate) fn write(device: &Path, offset_bytes: u64, bytes: &[u8]) -> Result<io::Result<()>> {
    let file = open_direct(device)?;
    let mut buffer = AlignedBuffer::new(PIECE_BYTES.min(bytes.len()));
    let mut at = offset_bytes;
    for piece in bytes.chunks(PIECE_BYTES) {
        let part = &mut buffer.bytes()[..piece.len()];
        part.copy_from_slice(piece);
        if let Err(error) = file.write_all_at(part, at) {
            return Ok(Err(error));
        }
        at += piece.len() as u64;
    }
    Ok(Ok(()))
}

/// Makes the disk flush what it has taken (fsync).
pub(crate) fn flush(device: &Path) -> Result<()> {
    open_direct(device)?.sync_all().with_context(|| format!("fsync of {}", device.display()))
}

/// Bytes that are nowhere else.
pub(crate) fn random_bytes(length_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; length_bytes];
    fastrand::fill(&mut bytes);
    bytes
}

/// Reads so many bytes from `offset_bytes` on.
pub(crate) fn read(device: &Path, offset_bytes: u64, length_bytes: usize) -> Result<io::Result<Vec<u8>>> {
    let file = open_direct(device)?;
    let mut buffer = AlignedBuffer::new(PIECE_BYTES.min(length_bytes));
    let mut bytes = Vec::with_capacity(length_bytes);
    while bytes.len() < length_bytes {
        let part = &mut buffer.bytes()[..PIECE_BYTES.min(length_bytes - bytes.len())];
        if let Err(error) = file.read_exact_at(part, offset_bytes + bytes.len() as u64) {
            return Ok(Err(error));
        }
        bytes.extend_from_slice(part);
    }
    Ok(Ok(bytes))
}

/// What was done, `None` where the disk said EIO; any other error is not the disk's to give.
pub(crate) fn unless_eio<T>(done: io::Result<T>) -> Result<Option<T>> {
    match done {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(None),
        Err(error) => Err(error).context("the disk's error"),
    }
}
