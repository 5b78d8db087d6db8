//! The storage incarnation of each volume: told to clients, raised whenever acknowledged, unflushed writes may be gone.
//!
//! Owns: the records of this boot, one small file for each volume below `/run/volserver/<server id>`, and their agreement with
//! the catalog: it carries out what `core.rs` and `admission.rs` decide, as the simulator does. Never: decides what is a loss
//! (`history.rs` does), or what becomes of the connections (`gate/` does).
//! Called by: the openers of volumes ([`Incarnations::admit`]), the ring threads ([`Incarnations::raise`]), the gate.
//!
//! ```text
//!   a sync fails → record raised → EIO answered → catalog raised → … → opened anew: raised again
//!                  killed anywhere behind it: the next start reads the record
//! ```
//! Why a record beside the catalog: the catalog may lie on the very file system that failed, and it cannot tell that it was rolled
//! back itself. The records need not outlive the machine: the boot id, which every incarnation begins with, does the same.
//! Invariants: nobody is told of a failed sync before the record or the catalog has it; an incarnation is never lowered. A record is
//! decided and written under one lock.

pub mod admission;
pub mod core;
mod files;
mod history;
pub mod record;
mod storage;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use uuid::Uuid;

pub use history::{Loss, Record, Seen, SessionMark, Verdict, judge};

use self::admission::{Step, Withheld};
use self::core::Core;
use self::storage::Marks;
use crate::backend::device::{self, Adoptable, ToCompare};
use crate::backend::file::{self, FileVolume};
use crate::catalog::{BackendKind, Catalog, CatalogError, VolumeRecord};

/// A lock that is waited for longer is told.
const QUICK_LOCK: Duration = Duration::from_millis(100);

/// Why the records' directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// It cannot be made, read or locked.
    #[error("cannot use {path} for what has to survive a restart: {source}; choose another --runtime-dir")]
    Io {
        /// What.
        path: PathBuf,
        /// The system's own error.
        source: io::Error,
    },
    /// Another process uses it.
    #[error(
        "another volserver on this machine has the same identity ({0}): this data directory is a copy of that server's; \
         stop the other one, or start this one on another machine"
    )]
    InUse(Uuid),
}

/// Why a volume cannot be admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    /// Its file cannot be locked.
    #[error("cannot lock the volume's file: {0}")]
    Lock(io::Error),
    /// Its file cannot be looked at.
    #[error("cannot look at the volume's storage: {0}")]
    Storage(io::Error),
    /// The page cache has what the disk may not have, and keeps it.
    #[error(
        "{0}: the volume lost writes, and is not served before that is gone (unmount its file system once)"
    )]
    Cache(io::Error),
    /// The catalog cannot be read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// It could be looked at, and may not be served.
    #[error(transparent)]
    Withheld(#[from] Withheld),
}

/// What is known, and where it is kept.
#[derive(Debug)]
struct State {
    core: Core,
    /// `None`: records are kept nowhere, and what they would notice is not.
    dir: Option<PathBuf>,
    /// Records, open since their volumes are.
    files: HashMap<Uuid, File>,
}

/// What is known, and what was asked once.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Whether the file system failed to write something back before this process opened a volume.
    write_back_failed: OnceLock<bool>,
}

#[derive(Debug)]
struct Inner {
    catalog: Catalog,
    /// Held as long as the records are in use.
    _lock: Option<File>,
    shared: Arc<Shared>,
}

/// The incarnations of one server's volumes; clones share them.
#[derive(Debug, Clone)]
pub struct Incarnations {
    inner: Arc<Inner>,
}

/// A volume that is looked at.
#[derive(Clone, Copy)]
struct Looked<'a> {
    volume: &'a VolumeRecord,
    storage: Storage<'a>,
    volumes_dir: &'a Path,
}

#[derive(Clone, Copy)]
enum Storage<'a> {
    /// It is being opened.
    Opened(&'a FileVolume),
    /// It is not open, and was looked at.
    Closed(&'a Marks),
}

impl Incarnations {
    /// Reads the records of this boot below `runtime_dir`, which is made if missing; those of another boot are removed.
    ///
    /// # Errors
    /// [`RuntimeDirError`]
    pub fn open(
        catalog: Catalog,
        boot_id: String,
        process_id: String,
        runtime_dir: Option<&Path>,
    ) -> Result<Self, RuntimeDirError> {
        let server_id = catalog.server_id();
        let dir = runtime_dir.map(|dir| dir.join(server_id.to_string()));
        let (mut core, mut lock) = (Core::new(boot_id, process_id), None);
        if let Some(dir) = &dir {
            let io_error = |source| RuntimeDirError::Io { path: dir.clone(), source };
            lock = Some(files::prepare(dir).map_err(io_error)?.ok_or(RuntimeDirError::InUse(server_id))?);
            files::read_all(dir, &mut core).map_err(io_error)?;
        }
        let state = Mutex::new(State { core, dir, files: HashMap::new() });
        let shared = Arc::new(Shared { state, write_back_failed: OnceLock::new() });
        Ok(Self { inner: Arc::new(Inner { catalog, _lock: lock, shared }) })
    }

    /// The volume's incarnation as it is told.
    pub fn word(&self, volume: &VolumeRecord) -> String {
        self.state().core.word(volume)
    }

    /// Waits for the lock of a volume's file, compares the volume with what is remembered of it, raises its incarnation where that is
    /// due, and remembers it as it is now. Waits for the file system.
    ///
    /// # Errors
    /// [`AdmitError`]: it may not be served.
    pub fn admit(
        &self,
        volume: &VolumeRecord,
        opened: &FileVolume,
        volumes_dir: &Path,
    ) -> Result<(), AdmitError> {
        let looked = Looked { volume, storage: Storage::Opened(opened), volumes_dir };
        let step = self.state().core.admit(volume.volume_uid);
        self.carry_out(step, looked)
    }

    /// Asks whether the file system failed to write something back before this process opened a volume, on a thread of its own, so
    /// that the first client waits less. The thread holds nothing of the catalog.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn look_for_failed_write_back(&self, volumes_dir: &Path) -> io::Result<()> {
        if !self.state().core.may_have_failed_write_back() {
            return Ok(());
        }
        let (shared, volumes_dir) = (Arc::clone(&self.inner.shared), volumes_dir.to_owned());
        let name = "write-back".to_owned();
        std::thread::Builder::new().name(name).spawn(move || {
            shared.has_write_back_failed(&volumes_dir);
        })?;
        Ok(())
    }

    /// Looks at all volumes that something is remembered of, before anybody opens or asks for one. One that cannot be looked at
    /// is when it is opened.
    pub fn look(&self, volumes_dir: &Path, adoptable: &Adoptable) {
        let remembered = self.state().core.remembered();
        for volume_uid in remembered {
            let Ok(Some(volume)) = self.inner.catalog.volume_by_uid(volume_uid) else { continue };
            let Some(marks) = self.marks(&volume, volumes_dir, adoptable) else { continue };
            let looked = Looked { volume: &volume, storage: Storage::Closed(&marks), volumes_dir };
            let step = self.state().core.look(volume_uid);
            // The opening finds out once more.
            let _ = self.carry_out(step, looked);
        }
    }

    /// Goes through the steps of an admission.
    fn carry_out(&self, mut step: Step, looked: Looked<'_>) -> Result<(), AdmitError> {
        let volume_uid = looked.volume.volume_uid;
        loop {
            step = match step {
                Step::Lock(locking) => {
                    wait_for_lock(looked).map_err(AdmitError::Lock)?;
                    locking.locked(&self.state().core)
                }
                Step::AskWriteBack(asking) => {
                    let has_failed = self.has_write_back_failed(looked, asking.is_remembered());
                    asking.answered(has_failed)
                }
                Step::Look(looking) => {
                    let seen = self.see(looked)?;
                    let mut state = self.state();
                    let (verdict, step) = looking.seen(seen, &mut state.core);
                    tell(looked.volume, verdict);
                    state.write(volume_uid, step)
                }
                Step::EndAttachment(ending) => {
                    let attach_generation = self.end_attachment(looked.volume, ending.generation)?;
                    let mut state = self.state();
                    let step = ending.ended(attach_generation, &mut state.core);
                    state.write(volume_uid, step)
                }
                Step::DropCache(judged) => {
                    let dropped = match looked.storage {
                        Storage::Opened(file) => file.drop_page_cache(),
                        Storage::Closed(_) => Ok(()),
                    };
                    dropped.map_err(AdmitError::Cache)?;
                    let mut state = self.state();
                    let step = judged.dropped(&mut state.core);
                    state.write(volume_uid, step)
                }
                Step::Write(..) => self.state().write(volume_uid, step),
                Step::Settle(settling) => {
                    let is_in_catalog = self.settle(volume_uid).is_ok();
                    settling.settled(is_in_catalog, &mut self.state().core)
                }
                Step::Remove(removing) => {
                    self.state().remove(volume_uid);
                    removing.removed()
                }
                Step::Done(result) => return Ok(result?),
            };
        }
    }

    /// Of a volume that is not open; `None`: it cannot be looked at.
    fn marks(&self, volume: &VolumeRecord, volumes_dir: &Path, adoptable: &Adoptable) -> Option<Marks> {
        let volume_uid = volume.volume_uid;
        // Where its device is, only LVM knows.
        if volume.backend == BackendKind::Lvm {
            return None;
        }
        if volume.backend != BackendKind::Device {
            return storage::of_file(&File::open(file::path(volumes_dir, volume_uid)).ok()?).ok();
        }
        let adopted = self.inner.catalog.adopted(volume_uid).ok()??;
        match device::to_compare(adoptable, &adopted, volume.capacity_bytes).ok()? {
            ToCompare::Device(marks) => Some(storage::of_device(&marks)),
            ToCompare::RawFile(file) => storage::of_file(&file).ok(),
        }
    }

    /// The first to ask of the volumes' own file system waits until all of it is written back, and the others for that.
    fn has_write_back_failed(&self, looked: Looked<'_>, is_remembered: bool) -> bool {
        match looked.storage {
            // A device has no pages to write back.
            Storage::Opened(opened) if opened.is_adopted() => {
                is_remembered && opened.device_marks().is_none() && has_write_back_of_file_failed(opened)
            }
            Storage::Opened(_) | Storage::Closed(_) => {
                self.inner.shared.has_write_back_failed(looked.volumes_dir)
            }
        }
    }

    fn see(&self, looked: Looked<'_>) -> Result<Seen, AdmitError> {
        let Looked { volume, storage, .. } = looked;
        let Marks { superblock, file, modified } = match storage {
            Storage::Opened(file) => storage::of_volume(file).map_err(AdmitError::Storage)?,
            Storage::Closed(marks) => marks.clone(),
        };
        Ok(Seen {
            incarnation: volume.incarnation,
            attach_generation: self.inner.catalog.attach_generation(volume.volume_uid)?,
            superblock,
            file,
            modified,
            session: self.session(volume.volume_uid)?,
            write_back_failed: false,
        })
    }

    fn session(&self, volume_uid: Uuid) -> Result<SessionMark, CatalogError> {
        let held = self.inner.catalog.attachments_of_volume(volume_uid)?;
        // Where several share the volume one of them is as good as another: if it moves on, the volume was somebody's meanwhile.
        Ok(held.first().map_or_else(
            || SessionMark { attachment_id: String::new(), epoch: 0 },
            |(held, _)| SessionMark {
                attachment_id: held.attachment_id.to_string(),
                epoch: held.session_epoch,
            },
        ))
    }

    /// Whose volume was rolled back loses it; gives the generation that the volume has then.
    fn end_attachment(&self, volume: &VolumeRecord, generation: u64) -> Result<u64, CatalogError> {
        let volume_uid = volume.volume_uid;
        if self.inner.catalog.end_rolled_back(volume_uid, generation)? {
            warn!(
                name = %volume.name, %volume_uid,
                "the volume is not what its holder knows: its attachment has ended, and has to be made anew"
            );
        }
        self.inner.catalog.attach_generation(volume_uid)
    }

    /// The volume has been opened under an attachment of this generation: no older one may come back.
    pub fn opened_under(&self, volume_uid: Uuid, generation: u64) {
        let mut state = self.state();
        if state.core.opened_under(volume_uid, generation).is_some() {
            state.rewrite(volume_uid);
        }
    }

    /// A sync of the volume failed: raised in the record, at once. False: it is recorded nowhere yet. Does not wait, but for
    /// the runtime directory's own file system, which is in memory.
    #[must_use = "nobody may be told of a failure that is not recorded"]
    pub fn raise(&self, volume_uid: Uuid) -> bool {
        let mut state = self.state();
        state.core.raise(volume_uid);
        state.rewrite(volume_uid);
        state.core.is_recorded(volume_uid, false)
    }

    /// The same for a volume that may not be open, on a thread that may wait: in the record, and in the catalog.
    ///
    /// # Errors
    /// It is recorded nowhere.
    pub fn raise_and_settle(&self, volume: &VolumeRecord) -> Result<(), CatalogError> {
        let volume_uid = volume.volume_uid;
        {
            let mut state = self.state();
            state.core.raise_above(volume);
            state.rewrite(volume_uid);
        }
        self.settle(volume_uid)
            .or_else(|error| if self.is_recorded(volume_uid, false) { Ok(()) } else { Err(error) })
    }

    /// Brings the catalog up to what is known.
    ///
    /// # Errors
    /// The catalog's.
    pub fn settle(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        let incarnation = self.state().core.incarnation(volume_uid);
        self.inner.catalog.raise_incarnation_to(volume_uid, incarnation).inspect_err(
            |error| error!(%volume_uid, incarnation, %error, "the catalog cannot take the incarnation"),
        )
    }

    /// Whether what is known is in the record too, or `is_in_catalog`.
    pub fn is_recorded(&self, volume_uid: Uuid, is_in_catalog: bool) -> bool {
        self.state().core.is_recorded(volume_uid, is_in_catalog)
    }

    /// The volume's last operation has ended, and the server is about to.
    pub fn closed(&self, volume_uid: Uuid, file: &FileVolume) {
        let modified = storage::of_volume(file).ok().map(|marks| marks.modified);
        let session = self.session(volume_uid).ok();
        let mut state = self.state();
        if state.core.closed(volume_uid, modified, session).is_some() {
            state.rewrite(volume_uid);
        }
    }

    /// The server itself is about to change the volume's file, which may not be open: its time of writing says nothing any more.
    pub fn changes(&self, volume_uid: Uuid) {
        let mut state = self.state();
        if state.core.changes(volume_uid).is_some() {
            state.rewrite(volume_uid);
        }
    }

    /// The volume is no more.
    pub fn forget(&self, volume_uid: Uuid) {
        let mut state = self.state();
        state.core.forget(volume_uid);
        state.remove(volume_uid);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.shared.state()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks once; who asks meanwhile waits for the answer. A failure is told once by the kernel, so it is remembered of all volumes.
    fn has_write_back_failed(&self, volumes_dir: &Path) -> bool {
        *self.write_back_failed.get_or_init(|| {
            let Err(error) = storage::sync_file_system(volumes_dir) else { return false };
            error!(%error, "the volumes' file system has failed to write something back");
            let mut state = self.state();
            let changed = state.core.write_back_failed();
            changed.into_iter().for_each(|volume_uid| state.rewrite(volume_uid));
            true
        })
    }
}

impl State {
    /// A record that is to be written is.
    fn write(&mut self, volume_uid: Uuid, step: Step) -> Step {
        let Step::Write(record, writing) = step else { return step };
        self.files.remove(&volume_uid);
        let replaced = self
            .dir
            .as_ref()
            .map(|dir| files::replace(&files::path(dir, volume_uid), self.core.boot_id(), &record));
        let is_written = match replaced {
            Some(Ok(file)) => {
                self.files.insert(volume_uid, file);
                true
            }
            Some(Err(error)) => {
                warn!(%volume_uid, %error, "what is known of the volume's storage cannot be kept");
                false
            }
            None => false,
        };
        writing.written(is_written, &mut self.core)
    }

    /// Writes the volume's record over the one in its file. What cannot be written stays as it was.
    fn rewrite(&mut self, volume_uid: Uuid) {
        let Self { core, dir: Some(dir), files } = self else { return };
        let Some(record) = core.record(volume_uid) else { return };
        let written = match files.get(&volume_uid) {
            Some(file) => files::write(file, core.boot_id(), record),
            None => files::rewrite(&files::path(dir, volume_uid), core.boot_id(), record),
        };
        match written {
            Ok(()) => core.written(volume_uid, true),
            Err(error) => error!(%volume_uid, %error, "what is known of the volume's storage cannot be kept"),
        }
    }

    fn remove(&mut self, volume_uid: Uuid) {
        self.files.remove(&volume_uid);
        if let Some(dir) = &self.dir {
            let _ = std::fs::remove_file(files::path(dir, volume_uid));
        }
    }
}

/// The same of the file system of one file, which is not the volumes' own.
fn has_write_back_of_file_failed(file: &FileVolume) -> bool {
    let synced = storage::sync_file_system_of(file.file());
    synced
        .inspect_err(
            |error| error!(%error, "the file system of an adopted file has failed to write something back"),
        )
        .is_err()
}

fn wait_for_lock(looked: Looked<'_>) -> io::Result<()> {
    let Storage::Opened(opened) = looked.storage else { return Ok(()) };
    // Who opened it has it alone.
    if opened.is_adopted() {
        return Ok(());
    }
    let began = Instant::now();
    opened.lock()?;
    let waited = began.elapsed();
    if waited > QUICK_LOCK {
        info!(volume_uid = %looked.volume.volume_uid, ?waited, "waited for a predecessor's I/O");
    }
    Ok(())
}

/// Says what was noticed.
fn tell(volume: &VolumeRecord, verdict: Option<Verdict>) {
    let Some(Verdict { loss: Some(loss), incarnation, .. }) = verdict else { return };
    let volume_uid = volume.volume_uid;
    warn!(name = %volume.name, %volume_uid, %loss, incarnation, "what was written and not flushed may be gone: clients are told");
}

#[cfg(test)]
mod tests;
