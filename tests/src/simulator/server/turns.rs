//! What the simulated server does to have requests wait for their turn under the volume's limits, and whether the limits hold.
//!
//! Stands for `server/src/data/io/session_io/turns.rs`. Who waits, and for how long, the product's `Throttle` and `RateLimiter` say.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proto::export_name::PROBE_SLOT;
use proto::nbd::transmission::{Command, Request};
use server::catalog::VolumeLimits;
use server::data::io::throttle;
use server::ids::RequestSlot;
use server::volume::rate_limit::Direction;

use super::{Connection, Phase, Server};
use crate::simulator::Mutant;
use crate::simulator::storage::Surroundings;

/// Over so long, limits are looked at, and a second more for what was saved up.
const WINDOW: Duration = Duration::from_secs(10);
const WINDOW_AND_BURST_S: u64 = 11;
/// So many connections may have had a place in line since before the window; each has one.
const PLACES_MAX: u64 = 12;
/// The longest payload of a request here.
const PAYLOAD_BYTES_MAX: u64 = 12 << 10;

/// What has begun lately.
pub(super) struct Begun {
    limits: VolumeLimits,
    lately: VecDeque<(Instant, Direction, u32)>,
    /// A limit did not hold.
    pub(super) fault: Option<String>,
}

impl Begun {
    pub(super) fn new(limits: VolumeLimits) -> Self {
        Self { limits, lately: VecDeque::new(), fault: None }
    }

    /// A request begins.
    fn note(&mut self, request: &Request, now: Instant) {
        if self.limits == VolumeLimits::default() {
            return;
        }
        let Some((direction, bytes)) = throttle::cost(request) else { return };
        self.lately.push_back((now, direction, bytes));
        while self.lately.front().is_some_and(|(at, ..)| now.duration_since(*at) > WINDOW) {
            self.lately.pop_front();
        }
        let limits = &self.limits;
        let (requests_limit, bytes_limit) = match direction {
            Direction::Read => (limits.read_iops, limits.read_bytes_per_second),
            Direction::Write => (limits.write_iops, limits.write_bytes_per_second),
        };
        let of_it = self.lately.iter().filter(|(_, other, _)| *other == direction);
        let (requests, bytes) = of_it.fold((0, 0), |(requests, bytes), (.., length_bytes)| {
            (requests + 1, bytes + u64::from(*length_bytes))
        });
        let is_over = |limit: u64, is: u64, of_a_place: u64| {
            limit > 0 && is > limit * WINDOW_AND_BURST_S + PLACES_MAX * of_a_place
        };
        if is_over(requests_limit, requests, 1) || is_over(bytes_limit, bytes, PAYLOAD_BYTES_MAX) {
            let words = format!("{requests} requests of {bytes} bytes begin within {WINDOW:?}: {limits:?}");
            self.fault = Some(words);
        }
    }
}

impl Connection {
    fn is_probe(&self) -> bool {
        self.slot.is_some_and(|(_, slot)| slot == PROBE_SLOT)
    }
}

impl Server {
    /// A request came: it goes on, or waits for its turn.
    pub(super) fn take_in(&mut self, id: u32, slot: RequestSlot, world: &mut Surroundings<'_>) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        let request = connection.session.request(slot);
        let is_limited = connection.volume.as_ref().is_some_and(|volume| volume.controls().is_limited());
        if is_limited && !connection.is_probe() && throttle::cost(request).is_some() {
            connection.throttle.add(slot, request.command);
            self.take_turns(id, world);
        } else {
            self.prepare(id, slot, world);
        }
    }

    /// Its turn has come: a WRITE's payload is taken, all else begins.
    fn prepare(&mut self, id: u32, slot: RequestSlot, world: &mut Surroundings<'_>) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        let is_missing = connection.session.missing_payload().is_some_and(|(missing, _)| missing == slot);
        let is_probe = connection.is_probe();
        let request = *connection.session.request(slot);
        if !is_probe {
            self.begun.note(&request, world.now);
        }
        let connection = self.connections.get_mut(&id).expect("it exists");
        match is_missing {
            true => connection.buffers[usize::from(slot.0)].clear(),
            false => self.begin(id, slot, world),
        }
    }

    /// A WRITE's payload is here. True: it came before its turn, for which it waits.
    pub(super) fn waits_with_payload(
        &mut self,
        id: u32,
        slot: RequestSlot,
        world: &mut Surroundings<'_>,
    ) -> bool {
        let connection = self.connections.get_mut(&id).expect("it exists");
        let waits = connection.throttle.has_arrived(slot);
        if waits {
            self.take_turns(id, world);
        }
        waits
    }

    /// Begins the requests whose turn it is; true: there were some.
    pub(super) fn take_turns(&mut self, id: u32, world: &mut Surroundings<'_>) -> bool {
        let mut has_begun = false;
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return has_begun };
            connection.asks_at = None;
            if connection.phase == Phase::Closing || connection.waits_for_mark.is_some() {
                return has_begun;
            }
            let (Some(slot), Some(volume)) = (connection.throttle.first_slot(), &connection.volume) else {
                return has_begun;
            };
            let request = *connection.session.request(slot);
            let is_here = request.command == Command::Write && !connection.throttle.holds(slot);
            if !connection.throttle.take_turn(slot, volume.controls(), &request, world.now) {
                connection.asks_at = connection.throttle.take_timer();
                world.coverage.count("a request waits for its turn");
                let looks_ahead = self.mutant != Some(Mutant::LookAheadLeft);
                if let Some(slot) = connection.throttle.wants_payload(world.now).filter(|_| looks_ahead) {
                    world.coverage.count("a payload is taken before its turn");
                    connection.throttle.takes_payload();
                    connection.buffers[usize::from(slot.0)].clear();
                    has_begun = true;
                }
                return has_begun;
            }
            let pipe = &world.links[connection.link].to_server;
            if request.command != Command::Read && pipe.is_cut_off() {
                world.coverage.count("a request whose turn comes when its client is gone");
                self.close(id, world);
                return true;
            }
            has_begun = true;
            if is_here {
                self.begun.note(&request, world.now);
                self.begin(id, slot, world);
            } else {
                self.prepare(id, slot, world);
            }
        }
    }

    /// Whether there is something to be asked for again, now.
    pub(super) fn is_turn_due(&self, id: u32, now: Instant) -> bool {
        self.connections[&id].asks_at.is_some_and(|at| now >= at)
    }

    /// The connection closes, and needs no turn.
    pub(super) fn forget_turn(&mut self, id: u32) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.asks_at = None;
        if let Some(volume) = &connection.volume {
            connection.throttle.forget(volume.controls());
        }
    }

    /// A WRITE whose payload did not come whole is gone.
    pub(super) fn waits_no_more(&mut self, id: u32, slot: RequestSlot) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        if let Some(volume) = &connection.volume {
            connection.throttle.dropped(slot, volume.controls());
        }
    }
}
