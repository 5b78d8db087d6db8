//! The gate's decisions as a pure state machine: who gets which volume, who is closed, and who is told what.
//!
//! Owns: the fences of all attachments, which volumes are open, and which connection belongs to what. Never: does I/O, reads a
//! clock (time comes in as a value), or knows a thread, a mailbox or the catalog: `run.rs` carries its [`Output`]s out, and so does
//! the simulator. `opening.rs`, `fencing.rs`, `retiring.rs` and `copying.rs` are the parts of its work; here are its state, its deadlines
//! and what can be asked of it.
//!
//! The way of a GO: name parsed → attachment looked up, secret checked → volume looked up → [`Fence::go`] → (connections closed,
//! drained) → epoch persisted → granted → volume opened, its file locked → answered.
//! Invariants: every connection that was ever heard of is reported closed exactly once; an answer is only given for a connection
//! that is still granted; an open is answered once, and only with the volume that it asked for: who waits for what is kept nowhere
//! but in `Known`; an unknown attachment and a wrong secret get the same answer; between an output and its answer no other input
//! comes, only answers to outputs before it. What goes on after an answer looks at the state anew. Nothing here can panic: it would
//! take every connection of the server along. The order of everything is that of identities: the same inputs make the same outputs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use proto::nbd::handshake::server::{OpenKind, Refusal};
use uuid::Uuid;

use super::answers::{FenceError, VolumeBusy};
use super::events::{CallId, Input, NotServed, Output};
use super::fence::Fence;
use crate::ids::ConnectionId;

/// What is bounded, and allowed, by configuration.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How long an open may wait for its answer.
    pub open_timeout: Duration,
    /// How long a fence may wait for the connections' I/O.
    pub fence_timeout: Duration,
    /// Whether volumes can be opened by their plain name.
    pub export_by_name: bool,
}

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
    /// It gets the volume when all who shared it have left: see [`Core::ended`].
    pub(super) waits_for_end: bool,
}

impl Known {
    /// Whether it has the volume and was told so.
    pub(super) fn is_served(&self) -> bool {
        self.has_volume && self.deadline.is_none()
    }

    /// Whether its open is still to be answered.
    pub(super) fn is_waiting(&self) -> bool {
        self.deadline.is_some() && !self.is_closing
    }

    /// Whether its open is to be answered with this volume as soon as that is open.
    pub(super) fn waits_for(&self, volume_uid: Uuid) -> bool {
        self.volume_uid == volume_uid && self.has_volume && self.is_waiting()
    }

    /// The attachment that it is served on, if it is on one.
    pub(super) fn attachment_id(&self) -> Option<Uuid> {
        match self.right {
            Right::Attachment { attachment_id } => Some(attachment_id),
            Right::NamedWriter | Right::NamedReader => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VolumeState {
    Opening,
    Open { has_lost_writes: bool },
}

#[derive(Debug)]
pub(super) struct FenceWaiter {
    pub(super) deadline: Instant,
    pub(super) call: CallId,
    pub(super) what: Fenced,
}

/// Who waits for a volume to be open, to copy it.
#[derive(Debug)]
pub(super) struct CopyWaiter {
    pub(super) deadline: Instant,
    pub(super) volume_uid: Uuid,
    pub(super) call: CallId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fenced {
    Attachment(Uuid),
    NamedWriters(Uuid),
}

/// The gate's state.
#[derive(Debug)]
pub struct Core {
    pub(super) bounds: Bounds,
    pub(super) fences: BTreeMap<Uuid, Fence>,
    pub(super) volumes: BTreeMap<Uuid, VolumeState>,
    pub(super) connections: BTreeMap<ConnectionId, Known>,
    pub(super) fence_waiters: Vec<FenceWaiter>,
    /// How many copies of each volume are being made.
    pub(super) copies: BTreeMap<Uuid, u32>,
    pub(super) copy_waiters: Vec<CopyWaiter>,
    /// Volumes that lost writes and were shared by several writers, who have all been ended: nobody gets such a one before it was let go.
    pub(super) ended: BTreeSet<Uuid>,
    /// Volumes of which a sync failed while they were being opened: what was looked at then may be of before.
    pub(super) lost_while_opening: BTreeSet<Uuid>,
    started_at: Instant,
    /// When the last connection of an attachment ended, of those that had one since the start.
    pub(super) left_at: BTreeMap<Uuid, Instant>,
}

impl Core {
    /// A gate that knows nobody yet.
    pub fn new(bounds: Bounds, now: Instant) -> Self {
        Self {
            bounds,
            fences: BTreeMap::new(),
            volumes: BTreeMap::new(),
            connections: BTreeMap::new(),
            fence_waiters: Vec::new(),
            copies: BTreeMap::new(),
            copy_waiters: Vec::new(),
            ended: BTreeSet::new(),
            lost_while_opening: BTreeSet::new(),
            started_at: now,
            left_at: BTreeMap::new(),
        }
    }

    /// Takes an input, and adds what is to be done.
    pub fn handle(&mut self, now: Instant, input: Input, outputs: &mut VecDeque<Output>) {
        match input {
            Input::Open { asked, name } => self.open(asked, name, outputs),
            Input::AttachmentFound { asked, name, found } => {
                self.attachment_found(asked, name, found, outputs);
            }
            Input::ExportFound { claim, found } => self.export_found(now, *claim, found, outputs),
            Input::NameFound { asked, found } => self.name_found(now, &asked, found, outputs),
            Input::Answered { connection, result } => self.answered(now, connection, result, outputs),
            Input::Persisted { attachment_id, epoch, is_persisted } => {
                self.persisted(attachment_id, epoch, is_persisted, outputs);
            }
            Input::VolumeOpened { volume_uid, result } => {
                self.volume_opened(now, volume_uid, result, outputs);
            }
            Input::LostWrites { volume_uid } => self.lost_writes(now, volume_uid, outputs),
            Input::LossRecorded { volume_uid, is_recorded, then } => {
                self.loss_recorded(now, volume_uid, is_recorded, then, outputs);
            }
            Input::SyncFailed { volume_uid, errno, call } => {
                self.sync_failed(volume_uid, errno, call, outputs)
            }
            Input::Closed { connection } => self.closed(now, connection, outputs),
            Input::FenceAttachment { attachment_id, generation, call } => {
                self.fence_attachment(now, attachment_id, generation, call, outputs);
            }
            Input::AttachmentGone { attachment_id } => {
                self.fences.remove(&attachment_id);
                self.left_at.remove(&attachment_id);
            }
            Input::FenceNamedWriters { volume_uid, call } => {
                self.fence_named_writers(now, volume_uid, call, outputs);
            }
            Input::ReopenAttachments { volume_uid } => self.reopen_attachments(volume_uid, outputs),
            Input::ReleaseVolume { volume_uid, call } => {
                let result = self.release_volume(volume_uid, outputs);
                outputs.push_back(Output::Released { call, result });
            }
            Input::WantsMark { connection } => self.wants_mark(connection, outputs),
            Input::Marked { volume_uid, connection, is_marked } => {
                self.marked(volume_uid, connection, is_marked, outputs);
            }
            Input::CopyVolume { volume_uid, call } => self.copy_volume(now, volume_uid, call, outputs),
            Input::CopyEnded { volume_uid } => self.copy_ended(volume_uid),
            Input::HolderSeen { attachment_id } => {
                self.left_at.insert(attachment_id, now);
            }
        }
    }

    /// When [`Self::check_deadlines`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let opens =
            self.connections.values().filter(|known| !known.is_closing).filter_map(|known| known.deadline);
        let copies = self.copy_waiters.iter().map(|waiter| waiter.deadline);
        opens.chain(self.fence_waiters.iter().map(|waiter| waiter.deadline)).chain(copies).min()
    }

    /// Refuses the opens and ends the waiting that have taken too long.
    pub fn check_deadlines(&mut self, now: Instant, outputs: &mut VecDeque<Output>) {
        let is_late =
            |known: &Known| !known.is_closing && known.deadline.is_some_and(|deadline| now >= deadline);
        let late = self.connections.iter().filter(|(_, known)| is_late(known));
        let late: Vec<ConnectionId> = late.map(|(connection, _)| *connection).collect();
        for connection in late {
            let refusal = Refusal::shutdown("I/O of a former session has not finished yet; try again");
            self.give_up(now, connection, refusal, outputs);
        }
        let waiters = std::mem::take(&mut self.fence_waiters);
        let (late, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| now >= waiter.deadline);
        self.fence_waiters = waiting;
        for waiter in late {
            let result = Err(FenceError::NotDrained(self.bounds.fence_timeout));
            outputs.push_back(Output::Fenced { call: waiter.call, result });
        }
        self.check_copies(now, outputs);
    }

    /// Whether the volume is being opened, and [`Input::VolumeOpened`] waited for.
    pub fn is_opening(&self, volume_uid: Uuid) -> bool {
        self.volumes.get(&volume_uid) == Some(&VolumeState::Opening)
    }

    /// Whether the volume is open, and no loss of its writes was told of.
    pub fn takes_for_whole(&self, volume_uid: Uuid) -> bool {
        self.volumes.get(&volume_uid) == Some(&VolumeState::Open { has_lost_writes: false })
    }

    /// Connections that are served on the attachment.
    pub fn connections_of(&self, attachment_id: Uuid) -> u32 {
        self.fences.get(&attachment_id).map_or(0, Fence::connections)
    }

    /// Connections that are served on the attachment, and since when there have been none, at most since the start.
    pub fn holder_of(&self, attachment_id: Uuid, now: Instant) -> (u32, Duration) {
        let gone_since = self.left_at.get(&attachment_id).copied().unwrap_or(self.started_at);
        (self.connections_of(attachment_id), now.saturating_duration_since(gone_since))
    }

    /// Connections that have the volume open for writing, or are about to.
    pub fn writers_of_volume(&self, volume_uid: Uuid) -> u32 {
        let writes = |known: &&Known| known.volume_uid == volume_uid && !known.read_only;
        self.connections.values().filter(writes).count() as u32
    }

    /// Connections that have the volume open, or are about to.
    pub fn connections_of_volume(&self, volume_uid: Uuid) -> u32 {
        self.connections.values().filter(|known| known.volume_uid == volume_uid).count() as u32
    }

    fn release_volume(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) -> Result<(), VolumeBusy> {
        let connections = self.connections_of_volume(volume_uid);
        if connections > 0 || self.is_opening(volume_uid) || self.is_copied(volume_uid) {
            return Err(VolumeBusy { volume_uid, connections });
        }
        self.retire(volume_uid, outputs);
        Ok(())
    }

    /// Whether a connection has the volume, another one than `but`.
    pub(super) fn is_in_use(&self, volume_uid: Uuid, but: Option<ConnectionId>) -> bool {
        self.connections
            .iter()
            .any(|(id, known)| Some(*id) != but && known.volume_uid == volume_uid && known.has_volume)
    }

    /// Refuses a connection that had been granted or was about to be. One that was answered may have I/O in flight, and is
    /// known until it is reported closed.
    pub(super) fn give_up(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        refusal: Refusal,
        outputs: &mut VecDeque<Output>,
    ) {
        if self.connections.get(&connection).is_some_and(|known| known.deadline.is_some()) {
            self.turn_away(now, connection, refusal, outputs);
        }
    }

    /// Refuses a connection that was told nothing yet.
    fn turn_away(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        refusal: Refusal,
        outputs: &mut VecDeque<Output>,
    ) {
        let Some(known) = self.connections.remove(&connection) else { return };
        if !known.is_closing {
            outputs.push_back(Output::Refuse { connection, ring: known.ring, refusal });
        }
        self.left(now, connection, &known, outputs);
    }

    fn answered(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        result: Result<(), NotServed>,
        outputs: &mut VecDeque<Output>,
    ) {
        let is_info = self.connections.get(&connection).is_some_and(|known| known.kind == OpenKind::Info);
        match result {
            Ok(()) if is_info => {
                self.connections.remove(&connection);
            }
            Ok(()) => {}
            Err(why) => self.turn_away(now, connection, why.refusal(), outputs),
        }
    }
}

#[cfg(test)]
mod tests;
