//! What follows from what the fences decide: closing, granting, recording epochs, and waiting until connections have drained.
//!
//! Owns: the steps from a fence's [`fence::Output`] to one of the gate's, and what happens when a connection is gone. Never: decides
//! who may be served; that is `fence.rs`'s.

use std::collections::VecDeque;
use std::time::Instant;

use uuid::Uuid;

use super::core::{Core, FenceWaiter, Fenced, Known, Right};
use super::events::{CallId, Output};
use super::fence::{self, Fence};
use crate::ids::ConnectionId;

impl Core {
    /// Does what a fence asks for.
    pub(super) fn carry_out(
        &mut self,
        attachment_id: Uuid,
        fence_outputs: Vec<fence::Output>,
        outputs: &mut VecDeque<Output>,
    ) {
        for output in fence_outputs {
            match output {
                fence::Output::Close(connection) => self.close(connection, outputs),
                fence::Output::Grant(connection) => self.find_volume(connection, outputs),
                fence::Output::Refuse(connection, reason) => {
                    if let Some(known) = self.connections.remove(&connection) {
                        let refusal = reason.refusal();
                        outputs.push_back(Output::Refuse { connection, ring: known.ring, refusal });
                    }
                }
                fence::Output::Persist(epoch) => outputs.push_back(Output::Persist { attachment_id, epoch }),
            }
        }
    }

    pub(super) fn persisted(
        &mut self,
        attachment_id: Uuid,
        epoch: u64,
        is_persisted: bool,
        outputs: &mut VecDeque<Output>,
    ) {
        let Some(fence) = self.fences.get_mut(&attachment_id) else { return };
        let mut more = Vec::new();
        if is_persisted {
            fence.persisted(epoch, &mut more);
        } else {
            fence.persist_failed(epoch, &mut more);
        }
        self.carry_out(attachment_id, more, outputs);
    }

    pub(super) fn close(&mut self, connection: ConnectionId, outputs: &mut VecDeque<Output>) {
        if let Some(known) = self.connections.get_mut(&connection)
            && !std::mem::replace(&mut known.is_closing, true)
        {
            outputs.push_back(Output::Close { connection, ring: known.ring });
        }
    }

    /// Closes all connections of which this is true.
    pub(super) fn close_all(&mut self, which: impl Fn(&Known) -> bool, outputs: &mut VecDeque<Output>) {
        let those = self.connections.iter().filter(|(_, known)| which(known));
        let those: Vec<ConnectionId> = those.map(|(connection, _)| *connection).collect();
        those.into_iter().for_each(|connection| self.close(connection, outputs));
    }

    /// Closes what serves attachments of a volume; nothing is refused to those who come again.
    pub(super) fn reopen_attachments(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        let is_open = |known: &Known| {
            known.volume_uid == volume_uid && known.attachment_id().is_some() && known.has_volume
        };
        self.close_all(is_open, outputs);
    }

    pub(super) fn closed(&mut self, now: Instant, connection: ConnectionId, outputs: &mut VecDeque<Output>) {
        if let Some(known) = self.connections.remove(&connection) {
            self.left(now, connection, &known, outputs);
        }
    }

    /// A connection has no part in anything any more, and its volume is as it is to be found by the next one.
    pub(super) fn drained(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        attachment_id: Option<Uuid>,
        outputs: &mut VecDeque<Output>,
    ) {
        if let Some(attachment_id) = attachment_id
            && let Some(fence) = self.fences.get_mut(&attachment_id)
        {
            self.left_at.insert(attachment_id, now);
            let mut fence_outputs = Vec::new();
            fence.drained(connection, &mut fence_outputs);
            if fence.is_forgettable() && fence_outputs.is_empty() {
                self.fences.remove(&attachment_id);
            }
            self.carry_out(attachment_id, fence_outputs, outputs);
        }
        self.answer_drained_fences(outputs);
    }

    pub(super) fn fence_attachment(
        &mut self,
        now: Instant,
        attachment_id: Uuid,
        generation: Option<u64>,
        call: CallId,
        outputs: &mut VecDeque<Output>,
    ) {
        let mut fence_outputs = Vec::new();
        self.fences.entry(attachment_id).or_default().fence_all(generation, &mut fence_outputs);
        self.carry_out(attachment_id, fence_outputs, outputs);
        self.wait_for(now, Fenced::Attachment(attachment_id), call, outputs);
    }

    pub(super) fn fence_named_writers(
        &mut self,
        now: Instant,
        volume_uid: Uuid,
        call: CallId,
        outputs: &mut VecDeque<Output>,
    ) {
        self.close_all(|known| is_named_writer(known, volume_uid), outputs);
        self.wait_for(now, Fenced::NamedWriters(volume_uid), call, outputs);
    }

    fn wait_for(&mut self, now: Instant, what: Fenced, call: CallId, outputs: &mut VecDeque<Output>) {
        let deadline = now + self.bounds.fence_timeout;
        self.fence_waiters.push(FenceWaiter { deadline, call, what });
        self.answer_drained_fences(outputs);
    }

    fn answer_drained_fences(&mut self, outputs: &mut VecDeque<Output>) {
        let waiters = std::mem::take(&mut self.fence_waiters);
        let (drained, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| self.is_drained(waiter.what));
        self.fence_waiters = waiting;
        for FenceWaiter { call, what, .. } in drained {
            outputs.push_back(Output::Fenced { call, result: Ok(()) });
            // The fence of an attachment that is no more is dropped: the catalog refuses it from now on.
            if let Fenced::Attachment(attachment_id) = what {
                outputs.push_back(Output::LookWhetherGone { attachment_id });
            }
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
}

fn is_named_writer(known: &Known, volume_uid: Uuid) -> bool {
    known.right == Right::NamedWriter && known.volume_uid == volume_uid
}
