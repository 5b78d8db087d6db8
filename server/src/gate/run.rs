//! The gate: who gets which volume. One thread that everything slow about opening an export happens on or behind.
//!
//! Owns: the fences of all attachments, the open volumes, and which connection belongs to what. Never: does I/O of a
//! request; never waits for anything but its next message or deadline: what takes time (drained connections, a backing
//! file's lock) comes back as a message.
//! Called by: the ring threads (opens, lists, closed connections) and, through `data_server.rs`, the control side.
//! `opening.rs` and `fencing.rs` are the two halves of its work; here are its messages, its state and its deadlines.
//!
//! The way of a GO: name parsed → attachment and secret checked → [`Fence::go`] → (connections closed, drained) → epoch
//! persisted → granted → volume opened, its file locked → answered to the ring.
//! Invariants: every connection that was ever heard of is reported closed by its ring exactly once; an answer is only
//! given for a connection that is still granted; an open is answered once, and only with the volume that it asked for: who
//! waits for what is kept nowhere but in `Known`; an unknown attachment and a wrong secret get the same answer. Nothing here
//! can panic: it would take every connection of the server along.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use proto::nbd::handshake::server::{ListedExport, OpenKind, Refusal};
use tracing::error;
use uuid::Uuid;

use super::answers::{FenceError, VolumeBusy};
use super::messages::GateMessage;
use crate::backend::memory::MemoryVolume;
use crate::catalog::Catalog;
use crate::data_config::DataServerConfig;
use crate::descriptors::Descriptors;
use crate::fence::Fence;
use crate::ids::ConnectionId;
use crate::incarnation::Incarnations;
use crate::mailbox::{Mailbox, RingMessage};
use crate::tls::rights::Rights;
use crate::volume::{Backend, Volume};

/// Public names that LIST gives at most; it is for people, and an answer has to end.
const LISTED_NAMES_MAX: u32 = 1000;

/// What a connection is here for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    Attachment { attachment_id: Uuid },
    NamedWriter,
    NamedReader,
}

#[derive(Debug)]
pub(super) struct Known {
    pub(super) ring: usize,
    pub(super) kind: OpenKind,
    pub(super) right: Right,
    pub(super) volume_uid: Uuid,
    pub(super) read_only: bool,
    /// Until when the open has to be answered; `None` once it was.
    pub(super) deadline: Option<Instant>,
    /// It only asks whether the server lives.
    pub(super) is_probe: bool,
    /// Whether it was answered with the volume, or will be.
    pub(super) has_volume: bool,
    pub(super) is_closing: bool,
}

impl Known {
    /// Whether it has the volume and was told so.
    pub(super) fn is_served(&self) -> bool {
        self.has_volume && self.deadline.is_none()
    }

    /// Whether its open is to be answered with this volume as soon as that is open.
    pub(super) fn waits_for(&self, volume_uid: Uuid) -> bool {
        self.volume_uid == volume_uid && self.has_volume && self.deadline.is_some() && !self.is_closing
    }
}

pub(super) enum VolumeState {
    Opening,
    Open(Arc<Volume>),
}

pub(super) struct FenceWaiter {
    pub(super) deadline: Instant,
    pub(super) reply: Sender<Result<(), FenceError>>,
    pub(super) what: Fenced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fenced {
    Attachment(Uuid),
    NamedWriters(Uuid),
}

/// The gate's state.
pub struct Gate {
    pub(super) catalog: Catalog,
    pub(super) config: DataServerConfig,
    pub(super) incarnations: Incarnations,
    pub(super) rings: Vec<Arc<Mailbox>>,
    /// For openers to report to.
    pub(super) own_sender: Sender<GateMessage>,
    /// For volumes to be opened with.
    pub(super) descriptors: Arc<Descriptors>,
    pub(super) fences: HashMap<Uuid, Fence>,
    pub(super) volumes: HashMap<Uuid, VolumeState>,
    pub(super) connections: HashMap<ConnectionId, Known>,
    pub(super) fence_waiters: Vec<FenceWaiter>,
    pub(super) started_at: Instant,
    /// When the last connection of an attachment ended, of those that had one since the start.
    pub(super) left_at: HashMap<Uuid, Instant>,
}

impl Gate {
    /// A gate that knows nobody yet.
    pub fn new(
        catalog: Catalog,
        config: DataServerConfig,
        incarnations: Incarnations,
        rings: Vec<Arc<Mailbox>>,
        own_sender: Sender<GateMessage>,
        descriptors: Arc<Descriptors>,
    ) -> Self {
        Self {
            catalog,
            config,
            incarnations,
            rings,
            own_sender,
            descriptors,
            fences: HashMap::new(),
            volumes: HashMap::new(),
            connections: HashMap::new(),
            fence_waiters: Vec::new(),
            started_at: Instant::now(),
            left_at: HashMap::new(),
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
                Ok(GateMessage::Shutdown { is_drained }) => {
                    if is_drained {
                        self.close_volumes();
                    }
                    return;
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.check_deadlines(Instant::now());
        }
    }

    pub(super) fn handle(&mut self, message: GateMessage) {
        match message {
            GateMessage::Open { connection, ring, open, rights, beyond } => {
                self.open(connection, ring, &open, &rights, beyond);
            }
            GateMessage::List { connection, ring, rights } => {
                let exports = self.listed_exports(&rights);
                self.post(ring, RingMessage::Listed { connection, exports });
            }
            GateMessage::Closed { connection } => self.closed(connection),
            GateMessage::VolumeOpened { volume_uid, result } => self.volume_opened(volume_uid, result),
            GateMessage::LostWrites { volume_uid } => {
                self.record_loss(volume_uid);
            }
            GateMessage::SyncFailed { volume, errno, reply } => {
                let _ = reply.send(self.sync_failed(&volume, errno));
            }
            GateMessage::FenceAttachment { attachment_id, reply } => {
                self.fence_attachment(attachment_id, reply)
            }
            GateMessage::FenceNamedWriters { volume_uid, reply } => {
                self.fence_named_writers(volume_uid, reply)
            }
            GateMessage::ReopenAttachments { volume_uid, reply } => {
                self.reopen_attachments(volume_uid);
                let _ = reply.send(());
            }
            GateMessage::ReleaseVolume { volume_uid, reply } => {
                let _ = reply.send(self.release_volume(volume_uid));
            }
            GateMessage::ConnectionsOf { attachment_id, reply } => {
                let _ = reply.send(self.fences.get(&attachment_id).map_or(0, Fence::connections));
            }
            GateMessage::HolderSeen { attachment_id } => {
                self.left_at.insert(attachment_id, Instant::now());
            }
            GateMessage::HolderOf { attachment_id, reply } => {
                let connections = self.fences.get(&attachment_id).map_or(0, Fence::connections);
                let gone_since = self.left_at.get(&attachment_id).copied().unwrap_or(self.started_at);
                let _ = reply.send((connections, gone_since.elapsed()));
            }
            GateMessage::ConnectionsOfVolume { volume_uid, reply } => {
                let _ = reply.send(self.connections_of_volume(volume_uid));
            }
            GateMessage::MemoryAllocated { volume_uid, reply } => {
                let _ = reply.send(self.memory_allocated(volume_uid));
            }
            GateMessage::Shutdown { .. } => {}
        }
    }

    pub(super) fn post(&self, ring: usize, message: RingMessage) {
        // It was the ring that named its number.
        if let Some(mailbox) = self.rings.get(ring) {
            mailbox.post(message);
        }
    }

    fn listed_exports(&self, rights: &Rights) -> Vec<ListedExport> {
        if !self.config.export_by_name {
            return Vec::new();
        }
        match self.catalog.list_volumes("", LISTED_NAMES_MAX) {
            Ok(volumes) => volumes
                .into_iter()
                .filter(|volume| rights.may_open(&volume.name, None))
                .map(|volume| ListedExport { description: self.description(&volume), name: volume.name })
                .collect(),
            Err(error) => {
                error!(%error, "the catalog cannot list volumes");
                Vec::new()
            }
        }
    }

    pub(super) fn release_volume(&mut self, volume_uid: Uuid) -> Result<(), VolumeBusy> {
        let connections = self.connections_of_volume(volume_uid);
        let is_opening = matches!(self.volumes.get(&volume_uid), Some(VolumeState::Opening));
        if connections > 0 || is_opening {
            return Err(VolumeBusy { volume_uid, connections });
        }
        self.volumes.remove(&volume_uid);
        Ok(())
    }

    /// The rings have ended: nobody writes any more.
    fn close_volumes(&self) {
        for (volume_uid, state) in &self.volumes {
            if let VolumeState::Open(volume) = state
                && let Backend::File(file) = &volume.backend
            {
                self.incarnations.closed(*volume_uid, file.file());
            }
        }
    }

    pub(super) fn connections_of_volume(&self, volume_uid: Uuid) -> u32 {
        self.connections.values().filter(|known| known.volume_uid == volume_uid).count() as u32
    }

    fn memory_allocated(&self, volume_uid: Uuid) -> u64 {
        match self.volumes.get(&volume_uid) {
            Some(VolumeState::Open(volume)) => volume.memory().map_or(0, MemoryVolume::allocated_bytes),
            _ => 0,
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let opens =
            self.connections.values().filter(|known| !known.is_closing).filter_map(|known| known.deadline);
        opens.chain(self.fence_waiters.iter().map(|waiter| waiter.deadline)).min()
    }

    pub(super) fn check_deadlines(&mut self, now: Instant) {
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
