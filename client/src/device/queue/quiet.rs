//! How long a queue's connections have been quiet while replies are due, in ticks; and when they are pinged.
//!
//! Owns: what came in each tick, of replies and of answers to pings. Never: reads a clock or a socket. Called by `core.rs`; what a silence means, `liveness.rs` says.

use std::time::Duration;

use super::connection::Connection;
use super::requests::Requests;

/// How long a tick is.
pub const TICK: Duration = Duration::from_secs(1);
/// For so many ticks nothing has to come before a ping without an answer, or a network without acknowledgements, says anything.
const QUIET_TICKS: u32 = 5;
/// So long a server of ours is not without room for any more requests; everything is sent again, and nothing is lost if it was.
const UNHEARD_TICKS_MAX: u32 = 120;

/// What a queue does about it.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// From so many ticks on a connection is pinged, and the main thread is told.
    pub told_from_ticks: u32,
    /// A server of ours answers pings at once, whatever its storage does.
    pub pings: bool,
}

impl Patience {
    /// Half of the reply time-out is patience.
    pub fn new(reply_timeout: Duration, pings: bool) -> Self {
        let told_from_ticks = (reply_timeout.as_millis() / TICK.as_millis() / 2).max(1) as u32;
        Self { told_from_ticks, pings }
    }
}

/// For how long replies have been due on a queue's connections, the longest of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSilence {
    /// No byte of a reply has come.
    pub silent: Duration,
    /// Nothing at all has come, the answers to pings included; `None` where nobody is pinged.
    pub unheard: Option<Duration>,
    /// The oldest request has been known to a server, on whichever connection.
    pub oldest: Duration,
}

/// One connection.
#[derive(Debug, Default)]
pub struct Quiet {
    /// Receives that brought something, and those that brought a payload straight to its pages; only differences matter.
    receives: u32,
    payloads: u32,
    /// What they were at the last tick, and the connection's replies.
    receives_at_tick: u32,
    payloads_at_tick: u32,
    replies_at_tick: u32,
    /// For how many ticks nothing but answers to pings has come while replies were due, and for how many nothing.
    silent_ticks: u32,
    unheard_ticks: u32,
    /// The same while the answer to a ping could be expected.
    unanswered_ticks: u32,
}

impl Quiet {
    /// A receive brought something: headers, or parts of one.
    pub fn something_came(&mut self) {
        self.receives = self.receives.wrapping_add(1);
    }

    /// A receive brought a part of a payload.
    pub fn payload_came(&mut self) {
        self.something_came();
        self.payloads = self.payloads.wrapping_add(1);
    }

    /// There is a new connection: what came on the one before says nothing of it.
    pub fn connected(&mut self, connection: &Connection) {
        (self.silent_ticks, self.unheard_ticks, self.unanswered_ticks) = (0, 0, 0);
        (self.receives_at_tick, self.payloads_at_tick) = (self.receives, self.payloads);
        self.replies_at_tick = connection.replies();
    }

    /// A tick has passed while the connection was there: counts what did not come in it, and pings.
    pub fn tick(&mut self, connection: &mut Connection, requests: &mut Requests, patience: Patience) {
        let is_heard = self.receives != self.receives_at_tick;
        let is_answered =
            (self.payloads, connection.replies()) != (self.payloads_at_tick, self.replies_at_tick);
        let is_owed = connection.in_flight() > 0;
        let more_if = |holds: bool, ticks: u32| if holds { ticks + 1 } else { 0 };
        self.silent_ticks = more_if(is_owed && !is_answered, self.silent_ticks);
        self.unheard_ticks = more_if(is_owed && !is_heard, self.unheard_ticks);
        self.unanswered_ticks =
            more_if(!is_heard && connection.expects_pong(requests), self.unanswered_ticks);
        (self.receives_at_tick, self.payloads_at_tick) = (self.receives, self.payloads);
        self.replies_at_tick = connection.replies();
        if patience.pings && self.unheard_ticks >= patience.told_from_ticks {
            connection.ping(requests);
        }
    }

    /// For how many ticks no reply has come.
    pub fn silent_ticks(&self) -> u32 {
        self.silent_ticks
    }

    /// Whether so little came that it is worth asking whether its network is there.
    pub fn is_quiet(&self) -> bool {
        self.unheard_ticks >= QUIET_TICKS
    }

    /// What was not heard before a ping counts, if the ping could have been answered since; and in any case once it is very long.
    fn unheard_ticks(&self) -> u32 {
        let counts = self.unanswered_ticks >= QUIET_TICKS || self.unheard_ticks >= UNHEARD_TICKS_MAX;
        if counts { self.unheard_ticks } else { 0 }
    }
}

/// What is told of a queue's connections; `None`: replies come.
pub fn of_queue<'a>(
    quiets: impl Iterator<Item = &'a Quiet> + Clone,
    requests: &Requests,
    patience: Patience,
) -> Option<QueueSilence> {
    let silent_ticks = quiets.clone().map(|quiet| quiet.silent_ticks).max().unwrap_or(0);
    if silent_ticks < patience.told_from_ticks {
        return None;
    }
    let unheard_ticks = quiets.map(Quiet::unheard_ticks).max().unwrap_or(0);
    Some(QueueSilence {
        silent: TICK * silent_ticks,
        unheard: patience.pings.then_some(TICK * unheard_ticks),
        oldest: TICK * requests.oldest_ticks().unwrap_or(silent_ticks),
    })
}

#[cfg(test)]
mod tests {
    use proto::nbd::transmission::{NbdError, Request, SimpleReply};

    use super::*;
    use crate::device::queue::block_request::BlockRequest;

    const FLUSH: BlockRequest = BlockRequest::FLUSH;

    struct Lane {
        requests: Requests,
        connection: Connection,
        quiet: Quiet,
        patience: Patience,
    }

    impl Lane {
        /// With one FLUSH on its way.
        fn new(pings: bool) -> Self {
            let mut requests = Requests::new(4, 1, 1);
            let mut connection = Connection::new(0, 4, 0);
            connection.submit(&mut requests, 0, FLUSH);
            let patience = Patience::new(Duration::from_secs(20), pings);
            let mut lane = Self { requests, connection, quiet: Quiet::default(), patience };
            assert_eq!(lane.sent().len(), 1);
            lane
        }

        /// Sends what waits; the cookies.
        fn sent(&mut self) -> Vec<u64> {
            let (mut outbox, mut pieces) = ([0; 256], Vec::new());
            let no_payload = |_: u16, _: &mut [u8]| -> Result<(), ()> { Err(()) };
            self.connection.take_batch(&mut self.requests, &mut outbox, &mut pieces, 8, no_payload).unwrap();
            let bytes = pieces.iter().map(|piece| piece.len_bytes() as usize).sum();
            self.connection.batch_sent(&mut self.requests);
            let headers = outbox[..bytes].chunks_exact(28);
            headers.map(|header| Request::decode(header.try_into().unwrap()).unwrap().cookie).collect()
        }

        fn ticks(&mut self, ticks: u32) -> Option<QueueSilence> {
            for _ in 0..ticks {
                self.requests.tick();
                self.quiet.tick(&mut self.connection, &mut self.requests, self.patience);
            }
            of_queue(std::iter::once(&self.quiet), &self.requests, self.patience)
        }

        fn receive(&mut self, error: NbdError, cookie: u64) {
            self.quiet.something_came();
            let reply = SimpleReply { error: error as u32, cookie }.encode();
            self.connection.header_received(&mut self.requests, &reply).unwrap();
        }
    }

    fn silence(silent_s: u64, unheard_s: Option<u64>) -> Option<QueueSilence> {
        let silent = Duration::from_secs(silent_s);
        Some(QueueSilence { silent, unheard: unheard_s.map(Duration::from_secs), oldest: silent })
    }

    #[test]
    fn a_server_that_answers_pings_is_silent_and_heard() {
        let mut lane = Lane::new(true);
        assert_eq!(lane.ticks(9), None);
        assert!(lane.sent().is_empty());
        assert_eq!(lane.ticks(1), silence(10, Some(0)));
        let ping = lane.sent();
        assert_eq!(ping.len(), 1);
        lane.receive(NbdError::Einval, ping[0]);
        assert_eq!(lane.ticks(9), silence(19, Some(0)));
        assert!(lane.sent().is_empty(), "it was heard a moment ago");
        assert_eq!(lane.ticks(2), silence(21, Some(0)));
        assert_eq!(lane.sent().len(), 1);
        // Nothing any more: all of it counts once the answer is late.
        assert_eq!(lane.ticks(4), silence(25, Some(0)));
        assert_eq!(lane.ticks(1), silence(26, Some(15)));
    }

    #[test]
    fn a_connection_that_takes_no_ping_is_heard_for_two_minutes() {
        let mut lane = Lane::new(true);
        // Nobody sends what waits: the socket is full.
        assert_eq!(lane.ticks(119), silence(119, Some(0)));
        assert_eq!(lane.ticks(1), silence(120, Some(120)));
    }

    #[test]
    fn a_foreign_server_is_not_pinged() {
        let mut lane = Lane::new(false);
        assert_eq!(lane.ticks(30), silence(30, None));
        assert!(lane.sent().is_empty());
    }

    #[test]
    fn a_reply_ends_the_silence_and_a_new_connection_begins_without_one() {
        let mut lane = Lane::new(true);
        lane.ticks(15);
        // Part of a header, of whatever it is.
        lane.quiet.something_came();
        assert_eq!(lane.ticks(1), silence(16, Some(0)));
        assert!(!lane.quiet.is_quiet());
        lane.quiet.payload_came();
        assert_eq!(lane.ticks(1), None);
        lane.ticks(15);
        lane.connection.submit(&mut lane.requests, 1, FLUSH);
        let flush = lane.sent();
        lane.receive(NbdError::Eio, *flush.last().unwrap());
        assert_eq!(lane.ticks(1), None);
        lane.ticks(15);
        assert!(lane.quiet.is_quiet() && lane.quiet.silent_ticks() == 15);
        lane.quiet.connected(&lane.connection);
        assert!(!lane.quiet.is_quiet() && lane.quiet.silent_ticks() == 0);
    }
}
