//! Limits of a volume's requests and bytes per second: when a request may begin.
//!
//! Owns: the arithmetic. Never: reads a clock (time comes in as nanoseconds), waits, locks or allocates: the rings of a volume share it
//! by atomics alone. Called by `data/io/throttle.rs`, which has a connection wait.
//!
//! Each limit is a bucket that is kept as one number, the time up to which it is spent: a request that costs a hundredth of a second
//! moves it by so much, and may begin when the time before that has come. What is unused is saved up to the burst, because the number
//! never lags further behind the clock. So the long-term rate is exact however late those who wait are woken.
//!
//! **Fair by connection.** A connection waits for one thing at a time, a request or a slice of at most `SLICE_BYTES` of its payload, and
//! stands in line anew for the next: whoever has ten connections has ten shares, on whichever rings they are, and whoever asks for a
//! megabyte at a time has no more than one who asks for 64 KiB.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::catalog::VolumeLimits;

/// Bytes that a connection may take before the others have their turn.
const SLICE_BYTES: u32 = 64 << 10;
/// Unused limit that is saved up where nothing else is set: what makes up for those who are woken late, and hardly shows in a rate.
const BURST_DEFAULT: Duration = Duration::from_millis(100);
const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// What a request counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// READ.
    Read,
    /// WRITE, WRITE_ZEROES and TRIM.
    Write,
}

/// One limit.
#[derive(Debug, Default)]
struct Bucket {
    /// Requests or bytes; 0: there is no limit.
    per_second: AtomicU64,
    burst_ns: AtomicU64,
    spent_until_ns: AtomicU64,
}

impl Bucket {
    fn set(&self, per_second: u64, burst: Duration, now_ns: u64) {
        self.per_second.store(per_second, Ordering::Relaxed);
        self.burst_ns.store(u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        // Nothing is saved up yet, and nothing owed.
        self.spent_until_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Stands in line for so much; `None`: there is no limit. Gives the time at which it may be had, and what it costs.
    fn reserve(&self, amount: u32, now_ns: u64) -> Option<(u64, u64)> {
        let per_second = self.per_second.load(Ordering::Relaxed);
        if per_second == 0 {
            return None;
        }
        let cost_ns = (u64::from(amount) * NANOS_PER_SECOND).div_ceil(per_second);
        let earliest_ns = now_ns.saturating_sub(self.burst_ns.load(Ordering::Relaxed));
        let spend = |spent_ns: u64| Some(spent_ns.max(earliest_ns).saturating_add(cost_ns));
        // It always gives something.
        let before = self.spent_until_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend);
        Some((before.unwrap_or(now_ns).max(earliest_ns), cost_ns))
    }

    fn give_back(&self, cost_ns: u64) {
        self.spent_until_ns.fetch_sub(cost_ns, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Lane {
    requests: Bucket,
    bytes: Bucket,
}

/// The limits of a volume, and what is used of them.
#[derive(Debug, Default)]
pub struct RateLimiter {
    is_limited: AtomicBool,
    /// Counts the changes: who waits for what was set before stands in line anew.
    generation: AtomicU32,
    read: Lane,
    write: Lane,
    throttled_ns: AtomicU64,
}

/// A request that waits, or is about to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    direction: Direction,
    generation: u32,
    has_request: bool,
    missing_bytes: u32,
    place: Option<Place>,
}

/// A place in the line of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    of_bytes: bool,
    at_ns: u64,
    cost_ns: u64,
}

/// Whether a request may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Now.
    Begin,
    /// Not before this time; to be asked again then.
    At(u64),
}

impl Waiting {
    /// A request with a payload of so many bytes, which has not asked yet.
    pub fn new(direction: Direction, payload_bytes: u32) -> Self {
        Self { direction, generation: 0, has_request: false, missing_bytes: payload_bytes, place: None }
    }
}

impl RateLimiter {
    /// Whether there is any limit: without, nobody has to ask.
    pub fn is_limited(&self) -> bool {
        self.is_limited.load(Ordering::Relaxed)
    }

    /// Sets the limits; they hold at once, for those who wait as well, once they ask again.
    pub fn set(&self, limits: &VolumeLimits, now_ns: u64) {
        let burst = match limits.burst_seconds {
            0 => BURST_DEFAULT,
            seconds => Duration::from_secs(u64::from(seconds)),
        };
        self.read.requests.set(limits.read_iops, burst, now_ns);
        self.read.bytes.set(limits.read_bytes_per_second, burst, now_ns);
        self.write.requests.set(limits.write_iops, burst, now_ns);
        self.write.bytes.set(limits.write_bytes_per_second, burst, now_ns);
        let VolumeLimits { read_iops, write_iops, read_bytes_per_second, write_bytes_per_second, .. } =
            limits;
        let rates = [read_iops, write_iops, read_bytes_per_second, write_bytes_per_second];
        self.is_limited.store(rates.iter().any(|rate| **rate > 0), Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Whether the request may begin; it keeps its place in line until then.
    pub fn turn(&self, waiting: &mut Waiting, now_ns: u64) -> Turn {
        let generation = self.generation.load(Ordering::Acquire);
        if waiting.generation != generation {
            (waiting.generation, waiting.place) = (generation, None);
        }
        let lane = self.lane(waiting.direction);
        loop {
            if let Some(place) = waiting.place.filter(|place| place.at_ns > now_ns) {
                return Turn::At(place.at_ns);
            }
            let (of_bytes, amount) = if !waiting.has_request {
                waiting.has_request = true;
                (false, 1)
            } else if waiting.missing_bytes > 0 {
                let slice_bytes = waiting.missing_bytes.min(SLICE_BYTES);
                waiting.missing_bytes -= slice_bytes;
                (true, slice_bytes)
            } else {
                waiting.place = None;
                return Turn::Begin;
            };
            let bucket = if of_bytes { &lane.bytes } else { &lane.requests };
            let reserved = bucket.reserve(amount, now_ns);
            waiting.place = reserved.map(|(at_ns, cost_ns)| Place { of_bytes, at_ns, cost_ns });
        }
    }

    /// The request waits no more, because its connection is gone: the place that it had is given back.
    pub fn forget(&self, waiting: &Waiting) {
        let is_current = waiting.generation == self.generation.load(Ordering::Acquire);
        if let Some(Place { of_bytes, cost_ns, .. }) = waiting.place.filter(|_| is_current) {
            let lane = self.lane(waiting.direction);
            if of_bytes { lane.bytes.give_back(cost_ns) } else { lane.requests.give_back(cost_ns) }
        }
    }

    /// A connection was held back for so long.
    pub fn held_back(&self, length: Duration) {
        let length_ns = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
        self.throttled_ns.fetch_add(length_ns, Ordering::Relaxed);
    }

    /// For how long connections were held back, all of them together.
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_ns.load(Ordering::Relaxed))
    }

    fn lane(&self, direction: Direction) -> &Lane {
        match direction {
            Direction::Read => &self.read,
            Direction::Write => &self.write,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = NANOS_PER_SECOND;

    fn limiter(limits: VolumeLimits) -> RateLimiter {
        let limiter = RateLimiter::default();
        limiter.set(&limits, 0);
        limiter
    }

    fn read_iops(read_iops: u64, burst_seconds: u32) -> RateLimiter {
        limiter(VolumeLimits { read_iops, burst_seconds, ..VolumeLimits::default() })
    }

    /// Requests that connections get done until `end_ns`, each with one after another; they are asked for every `step_ns`.
    fn served(limiter: &RateLimiter, payloads: &[u32], from_ns: u64, end_ns: u64, step_ns: u64) -> Vec<u64> {
        let new = |bytes: &u32| Waiting::new(Direction::Read, *bytes);
        let mut waiting: Vec<Waiting> = payloads.iter().map(new).collect();
        let mut done = vec![0; payloads.len()];
        let mut now_ns = from_ns;
        while now_ns < end_ns {
            // Round by round, as rings come to their connections.
            let mut has_begun = true;
            while std::mem::take(&mut has_begun) {
                for (at, waits) in waiting.iter_mut().enumerate() {
                    if limiter.turn(waits, now_ns) == Turn::Begin {
                        done[at] += 1;
                        *waits = new(&payloads[at]);
                        has_begun = true;
                    }
                }
            }
            now_ns += step_ns;
        }
        waiting.iter().for_each(|waits| limiter.forget(waits));
        done
    }

    #[test]
    fn a_rate_is_exact_however_coarsely_those_who_wait_are_woken() {
        for step_ns in [10_000, 1_000_000, 50_000_000] {
            let limiter = read_iops(1000, 0);
            let done: u64 = served(&limiter, &[4096; 3], 0, 10 * SECOND, step_ns).iter().sum();
            assert!((9_900..=10_001).contains(&done), "{done} at {step_ns}");
            let per_second = 100 << 20;
            let limiter = super::tests::limiter(VolumeLimits {
                read_bytes_per_second: per_second,
                ..VolumeLimits::default()
            });
            let done: u64 = served(&limiter, &[1 << 20; 3], 0, 10 * SECOND, step_ns).iter().sum();
            assert!((990..=1003).contains(&done), "{done} MiB at {step_ns}");
        }
    }

    #[test]
    fn what_is_not_used_is_saved_up_to_the_burst() {
        let limiter = read_iops(100, 3);
        assert!(served(&limiter, &[0], 0, 1, 1)[0] <= 1, "nothing yet");
        // An hour later.
        let start = 3600 * SECOND;
        let at_once = served(&limiter, &[0], start, start + 1, 1)[0];
        assert!((300..=301).contains(&at_once), "{at_once}");
        let after = served(&limiter, &[0], start + 1, start + 10 * SECOND, 1_000_000)[0];
        assert!((998..=1001).contains(&after), "{after}");
    }

    #[test]
    fn connections_have_equal_shares_of_requests_and_of_bytes() {
        let limiter = read_iops(1000, 0);
        let done = served(&limiter, &[4096; 11], 0, 11 * SECOND, 1_000_000);
        assert!(done.iter().all(|done| (990..=1011).contains(done)), "{done:?}");
        // One asks for a megabyte at a time, the others for 64 KiB.
        let read_bytes_per_second = 64 << 20;
        let limiter =
            super::tests::limiter(VolumeLimits { read_bytes_per_second, ..VolumeLimits::default() });
        let done = served(&limiter, &[1 << 20, 64 << 10, 64 << 10, 64 << 10], 0, 10 * SECOND, 1_000_000);
        let shares: Vec<u64> = [done[0] * 16, done[1], done[2], done[3]].to_vec();
        assert!(shares.iter().all(|share| (2400..=2720).contains(share)), "{shares:?}");
    }

    #[test]
    fn a_change_holds_at_once_for_those_who_wait() {
        let limiter = read_iops(1, 0);
        let mut waiting = [Waiting::new(Direction::Read, 0); 4];
        let turns = waiting.each_mut().map(|waiting| limiter.turn(waiting, 0));
        assert_eq!(turns[0], Turn::Begin);
        assert_eq!(turns[3], Turn::At(3 * SECOND));
        limiter.set(&VolumeLimits { read_iops: 1000, ..VolumeLimits::default() }, SECOND / 2);
        assert_eq!(limiter.turn(&mut waiting[3], SECOND / 2), Turn::Begin);
        limiter.set(&VolumeLimits::default(), SECOND / 2);
        assert!(!limiter.is_limited());
        assert_eq!(limiter.turn(&mut waiting[2], SECOND / 2), Turn::Begin);
    }

    #[test]
    fn reads_do_not_count_as_writes_and_the_place_of_a_lost_connection_is_given_back() {
        let limiter = limiter(VolumeLimits { write_iops: 1, ..VolumeLimits::default() });
        for _ in 0..10 {
            assert_eq!(limiter.turn(&mut Waiting::new(Direction::Read, 1 << 20), 0), Turn::Begin);
        }
        let new = || Waiting::new(Direction::Write, 1 << 20);
        assert_eq!(limiter.turn(&mut new(), 0), Turn::Begin);
        let mut lost = new();
        assert_eq!(limiter.turn(&mut lost, 0), Turn::At(SECOND));
        limiter.forget(&lost);
        assert_eq!(limiter.turn(&mut new(), 0), Turn::At(SECOND));
    }

    #[test]
    fn both_limits_hold_at_once() {
        let limits =
            VolumeLimits { read_iops: 100, read_bytes_per_second: 1 << 20, ..VolumeLimits::default() };
        let few = served(&limiter(limits), &[64 << 10], 0, 10 * SECOND, 1_000_000)[0];
        assert!((159..=162).contains(&few), "{few}: by bytes");
        let many = served(&limiter(limits), &[512], 0, 10 * SECOND, 1_000_000)[0];
        assert!((990..=1001).contains(&many), "{many}: by requests");
    }
}
