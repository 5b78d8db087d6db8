//! What becomes of a volume that lost writes: it acknowledges nothing as durable any more, until the last one who has it is gone
//! and it is opened anew.
//!
//! Owns: when a loss has to be recorded, and when a volume is let go. Never: records it; that is `incarnation/`'s.
//! Invariants: a volume that lost writes is given to nobody who could find it opened anew, and to nobody at all as long as the
//! loss is recorded nowhere; it is let go before a fence lets the next one in.

use std::collections::VecDeque;
use std::time::Instant;

use uuid::Uuid;

use super::core::{Core, Known, VolumeState};
use super::events::{AfterLoss, CallId, NotCopied, NotServed, Output};
use crate::ids::ConnectionId;

impl Core {
    pub(super) fn lost_writes(&mut self, now: Instant, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        if self.has_lost(volume_uid) {
            self.withdraw_answers(now, volume_uid, outputs);
        }
        outputs.push_back(Output::RecordLoss { volume_uid, then: AfterLoss::Nothing });
        self.end_sharers(volume_uid, outputs);
    }

    /// A single writer hears of a loss by its next sync, and comes again. Where several write, one that syncs nothing would keep the volume
    /// from being opened anew for ever, and the others with it: all of them are to come again.
    fn end_sharers(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        let is_writer =
            |known: &&Known| known.volume_uid == volume_uid && known.is_served() && !known.read_only;
        let mut holders = self.connections.values().filter(is_writer).filter_map(Known::attachment_id);
        let first = holders.next();
        if holders.any(|other| Some(other) != first) {
            self.ended.insert(volume_uid);
            self.close_all(|known| known.volume_uid == volume_uid && known.is_served(), outputs);
        }
    }

    /// A sync of a volume failed that was no client's. Recorded before it is answered.
    pub(super) fn sync_failed(
        &mut self,
        volume_uid: Uuid,
        errno: i32,
        call: CallId,
        outputs: &mut VecDeque<Output>,
    ) {
        if self.has_lost(volume_uid) {
            outputs.push_back(Output::FailSyncs { volume_uid, errno });
            outputs.push_back(Output::RecordLoss { volume_uid, then: AfterLoss::Answer(call) });
            self.end_sharers(volume_uid, outputs);
        } else {
            if self.is_opening(volume_uid) {
                self.lost_while_opening.insert(volume_uid);
            }
            outputs.push_back(Output::RaiseIncarnation { call });
        }
    }

    /// Who was granted the volume and is not answered yet finds it once more: if nobody else has it, it is opened anew.
    fn withdraw_answers(&mut self, now: Instant, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        for output in outputs.iter_mut() {
            let Output::Answer(granted) = output else { continue };
            let known = self.connections.get_mut(&granted.connection);
            let known = known.filter(|known| known.volume_uid == volume_uid && !known.is_closing);
            let Some(known) = known else { continue };
            known.has_volume = false;
            known.deadline = Some(now + self.bounds.open_timeout);
            let then = AfterLoss::Find(granted.connection);
            *output = Output::RecordLoss { volume_uid, then };
        }
    }

    /// Notes that a volume lost writes; false: it is not open.
    fn has_lost(&mut self, volume_uid: Uuid) -> bool {
        match self.volumes.get_mut(&volume_uid) {
            Some(VolumeState::Open { has_lost_writes }) => {
                *has_lost_writes = true;
                true
            }
            Some(VolumeState::Opening) | None => false,
        }
    }

    /// A connection, which is known no more, has left.
    pub(super) fn left(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        known: &Known,
        outputs: &mut VecDeque<Output>,
    ) {
        let (volume_uid, attachment_id) = (known.volume_uid, known.attachment_id());
        if self.is_to_be_retired(volume_uid, Some(connection)) {
            // Before the fence lets the next one in, which is to find the volume anew.
            let then = AfterLoss::Left(connection, attachment_id);
            outputs.push_back(Output::RecordLoss { volume_uid, then });
        } else {
            self.drained(now, connection, attachment_id, outputs);
        }
    }

    /// It is known whether a loss is recorded. If it is nowhere, the connections that have the volume are closed, and it is not
    /// served until it can be.
    pub(super) fn loss_recorded(
        &mut self,
        now: Instant,
        volume_uid: Uuid,
        is_recorded: bool,
        then: AfterLoss,
        outputs: &mut VecDeque<Output>,
    ) {
        if !is_recorded {
            self.close_all(|known| known.volume_uid == volume_uid && known.is_served(), outputs);
        }
        match then {
            AfterLoss::Nothing => self.loss_known(volume_uid, is_recorded, outputs),
            AfterLoss::Find(connection) if is_recorded => {
                self.find_anew(connection, volume_uid, outputs);
            }
            AfterLoss::Find(connection) => {
                self.give_up(now, connection, NotServed::LossUnrecorded.refusal(), outputs);
            }
            AfterLoss::Left(connection, attachment_id) => {
                if is_recorded && self.is_to_be_retired(volume_uid, Some(connection)) {
                    self.retire(volume_uid, outputs);
                }
                self.loss_known(volume_uid, is_recorded, outputs);
                self.drained(now, connection, attachment_id, outputs);
                self.all_have_left(now, volume_uid, is_recorded, outputs);
            }
            AfterLoss::Copy if is_recorded => self.copy_anew(volume_uid, outputs),
            AfterLoss::Copy => {
                let result = Err(NotCopied::NotServed(NotServed::LossUnrecorded));
                self.answer_copies(volume_uid, &result, outputs);
            }
            AfterLoss::Answer(call) => {
                self.loss_known(volume_uid, is_recorded, outputs);
                outputs.push_back(Output::LossAnswered { call, is_recorded });
            }
        }
    }

    /// A volume whose loss could not be recorded at first ends connections instead of failing their syncs. One that stays in use has
    /// to hear that it is recorded now: its clients would come again for ever.
    fn loss_known(&self, volume_uid: Uuid, is_recorded: bool, outputs: &mut VecDeque<Output>) {
        let state = self.volumes.get(&volume_uid);
        if is_recorded && state == Some(&VolumeState::Open { has_lost_writes: true }) {
            outputs.push_back(Output::LossKnown { volume_uid });
        }
    }

    /// Gives a connection its volume, whose loss of writes is recorded.
    fn find_anew(&mut self, connection: ConnectionId, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        // Who was not there when the others heard of the loss, or alone then, ends what there is as they would have been.
        if self.has_other_writers(volume_uid, connection) {
            self.ended.insert(volume_uid);
            self.close_all(|known| known.volume_uid == volume_uid && known.is_served(), outputs);
        }
        let is_ending = self.ended.contains(&volume_uid) && self.is_in_use(volume_uid, Some(connection));
        let known = self.connections.get_mut(&connection).filter(|known| known.is_waiting());
        let Some(known) = known else { return };
        known.waits_for_end = is_ending;
        if is_ending {
            return;
        }
        known.has_volume = true;
        if self.is_to_be_retired(volume_uid, Some(connection)) {
            self.retire(volume_uid, outputs);
        }
        match self.volumes.get(&volume_uid) {
            Some(VolumeState::Opening) => {}
            Some(VolumeState::Open { .. }) => {
                self.loss_known(volume_uid, true, outputs);
                self.answer(connection, volume_uid, outputs);
            }
            None => self.start_opening(volume_uid, outputs),
        }
    }

    /// Whether a writer asks for a volume that lost writes, and one of another attachment is served with it.
    fn has_other_writers(&self, volume_uid: Uuid, connection: ConnectionId) -> bool {
        let asks = self.connections.get(&connection).filter(|known| known.is_waiting() && !known.read_only);
        let attachment_id = asks.and_then(Known::attachment_id);
        attachment_id.is_some()
            && self.volumes.get(&volume_uid) == Some(&VolumeState::Open { has_lost_writes: true })
            && self.connections.values().any(|known| {
                let is_other = known.attachment_id().is_some_and(|other| Some(other) != attachment_id);
                is_other && known.volume_uid == volume_uid && known.is_served() && !known.read_only
            })
    }

    /// Who came again too early finds the volume opened anew; or, if the loss is recorded nowhere, has to come once more.
    fn all_have_left(
        &mut self,
        now: Instant,
        volume_uid: Uuid,
        is_recorded: bool,
        outputs: &mut VecDeque<Output>,
    ) {
        let waiting = self
            .connections
            .iter()
            .filter(|(_, known)| known.volume_uid == volume_uid && known.waits_for_end);
        let waiting: Vec<ConnectionId> = waiting.map(|(connection, _)| *connection).collect();
        for connection in waiting {
            if is_recorded {
                self.find_volume(connection, outputs);
            } else {
                self.give_up(now, connection, NotServed::LossUnrecorded.refusal(), outputs);
            }
        }
    }

    /// Whether the volume lost writes and nobody has it, but for this connection.
    pub(super) fn is_to_be_retired(&self, volume_uid: Uuid, but: Option<ConnectionId>) -> bool {
        self.volumes.get(&volume_uid) == Some(&VolumeState::Open { has_lost_writes: true })
            && !self.is_in_use(volume_uid, but)
    }

    /// Lets a volume go, if it is open.
    pub(super) fn retire(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        self.ended.remove(&volume_uid);
        if self.volumes.remove(&volume_uid).is_some() {
            outputs.push_back(Output::Retire { volume_uid });
        }
    }
}
