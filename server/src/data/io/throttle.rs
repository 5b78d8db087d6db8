//! The requests of one connection that wait for their turn under the limits of its volume.
//!
//! Owns: their order, and since when the first has waited. Never: moves a byte; `session_io.rs` does, its only user, and the limits are
//! `volume/rate_limit.rs`'s.
//!
//! ```text
//!   READ, TRIM, WRITE_ZEROES ───────────────────────────────────────► queue ──its turn──► begun
//!   WRITE ──► payload left with the peer ──its turn──► payload taken ──► begun
//!                     └─after a while─► payload taken ──► queue ──its turn──► begun
//! ```
//! Nothing is begun, and no buffer taken, for who waits in the queue but of a WRITE that came there late. FLUSH, CACHE and BLOCK_STATUS
//! do not wait, nor does what is refused. **A limit is no silence:** a client that gets no reply asks by a READ of nothing whether the
//! connection lives, behind all that it sent before. So the stream is read on behind requests that wait, also behind a WRITE, after a
//! while and as far as there are buffers and slots. What every request passes, limited or not, is inlined.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proto::nbd::transmission::{Command, Request};

use crate::ids::RequestSlot;
use crate::volume::controls::Controls;
use crate::volume::rate_limit::{Direction, Waiting};

/// So long a WRITE's payload is left with the peer, which is held back by TCP meanwhile. Clients ask after ten seconds without a reply,
/// and want an answer in five.
const LOOK_AHEAD_AFTER: Duration = Duration::from_secs(2);
/// Nobody is woken more often: what comes of it at a high rate is made up for by the burst.
const WAIT_MIN: Duration = Duration::from_micros(200);

/// What waits of one connection.
#[derive(Debug, Default)]
pub struct Throttle {
    queue: VecDeque<RequestSlot>,
    /// Behind the queue: a WRITE whose payload is left with the peer, and with it all that comes after.
    held_write: Option<RequestSlot>,
    /// A WRITE whose payload is being taken before its turn.
    arriving: Option<RequestSlot>,
    /// Who is in line, the first of all or one that goes before it, and since when it has waited.
    first: Option<(RequestSlot, Waiting, Instant)>,
    asks_at: Option<Instant>,
}

/// What a request counts as, and with how many bytes; `None`: it is free.
pub fn cost(request: &Request) -> Option<(Direction, u32)> {
    // Validated to be no longer than the largest payload that was announced.
    let payload_bytes = request.length_bytes as u32;
    match request.command {
        Command::Read => Some((Direction::Read, payload_bytes)),
        Command::Write => Some((Direction::Write, payload_bytes)),
        Command::Trim | Command::WriteZeroes => Some((Direction::Write, 0)),
        _ => None,
    }
}

impl Throttle {
    /// A request waits from now on.
    pub fn add(&mut self, slot: RequestSlot, command: Command) {
        if command == Command::Write {
            self.held_write = Some(slot);
        } else {
            self.queue.push_back(slot);
        }
    }

    /// Whether nothing more is to be taken from the stream.
    #[inline]
    pub fn holds_stream(&self) -> bool {
        self.held_write.is_some()
    }

    /// Whether that is the WRITE whose payload is left with the peer.
    pub fn holds(&self, slot: RequestSlot) -> bool {
        self.held_write == Some(slot)
    }

    /// Whether anybody waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.first_slot().is_none()
    }

    /// Who is first.
    #[inline]
    pub fn first_slot(&self) -> Option<RequestSlot> {
        self.queue.front().copied().or(self.held_write)
    }

    /// The first of those in the queue that are like that.
    pub fn first_slot_like(&self, is_like: impl Fn(RequestSlot) -> bool) -> Option<RequestSlot> {
        self.queue.iter().copied().find(|slot| is_like(*slot))
    }

    /// Whether it is the turn of this one, which is taken out then: the first, or one that goes before it.
    pub fn take_turn(
        &mut self,
        slot: RequestSlot,
        controls: &Controls,
        request: &Request,
        now: Instant,
    ) -> bool {
        if self.first.as_ref().is_some_and(|(other, ..)| *other != slot) {
            self.forget(controls);
        }
        let new = || {
            let (direction, payload_bytes) = cost(request).unwrap_or((Direction::Write, 0));
            (slot, Waiting::new(direction, payload_bytes), now)
        };
        let (_, waiting, since) = self.first.get_or_insert_with(new);
        let since = *since;
        match controls.turn(waiting, now) {
            None => {
                controls.limiter().held_back(now.saturating_duration_since(since));
                self.queue.retain(|other| *other != slot);
                self.held_write = self.held_write.filter(|held| *held != slot);
                (self.first, self.asks_at) = (None, None);
                true
            }
            Some(at) => {
                let look_ahead_at = since + LOOK_AHEAD_AFTER;
                let wants_to_look = self.held_write.is_some() && look_ahead_at > now;
                let at = if wants_to_look { at.min(look_ahead_at) } else { at };
                self.asks_at = Some(at.max(now + WAIT_MIN));
                false
            }
        }
    }

    /// The WRITE whose payload is to be taken before its turn, because the first has waited for long.
    pub fn wants_payload(&self, now: Instant) -> Option<RequestSlot> {
        let (.., since) = self.first?;
        self.held_write.filter(|_| now.saturating_duration_since(since) >= LOOK_AHEAD_AFTER)
    }

    /// It is being taken.
    pub fn takes_payload(&mut self) {
        self.arriving = self.held_write.take();
    }

    /// Whether that is the request whose payload is here now: it waits for its turn.
    #[inline]
    pub fn has_arrived(&mut self, slot: RequestSlot) -> bool {
        let is_it = self.arriving == Some(slot);
        if is_it {
            self.arriving = None;
            self.queue.push_back(slot);
        }
        is_it
    }

    /// A WRITE whose payload never came whole is gone.
    pub fn dropped(&mut self, slot: RequestSlot, controls: &Controls) {
        if self.held_write != Some(slot) && self.arriving != Some(slot) {
            return;
        }
        (self.held_write, self.arriving) = (None, None);
        // It was the first.
        if self.queue.is_empty() {
            self.forget(controls);
        }
    }

    /// The first will not begin any more.
    pub fn forget(&mut self, controls: &Controls) {
        if let Some((_, waiting, _)) = self.first.take() {
            controls.limiter().forget(&waiting);
        }
        self.asks_at = None;
    }

    /// When the first is to ask again, given once.
    #[inline]
    pub fn take_timer(&mut self) -> Option<Instant> {
        self.asks_at.take()
    }
}

#[cfg(test)]
mod tests {
    use proto::nbd::transmission::CommandFlags;

    use super::*;
    use crate::catalog::{Content, VolumeLimits};

    fn request(command: Command, length_bytes: u64) -> Request {
        Request { command, flags: CommandFlags::NONE, cookie: 1, offset_bytes: 0, length_bytes }
    }

    /// Whether it is the first one's turn.
    fn turn(throttle: &mut Throttle, controls: &Controls, request: &Request, now: Instant) -> bool {
        let slot = throttle.first_slot().unwrap();
        throttle.take_turn(slot, controls, request, now)
    }

    #[test]
    fn a_write_leaves_its_payload_with_the_peer_for_two_seconds_and_then_waits_with_it() {
        let limits = VolumeLimits { write_iops: 1, ..VolumeLimits::default() };
        let controls = Controls::new(limits, Content::Written);
        let mut throttle = Throttle::default();
        let write = request(Command::Write, 4096);
        let start = Instant::now() + Duration::from_secs(1);
        throttle.add(RequestSlot(1), Command::Write);
        assert!(turn(&mut throttle, &controls, &write, start) && throttle.is_empty());
        // Another connection is in front.
        for _ in 0..5 {
            assert!(controls.turn(&mut Waiting::new(Direction::Write, 0), start).is_some());
        }
        throttle.add(RequestSlot(2), Command::Write);
        assert!(!turn(&mut throttle, &controls, &write, start));
        assert!(throttle.holds_stream() && throttle.wants_payload(start).is_none());
        let looks_at = throttle.take_timer().unwrap();
        assert_eq!((looks_at, throttle.take_timer()), (start + LOOK_AHEAD_AFTER, None));
        assert!(!turn(&mut throttle, &controls, &write, looks_at));
        assert_eq!(throttle.wants_payload(looks_at), Some(RequestSlot(2)));
        throttle.takes_payload();
        assert!(!throttle.holds_stream() && throttle.is_empty() && !throttle.has_arrived(RequestSlot(3)));
        assert!(throttle.has_arrived(RequestSlot(2)));
        assert_eq!(throttle.first_slot(), Some(RequestSlot(2)));
        assert!(!turn(&mut throttle, &controls, &write, looks_at));
        let turn_at = throttle.take_timer().unwrap();
        assert!(turn_at > looks_at + Duration::from_secs(2), "its place in line was kept");
        assert!(turn(&mut throttle, &controls, &write, turn_at));
        assert!(controls.limiter().throttled() >= Duration::from_secs(4));
    }

    #[test]
    fn the_place_of_a_write_that_never_came_whole_is_given_back() {
        for looks_ahead in [false, true] {
            let limits = VolumeLimits { write_iops: 1, ..VolumeLimits::default() };
            let controls = Controls::new(limits, Content::Written);
            let (mut throttle, now) = (Throttle::default(), Instant::now() + Duration::from_secs(1));
            let write = request(Command::Write, 4096);
            throttle.add(RequestSlot(1), Command::Write);
            assert!(turn(&mut throttle, &controls, &write, now));
            throttle.add(RequestSlot(2), Command::Write);
            assert!(!turn(&mut throttle, &controls, &write, now));
            if looks_ahead {
                throttle.takes_payload();
            }
            throttle.dropped(RequestSlot(2), &controls);
            assert!(throttle.is_empty() && throttle.take_timer().is_none());
            throttle.add(RequestSlot(3), Command::Write);
            assert!(turn(&mut throttle, &controls, &write, now + Duration::from_secs(1)));
        }
    }

    #[test]
    fn reads_do_not_hold_the_stream_and_go_in_order() {
        let limits = VolumeLimits { read_iops: 1, ..VolumeLimits::default() };
        let controls = Controls::new(limits, Content::Written);
        let mut throttle = Throttle::default();
        let now = Instant::now() + Duration::from_secs(1);
        for slot in 1..4 {
            throttle.add(RequestSlot(slot), Command::Read);
        }
        let read = request(Command::Read, 4096);
        assert!(turn(&mut throttle, &controls, &read, now));
        assert!(!turn(&mut throttle, &controls, &read, now) && !throttle.holds_stream());
        assert_eq!(throttle.first_slot(), Some(RequestSlot(2)));
        assert!(turn(&mut throttle, &controls, &read, now + Duration::from_secs(1)));
        assert_eq!(throttle.first_slot(), Some(RequestSlot(3)));
    }

    #[test]
    fn what_moves_no_bytes_of_a_client_is_a_request_or_nothing() {
        assert_eq!(cost(&request(Command::Trim, 1 << 40)), Some((Direction::Write, 0)));
        assert_eq!(cost(&request(Command::WriteZeroes, 1 << 40)), Some((Direction::Write, 0)));
        for free in [Command::Flush, Command::Cache, Command::BlockStatus] {
            assert_eq!(cost(&request(free, 0)), None);
        }
    }
}
