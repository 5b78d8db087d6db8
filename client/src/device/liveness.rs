//! Whether a server that owes replies still lives, and how the time of an outage is counted meanwhile; without a clock.
//!
//! Owns: when a probe is due, what its answer is worth and for how long, and how long an outage has lasted for those who do not
//! wait for ever. Never: sends a probe (`probe.rs` does) or reads a clock. Called by `reconnect.rs`, which decides.
//!
//! Two questions are asked. Pings, on the connection itself and only of servers of ours, tell whether it still carries bytes: a
//! server that lives is of no use behind one that does not. Probes tell whether the storage behind the server still works.
//!
//! A probe is a READ of one block on a connection of its own. A busy disk may take minutes for one FLUSH, and its server answers
//! that READ all the same. So an answered probe is a sign of life as a reply is, and both are good for the reply time-out; but
//! probes vouch for a request no longer than [`VOUCHED_FOR`] after it was first sent: a server that has forgotten it may
//! answer probes for ever.

use std::time::{Duration, Instant};

use super::queue::quiet::QueueSilence;

/// How long after the oldest unanswered request was sent probes count.
pub const VOUCHED_FOR: Duration = Duration::from_secs(600);
/// Between the end of a probe and the next.
pub const PROBE_PAUSE: Duration = Duration::from_secs(5);

/// A connection on which replies are due and none comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    /// When the last byte of a reply came, or the first request was sent.
    pub since: Instant,
    /// When anything came at all, the answers to pings too; `None` where nobody is pinged.
    pub heard_at: Option<Instant>,
    /// When the oldest request that is not answered was sent for the first time, on whichever connection.
    pub oldest_sent: Instant,
}

impl Silence {
    /// What is told of a queue at that moment; `None`: the clock has not run for so long.
    pub fn until(now: Instant, told: QueueSilence) -> Option<Self> {
        let heard_at = match told.unheard {
            Some(unheard) => Some(now.checked_sub(unheard)?),
            None => None,
        };
        let (since, oldest_sent) = (now.checked_sub(told.silent)?, now.checked_sub(told.oldest)?);
        Some(Self { since, heard_at, oldest_sent })
    }
}

/// Probes of one server.
#[derive(Debug)]
pub struct Probes {
    reply_timeout: Duration,
    is_possible: bool,
    is_out: bool,
    rests_until: Option<Instant>,
    answered_at: Option<Instant>,
}

impl Probes {
    /// None was sent yet. `reply_timeout`: how long a sign of life is good for. Where they are not `possible`, none is ever due.
    pub fn new(reply_timeout: Duration, is_possible: bool) -> Self {
        Self { reply_timeout, is_possible, is_out: false, rests_until: None, answered_at: None }
    }

    /// How long a sign of life is good for.
    pub fn reply_timeout(&self) -> Duration {
        self.reply_timeout
    }

    /// When the next may be sent, as far as this is known before; `None`: not before the one that is out has returned, or never.
    pub fn due_at(&self, now: Instant) -> Option<Instant> {
        let may_come = self.is_possible && !self.is_out;
        may_come.then(|| self.rests_until.map_or(now, |until| until.max(now)))
    }

    /// Takes the turn of the next, if it is due.
    pub fn take_turn(&mut self, now: Instant) -> bool {
        let is_due = self.due_at(now) == Some(now);
        self.is_out |= is_due;
        is_due
    }

    /// The one that was out was answered, or was not.
    pub fn returned(&mut self, is_answered: bool, now: Instant) {
        self.is_out = false;
        self.rests_until = now.checked_add(PROBE_PAUSE);
        if is_answered {
            self.answered_at = Some(now);
        }
    }

    /// Whether neither a reply nor an answered probe says that the server lives, or the connection does not carry pings any more.
    pub fn is_dead(&self, silence: Silence, now: Instant) -> bool {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < self.reply_timeout;
        let is_vouched_for = now.saturating_duration_since(silence.oldest_sent) < VOUCHED_FOR;
        let is_cut = silence.heard_at.is_some_and(|at| !is_recent(at));
        !is_recent(silence.since) && (is_cut || !is_vouched_for || !self.answered_at.is_some_and(is_recent))
    }
}

/// How long an outage has lasted for those who do not wait for ever: it stands still while the server is known to live.
#[derive(Debug, Clone, Copy)]
pub struct OutageClock {
    began: Instant,
    oldest_sent: Instant,
    counted: Duration,
    /// It counts from here on.
    runs_from: Instant,
}

impl OutageClock {
    /// An outage begins, with the oldest request that waits sent then.
    pub fn new(now: Instant, oldest_sent: Instant) -> Self {
        Self { began: now, oldest_sent, counted: Duration::ZERO, runs_from: now }
    }

    /// When it began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// A request that was sent then waits as well.
    pub fn waits_for(&mut self, sent: Instant) {
        self.oldest_sent = self.oldest_sent.min(sent);
    }

    /// The server lives, which is good for so long.
    pub fn lives(&mut self, now: Instant, good_for: Duration) {
        let until = (now + good_for).min(self.oldest_sent + VOUCHED_FOR);
        if until > now {
            self.counted += now.saturating_duration_since(self.runs_from);
            self.runs_from = self.runs_from.max(until);
        }
    }

    /// When it will have lasted for so long; `None`: never.
    pub fn ends(&self, after: Duration) -> Option<Instant> {
        if self.counted >= after {
            return Some(self.began);
        }
        self.runs_from.checked_add(after.saturating_sub(self.counted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_silent_server_lives_for_as_long_as_it_answers_probes_and_ten_minutes_at_most() {
        let start = Instant::now();
        let silence = Silence { since: start, heard_at: None, oldest_sent: start };
        let mut probes = Probes::new(REPLY_TIMEOUT, true);
        assert!(!probes.is_dead(silence, start + seconds(19)));
        assert!(probes.is_dead(silence, start + seconds(20)));
        for second in (10..610).step_by(10) {
            probes.returned(true, start + seconds(second));
            let is_dead = probes.is_dead(silence, start + seconds(second + 9));
            assert_eq!(is_dead, second + 9 >= 600, "{second}");
        }
        // Other replies have come since, but the request was sent then.
        let silence = Silence { since: start + seconds(590), ..silence };
        assert!(!probes.is_dead(silence, start + seconds(609)));
        probes.returned(true, start + seconds(610));
        assert!(probes.is_dead(silence, start + seconds(610)));
    }

    /// Something between the two took the requests and passes nothing on, while new connections get through.
    #[test]
    fn a_connection_that_carries_no_pings_is_dead_whatever_the_server_answers_elsewhere() {
        let start = Instant::now();
        let mut probes = Probes::new(REPLY_TIMEOUT, true);
        probes.returned(true, start + seconds(29));
        let is_dead = |since, heard_at| {
            let heard_at = Some(start + seconds(heard_at));
            let silence = Silence { since: start + seconds(since), heard_at, oldest_sent: start };
            probes.is_dead(silence, start + seconds(30))
        };
        assert!(!is_dead(0, 11) && is_dead(0, 10));
        assert!(!is_dead(11, 11));
    }

    #[test]
    fn one_probe_at_a_time_with_pauses_between() {
        let start = Instant::now();
        let mut probes = Probes::new(REPLY_TIMEOUT, true);
        assert!(probes.take_turn(start));
        assert!(!probes.take_turn(start + seconds(30)), "one is out");
        assert_eq!(probes.due_at(start), None);
        probes.returned(false, start + seconds(30));
        assert_eq!(probes.due_at(start + seconds(30)), Some(start + seconds(30) + PROBE_PAUSE));
        assert!(!probes.take_turn(start + seconds(34)) && probes.take_turn(start + seconds(35)));
        assert!(!Probes::new(REPLY_TIMEOUT, false).take_turn(start));
    }

    #[test]
    fn an_outage_stands_still_while_the_server_lives() {
        let start = Instant::now();
        let after = seconds(30);
        let mut clock = OutageClock::new(start, start);
        assert_eq!(clock.ends(after), Some(start + after));
        clock.lives(start + seconds(10), REPLY_TIMEOUT);
        assert_eq!(clock.ends(after), Some(start + seconds(30 + 20)), "ten seconds have passed before");
        clock.lives(start + seconds(15), REPLY_TIMEOUT);
        clock.lives(start + seconds(20), REPLY_TIMEOUT);
        assert_eq!(clock.ends(after), Some(start + seconds(40 + 20)));
        // Dead for fifteen seconds, then it answers again.
        clock.lives(start + seconds(55), REPLY_TIMEOUT);
        assert_eq!(clock.ends(after), Some(start + seconds(75 + 5)));
    }

    #[test]
    fn an_outage_stands_still_no_longer_than_probes_count() {
        let start = Instant::now();
        let mut clock = OutageClock::new(start + seconds(60), start + seconds(60));
        clock.waits_for(start);
        for second in 60..700 {
            clock.lives(start + seconds(second), REPLY_TIMEOUT);
        }
        assert_eq!(clock.ends(seconds(30)), Some(start + VOUCHED_FOR + seconds(30)));
    }
}
