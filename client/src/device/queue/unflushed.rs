//! What the server has acknowledged and not yet put on stable storage, as far as all queues of an attachment know.
//!
//! The writes that a server which lost power has forgotten are among these. Each queue counts the writes acknowledged to it;
//! a FLUSH covers what every queue had counted when it was begun, because the block layer begins it after those writes
//! completed. Called by `core.rs` before a completion is committed, and by `reconnect.rs`, which has to know whether anything
//! was there to forget. Nothing here allocates after construction; a queue writes its own counter only.
//!
//! A server that does not say whether it forgets is doubted after each loss of a queue's connections to it, if anything was unflushed that
//! had been acknowledged on them. The doubt ends when a FLUSH has failed that is known to have begun after the loss. One that began before
//! covers less than what may be gone: it fails too, whatever the server says, and the doubt stays. All queues lose their connections before
//! any has others (`reconnect.rs`): each counts its own.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with a cache line of its own, so that queues do not take it from each other.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter {
    acknowledged: AtomicU64,
    flushed: AtomicU64,
    /// Of these a loss was counted.
    lost: AtomicU64,
}

/// The counters of an attachment's queues.
#[derive(Debug)]
pub struct Unflushed {
    queues: Box<[Counter]>,
    /// How often connections were lost while something was unflushed.
    losses: AtomicU64,
    /// Of how many of these a FLUSH that failed has told.
    told_losses: AtomicU64,
}

impl Unflushed {
    /// For so many queues.
    pub fn new(nr_hw_queues: u16) -> Self {
        let queues = (0..nr_hw_queues).map(|_| Counter::default()).collect();
        Self { queues, losses: AtomicU64::new(0), told_losses: AtomicU64::new(0) }
    }

    /// A write that is not durable yet was acknowledged to this queue.
    pub fn acknowledged(&self, queue_id: u16) {
        let counter = &self.queues[usize::from(queue_id)].acknowledged;
        // The queue is the only one that writes it.
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// How many counters a FLUSH has to remember: one for each queue, and one for losses.
    pub fn nr_counters(&self) -> usize {
        self.queues.len() + 1
    }

    /// A FLUSH begins: what it will cover.
    pub fn flush_begins(&self, covered: &mut [u64]) {
        // The losses first: one that is noticed meanwhile comes after the FLUSH.
        if let Some(losses_before) = covered.last_mut() {
            *losses_before = self.losses();
        }
        for (covered, counter) in covered.iter_mut().zip(&self.queues) {
            *covered = counter.acknowledged.load(Ordering::Acquire);
        }
    }

    /// The server says that this FLUSH succeeded. False: connections were lost since it began, and it may be another server's word;
    /// then the FLUSH has failed.
    #[must_use]
    pub fn flush_succeeded(&self, covered: &[u64]) -> bool {
        if covered.last().is_some_and(|losses_before| *losses_before != self.losses()) {
            return false;
        }
        for (covered, counter) in covered.iter().zip(&self.queues) {
            counter.flushed.fetch_max(*covered, Ordering::AcqRel);
        }
        true
    }

    /// A queue has lost its connections to a server that does not say whether it forgets; everything that was acknowledged on them is
    /// counted, and its users know of it: if there was anything to forget that no earlier loss was counted for, a FLUSH that begins from
    /// now on has to fail, whichever queue it is on.
    pub fn connection_lost(&self, queue_id: u16) {
        let counter = &self.queues[usize::from(queue_id)];
        let acknowledged = counter.acknowledged.load(Ordering::Acquire);
        // The queue is the only one that writes it.
        let lost = counter.lost.swap(acknowledged, Ordering::AcqRel);
        if acknowledged > lost.max(counter.flushed.load(Ordering::Acquire)) {
            self.losses.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// How often connections were lost with something to forget.
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    /// Whether a FLUSH has to fail that is known to have begun after so many losses: there is one that nobody was told of. The others
    /// may have come after it began, so that its failure does not tell of them.
    pub fn fails_flush(&self, losses_before: u64) -> bool {
        let losses = self.losses();
        if self.told_losses.load(Ordering::Acquire) >= losses {
            return false;
        }
        self.told_losses.fetch_max(losses_before, Ordering::AcqRel) < losses
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
        let mut covered = [0; 3];
        unflushed.flush_begins(&mut covered);
        unflushed.acknowledged(1);
        assert!(unflushed.flush_succeeded(&covered));
        assert!(unflushed.any(), "the last write came after the FLUSH began");
        unflushed.flush_begins(&mut covered);
        assert!(unflushed.any(), "a FLUSH that was not answered covers nothing");
        assert!(unflushed.flush_succeeded(&covered));
        assert!(!unflushed.any());
    }

    #[test]
    fn after_a_loss_one_flush_fails_if_there_was_anything_to_lose() {
        let unflushed = Unflushed::new(1);
        unflushed.connection_lost(0);
        assert!(!unflushed.fails_flush(unflushed.losses()));
        unflushed.acknowledged(0);
        unflushed.connection_lost(0);
        assert!(unflushed.fails_flush(1));
        assert!(!unflushed.fails_flush(1), "its user was told");
    }

    #[test]
    fn what_one_loss_was_counted_for_is_not_lost_once_more() {
        let unflushed = Unflushed::new(2);
        unflushed.acknowledged(0);
        unflushed.connection_lost(0);
        unflushed.connection_lost(1);
        assert_eq!(unflushed.losses(), 1, "the other has acknowledged nothing");
        assert!(unflushed.fails_flush(1));
        unflushed.connection_lost(0);
        assert!(!unflushed.fails_flush(unflushed.losses()), "nothing was written since");
        assert!(unflushed.any(), "the last FLUSH is to be sent all the same");
        unflushed.acknowledged(1);
        unflushed.connection_lost(0);
        assert_eq!(unflushed.losses(), 1, "its own queue may still give it back");
        unflushed.connection_lost(1);
        assert!(unflushed.fails_flush(2));
    }

    #[test]
    fn the_failure_of_a_flush_that_may_have_begun_before_a_loss_does_not_tell_of_it() {
        let unflushed = Unflushed::new(2);
        unflushed.acknowledged(0);
        unflushed.connection_lost(0);
        // Acknowledged when the FLUSH had begun, on a queue that is lost only now.
        unflushed.acknowledged(1);
        unflushed.connection_lost(1);
        assert!(unflushed.fails_flush(1));
        assert!(unflushed.fails_flush(1), "whoever wrote last is not told yet");
        assert!(unflushed.fails_flush(2));
        assert!(!unflushed.fails_flush(2) && !unflushed.fails_flush(1));
    }

    #[test]
    fn a_flush_that_succeeds_after_a_loss_that_came_after_it_began_is_not_believed() {
        let unflushed = Unflushed::new(2);
        unflushed.acknowledged(1);
        let mut covered = [0; 3];
        unflushed.flush_begins(&mut covered);
        assert!(!unflushed.fails_flush(0));
        unflushed.connection_lost(1);
        assert!(!unflushed.flush_succeeded(&covered), "another server's word");
        assert!(unflushed.any());
        assert!(unflushed.fails_flush(1));
        unflushed.flush_begins(&mut covered);
        assert!(unflushed.flush_succeeded(&covered));
        assert!(!unflushed.any());
    }

    #[test]
    fn an_older_flush_that_ends_later_takes_nothing_back() {
        let unflushed = Unflushed::new(1);
        let (mut older, mut newer) = ([0; 2], [0; 2]);
        unflushed.flush_begins(&mut older);
        unflushed.acknowledged(0);
        unflushed.flush_begins(&mut newer);
        assert!(unflushed.flush_succeeded(&newer));
        assert!(unflushed.flush_succeeded(&older));
        assert!(!unflushed.any());
    }
}
