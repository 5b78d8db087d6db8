//! How long the queues of a foreign server's disk wait for each other, whose server may grant fewer connections than there are queues;
//! without a clock.
//!
//! Owns: until when those that could be served wait for the others. Never: connects anybody; `reconnect.rs` does.
//!
//! Time counts and not attempts: after an outage every queue has failed attempts, long before any could succeed, and one attempt may hang
//! for a minute.

use std::time::{Duration, Instant};

use super::connect::redial::PAUSE_MAX;

/// At first: more than a queue may rest between two attempts, or it would come after an ordinary outage when the others are served. The
/// server may also still count connections that it has just lost.
pub const WAIT_MIN: Duration = PAUSE_MAX.saturating_add(Duration::from_secs(1));
/// Twice as long whenever the others were connected too soon, but not longer than this.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What is known of the queues' coming together.
#[derive(Debug)]
pub struct Together {
    wait: Duration,
    /// While nobody is served, and somebody could be.
    until: Option<Instant>,
    /// Some queues were connected without the others.
    is_apart: bool,
}

impl Default for Together {
    /// All queues have connections.
    fn default() -> Self {
        Self { wait: WAIT_MIN, until: None, is_apart: false }
    }
}

impl Together {
    /// A queue has lost its connections, and not for another's sake.
    pub fn lost_by_itself(&mut self) {
        (self.wait, self.is_apart) = (WAIT_MIN, false);
    }

    /// Nobody is served and somebody could be: whether those are waited for that have no connections. The time begins when this is
    /// asked for the first time.
    pub fn waits(&mut self, now: Instant) -> bool {
        now < *self.until.get_or_insert(now + self.wait)
    }

    /// Those are served that could be; `are_all`: every queue.
    pub fn are_served(&mut self, are_all: bool) {
        (self.until, self.is_apart) = (None, !are_all);
    }

    /// A queue could be served while others are, and all come together anew. Whether they were connected without it before, too soon.
    pub fn comes_late(&mut self) -> bool {
        let is_late = std::mem::take(&mut self.is_apart);
        if is_late {
            self.wait = WAIT_MAX.min(self.wait * 2);
        }
        is_late
    }

    /// When the time is up.
    pub fn due_at(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long is waited when somebody could be served at that moment.
    fn waited(together: &mut Together, now: Instant) -> Duration {
        assert!(together.waits(now));
        let until = together.due_at().unwrap();
        assert!(together.waits(until - Duration::from_millis(1)) && !together.waits(until));
        until - now
    }

    #[test]
    fn the_time_is_longer_whenever_it_was_too_short_until_connections_are_lost_by_themselves() {
        let (mut together, now) = (Together::default(), Instant::now());
        let mut expected = WAIT_MIN;
        for _ in 0..5 {
            assert_eq!(waited(&mut together, now), expected);
            together.are_served(false);
            assert_eq!(together.due_at(), None);
            assert!(together.comes_late());
            expected = WAIT_MAX.min(expected * 2);
        }
        assert_eq!(expected, WAIT_MAX);
        together.lost_by_itself();
        assert_eq!(waited(&mut together, now), WAIT_MIN);
        together.are_served(true);
        assert!(!together.comes_late(), "all were served");
        assert_eq!(waited(&mut together, now), WAIT_MIN);
    }
}
