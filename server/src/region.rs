//! Memory that io_uring, or a file's pages, are mapped into: page-aligned, unmapped on drop.
//!
//! Owns the mapping. Never: reads or writes it; it only gives out addresses. Called by: `buffers.rs`, `memory.rs` and `page_cache.rs`.
#![allow(unsafe_code)] // Maps the memory that io_uring reads and writes; nothing else here is unsafe.

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Size and alignment of a huge page, in bytes, where there are such: x86-64's and aarch64's usual one.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Buffers from this size on are asked for in huge pages: the kernel then finds the pages of one at once when a disk is to read into
/// it (`docs/performance.md`). Smaller ones would make 2 MiB resident for little.
const IN_HUGE_PAGES_BYTES_MIN: usize = 64 << 10;

/// Memory, page-aligned, unmapped on drop.
pub(crate) struct Region {
    start: NonNull<u8>,
    length_bytes: usize,
    /// What was mapped for it, which may be more.
    mapped: (NonNull<u8>, usize),
}

// SAFETY: the region is plain memory owned by this value; the address is valid on every thread.
unsafe impl Send for Region {}
// SAFETY: a shared reference only gives out raw addresses; who uses them answers for it.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `length_bytes` of zeroes, which become resident when they are first touched.
    pub(crate) fn new(length_bytes: usize) -> io::Result<Self> {
        let mapped_bytes = in_pages(length_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let start = map_anonymous(mapped_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok(Self { start, length_bytes, mapped: (start, mapped_bytes) })
    }

    /// Maps the buffers of a class.
    pub(crate) fn of_buffers(buffer_bytes: usize, count: usize) -> io::Result<Self> {
        // An empty mapping is none.
        let region = Self::new((buffer_bytes * count).max(1))?;
        if buffer_bytes >= IN_HUGE_PAGES_BYTES_MIN {
            let (mapped, mapped_bytes) = region.mapped;
            // SAFETY: the region's own mapping, which the advice leaves as it is. Where it is not taken, pages are small.
            let _ = unsafe { madvise(mapped.as_ptr().cast(), mapped_bytes, Advice::LinuxHugepage) };
        }
        Ok(region)
    }

    /// Maps the first `length_bytes` of a file, shared with it, at a multiple of [`HUGE_PAGE_BYTES`]: only so can huge
    /// pages of the file be mapped as such.
    pub(crate) fn of_file(file: &File, length_bytes: usize, protection: ProtFlags) -> io::Result<Self> {
        Self::of_file_at(file, 0, length_bytes, protection)
    }

    /// The same from a place in the file on, a multiple of a page.
    pub(crate) fn of_file_at(
        file: &File,
        offset_bytes: u64,
        length_bytes: usize,
        protection: ProtFlags,
    ) -> io::Result<Self> {
        let file_bytes = in_pages(length_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapped_bytes = file_bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let room = map_anonymous(mapped_bytes, ProtFlags::empty())?;
        let padding_bytes = room.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // From here on the room is given back on every error.
        let mut region = Self { start: room, length_bytes, mapped: (room, mapped_bytes) };
        let target = room.as_ptr().wrapping_add(padding_bytes);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces a part of the room made above, which nobody else knows of.
        let start = unsafe { mmap(target.cast(), file_bytes, protection, flags, file, offset_bytes) }?;
        region.start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(region)
    }

    /// Address of the byte at `offset_bytes`, of which `length_bytes` will be used.
    ///
    /// # Panics
    /// When the range is not inside the region.
    pub(crate) fn address(&self, offset_bytes: usize, length_bytes: usize) -> *mut u8 {
        let end_bytes = offset_bytes.checked_add(length_bytes);
        assert!(end_bytes.is_some_and(|end| end <= self.length_bytes), "range outside the region");
        self.start.as_ptr().wrapping_add(offset_bytes)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let (mapped, mapped_bytes) = self.mapped;
        // SAFETY: the mapping was made in this file with this start and length; whoever drops the region has no
        // operation in flight on it (`Ring::drop` forgets its regions otherwise).
        let result = unsafe { munmap(mapped.as_ptr().cast(), mapped_bytes) };
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}

fn map_anonymous(mapped_bytes: usize, protection: ProtFlags) -> io::Result<NonNull<u8>> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory that is in use.
    let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped_bytes, protection, flags) }?;
    NonNull::new(mapped.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory.into())
}

/// Bytes of address space for a region; `None` when there are not that many.
fn in_pages(length_bytes: usize) -> Option<usize> {
    length_bytes.checked_next_multiple_of(rustix::param::page_size())
}
