//! What stands for the carrying out of what the incarnations' core decides: the product's `Core` and its admissions, over a record's file,
//! a catalog and a disk that exist only here.
//!
//! Stands for `server/src/volume/incarnation/mod.rs`. One step of an admission is carried out at a time: before the next one anything may
//! happen, and the server may be killed. What is decided and written under one lock there is one step here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use server::catalog::VolumeRecord;
use server::volume::LossRecorder;
use server::volume::incarnation::admission::{Step, Withheld};
use server::volume::incarnation::core::{Core, Found};
use server::volume::incarnation::{Record, Seen, SessionMark, record};
use uuid::Uuid;

use super::Mutant;
use super::storage::{Catalog, RecordFile, Surroundings, lock, look_up};

#[derive(Debug)]
struct State {
    core: Core,
    file: Arc<Mutex<RecordFile>>,
    /// What is raised cannot be written at first.
    is_full: bool,
    /// The highest incarnation that anybody may have been told by this process.
    known: Arc<AtomicU64>,
    /// A loss that the gate has not been told of.
    is_unheard: bool,
    /// A loss that was told and not raised, for [`Mutant::LossNotRecorded`].
    is_unraised: bool,
}

/// How far an admission has come.
pub(super) enum Admission {
    /// It goes on.
    Next(Step),
    /// A predecessor's I/O is waited for.
    Waits(Step),
    /// Whether the volume may be served.
    Done(Result<(), Withheld>),
}

pub(super) struct Incarnations {
    volume_uid: Uuid,
    state: Arc<Mutex<State>>,
    /// What the file system said when it was asked.
    write_back_failed: Option<bool>,
    /// The volumes are looked at, before anybody opens one.
    starting: Option<Step>,
    /// The loss that is being recorded cannot be, for now.
    is_unrecordable: bool,
    /// The cache is still to be dropped, for [`Mutant::CacheDroppedLate`].
    drops_late: bool,
    mutant: Option<Mutant>,
}

impl Incarnations {
    /// As a process that has just started.
    pub(super) fn new(process: u64, catalog: &Catalog, mutant: Option<Mutant>) -> Self {
        let boot = if mutant == Some(Mutant::BootUntold) { 0 } else { catalog.boot };
        let mut core = Core::new(boot.to_string(), process.to_string());
        let volume_uid = catalog.volume_uid;
        {
            let mut file = lock(&catalog.record);
            let text = file.text.as_ref().filter(|_| mutant != Some(Mutant::RecordUnread));
            if let Some(Found::Stale) = text.map(|text| core.found(volume_uid, text)) {
                file.text = None;
            }
        }
        let starting = core.remembered().first().map(|volume_uid| core.look(*volume_uid));
        let (file, known) = (Arc::clone(&catalog.record), Arc::clone(&catalog.known));
        let state = State { core, file, is_full: false, known, is_unheard: false, is_unraised: false };
        Self {
            volume_uid,
            state: Arc::new(Mutex::new(state)),
            write_back_failed: None,
            starting,
            is_unrecordable: false,
            drops_late: false,
            mutant,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// As it is told.
    pub(super) fn word(&self, volume: &VolumeRecord) -> String {
        let incarnation = if self.is(Mutant::CatalogUnread) { 0 } else { volume.incarnation };
        self.state().core.word(&VolumeRecord { incarnation, ..volume.clone() })
    }

    /// The gate has not been told yet of a loss; from now on it has.
    pub(super) fn take_unheard(&self) -> bool {
        std::mem::take(&mut self.state().is_unheard)
    }

    /// Whether there is a loss that the gate has not been told of.
    pub(super) fn has_unheard(&self) -> bool {
        self.state().is_unheard
    }

    /// Whether what may be told is really recorded somewhere, by whatever this process thinks.
    pub(super) fn is_recorded(&self, catalog: &Catalog) -> bool {
        let state = self.state();
        let told = state.core.incarnation(self.volume_uid);
        let recorded = lock(&state.file).incarnation;
        !state.is_unraised && recorded.max(catalog.incarnation) >= told
    }

    // --------------------------------------------------------------------------------------------- losses

    /// What a volume that is opened now does at its first failed sync.
    pub(super) fn recorder(&self, is_full: bool) -> LossRecorder {
        self.state().is_full = is_full;
        let (state, volume_uid) = (Arc::clone(&self.state), self.volume_uid);
        let raises = !self.is(Mutant::LossNotRecorded);
        LossRecorder::new(move || {
            let mut state = lock(&state);
            state.is_unheard = true;
            if !raises {
                state.is_unraised = true;
                return true;
            }
            state.core.raise(volume_uid);
            state.rewrite(volume_uid);
            state.core.is_recorded(volume_uid, false)
        })
    }

    /// A sync failed that was no client's, of a volume that is not open: in its record where that is possible, and in the catalog.
    pub(super) fn raise_and_settle(&self, world: &mut Surroundings<'_>) {
        if let Some(volume) = world.catalog.volume(self.volume_uid) {
            let mut state = self.state();
            state.core.raise_above(&volume);
            state.rewrite(self.volume_uid);
        }
        self.settle(world);
    }

    /// The catalog is told what is known; false: it is recorded nowhere.
    pub(super) fn settle(&self, world: &mut Surroundings<'_>) -> bool {
        let is_in_catalog = self.settle_catalog(world);
        let is_recorded = self.state().core.is_recorded(self.volume_uid, is_in_catalog);
        if !is_recorded {
            world.coverage.count("a loss is recorded nowhere");
        }
        is_recorded
    }

    /// False: the catalog fails, mostly where the runtime directory does as well.
    fn settle_catalog(&self, world: &mut Surroundings<'_>) -> bool {
        let mut state = self.state();
        let is_unraised = std::mem::take(&mut state.is_unraised);
        let is_in_file = state.core.is_recorded(self.volume_uid, false);
        let has_failed = look_up(world, |_| Some(())).is_err();
        if has_failed || (!is_in_file && world.may_fail && world.rng.u8(..4) > 0) {
            return false;
        }
        let incarnation = state.core.incarnation(self.volume_uid);
        world.catalog.incarnation = world.catalog.incarnation.max(incarnation) + u64::from(is_unraised);
        true
    }

    pub(super) fn opened_under(&self, generation: u64) {
        let mut state = self.state();
        if state.core.opened_under(self.volume_uid, generation).is_some() {
            state.rewrite(self.volume_uid);
        }
    }

    /// The process ends in order.
    pub(super) fn closed(&self, world: &Surroundings<'_>) {
        let mut state = self.state();
        let (modified, session) = (world.disk.modified(), world.catalog.session());
        if state.core.closed(self.volume_uid, Some(modified), Some(session)).is_some() {
            state.rewrite(self.volume_uid);
        }
    }

    // --------------------------------------------------------------------------------------------- admission

    /// Goes on with what comes before anybody is let in; false: that is over.
    pub(super) fn start(&mut self, world: &mut Surroundings<'_>) -> bool {
        let Some(step) = self.starting.take() else { return false };
        if let Admission::Next(step) | Admission::Waits(step) = self.carry_out(0, step, world) {
            self.starting = Some(step);
        } else if self.state().core.may_have_failed_write_back() && world.rng.bool() {
            // By a thread of its own, perhaps before the first client comes.
            self.ask_write_back(world);
        }
        true
    }

    /// Begins to admit the volume, whose file is open.
    pub(super) fn admit(&mut self, world: &mut Surroundings<'_>) -> Step {
        self.is_unrecordable = world.may_fail && world.rng.u8(..4) == 0;
        self.drops_late = false;
        self.state().core.admit(self.volume_uid)
    }

    /// Carries a step of an admission out.
    pub(super) fn carry_out(&mut self, process: u64, step: Step, world: &mut Surroundings<'_>) -> Admission {
        let next = match step {
            Step::Lock(locking) => {
                if world.disk.has_predecessors(process) {
                    world.coverage.count("a volume's lock is waited for");
                    if !self.is(Mutant::NoRestartLock) {
                        return Admission::Waits(Step::Lock(locking));
                    }
                }
                locking.locked(&self.state().core)
            }
            Step::AskWriteBack(asking) => asking.answered(self.ask_write_back(world)),
            Step::Look(looking) => {
                let seen = self.see(world);
                let (verdict, step) = looking.seen(seen, &mut self.state().core);
                if verdict.is_some() {
                    world.coverage.count("what the storage lost while nobody had it open is noticed");
                }
                self.is_unrecordable &= verdict.is_some();
                step
            }
            Step::EndAttachment(ending) => {
                let generation = world.catalog.end_rolled_back(ending.generation);
                ending.ended(generation, &mut self.state().core)
            }
            Step::DropCache(judged) => {
                match self.mutant {
                    Some(Mutant::CacheKept) => {}
                    Some(Mutant::CacheDroppedLate) => self.drops_late = true,
                    _ => world.disk.drop_cache(),
                }
                judged.dropped(&mut self.state().core)
            }
            Step::Settle(settling) => {
                let is_in_catalog = !self.is_unrecordable && self.settle_catalog(world);
                settling.settled(is_in_catalog, &mut self.state().core)
            }
            Step::Remove(removing) => {
                lock(&self.state().file).text = None;
                removing.removed()
            }
            Step::Write(..) => step,
            Step::Done(result) => return Admission::Done(self.done(result, world)),
        };
        Admission::Next(self.write(next, world))
    }

    fn done(&mut self, result: Result<(), Withheld>, world: &mut Surroundings<'_>) -> Result<(), Withheld> {
        if std::mem::take(&mut self.drops_late) {
            world.disk.drop_cache();
        }
        match result {
            Err(Withheld::Unrecorded(_)) => {
                world.coverage.count("a volume is withheld because its loss is recorded nowhere");
                if self.is(Mutant::UnrecordedAdmitted) { Ok(()) } else { result }
            }
            other => other,
        }
    }

    /// Under the same lock as what was decided before.
    fn write(&mut self, step: Step, world: &mut Surroundings<'_>) -> Step {
        let Step::Write(record, writing) = step else { return step };
        let mut state = self.state();
        if self.is_unrecordable {
            world.coverage.count("a record cannot be replaced");
        } else {
            state.put(&record);
        }
        let step = writing.written(!self.is_unrecordable, &mut state.core);
        state.tell(self.volume_uid);
        step
    }

    /// Once in a process's life; a failure is told once by the kernel.
    fn ask_write_back(&mut self, world: &mut Surroundings<'_>) -> bool {
        if let Some(answer) = self.write_back_failed {
            return answer;
        }
        let has_failed = !world.disk.sync_file_system() && !self.is(Mutant::WriteBackIgnored);
        self.write_back_failed = Some(has_failed);
        if has_failed && !self.is(Mutant::WriteBackForgotten) {
            let mut state = self.state();
            for volume_uid in state.core.write_back_failed() {
                state.rewrite(volume_uid);
            }
        }
        has_failed
    }

    fn see(&self, world: &mut Surroundings<'_>) -> Seen {
        let superblock = (!self.is(Mutant::MountIgnored)).then(|| world.disk.superblock.to_string());
        Seen {
            incarnation: if self.is(Mutant::CatalogUnread) { 0 } else { world.catalog.incarnation },
            attach_generation: world.catalog.attach_generation,
            superblock,
            file: String::new(),
            modified: world.disk.modified(),
            session: world.catalog.session(),
            write_back_failed: false,
        }
    }
}

impl State {
    /// The record as it is remembered goes to its file, if there is room for what it says.
    fn rewrite(&mut self, volume_uid: Uuid) {
        if let Some(record) = self.core.record(volume_uid).cloned()
            && !(self.is_full && record.lost_writes)
            && lock(&self.file).text.is_some()
        {
            self.put(&record);
            self.core.written(volume_uid, true);
        }
        self.tell(volume_uid);
    }

    fn put(&self, record: &Record) {
        let text = record::encode(self.core.boot_id(), record).expect("a record can be said");
        *lock(&self.file) = RecordFile { text: Some(text), incarnation: record.incarnation };
    }

    /// From now on it may be told.
    fn tell(&self, volume_uid: Uuid) {
        self.known.store(self.core.incarnation(volume_uid), Ordering::Relaxed);
    }
}

impl Drop for Incarnations {
    fn drop(&mut self) {
        self.state().known.store(0, Ordering::Relaxed);
    }
}

impl Catalog {
    /// How far the sessions of the volume have come.
    fn session(&self) -> SessionMark {
        let held = self.attachment.as_ref();
        held.map_or_else(
            || SessionMark { attachment_id: String::new(), epoch: 0 },
            |held| SessionMark { attachment_id: held.attachment_id.to_string(), epoch: held.session_epoch },
        )
    }

    /// Whose volume was rolled back loses it; gives the generation that the volume has then.
    fn end_rolled_back(&mut self, generation: u64) -> u64 {
        self.attachment = None;
        self.attach_generation = self.attach_generation.max(generation) + 1;
        self.attach_generation
    }
}
