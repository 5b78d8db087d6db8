//! How an open comes to its answer: names, secrets, limits, volumes.
//!
//! Owns: the steps from an export's name to the answer. What an attachment's GO waits for is in `fencing.rs`, and what becomes of a
//! volume that lost writes in `retiring.rs`.

use std::collections::VecDeque;
use std::time::Instant;

use proto::export_name::{AttachmentExportName, PROBE_SLOT};
use proto::nbd::ExportInfo;
use proto::nbd::handshake::server::{OpenKind, Refusal};
use proto::nbd::validate::RequestLimits;
use uuid::Uuid;

use super::core::{Core, Known, Right, VolumeState};
use super::events::{
    AfterLoss, Asked, CatalogFailed, Claim, Found, Granted, NamedVolume, NotCopied, NotServed, Output,
};
use super::fence::Go;
use crate::catalog::{AttachmentRecord, VolumeRecord};
use crate::data::admission::NotAdmitted;
use crate::ids::ConnectionId;
use crate::volume::Volume;

impl Core {
    pub(super) fn open(&mut self, asked: Asked, name: String, outputs: &mut VecDeque<Output>) {
        match (AttachmentExportName::parse(&name), asked.beyond) {
            (Some(name), _) => outputs.push_back(Output::FindAttachment { asked, name }),
            (None, Some(limit)) if asked.kind != OpenKind::Info => {
                self.refuse_open(&asked, limit_refusal(limit), outputs);
            }
            // What the certificate does not name is not there for its holder.
            (None, _) if !self.bounds.export_by_name || !asked.rights.may_open(&name, None) => {
                self.refuse_open(&asked, unknown_export(), outputs);
            }
            (None, _) => outputs.push_back(Output::FindName { asked, name }),
        }
    }

    pub(super) fn attachment_found(
        &mut self,
        asked: Asked,
        name: AttachmentExportName,
        found: Found<AttachmentRecord>,
        outputs: &mut VecDeque<Output>,
    ) {
        // Whether the id or the secret is wrong is not for the peer to know.
        match there(found.map(|found| found.filter(|found| found.secret == name.secret))) {
            Ok(attachment) => outputs.push_back(Output::FindExport(Claim { asked, name, attachment }.into())),
            Err(refusal) => self.refuse_open(&asked, refusal, outputs),
        }
    }

    pub(super) fn export_found(
        &mut self,
        now: Instant,
        claim: Claim,
        found: Found<VolumeRecord>,
        outputs: &mut VecDeque<Output>,
    ) {
        let checked = there(found).and_then(|volume| {
            self.check_claim(&claim, &volume)?;
            Ok(volume.settings.is_read_only)
        });
        let is_read_only = match checked {
            Ok(is_read_only) => is_read_only,
            Err(refusal) => return self.refuse_open(&claim.asked, refusal, outputs),
        };
        let Claim { asked, name, attachment } = claim;
        let (attachment_id, volume_uid) = (attachment.attachment_id, attachment.volume_uid);
        let right = Right::Attachment { attachment_id };
        let known = self.remember(now, &asked, right, volume_uid, attachment.read_only || is_read_only);
        known.is_probe = name.slot == PROBE_SLOT;
        if asked.kind == OpenKind::Info {
            return self.find_volume(asked.connection, outputs);
        }
        let go = Go {
            connection: asked.connection,
            epoch: name.epoch,
            slot: name.slot,
            generation: attachment.generation,
            epoch_in_catalog: attachment.session_epoch,
        };
        outputs.push_back(Output::OpenedUnder { volume_uid, generation: attachment.generation });
        let mut fence_outputs = Vec::new();
        self.fences.entry(attachment_id).or_default().go(go, &mut fence_outputs);
        self.carry_out(attachment_id, fence_outputs, outputs);
    }

    /// Whether who has the secret may have the volume as well.
    fn check_claim(&self, claim: &Claim, volume: &VolumeRecord) -> Result<(), Refusal> {
        let Claim { asked, name, attachment } = claim;
        if !asked.rights.may_open(&volume.name, Some(&attachment.node_id)) {
            return Err(Refusal::policy("the client's certificate names neither this volume nor its node"));
        }
        let (is_probe, fence) = (name.slot == PROBE_SLOT, self.fences.get(&attachment.attachment_id));
        let is_replacement = fence.is_some_and(|fence| fence.would_replace(name.epoch, name.slot));
        match asked.beyond {
            Some(limit) if asked.kind != OpenKind::Info && !is_probe && !is_replacement => {
                Err(limit_refusal(limit))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn name_found(
        &mut self,
        now: Instant,
        asked: &Asked,
        found: Found<NamedVolume>,
        outputs: &mut VecDeque<Output>,
    ) {
        let NamedVolume { volume, is_attached } = match there(found) {
            Ok(found) => found,
            Err(refusal) => return self.refuse_open(asked, refusal, outputs),
        };
        let read_only = is_attached || volume.settings.is_read_only;
        let right = if read_only { Right::NamedReader } else { Right::NamedWriter };
        self.remember(now, asked, right, volume.volume_uid, read_only);
        self.find_volume(asked.connection, outputs);
    }

    /// Refuses an open that has come to nothing.
    fn refuse_open(&mut self, asked: &Asked, refusal: Refusal, outputs: &mut VecDeque<Output>) {
        let (connection, ring) = (asked.connection, asked.ring);
        self.connections.remove(&connection);
        outputs.push_back(Output::Refuse { connection, ring, refusal });
    }

    fn remember(
        &mut self,
        now: Instant,
        asked: &Asked,
        right: Right,
        volume_uid: Uuid,
        read_only: bool,
    ) -> &mut Known {
        let known = Known {
            ring: asked.ring,
            kind: asked.kind,
            right,
            volume_uid,
            read_only,
            deadline: Some(now + self.bounds.open_timeout),
            is_probe: false,
            has_volume: false,
            is_closing: false,
            waits_for_end: false,
        };
        self.connections.entry(asked.connection).insert_entry(known).into_mut()
    }

    /// Gives a granted connection its volume, now or when it is open.
    pub(super) fn find_volume(&mut self, connection: ConnectionId, outputs: &mut VecDeque<Output>) {
        let Some(known) = self.connections.get_mut(&connection) else { return };
        let volume_uid = known.volume_uid;
        let state = self.volumes.get(&volume_uid);
        if let Some(VolumeState::Open { has_lost_writes: true }) = state {
            // Until then it has nothing: who is granted together with it is to find the volume anew as well.
            return outputs.push_back(Output::RecordLoss { volume_uid, then: AfterLoss::Find(connection) });
        }
        known.has_volume = true;
        match state {
            // It is answered when the opener reports.
            Some(VolumeState::Opening) => {}
            Some(VolumeState::Open { .. }) => self.answer(connection, volume_uid, outputs),
            None => self.start_opening(volume_uid, outputs),
        }
    }

    pub(super) fn start_opening(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        self.volumes.insert(volume_uid, VolumeState::Opening);
        outputs.push_back(Output::Open { volume_uid });
    }

    pub(super) fn volume_opened(
        &mut self,
        now: Instant,
        volume_uid: Uuid,
        result: Result<(), NotServed>,
        outputs: &mut VecDeque<Output>,
    ) {
        if !self.is_opening(volume_uid) {
            return;
        }
        if self.lost_while_opening.remove(&volume_uid) && result.is_ok() {
            // It is looked at anew, and not served unless the loss is recorded by then.
            self.retire(volume_uid, outputs);
            return self.start_opening(volume_uid, outputs);
        }
        // Who was refused meanwhile may wait for another volume by now, or be served with one.
        let waiting = self.connections.iter().filter(|(_, known)| known.waits_for(volume_uid));
        let waiting: Vec<ConnectionId> = waiting.map(|(connection, _)| *connection).collect();
        self.answer_copies(volume_uid, &result.clone().map_err(NotCopied::NotServed), outputs);
        match result {
            Ok(()) => {
                self.volumes.insert(volume_uid, VolumeState::Open { has_lost_writes: false });
                for connection in waiting {
                    self.answer(connection, volume_uid, outputs);
                }
            }
            Err(why) => {
                self.volumes.remove(&volume_uid);
                for connection in waiting {
                    self.give_up(now, connection, why.refusal(), outputs);
                }
            }
        }
    }

    /// Answers an open whose volume is there; a connection that has gone, was fenced, or waits for another volume gets none.
    pub(super) fn answer(
        &mut self,
        connection: ConnectionId,
        volume_uid: Uuid,
        outputs: &mut VecDeque<Output>,
    ) {
        let known = self.connections.get_mut(&connection).filter(|known| known.waits_for(volume_uid));
        let Some(known) = known else { return };
        known.deadline = None;
        outputs.push_back(Output::Answer(Granted {
            connection,
            ring: known.ring,
            volume_uid,
            kind: known.kind,
            read_only: known.read_only,
            attachment_id: known.attachment_id(),
            is_probe: known.is_probe,
        }));
    }
}

impl Granted {
    /// What the client is told of the volume, and what its requests are checked against.
    pub fn export(
        &self,
        volume: &Volume,
        record: &VolumeRecord,
        request_bytes_max: u32,
        description: String,
    ) -> (ExportInfo, RequestLimits) {
        let block_size_bytes = if self.attachment_id.is_some() { record.block_size_bytes } else { 1 };
        let mut limits = volume.limits(self.read_only, block_size_bytes);
        // It may have grown since it was opened.
        limits.size_bytes = record.capacity_bytes;
        limits.block_sizes.maximum_bytes = limits.block_sizes.maximum_bytes.min(request_bytes_max);
        let export = ExportInfo {
            size_bytes: limits.size_bytes,
            flags: limits.flags,
            block_sizes: Some(limits.block_sizes),
            description: Some(description),
        };
        (export, limits)
    }
}

fn there<T>(found: Found<T>) -> Result<T, Refusal> {
    match found {
        Ok(Some(found)) => Ok(found),
        Ok(None) => Err(unknown_export()),
        Err(CatalogFailed) => Err(NotServed::Catalog.refusal()),
    }
}

fn limit_refusal(limit: NotAdmitted) -> Refusal {
    Refusal::policy(format!("{limit}; try again when others have left"))
}

fn unknown_export() -> Refusal {
    NotServed::Unknown.refusal()
}
