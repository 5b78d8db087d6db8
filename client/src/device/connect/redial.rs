//! Opening a queue's connections again, as a pure state machine: which slot is dialled next, after which pause, and whether what
//! answered is the disk that was there.
//!
//! Sees no socket, no clock and no chance of its own: `redial_thread.rs` dials, rests and throws the dice, and so does the simulator.
//! Whether the server forgot anything is looked at by `reconnect.rs`.

use std::time::Duration;

use super::dial::Dialled;
use super::export_fit::fits;
use super::slots::{self, SlotError};
use crate::causes::with_sources;
use crate::contract::{DeviceSpec, Encryption, SessionRecord};

/// Between the first attempts. The pause grows by half each time and is cut by chance, so that many clients of a server that comes back
/// do not come at once.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest.
pub const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Next {
    /// Nothing, for so long.
    Rest(Duration),
    /// Dial this slot, at each address, and tell [`Redial::dialled`].
    Dial(u32),
}

/// What an attempt came to.
#[derive(Debug)]
pub enum Attempt<S> {
    /// The queue's connections, in the order of its slots.
    Opened {
        /// The sockets.
        sockets: Vec<S>,
        /// The server's storage incarnation; empty for a foreign server.
        incarnation: String,
        /// The address that answered.
        address: String,
        /// Size of the export in bytes: what it was, or more.
        export_bytes: u64,
    },
    /// Not this time; the next attempt follows.
    Failed(String),
    /// The server knows the attachment no more. No further attempt follows.
    Refused(String),
}

/// The disk that an export has to be.
#[derive(Debug, Clone, Copy)]
pub struct DiskFit<'a> {
    /// As it was asked for.
    pub spec: &'a DeviceSpec,
    /// As its session was first.
    pub session: &'a SessionRecord,
    /// How large the export was last, in bytes.
    pub export_bytes: u64,
    /// Connections of the whole attachment.
    pub nr_connections: u16,
}

impl DiskFit<'_> {
    /// A disk cannot change under its users, but grow.
    fn check<S>(&self, dialled: &Dialled<S>, encryption: Encryption) -> Result<(), String> {
        fits(self.session, self.export_bytes, self.nr_connections, &dialled.export)?;
        if encryption != self.session.encryption {
            return Err("the connection is not encrypted as the former one was".to_owned());
        }
        Ok(())
    }
}

/// One queue's way back to its connections.
#[derive(Debug)]
pub struct Redial<S> {
    slots: Vec<u32>,
    /// What the slots before the next were opened as, in this attempt.
    opened: Vec<Dialled<S>>,
    pause: Duration,
    /// The next attempt has to wait.
    rests: bool,
    /// An attempt has failed: each pause after it is longer.
    has_failed: bool,
}

impl<S> Redial<S> {
    /// For these slots; after a pause, if the server has been reached so many times in vain.
    pub fn new(slots: Vec<u32>, times_in_vain: u32) -> Self {
        let pause = (0..times_in_vain).fold(PAUSE_MIN, |pause, _| grown(pause));
        Self { slots, opened: Vec::new(), pause, rests: times_in_vain > 0, has_failed: false }
    }

    /// What is to be done next; `chance` is in `0.0..1.0`.
    pub fn next(&mut self, chance: f64) -> Next {
        if std::mem::take(&mut self.rests) {
            let pause = self.pause;
            if self.has_failed {
                self.pause = grown(pause);
            }
            return Next::Rest(pause.mul_f64(chance.mul_add(0.5, 0.5)));
        }
        Next::Dial(self.slots[self.opened.len()])
    }

    /// What dialling that slot came to. What the attempt came to, if it is over; the sockets of one that failed are dropped.
    pub fn dialled(
        &mut self,
        outcome: Result<Dialled<S>, SlotError>,
        fit: &DiskFit<'_>,
        encryption_of: impl Fn(&S) -> Encryption,
    ) -> Option<Attempt<S>> {
        let dialled = match outcome {
            Ok(dialled) => dialled,
            Err(error @ SlotError::Ended { .. }) => return Some(Attempt::Refused(with_sources(&error))),
            Err(error) => return Some(self.failed(with_sources(&error))),
        };
        if let Err(reason) = fit.check(&dialled, encryption_of(&dialled.socket)) {
            return Some(self.failed(format!("the server at {}: {reason}", dialled.address)));
        }
        let incarnation = slots::incarnation(fit.spec, &dialled);
        if self.opened.first().is_some_and(|first| slots::incarnation(fit.spec, first) != incarnation) {
            return Some(self.failed("the server's storage is changing".to_owned()));
        }
        let address = dialled.address.clone();
        self.opened.push(dialled);
        if self.opened.len() < self.slots.len() {
            return None;
        }
        // The smallest that any of them tells: what all of them can do.
        let export_bytes =
            self.opened.iter().map(|opened| opened.export.size_bytes).min().unwrap_or_default();
        let sockets = self.opened.drain(..).map(|opened| opened.socket).collect();
        Some(Attempt::Opened { sockets, incarnation, address, export_bytes })
    }

    fn failed(&mut self, reason: String) -> Attempt<S> {
        self.opened.clear();
        (self.rests, self.has_failed) = (true, true);
        Attempt::Failed(reason)
    }
}

fn grown(pause: Duration) -> Duration {
    PAUSE_MAX.min(pause.mul_f64(1.5))
}

#[cfg(test)]
mod tests {
    use proto::export_name::ExportDescription;
    use proto::nbd::handshake::client::ClientNegotiated;
    use proto::nbd::{ExportInfo, TransmissionFlags};
    use uuid::Uuid;

    use super::*;
    use crate::contract::ExportSpec;
    use crate::node::attachment_record::tests::spec;

    const SERVER_ID: Uuid = Uuid::from_u128(1);
    const VOLUME_UID: Uuid = Uuid::from_u128(2);
    const FLAGS: TransmissionFlags = TransmissionFlags::CAN_MULTI_CONN;

    fn session() -> SessionRecord {
        SessionRecord {
            incarnation: "boot.1".to_owned(),
            encryption: Encryption::None,
            export_bytes: 1 << 20,
            export_flags: FLAGS.0,
            export_block_bytes: None,
            capacity_bytes: 1 << 20,
            block_size_bytes: 512,
            max_io_bytes: 1 << 20,
            volatile_cache: false,
            read_only: false,
        }
    }

    struct World {
        spec: DeviceSpec,
        session: SessionRecord,
        redial: Redial<u32>,
    }

    impl World {
        fn new(times_in_vain: u32) -> Self {
            let mut spec = spec(Uuid::from_u128(7), "vol-1");
            spec.export = ExportSpec::Attachment {
                secret: String::new(),
                session_epoch: 1,
                server_id: SERVER_ID,
                volume_uid: VOLUME_UID,
            };
            Self { spec, session: session(), redial: Redial::new(vec![1, 3], times_in_vain) }
        }

        fn dialled(&mut self, outcome: Result<Dialled<u32>, SlotError>) -> Option<Attempt<u32>> {
            let fit = DiskFit {
                spec: &self.spec,
                session: &self.session,
                export_bytes: 1 << 20,
                nr_connections: 4,
            };
            self.redial.dialled(outcome, &fit, |_| Encryption::None)
        }

        fn opened(&self, socket: u32, incarnation: &str, size_bytes: u64) -> Result<Dialled<u32>, SlotError> {
            let told = ExportDescription {
                server_id: SERVER_ID,
                volume_uid: VOLUME_UID,
                incarnation: incarnation.to_owned(),
            };
            let description = Some(told.to_string());
            let export = ExportInfo { size_bytes, flags: FLAGS, block_sizes: None, description };
            let negotiated = ClientNegotiated::default();
            Ok(Dialled { socket, export, negotiated, address: format!("server:{socket}") })
        }
    }

    #[test]
    fn slots_are_dialled_in_turn_and_opened_together() {
        let mut world = World::new(0);
        assert_eq!(world.redial.next(0.0), Next::Dial(1));
        assert!(world.dialled(world.opened(10, "boot.1", 1 << 20)).is_none());
        assert_eq!(world.redial.next(0.0), Next::Dial(3));
        let attempt = world.dialled(world.opened(11, "boot.1", 2 << 20)).unwrap();
        let Attempt::Opened { sockets, incarnation, address, export_bytes } = attempt else {
            panic!("{attempt:?}")
        };
        assert_eq!((sockets, incarnation.as_str()), (vec![10, 11], "boot.1"));
        assert_eq!(
            (address.as_str(), export_bytes),
            ("server:11", 1 << 20),
            "the smallest size that is told"
        );
    }

    #[test]
    fn an_attempt_that_fails_begins_anew_after_pauses_that_grow() {
        let mut world = World::new(0);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            world.dialled(world.opened(10, "boot.1", 1 << 20));
            let failed = world.dialled(Err(SlotError::NoAddress));
            assert!(matches!(failed, Some(Attempt::Failed(_))));
            let Next::Rest(pause) = world.redial.next(1.0) else { panic!("it rests first") };
            pauses.push(pause.as_millis());
            assert_eq!(world.redial.next(0.0), Next::Dial(1), "all slots again");
        }
        assert_eq!((pauses[0], pauses[1], pauses[11]), (100, 150, 5000));
        let mut in_vain = World::new(3);
        assert_eq!(in_vain.redial.next(0.0), Next::Rest(PAUSE_MIN.mul_f64(1.5 * 1.5 * 1.5 * 0.5)));
        assert_eq!(in_vain.redial.next(0.0), Next::Dial(1));
    }

    #[test]
    fn what_is_not_the_same_disk_on_every_slot_is_not_taken() {
        let mut world = World::new(0);
        let other = world.opened(11, "boot.2", 1 << 20);
        world.dialled(world.opened(10, "boot.1", 1 << 20));
        let Some(Attempt::Failed(reason)) = world.dialled(other) else { panic!("it is taken") };
        assert!(reason.contains("changing"), "{reason}");
        let Some(Attempt::Failed(reason)) = world.dialled(world.opened(10, "boot.1", 512)) else {
            panic!("a smaller one is taken")
        };
        assert!(reason.contains("shrunk") && reason.contains("server:10"), "{reason}");
        world.session.encryption = Encryption::Kernel;
        let Some(Attempt::Failed(reason)) = world.dialled(world.opened(10, "boot.1", 1 << 20)) else {
            panic!("one in the clear is taken")
        };
        assert!(reason.contains("encrypted"), "{reason}");
    }

    #[test]
    fn who_says_that_the_attachment_is_no_more_is_believed() {
        let mut world = World::new(0);
        let ended = SlotError::Ended { address: "server:1".to_owned(), reason: "fenced".to_owned() };
        let Some(Attempt::Refused(reason)) = world.dialled(Err(ended)) else { panic!("it goes on") };
        assert!(reason.contains("fenced"), "{reason}");
        assert!(crate::contract::state_reasons::is_the_servers(&reason), "{reason}");
    }
}
