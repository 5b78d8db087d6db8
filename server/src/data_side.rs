//! The data side as the lifecycle sees it: the data server, and the backing files it serves.
//!
//! Owns no state: it translates. A `memory` volume has no storage to make or remove; it begins when it is first opened and
//! ends when it is released. Called by `lifecycle/`.

mod thin;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::backend::device::{self, AdoptError, Adoptable, Found};
use crate::backend::exclusive;
use crate::backend::file::{self, FileError};
use crate::backend::lvm::{Lvm, LvmError, PoolFill, Thin};
use crate::catalog::{Adopted, BackendKind, Catalog, SnapshotRecord, VolumeRecord};
use crate::data::server::DataServer;
use crate::lifecycle::{AdoptedData, DataSide, Holder, Map, StillOpen, SyncError};
use crate::machine_memory::{Allowed, ForVolumes};
use crate::volume::copying::{CopyError, CopyHandle, CopyTarget, CopyWanted};

/// A running data server with the directory of its backing files.
#[derive(Debug)]
pub(crate) struct ServedData {
    server: Arc<DataServer>,
    volumes_dir: PathBuf,
    adoptable: Arc<Adoptable>,
    catalog: Catalog,
    lvm: Option<Arc<Lvm>>,
    syncing: Arc<Syncing>,
}

#[derive(Debug, Default)]
struct Syncing {
    syncs: Mutex<Syncs>,
    /// One has finished.
    finished: Condvar,
}

/// So long a call waits for a volume's storage, and for its turn before. What does not answer then may never, and is not to hold up the
/// calls for others.
const SYNC_LIMIT: Duration = Duration::from_secs(25);
/// So many syncs at once: half of the calls that the API has at once. More wait for their turn.
const SYNCS_MAX: usize = 16;
/// Storage on which no sync has finished for so long, while some are under way, is stuck: nobody waits for a turn there.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// So long a file's extents are looked at, or a pool's metadata: some millions of them.
const EXCLUSIVE_LIMIT: Duration = Duration::from_secs(20);

/// The syncs of all volumes. Each has a thread of its own, which may be stuck.
#[derive(Debug, Default)]
struct Syncs {
    /// Volumes whose storage is being synced, and since when.
    under_way: HashMap<Uuid, Instant>,
    finished_at: Option<Instant>,
}

/// Whether a sync may begin.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Now,
    /// Not before another has finished; to be asked again after so long.
    Wait(Duration),
    /// Nothing suggests that it would finish.
    Never,
}

/// Whether one more sync may begin beside `under_way` others, where none has finished for `stalled` while some were under way, and the
/// call has waited for its turn so long. A volume is synced once at a time.
fn turn(under_way: usize, is_of_same_volume: bool, stalled: Duration, waited: Duration) -> Turn {
    if under_way < SYNCS_MAX && !is_of_same_volume {
        return Turn::Now;
    }
    let left = STUCK_AFTER.saturating_sub(stalled).min(SYNC_LIMIT.saturating_sub(waited));
    if left.is_zero() { Turn::Never } else { Turn::Wait(left) }
}

impl Syncs {
    fn stalled(&self, now: Instant) -> Duration {
        let oldest = self.under_way.values().min().copied();
        let since = oldest.map(|oldest| self.finished_at.map_or(oldest, |at| at.max(oldest)));
        since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

impl ServedData {
    /// The catalog, what may be adopted and the thin pool are those that the server was started with.
    pub(crate) fn new(
        server: Arc<DataServer>,
        catalog: Catalog,
        adoptable: Arc<Adoptable>,
        lvm: Option<Arc<Lvm>>,
    ) -> Self {
        let volumes_dir = catalog.volumes_dir();
        Self { server, volumes_dir, adoptable, catalog, lvm, syncing: Arc::default() }
    }
}

/// A sync that fails tells, once, that acknowledged writes may be lost: the clients are to know.
fn noticed(server: &DataServer, volume: &VolumeRecord, error: FileError) -> io::Error {
    if let FileError::Sync { source, .. } = &error {
        let errno = source.raw_os_error().unwrap_or(libc::EIO);
        if let Err(unrecorded) = server.sync_failed(volume, errno) {
            return io::Error::other(format!("{error}; {unrecorded}"));
        }
    }
    io_error(error)
}

/// What a failed sync tells of the volume. LVM's tools write nothing of it: where one fails, nothing is known yet.
fn sync_error(server: &DataServer, volume: &VolumeRecord, error: FileError) -> SyncError {
    if is_of_tools(volume.backend, &error) {
        return SyncError::Unfinished(error.to_string());
    }
    noticed(server, volume, error).into()
}

fn is_of_tools(backend: BackendKind, error: &FileError) -> bool {
    backend == BackendKind::Lvm && !matches!(error, FileError::Sync { .. })
}

impl Syncing {
    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the volume's turn, and takes it; false: it has none.
    fn begin(&self, volume_uid: Uuid) -> bool {
        let (began, mut syncs) = (Instant::now(), self.syncs());
        loop {
            let now = Instant::now();
            let is_of_same_volume = syncs.under_way.contains_key(&volume_uid);
            match turn(syncs.under_way.len(), is_of_same_volume, syncs.stalled(now), now - began) {
                Turn::Now => {
                    syncs.under_way.insert(volume_uid, now);
                    return true;
                }
                Turn::Wait(at_most) => {
                    let waited = self.finished.wait_timeout(syncs, at_most);
                    syncs = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Turn::Never => return false,
            }
        }
    }

    fn end(&self, volume_uid: Uuid, has_finished: bool) {
        let mut syncs = self.syncs();
        syncs.under_way.remove(&volume_uid);
        if has_finished {
            syncs.finished_at = Some(Instant::now());
        }
        drop(syncs);
        self.finished.notify_all();
    }
}

impl ServedData {
    fn storage_to_sync(&self) -> StorageToSync {
        let (volumes_dir, adoptable) = (self.volumes_dir.clone(), Arc::clone(&self.adoptable));
        StorageToSync { volumes_dir, adoptable, catalog: self.catalog.clone(), lvm: self.lvm.clone() }
    }

    /// Syncs on a thread of its own, which is left behind where it gets stuck.
    fn sync_file(&self, volume: &VolumeRecord) -> Result<(), SyncError> {
        let (volume_uid, deadline) = (volume.volume_uid, Instant::now() + SYNC_LIMIT);
        let no_answer = || SyncError::Unfinished("its storage does not answer".to_owned());
        if !self.syncing.begin(volume_uid) {
            return Err(no_answer());
        }
        let (sender, synced) = mpsc::channel();
        let (server, syncing) = (Arc::clone(&self.server), Arc::clone(&self.syncing));
        let (storage, volume) = (self.storage_to_sync(), volume.clone());
        let spawned = std::thread::Builder::new().name("volume-sync".into()).spawn(move || {
            let result = storage.sync(&volume).map_err(|error| sync_error(&server, &volume, error));
            syncing.end(volume_uid, true);
            // Nobody may be waiting any more.
            let _ = sender.send(result);
        });
        if let Err(error) = spawned {
            self.syncing.end(volume_uid, false);
            let reason = format!("cannot start a thread: {error}; {}", daemon_log::THREAD_LIMITS);
            return Err(SyncError::Unfinished(reason));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        synced.recv_timeout(left).map_err(|_| no_answer())?
    }
}

/// What it takes to sync a volume that is not open.
struct StorageToSync {
    volumes_dir: PathBuf,
    adoptable: Arc<Adoptable>,
    catalog: Catalog,
    lvm: Option<Arc<Lvm>>,
}

impl StorageToSync {
    fn sync(&self, volume: &VolumeRecord) -> Result<(), FileError> {
        let VolumeRecord { volume_uid, capacity_bytes, .. } = *volume;
        let failed = |path: &str, source| FileError::Io { action: "cannot open", path: path.into(), source };
        let (adoptable, device) = match volume.backend {
            BackendKind::Device => {
                let adopted = self.catalog.adopted(volume_uid);
                let adopted = adopted.map_err(|error| failed(&volume.name, io::Error::other(error)))?;
                (
                    &*self.adoptable,
                    adopted.ok_or_else(|| failed(&volume.name, io::ErrorKind::NotFound.into()))?,
                )
            }
            BackendKind::Lvm => {
                let lvm = self.lvm.as_deref().ok_or(LvmError::NotConfigured);
                let located =
                    lvm.and_then(|lvm| Ok((lvm.adoptable(), lvm.locate(Thin::Volume(volume_uid))?)));
                located.map_err(|error| failed(&volume.name, io::Error::other(error)))?
            }
            BackendKind::File | BackendKind::Memory => return file::sync(&self.volumes_dir, volume_uid),
        };
        let synced = device::sync(adoptable, &device, capacity_bytes);
        let synced = synced.map_err(|error| failed(&device.path, io::Error::other(error)))?;
        synced.map_err(|source| FileError::Sync { path: device.path.into(), source })
    }
}

/// The system's error behind a file's, with its kind; what has no such is `InvalidData`.
fn io_error(error: FileError) -> io::Error {
    match &error {
        FileError::Io { source, .. } | FileError::Sync { source, .. } => {
            io::Error::new(source.kind(), error.to_string())
        }
        _ => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
    }
}

impl AdoptedData for ServedData {
    fn identities_at(&self, path: &str) -> Result<Vec<String>, AdoptError> {
        device::identities_at(&self.adoptable, path)
    }

    fn adopt(&self, path: &str) -> Result<Found, AdoptError> {
        device::adopt(&self.adoptable, path)
    }

    fn measure_adopted(
        &self,
        volume: &VolumeRecord,
        adopted: &Adopted,
        expected_bytes: Option<u64>,
    ) -> Result<u64, AdoptError> {
        if let Some(measured) = self.server.measure_volume(volume.volume_uid) {
            let (action, path) = ("measure", adopted.path.clone());
            return measured.map_err(|source| AdoptError::Io { action, path, source });
        }
        Ok(device::find(&self.adoptable, adopted, expected_bytes)?.size_bytes)
    }

    fn is_open(&self, volume_uid: Uuid) -> bool {
        self.server.measure_volume(volume_uid).is_some()
    }
}

impl DataSide for ServedData {
    fn create_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        match volume.backend {
            BackendKind::File => {
                file::create(&self.volumes_dir, volume.volume_uid, volume.capacity_bytes).map_err(io_error)
            }
            BackendKind::Lvm => {
                self.thin(|lvm| lvm.create(Thin::Volume(volume.volume_uid), volume.capacity_bytes))
            }
            // Somebody else made it.
            BackendKind::Memory | BackendKind::Device => Ok(()),
        }
    }

    fn memory_for_volumes(&self) -> ForVolumes {
        ForVolumes { allowed: Allowed::of_this_process(), data_side_bytes: self.server.memory_bytes_max() }
    }

    fn delete_storage(&self, volume_uid: Uuid) -> io::Result<()> {
        match self.catalog.thin_pool_of(volume_uid).map_err(io::Error::other)? {
            Some(pool) => self.thin_in(Some(pool), |lvm| lvm.remove(Thin::Volume(volume_uid)))?,
            None => file::delete(&self.volumes_dir, volume_uid).map_err(io_error)?,
        }
        self.server.forget_volume(volume_uid);
        Ok(())
    }

    fn stored_volumes(&self) -> io::Result<Vec<Uuid>> {
        let mut stored = file::list_uids(&self.volumes_dir).map_err(io_error)?;
        stored.extend(self.stored_thin().into_iter().filter_map(thin::volume));
        Ok(stored)
    }

    fn grow_storage(&self, volume: &VolumeRecord, capacity_bytes: u64) -> io::Result<()> {
        self.server.changes_file(volume.volume_uid);
        if volume.backend == BackendKind::Lvm {
            return self.grow_thin(volume.volume_uid, capacity_bytes);
        }
        let grown = file::grow(&self.volumes_dir, volume.volume_uid, capacity_bytes);
        grown.map_err(|error| noticed(&self.server, volume, error))
    }

    fn sync_storage(&self, volume: &VolumeRecord) -> Result<(), SyncError> {
        match volume.backend {
            BackendKind::File | BackendKind::Device | BackendKind::Lvm => self.sync_file(volume),
            BackendKind::Memory => Ok(()),
        }
    }

    fn can_copy(&self) -> Result<(), CopyError> {
        self.server.can_copy()
    }

    fn thin_pool(&self) -> Option<Result<PoolFill, CopyError>> {
        let fill = self.lvm.as_ref()?.fill();
        Some(fill.map_err(CopyError::from))
    }

    fn begin_copies(&self, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError> {
        match self.thin_copy(wanted)? {
            Some(copy) => Ok(copy),
            None => self.server.begin_copies(wanted),
        }
    }

    fn snapshot_map(&self, snapshot_uid: Uuid, capacity_bytes: u64) -> Result<Map, CopyError> {
        let is_thin = self.is_thin(CopyTarget::Snapshot(snapshot_uid));
        if is_thin.map_err(|error| CopyError::Failed(error.to_string()))? {
            return self.thin_snapshot_map(snapshot_uid, capacity_bytes);
        }
        Ok(Box::new(self.server.snapshot_map(snapshot_uid, capacity_bytes)?))
    }

    fn begin_nameless_copy(&self, volume: &VolumeRecord) -> Result<(CopyHandle, Map), CopyError> {
        if volume.backend == BackendKind::Lvm {
            return self.thin_volume_map(volume);
        }
        let (copy, map) = self.server.begin_nameless_copy(volume)?;
        Ok((copy, Box::new(map)))
    }

    fn replace_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        if volume.backend == BackendKind::Lvm {
            self.thin(|lvm| lvm.replace(volume.volume_uid))?;
            self.server.forget_volume(volume.volume_uid);
            return Ok(());
        }
        self.server.replace_file(volume.volume_uid)
    }

    fn delete_copy(&self, target: CopyTarget) -> io::Result<()> {
        match thin::of(target) {
            Some(thin) if self.is_thin(target)? => {
                self.thin_in(self.pool_of(target)?, |lvm| lvm.remove(thin))
            }
            _ => self.server.copy_files().delete(target),
        }
    }

    fn stored_copies(&self) -> io::Result<Vec<CopyTarget>> {
        let mut stored = self.server.copy_files().stored()?;
        stored.extend(self.stored_thin().into_iter().filter_map(thin::copy));
        Ok(stored)
    }

    fn snapshot_allocated_bytes(&self, snapshot: &SnapshotRecord) -> u64 {
        let snapshot_uid = snapshot.snapshot_uid;
        match &self.lvm {
            _ if snapshot.backend != BackendKind::Lvm => {
                self.server.copy_files().allocated_bytes(snapshot_uid)
            }
            Some(lvm) => lvm.allocated_bytes(Thin::Snapshot(snapshot_uid)),
            None => 0,
        }
    }

    fn exclusive_bytes(&self, of: CopyTarget, backend: BackendKind) -> Option<u64> {
        let looked = match backend {
            BackendKind::Memory | BackendKind::Device => return None,
            BackendKind::Lvm => self.thin_exclusive_bytes(of),
            BackendKind::File => {
                let path = self.server.copy_files().path(of);
                exclusive::of_file(&path, EXCLUSIVE_LIMIT)
            }
        };
        looked.inspect_err(|error| tracing::warn!(?of, %error, "how much it has alone is not known")).ok()
    }

    fn reopen_attachments(&self, volume_uid: Uuid) {
        self.server.reopen_attachments(volume_uid);
    }

    fn fence_attachment(&self, attachment_id: Uuid) -> Result<(), String> {
        self.server.fence_attachment(attachment_id).map_err(|error| error.to_string())
    }

    fn fence_named_writers(&self, volume_uid: Uuid) -> Result<(), String> {
        self.server.fence_named_writers(volume_uid).map_err(|error| error.to_string())
    }

    fn release_volume(&self, volume_uid: Uuid) -> Result<(), StillOpen> {
        self.server.release_volume(volume_uid).map_err(|busy| StillOpen { connections: busy.connections })
    }

    fn connections_of(&self, attachment_id: Uuid) -> u32 {
        self.server.connections_of(attachment_id)
    }

    fn holder_seen(&self, attachment_id: Uuid) {
        self.server.holder_seen(attachment_id);
    }

    fn holder(&self, attachment_id: Uuid) -> Holder {
        let (connections, gone_for) = self.server.holder_of(attachment_id);
        Holder { connections, gone_for }
    }

    fn allocated_bytes(&self, volume: &VolumeRecord) -> u64 {
        match &self.lvm {
            Some(lvm) if volume.backend == BackendKind::Lvm => {
                lvm.allocated_bytes(Thin::Volume(volume.volume_uid))
            }
            _ => self.server.allocated_bytes(volume),
        }
    }

    fn storage_incarnation(&self, volume: &VolumeRecord) -> String {
        self.server.storage_incarnation(volume)
    }

    fn limits_changed(&self, volume: &VolumeRecord) {
        self.server.limits_changed(volume);
    }

    fn content_changed(&self, volume: &VolumeRecord) {
        self.server.content_changed(volume);
    }

    fn throttled(&self, volume_uid: Uuid) -> Duration {
        self.server.throttled(volume_uid)
    }

    fn writers_of_volume(&self, volume_uid: Uuid) -> u32 {
        self.server.writers_of_volume(volume_uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_sync_waits_for_slow_storage_and_not_for_storage_that_is_stuck() {
        let zero = Duration::ZERO;
        // Slow, or stuck for some volumes: one more is begun.
        assert_eq!(turn(0, false, zero, zero), Turn::Now);
        assert_eq!(turn(SYNCS_MAX - 1, false, seconds(600), zero), Turn::Now);
        // Many at once, of which some finish from time to time.
        assert_eq!(turn(SYNCS_MAX, false, seconds(9), seconds(3)), Turn::Wait(seconds(1)));
        assert_eq!(turn(SYNCS_MAX, false, zero, seconds(24)), Turn::Wait(seconds(1)));
        assert_eq!(turn(SYNCS_MAX, false, zero, SYNC_LIMIT), Turn::Never);
        // None does.
        assert_eq!(turn(SYNCS_MAX, false, STUCK_AFTER, zero), Turn::Never);
        // What an earlier call has begun, and did not wait for any longer.
        assert_eq!(turn(1, true, seconds(4), zero), Turn::Wait(seconds(6)));
        assert_eq!(turn(1, true, seconds(60), zero), Turn::Never);
    }

    #[test]
    fn a_tool_that_fails_loses_no_writes_and_a_sync_that_fails_does() {
        let source = || io::Error::other("lvs has not ended within 30 s");
        let tool = FileError::Io { action: "cannot open", path: "thin".into(), source: source() };
        let sync = FileError::Sync { path: "/dev/dm-7".into(), source: source() };
        assert!(is_of_tools(BackendKind::Lvm, &tool) && !is_of_tools(BackendKind::Lvm, &sync));
        assert!(!is_of_tools(BackendKind::File, &tool), "a file that cannot be opened is gone");
    }

    #[test]
    fn storage_is_as_long_stalled_as_none_has_finished_with_some_under_way() {
        let start = Instant::now();
        let at = |after| start + seconds(after);
        let volume = Uuid::from_u128;
        let mut syncs = Syncs::default();
        assert_eq!(syncs.stalled(at(100)), Duration::ZERO);
        syncs.under_way.insert(volume(1), at(100));
        syncs.under_way.insert(volume(2), at(130));
        assert_eq!(syncs.stalled(at(131)), seconds(31));
        // However old the oldest is.
        syncs.finished_at = Some(at(129));
        assert_eq!(syncs.stalled(at(131)), seconds(2));
        // What finished before that says nothing of it.
        syncs.finished_at = Some(at(1));
        assert_eq!(syncs.stalled(at(131)), seconds(31));
    }

    #[test]
    fn whoever_waits_has_its_turn_when_another_finishes() {
        let syncing = Arc::new(Syncing::default());
        for number in 0..SYNCS_MAX as u128 {
            assert!(syncing.begin(Uuid::from_u128(number)));
        }
        let waiting = Arc::clone(&syncing);
        let waiting = std::thread::spawn(move || waiting.begin(Uuid::from_u128(99)));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        syncing.end(Uuid::from_u128(3), true);
        assert!(waiting.join().unwrap());
        assert_eq!(syncing.syncs().under_way.len(), SYNCS_MAX);
    }
}
