//! The storage incarnation of each volume: told to clients, raised whenever acknowledged, unflushed writes may be gone.
//!
//! Owns: the records of this boot, one small file for each volume below `/run/volserver/<server id>`, and their agreement with
//! the catalog. Never: decides what is a loss (`history.rs` does), or what becomes of the connections (`gate/` does).
//! Called by: the openers of volumes ([`Incarnations::admit`]), the ring threads ([`Incarnations::raise`]), the gate.
//!
//! ```text
//!   a sync fails → record raised → EIO answered → catalog raised → … → opened anew: raised again
//!                  killed anywhere behind it: the next start reads the record
//! ```
//! Why a record beside the catalog: the catalog may lie on the very file system that failed, and it cannot tell that it was rolled
//! back itself. The records need not outlive the machine: the boot id, which every incarnation begins with, does the same.
//! Invariants: nobody is told of a failed sync before the record or the catalog has it; an incarnation is never lowered.

mod history;
mod storage;

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tracing::{error, warn};
use uuid::Uuid;

pub use history::{Loss, Record, Seen, SessionMark, Verdict, judge};

use crate::backend::file::{self, FileVolume};
use crate::catalog::{BackendKind, Catalog, CatalogError, VolumeRecord};

/// Version of the records' form. What is added with a default does not raise it.
const FORMAT_VERSION: u32 = 1;
/// A record is filled up to so many bytes, so that it is changed in its place: that takes no space, even where none is left.
const RECORD_BYTES: usize = 1024;
const LOCK_FILE_NAME: &str = "lock";

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
    /// It is not what its holder knows, whose attachment has ended.
    #[error("{0}: the volume's attachment has ended")]
    RolledBack(Loss),
    /// A loss of writes was recorded while it was being opened.
    #[error("a sync of the volume failed while it was being opened")]
    Changed,
    /// It lost writes, and that can be written down nowhere.
    #[error(
        "the volume lost writes ({0}), which can be recorded neither in the catalog nor in the runtime directory"
    )]
    Unrecorded(Loss),
}

/// A record as it is in its file.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: u32,
    boot_id: String,
    #[serde(flatten)]
    record: Record,
}

/// What this process knows of a volume.
#[derive(Debug, Default)]
struct Known {
    /// The highest that anybody may have been told.
    incarnation: u64,
    /// Of this boot; replaced when the volume is opened.
    record: Option<Record>,
    /// Where it is, open since the volume is.
    file: Option<File>,
    /// The file has the record as it is here.
    is_in_file: bool,
    /// Opened by this process: what was failed to be written back before has been looked for.
    is_admitted: bool,
}

#[derive(Debug)]
struct Inner {
    boot_id: String,
    process_id: String,
    catalog: Catalog,
    /// `None`: records are kept nowhere, and what they would notice is not.
    dir: Option<PathBuf>,
    /// Held as long as the records are in use.
    _lock: Option<File>,
    volumes: Mutex<HashMap<Uuid, Known>>,
    /// Whether the file system failed to write something back before this process opened a volume.
    write_back_failed: Arc<OnceLock<bool>>,
}

/// The incarnations of one server's volumes; clones share them.
#[derive(Debug, Clone)]
pub struct Incarnations {
    inner: Arc<Inner>,
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
        let (mut volumes, mut lock) = (HashMap::new(), None);
        if let Some(dir) = &dir {
            let io_error = |source| RuntimeDirError::Io { path: dir.clone(), source };
            lock = Some(prepare(dir).map_err(io_error)?.ok_or(RuntimeDirError::InUse(server_id))?);
            volumes = read_records(dir, &boot_id).map_err(io_error)?;
        }
        // What nobody had open in this boot, nobody has written to.
        let write_back_failed: Arc<OnceLock<bool>> = Arc::default();
        if volumes.is_empty() {
            let _ = write_back_failed.set(false);
        }
        let volumes = Mutex::new(volumes);
        let inner = Inner { boot_id, process_id, catalog, dir, _lock: lock, volumes, write_back_failed };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The volume's incarnation as it is told.
    pub fn word(&self, volume: &VolumeRecord) -> String {
        let known = self.volumes().get(&volume.volume_uid).map_or(0, |known| known.incarnation);
        let number = known.max(volume.incarnation);
        let Inner { boot_id, process_id, .. } = &*self.inner;
        match volume.backend {
            BackendKind::File => format!("{boot_id}.{number}"),
            BackendKind::Memory => format!("{boot_id}.{number}.{process_id}"),
        }
    }

    /// Compares a volume that is being opened, its file locked, with what is remembered of it; raises its incarnation where that
    /// is due, and remembers it as it is now. Waits for the file system.
    ///
    /// # Errors
    /// [`AdmitError`]: it may not be served.
    pub fn admit(
        &self,
        volume: &VolumeRecord,
        file: &FileVolume,
        volumes_dir: &Path,
    ) -> Result<(), AdmitError> {
        let volume_uid = volume.volume_uid;
        let (record, is_admitted, known_before) = match self.volumes().get(&volume_uid) {
            Some(known) => (known.record.clone(), known.is_admitted, known.incarnation),
            None => (None, false, 0),
        };
        let write_back_failed = !is_admitted && self.has_write_back_failed(volumes_dir);
        let mut seen = Seen { write_back_failed, ..self.see(volume, file.file())? };
        let verdict = judge(record.as_ref(), &seen);
        self.tell(volume, &verdict, &mut seen)?;
        // Before the record is written anew: who is killed meanwhile has it dropped by the next one.
        if verdict.drops_cache {
            file.drop_page_cache().map_err(AdmitError::Cache)?;
        }
        let record = Record::of(seen, &verdict, false);
        let is_recorded = self.remember(volume_uid, record, known_before).ok_or(AdmitError::Changed)?;
        if let Some(known) = self.volumes().get_mut(&volume_uid) {
            known.is_admitted = true;
        }
        let in_catalog = self.settle(volume_uid);
        match (verdict.loss, in_catalog) {
            (Some(loss), Err(_)) if !is_recorded => Err(AdmitError::Unrecorded(loss)),
            // Who waits for it holds an attachment that has just ended.
            (Some(loss), _) if loss.is_roll_back() => Err(AdmitError::RolledBack(loss)),
            _ => Ok(()),
        }
    }

    /// Whether the file system failed to write something back before this process opened a volume. The first to ask waits until all
    /// of it is written back, and the others for that.
    fn has_write_back_failed(&self, volumes_dir: &Path) -> bool {
        has_write_back_failed(&self.inner.write_back_failed, volumes_dir)
    }

    /// Asks that on a thread of its own, so that the first client waits less. The thread holds nothing of the catalog.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn look_for_failed_write_back(&self, volumes_dir: &Path) -> io::Result<()> {
        let (asked, volumes_dir) = (Arc::clone(&self.inner.write_back_failed), volumes_dir.to_owned());
        let name = "write-back".to_owned();
        std::thread::Builder::new().name(name).spawn(move || {
            has_write_back_failed(&asked, &volumes_dir);
        })?;
        Ok(())
    }

    /// Looks at all volumes that something is remembered of, before anybody opens or asks for one. One that cannot be looked at
    /// is when it is opened.
    pub fn look(&self, volumes_dir: &Path) {
        let recorded: Vec<(Uuid, Record)> = {
            let volumes = self.volumes();
            volumes.iter().filter_map(|(uid, known)| Some((*uid, known.record.clone()?))).collect()
        };
        for (volume_uid, record) in recorded {
            let Ok(Some(volume)) = self.inner.catalog.volume_by_uid(volume_uid) else { continue };
            let Ok(file) = File::open(file::path(volumes_dir, volume_uid)) else { continue };
            let Ok(mut seen) = self.see(&volume, &file) else { continue };
            let verdict = judge(Some(&record), &seen);
            // A failed sync has raised it; the rest of that is for the opening.
            let is_news = !matches!(verdict.loss, None | Some(Loss::SyncFailed));
            if !is_news || self.tell(&volume, &verdict, &mut seen).is_err() {
                continue;
            }
            self.remember(volume_uid, Record::of(seen, &verdict, record.lost_writes), record.incarnation);
            // Where it cannot be, the record has it, or the opening finds out once more.
            let _ = self.settle(volume_uid);
        }
    }

    fn see(&self, volume: &VolumeRecord, file: &File) -> Result<Seen, AdmitError> {
        Ok(Seen {
            incarnation: volume.incarnation,
            attach_generation: self.inner.catalog.attach_generation(volume.volume_uid)?,
            superblock: storage::superblock(file),
            file: storage::identity(file).map_err(AdmitError::Storage)?,
            modified: storage::modified(file).map_err(AdmitError::Storage)?,
            session: self.session(volume.volume_uid)?,
            write_back_failed: false,
        })
    }

    fn session(&self, volume_uid: Uuid) -> Result<SessionMark, CatalogError> {
        let held = self.inner.catalog.attachment_of_volume(volume_uid)?;
        Ok(held.map_or_else(
            || SessionMark { attachment_id: String::new(), epoch: 0 },
            |(held, _)| SessionMark {
                attachment_id: held.attachment_id.to_string(),
                epoch: held.session_epoch,
            },
        ))
    }

    /// Says what was noticed; whose volume was rolled back loses it.
    fn tell(&self, volume: &VolumeRecord, verdict: &Verdict, seen: &mut Seen) -> Result<(), AdmitError> {
        let Some(loss) = verdict.loss else { return Ok(()) };
        let (volume_uid, incarnation) = (volume.volume_uid, verdict.incarnation);
        warn!(name = %volume.name, %volume_uid, %loss, incarnation, "what was written and not flushed may be gone: clients are told");
        if loss.is_roll_back() {
            let remembered = self.volumes().get(&volume_uid).and_then(|known| known.record.clone());
            let generation =
                remembered.map_or(0, |record| record.attach_generation).max(seen.attach_generation);
            if self.inner.catalog.end_rolled_back(volume_uid, generation)? {
                warn!(
                    name = %volume.name, %volume_uid,
                    "the volume is not what its holder knows: its attachment has ended, and has to be made anew"
                );
            }
            // Higher than before, so that the same roll-back is noticed again.
            seen.attach_generation = self.inner.catalog.attach_generation(volume_uid)?;
        }
        Ok(())
    }

    /// The volume has been opened under an attachment of this generation: no older one may come back.
    pub fn opened_under(&self, volume_uid: Uuid, generation: u64) {
        let mut volumes = self.volumes();
        let Some(Known { record: Some(record), file: Some(file), .. }) = volumes.get_mut(&volume_uid) else {
            return;
        };
        if record.attach_generation < generation {
            record.attach_generation = generation;
            // Without it, a catalog that is rolled back goes unnoticed, and nothing more.
            let _ = write(file, &self.inner.boot_id, record);
        }
    }

    /// A sync of the volume failed: raised in the record, at once. False: it is recorded nowhere yet. Does not wait, but for
    /// the runtime directory's own file system, which is in memory.
    #[must_use = "nobody may be told of a failure that is not recorded"]
    pub fn raise(&self, volume_uid: Uuid) -> bool {
        let mut volumes = self.volumes();
        let known = volumes.entry(volume_uid).or_default();
        known.incarnation += 1;
        let incarnation = known.incarnation;
        let Known { record: Some(record), file, is_in_file, .. } = known else { return false };
        // Also where there is no file: whoever opens the volume anew in this process has to know.
        (record.incarnation, record.lost_writes) = (incarnation, true);
        let Some(file) = file else { return false };
        let written = write(file, &self.inner.boot_id, record);
        *is_in_file = written
            .inspect_err(|error| error!(%volume_uid, %error, "a loss of writes cannot be recorded"))
            .is_ok();
        *is_in_file
    }

    /// The same for a volume that may not be open, on a thread that may wait: in the record, and in the catalog.
    ///
    /// # Errors
    /// It is recorded nowhere.
    pub fn raise_and_settle(&self, volume: &VolumeRecord) -> Result<(), CatalogError> {
        let volume_uid = volume.volume_uid;
        {
            let mut volumes = self.volumes();
            let known = volumes.entry(volume_uid).or_default();
            known.incarnation = known.incarnation.max(volume.incarnation);
        }
        let is_recorded = self.raise(volume_uid);
        self.settle(volume_uid).or_else(|error| if is_recorded { Ok(()) } else { Err(error) })
    }

    /// Brings the catalog up to what is known.
    ///
    /// # Errors
    /// The catalog's.
    pub fn settle(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        let incarnation = self.volumes().get(&volume_uid).map_or(0, |known| known.incarnation);
        self.inner.catalog.raise_incarnation_to(volume_uid, incarnation).inspect_err(
            |error| error!(%volume_uid, incarnation, %error, "the catalog cannot take the incarnation"),
        )
    }

    /// Whether what is known is in the record too.
    pub fn is_recorded(&self, volume_uid: Uuid) -> bool {
        self.volumes().get(&volume_uid).is_some_and(|known| {
            known.is_in_file
                && known.record.as_ref().is_some_and(|record| record.incarnation >= known.incarnation)
        })
    }

    /// The volume's last operation has ended, and the server is about to.
    pub fn closed(&self, volume_uid: Uuid, file: &File) {
        let session = self.session(volume_uid).ok();
        let mut volumes = self.volumes();
        let Some(Known { record: Some(record), file: Some(record_file), .. }) = volumes.get_mut(&volume_uid)
        else {
            return;
        };
        (record.modified, record.session) = (storage::modified(file).ok(), session);
        // Without it, somebody else's writes go unnoticed, and nothing more.
        let _ = write(record_file, &self.inner.boot_id, record);
    }

    /// The server itself is about to change the volume's file, which may not be open: its time of writing says nothing any more.
    pub fn changes(&self, volume_uid: Uuid) {
        let mut volumes = self.volumes();
        let Some(record) = volumes.get_mut(&volume_uid).and_then(|known| known.record.as_mut()) else {
            return;
        };
        if record.modified.take().is_none() {
            return;
        }
        let Some(dir) = &self.inner.dir else { return };
        let opened = OpenOptions::new().write(true).open(dir.join(volume_uid.to_string()));
        if let Err(error) = opened.and_then(|file| write(&file, &self.inner.boot_id, record)) {
            warn!(%volume_uid, %error, "what is known of the volume's storage cannot be kept");
        }
    }

    /// The volume is no more.
    pub fn forget(&self, volume_uid: Uuid) {
        self.volumes().remove(&volume_uid);
        if let Some(dir) = &self.inner.dir {
            let _ = std::fs::remove_file(dir.join(volume_uid.to_string()));
        }
    }

    /// Keeps a record, in memory and, where there is a place for it, in its file. False: it is not in the file. `None`: a loss was
    /// recorded since `known_before` was known, and nothing was changed.
    fn remember(&self, volume_uid: Uuid, record: Record, known_before: u64) -> Option<bool> {
        let mut volumes = self.volumes();
        let known = volumes.entry(volume_uid).or_default();
        if known.incarnation > known_before {
            return None;
        }
        known.incarnation = known.incarnation.max(record.incarnation);
        let Some(dir) = &self.inner.dir else {
            known.record = Some(record);
            return Some(false);
        };
        let written = replace(&dir.join(volume_uid.to_string()), &self.inner.boot_id, &record);
        known.record = Some(record);
        known.file = written
            .inspect_err(
                |error| warn!(%volume_uid, %error, "what is known of the volume's storage cannot be kept"),
            )
            .ok();
        known.is_in_file = known.file.is_some();
        Some(known.is_in_file)
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<Uuid, Known>> {
        self.inner.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_write_back_failed(asked: &OnceLock<bool>, volumes_dir: &Path) -> bool {
    *asked.get_or_init(|| {
        let synced = storage::sync_file_system(volumes_dir);
        synced
            .inspect_err(
                |error| error!(%error, "the volumes' file system has failed to write something back"),
            )
            .is_err()
    })
}

/// Makes the directory and locks it; `None`: somebody else has.
fn prepare(dir: &Path) -> io::Result<Option<File>> {
    if !dir.is_dir() {
        if let Some(parent) = dir.parent().filter(|parent| !parent.is_dir()) {
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(dir.join(LOCK_FILE_NAME))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The records of this boot. One that cannot be read is one of a loss: what it said is not known.
fn read_records(dir: &Path, boot_id: &str) -> io::Result<HashMap<Uuid, Known>> {
    let mut volumes = HashMap::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Some(volume_uid) = entry.file_name().to_str().and_then(|name| name.parse::<Uuid>().ok()) else {
            continue;
        };
        let text = std::fs::read(entry.path())?;
        if text.is_empty() {
            // Its server was killed before it had written it.
            std::fs::remove_file(entry.path())?;
            continue;
        }
        let stored = match serde_json::from_slice::<Stored>(&text) {
            Ok(stored) if stored.boot_id == boot_id && stored.version == FORMAT_VERSION => stored,
            // Of another boot, or of a newer program: nothing is known.
            Ok(_) => {
                std::fs::remove_file(entry.path())?;
                continue;
            }
            Err(error) => {
                warn!(%volume_uid, %error, "what was known of the volume's storage cannot be read");
                let unknown = || "unknown".to_owned();
                let record = Record {
                    incarnation: 0,
                    attach_generation: 0,
                    superblock: None,
                    file: unknown(),
                    modified: None,
                    session: None,
                    lost_writes: true,
                };
                Stored { version: FORMAT_VERSION, boot_id: boot_id.to_owned(), record }
            }
        };
        let known = Known {
            incarnation: stored.record.incarnation,
            record: Some(stored.record),
            file: None,
            is_in_file: true,
            is_admitted: false,
        };
        volumes.insert(volume_uid, known);
    }
    Ok(volumes)
}

/// Puts a new file with the record in the place of the former one; gives it, to be changed in its place from then on.
fn replace(path: &Path, boot_id: &str, record: &Record) -> io::Result<File> {
    let new = path.with_extension("new");
    let made = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new);
    let written = made.and_then(|file| {
        write(&file, boot_id, record)?;
        std::fs::rename(&new, path)?;
        Ok(file)
    });
    written.or_else(|error| {
        drop(std::fs::remove_file(&new));
        // Without room for another: what an old record says would be held against whoever writes from now on.
        let changed = OpenOptions::new().write(true).open(path).and_then(|file| {
            write(&file, boot_id, record)?;
            Ok(file)
        });
        changed.map_err(|_| {
            drop(std::fs::remove_file(path));
            error
        })
    })
}

/// Writes a record over the former one, in one piece.
fn write(file: &File, boot_id: &str, record: &Record) -> io::Result<()> {
    let stored = Stored { version: FORMAT_VERSION, boot_id: boot_id.to_owned(), record: record.clone() };
    let mut text = serde_json::to_vec(&stored)?;
    text.resize(text.len().max(RECORD_BYTES - 1), b' ');
    text.push(b'\n');
    file.write_all_at(&text, 0)
}

#[cfg(test)]
mod tests;
