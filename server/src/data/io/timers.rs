//! When connections of a ring that wait for a time are to be advanced.
//!
//! A connection has at most one time that counts, its latest; others of it only have it advanced once more. Called by `run.rs`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// The times, by connection index.
#[derive(Debug, Default)]
pub struct Timers(BinaryHeap<Reverse<(Instant, u32)>>);

impl Timers {
    /// Has a connection advanced then.
    pub fn add(&mut self, index: u32, at: Instant) {
        self.0.push(Reverse((at, index)));
    }

    /// Whether nobody waits for a time.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How long it is to the next; `None`: there is none.
    pub fn next_in(&self, now: Instant) -> Option<Duration> {
        self.0.peek().map(|Reverse((at, _))| at.saturating_duration_since(now))
    }

    /// A connection whose time has come.
    pub fn take_due(&mut self, now: Instant) -> Option<u32> {
        let Reverse((at, index)) = *self.0.peek()?;
        (at <= now).then(|| {
            self.0.pop();
            index
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_time_comes_first_is_first() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut timers = Timers::default();
        assert_eq!((timers.next_in(start), timers.take_due(start)), (None, None));
        timers.add(1, at(30));
        timers.add(2, at(10));
        timers.add(3, at(20));
        assert_eq!(timers.next_in(at(4)), Some(Duration::from_millis(6)));
        assert_eq!(timers.take_due(at(9)), None);
        assert_eq!(timers.take_due(at(25)), Some(2));
        assert_eq!(timers.take_due(at(25)), Some(3));
        assert_eq!(timers.take_due(at(25)), None);
    }
}
