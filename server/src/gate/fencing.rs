//! Carrying out what the fences decide: closing, granting, recording epochs, and waiting until connections have drained.
//!
//! Owns: the steps from a fence's [`Output`] to a message or a catalog call, and what happens when a connection is gone.
//! Never: decides who may be served; that is `fence.rs`'s.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::time::Instant;

use tracing::{error, info};
use uuid::Uuid;

use super::answers::FenceError;
use super::run::{FenceWaiter, Fenced, Gate, Known, Right, VolumeState};
use crate::catalog::VolumeRecord;
use crate::fence::{Fence, Output};
use crate::ids::ConnectionId;
use crate::mailbox::RingMessage;

impl Gate {
    /// Does what a fence asks for, and what it asks for in consequence.
    pub(super) fn carry_out(&mut self, attachment_id: Uuid, outputs: Vec<Output>) {
        let mut outputs = VecDeque::from(outputs);
        while let Some(output) = outputs.pop_front() {
            match output {
                Output::Close(connection) => self.close(connection),
                Output::Grant(connection) => self.find_volume(connection),
                Output::Refuse(connection, reason) => {
                    if let Some(known) = self.connections.remove(&connection) {
                        self.refuse(connection, known.ring, reason.refusal());
                    }
                }
                Output::Persist(epoch) => {
                    let persisted = self.catalog.raise_session_epoch(attachment_id, epoch);
                    let Some(fence) = self.fences.get_mut(&attachment_id) else { continue };
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

    pub(super) fn close(&mut self, connection: ConnectionId) {
        if let Some(known) = self.connections.get_mut(&connection)
            && !std::mem::replace(&mut known.is_closing, true)
        {
            info!(connection = connection.0, "fencing a connection");
            let ring = known.ring;
            self.post(ring, RingMessage::Close { connection });
        }
    }

    /// Closes what serves attachments of a volume; nothing is refused to those who come again.
    pub(super) fn reopen_attachments(&mut self, volume_uid: Uuid) {
        let is_attached = |known: &&Known| {
            known.volume_uid == volume_uid && matches!(known.right, Right::Attachment { .. })
        };
        let open = self.connections.iter().filter(|(_, known)| is_attached(known) && known.has_volume);
        let open: Vec<ConnectionId> = open.map(|(connection, _)| *connection).collect();
        open.into_iter().for_each(|connection| self.close(connection));
    }

    pub(super) fn closed(&mut self, connection: ConnectionId) {
        if let Some(known) = self.connections.remove(&connection) {
            self.left(connection, &known);
        }
    }

    /// A connection has no part in anything any more.
    pub(super) fn left(&mut self, connection: ConnectionId, known: &Known) {
        let volume_uid = known.volume_uid;
        if let Some(VolumeState::Open(volume)) = self.volumes.get(&volume_uid)
            && volume.has_lost_writes()
            && !self.is_in_use(volume_uid, connection)
        {
            // Before the fence lets the next one in, which is to find the volume anew.
            if self.record_loss(volume_uid) {
                self.volumes.remove(&volume_uid);
            }
        }
        if let Right::Attachment { attachment_id } = known.right
            && let Some(fence) = self.fences.get_mut(&attachment_id)
        {
            self.left_at.insert(attachment_id, Instant::now());
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

    /// Has the loss of writes in the catalog, unless it is recorded elsewhere. False: it is recorded nowhere; the connections that
    /// have the volume are closed, and it is not served until it can be.
    pub(super) fn record_loss(&mut self, volume_uid: Uuid) -> bool {
        let is_settled = self.incarnations.settle(volume_uid).is_ok();
        let is_recorded = is_settled || self.incarnations.is_recorded(volume_uid);
        if !is_recorded {
            let have_it = self
                .connections
                .iter()
                .filter(|(_, known)| known.volume_uid == volume_uid && known.is_served());
            let have_it: Vec<ConnectionId> = have_it.map(|(connection, _)| *connection).collect();
            have_it.into_iter().for_each(|connection| self.close(connection));
        }
        is_recorded
    }

    /// A sync of a volume failed that was no client's. Recorded before it is answered.
    pub(super) fn sync_failed(&mut self, volume: &VolumeRecord, errno: i32) -> Result<(), String> {
        let volume_uid = volume.volume_uid;
        if let Some(VolumeState::Open(open)) = self.volumes.get(&volume_uid) {
            open.report_failed_sync(errno);
            return if self.record_loss(volume_uid) {
                Ok(())
            } else {
                Err("it is recorded nowhere".to_owned())
            };
        }
        self.incarnations.raise_and_settle(volume).map_err(|error| error.to_string())
    }

    pub(super) fn fence_attachment(&mut self, attachment_id: Uuid, reply: Sender<Result<(), FenceError>>) {
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

    pub(super) fn fence_named_writers(&mut self, volume_uid: Uuid, reply: Sender<Result<(), FenceError>>) {
        let writers = self.connections.iter().filter(|(_, known)| is_named_writer(known, volume_uid));
        let writers: Vec<ConnectionId> = writers.map(|(connection, _)| *connection).collect();
        for connection in writers {
            self.close(connection);
        }
        self.wait_for(Fenced::NamedWriters(volume_uid), reply);
    }

    pub(super) fn wait_for(&mut self, what: Fenced, reply: Sender<Result<(), FenceError>>) {
        let deadline = Instant::now() + self.config.limits.fence_timeout;
        self.fence_waiters.push(FenceWaiter { deadline, reply, what });
        self.answer_drained_fences();
    }

    pub(super) fn answer_drained_fences(&mut self) {
        let waiters = std::mem::take(&mut self.fence_waiters);
        let (drained, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| self.is_drained(waiter.what));
        self.fence_waiters = waiting;
        for waiter in drained {
            let _ = waiter.reply.send(Ok(()));
            self.forget(waiter.what);
        }
    }

    pub(super) fn is_drained(&self, what: Fenced) -> bool {
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
    pub(super) fn forget(&mut self, what: Fenced) {
        if let Fenced::Attachment(attachment_id) = what
            && matches!(self.catalog.attachment(attachment_id), Ok(None))
        {
            self.fences.remove(&attachment_id);
            self.left_at.remove(&attachment_id);
        }
    }
}

fn is_named_writer(known: &Known, volume_uid: Uuid) -> bool {
    known.right == Right::NamedWriter && known.volume_uid == volume_uid
}
