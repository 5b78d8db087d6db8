//! Which losses of connections a request is known to have begun after, though nobody says when it began.
//!
//! The block layer begins a request whenever it likes; the queue's thread hears of it when it enters the kernel the next time. So a
//! request that comes may have begun before a loss that the thread has noticed meanwhile:
//!
//! ```text
//!   read losses: a ─► enter ─► what comes ─► read losses: b ─► enter ─► what comes
//!                                                                        └─ began after a was read, perhaps before b was
//! ```
//! All that had begun before `a` was read has come in the pass after it, and what comes in the next began later. Where much waits the kernel
//! does some twenty things in one call (`IO_LOCAL_TW_DEFAULT_MAX` of its io_uring), in the order in which they came up, whatever they are:
//! then a pass has to be small, or as many requests have to come as there can be.
//!
//! Pure state, called by `core.rs`. Whether a FLUSH has to fail, `unflushed.rs` says.

/// The kernel keeps something back only where it does at least so much.
const DONE_MIN: u32 = 16;
/// So much of it need not complete anything: of each connection a receive and a send that wait on, and the command's poll and the tick.
const SILENT_OF_LANE: u32 = 2;
const SILENT_OF_QUEUE: u32 = 2;

/// What a queue knows of when its requests began.
#[derive(Debug)]
pub(super) struct BegunAfter {
    queue_depth: u32,
    /// Where fewer things complete in a pass, the kernel has kept nothing back.
    few: u32,
    /// What comes now began after so many losses.
    known: u64,
    /// How many there were when that was last read.
    read: u64,
    /// Requests since then.
    came: u32,
    completed_in_pass: u32,
}

impl BegunAfter {
    /// For a queue of that depth with so many connections, before any loss.
    pub(super) fn new(queue_depth: u16, nr_connections: u16) -> Self {
        let silent = SILENT_OF_LANE * u32::from(nr_connections) + SILENT_OF_QUEUE;
        // With many connections only a pass in which nothing completes says it, or the count of requests.
        let few = DONE_MIN.saturating_sub(silent).max(1);
        Self { queue_depth: queue_depth.into(), few, known: 0, read: 0, came: 0, completed_in_pass: 0 }
    }

    /// Something has completed, a request or anything else.
    pub(super) fn completion_came(&mut self) {
        self.completed_in_pass += 1;
    }

    /// A request has come.
    pub(super) fn request_came(&mut self) {
        self.came = self.came.saturating_add(1);
    }

    /// How many losses had been noticed when a request that comes now had not begun.
    pub(super) fn losses(&self) -> u64 {
        self.known
    }

    /// Everything that came in this pass was told; so many losses have been noticed by now.
    pub(super) fn end_of_pass(&mut self, losses: u64) {
        let is_small = std::mem::take(&mut self.completed_in_pass) < self.few;
        if is_small || self.came >= self.queue_depth {
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

    fn complete(begun_after: &mut BegunAfter, completions: u32, requests: u32) {
        (0..completions).for_each(|_| begun_after.completion_came());
        (0..requests).for_each(|_| begun_after.request_came());
    }

    #[test]
    fn what_comes_in_the_pass_after_a_loss_may_have_begun_before_it() {
        let mut begun_after = BegunAfter::new(64, 1);
        begun_after.end_of_pass(0);
        assert!(!begun_after.needs_pass());
        begun_after.end_of_pass(1);
        assert_eq!(begun_after.losses(), 0, "it waited while the loss was noticed");
        assert!(begun_after.needs_pass());
        complete(&mut begun_after, 1, 1);
        begun_after.end_of_pass(1);
        assert_eq!(begun_after.losses(), 1);
        assert!(!begun_after.needs_pass());
    }

    #[test]
    fn where_much_has_come_up_requests_may_be_kept_back_whatever_it_is() {
        let few = DONE_MIN - 2 * SILENT_OF_LANE - SILENT_OF_QUEUE;
        let mut begun_after = BegunAfter::new(64, 2);
        begun_after.end_of_pass(3);
        for pass in 0..4 {
            // Replies, but for one request.
            complete(&mut begun_after, few, 1);
            begun_after.end_of_pass(4);
            assert_eq!(begun_after.losses(), 0, "pass {pass}");
        }
        complete(&mut begun_after, few - 1, 1);
        begun_after.end_of_pass(4);
        assert_eq!(begun_after.losses(), 3, "nothing was kept back");
        for pass in 0..4 {
            assert_eq!(begun_after.losses(), 3, "pass {pass}");
            complete(&mut begun_after, 16, 16);
            begun_after.end_of_pass(4);
        }
        assert_eq!(begun_after.losses(), 4, "no more can wait");
        // With so many connections nothing is small but a pass in which nothing completes.
        let mut begun_after = BegunAfter::new(64, 20);
        begun_after.end_of_pass(1);
        complete(&mut begun_after, 1, 0);
        begun_after.end_of_pass(1);
        assert_eq!(begun_after.losses(), 0);
        begun_after.end_of_pass(1);
        assert_eq!(begun_after.losses(), 1, "it does not look again for ever");
    }
}
