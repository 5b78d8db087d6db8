//! What a request waits for before anything of it is begun: that its volume is marked as written, and its turn under the limits.
//!
//! See `throttle.rs` and `volume/controls.rs`. A volume without limits whose content is known to be written costs a load and a branch.

use std::time::Instant;

use proto::nbd::transmission::Command;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::warn;

use super::{HELD_BYTES_MAX, Held, Phase, SessionIo};
use crate::data::io::ring::Ring;
use crate::data::io::throttle;
use crate::ids::RequestSlot;

impl SessionIo {
    /// Whether nothing more is to be taken from the stream, because of a request.
    pub(super) fn holds_stream(&self) -> bool {
        self.held != Held::No || self.throttle.holds_stream()
    }

    /// A request came: prepares it, or has it wait.
    pub(super) fn take_in(&mut self, ring: &mut Ring, slot: RequestSlot) {
        if self.wire.volume().is_none_or(|volume| volume.controls().is_free()) {
            self.prepare(ring, slot);
        } else {
            self.take_in_heeding(ring, slot);
        }
    }

    #[cold]
    fn take_in_heeding(&mut self, ring: &mut Ring, slot: RequestSlot) {
        let Some(volume) = self.wire.volume() else { return };
        let (controls, request) = (volume.controls(), self.session.request(slot));
        let is_first_of_volume = matches!(request.command, Command::Write | Command::WriteZeroes)
            && controls.wants_mark(self.attachment_id);
        if is_first_of_volume {
            self.held = Held::ByMark(slot);
            self.asks_for_mark = true;
        } else if !self.is_probe && controls.is_limited() && throttle::cost(request).is_some() {
            self.throttle.add(slot, request.command);
            self.take_turns(ring);
        } else {
            self.prepare(ring, slot);
        }
    }

    /// The volume is marked as written, or cannot be: the request that waited for it goes on, or the connection ends, since nobody
    /// may be told what became of it.
    pub fn marked(&mut self, ring: &mut Ring, is_marked: bool) {
        let Held::ByMark(slot) = self.held else { return };
        if self.phase == Phase::Closing {
            return;
        }
        if !is_marked {
            warn!(connection = self.id.0, "closed: the first write to its volume cannot be recorded");
            return self.close(ring);
        }
        self.held = Held::No;
        self.take_in(ring, slot);
    }

    /// Begins the requests whose turn it is.
    pub(super) fn take_turns(&mut self, ring: &mut Ring) {
        while self.phase != Phase::Closing
            && let Some(slot) = self.next_in_line()
            && let Some(volume) = self.wire.volume()
        {
            let (request, now) = (self.session.request(slot), Instant::now());
            let is_here = request.command == Command::Write && !self.throttle.holds(slot);
            let is_held = self.held != Held::No;
            if !self.throttle.take_turn(slot, volume.controls(), request, now) {
                if !is_held {
                    self.look_ahead(ring, now);
                }
                return;
            }
            // While the stream is held, nothing is received that would tell. What the client has sent anew since is not to be undone.
            if request.command != Command::Read && self.is_peer_gone() {
                return self.close(ring);
            }
            if is_here {
                self.begin(ring, slot);
            } else {
                self.prepare(ring, slot);
            }
        }
    }

    /// Who is to begin next. While a request waits for a buffer, a WRITE that is here goes before all others: what it has may be what is
    /// waited for.
    fn next_in_line(&self) -> Option<RequestSlot> {
        if self.held == Held::No {
            return self.throttle.first_slot();
        }
        // Of the WRITEs, only those are in the queue that are here.
        self.throttle.first_slot_like(|slot| self.session.request(slot).command == Command::Write)
    }

    /// Whether the other end has closed, or its machine has said that it knows nothing of the connection.
    fn is_peer_gone(&self) -> bool {
        let mut sockets = [PollFd::from_borrowed_fd(self.wire.socket(), PollFlags::RDHUP)];
        // What cannot be asked is found out by the next operation.
        let asked = poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        asked.is_ok_and(|ready| ready > 0)
    }

    /// Takes the payload of a WRITE that would keep what is behind it waiting for long, if that holds up nobody.
    fn look_ahead(&mut self, ring: &mut Ring, now: Instant) {
        let Some(slot) = self.throttle.wants_payload(now) else { return };
        let length_bytes = self.session.payload_bytes(slot) as usize;
        // What goes straight into memory is written by being received.
        let is_in_place = self.wire.volume().is_some_and(|volume| volume.memory().is_some());
        let is_too_much = self.held_bytes + length_bytes > HELD_BYTES_MAX;
        if is_in_place || is_too_much || !ring.pool().has_plenty(length_bytes, &self.held_buffers) {
            return;
        }
        match ring.pool().take(length_bytes, self.wire.index()) {
            Some(buffer) => {
                self.throttle.takes_payload();
                self.give_buffer(ring, slot, buffer);
            }
            // It is not to wait in line for what it can do without.
            None => ring.pool().forget_waiter(self.wire.index()),
        }
    }

    /// A WRITE whose payload did not come whole is gone.
    pub(super) fn waits_no_more(&mut self, slot: RequestSlot) {
        if let Some(volume) = self.wire.volume() {
            self.throttle.dropped(slot, volume.controls());
        }
    }

    /// The connection closes, and needs no turn.
    pub(super) fn forget_turn(&mut self) {
        if let Some(volume) = self.wire.volume() {
            self.throttle.forget(volume.controls());
        }
    }

    /// Whether a request waits for its turn: it is to be advanced when limits change.
    #[inline]
    pub fn is_throttled(&self) -> bool {
        !self.throttle.is_empty()
    }

    /// When it is to be advanced without news, given once.
    #[inline]
    pub fn take_timer(&mut self) -> Option<Instant> {
        self.throttle.take_timer().filter(|_| self.phase != Phase::Closing)
    }
}
