//! The gate's thread: turns messages into inputs of the core, and what the core wants done into I/O.
//!
//! Owns: the catalog, the openers' threads, the rings' mailboxes, the log, and the volumes that are open. Never: decides who gets
//! what (`core.rs` does), or does I/O of a request; never waits for anything but its next message or deadline, and the catalog:
//! what takes time (drained connections, a backing file's lock) comes back as a message.
//! Called by: the ring threads (opens, lists, closed connections) and, through `data/server.rs`, the control side.
//! Nothing here can panic: it would take every connection of the server along.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use proto::export_name::{ExportDescription, ExportRefusal};
use proto::nbd::handshake::server::{ListedExport, OpenKind, Refusal};
use tracing::{error, info};
use uuid::Uuid;

use super::answers::{FenceError, VolumeBusy};
use super::core::{Bounds, Core};
use super::events::{
    Asked, CallId, CatalogFailed, Found, Granted, Input, NamedVolume, NotCopied, NotServed, Output,
};
use super::messages::{GateMessage, OpenError};
use super::opener::{Served, open_volume};
use crate::backend::memory::MemoryVolume;
use crate::catalog::{
    BackendKind, Catalog, CatalogError, SnapshotFilter, SnapshotKey, SnapshotState, VolumeRecord,
};
use crate::data::config::DataServerConfig;
use crate::data::dirty_bitmaps::{BitmapBase, OfferedBitmaps};
use crate::data::mailbox::{Mailbox, Opened, RingMessage};
use crate::data::maps::Maps;
use crate::descriptors::{self, Descriptors};
use crate::ids::ConnectionId;
use crate::scope::Scope;
use crate::tls::rights::Rights;
use crate::volume::controls::AllControls;
use crate::volume::copying::CopyError;
use crate::volume::incarnation::Incarnations;
use crate::volume::snapshot::files::CopyFiles;
use crate::volume::{Backend, Volume};

/// Public names that LIST gives at most; it is for people, and an answer has to end.
const LISTED_NAMES_MAX: u32 = 1000;

/// Who waits for an answer of the core.
enum Call {
    Fence(Sender<Result<(), FenceError>>),
    Release(Sender<Result<(), VolumeBusy>>),
    SyncFailed(Box<VolumeRecord>, Sender<Result<(), String>>),
    Copy(Sender<Result<Arc<Volume>, CopyError>>),
}

/// The gate with all that its thread has.
pub struct Gate {
    core: Core,
    catalog: Catalog,
    config: DataServerConfig,
    incarnations: Incarnations,
    controls: Arc<AllControls>,
    rings: Vec<Arc<Mailbox>>,
    /// For openers to report to.
    own_sender: Sender<GateMessage>,
    /// For volumes to be opened with.
    descriptors: Arc<Descriptors>,
    /// Those that the core takes for open.
    volumes: HashMap<Uuid, Arc<Volume>>,
    calls: HashMap<CallId, Call>,
    next_call: CallId,
}

impl Gate {
    /// A gate that knows nobody yet.
    pub fn new(
        catalog: Catalog,
        config: DataServerConfig,
        incarnations: Incarnations,
        controls: Arc<AllControls>,
        rings: Vec<Arc<Mailbox>>,
        own_sender: Sender<GateMessage>,
        descriptors: Arc<Descriptors>,
    ) -> Self {
        let bounds = Bounds {
            open_timeout: config.limits.open_timeout,
            fence_timeout: config.limits.fence_timeout,
            export_by_name: config.export_by_name,
        };
        Self {
            core: Core::new(bounds, Instant::now()),
            catalog,
            config,
            incarnations,
            controls,
            rings,
            own_sender,
            descriptors,
            volumes: HashMap::new(),
            calls: HashMap::new(),
            next_call: CallId(0),
        }
    }

    /// Serves messages until told to end.
    pub fn run(mut self, messages: &Receiver<GateMessage>) {
        loop {
            let message = match self.core.next_deadline() {
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

    pub(super) fn check_deadlines(&mut self, now: Instant) {
        let mut outputs = VecDeque::new();
        self.core.check_deadlines(now, &mut outputs);
        self.carry_out(outputs);
    }

    pub(super) fn handle(&mut self, message: GateMessage) {
        match message {
            GateMessage::Open { connection, ring, open, rights, beyond } => {
                let asked = Asked { connection, ring, kind: open.kind, rights, beyond };
                self.tell(Input::Open { asked, name: open.name });
            }
            GateMessage::List { connection, ring, rights } => {
                let exports = self.listed_exports(&rights);
                self.post(ring, RingMessage::Listed { connection, exports });
            }
            GateMessage::Closed { connection } => self.tell(Input::Closed { connection }),
            GateMessage::VolumeOpened { volume_uid, result } => self.volume_opened(volume_uid, result),
            GateMessage::LostWrites { volume_uid } => self.tell(Input::LostWrites { volume_uid }),
            GateMessage::SyncFailed { volume, errno, reply } => {
                let volume_uid = volume.volume_uid;
                let call = self.keep(Call::SyncFailed(volume, reply));
                self.tell(Input::SyncFailed { volume_uid, errno, call });
            }
            GateMessage::FenceAttachment { attachment_id, reply } => {
                self.fence_attachment(attachment_id, reply);
            }
            GateMessage::FenceNamedWriters { volume_uid, reply } => {
                let call = self.keep(Call::Fence(reply));
                self.tell(Input::FenceNamedWriters { volume_uid, call });
            }
            GateMessage::ReopenAttachments { volume_uid, reply } => {
                self.tell(Input::ReopenAttachments { volume_uid });
                let _ = reply.send(());
            }
            GateMessage::ReleaseVolume { volume_uid, reply } => {
                let call = self.keep(Call::Release(reply));
                self.tell(Input::ReleaseVolume { volume_uid, call });
            }
            GateMessage::CopyVolume { volume_uid, reply } => {
                let call = self.keep(Call::Copy(reply));
                self.tell(Input::CopyVolume { volume_uid, call });
            }
            GateMessage::CopyEnded { volume_uid } => self.tell(Input::CopyEnded { volume_uid }),
            GateMessage::ConnectionsOf { attachment_id, reply } => {
                let _ = reply.send(self.core.connections_of(attachment_id));
            }
            GateMessage::HolderSeen { attachment_id } => self.tell(Input::HolderSeen { attachment_id }),
            GateMessage::HolderOf { attachment_id, reply } => {
                let _ = reply.send(self.core.holder_of(attachment_id, Instant::now()));
            }
            GateMessage::ConnectionsOfVolume { volume_uid, reply } => {
                let _ = reply.send(self.core.connections_of_volume(volume_uid));
            }
            GateMessage::WritersOfVolume { volume_uid, reply } => {
                let _ = reply.send(self.core.writers_of_volume(volume_uid));
            }
            GateMessage::Mark { connection } => self.tell(Input::WantsMark { connection }),
            GateMessage::MemoryAllocated { volume_uid, reply } => {
                let memory = self.volumes.get(&volume_uid).and_then(|volume| volume.memory());
                let _ = reply.send(memory.map_or(0, MemoryVolume::allocated_bytes));
            }
            GateMessage::OpenVolume { volume_uid, reply } => {
                let _ = reply.send(self.volumes.get(&volume_uid).cloned());
            }
            GateMessage::Shutdown { .. } => {}
        }
    }

    fn tell(&mut self, input: Input) {
        let mut outputs = VecDeque::new();
        self.core.handle(Instant::now(), input, &mut outputs);
        self.carry_out(outputs);
    }

    /// Does what the core wants, and what it wants in consequence.
    fn carry_out(&mut self, mut outputs: VecDeque<Output>) {
        loop {
            // Noticed since it was granted: it is granted no more.
            if let Some(Output::Answer(granted)) = outputs.front() {
                self.hear_loss(granted.volume_uid, &mut outputs);
            }
            let Some(output) = outputs.pop_front() else { return };
            let answer = self.perform(output);
            if let Some(answer) = answer {
                if let Some(volume_uid) = answer.asked_volume() {
                    self.hear_loss(volume_uid, &mut outputs);
                }
                self.core.handle(Instant::now(), answer, &mut outputs);
            }
        }
    }

    /// Tells the core that an open volume has lost writes, if it has: the message that says so may be behind the open of who is
    /// about to get it.
    fn hear_loss(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        let volume = self.volumes.get(&volume_uid).filter(|_| self.core.takes_for_whole(volume_uid));
        if volume.is_some_and(|volume| volume.has_noticed_loss()) {
            self.core.handle(Instant::now(), Input::LostWrites { volume_uid }, outputs);
        }
    }

    /// Has a loss of writes in the catalog, if there is one; false: it is recorded nowhere.
    fn record_loss(&self, volume_uid: Uuid) -> bool {
        let is_in_catalog = self.incarnations.settle(volume_uid).is_ok();
        self.incarnations.is_recorded(volume_uid, is_in_catalog)
    }

    /// Does what the core wants; what there is to answer.
    fn perform(&mut self, output: Output) -> Option<Input> {
        match output {
            Output::FindAttachment { asked, name } => {
                let found = found(self.catalog.attachment(name.attachment_id));
                return Some(Input::AttachmentFound { asked, name, found });
            }
            Output::FindExport(claim) => {
                let found = found(self.look_up(claim.attachment.volume_uid));
                let found = found.map(|served| served.map(|served| served.record));
                return Some(Input::ExportFound { claim, found });
            }
            Output::FindName { asked, name } => {
                return Some(Input::NameFound { asked, found: found(self.named_volume(&name)) });
            }
            Output::OpenedUnder { volume_uid, generation } => {
                self.incarnations.opened_under(volume_uid, generation);
            }
            Output::Persist { attachment_id, epoch } => {
                let is_persisted = self.persist(attachment_id, epoch);
                return Some(Input::Persisted { attachment_id, epoch, is_persisted });
            }
            Output::Open { volume_uid } => {
                let result = self.start_opening(volume_uid).err().map(Err);
                return result.map(|result| Input::VolumeOpened { volume_uid, result });
            }
            Output::Answer(granted) => {
                let connection = granted.connection;
                return Some(Input::Answered { connection, result: self.answer(granted) });
            }
            Output::Refuse { connection, ring, refusal } => self.refuse(connection, ring, refusal),
            Output::Close { connection, ring } => {
                info!(connection = connection.0, "fencing a connection");
                self.post(ring, RingMessage::Close { connection });
            }
            Output::RecordLoss { volume_uid, then } => {
                let is_recorded = self.record_loss(volume_uid);
                return Some(Input::LossRecorded { volume_uid, is_recorded, then });
            }
            Output::LossKnown { volume_uid } => {
                if let Some(volume) = self.volumes.get(&volume_uid) {
                    volume.loss_recorded();
                }
            }
            Output::FailSyncs { volume_uid, errno } => {
                if let Some(volume) = self.volumes.get(&volume_uid) {
                    volume.report_failed_sync(errno);
                }
            }
            Output::RaiseIncarnation { call } => self.raise_incarnation(call),
            Output::Mark { volume_uid, connection } => {
                let is_marked = self.mark_written(volume_uid);
                return Some(Input::Marked { volume_uid, connection, is_marked });
            }
            Output::GoOn { connection, ring, is_marked } => {
                self.post(ring, RingMessage::Marked { connection, is_marked });
            }
            Output::Retire { volume_uid } => {
                self.volumes.remove(&volume_uid);
            }
            Output::Fenced { call, result } => {
                if let Some(Call::Fence(reply)) = self.calls.remove(&call) {
                    let _ = reply.send(result);
                }
            }
            Output::LookWhetherGone { attachment_id } => {
                let is_gone = matches!(self.catalog.attachment(attachment_id), Ok(None));
                return is_gone.then_some(Input::AttachmentGone { attachment_id });
            }
            Output::Released { call, result } => {
                if let Some(Call::Release(reply)) = self.calls.remove(&call) {
                    let _ = reply.send(result);
                }
            }
            Output::CopyAnswered { call, volume_uid, result } => {
                return self.copy_answered(call, volume_uid, result);
            }
            Output::LossAnswered { call, is_recorded } => self.loss_answered(call, is_recorded),
        }
        None
    }

    fn loss_answered(&mut self, call: CallId, is_recorded: bool) {
        if let Some(Call::SyncFailed(_, reply)) = self.calls.remove(&call) {
            let nowhere = || "it is recorded nowhere".to_owned();
            let _ = reply.send(is_recorded.then_some(()).ok_or_else(nowhere));
        }
    }

    fn copy_answered(
        &mut self,
        call: CallId,
        volume_uid: Uuid,
        result: Result<(), NotCopied>,
    ) -> Option<Input> {
        let is_counted = result.is_ok();
        let volume = match result {
            Ok(()) => {
                let volume = self.volumes.get(&volume_uid).map(Arc::clone);
                // The core takes it for open.
                volume.ok_or_else(|| CopyError::Failed("the volume is not open".to_owned()))
            }
            Err(NotCopied::LostWrites) => Err(CopyError::SourceLostWrites),
            Err(NotCopied::TooLate) => {
                let words = "the volume's storage waits for I/O of a former server; try again";
                Err(CopyError::Busy(words.to_owned()))
            }
            Err(NotCopied::NotServed(why)) => Err(CopyError::Failed(why.refusal().text().to_owned())),
        };
        let has_volume = volume.is_ok();
        let sent = match self.calls.remove(&call) {
            Some(Call::Copy(reply)) => reply.send(volume).is_ok(),
            _ => false,
        };
        (is_counted && !(sent && has_volume)).then_some(Input::CopyEnded { volume_uid })
    }

    fn keep(&mut self, call: Call) -> CallId {
        let id = self.next_call;
        self.next_call = CallId(id.0.wrapping_add(1));
        self.calls.insert(id, call);
        id
    }

    fn post(&self, ring: usize, message: RingMessage) {
        // It was the ring that named its number.
        if let Some(mailbox) = self.rings.get(ring) {
            mailbox.post(message);
        }
    }

    fn listed_exports(&self, rights: &Rights) -> Vec<ListedExport> {
        if !self.config.export_by_name {
            return Vec::new();
        }
        match self.named_volumes(&rights.scope_of_exports()) {
            Ok(volumes) => volumes
                .into_iter()
                .filter(|volume| rights.may_open(&volume.name, None))
                .take(LISTED_NAMES_MAX as usize)
                .map(|volume| ListedExport { description: self.description(&volume), name: volume.name })
                .collect(),
            Err(error) => {
                error!(%error, "the catalog cannot list volumes");
                Vec::new()
            }
        }
    }

    /// The volumes, and behind them the snapshots, as they can be opened by name.
    fn named_volumes(&self, scope: &Scope) -> Result<Vec<VolumeRecord>, CatalogError> {
        let mut all = self.catalog.list_volumes(scope, &BTreeMap::new(), "", LISTED_NAMES_MAX)?;
        let (filter, first) = (SnapshotFilter::default().within(scope), SnapshotKey::default());
        let snapshots = self.catalog.list_snapshots(&filter, &first, LISTED_NAMES_MAX)?;
        let ready = snapshots.iter().filter(|(_, state)| *state == SnapshotState::Ready);
        all.extend(ready.map(|(snapshot, _)| snapshot.as_volume()));
        Ok(all)
    }

    fn named_volume(&self, name: &str) -> Result<Option<NamedVolume>, CatalogError> {
        // No volume has such a name. A snapshot can only be read, as a volume that is attached.
        if name.contains('@') {
            let snapshot = self.catalog.snapshot_by_export_name(name)?;
            return Ok(
                snapshot.map(|snapshot| NamedVolume { volume: snapshot.as_volume(), is_attached: true })
            );
        }
        let Some(volume) = self.catalog.volume_by_name(name)? else { return Ok(None) };
        let is_attached = self.catalog.volume_has_attachment(volume.volume_uid)?;
        Ok(Some(NamedVolume { volume, is_attached }))
    }

    fn persist(&self, attachment_id: Uuid, epoch: u64) -> bool {
        let persisted = self.catalog.raise_session_epoch(attachment_id, epoch);
        persisted
            .inspect_err(|error| error!(%attachment_id, epoch, %error, "a session epoch cannot be recorded"))
            .is_ok()
    }

    /// Has the catalog know that a volume is written to; then its requests need not ask any more.
    fn mark_written(&self, volume_uid: Uuid) -> bool {
        let marked = self.catalog.mark_written(volume_uid);
        if let Err(error) = &marked {
            error!(%volume_uid, %error, "the first write to a volume cannot be recorded");
            return false;
        }
        self.controls.marked_written(volume_uid);
        info!(%volume_uid, "the volume is written to for the first time");
        true
    }

    /// Starts the opener of a volume, which reports when it has ended.
    fn start_opening(&self, volume_uid: Uuid) -> Result<(), NotServed> {
        let served = self.served(volume_uid)?;
        let ring_count = self.rings.len();
        let taken = self.descriptors.take(descriptors::of_volume(served.record.backend, ring_count));
        let descriptors = taken.map_err(|error| {
            error!(name = %served.record.name, %volume_uid, %error, "a volume cannot be opened");
            NotServed::Descriptors(error.to_string())
        })?;
        let (config, gate) = (self.config.clone(), self.own_sender.clone());
        let (incarnations, catalog) = (self.incarnations.clone(), self.catalog.clone());
        // Nobody sets anything of a snapshot.
        let controls = if served.is_snapshot { Arc::default() } else { self.controls.of(&served.record) };
        // A thread of its own, because the lock of a file is waited for as long as a predecessor's I/O takes.
        let opener = std::thread::Builder::new().name("volume-opener".into()).spawn(move || {
            let opened =
                open_volume(&served, &config, ring_count, descriptors, &incarnations, &catalog, &gate);
            let result = opened.map(|volume| Arc::new(volume.with_controls(controls)));
            let _ = gate.send(GateMessage::VolumeOpened { volume_uid, result });
        });
        let explain = |error: io::Error| {
            let words = format!("cannot start a thread: {error}; {}", daemon_log::THREAD_LIMITS);
            cannot_be_opened(volume_uid, &io::Error::new(error.kind(), words).into())
        };
        opener.map(|_| ()).map_err(explain)
    }

    fn volume_opened(&mut self, volume_uid: Uuid, result: Result<Arc<Volume>, OpenError>) {
        if !self.core.is_opening(volume_uid) {
            return;
        }
        let result = match result {
            Ok(volume) => {
                info!(%volume_uid, backend = volume.describe_backend(), "volume open");
                self.volumes.insert(volume_uid, volume);
                Ok(())
            }
            Err(error) => Err(cannot_be_opened(volume_uid, &error)),
        };
        self.tell(Input::VolumeOpened { volume_uid, result });
    }

    /// Answers an open with its volume, as the catalog has it now.
    fn answer(&self, granted: Granted) -> Result<(), NotServed> {
        let Granted { connection, ring, attachment_id, is_probe, .. } = granted;
        let Served { record, is_snapshot } = self.served(granted.volume_uid)?;
        let volume = self.volumes.get(&granted.volume_uid).ok_or(NotServed::Storage)?;
        let request_bytes_max = self.config.limits.request_bytes_max;
        let description = self.description(&record);
        let (export, limits) = granted.export(volume, &record, request_bytes_max, description);
        let volume = (granted.kind != OpenKind::Info).then(|| Arc::clone(volume));
        let has_map = is_snapshot && matches!(record.backend, BackendKind::File | BackendKind::Lvm);
        let bitmaps = if has_map { self.offered_bitmaps(granted.volume_uid)? } else { None };
        let opened = Opened { export, limits, volume, attachment_id, is_probe, bitmaps };
        self.post(ring, RingMessage::Opened { connection, answer: Ok(opened) });
        Ok(())
    }

    /// With what a snapshot can be compared.
    fn offered_bitmaps(&self, snapshot_uid: Uuid) -> Result<Option<OfferedBitmaps>, NotServed> {
        let siblings = self.catalog.siblings_of_snapshot(snapshot_uid, LISTED_NAMES_MAX);
        let siblings = found(siblings.map(Some)).map_err(|CatalogFailed| NotServed::Catalog)?;
        Ok(siblings.map(|siblings| OfferedBitmaps {
            bases: siblings.iter().map(BitmapBase::from).collect(),
            maps: Maps::new(CopyFiles::new(self.config.volumes_dir.clone()), Arc::clone(&self.descriptors))
                .with_pool(self.config.lvm.clone()),
        }))
    }

    /// The volume, or the snapshot, of that identity.
    fn served(&self, uid: Uuid) -> Result<Served, NotServed> {
        match found(self.look_up(uid)) {
            Ok(served) => served.ok_or(NotServed::Unknown),
            Err(CatalogFailed) => Err(NotServed::Catalog),
        }
    }

    fn look_up(&self, uid: Uuid) -> Result<Option<Served>, CatalogError> {
        if let Some(record) = self.catalog.volume_by_uid(uid)? {
            return Ok(Some(Served { record, is_snapshot: false }));
        }
        let snapshot = self.catalog.snapshot_by_uid(uid)?;
        Ok(snapshot.map(|snapshot| Served { record: snapshot.as_volume(), is_snapshot: true }))
    }

    /// What INFO and LIST tell of a volume in words.
    fn description(&self, record: &VolumeRecord) -> String {
        let description = ExportDescription {
            server_id: self.catalog.server_id(),
            volume_uid: record.volume_uid,
            incarnation: self.incarnations.word(record),
        };
        description.to_string()
    }

    /// Tells the client that it does not get the export, why, and who says so.
    fn refuse(&self, connection: ConnectionId, ring: usize, refusal: Refusal) {
        info!(connection = connection.0, reason = refusal.text(), "an open is refused");
        let server_id = self.catalog.server_id();
        let refusal = refusal.map_text(|reason| ExportRefusal { reason, server_id }.to_string());
        self.post(ring, RingMessage::Opened { connection, answer: Err(refusal) });
    }

    fn fence_attachment(&mut self, attachment_id: Uuid, reply: Sender<Result<(), FenceError>>) {
        match self.catalog.attachment(attachment_id) {
            Ok(attachment) => {
                let generation = attachment.map(|attachment| attachment.generation);
                let call = self.keep(Call::Fence(reply));
                self.tell(Input::FenceAttachment { attachment_id, generation, call });
            }
            Err(error) => {
                let _ = reply.send(Err(FenceError::Catalog(error.to_string())));
            }
        }
    }

    fn raise_incarnation(&mut self, call: CallId) {
        if let Some(Call::SyncFailed(volume, reply)) = self.calls.remove(&call) {
            let raised = self.incarnations.raise_and_settle(&volume);
            let _ = reply.send(raised.map_err(|error| error.to_string()));
        }
    }

    /// The rings have ended: nobody writes any more.
    fn close_volumes(&self) {
        for (volume_uid, volume) in &self.volumes {
            if let Backend::File(file) = &volume.backend {
                self.incarnations.closed(*volume_uid, file);
            }
        }
    }
}

/// What was looked up, for the core; what failed, for the log.
fn found<T>(looked_up: Result<Option<T>, CatalogError>) -> Found<T> {
    looked_up.map_err(|error| {
        error!(%error, "the catalog failed");
        CatalogFailed
    })
}

fn cannot_be_opened(volume_uid: Uuid, error: &OpenError) -> NotServed {
    error!(%volume_uid, %error, "a volume cannot be opened");
    NotServed::Storage
}
