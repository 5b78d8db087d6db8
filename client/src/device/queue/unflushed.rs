//! What the server has acknowledged and not yet put on stable storage, as far as all queues of an attachment know.
//!
//! The writes that a server which lost power has forgotten are among these. Each queue counts the writes acknowledged to it;
//! a FLUSH covers what every queue had counted when it was begun, because the block layer begins it after those writes
//! completed. Called by `core.rs` before a completion is committed, and by `reconnect.rs`, which has to know whether anything
//! was there to forget. Nothing here allocates after construction; a queue writes its own counter only.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A counter with a cache line of its own, so that queues do not take it from each other.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter {
    acknowledged: AtomicU64,
    flushed: AtomicU64,
}

/// The counters of an attachment's queues.
#[derive(Debug)]
pub struct Unflushed {
    queues: Box<[Counter]>,
    is_in_doubt: AtomicBool,
}

impl Unflushed {
    /// For so many queues.
    pub fn new(nr_hw_queues: u16) -> Self {
        let queues = (0..nr_hw_queues).map(|_| Counter::default()).collect();
        Self { queues, is_in_doubt: AtomicBool::new(false) }
    }

    /// A write that is not durable yet was acknowledged to this queue.
    pub fn acknowledged(&self, queue_id: u16) {
        let counter = &self.queues[usize::from(queue_id)].acknowledged;
        // The queue is the only one that writes it.
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// How many counters a FLUSH has to remember.
    pub fn nr_queues(&self) -> usize {
        self.queues.len()
    }

    /// A FLUSH begins: what it will cover.
    pub fn flush_begins(&self, covered: &mut [u64]) {
        for (covered, counter) in covered.iter_mut().zip(&self.queues) {
            *covered = counter.acknowledged.load(Ordering::Acquire);
        }
    }

    /// That FLUSH succeeded.
    pub fn flush_succeeded(&self, covered: &[u64]) {
        for (covered, counter) in covered.iter().zip(&self.queues) {
            counter.flushed.fetch_max(*covered, Ordering::AcqRel);
        }
    }

    /// A connection was lost to a server that does not say whether it forgets: if there was anything to forget, the next
    /// FLUSH has to fail, whichever queue it is on.
    pub fn connection_lost(&self) {
        if self.any() {
            self.is_in_doubt.store(true, Ordering::Release);
        }
    }

    /// Whether this FLUSH is the one that has to fail.
    pub fn take_doubt(&self) -> bool {
        self.is_in_doubt.swap(false, Ordering::AcqRel)
    }

    /// Whether there is anything that a server could have forgotten.
    pub fn any(&self) -> bool {
        self.queues.iter().any(|counter| {
            counter.acknowledged.load(Ordering::Acquire) > counter.flushed.load(Ordering::Acquire)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_began() {
        let unflushed = Unflushed::new(2);
        assert!(!unflushed.any());
        unflushed.acknowledged(0);
        unflushed.acknowledged(1);
        let mut covered = [0; 2];
        unflushed.flush_begins(&mut covered);
        unflushed.acknowledged(1);
        unflushed.flush_succeeded(&covered);
        assert!(unflushed.any(), "the last write came after the FLUSH began");
        unflushed.flush_begins(&mut covered);
        assert!(unflushed.any(), "a FLUSH that was not answered covers nothing");
        unflushed.flush_succeeded(&covered);
        assert!(!unflushed.any());
    }

    #[test]
    fn after_a_loss_one_flush_fails_if_there_was_anything_to_lose() {
        let unflushed = Unflushed::new(1);
        unflushed.connection_lost();
        assert!(!unflushed.take_doubt());
        unflushed.acknowledged(0);
        unflushed.connection_lost();
        assert!(unflushed.take_doubt());
        assert!(!unflushed.take_doubt(), "its user was told");
    }

    #[test]
    fn an_older_flush_that_ends_later_takes_nothing_back() {
        let unflushed = Unflushed::new(1);
        let (mut older, mut newer) = ([0], [0]);
        unflushed.flush_begins(&mut older);
        unflushed.acknowledged(0);
        unflushed.flush_begins(&mut newer);
        unflushed.flush_succeeded(&newer);
        unflushed.flush_succeeded(&older);
        assert!(!unflushed.any());
    }
}
