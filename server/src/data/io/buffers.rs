//! Payload buffers of one ring thread: page-aligned, in size classes, all made at start.
//!
//! Owns: the memory that READ and WRITE payloads pass through on their way between a socket and a file, and the queues of
//! connections that wait for a piece of it. Never: allocates after start, is shared between threads, or looks at what the
//! buffers hold.
//! Called by: `ring.rs` (addresses) and `session_io.rs` (take, release, wait).
//! Invariants: a buffer is either free, held by exactly one request, or on its way to a waiter; a class with waiters has
//! no free buffer, so nobody overtakes a waiter; the memory stays mapped until the pool is dropped.

use std::collections::VecDeque;
use std::io;

use crate::buffer_classes::{CLASSES, PoolSize};
use crate::region::Region;

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
    /// Counts a buffer that the connection has taken.
    pub fn add(&mut self, buffer: &Buffer) {
        self.0[usize::from(buffer.class)] += 1;
    }

    /// Counts a buffer that the connection gives back.
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

    /// Whether a connection that holds these may have one for long: never of what is anybody's at any time.
    pub fn has_plenty(&self, length_bytes: usize, held: &HeldBuffers) -> bool {
        let Some(number) = class_of(length_bytes) else { return true };
        let (class, held) = (&self.classes[number], usize::from(held.0[number]));
        held < class.free.len().saturating_sub(class.reserve)
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
