//! The order of the steps, on a real catalog and a data side that records what it was asked and fails on demand.

mod adopted;
mod attachments;
mod grants;
mod growth;
mod names;
mod nodes;
mod repeated;
mod settings;
mod thin;
mod thin_kills;
mod walks;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;

use super::*;
use crate::backend::lvm::{Lvm, Thin};
use crate::catalog::{AttachmentState, BackendKind, CATALOG_FILE_NAME, NewVolume, VolumeState};
use crate::machine_memory::{Allowed, BoundBy};
use crate::volume::copying::{self, CopyError, CopyHandle, CopyReport, CopySource, CopyTarget, CopyWanted};

mod copies;
mod diffs;
mod snapshot_holders;

/// Keeps storage as a set of names, and at each call looks at what the catalog shows.
#[derive(Debug)]
struct Double {
    catalog: Catalog,
    state: Mutex<DoubleState>,
}

#[derive(Debug, Default)]
struct DoubleState {
    stored: BTreeSet<Uuid>,
    calls: Vec<String>,
    create_error: Option<io::ErrorKind>,
    delete_error: bool,
    fence_error: bool,
    named_writer_error: bool,
    /// Whether it has failed, or not been tried.
    sync_error: Option<bool>,
    holder: Option<Holder>,
    open_connections: u32,
    allocated_bytes: u64,
    device: adopted::Device,
    thin_pool: Option<PoolFill>,
    /// Snapshots, and what is to be restored.
    copies: BTreeSet<CopyTarget>,
    /// Volumes whose storage was replaced.
    restored: BTreeSet<Uuid>,
    can_copy_error: Option<CopyError>,
    /// Of the next.
    begin_error: Option<CopyError>,
    copy_end: CopyEnd,
    /// Somebody writes to the source for the first time, just before the instant.
    writes_before_instant: bool,
    held: Vec<(CopyReport, Vec<CopyWanted>)>,
    replace_error: bool,
    /// Where what a killed server leaves is to be kept, if it is.
    moments_dir: Option<PathBuf>,
    moments: Vec<Moment>,
    /// Where volumes are, if not here.
    lvm: Option<Arc<Lvm>>,
    /// Where it waits who looks at all extents.
    walk: Option<Arc<walks::Gate>>,
}

/// How copies end.
#[derive(Debug)]
enum CopyEnd {
    AtOnce(Result<(), CopyError>),
    /// When the test has them end.
    Held,
}

impl Default for CopyEnd {
    fn default() -> Self {
        Self::AtOnce(Ok(()))
    }
}

/// What a server that is killed at this moment leaves.
#[derive(Debug, Clone)]
struct Moment {
    data_dir: PathBuf,
    stored: BTreeSet<Uuid>,
    copies: BTreeSet<CopyTarget>,
    restored: BTreeSet<Uuid>,
    behind: String,
}

impl DoubleState {
    fn keep(&mut self, wanted: &[CopyWanted]) {
        for wanted in wanted {
            match wanted.target {
                CopyTarget::Volume(volume_uid) => drop(self.stored.insert(volume_uid)),
                target => drop(self.copies.insert(target)),
            }
        }
    }

    fn drop_copies(&mut self, wanted: &[CopyWanted]) {
        for wanted in wanted {
            match wanted.target {
                CopyTarget::Volume(volume_uid) => drop(self.stored.remove(&volume_uid)),
                target => drop(self.copies.remove(&target)),
            }
        }
    }
}

impl Double {
    fn lvm(&self) -> Option<Arc<Lvm>> {
        self.state.lock().unwrap().lvm.clone()
    }

    fn change(&self, change: impl FnOnce(&mut DoubleState)) {
        change(&mut self.state.lock().unwrap());
    }

    fn record(&self, call: String) -> std::sync::MutexGuard<'_, DoubleState> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(call);
        state
    }

    fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().calls)
    }

    /// Keeps what a server that is killed now leaves.
    fn moment(&self) {
        let mut state = self.state.lock().unwrap();
        let Some(dir) = state.moments_dir.clone() else { return };
        let data_dir = dir.join(format!("moment-{}", state.moments.len()));
        std::fs::create_dir(&data_dir).unwrap();
        let db = rusqlite::Connection::open(dir.join(CATALOG_FILE_NAME)).unwrap();
        let into = data_dir.join(CATALOG_FILE_NAME);
        db.execute("VACUUM INTO ?1", [into.to_str().unwrap()]).unwrap();
        let (stored, copies, restored) = (state.stored.clone(), state.copies.clone(), state.restored.clone());
        let behind = state.calls.last().cloned().unwrap_or_default();
        state.moments.push(Moment { data_dir, stored, copies, restored, behind });
    }

    /// The state of the row that a copy belongs to.
    fn row_of(&self, target: CopyTarget) -> String {
        match target {
            CopyTarget::Snapshot(uid) => {
                let found = self.catalog.snapshot_in_any_state(uid).unwrap();
                format!("{:?}", found.map(|(_, state)| state))
            }
            CopyTarget::Volume(uid) | CopyTarget::Restored(uid) | CopyTarget::Nameless(uid) => {
                let rows = self.catalog.all_volumes().unwrap();
                let found = rows.into_iter().find(|(volume, _)| volume.volume_uid == uid);
                format!("{:?}", found.map(|(_, state)| state))
            }
        }
    }

    fn attachment_state(&self, volume_uid: Uuid) -> Option<AttachmentState> {
        self.catalog.attachments_of_volume(volume_uid).unwrap().first().map(|(_, state)| *state)
    }
}

impl DataSide for Double {
    fn create_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        if let Some(lvm) = self.lvm() {
            return lvm
                .create(Thin::Volume(volume.volume_uid), volume.capacity_bytes)
                .map_err(io::Error::other);
        }
        let (_, row) = self.catalog.volume_in_any_state(&volume.name).unwrap().unwrap();
        let mut state = self.record(format!("create storage, row {row:?}"));
        if let Some(kind) = state.create_error {
            return Err(kind.into());
        }
        state.stored.insert(volume.volume_uid);
        Ok(())
    }

    fn delete_storage(&self, volume_uid: Uuid) -> io::Result<()> {
        if let Some(lvm) = self.lvm() {
            return lvm.remove(Thin::Volume(volume_uid)).map_err(io::Error::other);
        }
        let rows = self.catalog.all_volumes().unwrap();
        let row = rows.into_iter().find(|(volume, _)| volume.volume_uid == volume_uid).map(|(_, row)| row);
        let mut state = self.record(format!("delete storage, row {row:?}"));
        if state.delete_error {
            return Err(io::Error::other("the disk is on fire"));
        }
        state.stored.remove(&volume_uid);
        Ok(())
    }

    fn memory_for_volumes(&self) -> ForVolumes {
        let allowed = Allowed { bytes: 4 << 30, by: BoundBy::Machine, machine_bytes: 4 << 30 };
        ForVolumes { allowed, data_side_bytes: 1 << 30 }
    }

    fn stored_volumes(&self) -> io::Result<Vec<Uuid>> {
        if let Some(lvm) = self.lvm() {
            return Ok(thin_kills::volumes(&lvm));
        }
        Ok(self.state.lock().unwrap().stored.iter().copied().collect())
    }

    fn grow_storage(&self, volume: &VolumeRecord, capacity_bytes: u64) -> io::Result<()> {
        if let Some(lvm) = self.lvm() {
            return lvm.grow(Thin::Volume(volume.volume_uid), capacity_bytes).map_err(io::Error::other);
        }
        let state = self.record(format!("grow storage to {capacity_bytes}"));
        state.create_error.map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn sync_storage(&self, volume: &VolumeRecord) -> Result<(), SyncError> {
        let row = self.attachment_state(volume.volume_uid);
        let state = self.record(format!("sync storage, row {row:?}"));
        match state.sync_error {
            Some(true) => Err(io::Error::other("the disk is on fire").into()),
            Some(false) => Err(SyncError::Unfinished("cannot start a thread".to_owned())),
            None => Ok(()),
        }
    }

    fn can_copy(&self) -> Result<(), CopyError> {
        self.state.lock().unwrap().can_copy_error.clone().map_or(Ok(()), Err)
    }

    fn thin_pool(&self) -> Option<Result<PoolFill, CopyError>> {
        self.state.lock().unwrap().thin_pool.map(Ok)
    }

    fn begin_copies(&self, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError> {
        if let Some(lvm) = self.lvm() {
            return thin_kills::begin_copies(&lvm, wanted);
        }
        self.moment();
        if self.state.lock().unwrap().writes_before_instant {
            for wanted in wanted {
                if let CopySource::Volume(volume) = &wanted.source {
                    self.catalog.mark_written(volume.volume_uid).unwrap();
                }
            }
        }
        let rows: Vec<String> = wanted.iter().map(|wanted| self.row_of(wanted.target)).collect();
        let mut state = self.record(format!("begin copies, rows {}", rows.join(" ")));
        if let Some(error) = state.begin_error.take() {
            return Err(error);
        }
        let (handle, report) = copying::begin();
        state.keep(wanted);
        match &state.copy_end {
            CopyEnd::Held => state.held.push((report, wanted.to_vec())),
            CopyEnd::AtOnce(end) => {
                let end = end.clone();
                if end.is_err() {
                    state.drop_copies(wanted);
                }
                report.end(end);
            }
        }
        drop(state);
        self.moment();
        Ok(handle)
    }

    fn snapshot_map(&self, snapshot_uid: Uuid, capacity_bytes: u64) -> Result<Map, CopyError> {
        let is_there = self.state.lock().unwrap().copies.contains(&CopyTarget::Snapshot(snapshot_uid));
        assert!(is_there, "a snapshot that is ready has storage");
        Ok(Box::new(diffs::OneRun { capacity_bytes, address: snapshot_uid.as_u128() as u64 >> 1 }))
    }

    fn begin_nameless_copy(&self, volume: &VolumeRecord) -> Result<(CopyHandle, Map), CopyError> {
        let wanted = CopyWanted {
            source: CopySource::Volume(volume.clone()),
            target: CopyTarget::Nameless(Uuid::new_v4()),
            capacity_bytes: volume.capacity_bytes,
        };
        let map = diffs::OneRun { capacity_bytes: volume.capacity_bytes, address: 1 << 63 };
        Ok((self.begin_copies(&[wanted])?, Box::new(map)))
    }

    fn replace_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        if let Some(lvm) = self.lvm() {
            return lvm.replace(volume.volume_uid).map_err(io::Error::other);
        }
        self.moment();
        let visible = self.catalog.volume_by_uid(volume.volume_uid).unwrap().is_some();
        let (row, _) = self.catalog.volume_in_any_state(&volume.name).unwrap().unwrap();
        let (incarnation, content) = (row.incarnation, row.settings.content.as_str());
        let call =
            format!("replace storage, visible {visible}, incarnation {incarnation}, content {content}");
        let mut state = self.record(call);
        if state.replace_error {
            return Err(io::Error::other("the disk is on fire"));
        }
        assert!(state.copies.remove(&CopyTarget::Restored(volume.volume_uid)), "there is what to restore");
        state.restored.insert(volume.volume_uid);
        drop(state);
        self.moment();
        Ok(())
    }

    fn delete_copy(&self, target: CopyTarget) -> io::Result<()> {
        if let Some(lvm) = self.lvm() {
            return lvm.remove(thin_kills::of(target)).map_err(io::Error::other);
        }
        self.moment();
        let row = self.row_of(target);
        let mut state = self.record(format!("delete copy, row {row}"));
        if state.delete_error {
            return Err(io::Error::other("the disk is on fire"));
        }
        state.copies.remove(&target);
        drop(state);
        self.moment();
        Ok(())
    }

    fn stored_copies(&self) -> io::Result<Vec<CopyTarget>> {
        if let Some(lvm) = self.lvm() {
            return Ok(thin_kills::copies(&lvm));
        }
        Ok(self.state.lock().unwrap().copies.iter().copied().collect())
    }

    fn snapshot_allocated_bytes(&self, _snapshot: &SnapshotRecord) -> u64 {
        0
    }

    fn exclusive_bytes(&self, _of: CopyTarget, _backend: BackendKind) -> Option<u64> {
        let gate = self.state.lock().unwrap().walk.clone()?;
        gate.pass();
        Some(4096)
    }

    fn reopen_attachments(&self, _volume_uid: Uuid) {
        drop(self.record("reopen attachments".to_owned()));
    }

    fn fence_attachment(&self, attachment_id: Uuid) -> Result<(), String> {
        let (held, row) = self.catalog.attachment_in_any_state(attachment_id).unwrap().unwrap();
        let state = self.record(format!("fence {}, row {row:?}", held.node_id));
        if state.fence_error { Err("2 writes in flight".to_owned()) } else { Ok(()) }
    }

    fn fence_named_writers(&self, volume_uid: Uuid) -> Result<(), String> {
        let row = self.attachment_state(volume_uid);
        let state = self.record(format!("fence named writers, row {row:?}"));
        if state.named_writer_error { Err("1 write in flight".to_owned()) } else { Ok(()) }
    }

    fn release_volume(&self, volume_uid: Uuid) -> Result<(), StillOpen> {
        let visible = self.catalog.volume_by_uid(volume_uid).unwrap().is_some();
        let state = self.record(format!("release, visible {visible}"));
        if state.open_connections == 0 {
            Ok(())
        } else {
            Err(StillOpen { connections: state.open_connections })
        }
    }

    fn connections_of(&self, _attachment_id: Uuid) -> u32 {
        0
    }

    fn holder_seen(&self, _attachment_id: Uuid) {}

    fn holder(&self, _attachment_id: Uuid) -> Holder {
        self.state.lock().unwrap().holder.unwrap_or(Holder { connections: 0, gone_for: Duration::ZERO })
    }

    fn allocated_bytes(&self, _volume: &VolumeRecord) -> u64 {
        self.state.lock().unwrap().allocated_bytes
    }

    fn storage_incarnation(&self, volume: &VolumeRecord) -> String {
        volume.incarnation.to_string()
    }

    fn limits_changed(&self, volume: &VolumeRecord) {
        let row = self.catalog.volume_by_uid(volume.volume_uid).unwrap().unwrap();
        assert_eq!(row.settings.limits, volume.settings.limits, "durable before it holds");
        drop(self.record("limits changed".to_owned()));
    }

    fn content_changed(&self, volume: &VolumeRecord) {
        let row = self.catalog.volume_in_any_state(&volume.name).unwrap().unwrap().0;
        assert_eq!(row.settings.content, volume.settings.content, "durable before it holds");
        drop(self.record(format!("content {}", volume.settings.content.as_str())));
    }

    fn throttled(&self, _volume_uid: Uuid) -> Duration {
        Duration::ZERO
    }

    fn writers_of_volume(&self, _volume_uid: Uuid) -> u32 {
        self.state.lock().unwrap().open_connections
    }
}

struct Bench {
    dir: tempfile::TempDir,
    lifecycle: Lifecycle<Double>,
    locks: NameLocks,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path()).unwrap();
        let double = Double { catalog: catalog.clone(), state: Mutex::default() };
        // Whatever is free where the tests run.
        let lifecycle = Lifecycle::new(catalog, Arc::new(double)).with_snapshot_reserve(Some(0));
        Self { dir, lifecycle, locks: NameLocks::default() }
    }

    fn double(&self) -> &Double {
        self.lifecycle.data_side()
    }

    fn create(&self, name: &str, capacity_bytes: u64) -> Result<VolumeRecord, LifecycleError> {
        self.create_on(BackendKind::File, name, capacity_bytes)
    }

    fn create_on(
        &self,
        backend: BackendKind,
        name: &str,
        capacity_bytes: u64,
    ) -> Result<VolumeRecord, LifecycleError> {
        let new = NewVolume {
            name: name.to_owned(),
            capacity_bytes,
            block_size_bytes: 4096,
            backend,
            write_cache_on: true,
            settings: Default::default(),
        };
        self.lifecycle.create_volume(&self.locks.blocking_lock(name), &new)
    }

    fn delete(&self, name: &str) -> Result<bool, LifecycleError> {
        self.lifecycle.delete_volume(&self.locks.blocking_lock(name), false)
    }

    fn attach(&self, name: &str, node_id: &str, force: bool) -> Result<Attached, LifecycleError> {
        self.attach_boot(name, node_id, "", force)
    }

    fn attach_boot(
        &self,
        name: &str,
        node_id: &str,
        boot_id: &str,
        force: bool,
    ) -> Result<Attached, LifecycleError> {
        let wanted = AttachWanted {
            node_id: node_id.to_owned(),
            boot_id: boot_id.to_owned(),
            read_only: false,
            force,
            ..AttachWanted::default()
        };
        self.lifecycle.attach_volume(&self.locks.blocking_lock(name), &wanted)
    }

    fn detach(&self, name: &str) -> Result<bool, LifecycleError> {
        self.lifecycle.detach_volume(&self.locks.blocking_lock(name), &DetachWanted::default())
    }

    /// A volume that is there, with the calls that made it forgotten.
    fn with_volume() -> (Self, VolumeRecord) {
        let bench = Self::new();
        let volume = bench.create("vol-1", 4096).unwrap();
        bench.double().take_calls();
        (bench, volume)
    }
}

#[test]
fn storage_is_made_between_the_rows_and_removed_between_them() {
    let bench = Bench::new();
    bench.create("vol-1", 4096).unwrap();
    assert_eq!(bench.double().take_calls(), ["create storage, row Creating"]);
    assert!(bench.delete("vol-1").unwrap());
    assert_eq!(bench.double().take_calls(), ["release, visible false", "delete storage, row Some(Deleting)"]);
    assert!(!bench.delete("vol-1").unwrap());
}

#[test]
fn creating_again_returns_the_same_volume_and_another_size_is_refused() {
    let (bench, volume) = Bench::with_volume();
    assert_eq!(bench.create("vol-1", 4096).unwrap(), volume);
    let error = bench.create("vol-1", 8192).unwrap_err();
    assert!(matches!(error, LifecycleError::VolumeDiffers { property: "size in bytes", .. }), "{error}");
    assert_eq!(bench.double().take_calls(), [""; 0]);
}

#[test]
fn a_creation_that_failed_leaves_nothing() {
    let bench = Bench::new();
    bench.double().change(|state| state.create_error = Some(io::ErrorKind::StorageFull));
    assert!(matches!(bench.create("vol-1", 4096), Err(LifecycleError::NoSpace(_))));
    bench.double().change(|state| state.create_error = Some(io::ErrorKind::FileTooLarge));
    assert!(matches!(bench.create("vol-1", 4096), Err(LifecycleError::TooLarge { capacity_bytes: 4096 })));
    assert_eq!(bench.lifecycle.catalog().all_volumes().unwrap(), []);
    bench.double().change(|state| state.create_error = None);
    bench.create("vol-1", 8192).unwrap();
}

#[test]
fn memory_volumes_are_counted_together() {
    let bench = Bench::new();
    let create = |name: &str, gib: u64| bench.create_on(BackendKind::Memory, name, gib << 30);
    create("a", 2).unwrap();
    bench.create("file", 1 << 50).unwrap();
    let error = create("b", 2).unwrap_err();
    assert!(
        error.to_string().contains("4096 MiB, and may have 3072 MiB: 4096 MiB, by the machine"),
        "{error}"
    );
    assert_eq!(bench.lifecycle.catalog().all_volumes().unwrap().len(), 2, "what was refused leaves nothing");
    create("b", 1).unwrap();
    assert!(bench.delete("a").unwrap());
    create("c", 2).unwrap();
}

#[test]
fn a_creation_whose_cleaning_failed_too_is_cleaned_by_the_next_call() {
    let bench = Bench::new();
    bench.double().change(|state| {
        (state.create_error, state.delete_error) = (Some(io::ErrorKind::StorageFull), true);
    });
    assert!(matches!(bench.create("vol-1", 4096), Err(LifecycleError::NoSpace(_))));
    assert_eq!(bench.lifecycle.catalog().all_volumes().unwrap().len(), 1);
    bench.double().change(|state| *state = DoubleState::default());
    bench.create("vol-1", 8192).unwrap();
    assert_eq!(
        bench.double().take_calls(),
        ["delete storage, row Some(Creating)", "create storage, row Creating"]
    );
}

#[test]
fn a_deletion_that_failed_is_finished_by_the_next_call() {
    let (bench, _) = Bench::with_volume();
    bench.double().change(|state| state.delete_error = true);
    assert!(matches!(bench.delete("vol-1"), Err(LifecycleError::Storage { .. })));
    assert!(matches!(bench.lifecycle.volume("vol-1"), Err(LifecycleError::VolumeNotFound(_))));
    bench.double().change(|state| state.delete_error = false);
    assert!(bench.delete("vol-1").unwrap());
    assert_eq!(bench.lifecycle.catalog().all_volumes().unwrap(), []);
}

#[test]
fn an_open_volume_is_not_deleted_and_stays_as_it_was() {
    let (bench, volume) = Bench::with_volume();
    bench.double().change(|state| state.open_connections = 3);
    let error = bench.delete("vol-1").unwrap_err();
    let still_open = StillOpen { connections: 3 };
    assert!(
        matches!(&error, LifecycleError::VolumeOpen { still_open: found, .. } if *found == still_open),
        "{error}"
    );
    assert_eq!(bench.lifecycle.volume("vol-1").unwrap(), volume);
    assert_eq!(bench.lifecycle.catalog().all_volumes().unwrap(), [(volume, VolumeState::Ready)]);
}

#[test]
fn a_volume_is_there_for_callers_until_its_deletion_is_certain() {
    let (bench, volume) = Bench::with_volume();
    let _concealed = bench.lifecycle.catalog().conceal_volume(volume.volume_uid);
    assert_eq!(bench.lifecycle.volume("vol-1").unwrap(), volume);
}

#[test]
fn an_attached_volume_is_not_deleted() {
    let (bench, _) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    let error = bench.delete("vol-1").unwrap_err();
    assert!(
        matches!(&error, LifecycleError::VolumeAttached { node_id, .. } if node_id == "node-a"),
        "{error}"
    );
    assert!(bench.detach("vol-1").unwrap());
    assert!(bench.delete("vol-1").unwrap());
}
