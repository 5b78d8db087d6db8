//! The simulated thread of the gate: the product's own core, over a catalog, openers and mailboxes that exist only here.
//!
//! Stands for `server/src/data/gate/run.rs` and `server/src/data/gate/opener.rs`. One output of the core is carried out at a time: before the next
//! one, connections go on, and the server may be killed. What is known of losses is `incarnations.rs`'s. What holds of every answer is checked where it is given, in
//! `answers.rs`, and not by the core.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::export_name::ExportDescription;
use proto::nbd::ExportInfo;
use proto::nbd::PAYLOAD_BYTES_MAX_DEFAULT;
use proto::nbd::handshake::server::{OpenKind, Refusal};
use proto::nbd::validate::RequestLimits;
use server::backend::file::{self, CacheMode};
use server::catalog::{Content, VolumeLimits};
use server::data::gate::fence::Reason;
use server::data::gate::{
    Asked, Bounds, CallId, CatalogFailed, Core, Found, Granted, Input, NamedVolume, NotServed, Output,
};
use server::ids::ConnectionId;
use server::tls::rights::Rights;
use server::volume::controls::Controls;
use server::volume::incarnation::admission::Step;
use server::volume::{Backend, Faults, Volume};
use uuid::Uuid;

use super::answers::Answers;
use super::broken_gate::{Altered, BrokenGate};
use super::incarnations::{Admission, Incarnations};
use super::storage::{Catalog, EIO, Surroundings, look_up};
use super::{Failure, Mutant};
use crate::block_history::BLOCK_BYTES;

/// How long an open may take, in seconds: as in the product, or so short that many take too long.
const OPEN_TIMEOUTS_S: [u64; 3] = [40, 8, 2];
const FENCE_TIMEOUT: Duration = Duration::from_secs(40);

/// What a connection is told.
pub(super) enum ToRing {
    Opened { connection: ConnectionId, volume: Rc<Volume>, export: ExportInfo, limits: RequestLimits },
    Refused { connection: ConnectionId, refusal: Refusal },
    Close { connection: ConnectionId },
    GoOn { connection: ConnectionId, is_marked: bool },
}

/// What the control side waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    End(Uuid),
    NamedWriters,
    Release,
    Copy,
    SyncFailed,
}

pub(super) struct Gate {
    process: u64,
    core: Core,
    inbox: VecDeque<Input>,
    outputs: VecDeque<Output>,
    /// Nothing was told since the deadlines were checked.
    is_idle: bool,
    next_deadline: Option<Instant>,
    /// For connections, and for strangers.
    pub(super) to_rings: Vec<ToRing>,
    pub(super) to_strangers: Vec<(ConnectionId, Option<Granted>)>,
    /// Volumes that may be copied now, and the refusals.
    pub(super) to_copiers: Vec<Option<Rc<Volume>>>,
    answers: Answers,
    opening: Vec<Uuid>,
    volume: Option<Rc<Volume>>,
    /// Those of the volume, however often it is opened.
    controls: Arc<Controls>,
    /// Whether requests know that the volume is marked as written.
    pub(super) is_marked: bool,
    calls: BTreeMap<CallId, Call>,
    calls_made: u64,
    /// The attachment whose connections are all gone.
    ended: Option<Uuid>,
    incarnations: Incarnations,
    /// The volume is being admitted.
    admission: Option<Step>,
    mutant: Option<Mutant>,
    broken: BrokenGate,
}

/// Which of a process's mailboxes the strangers have.
pub(super) const STRANGERS_RING: usize = 1;

impl Gate {
    pub(super) fn new(process: u64, catalog: &Catalog, mutant: Option<Mutant>, now: Instant) -> Self {
        let open_timeout = Duration::from_secs(OPEN_TIMEOUTS_S[process as usize % OPEN_TIMEOUTS_S.len()]);
        let limits = match mutant {
            Some(Mutant::LimitIgnored) => VolumeLimits::default(),
            _ => catalog.limits,
        };
        let bounds = Bounds { open_timeout, fence_timeout: FENCE_TIMEOUT, export_by_name: true };
        Self {
            process,
            core: Core::new(bounds, now),
            inbox: VecDeque::new(),
            outputs: VecDeque::new(),
            is_idle: true,
            next_deadline: None,
            to_rings: Vec::new(),
            to_strangers: Vec::new(),
            to_copiers: Vec::new(),
            answers: Answers::new(open_timeout),
            opening: Vec::new(),
            volume: None,
            controls: Arc::new(Controls::counting_from(now, limits, Content::Written)),
            is_marked: false,
            calls: BTreeMap::new(),
            calls_made: 0,
            ended: None,
            incarnations: Incarnations::new(process, catalog, mutant),
            admission: None,
            mutant,
            broken: BrokenGate::new(mutant),
        }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// It has the volume open, and the volume lost writes.
    pub(super) fn has_lost_volume(&self) -> bool {
        self.volume.as_ref().is_some_and(|volume| volume.has_lost_writes())
    }

    /// What was answered that must not be.
    ///
    /// # Errors
    /// Says it.
    pub(super) fn take_fault(&mut self) -> Result<(), Failure> {
        self.answers.fault.take().map_or(Ok(()), |fault| Err(Failure::Error(fault)))
    }

    /// Whether it has not done yet all that the core wants.
    pub(super) fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// A request for durability was not answered, and its connection ended.
    pub(super) fn ended_without_answer(&mut self, catalog: &Catalog) {
        let has_heard = self.inbox.is_empty() && self.outputs.is_empty() && !self.incarnations.has_unheard();
        if has_heard && self.incarnations.is_recorded(catalog) {
            self.answers.broken("a loss of writes is not told although it is recorded");
        }
    }

    // ------------------------------------------------------------------------------------------------ messages

    pub(super) fn open(&mut self, connection: ConnectionId, ring: usize, kind: OpenKind, name: String) {
        let rights = Arc::new(Rights::everything());
        let asked = Asked { connection, ring, kind, rights, beyond: None };
        self.post(Input::Open { asked, name });
    }

    pub(super) fn closed(&mut self, connection: ConnectionId) {
        self.post(Input::Closed { connection });
    }

    /// A connection is about to write, and waits for the mark.
    pub(super) fn wants_mark(&mut self, connection: ConnectionId) {
        self.post(Input::WantsMark { connection });
    }

    /// A write has begun to a volume that is not marked.
    pub(super) fn written_unmarked(&mut self) {
        self.answers.broken("a volume is written to that counts as never written");
    }

    pub(super) fn reopen_attachments(&mut self, volume_uid: Uuid) {
        self.post(Input::ReopenAttachments { volume_uid });
    }

    pub(super) fn fence_named_writers(&mut self, volume_uid: Uuid) {
        let call = self.call(Call::NamedWriters);
        self.post(Input::FenceNamedWriters { volume_uid, call });
    }

    pub(super) fn release(&mut self, volume_uid: Uuid) {
        let call = self.call(Call::Release);
        self.post(Input::ReleaseVolume { volume_uid, call });
    }

    pub(super) fn copy(&mut self, volume_uid: Uuid) {
        let call = self.call(Call::Copy);
        self.post(Input::CopyVolume { volume_uid, call });
    }

    /// A sync failed that was no client's.
    pub(super) fn sync_failed(&mut self, volume_uid: Uuid) {
        let call = self.call(Call::SyncFailed);
        self.post(Input::SyncFailed { volume_uid, errno: EIO, call });
    }

    /// Whether that is recorded, or known not to be.
    pub(super) fn has_recorded_failed_sync(&self) -> bool {
        !self.calls.values().any(|call| *call == Call::SyncFailed)
    }

    /// The volume is being opened, and its lock is not waited for any more.
    pub(super) fn is_admitting(&self) -> bool {
        self.admission.as_ref().is_some_and(|step| !matches!(step, Step::Lock(_)))
    }

    /// Has an attachment fenced; true: that is done. Repeated until it is, as by the control side.
    pub(super) fn fence(&mut self, attachment_id: Uuid, world: &mut Surroundings<'_>) -> bool {
        if self.ended == Some(attachment_id) {
            return true;
        }
        if !self.calls.values().any(|call| *call == Call::End(attachment_id)) {
            world.coverage.count("an attachment is fenced");
            let call = self.call(Call::End(attachment_id));
            // The generation is looked up when it is told.
            self.post(Input::FenceAttachment { attachment_id, generation: None, call });
        }
        false
    }

    fn call(&mut self, call: Call) -> CallId {
        let id = CallId(self.calls_made);
        self.calls_made += 1;
        self.calls.insert(id, call);
        id
    }

    pub(super) fn post(&mut self, input: Input) {
        self.hear();
        self.inbox.push_back(input);
    }

    /// A loss comes before whatever is told after it.
    fn hear(&mut self) {
        if self.incarnations.take_unheard()
            && let Some(volume) = &self.volume
        {
            self.inbox.push_back(Input::LostWrites { volume_uid: volume.volume_uid });
        }
    }

    // ------------------------------------------------------------------------------------------------ the thread

    /// Goes on; false: there was nothing to do.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> bool {
        if self.incarnations.start(world) {
            return true;
        }
        let index = (!self.opening.is_empty()).then(|| world.rng.usize(..self.opening.len() * 4));
        let mut has_done = index.is_some_and(|index| index < self.opening.len() && self.opener(index, world));
        self.hear();
        loop {
            // As in the server: what is noticed only now is granted no more.
            if let Some(Output::Answer(granted)) = self.outputs.front() {
                self.hear_loss(granted.volume_uid, world);
            }
            if let Some(output) = self.outputs.pop_front() {
                world.coverage.say(|| format!("gate: {output:?}"));
                self.carry_out(output, world);
            } else if let Some(mut input) = self.inbox.pop_front() {
                if let Input::FenceAttachment { attachment_id, generation, .. } = &mut input {
                    let attachment = world.catalog.attachment(*attachment_id);
                    *generation = attachment.map(|attachment| attachment.generation);
                }
                self.tell(input, world);
                self.is_idle = false;
            } else if self.is_idle && self.next_deadline.is_none_or(|deadline| world.now < deadline) {
                return has_done;
            } else {
                if !self.is(Mutant::OpensForEver) {
                    self.core.check_deadlines(world.now, &mut self.outputs);
                }
                if self.outputs.is_empty() {
                    self.answers.check_rest(world.now);
                    self.broken.settle(world.catalog);
                    (self.is_idle, self.next_deadline) = (true, self.core.next_deadline());
                    return has_done;
                }
            }
            has_done = true;
            // Mostly it is not interrupted.
            if world.rng.u8(..4) == 0 {
                if self.has_outputs() {
                    world.coverage.count("the gate is interrupted");
                }
                return true;
            }
        }
    }

    fn tell(&mut self, input: Input, world: &mut Surroundings<'_>) {
        let Some(input) = self.broken.input(input, &mut self.outputs) else { return };
        world.coverage.say(|| format!("gate is told: {input:?}"));
        self.answers.note(&input, world.now, world.catalog);
        let lets_in = matches!(input, Input::Closed { .. } | Input::LossRecorded { .. });
        let is_open = matches!(input, Input::ExportFound { .. });
        let before = self.outputs.len();
        self.core.handle(world.now, input, &mut self.outputs);
        self.broken.add(before, &mut self.outputs);
        for output in self.outputs.iter().skip(before) {
            match output {
                Output::Close { .. } if is_open => {
                    world.coverage.count("a new connection closes an older one")
                }
                Output::Persist { .. } | Output::Open { .. } | Output::Answer(_) if lets_in => {
                    world.coverage.count("draining lets a connection in");
                }
                _ => {}
            }
        }
    }

    fn carry_out(&mut self, output: Output, world: &mut Surroundings<'_>) {
        let answer = match self.broken.output(output) {
            Altered::Do(output) => self.perform(output, world),
            Altered::Done(answer) => answer,
        };
        if let Some(answer) = answer {
            if let Some(volume_uid) = answer.asked_volume() {
                self.hear_loss(volume_uid, world);
            }
            self.tell(answer, world);
        }
    }

    /// Tells the core of a loss whose message is behind what it is about to do.
    fn hear_loss(&mut self, volume_uid: Uuid, world: &mut Surroundings<'_>) {
        let is_news = volume_uid == world.catalog.volume_uid
            && self.has_lost_volume()
            && self.core.takes_for_whole(volume_uid);
        if is_news {
            self.tell(Input::LostWrites { volume_uid }, world);
        }
    }

    /// False: the loss is recorded nowhere.
    fn record_loss(&mut self, world: &mut Surroundings<'_>) -> bool {
        let is_recorded = self.incarnations.settle(world);
        self.answers.is_recorded = self.incarnations.is_recorded(world.catalog);
        is_recorded
    }

    fn perform(&mut self, output: Output, world: &mut Surroundings<'_>) -> Option<Input> {
        match output {
            Output::FindAttachment { asked, name } => {
                let found = look_up(world, |catalog| catalog.attachment(name.attachment_id));
                if found == Ok(None) {
                    world.coverage.count("an open of an attachment that is no more");
                }
                return Some(Input::AttachmentFound { asked, name, found });
            }
            Output::FindExport(claim) => {
                let found = look_up(world, |catalog| catalog.volume(claim.attachment.volume_uid));
                return Some(Input::ExportFound { claim, found });
            }
            Output::FindName { asked, name } => {
                return Some(Input::NameFound { asked, found: named_volume(&name, world) });
            }
            Output::OpenedUnder { generation, .. } => self.incarnations.opened_under(generation),
            Output::Persist { attachment_id, epoch } => {
                let is_persisted = persist(attachment_id, epoch, world);
                return Some(Input::Persisted { attachment_id, epoch, is_persisted });
            }
            Output::Open { volume_uid } => self.opening.push(volume_uid),
            Output::Answer(granted) => {
                let (connection, result) = (granted.connection, self.answer(granted, world));
                return Some(Input::Answered { connection, result });
            }
            Output::Refuse { connection, ring, refusal } => self.refuse(connection, ring, refusal, world),
            Output::Close { connection, ring } => self.close(connection, ring),
            Output::RecordLoss { volume_uid, then } => {
                let is_recorded = self.record_loss(world);
                return Some(Input::LossRecorded { volume_uid, is_recorded, then });
            }
            Output::LossKnown { volume_uid } => {
                let volume = self.volume.as_ref().filter(|volume| volume.volume_uid == volume_uid);
                volume.inspect(|volume| volume.loss_recorded());
            }
            Output::Retire { volume_uid } => {
                world.coverage.count("a volume is let go");
                if volume_uid == world.catalog.volume_uid {
                    self.volume = None;
                }
            }
            Output::Fenced { call, result } => self.fenced(call, result.is_ok(), world),
            Output::LookWhetherGone { attachment_id } => {
                let is_gone = world.catalog.attachment(attachment_id).is_none();
                return is_gone.then_some(Input::AttachmentGone { attachment_id });
            }
            Output::CopyAnswered { call, result, .. } => {
                self.calls.remove(&call);
                let volume = self.volume.as_ref().filter(|_| result.is_ok());
                self.to_copiers.push(volume.map(Rc::clone));
            }
            Output::Released { call, result } => {
                self.calls.remove(&call);
                if result.is_ok() {
                    self.answers.released();
                }
            }
            Output::Mark { volume_uid, connection } => {
                let is_marked = self.mark(world);
                return Some(Input::Marked { volume_uid, connection, is_marked });
            }
            Output::GoOn { connection, is_marked, .. } => {
                self.to_rings.push(ToRing::GoOn { connection, is_marked });
            }
            Output::FailSyncs { volume_uid, errno } => {
                let volume = self.volume.as_ref().filter(|volume| volume.volume_uid == volume_uid);
                volume.inspect(|volume| volume.report_failed_sync(errno));
            }
            Output::RaiseIncarnation { call } => {
                world.coverage.count("a loss of a volume that is not open");
                self.incarnations.raise_and_settle(world);
                self.calls.remove(&call);
            }
            Output::LossAnswered { call, .. } => {
                self.calls.remove(&call);
            }
        }
        None
    }

    fn close(&mut self, connection: ConnectionId, ring: usize) {
        self.answers.told_to_close(connection);
        if ring == STRANGERS_RING {
            self.to_strangers.push((connection, None));
        } else {
            self.to_rings.push(ToRing::Close { connection });
        }
    }

    fn mark(&mut self, world: &mut Surroundings<'_>) -> bool {
        let is_marked = look_up(world, |_| Some(())).is_ok();
        if is_marked {
            (world.catalog.is_written, self.is_marked) = (true, true);
        } else {
            world.coverage.count("a first write cannot be recorded");
        }
        is_marked
    }

    fn fenced(&mut self, call: CallId, is_drained: bool, world: &mut Surroundings<'_>) {
        match self.calls.remove(&call) {
            Some(Call::End(attachment_id)) if is_drained => self.ended = Some(attachment_id),
            Some(Call::NamedWriters) if is_drained => self.answers.writers_fenced(),
            Some(_) if !is_drained => world.coverage.count("a fence takes too long"),
            _ => {}
        }
    }

    fn answer(&mut self, granted: Granted, world: &mut Surroundings<'_>) -> Result<(), NotServed> {
        let connection = granted.connection;
        let record = match look_up(world, |catalog| catalog.volume(granted.volume_uid)) {
            Ok(record) => record.ok_or(NotServed::Unknown)?,
            Err(CatalogFailed) => return Err(NotServed::Catalog),
        };
        let is_unrecorded = !self.incarnations.is_recorded(world.catalog);
        self.answers.given(&granted, self.has_lost_volume(), is_unrecorded, world.catalog);
        if granted.ring == STRANGERS_RING {
            world.coverage.count("a stranger is let in");
            self.to_strangers.push((connection, Some(granted)));
            return Ok(());
        }
        let volume = Rc::clone(self.volume.as_ref().ok_or(NotServed::Storage)?);
        let description = ExportDescription {
            server_id: world.catalog.server_id,
            volume_uid: world.catalog.volume_uid,
            incarnation: self.incarnations.word(&record),
        };
        let description = description.to_string();
        let (export, limits) = granted.export(&volume, &record, PAYLOAD_BYTES_MAX_DEFAULT, description);
        self.to_rings.push(ToRing::Opened { connection, volume, export, limits });
        Ok(())
    }

    fn refuse(
        &mut self,
        connection: ConnectionId,
        ring: usize,
        refusal: Refusal,
        world: &mut Surroundings<'_>,
    ) {
        self.answers.refused(connection);
        if refusal.text() == Reason::StaleEpoch.to_string() {
            world.coverage.count("an epoch that is over is refused");
        } else if refusal.text().starts_with("I/O of a former session") {
            world.coverage.count("an open takes too long");
        }
        if ring == STRANGERS_RING {
            world.coverage.count("a stranger is refused");
            self.to_strangers.push((connection, None));
        } else {
            world.coverage.count("the gate refuses");
            self.to_rings.push(ToRing::Refused { connection, refusal });
        }
    }

    // ------------------------------------------------------------------------------------------------ storage

    /// Goes on with opening a volume; true: that has ended.
    fn opener(&mut self, index: usize, world: &mut Surroundings<'_>) -> bool {
        let volume_uid = self.opening[index];
        let result = if volume_uid == world.catalog.volume_uid {
            let Some(result) = self.open_volume(world) else { return false };
            result
        } else if world.rng.u8(..8) > 0 {
            // Its storage is slow.
            return false;
        } else {
            world.rng.u8(..4).checked_sub(1).map(|_| ()).ok_or(NotServed::Storage)
        };
        self.opening.swap_remove(index);
        self.post(Input::VolumeOpened { volume_uid, result });
        true
    }

    /// Goes on with opening the volume; whether it is open, once that is known.
    fn open_volume(&mut self, world: &mut Surroundings<'_>) -> Option<Result<(), NotServed>> {
        let step = self.admission.take().unwrap_or_else(|| {
            // Descriptors are opened before the file system is asked.
            world.disk.opened(self.process);
            self.incarnations.admit(world)
        });
        match self.incarnations.carry_out(self.process, step, world) {
            Admission::Next(step) | Admission::Waits(step) => {
                self.admission = Some(step);
                None
            }
            Admission::Done(Ok(())) => {
                self.volume_admitted(world);
                Some(Ok(()))
            }
            Admission::Done(Err(_)) => Some(Err(NotServed::Storage)),
        }
    }

    fn volume_admitted(&mut self, world: &mut Surroundings<'_>) {
        let catalog = &mut *world.catalog;
        let capacity_bytes = catalog.capacity_bytes as u64;
        let (dir, volume_uid, block) = (&catalog.volumes_dir, catalog.volume_uid, BLOCK_BYTES as u32);
        let file = file::open(dir, volume_uid, capacity_bytes, block, CacheMode::Buffered, 1);
        let backend = Backend::File(file.expect("the simulation's file can be opened"));
        let skip_flush = self.is(Mutant::FlushDropped);
        let faults = Faults { skip_flush, ..Faults::default() };
        let recorder = self.incarnations.recorder(world.may_fail && world.rng.bool());
        let volume = Volume::new(
            catalog.volume_uid,
            capacity_bytes,
            backend,
            catalog.write_cache_on,
            faults,
            recorder,
        )
        .with_controls(Arc::clone(&self.controls));
        self.answers.is_recorded = self.incarnations.is_recorded(catalog);
        self.volume = Some(Rc::new(volume));
        self.is_marked = world.catalog.is_written;
    }

    /// The process ends in order: nothing is under way.
    pub(super) fn close_volumes(&self, world: &Surroundings<'_>) {
        if self.volume.is_some() {
            self.incarnations.closed(world);
        }
    }
}

fn named_volume(name: &str, world: &mut Surroundings<'_>) -> Found<NamedVolume> {
    look_up(world, |catalog| {
        let volume = catalog.volume_named(name)?;
        let is_attached = volume.volume_uid == catalog.volume_uid && catalog.attachment.is_some();
        Some(NamedVolume { volume, is_attached })
    })
}

fn persist(attachment_id: Uuid, epoch: u64, world: &mut Surroundings<'_>) -> bool {
    let is_persisted = look_up(world, |_| Some(())).is_ok();
    match world.catalog.session_epoch(attachment_id) {
        Some(recorded) if is_persisted => *recorded = epoch.max(*recorded),
        _ => world.coverage.count("an epoch cannot be recorded"),
    }
    is_persisted
}
