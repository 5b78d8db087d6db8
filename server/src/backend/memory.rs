//! A volume in this process's memory.
//!
//! Owns: a memory file (memfd) of the volume's size, mapped, which takes up memory only where it was written. Sockets send
//! its pages themselves or from the mapping, and receive into the mapping. Gone with the process; the incarnation says so.
//! Never: hands out a Rust reference to the bytes. Clients may write what another reads, on several threads at once, and
//! the kernel writes too; so this file touches them only through atomics.
//! Called by: `volume/request.rs`, `ring.rs` (addresses, the file), `session_io.rs` (before it writes), `gate/opener.rs` (open), `gate/run.rs`
//! (measure).
//! Invariant: where [`MemoryVolume::expect_write`] was never called, the volume is zero.
#![allow(unsafe_code)] // Writes into the mapping while others may; bounds are checked in `Region::address`.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::ProtFlags;

use crate::region::{HUGE_PAGE_BYTES, Region};

/// A volume's memory.
pub struct MemoryVolume {
    file: File,
    memory: Region,
    capacity_bytes: u64,
    /// For each [`HUGE_PAGE_BYTES`] of the volume, whether anything was ever written there.
    written: Box<[AtomicBool]>,
}

impl std::fmt::Debug for MemoryVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryVolume").field("capacity_bytes", &self.capacity_bytes).finish()
    }
}

impl MemoryVolume {
    /// Makes a volume, all zeroes.
    ///
    /// # Errors
    /// `ENOMEM`: the address space or the overcommit limit does not allow it; `EMFILE`.
    pub fn new(capacity_bytes: u64) -> io::Result<Self> {
        let length_bytes = usize::try_from(capacity_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let file = File::from(memfd_create("volnode-volume", MemfdFlags::CLOEXEC)?);
        file.set_len(capacity_bytes)?;
        let memory = Region::of_file(&file, length_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let written = (0..length_bytes.div_ceil(HUGE_PAGE_BYTES)).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { file, memory, capacity_bytes, written })
    }

    /// The file that holds the bytes, each at its offset in the volume.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Has to be called before anything is written to the range. Where it is the first, the memory is made a huge page if
    /// the kernel can: its memory files, unlike its anonymous memory, are of small pages otherwise, and sending a payload
    /// costs work for each page.
    pub fn expect_write(&self, offset_bytes: u64, length_bytes: u32) {
        for chunk in chunks(offset_bytes, length_bytes) {
            if self.written[chunk].load(Ordering::Acquire) || self.written[chunk].swap(true, Ordering::AcqRel)
            {
                continue;
            }
            let start_bytes = chunk * HUGE_PAGE_BYTES;
            let length_bytes = HUGE_PAGE_BYTES.min(self.capacity_bytes as usize - start_bytes);
            if length_bytes == HUGE_PAGE_BYTES {
                let start = self.memory.address(start_bytes, length_bytes);
                // The kernel makes a huge page only of memory that has a page at least, and a written one.
                // SAFETY: inside the mapping, and everybody in this process reaches it through atomics.
                let first = unsafe { AtomicU8::from_ptr(start) };
                let _ = first.compare_exchange(0, 0, Ordering::Relaxed, Ordering::Relaxed);
                // SAFETY: this advice changes no byte, and the range is inside the mapping. Refused, pages stay small.
                let _ = unsafe { libc::madvise(start.cast(), length_bytes, libc::MADV_COLLAPSE) };
            }
        }
    }

    /// Whether the range may hold anything but zeroes. False also keeps memory from being allocated: reading a hole through
    /// the mapping would fill it.
    pub fn may_hold_data(&self, offset_bytes: u64, length_bytes: u32) -> bool {
        chunks(offset_bytes, length_bytes).any(|chunk| self.written[chunk].load(Ordering::Acquire))
    }

    /// Address of the byte at `offset_bytes`, of which `length_bytes` will be used.
    ///
    /// # Panics
    /// When the range is not inside the volume: requests are validated before.
    pub(crate) fn address(&self, offset_bytes: u64, length_bytes: u32) -> *mut u8 {
        self.memory.address(offset_bytes as usize, length_bytes as usize)
    }

    /// Copies bytes in.
    pub fn write(&self, offset_bytes: u64, bytes: &[u8]) {
        let target = self.address(offset_bytes, bytes.len() as u32);
        let head_bytes = target.align_offset(8).min(bytes.len());
        let (head, rest) = bytes.split_at(head_bytes);
        store_bytes(target, head);
        let words = rest.chunks_exact(8);
        let tail = words.remainder();
        let mut target = target.wrapping_add(head_bytes);
        for word in words {
            let mut value = [0u8; 8];
            value.copy_from_slice(word);
            // SAFETY: aligned to 8 by the head, inside the range checked above; the mapping lives as long as `self`,
            // and everybody in this process reaches it through atomics.
            let cell = unsafe { AtomicU64::from_ptr(target.cast()) };
            cell.store(u64::from_ne_bytes(value), Ordering::Relaxed);
            target = target.wrapping_add(8);
        }
        store_bytes(target, tail);
    }

    /// Bytes of memory that the volume takes up now, resident or swapped out; 0 where the kernel does not tell.
    pub fn allocated_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }
}

/// The chunks of [`HUGE_PAGE_BYTES`] that a range touches; of an empty one, the chunk it lies in.
fn chunks(offset_bytes: u64, length_bytes: u32) -> RangeInclusive<usize> {
    let last_bytes = offset_bytes + u64::from(length_bytes.max(1)) - 1;
    offset_bytes as usize / HUGE_PAGE_BYTES..=last_bytes as usize / HUGE_PAGE_BYTES
}

fn store_bytes(mut target: *mut u8, bytes: &[u8]) {
    for byte in bytes {
        // SAFETY: inside the range that the caller checked; reached through atomics only, as in `write`.
        let cell = unsafe { AtomicU8::from_ptr(target) };
        cell.store(*byte, Ordering::Relaxed);
        target = target.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(volume: &MemoryVolume, offset_bytes: u64, length_bytes: u32) -> Vec<u8> {
        let source = volume.address(offset_bytes, length_bytes);
        // SAFETY: the range is inside the mapping and no other thread of this test touches it.
        unsafe { std::slice::from_raw_parts(source, length_bytes as usize) }.to_vec()
    }

    #[test]
    fn bytes_arrive_at_every_alignment() {
        let volume = MemoryVolume::new(1 << 20).unwrap();
        for offset in 0..17u64 {
            for length in 0..40usize {
                let bytes: Vec<u8> = (0..length).map(|n| n as u8 + 1).collect();
                volume.write(offset, &bytes);
                assert_eq!(read(&volume, offset, length as u32), bytes);
            }
        }
    }

    #[test]
    fn only_written_pages_are_allocated() {
        let volume = MemoryVolume::new(64 << 20).unwrap();
        assert_eq!(volume.allocated_bytes(), 0);
        assert!(!volume.may_hold_data(0, 64 << 20));
        volume.expect_write(8192, 4096);
        volume.write(8192, &[7; 4096]);
        assert!(volume.may_hold_data((2 << 20) - 1, 1) && !volume.may_hold_data(2 << 20, 4096));
        assert!(volume.may_hold_data((2 << 20) - 1, 2), "a range that begins in a written chunk");
        let allocated = volume.allocated_bytes();
        assert!((4096..=4 << 20).contains(&allocated), "{allocated}");
    }

    #[test]
    fn the_file_and_the_mapping_are_the_same_bytes() {
        use std::os::unix::fs::FileExt as _;

        let volume = MemoryVolume::new((4 << 20) + 4096).unwrap();
        for offset in [0, (2 << 20) - 2048, (4 << 20) + 96] {
            volume.expect_write(offset, 4000);
            volume.write(offset, &[9; 4000]);
            let mut bytes = [0; 4000];
            volume.file().read_exact_at(&mut bytes, offset).unwrap();
            assert_eq!(bytes, [9; 4000]);
        }
    }
}
