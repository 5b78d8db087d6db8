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

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Sizes in bytes and how many there are of each, for each ring. The largest is the announced maximum block size. Of the small
/// classes half is enough for eight 4 KiB requests, two of 16 KiB and one of 64 KiB on each of 512 connections, so that a
/// thousand of them on two rings lose nothing by others that stand still; of the large ones there are fewer, because their
/// transfer takes longer than their turn-around. With less memory ([`PoolSize::within`]) there are fewer of each.
const CLASSES: [(usize, usize); 7] = [
    (4 << 10, 8192),
    (16 << 10, 2048),
    (64 << 10, 1024),
    (256 << 10, 192),
    (1 << 20, 64),
    (4 << 20, 16),
    (32 << 20, 4),
];

/// Size and alignment of a huge page, in bytes, where there are such: x86-64's and aarch64's usual one.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Buffers from this size on are asked for in huge pages: the kernel then finds the pages of one at once when a disk is to read into
/// it (`docs/performance.md`). Smaller ones would make 2 MiB resident for little.
const IN_HUGE_PAGES_BYTES_MIN: usize = 64 << 10;

/// How many of the classes are the small ones.
const SMALL_CLASSES: usize = 3;

/// How many buffers of each class a ring has. They become resident only as they are first used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSize {
    counts: [usize; CLASSES.len()],
}

impl PoolSize {
    /// As many as are of use, for requests of up to `request_bytes_max`.
    pub fn full(request_bytes_max: u32) -> Self {
        Self { counts: CLASSES.map(|(_, count)| count) }.without_classes_above(request_bytes_max)
    }

    /// One of each, for requests of up to `request_bytes_max`.
    pub fn smallest(request_bytes_max: u32) -> Self {
        Self { counts: [1; CLASSES.len()] }.without_classes_above(request_bytes_max)
    }

    /// As many as `bytes_max` allows: half of the room for the small classes, of which every connection is to have several,
    /// and the rest for the large ones, each in the proportion of a full pool. `None` where it does not allow one of each.
    pub fn within(bytes_max: u64, request_bytes_max: u32) -> Option<Self> {
        let (full, smallest) = (Self::full(request_bytes_max), Self::smallest(request_bytes_max));
        let room_bytes = bytes_max.checked_sub(smallest.bytes())?;
        let wanted_bytes = |classes: std::ops::Range<usize>| -> u64 {
            classes.map(|class| (full.counts[class].saturating_sub(1) * CLASSES[class].0) as u64).sum()
        };
        let (small_bytes, large_bytes) =
            (wanted_bytes(0..SMALL_CLASSES), wanted_bytes(SMALL_CLASSES..CLASSES.len()));
        let small_room_bytes = small_bytes.min((room_bytes / 2).max(room_bytes.saturating_sub(large_bytes)));
        let large_room_bytes = large_bytes.min(room_bytes - small_room_bytes);
        let mut counts = full.counts;
        for (class, count) in counts.iter_mut().enumerate().filter(|(_, count)| **count > 1) {
            let (room_bytes, wanted_bytes) = if class < SMALL_CLASSES {
                (small_room_bytes, small_bytes)
            } else {
                (large_room_bytes, large_bytes)
            };
            // Rounded down, so the sum stays within the room.
            let more = (*count as u128 - 1) * u128::from(room_bytes) / u128::from(wanted_bytes);
            *count = 1 + more as usize;
        }
        Some(Self { counts })
    }

    /// The sum, in bytes.
    pub fn bytes(&self) -> u64 {
        CLASSES.iter().zip(self.counts).map(|((bytes, _), count)| (bytes * count) as u64).sum()
    }

    /// No request needs a class behind the first that holds the longest one.
    fn without_classes_above(mut self, request_bytes_max: u32) -> Self {
        let needed = CLASSES.iter().position(|(bytes, _)| *bytes >= request_bytes_max as usize);
        for count in self.counts.iter_mut().skip(needed.map_or(CLASSES.len(), |last| last + 1)) {
            *count = 0;
        }
        self
    }
}

/// A buffer of the pool. Not `Clone`: who holds it may use it, and has to give it back.
#[derive(Debug, PartialEq, Eq)]
pub struct Buffer {
    class: u8,
    index: u16,
}

/// How many buffers of each class one connection holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeldBuffers([u16; CLASSES.len()]);

impl HeldBuffers {
    /// One more.
    pub fn add(&mut self, buffer: &Buffer) {
        self.0[usize::from(buffer.class)] += 1;
    }

    /// One less.
    pub fn remove(&mut self, buffer: &Buffer) {
        self.0[usize::from(buffer.class)] -= 1;
    }
}

/// The smallest class that holds `length_bytes`.
fn class_of(length_bytes: usize) -> Option<usize> {
    CLASSES.iter().position(|(bytes, _)| *bytes >= length_bytes)
}

/// Who waits for a buffer: a connection's index in its ring.
pub type Waiter = u32;

struct Class {
    memory: Region,
    buffer_bytes: usize,
    /// How many of them are kept for connections that hold no more than their share.
    reserve: usize,
    /// What each connection may have in any case.
    share: usize,
    free: Vec<u16>,
    waiters: VecDeque<Waiter>,
}

/// The pool.
pub struct BufferPool {
    classes: Vec<Class>,
    granted: VecDeque<(Waiter, Buffer)>,
}

impl BufferPool {
    /// Maps the memory, to be shared by at most so many connections.
    ///
    /// # Errors
    /// `ENOMEM`: the address space or the overcommit limit does not allow it.
    pub fn new(size: PoolSize, connections_max: u32) -> io::Result<Self> {
        let class = |(&(buffer_bytes, _), count): (&(usize, usize), usize)| {
            Ok(Class {
                memory: Region::of_buffers(buffer_bytes, count)?,
                buffer_bytes,
                reserve: count / 2,
                share: (count / 2 / connections_max.max(1) as usize).max(1),
                // Taken from the end, so the lowest, already resident ones are used again first.
                free: (0..count as u16).rev().collect(),
                waiters: VecDeque::with_capacity(1024),
            })
        };
        let classes = CLASSES.iter().zip(size.counts).map(class).collect::<io::Result<_>>()?;
        Ok(Self { classes, granted: VecDeque::with_capacity(1024) })
    }

    /// A buffer for `length_bytes`, or `None`: then `waiter` stands in the queue and will find it in
    /// [`Self::next_grant`].
    ///
    /// # Panics
    /// When `length_bytes` is above the largest class: requests are validated before.
    pub fn take(&mut self, length_bytes: usize, waiter: Waiter) -> Option<Buffer> {
        let Some(number) = class_of(length_bytes) else {
            panic!("no buffer class holds {length_bytes} bytes")
        };
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

    /// Whether a connection that holds these may have one more of the class for `length_bytes`. Half of a class is divided
    /// evenly among all the connections that there may be, at least one for each: those are anybody's at any time, whatever
    /// others hold and for how long. Of the other half one may take as long as it leaves as much as it has.
    pub fn may_take(&self, length_bytes: usize, held: &HeldBuffers) -> bool {
        let Some(number) = class_of(length_bytes) else { return true };
        let (class, held) = (&self.classes[number], usize::from(held.0[number]));
        held < class.share || held < class.free.len().saturating_sub(class.reserve)
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

    /// Maps the buffers of a class.
    fn of_buffers(buffer_bytes: usize, count: usize) -> io::Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_do_not_overlap() {
        let mut pool = BufferPool::new(PoolSize::full(32 << 20), 500).unwrap();
        let first = pool.take(4096, 0).unwrap();
        let second = pool.take(1, 0).unwrap();
        let (a, b) = (pool.address(&first, 0, 4096) as usize, pool.address(&second, 0, 4096) as usize);
        assert!(a % 4096 == 0 && b % 4096 == 0);
        assert!(a.abs_diff(b) >= 4096);
    }

    #[test]
    fn waiters_get_buffers_in_the_order_they_came() {
        let mut pool = BufferPool::new(PoolSize::full(32 << 20), 500).unwrap();
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
        let mut pool = BufferPool::new(PoolSize::full(32 << 20), 500).unwrap();
        let buffer = pool.take(4096, 0).unwrap();
        pool.address(&buffer, 4000, 97);
    }

    #[test]
    fn a_pool_is_never_above_its_bound_and_has_one_of_each_class_that_is_needed() {
        for request_bytes_max in [4 << 10, 64 << 10, (64 << 10) + 1, 1 << 20, 32 << 20] {
            let (smallest, full) = (PoolSize::smallest(request_bytes_max), PoolSize::full(request_bytes_max));
            assert_eq!(PoolSize::within(smallest.bytes() - 1, request_bytes_max), None);
            assert_eq!(PoolSize::within(smallest.bytes(), request_bytes_max), Some(smallest));
            assert_eq!(PoolSize::within(u64::MAX, request_bytes_max), Some(full));
            for bytes_max in (smallest.bytes()..full.bytes()).step_by(3_333_333) {
                let size = PoolSize::within(bytes_max, request_bytes_max).unwrap();
                assert!(size.bytes() <= bytes_max, "{size:?} in {bytes_max}");
                let needed = class_of(request_bytes_max as usize).unwrap();
                assert!(size.counts[..=needed].iter().all(|count| *count > 0), "{size:?}");
            }
        }
    }

    #[test]
    fn any_number_of_hoarders_leave_something_for_a_newcomer() {
        let mut pool = BufferPool::new(PoolSize::full(32 << 20), 500).unwrap();
        let mut hoarded = Vec::new();
        // One after the other, each as many as it gets, and none is ever given back.
        for waiter in 0..499 {
            let mut held = HeldBuffers::default();
            while pool.may_take(4096, &held) {
                let buffer = pool.take(4096, waiter).expect("nobody waits while others may take");
                held.add(&buffer);
                hoarded.push(buffer);
            }
        }
        let mut newcomer = HeldBuffers::default();
        for _ in 0..8 {
            assert!(pool.may_take(4096, &newcomer));
            newcomer.add(&pool.take(4096, 499).expect("a share of 4096 / 500 is free"));
        }
    }

    #[test]
    fn one_alone_gets_a_quarter_of_a_class() {
        let mut pool = BufferPool::new(PoolSize::full(32 << 20), 500).unwrap();
        let (mut held, mut buffers) = (HeldBuffers::default(), Vec::new());
        while pool.may_take(4096, &held) {
            let buffer = pool.take(4096, 0).unwrap();
            held.add(&buffer);
            buffers.push(buffer);
        }
        assert_eq!(buffers.len(), 8192 / 4);
    }
}
