//! Payload buffers of one ring thread: page-aligned, in size classes, all made at start.
//!
//! Owns: the memory that READ and WRITE payloads pass through on their way between a socket and a file, and the queues of
//! connections that wait for a piece of it. Never: allocates after start, is shared between threads, or looks at what the
//! buffers hold.
//! Called by: `ring.rs` (addresses) and `connection.rs` (take, release, wait).
//! Invariants: a buffer is either free, held by exactly one request, or on its way to a waiter; a class with waiters has
//! no free buffer, so nobody overtakes a waiter; the memory stays mapped until the pool is dropped.
#![allow(unsafe_code)] // Maps the memory that io_uring reads and writes; nothing else here is unsafe.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Sizes in bytes and how many there are of each, for each ring. The largest is the announced maximum block size; the
/// counts keep 128 requests of 4 KiB to 64 KiB going on several connections at once, and fewer of the larger, whose
/// transfer takes longer than their turn-around.
const CLASSES: [(usize, usize); 7] = [
    (4 << 10, 2048),
    (16 << 10, 1024),
    (64 << 10, 512),
    (256 << 10, 192),
    (1 << 20, 64),
    (4 << 20, 16),
    (32 << 20, 4),
];

/// Size and alignment of a huge page, in bytes, where there are such: x86-64's and aarch64's usual one.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Bytes that the pool of one ring may come to hold; they become resident only as they are first used.
pub fn pool_bytes_max() -> usize {
    CLASSES.iter().map(|(bytes, count)| bytes * count).sum()
}

/// A buffer of the pool. Not `Clone`: who holds it may use it, and has to give it back.
#[derive(Debug, PartialEq, Eq)]
pub struct Buffer {
    class: u8,
    index: u16,
}

/// Who waits for a buffer: a connection's index in its ring.
pub type Waiter = u32;

struct Class {
    memory: Region,
    buffer_bytes: usize,
    free: Vec<u16>,
    waiters: VecDeque<Waiter>,
}

/// The pool.
pub struct BufferPool {
    classes: Vec<Class>,
    granted: VecDeque<(Waiter, Buffer)>,
}

impl BufferPool {
    /// Maps the memory.
    ///
    /// # Errors
    /// `ENOMEM`: the address space or the overcommit limit does not allow it.
    pub fn new() -> io::Result<Self> {
        let class = |&(buffer_bytes, count): &(usize, usize)| {
            Ok(Class {
                memory: Region::new(buffer_bytes * count)?,
                buffer_bytes,
                // Taken from the end, so the lowest, already resident ones are used again first.
                free: (0..count as u16).rev().collect(),
                waiters: VecDeque::with_capacity(1024),
            })
        };
        let classes = CLASSES.iter().map(class).collect::<io::Result<_>>()?;
        Ok(Self { classes, granted: VecDeque::with_capacity(1024) })
    }

    /// A buffer for `length_bytes`, or `None`: then `waiter` stands in the queue and will find it in
    /// [`Self::next_grant`].
    ///
    /// # Panics
    /// When `length_bytes` is above the largest class: requests are validated before.
    pub fn take(&mut self, length_bytes: usize, waiter: Waiter) -> Option<Buffer> {
        let fitting = CLASSES.iter().position(|(bytes, _)| *bytes >= length_bytes);
        let Some(number) = fitting else { panic!("no buffer class holds {length_bytes} bytes") };
        let class = &mut self.classes[number];
        let taken = class.free.pop().map(|index| Buffer { class: number as u8, index });
        if taken.is_none() {
            class.waiters.push_back(waiter);
        }
        taken
    }

    /// Gives a buffer back; the first that waits for its class gets it.
    pub fn release(&mut self, buffer: Buffer) {
        let class = &mut self.classes[usize::from(buffer.class)];
        match class.waiters.pop_front() {
            Some(waiter) => self.granted.push_back((waiter, buffer)),
            None => class.free.push(buffer.index),
        }
    }

    /// The next waiter that got its buffer.
    pub fn next_grant(&mut self) -> Option<(Waiter, Buffer)> {
        self.granted.pop_front()
    }

    /// Takes a connection out of every queue; a buffer on its way to it goes to the next.
    pub fn forget_waiter(&mut self, waiter: Waiter) {
        for class in &mut self.classes {
            class.waiters.retain(|other| *other != waiter);
        }
        for _ in 0..self.granted.len() {
            match self.granted.pop_front() {
                Some((other, buffer)) if other == waiter => self.release(buffer),
                Some(grant) => self.granted.push_back(grant),
                None => break,
            }
        }
    }

    /// Whether anybody waits.
    pub fn has_waiters(&self) -> bool {
        self.classes.iter().any(|class| !class.waiters.is_empty())
    }

    /// Address of the byte at `offset_bytes` of a buffer, of which `length_bytes` will be used.
    ///
    /// # Panics
    /// When the range is not inside the buffer.
    pub(crate) fn address(&self, buffer: &Buffer, offset_bytes: usize, length_bytes: usize) -> *mut u8 {
        let class = &self.classes[usize::from(buffer.class)];
        let end_bytes = offset_bytes.checked_add(length_bytes);
        assert!(end_bytes.is_some_and(|end| end <= class.buffer_bytes), "range outside the buffer");
        class.memory.address(usize::from(buffer.index) * class.buffer_bytes + offset_bytes, length_bytes)
    }
}

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

    /// Maps the first `length_bytes` of a file, shared with it, at a multiple of [`HUGE_PAGE_BYTES`]: only so can huge
    /// pages of the file be mapped as such.
    pub(crate) fn of_file(file: &File, length_bytes: usize) -> io::Result<Self> {
        let file_bytes = in_pages(length_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapped_bytes = file_bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let room = map_anonymous(mapped_bytes, ProtFlags::empty())?;
        let padding_bytes = room.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // From here on the room is given back on every error.
        let mut region = Self { start: room, length_bytes, mapped: (room, mapped_bytes) };
        let target = room.as_ptr().wrapping_add(padding_bytes);
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: replaces a part of the room made above, which nobody else knows of.
        let start = unsafe { mmap(target.cast(), file_bytes, protection, flags, file, 0) }?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_do_not_overlap() {
        let mut pool = BufferPool::new().unwrap();
        let first = pool.take(4096, 0).unwrap();
        let second = pool.take(1, 0).unwrap();
        let (a, b) = (pool.address(&first, 0, 4096) as usize, pool.address(&second, 0, 4096) as usize);
        assert!(a % 4096 == 0 && b % 4096 == 0);
        assert!(a.abs_diff(b) >= 4096);
    }

    #[test]
    fn waiters_get_buffers_in_the_order_they_came() {
        let mut pool = BufferPool::new().unwrap();
        let mut held: Vec<Buffer> = (0..4).map(|_| pool.take(32 << 20, 9).unwrap()).collect();
        for waiter in [1, 2, 3] {
            assert!(pool.take(32 << 20, waiter).is_none());
        }
        assert!(pool.take(4096, 4).is_some(), "other classes are not held up");
        pool.release(held.pop().unwrap());
        pool.forget_waiter(1);
        let (waiter, buffer) = pool.next_grant().unwrap();
        assert_eq!(waiter, 2, "the first has gone, so the next gets what was on its way to it");
        pool.release(buffer);
        assert_eq!(pool.next_grant().map(|(waiter, _)| waiter), Some(3));
        assert!(!pool.has_waiters());
    }

    #[test]
    #[should_panic(expected = "outside the buffer")]
    fn ranges_past_a_buffers_end_are_caught() {
        let mut pool = BufferPool::new().unwrap();
        let buffer = pool.take(4096, 0).unwrap();
        pool.address(&buffer, 4000, 97);
    }
}
