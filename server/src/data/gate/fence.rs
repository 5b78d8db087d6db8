//! Who may be served on an attachment: epochs, slots and generations, as a pure state machine.
//!
//! Owns: for one attachment, which connections are served, which wait, and what they wait for. Never: does I/O, reads a
//! clock, or knows a socket; `fencing.rs` feeds it events and carries out its [`Output`]s.
//!
//! ```text
//!              go                   blockers drained,
//!   (new) ───────────► waiting ───── epoch persisted ─────► served ──close──► closing ──drained──► (gone)
//!     │                  │                                     │                                     ▲
//!     └──► refused ◄─────┘ (higher epoch, same slot, fence)    └───────────── drained ───────────────┘
//! ```
//! Invariants, so that no write lands twice or late:
//! - at most one connection is served in a slot;
//! - once a GO of an epoch was seen, no connection of a lower epoch is granted any more;
//! - a connection is granted only when every connection of a lower epoch, and the older one of its slot, has drained,
//!   and when its epoch is in the catalog;
//! - after [`Fence::fence_all`] nothing is granted that does not come with a higher generation.

use std::collections::BTreeMap;

use proto::nbd::handshake::server::Refusal;

use crate::ids::ConnectionId;

/// Why a GO is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A higher epoch has been seen.
    #[error("a newer session of this attachment has begun")]
    StaleEpoch,
    /// Another connection asked for the same slot later.
    #[error("another connection has taken this slot")]
    Superseded,
    /// The attachment is being ended or was given to another node.
    #[error("the attachment has been fenced")]
    Fenced,
    /// The catalog could not take the epoch.
    #[error("the server cannot record the session now")]
    NotPersisted,
}

impl Reason {
    /// What the client is told. Of a session that is over there is no export any more, and a client that is told so need
    /// not come again; the others may.
    pub fn refusal(self) -> Refusal {
        match self {
            Self::StaleEpoch | Self::Fenced => Refusal::unknown(self.to_string()),
            Self::Superseded | Self::NotPersisted => Refusal::shutdown(self.to_string()),
        }
    }
}

/// What the owner has to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Close the connection; call [`Fence::drained`] when its submitted I/O has finished.
    Close(ConnectionId),
    /// Make the epoch durable, then call [`Fence::persisted`] or [`Fence::persist_failed`].
    Persist(u64),
    /// The connection may be served.
    Grant(ConnectionId),
    /// The connection may not be served. It is forgotten here.
    Refuse(ConnectionId, Reason),
}

#[derive(Debug, Clone, Copy)]
struct Served {
    epoch: u64,
    slot: u32,
    is_closing: bool,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    connection: ConnectionId,
    epoch: u64,
    slot: u32,
}

/// What a GO says, with what the catalog says of its attachment.
#[derive(Debug, Clone, Copy)]
pub struct Go {
    /// Who asks.
    pub connection: ConnectionId,
    /// Its session epoch.
    pub epoch: u64,
    /// Its slot in the session.
    pub slot: u32,
    /// The attachment's generation in the catalog.
    pub generation: u64,
    /// The attachment's session epoch in the catalog.
    pub epoch_in_catalog: u64,
}

/// The state of one attachment.
#[derive(Debug, Default)]
pub struct Fence {
    /// The highest epoch that a GO has brought.
    epoch: u64,
    epoch_persisted: u64,
    epoch_being_persisted: Option<u64>,
    generation: u64,
    fenced_generation: Option<u64>,
    served: BTreeMap<ConnectionId, Served>,
    waiting: Vec<Waiting>,
}

impl Fence {
    /// A connection asks to be served.
    pub fn go(&mut self, go: Go, outputs: &mut Vec<Output>) {
        if self.fenced_generation.is_some_and(|fenced| go.generation <= fenced) {
            outputs.push(Output::Refuse(go.connection, Reason::Fenced));
            return;
        }
        self.fenced_generation = None;
        self.generation = self.generation.max(go.generation);
        self.epoch_persisted = self.epoch_persisted.max(go.epoch_in_catalog);
        self.epoch = self.epoch.max(self.epoch_persisted);
        if go.epoch < self.epoch {
            outputs.push(Output::Refuse(go.connection, Reason::StaleEpoch));
            return;
        }
        self.epoch = go.epoch;
        self.refuse_waiting(outputs, |other| {
            if other.epoch < go.epoch {
                Some(Reason::StaleEpoch)
            } else {
                (other.slot == go.slot).then_some(Reason::Superseded)
            }
        });
        for (connection, other) in &mut self.served {
            if !other.is_closing && (other.epoch < go.epoch || other.slot == go.slot) {
                other.is_closing = true;
                outputs.push(Output::Close(*connection));
            }
        }
        self.waiting.push(Waiting { connection: go.connection, epoch: go.epoch, slot: go.slot });
        self.settle(outputs);
    }

    /// A connection is gone and all its submitted I/O has finished. Unknown ones are ignored.
    pub fn drained(&mut self, connection: ConnectionId, outputs: &mut Vec<Output>) {
        self.served.remove(&connection);
        self.waiting.retain(|other| other.connection != connection);
        self.settle(outputs);
    }

    /// The epoch is durable.
    pub fn persisted(&mut self, epoch: u64, outputs: &mut Vec<Output>) {
        self.epoch_being_persisted = None;
        self.epoch_persisted = self.epoch_persisted.max(epoch);
        self.settle(outputs);
    }

    /// The epoch could not be made durable: who waits for it is refused and may try again.
    pub fn persist_failed(&mut self, epoch: u64, outputs: &mut Vec<Output>) {
        self.epoch_being_persisted = None;
        self.refuse_waiting(outputs, |other| (other.epoch <= epoch).then_some(Reason::NotPersisted));
        self.settle(outputs);
    }

    /// Closes every connection, and refuses all that come with no higher generation than `generation`, the one in the
    /// catalog now (`None`: the catalog has the attachment no more), or than any seen before.
    pub fn fence_all(&mut self, generation: Option<u64>, outputs: &mut Vec<Output>) {
        self.fenced_generation = Some(self.generation.max(generation.unwrap_or(0)));
        self.refuse_waiting(outputs, |_| Some(Reason::Fenced));
        for (connection, other) in &mut self.served {
            if !std::mem::replace(&mut other.is_closing, true) {
                outputs.push(Output::Close(*connection));
            }
        }
    }

    /// Whether a GO would be served in the place of a connection that is still there.
    pub fn would_replace(&self, epoch: u64, slot: u32) -> bool {
        self.served.values().any(|other| other.epoch < epoch || (other.epoch == epoch && other.slot == slot))
    }

    /// Whether no connection is served or closing.
    pub fn is_drained(&self) -> bool {
        self.served.is_empty()
    }

    /// Whether nothing would be lost with this state: it can be made anew from the catalog.
    pub fn is_forgettable(&self) -> bool {
        self.served.is_empty() && self.waiting.is_empty() && self.fenced_generation.is_none()
    }

    /// How many connections are served.
    pub fn connections(&self) -> u32 {
        self.served.values().filter(|served| !served.is_closing).count() as u32
    }

    /// Whether the connection is served and not being closed.
    #[cfg(test)]
    fn is_served(&self, connection: ConnectionId) -> bool {
        self.served.get(&connection).is_some_and(|served| !served.is_closing)
    }

    fn refuse_waiting(&mut self, outputs: &mut Vec<Output>, reason: impl Fn(&Waiting) -> Option<Reason>) {
        self.waiting.retain(|other| match reason(other) {
            Some(reason) => {
                outputs.push(Output::Refuse(other.connection, reason));
                false
            }
            None => true,
        });
    }

    /// Grants what nothing stands in the way of any more.
    fn settle(&mut self, outputs: &mut Vec<Output>) {
        let mut index = 0;
        while let Some(candidate) = self.waiting.get(index).copied() {
            let is_blocked = self
                .served
                .values()
                .any(|other| other.epoch < candidate.epoch || other.slot == candidate.slot);
            if is_blocked {
                index += 1;
            } else if self.epoch_persisted < candidate.epoch {
                if self.epoch_being_persisted.is_none() {
                    self.epoch_being_persisted = Some(candidate.epoch);
                    outputs.push(Output::Persist(candidate.epoch));
                }
                index += 1;
            } else {
                self.waiting.remove(index);
                let served = Served { epoch: candidate.epoch, slot: candidate.slot, is_closing: false };
                self.served.insert(candidate.connection, served);
                outputs.push(Output::Grant(candidate.connection));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Drives a fence; persists at once.
    #[derive(Default)]
    struct Driver {
        fence: Fence,
        catalog_epoch: u64,
        generation: u64,
    }

    impl Driver {
        fn run(&mut self, event: impl FnOnce(&mut Fence, &mut Vec<Output>)) -> Vec<Output> {
            let mut outputs = Vec::new();
            event(&mut self.fence, &mut outputs);
            let mut index = 0;
            while index < outputs.len() {
                if let Output::Persist(epoch) = outputs[index] {
                    self.catalog_epoch = self.catalog_epoch.max(epoch);
                    self.fence.persisted(epoch, &mut outputs);
                }
                index += 1;
            }
            outputs.retain(|output| !matches!(output, Output::Persist(_)));
            outputs
        }

        fn go(&mut self, connection: u64, epoch: u64, slot: u32) -> Vec<Output> {
            let connection = ConnectionId(connection);
            let (generation, epoch_in_catalog) = (self.generation, self.catalog_epoch);
            let go = Go { connection, epoch, slot, generation, epoch_in_catalog };
            self.run(|fence, outputs| fence.go(go, outputs))
        }

        fn drained(&mut self, connection: u64) -> Vec<Output> {
            self.run(|fence, outputs| fence.drained(ConnectionId(connection), outputs))
        }

        fn fence_all(&mut self) -> Vec<Output> {
            let generation = self.generation;
            self.run(|fence, outputs| fence.fence_all(Some(generation), outputs))
        }
    }

    fn close(connection: u64) -> Output {
        Output::Close(ConnectionId(connection))
    }

    fn grant(connection: u64) -> Output {
        Output::Grant(ConnectionId(connection))
    }

    fn refuse(connection: u64, reason: Reason) -> Output {
        Output::Refuse(ConnectionId(connection), reason)
    }

    #[test]
    fn slots_of_one_epoch_are_served_together() {
        let mut driver = Driver::default();
        assert_eq!(driver.go(1, 1, 0), [grant(1)]);
        assert_eq!(driver.go(2, 1, 1), [grant(2)]);
        assert_eq!(driver.fence.connections(), 2);
        assert_eq!(driver.catalog_epoch, 1);
    }

    #[test]
    fn a_higher_epoch_waits_for_every_lower_connection() {
        let mut driver = Driver::default();
        driver.go(1, 1, 0);
        driver.go(2, 1, 1);
        assert_eq!(driver.go(3, 2, 7), [close(1), close(2)]);
        assert_eq!(driver.catalog_epoch, 1, "not persisted before the lower ones have drained");
        assert_eq!(driver.drained(2), []);
        assert_eq!(driver.go(4, 2, 1), [], "the second connection of the new epoch waits as well");
        assert_eq!(driver.drained(1), [grant(3), grant(4)]);
        assert_eq!(driver.catalog_epoch, 2);
    }

    #[test]
    fn a_lower_epoch_is_refused_from_the_first_go_of_a_higher_one() {
        let mut driver = Driver::default();
        driver.go(1, 1, 0);
        driver.go(2, 2, 0);
        assert_eq!(driver.go(3, 1, 1), [refuse(3, Reason::StaleEpoch)]);
        assert_eq!(driver.go(4, 3, 0), [refuse(2, Reason::StaleEpoch)], "even one that was waiting");
        assert_eq!(driver.drained(1), [grant(4)]);
    }

    #[test]
    fn who_takes_a_slot_over_replaces_its_connection() {
        let mut driver = Driver::default();
        driver.go(1, 2, 0);
        assert!(driver.fence.would_replace(2, 0) && driver.fence.would_replace(3, 7));
        assert!(!driver.fence.would_replace(2, 1) && !driver.fence.would_replace(1, 0));
        driver.go(2, 2, 0);
        assert!(driver.fence.would_replace(2, 0), "also while it is closing");
        driver.drained(1);
        driver.drained(2);
        assert!(!driver.fence.would_replace(2, 0));
    }

    #[test]
    fn the_epoch_in_the_catalog_counts_after_a_restart() {
        let mut driver = Driver { catalog_epoch: 5, ..Default::default() };
        assert_eq!(driver.go(1, 4, 0), [refuse(1, Reason::StaleEpoch)]);
        assert_eq!(driver.go(2, 5, 0), [grant(2)]);
    }

    #[test]
    fn a_slot_is_taken_over_after_its_older_connection_has_drained() {
        let mut driver = Driver::default();
        driver.go(1, 1, 0);
        driver.go(2, 1, 1);
        assert_eq!(driver.go(3, 1, 0), [close(1)]);
        assert_eq!(driver.go(4, 1, 0), [refuse(3, Reason::Superseded)], "the latest wins");
        assert_eq!(driver.drained(1), [grant(4)]);
        assert!(driver.fence.is_served(ConnectionId(2)), "other slots are left alone");
    }

    #[test]
    fn an_epoch_that_cannot_be_persisted_is_not_granted() {
        let mut fence = Fence::default();
        let mut outputs = Vec::new();
        let go = Go { connection: ConnectionId(1), epoch: 1, slot: 0, generation: 0, epoch_in_catalog: 0 };
        fence.go(go, &mut outputs);
        assert_eq!(outputs, [Output::Persist(1)]);
        outputs.clear();
        fence.persist_failed(1, &mut outputs);
        assert_eq!(outputs, [refuse(1, Reason::NotPersisted)]);
        outputs.clear();
        fence.go(Go { connection: ConnectionId(2), ..go }, &mut outputs);
        assert_eq!(outputs, [Output::Persist(1)], "the next one tries again");
    }

    #[test]
    fn fencing_closes_all_and_lets_only_a_higher_generation_in() {
        let mut driver = Driver { generation: 1, ..Default::default() };
        driver.go(1, 1, 0);
        driver.go(2, 1, 0);
        assert_eq!(driver.fence_all(), [refuse(2, Reason::Fenced)], "1 is being closed already");
        assert!(!driver.fence.is_drained());
        assert_eq!(driver.go(3, 9, 0), [refuse(3, Reason::Fenced)]);
        driver.drained(1);
        assert!(driver.fence.is_drained());
        assert!(!driver.fence.is_forgettable(), "what was fenced has to be remembered");
        driver.generation = 2;
        assert_eq!(driver.go(4, 2, 0), [grant(4)]);
    }

    #[test]
    fn fencing_before_any_go_holds_for_the_generation_in_the_catalog() {
        let mut driver = Driver { generation: 3, ..Default::default() };
        driver.run(|fence, outputs| fence.fence_all(Some(3), outputs));
        assert_eq!(driver.go(1, 1, 0), [refuse(1, Reason::Fenced)]);
    }

    /// What an observer of the outputs may never see, whatever the events.
    #[derive(Default)]
    struct Observer {
        served: BTreeMap<u64, (u64, u32)>,
        asked: BTreeMap<u64, (u64, u32)>,
        closing: BTreeSet<u64>,
        highest_epoch_granted: u64,
        highest_epoch_asked: u64,
        is_fenced: bool,
    }

    impl Observer {
        fn see(&mut self, outputs: &[Output]) {
            for output in outputs {
                match *output {
                    Output::Close(ConnectionId(connection)) => {
                        assert!(self.served.contains_key(&connection), "only what is served is closed");
                        assert!(self.closing.insert(connection), "and only once");
                    }
                    Output::Grant(ConnectionId(connection)) => self.grant(connection),
                    Output::Refuse(ConnectionId(connection), _) => {
                        assert!(self.asked.remove(&connection).is_some());
                    }
                    Output::Persist(_) => {}
                }
            }
        }

        fn grant(&mut self, connection: u64) {
            let (epoch, slot) = self.asked.remove(&connection).expect("only who asked is granted");
            assert!(!self.is_fenced);
            assert_eq!(epoch, self.highest_epoch_asked, "never a lower epoch than any that asked");
            assert!(epoch >= self.highest_epoch_granted);
            assert!(self.served.values().all(|other| *other != (epoch, slot)), "one for each slot");
            assert!(self.served.values().all(|(other, _)| *other == epoch), "one epoch at a time");
            self.highest_epoch_granted = epoch;
            self.served.insert(connection, (epoch, slot));
        }
    }

    #[test]
    fn no_order_of_events_breaks_the_invariants() {
        for seed in 1..=400u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut below = |limit: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % limit
            };
            let (mut driver, mut observer) =
                (Driver { generation: 1, ..Default::default() }, Observer::default());
            println!("seed {seed}");
            for connection in 0..200u64 {
                let outputs = match below(20) {
                    0 => {
                        let outputs = driver.fence_all();
                        observer.is_fenced = true;
                        outputs
                    }
                    1..=9 => {
                        if observer.is_fenced && below(2) == 0 {
                            driver.generation += 1;
                            observer.is_fenced = false;
                        }
                        let epoch = observer.highest_epoch_asked.saturating_sub(1) + below(3);
                        let slot = below(3) as u32;
                        observer.asked.insert(connection, (epoch, slot));
                        if !observer.is_fenced {
                            observer.highest_epoch_asked = observer.highest_epoch_asked.max(epoch);
                        }
                        driver.go(connection, epoch, slot)
                    }
                    _ => {
                        // Mostly a connection that was told to close, sometimes one that left by itself or while waiting.
                        let known: Vec<u64> = match below(4) {
                            0 => observer.asked.keys().chain(observer.served.keys()).copied().collect(),
                            _ => observer.closing.iter().copied().collect(),
                        };
                        let Some(gone) = known.get(below(known.len().max(1) as u64) as usize) else {
                            continue;
                        };
                        observer.served.remove(gone);
                        observer.closing.remove(gone);
                        observer.asked.remove(gone);
                        driver.drained(*gone)
                    }
                };
                observer.see(&outputs);
            }
            // Whoever still waits gets an answer once everything that is closing has drained.
            while let Some(gone) = observer.closing.pop_first() {
                observer.served.remove(&gone);
                let outputs = driver.drained(gone);
                observer.see(&outputs);
            }
            assert!(observer.asked.is_empty(), "seed {seed}: {:?} wait for nothing", observer.asked);
        }
    }
}
