//! The gate: who gets which volume. One thread that everything slow about opening an export happens on or behind.
//!
//! Owns: the fences of all attachments, the open volumes, and which connection belongs to what. Never: does I/O of a
//! request; never waits for anything but its next message or deadline: what takes time (drained connections, a backing
//! file's lock) comes back as a message.
//! Called by: the ring threads (opens, lists, closed connections) and, through `data_server.rs`, the control side.
//!
//! The way of a GO: name parsed → attachment and secret checked → [`Fence::go`] → (connections closed, drained) → epoch
//! persisted → granted → volume opened, its file locked → answered to the ring.
//! Invariants: every connection that was ever heard of is reported closed by its ring exactly once; an answer is only
//! given for a connection that is still granted; an unknown attachment and a wrong secret get the same answer.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use proto::export_name::{AttachmentExportName, ExportDescription};
use proto::nbd::ExportInfo;
use proto::nbd::handshake::server::{Open, OpenKind, Refusal};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::backend::file::{self, FileError};
use crate::backend::memory::MemoryVolume;
use crate::catalog::{BackendKind, Catalog, CatalogError, VolumeRecord};
use crate::data_server::{DataServerConfig, FenceError, VolumeBusy};
use crate::fence::{ConnectionId, Fence, Go, Output};
use crate::mailbox::{Mailbox, Opened, RingMessage};
use crate::volume::{Backend, Volume};

/// Public names that LIST gives at most; it is for people, and an answer has to end.
const LISTED_NAMES_MAX: u32 = 1000;

/// What the gate can be told.
pub enum GateMessage {
    /// A connection asks for an export.
    Open {
        /// Who.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
        /// For what.
        open: Open,
    },
    /// A connection asks for the public names.
    List {
        /// Who.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
    },
    /// A connection is gone, and all its submitted I/O has finished.
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// The opener of a volume has ended.
    VolumeOpened {
        /// Which.
        volume_uid: Uuid,
        /// The volume, its file locked.
        result: Result<Arc<Volume>, OpenError>,
    },
    /// See [`crate::data_server::DataServer::fence_attachment`].
    FenceAttachment {
        /// Which.
        attachment_id: Uuid,
        /// Answered when drained, or too late.
        reply: Sender<Result<(), FenceError>>,
    },
    /// See [`crate::data_server::DataServer::fence_named_writers`].
    FenceNamedWriters {
        /// Of which volume.
        volume_uid: Uuid,
        /// Answered when drained, or too late.
        reply: Sender<Result<(), FenceError>>,
    },
    /// See [`crate::data_server::DataServer::release_volume`].
    ReleaseVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer.
        reply: Sender<Result<(), VolumeBusy>>,
    },
    /// Connections that are served on an attachment.
    ConnectionsOf {
        /// Which.
        attachment_id: Uuid,
        /// The answer.
        reply: Sender<u32>,
    },
    /// Connections that have a volume open.
    ConnectionsOfVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer.
        reply: Sender<u32>,
    },
    /// Bytes of memory of a volume that is open.
    MemoryAllocated {
        /// Which.
        volume_uid: Uuid,
        /// The answer; 0 for one that is not open.
        reply: Sender<u64>,
    },
    /// End.
    Shutdown,
}

/// Why a volume cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its backing file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its memory, or the thread that opens it.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// What a connection is here for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    Attachment { attachment_id: Uuid },
    NamedWriter,
    NamedReader,
}

#[derive(Debug)]
struct Known {
    ring: usize,
    kind: OpenKind,
    right: Right,
    volume_uid: Uuid,
    read_only: bool,
    /// Until when the open has to be answered; `None` once it was.
    deadline: Option<Instant>,
    /// Whether it was answered with the volume, or will be.
    has_volume: bool,
    is_closing: bool,
}

enum VolumeState {
    Opening { waiting: Vec<ConnectionId> },
    Open(Arc<Volume>),
}

struct FenceWaiter {
    deadline: Instant,
    reply: Sender<Result<(), FenceError>>,
    what: Fenced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fenced {
    Attachment(Uuid),
    NamedWriters(Uuid),
}

/// The gate's state.
pub struct Gate {
    catalog: Catalog,
    config: DataServerConfig,
    boot_id: String,
    process_id: String,
    rings: Vec<Arc<Mailbox>>,
    /// For openers to report to.
    own_sender: Sender<GateMessage>,
    fences: HashMap<Uuid, Fence>,
    volumes: HashMap<Uuid, VolumeState>,
    connections: HashMap<ConnectionId, Known>,
    fence_waiters: Vec<FenceWaiter>,
}

impl Gate {
    /// A gate that knows nobody yet.
    pub fn new(
        catalog: Catalog,
        config: DataServerConfig,
        identity: (String, String),
        rings: Vec<Arc<Mailbox>>,
        own_sender: Sender<GateMessage>,
    ) -> Self {
        let (boot_id, process_id) = identity;
        Self {
            catalog,
            config,
            boot_id,
            process_id,
            rings,
            own_sender,
            fences: HashMap::new(),
            volumes: HashMap::new(),
            connections: HashMap::new(),
            fence_waiters: Vec::new(),
        }
    }

    /// Serves messages until told to end.
    pub fn run(mut self, messages: &Receiver<GateMessage>) {
        loop {
            let message = match self.next_deadline() {
                None => messages.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => messages.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            match message {
                Ok(GateMessage::Shutdown) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.check_deadlines(Instant::now());
        }
    }

    fn handle(&mut self, message: GateMessage) {
        match message {
            GateMessage::Open { connection, ring, open } => self.open(connection, ring, &open),
            GateMessage::List { connection, ring } => {
                let names = self.listed_names();
                self.rings[ring].post(RingMessage::Listed { connection, names });
            }
            GateMessage::Closed { connection } => self.closed(connection),
            GateMessage::VolumeOpened { volume_uid, result } => self.volume_opened(volume_uid, result),
            GateMessage::FenceAttachment { attachment_id, reply } => {
                self.fence_attachment(attachment_id, reply)
            }
            GateMessage::FenceNamedWriters { volume_uid, reply } => {
                self.fence_named_writers(volume_uid, reply)
            }
            GateMessage::ReleaseVolume { volume_uid, reply } => {
                let _ = reply.send(self.release_volume(volume_uid));
            }
            GateMessage::ConnectionsOf { attachment_id, reply } => {
                let _ = reply.send(self.fences.get(&attachment_id).map_or(0, Fence::connections));
            }
            GateMessage::ConnectionsOfVolume { volume_uid, reply } => {
                let _ = reply.send(self.connections_of_volume(volume_uid));
            }
            GateMessage::MemoryAllocated { volume_uid, reply } => {
                let _ = reply.send(self.memory_allocated(volume_uid));
            }
            GateMessage::Shutdown => {}
        }
    }

    fn listed_names(&self) -> Vec<String> {
        if !self.config.export_by_name {
            return Vec::new();
        }
        match self.catalog.list_volumes("", LISTED_NAMES_MAX) {
            Ok(volumes) => volumes.into_iter().map(|volume| volume.name).collect(),
            Err(error) => {
                error!(%error, "the catalog cannot list volumes");
                Vec::new()
            }
        }
    }

    // --- opening ---------------------------------------------------------------------------------------------------

    fn open(&mut self, connection: ConnectionId, ring: usize, open: &Open) {
        let opened = match AttachmentExportName::parse(&open.name) {
            Some(name) => self.open_attachment(connection, ring, open.kind, &name),
            None => self.open_by_name(connection, ring, open),
        };
        if let Err(refusal) = opened {
            self.connections.remove(&connection);
            self.refuse(connection, ring, refusal);
        }
    }

    fn open_attachment(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        kind: OpenKind,
        name: &AttachmentExportName,
    ) -> Result<(), Refusal> {
        let attachment = self.catalog.attachment(name.attachment_id).map_err(catalog_refusal)?;
        // Whether the id or the secret is wrong is not for the peer to know.
        let attachment = attachment.filter(|found| found.secret == name.secret).ok_or_else(unknown_export)?;
        let right = Right::Attachment { attachment_id: attachment.attachment_id };
        self.remember(connection, ring, kind, right, attachment.volume_uid, attachment.read_only);
        if kind == OpenKind::Info {
            self.find_volume(connection);
            return Ok(());
        }
        let go = Go {
            connection,
            epoch: name.epoch,
            slot: name.slot,
            generation: attachment.generation,
            epoch_in_catalog: attachment.session_epoch,
        };
        let fence = self.fences.entry(attachment.attachment_id).or_default();
        let mut outputs = Vec::new();
        fence.go(go, &mut outputs);
        self.carry_out(attachment.attachment_id, outputs);
        Ok(())
    }

    fn open_by_name(&mut self, connection: ConnectionId, ring: usize, open: &Open) -> Result<(), Refusal> {
        if !self.config.export_by_name {
            return Err(unknown_export());
        }
        let volume = self.catalog.volume_by_name(&open.name).map_err(catalog_refusal)?;
        let volume = volume.ok_or_else(unknown_export)?;
        let read_only = self.catalog.volume_has_attachment(volume.volume_uid).map_err(catalog_refusal)?;
        let right = if read_only { Right::NamedReader } else { Right::NamedWriter };
        self.remember(connection, ring, open.kind, right, volume.volume_uid, read_only);
        self.find_volume(connection);
        Ok(())
    }

    fn remember(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        kind: OpenKind,
        right: Right,
        volume_uid: Uuid,
        read_only: bool,
    ) {
        let deadline = Some(Instant::now() + self.config.limits.open_timeout);
        let known = Known {
            ring,
            kind,
            right,
            volume_uid,
            read_only,
            deadline,
            has_volume: false,
            is_closing: false,
        };
        self.connections.insert(connection, known);
    }

    /// Gives a granted connection its volume, now or when it is open.
    fn find_volume(&mut self, connection: ConnectionId) {
        let Some(known) = self.connections.get_mut(&connection) else { return };
        known.has_volume = true;
        let volume_uid = known.volume_uid;
        let is_in_use = self.is_in_use(volume_uid, connection);
        match self.volumes.get_mut(&volume_uid) {
            Some(VolumeState::Opening { waiting }) => waiting.push(connection),
            Some(VolumeState::Open(volume)) if volume.has_lost_writes() && !is_in_use => {
                if self.retire(volume_uid) {
                    self.start_opening(volume_uid, connection);
                } else {
                    self.give_up(
                        connection,
                        Refusal::shutdown("the server cannot record that the volume lost writes"),
                    );
                }
            }
            Some(VolumeState::Open(volume)) => {
                let volume = Arc::clone(volume);
                self.answer(connection, &volume);
            }
            None => self.start_opening(volume_uid, connection),
        }
    }

    /// Whether another connection than `but` has the volume.
    fn is_in_use(&self, volume_uid: Uuid, but: ConnectionId) -> bool {
        self.connections
            .iter()
            .any(|(id, known)| *id != but && known.volume_uid == volume_uid && known.has_volume)
    }

    fn start_opening(&mut self, volume_uid: Uuid, connection: ConnectionId) {
        let record = match self.catalog.volume_by_uid(volume_uid) {
            Ok(Some(record)) => record,
            Ok(None) => return self.give_up(connection, unknown_export()),
            Err(error) => return self.give_up(connection, catalog_refusal(error)),
        };
        self.volumes.insert(volume_uid, VolumeState::Opening { waiting: vec![connection] });
        let (config, gate) = (self.config.clone(), self.own_sender.clone());
        let ring_count = self.rings.len();
        // A thread of its own, because the lock of a file is waited for as long as a predecessor's I/O takes.
        let opener = std::thread::Builder::new().name("volume-opener".into()).spawn(move || {
            let result = open_volume(&record, &config, ring_count);
            let _ = gate.send(GateMessage::VolumeOpened { volume_uid, result });
        });
        if let Err(error) = opener {
            self.volume_opened(volume_uid, Err(error.into()));
        }
    }

    fn volume_opened(&mut self, volume_uid: Uuid, result: Result<Arc<Volume>, OpenError>) {
        let Some(VolumeState::Opening { waiting }) = self.volumes.remove(&volume_uid) else { return };
        match result {
            Ok(volume) => {
                info!(%volume_uid, backend = volume.describe_backend(), "volume open");
                self.volumes.insert(volume_uid, VolumeState::Open(Arc::clone(&volume)));
                for connection in waiting {
                    self.answer(connection, &volume);
                }
            }
            Err(error) => {
                error!(%volume_uid, %error, "a volume cannot be opened");
                for connection in waiting {
                    self.give_up(connection, Refusal::shutdown("the volume's storage cannot be opened"));
                }
            }
        }
    }

    /// Answers an open whose volume is there; a connection that has gone or was fenced meanwhile gets none.
    fn answer(&mut self, connection: ConnectionId, volume: &Arc<Volume>) {
        let Some(known) = self.connections.get_mut(&connection) else { return };
        if known.is_closing || known.deadline.is_none() {
            return;
        }
        let record = match self.catalog.volume_by_uid(volume.volume_uid) {
            Ok(Some(record)) => record,
            Ok(None) => return self.give_up(connection, unknown_export()),
            Err(error) => return self.give_up(connection, catalog_refusal(error)),
        };
        known.deadline = None;
        let block_size_bytes =
            if let Right::Attachment { .. } = known.right { record.block_size_bytes } else { 1 };
        let limits = volume.limits(known.read_only, block_size_bytes);
        let description = ExportDescription {
            server_id: self.catalog.server_id(),
            volume_uid: record.volume_uid,
            incarnation: incarnation(&record, &self.boot_id, &self.process_id),
        };
        let export = ExportInfo {
            size_bytes: limits.size_bytes,
            flags: limits.flags,
            block_sizes: Some(limits.block_sizes),
            description: Some(description.to_string()),
        };
        let is_info = known.kind == OpenKind::Info;
        let volume = (!is_info).then(|| Arc::clone(volume));
        let opened = Opened { export, limits, volume };
        self.rings[known.ring].post(RingMessage::Opened { connection, answer: Ok(opened) });
        if is_info {
            self.connections.remove(&connection);
        }
    }

    /// Refuses a connection that had been granted or was about to be.
    fn give_up(&mut self, connection: ConnectionId, refusal: Refusal) {
        let Some(known) = self.connections.remove(&connection) else { return };
        if !known.is_closing {
            self.refuse(connection, known.ring, refusal);
        }
        self.left(connection, &known);
    }

    fn refuse(&self, connection: ConnectionId, ring: usize, refusal: Refusal) {
        info!(connection = connection.0, reason = refusal.text(), "an open is refused");
        self.rings[ring].post(RingMessage::Opened { connection, answer: Err(refusal) });
    }

    // --- fencing ---------------------------------------------------------------------------------------------------

    /// Does what a fence asks for, and what it asks for in consequence.
    fn carry_out(&mut self, attachment_id: Uuid, outputs: Vec<Output>) {
        let mut outputs = std::collections::VecDeque::from(outputs);
        while let Some(output) = outputs.pop_front() {
            match output {
                Output::Close(connection) => self.close(connection),
                Output::Grant(connection) => self.find_volume(connection),
                Output::Refuse(connection, reason) => {
                    if let Some(known) = self.connections.remove(&connection) {
                        self.refuse(connection, known.ring, Refusal::policy(reason.to_string()));
                    }
                }
                Output::Persist(epoch) => {
                    let persisted = self.catalog.raise_session_epoch(attachment_id, epoch);
                    let Some(fence) = self.fences.get_mut(&attachment_id) else { return };
                    let mut more = Vec::new();
                    match persisted {
                        Ok(()) => fence.persisted(epoch, &mut more),
                        Err(error) => {
                            error!(%attachment_id, epoch, %error, "a session epoch cannot be recorded");
                            fence.persist_failed(epoch, &mut more);
                        }
                    }
                    outputs.extend(more);
                }
            }
        }
    }

    fn close(&mut self, connection: ConnectionId) {
        if let Some(known) = self.connections.get_mut(&connection)
            && !std::mem::replace(&mut known.is_closing, true)
        {
            info!(connection = connection.0, "fencing a connection");
            self.rings[known.ring].post(RingMessage::Close { connection });
        }
    }

    fn closed(&mut self, connection: ConnectionId) {
        if let Some(known) = self.connections.remove(&connection) {
            self.left(connection, &known);
        }
    }

    /// A connection has no part in anything any more.
    fn left(&mut self, connection: ConnectionId, known: &Known) {
        let volume_uid = known.volume_uid;
        if let Some(VolumeState::Open(volume)) = self.volumes.get(&volume_uid)
            && volume.has_lost_writes()
            && !self.is_in_use(volume_uid, connection)
        {
            // Before the fence lets the next one in, which is to find the volume anew.
            self.retire(volume_uid);
        }
        if let Right::Attachment { attachment_id } = known.right
            && let Some(fence) = self.fences.get_mut(&attachment_id)
        {
            let mut outputs = Vec::new();
            fence.drained(connection, &mut outputs);
            let is_forgettable = fence.is_forgettable() && outputs.is_empty();
            self.carry_out(attachment_id, outputs);
            if is_forgettable {
                self.fences.remove(&attachment_id);
            }
        }
        self.answer_drained_fences();
    }

    /// Takes a volume that lost writes out of service, so that the next open is a new one. False: the catalog could not
    /// record it, and it stays as it is.
    fn retire(&mut self, volume_uid: Uuid) -> bool {
        match self.catalog.raise_incarnation(volume_uid) {
            Ok(incarnation) => {
                warn!(%volume_uid, incarnation, "the volume lost writes: it will be opened anew");
                self.volumes.remove(&volume_uid);
                true
            }
            Err(error) => {
                error!(%volume_uid, %error, "the catalog cannot record that the volume lost writes");
                false
            }
        }
    }

    fn fence_attachment(&mut self, attachment_id: Uuid, reply: Sender<Result<(), FenceError>>) {
        let attachment = match self.catalog.attachment(attachment_id) {
            Ok(attachment) => attachment,
            Err(error) => {
                let _ = reply.send(Err(FenceError::Catalog(error.to_string())));
                return;
            }
        };
        let fence = self.fences.entry(attachment_id).or_default();
        let mut outputs = Vec::new();
        fence.fence_all(attachment.map(|attachment| attachment.generation), &mut outputs);
        self.carry_out(attachment_id, outputs);
        self.wait_for(Fenced::Attachment(attachment_id), reply);
    }

    fn fence_named_writers(&mut self, volume_uid: Uuid, reply: Sender<Result<(), FenceError>>) {
        let writers = self.connections.iter().filter(|(_, known)| is_named_writer(known, volume_uid));
        let writers: Vec<ConnectionId> = writers.map(|(connection, _)| *connection).collect();
        for connection in writers {
            self.close(connection);
        }
        self.wait_for(Fenced::NamedWriters(volume_uid), reply);
    }

    fn wait_for(&mut self, what: Fenced, reply: Sender<Result<(), FenceError>>) {
        let deadline = Instant::now() + self.config.limits.fence_timeout;
        self.fence_waiters.push(FenceWaiter { deadline, reply, what });
        self.answer_drained_fences();
    }

    fn answer_drained_fences(&mut self) {
        let waiters = std::mem::take(&mut self.fence_waiters);
        let (drained, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| self.is_drained(waiter.what));
        self.fence_waiters = waiting;
        for waiter in drained {
            let _ = waiter.reply.send(Ok(()));
            self.forget(waiter.what);
        }
    }

    fn is_drained(&self, what: Fenced) -> bool {
        match what {
            Fenced::Attachment(attachment_id) => {
                self.fences.get(&attachment_id).is_none_or(Fence::is_drained)
            }
            Fenced::NamedWriters(volume_uid) => {
                !self.connections.values().any(|known| is_named_writer(known, volume_uid) && known.is_closing)
            }
        }
    }

    /// Drops the fence of an attachment that is no more: the catalog refuses it from now on.
    fn forget(&mut self, what: Fenced) {
        if let Fenced::Attachment(attachment_id) = what
            && matches!(self.catalog.attachment(attachment_id), Ok(None))
        {
            self.fences.remove(&attachment_id);
        }
    }

    // --- volumes ---------------------------------------------------------------------------------------------------

    fn release_volume(&mut self, volume_uid: Uuid) -> Result<(), VolumeBusy> {
        let connections = self.connections_of_volume(volume_uid);
        let is_opening = matches!(self.volumes.get(&volume_uid), Some(VolumeState::Opening { .. }));
        if connections > 0 || is_opening {
            return Err(VolumeBusy { volume_uid, connections });
        }
        self.volumes.remove(&volume_uid);
        Ok(())
    }

    fn connections_of_volume(&self, volume_uid: Uuid) -> u32 {
        self.connections.values().filter(|known| known.volume_uid == volume_uid).count() as u32
    }

    fn memory_allocated(&self, volume_uid: Uuid) -> u64 {
        match self.volumes.get(&volume_uid) {
            Some(VolumeState::Open(volume)) => volume.memory().map_or(0, MemoryVolume::allocated_bytes),
            _ => 0,
        }
    }

    // --- time ------------------------------------------------------------------------------------------------------

    fn next_deadline(&self) -> Option<Instant> {
        let opens =
            self.connections.values().filter(|known| !known.is_closing).filter_map(|known| known.deadline);
        opens.chain(self.fence_waiters.iter().map(|waiter| waiter.deadline)).min()
    }

    fn check_deadlines(&mut self, now: Instant) {
        let is_late =
            |known: &Known| !known.is_closing && known.deadline.is_some_and(|deadline| now >= deadline);
        let late = self.connections.iter().filter(|(_, known)| is_late(known));
        let late: Vec<ConnectionId> = late.map(|(connection, _)| *connection).collect();
        for connection in late {
            let refusal = Refusal::shutdown("I/O of a former session has not finished yet; try again");
            self.give_up(connection, refusal);
        }
        let waiters = std::mem::take(&mut self.fence_waiters);
        let (late, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| now >= waiter.deadline);
        self.fence_waiters = waiting;
        for waiter in late {
            let _ = waiter.reply.send(Err(FenceError::NotDrained(self.config.limits.fence_timeout)));
        }
    }
}

/// The storage incarnation of a volume.
pub fn incarnation(record: &VolumeRecord, boot_id: &str, process_id: &str) -> String {
    match record.backend {
        BackendKind::File => format!("{boot_id}.{}", record.incarnation),
        BackendKind::Memory => format!("{boot_id}.{}.{process_id}", record.incarnation),
    }
}

fn is_named_writer(known: &Known, volume_uid: Uuid) -> bool {
    known.right == Right::NamedWriter && known.volume_uid == volume_uid
}

fn unknown_export() -> Refusal {
    Refusal::unknown("no such export")
}

fn catalog_refusal(error: CatalogError) -> Refusal {
    error!(%error, "the catalog failed");
    Refusal::shutdown("the server's catalog failed; try again")
}

/// Opens a volume's storage and waits for its lock.
fn open_volume(
    record: &VolumeRecord,
    config: &DataServerConfig,
    ring_count: usize,
) -> Result<Arc<Volume>, OpenError> {
    let backend = match record.backend {
        BackendKind::File => {
            let (uid, capacity_bytes) = (record.volume_uid, record.capacity_bytes);
            let file = file::open(&config.volumes_dir, uid, capacity_bytes, config.cache, ring_count)?;
            let began = Instant::now();
            file.lock()?;
            let waited = began.elapsed();
            if waited > Duration::from_millis(100) {
                info!(volume_uid = %uid, ?waited, "waited for a predecessor's I/O");
            }
            Backend::File(file)
        }
        BackendKind::Memory => Backend::Memory(MemoryVolume::new(record.capacity_bytes)?),
    };
    let volume =
        Volume::new(record.volume_uid, record.capacity_bytes, backend, record.write_cache_on, config.faults);
    Ok(Arc::new(volume))
}
