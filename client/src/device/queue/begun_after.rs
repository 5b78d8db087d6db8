//! Which losses of connections a request is known to have begun after, though nobody says when it began.
//!
//! The block layer begins a request whenever it likes; the queue's thread hears of it when it enters the kernel the next time. So a
//! request that comes may have begun before a loss that the thread has noticed meanwhile:
//!
//! ```text
//!   read losses: a ─► enter ─► what comes ─► read losses: b ─► enter ─► what comes
//!                                                                        └─ began after a was read, perhaps before b was
//! ```
//! All that had begun before `a` was read has come in the pass after it, and what comes in the next began later. Where many wait the kernel
//! hands over some twenty in one call (`IO_LOCAL_TW_DEFAULT_MAX` of its io_uring), in the order in which they began: then as many have
//! to come as there can be.
//!
//! Pure state, called by `core.rs`. Whether a FLUSH has to fail, `unflushed.rs` says.

/// The kernel keeps requests back only where it hands over at least so many.
const HANDED_OVER_MIN: u32 = 16;

/// What a queue knows of when its requests began.
#[derive(Debug)]
pub(super) struct BegunAfter {
    queue_depth: u32,
    /// What comes now began after so many losses.
    known: u64,
    /// How many there were when that was last read.
    read: u64,
    came: u32,
    came_in_pass: u32,
}

impl BegunAfter {
    /// For a queue of that depth, before any loss.
    pub(super) fn new(queue_depth: u16) -> Self {
        Self { queue_depth: queue_depth.into(), known: 0, read: 0, came: 0, came_in_pass: 0 }
    }

    /// A request has come.
    pub(super) fn request_came(&mut self) {
        self.came_in_pass += 1;
    }

    /// How many losses had been noticed when a request that comes now had not begun.
    pub(super) fn losses(&self) -> u64 {
        self.known
    }

    /// Everything that came in this pass was told; so many losses have been noticed by now.
    pub(super) fn end_of_pass(&mut self, losses: u64) {
        let came_in_pass = std::mem::take(&mut self.came_in_pass);
        self.came = self.came.saturating_add(came_in_pass);
        if came_in_pass < HANDED_OVER_MIN || self.came >= self.queue_depth {
            (self.known, self.read, self.came) = (self.read, losses, 0);
        }
    }

    /// Whether another pass, even if nothing comes in it, makes more known.
    pub(super) fn needs_pass(&self) -> bool {
        self.known != self.read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_the_pass_after_a_loss_may_have_begun_before_it() {
        let mut begun_after = BegunAfter::new(64);
        begun_after.end_of_pass(0);
        assert!(!begun_after.needs_pass());
        begun_after.end_of_pass(1);
        assert_eq!(begun_after.losses(), 0, "it waited while the loss was noticed");
        assert!(begun_after.needs_pass());
        begun_after.request_came();
        begun_after.end_of_pass(1);
        assert_eq!(begun_after.losses(), 1);
        assert!(!begun_after.needs_pass());
    }

    #[test]
    fn of_many_that_wait_all_have_to_come() {
        let mut begun_after = BegunAfter::new(64);
        begun_after.end_of_pass(3);
        for pass in 0..4 {
            assert_eq!(begun_after.losses(), 0, "pass {pass}");
            (0..HANDED_OVER_MIN).for_each(|_| begun_after.request_came());
            begun_after.end_of_pass(4);
        }
        assert_eq!(begun_after.losses(), 3, "no more can wait");
        begun_after.end_of_pass(4);
        assert_eq!(begun_after.losses(), 4);
    }
}
