//! The simulated network: connections as two pipes of bytes, of which a part has arrived and the rest is on its way.
//!
//! Owns the bytes between a client and a server. Never decides what happens to them: `world.rs` and `foreign.rs` let bytes arrive, cut
//! connections and let them stand still, until TCP gives them up. What a side sent before it closed may arrive long after, as on a real network.

use std::time::{Duration, Instant};

use fastrand::Rng;

/// As the product sets it: after so long without an acknowledgement TCP tells its user.
pub(super) const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);

/// How a direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Its sender closed: all bytes come first.
    Fin,
    /// What is not read yet may be lost.
    Reset,
}

/// One direction of a connection.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    bytes: Vec<u8>,
    /// Read up to here.
    read: usize,
    /// Arrived up to here.
    arrived: usize,
    end: Option<End>,
    /// Nobody reads it any more.
    pub(super) is_unread: bool,
}

impl Pipe {
    /// How many bytes it takes, where it holds `room_bytes` at most.
    pub(super) fn room(&self, room_bytes: usize) -> usize {
        room_bytes.saturating_sub(self.bytes.len() - self.read)
    }

    /// Whether it takes bytes at all.
    pub(super) fn is_open(&self) -> bool {
        self.end.is_none() && !self.is_unread
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        if self.is_open() {
            self.bytes.extend_from_slice(bytes);
        }
    }

    pub(super) fn on_the_way(&self) -> usize {
        self.bytes.len() - self.arrived
    }

    pub(super) fn arrive(&mut self, bytes: usize) {
        self.arrived += bytes.min(self.on_the_way());
    }

    pub(super) fn readable(&self) -> &[u8] {
        &self.bytes[self.read..self.arrived]
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.read += bytes;
        debug_assert!(self.read <= self.arrived);
        if self.read > 64 << 10 {
            self.bytes.drain(..self.read);
            (self.arrived, self.read) = (self.arrived - self.read, 0);
        }
    }

    /// The sender ends it; nothing is sent after.
    pub(super) fn close(&mut self, end: End) {
        if self.end.is_none() {
            self.end = Some(end);
        }
    }

    /// The network ends it: what is on its way is lost, and maybe what has arrived, too.
    pub(super) fn cut(&mut self, loses_arrived: bool) {
        let kept = if loses_arrived { self.read } else { self.arrived };
        self.bytes.truncate(kept);
        self.arrived = kept;
        self.end = Some(End::Reset);
    }

    /// Whether nothing comes behind what can be read.
    pub(super) fn is_cut_off(&self) -> bool {
        self.end.is_some() && self.on_the_way() == 0
    }

    /// The end, once everything before it was read.
    pub(super) fn end(&self) -> Option<End> {
        self.end.filter(|_| self.read == self.bytes.len())
    }
}

/// A connection's number; they are never used again.
pub(super) type LinkId = usize;

/// One connection.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) to_server: Pipe,
    pub(super) to_client: Pipe,
    /// From when on nothing arrives, in neither direction; nobody is told before TCP gives it up.
    pub(super) stalled_at: Option<Instant>,
    /// So many times it is passed by before bytes arrive.
    pub(super) delay: u32,
}

impl Link {
    /// Whether bytes can arrive on it.
    pub(super) fn has_traffic(&self) -> bool {
        self.stalled_at.is_none() && self.to_server.on_the_way() + self.to_client.on_the_way() > 0
    }
}

/// Some of what is on its way arrives; false: nothing can.
pub(super) fn traffic(links: &mut [Link], rng: &mut Rng) -> bool {
    let from = rng.usize(..=links.len());
    // The newest ones first: the older ones are mostly silent.
    let candidates = (0..links.len()).rev().cycle().skip(from).take(links.len().min(32));
    let mut has_done = false;
    for index in candidates {
        let link = &mut links[index];
        if !link.has_traffic() {
            continue;
        }
        if link.delay > 0 {
            link.delay -= 1;
            continue;
        }
        for pipe in [&mut link.to_server, &mut link.to_client] {
            let on_the_way = pipe.on_the_way();
            if on_the_way > 0 {
                let bytes = if rng.u8(..4) > 0 { on_the_way } else { rng.usize(1..=on_the_way) };
                pipe.arrive(bytes);
                has_done = true;
            }
        }
        if rng.bool() {
            break;
        }
    }
    has_done
}

/// TCP gives up those that have stood still for long.
pub(super) fn give_up_stalled(stalled: &mut Vec<LinkId>, links: &mut [Link], now: Instant, rng: &mut Rng) {
    stalled.retain(|id| {
        let link = &mut links[*id];
        let is_over = link.stalled_at.is_none_or(|since| now.duration_since(since) >= TCP_USER_TIMEOUT);
        if is_over {
            link.to_client.cut(rng.bool());
            link.to_server.cut(rng.bool());
        }
        !is_over
    });
}
