//! A volume in this process's memory.
//!
//! Owns: an anonymous mapping of the volume's size, which takes up memory only where it was written. Sockets send from it
//! and receive into it, so a payload is not copied on the way. Gone with the process; the incarnation says so.
//! Never: hands out a Rust reference to the bytes. Clients may write what another reads, on several threads at once, and
//! the kernel writes too; so this file touches them only through atomics.
//! Called by: `volume.rs` (zeroing), `ring.rs` (addresses), `gate.rs` (open, measure).
#![allow(unsafe_code)] // Maps the volume and writes into it while others may; bounds are checked in `Region::address`.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::buffers::Region;

/// Granularity in which the kernel takes memory back. Linux pages may be larger on other machines; x86-64's and
/// aarch64's usual size is what is asked for at open.
fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

/// A volume's memory.
pub struct MemoryVolume {
    memory: Region,
    capacity_bytes: u64,
}

impl std::fmt::Debug for MemoryVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryVolume").field("capacity_bytes", &self.capacity_bytes).finish()
    }
}

/// A range of a volume split at page borders.
#[derive(Debug, PartialEq, Eq)]
pub struct PageSplit {
    /// Bytes before the first whole page: offset and length.
    pub head: (u64, u32),
    /// Whole pages: offset and length.
    pub pages: (u64, u32),
    /// Bytes after the last whole page: offset and length.
    pub tail: (u64, u32),
}

impl MemoryVolume {
    /// Maps a volume, all zeroes. Between two guard pages, so that its mapping is never merged with another's and
    /// [`Self::allocated_bytes`] finds it.
    ///
    /// # Errors
    /// `ENOMEM`: the address space or the overcommit limit does not allow it.
    pub fn new(capacity_bytes: u64) -> io::Result<Self> {
        let length_bytes = usize::try_from(capacity_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory: Region::new_guarded(length_bytes)?, capacity_bytes })
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

    /// Splits a range at page borders, because the kernel takes back whole pages only.
    pub fn split_at_pages(&self, offset_bytes: u64, length_bytes: u32) -> PageSplit {
        let end = offset_bytes + u64::from(length_bytes);
        let first = offset_bytes.next_multiple_of(page_bytes());
        let last = end - end % page_bytes();
        if first >= last {
            return PageSplit { head: (offset_bytes, length_bytes), pages: (end, 0), tail: (end, 0) };
        }
        PageSplit {
            head: (offset_bytes, (first - offset_bytes) as u32),
            pages: (first, (last - first) as u32),
            tail: (last, (end - last) as u32),
        }
    }

    /// Writes zeroes over less than two pages.
    pub fn zero_edge(&self, (offset_bytes, length_bytes): (u64, u32)) {
        let zeroes = [0u8; 4096];
        let mut done_bytes = 0;
        while done_bytes < length_bytes {
            let piece_bytes = (length_bytes - done_bytes).min(zeroes.len() as u32);
            self.write(offset_bytes + u64::from(done_bytes), &zeroes[..piece_bytes as usize]);
            done_bytes += piece_bytes;
        }
    }

    /// Bytes of memory that the volume takes up now, resident or swapped out; 0 where `/proc` does not tell.
    pub fn allocated_bytes(&self) -> u64 {
        let start = self.memory.address(0, 0) as usize;
        std::fs::read_to_string("/proc/self/smaps").map_or(0, |smaps| anonymous_bytes(&smaps, start))
    }
}

fn store_bytes(mut target: *mut u8, bytes: &[u8]) {
    for byte in bytes {
        // SAFETY: inside the range that the caller checked; reached through atomics only, as in `write`.
        let cell = unsafe { AtomicU8::from_ptr(target) };
        cell.store(*byte, Ordering::Relaxed);
        target = target.wrapping_add(1);
    }
}

/// Adds up `Anonymous:` and `Swap:` of the mapping that begins at `start`. (`Rss:` would count the shared zero page,
/// which reading a hole maps.)
fn anonymous_bytes(smaps: &str, start: usize) -> u64 {
    let heading = format!("{start:x}-");
    let lines = smaps.lines().skip_while(|line| !line.starts_with(&heading)).skip(1);
    let fields =
        lines.take_while(|line| line.split_whitespace().next().is_some_and(|word| word.ends_with(':')));
    fields
        .filter_map(|line| line.strip_prefix("Anonymous:").or_else(|| line.strip_prefix("Swap:")))
        .filter_map(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .sum()
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
                volume.zero_edge((0, 100));
                assert_eq!(read(&volume, 0, 128), [0; 128]);
            }
        }
    }

    #[test]
    fn only_written_pages_are_allocated() {
        let volume = MemoryVolume::new(64 << 20).unwrap();
        assert_eq!(volume.allocated_bytes(), 0);
        assert_eq!(read(&volume, 1 << 20, 4096), [0; 4096]);
        assert_eq!(volume.allocated_bytes(), 0, "reading a hole allocates nothing");
        volume.write(8192, &[7; 4096]);
        let allocated = volume.allocated_bytes();
        assert!((4096..=4 << 20).contains(&allocated), "{allocated}");
    }

    #[test]
    fn ranges_are_split_at_page_borders() {
        let volume = MemoryVolume::new(1 << 20).unwrap();
        let split = volume.split_at_pages(512, 8192);
        assert_eq!(split, PageSplit { head: (512, 3584), pages: (4096, 4096), tail: (8192, 512) });
        let inside = volume.split_at_pages(4096 + 512, 1024);
        assert_eq!(inside, PageSplit { head: (4608, 1024), pages: (5632, 0), tail: (5632, 0) });
        let whole = volume.split_at_pages(0, 8192);
        assert_eq!(whole, PageSplit { head: (0, 0), pages: (0, 8192), tail: (8192, 0) });
        let two_parts = volume.split_at_pages(512, 7000);
        assert_eq!(two_parts, PageSplit { head: (512, 7000), pages: (7512, 0), tail: (7512, 0) });
    }
}
