//! What rings are told, in orders that only slow storage brings about: the openers' reports are taken when the test says so.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use proto::nbd::handshake::server::{Open, OpenKind};
use uuid::Uuid;

use super::messages::{GateMessage, OpenError};
use super::run::Gate;
use crate::backend::file;
use crate::catalog::{BackendKind, CATALOG_FILE_NAME, Catalog, NewVolume};
use crate::data::config::DataServerConfig;
use crate::data::mailbox::{Mailbox, RingMessage};
use crate::descriptors::Descriptors;
use crate::ids::ConnectionId;
use crate::tls::rights::Rights;
use crate::volume::Volume;
use crate::volume::incarnation::Incarnations;

const SIZES_BYTES: [(&str, u64); 2] = [("a", 1 << 20), ("b", 2 << 20)];
const CLIENT: ConnectionId = ConnectionId(7);
const OTHER: ConnectionId = ConnectionId(8);

struct Fixture {
    gate: Gate,
    messages: Receiver<GateMessage>,
    ring: Arc<Mailbox>,
    volumes: HashMap<&'static str, Uuid>,
    catalog: Catalog,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path()).unwrap();
        let volumes = SIZES_BYTES.map(|(name, size_bytes)| (name, new_volume(&catalog, name, size_bytes)));
        let config = DataServerConfig {
            volumes_dir: catalog.volumes_dir(),
            export_by_name: true,
            ..DataServerConfig::default()
        };
        let (own_sender, messages) = channel();
        let ring = Arc::new(Mailbox::new().unwrap());
        let incarnations =
            Incarnations::open(catalog.clone(), "boot".to_owned(), "process".to_owned(), None).unwrap();
        let gate = Gate::new(
            catalog.clone(),
            config,
            incarnations,
            Arc::default(),
            vec![Arc::clone(&ring)],
            own_sender,
            Descriptors::new(100),
        );
        Self { gate, messages, ring, volumes: volumes.into(), catalog, dir }
    }

    fn go(&mut self, name: &str) {
        self.go_as(CLIENT, name);
    }

    fn go_as(&mut self, connection: ConnectionId, name: &str) {
        let open = Open { kind: OpenKind::Go, name: name.to_owned() };
        let rights = Arc::new(Rights::everything());
        self.gate.handle(GateMessage::Open { connection, ring: 0, open, rights, beyond: None });
    }

    /// One that the client has, and whose first sync has failed just now; the gate has not seen the message that says so.
    fn lose_writes_of(&mut self, name: &str) -> Arc<Volume> {
        self.go(name);
        let report = self.messages.recv_timeout(Duration::from_secs(20)).unwrap();
        self.gate.handle(report);
        let volume = match self.ring.take().pop() {
            Some(RingMessage::Opened { answer: Ok(opened), .. }) => opened.volume.unwrap(),
            other => panic!("{other:?}"),
        };
        volume.report_failed_sync(libc::EIO);
        volume
    }

    /// The messages that have come since, in their order.
    fn catch_up(&mut self) {
        while let Ok(message) = self.messages.try_recv() {
            self.gate.handle(message);
        }
    }

    fn incarnation(&self, name: &str) -> u64 {
        self.catalog.volume_by_uid(self.volumes[name]).unwrap().unwrap().incarnation
    }

    /// What the openers of both volumes report; the gate has not seen it.
    fn reports(&self) -> HashMap<Uuid, GateMessage> {
        let report = || match self.messages.recv_timeout(Duration::from_secs(20)).unwrap() {
            GateMessage::VolumeOpened { volume_uid, result } => {
                (volume_uid, GateMessage::VolumeOpened { volume_uid, result })
            }
            _ => panic!("not an opener's report"),
        };
        [report(), report()].into()
    }

    fn time_out(&mut self) {
        self.gate.check_deadlines(Instant::now() + Duration::from_secs(3600));
    }

    fn ask<T>(&mut self, question: impl FnOnce(Sender<T>) -> GateMessage) -> T {
        let (reply, answer) = channel();
        self.gate.handle(question(reply));
        answer.try_recv().unwrap()
    }

    fn connections_of_volume(&mut self, name: &str) -> u32 {
        let volume_uid = self.volumes[name];
        self.ask(|reply| GateMessage::ConnectionsOfVolume { volume_uid, reply })
    }

    /// The sizes of the exports that the client was told since the last call; `None` for a refusal.
    fn answers(&self) -> Vec<Option<u64>> {
        let answer = |message| match message {
            RingMessage::Opened { connection: CLIENT, answer } => {
                answer.ok().map(|opened| opened.export.size_bytes)
            }
            other => panic!("{other:?}"),
        };
        self.ring.take().into_iter().map(answer).collect()
    }
}

fn new_volume(catalog: &Catalog, name: &str, capacity_bytes: u64) -> Uuid {
    let new = NewVolume {
        name: name.to_owned(),
        capacity_bytes,
        block_size_bytes: 512,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: Default::default(),
    };
    let uid = catalog.begin_creating(&new).unwrap().volume_uid;
    file::create(&catalog.volumes_dir(), uid, capacity_bytes).unwrap();
    catalog.finish_creating(uid).unwrap();
    uid
}

/// A client that was refused one volume in time, and asks for another one while the first still opens.
fn refused_a_and_asking_for_b() -> (Fixture, HashMap<Uuid, GateMessage>) {
    let mut fixture = Fixture::new();
    fixture.go("a");
    fixture.time_out();
    assert_eq!(fixture.answers(), [None]);
    fixture.go("b");
    let reports = fixture.reports();
    (fixture, reports)
}

#[test]
fn a_volume_that_opens_too_late_is_not_the_answer_to_the_next_open() {
    let (mut fixture, mut reports) = refused_a_and_asking_for_b();
    fixture.gate.handle(reports.remove(&fixture.volumes["a"]).unwrap());
    assert_eq!(fixture.answers(), [], "it waits for another volume");
    fixture.gate.handle(reports.remove(&fixture.volumes["b"]).unwrap());
    assert_eq!(fixture.answers(), [Some(2 << 20)]);
    fixture.time_out();
    assert_eq!(fixture.answers(), [], "it was answered in time");
}

#[test]
fn a_volume_that_cannot_be_opened_is_nothing_to_who_is_served_with_another() {
    let (mut fixture, mut reports) = refused_a_and_asking_for_b();
    let volume_uid = fixture.volumes["a"];
    fixture.gate.handle(reports.remove(&fixture.volumes["b"]).unwrap());
    assert_eq!(fixture.answers(), [Some(2 << 20)]);
    let failed = Err(OpenError::System(io::ErrorKind::Other.into()));
    fixture.gate.handle(GateMessage::VolumeOpened { volume_uid, result: failed });
    assert_eq!(fixture.answers(), [], "an answer that nobody waits for");
    assert_eq!(fixture.connections_of_volume("b"), 1, "it has I/O in flight");
    let released = fixture.ask(|reply| GateMessage::ReleaseVolume { volume_uid, reply });
    assert!(released.is_ok(), "the other one may be opened anew");
}

#[test]
fn who_asks_twice_for_a_volume_that_opens_late_is_answered_once() {
    let mut fixture = Fixture::new();
    fixture.go("a");
    fixture.time_out();
    fixture.go("a");
    let report = fixture.messages.recv_timeout(Duration::from_secs(20)).unwrap();
    fixture.gate.handle(report);
    assert_eq!(fixture.answers(), [None, Some(1 << 20)]);
}

#[test]
fn a_loss_is_recorded_before_an_open_that_overtakes_its_message_is_answered() {
    let mut fixture = Fixture::new();
    let before = fixture.incarnation("a");
    let volume = fixture.lose_writes_of("a");
    assert_eq!(fixture.incarnation("a"), before, "known in memory only");
    fixture.go_as(OTHER, "a");
    assert_eq!(fixture.incarnation("a"), before + 1);
    match &fixture.ring.take()[..] {
        [RingMessage::Opened { connection: OTHER, answer: Ok(opened) }] => {
            assert!(Arc::ptr_eq(opened.volume.as_ref().unwrap(), &volume), "it is in use");
        }
        other => panic!("{other:?}"),
    }
    fixture.catch_up();
    assert!(fixture.ring.take().is_empty(), "it is recorded");
    drop(volume);
    // Once both have left, it is opened anew, and that one has lost nothing.
    for connection in [CLIENT, OTHER] {
        fixture.gate.handle(GateMessage::Closed { connection });
    }
    fixture.go("a");
    let report = fixture.messages.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(matches!(&report, GateMessage::VolumeOpened { result: Ok(anew), .. } if !anew.has_lost_writes()));
}

#[test]
fn a_loss_that_cannot_be_recorded_refuses_an_open_that_overtakes_its_message() {
    let mut fixture = Fixture::new();
    let db = rusqlite::Connection::open(fixture.dir.path().join(CATALOG_FILE_NAME)).unwrap();
    let fails =
        "CREATE TRIGGER fails BEFORE UPDATE OF incarnation ON volumes BEGIN SELECT RAISE(FAIL, 'no'); END";
    db.execute(fails, ()).unwrap();
    let before = fixture.incarnation("a");
    fixture.lose_writes_of("a");
    fixture.go_as(OTHER, "a");
    match &fixture.ring.take()[..] {
        [
            RingMessage::Close { connection: CLIENT },
            RingMessage::Opened { connection: OTHER, answer: Err(_) },
        ] => {}
        other => panic!("{other:?}"),
    }
    db.execute("DROP TRIGGER fails", ()).unwrap();
    fixture.catch_up();
    assert_eq!(fixture.incarnation("a"), before + 1);
}
