//! How an open comes to its answer: names, secrets, volumes.
//!
//! Owns: the steps from an export's name to the answer that the ring gets. What an attachment's GO waits for is in
//! `fencing.rs`. Never: blocks on storage; a thread of its own opens each volume and reports back.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use proto::export_name::{AttachmentExportName, ExportDescription, ExportRefusal, PROBE_SLOT};
use proto::nbd::ExportInfo;
use proto::nbd::handshake::server::{Open, OpenKind, Refusal};
use tracing::{error, info};
use uuid::Uuid;

use super::messages::{GateMessage, OpenError};
use super::opener::open_volume;
use super::run::{Gate, Known, Right, VolumeState};
use crate::admission::NotAdmitted;
use crate::catalog::{CatalogError, VolumeRecord};
use crate::descriptors;
use crate::fence::Go;
use crate::ids::ConnectionId;
use crate::mailbox::{Opened, RingMessage};
use crate::tls::rights::Rights;
use crate::volume::Volume;

impl Gate {
    pub(super) fn open(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        open: &Open,
        rights: &Rights,
        beyond: Option<NotAdmitted>,
    ) {
        let opened = match (AttachmentExportName::parse(&open.name), beyond) {
            (Some(name), _) => self.open_attachment(connection, ring, open.kind, &name, rights, beyond),
            (None, Some(limit)) if open.kind == OpenKind::Go => Err(limit_refusal(limit)),
            (None, _) => self.open_by_name(connection, ring, open, rights),
        };
        if let Err(refusal) = opened {
            self.connections.remove(&connection);
            self.refuse(connection, ring, refusal);
        }
    }

    pub(super) fn open_attachment(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        kind: OpenKind,
        name: &AttachmentExportName,
        rights: &Rights,
        beyond: Option<NotAdmitted>,
    ) -> Result<(), Refusal> {
        let attachment = self.catalog.attachment(name.attachment_id).map_err(catalog_refusal)?;
        // Whether the id or the secret is wrong is not for the peer to know.
        let attachment = attachment.filter(|found| found.secret == name.secret).ok_or_else(unknown_export)?;
        let volume = self.catalog.volume_by_uid(attachment.volume_uid).map_err(catalog_refusal)?;
        let volume = volume.ok_or_else(unknown_export)?;
        if !rights.may_open(&volume.name, Some(&attachment.node_id)) {
            return Err(Refusal::policy("the client's certificate names neither this volume nor its node"));
        }
        let (is_probe, fence) = (name.slot == PROBE_SLOT, self.fences.get(&attachment.attachment_id));
        let is_replacement = fence.is_some_and(|fence| fence.would_replace(name.epoch, name.slot));
        if let Some(limit) = beyond.filter(|_| kind == OpenKind::Go && !is_probe && !is_replacement) {
            return Err(limit_refusal(limit));
        }
        let right = Right::Attachment { attachment_id: attachment.attachment_id };
        let known = self.remember(connection, ring, kind, right, attachment.volume_uid, attachment.read_only);
        known.is_probe = is_probe;
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
        self.incarnations.opened_under(attachment.volume_uid, attachment.generation);
        let fence = self.fences.entry(attachment.attachment_id).or_default();
        let mut outputs = Vec::new();
        fence.go(go, &mut outputs);
        self.carry_out(attachment.attachment_id, outputs);
        Ok(())
    }

    pub(super) fn open_by_name(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        open: &Open,
        rights: &Rights,
    ) -> Result<(), Refusal> {
        // What the certificate does not name is not there for its holder.
        if !self.config.export_by_name || !rights.may_open(&open.name, None) {
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

    pub(super) fn remember(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        kind: OpenKind,
        right: Right,
        volume_uid: Uuid,
        read_only: bool,
    ) -> &mut Known {
        let deadline = Some(Instant::now() + self.config.limits.open_timeout);
        let known = Known {
            ring,
            kind,
            right,
            volume_uid,
            read_only,
            deadline,
            is_probe: false,
            has_volume: false,
            is_closing: false,
        };
        self.connections.entry(connection).insert_entry(known).into_mut()
    }

    /// Gives a granted connection its volume, now or when it is open.
    pub(super) fn find_volume(&mut self, connection: ConnectionId) {
        let Some(known) = self.connections.get_mut(&connection) else { return };
        known.has_volume = true;
        let volume_uid = known.volume_uid;
        let is_in_use = self.is_in_use(volume_uid, connection);
        match self.volumes.get_mut(&volume_uid) {
            // It is answered when the opener reports.
            Some(VolumeState::Opening) => {}
            Some(VolumeState::Open(volume)) if volume.has_lost_writes() => {
                let volume = Arc::clone(volume);
                if !self.record_loss(volume_uid) {
                    let words = "the server cannot record that the volume lost writes";
                    self.give_up(connection, Refusal::shutdown(words));
                } else if is_in_use {
                    self.answer(connection, &volume);
                } else {
                    self.volumes.remove(&volume_uid);
                    self.start_opening(volume_uid, connection);
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
    pub(super) fn is_in_use(&self, volume_uid: Uuid, but: ConnectionId) -> bool {
        self.connections
            .iter()
            .any(|(id, known)| *id != but && known.volume_uid == volume_uid && known.has_volume)
    }

    pub(super) fn start_opening(&mut self, volume_uid: Uuid, connection: ConnectionId) {
        let record = match self.catalog.volume_by_uid(volume_uid) {
            Ok(Some(record)) => record,
            Ok(None) => return self.give_up(connection, unknown_export()),
            Err(error) => return self.give_up(connection, catalog_refusal(error)),
        };
        let ring_count = self.rings.len();
        let descriptors = match self.descriptors.take(descriptors::of_volume(record.backend, ring_count)) {
            Ok(taken) => taken,
            Err(error) => {
                error!(name = %record.name, %volume_uid, %error, "a volume cannot be opened");
                return self.give_up(connection, Refusal::shutdown(error.to_string()));
            }
        };
        self.volumes.insert(volume_uid, VolumeState::Opening);
        let (config, gate) = (self.config.clone(), self.own_sender.clone());
        let incarnations = self.incarnations.clone();
        // A thread of its own, because the lock of a file is waited for as long as a predecessor's I/O takes.
        let opener = std::thread::Builder::new().name("volume-opener".into()).spawn(move || {
            let result = open_volume(&record, &config, ring_count, descriptors, &incarnations, &gate);
            let _ = gate.send(GateMessage::VolumeOpened { volume_uid, result });
        });
        if let Err(error) = opener {
            let words = format!("cannot start a thread: {error}; {}", daemon_log::THREAD_LIMITS);
            self.volume_opened(volume_uid, Err(io::Error::new(error.kind(), words).into()));
        }
    }

    pub(super) fn volume_opened(&mut self, volume_uid: Uuid, result: Result<Arc<Volume>, OpenError>) {
        if !matches!(self.volumes.get(&volume_uid), Some(VolumeState::Opening)) {
            return;
        }
        // Who was refused meanwhile may wait for another volume by now, or be served with one.
        let waiting = self.waiting_for(volume_uid);
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
                self.volumes.remove(&volume_uid);
                for connection in waiting {
                    self.give_up(connection, Refusal::shutdown("the volume's storage cannot be opened"));
                }
            }
        }
    }

    fn waiting_for(&self, volume_uid: Uuid) -> Vec<ConnectionId> {
        let waiting = self.connections.iter().filter(|(_, known)| known.waits_for(volume_uid));
        waiting.map(|(connection, _)| *connection).collect()
    }

    /// Answers an open whose volume is there; a connection that has gone, was fenced, or waits for another volume gets none.
    pub(super) fn answer(&mut self, connection: ConnectionId, volume: &Arc<Volume>) {
        let known = self.connections.get_mut(&connection).filter(|known| known.waits_for(volume.volume_uid));
        let Some(known) = known else { return };
        let record = match self.catalog.volume_by_uid(volume.volume_uid) {
            Ok(Some(record)) => record,
            Ok(None) => return self.give_up(connection, unknown_export()),
            Err(error) => return self.give_up(connection, catalog_refusal(error)),
        };
        known.deadline = None;
        let (ring, is_info) = (known.ring, known.kind == OpenKind::Info);
        let (is_attachment, is_probe) = (matches!(known.right, Right::Attachment { .. }), known.is_probe);
        let block_size_bytes = if is_attachment { record.block_size_bytes } else { 1 };
        let mut limits = volume.limits(known.read_only, block_size_bytes);
        // It may have grown since it was opened.
        limits.size_bytes = record.capacity_bytes;
        let request_bytes_max = self.config.limits.request_bytes_max;
        limits.block_sizes.maximum_bytes = limits.block_sizes.maximum_bytes.min(request_bytes_max);
        let export = ExportInfo {
            size_bytes: limits.size_bytes,
            flags: limits.flags,
            block_sizes: Some(limits.block_sizes),
            description: Some(self.description(&record)),
        };
        let volume = (!is_info).then(|| Arc::clone(volume));
        let opened = Opened { export, limits, volume, is_attachment, is_probe };
        self.post(ring, RingMessage::Opened { connection, answer: Ok(opened) });
        if is_info {
            self.connections.remove(&connection);
        }
    }

    /// What INFO and LIST tell of a volume in words.
    pub(super) fn description(&self, record: &VolumeRecord) -> String {
        let description = ExportDescription {
            server_id: self.catalog.server_id(),
            volume_uid: record.volume_uid,
            incarnation: self.incarnations.word(record),
        };
        description.to_string()
    }

    /// Refuses a connection that had been granted or was about to be. One that was answered may have I/O in flight, and is
    /// known until its ring reports it closed.
    pub(super) fn give_up(&mut self, connection: ConnectionId, refusal: Refusal) {
        if self.connections.get(&connection).is_none_or(|known| known.deadline.is_none()) {
            return;
        }
        let Some(known) = self.connections.remove(&connection) else { return };
        if !known.is_closing {
            self.refuse(connection, known.ring, refusal);
        }
        self.left(connection, &known);
    }

    /// Tells the client that it does not get the export, why, and who says so.
    pub(super) fn refuse(&self, connection: ConnectionId, ring: usize, refusal: Refusal) {
        info!(connection = connection.0, reason = refusal.text(), "an open is refused");
        let server_id = self.catalog.server_id();
        let refusal = refusal.map_text(|reason| ExportRefusal { reason, server_id }.to_string());
        self.post(ring, RingMessage::Opened { connection, answer: Err(refusal) });
    }
}

fn limit_refusal(limit: NotAdmitted) -> Refusal {
    Refusal::policy(format!("{limit}; try again when others have left"))
}

fn unknown_export() -> Refusal {
    Refusal::unknown("no such export")
}

fn catalog_refusal(error: CatalogError) -> Refusal {
    error!(%error, "the catalog failed");
    Refusal::shutdown("the server's catalog failed; try again")
}
