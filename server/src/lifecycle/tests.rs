//! The order of the steps, on a real catalog and a data side that records what it was asked and fails on demand.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::*;
use crate::catalog::{AttachmentState, BackendKind, NewVolume, VolumeState};
use crate::machine_memory::{Allowed, BoundBy};

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
}

impl Double {
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

    fn attachment_state(&self, volume_uid: Uuid) -> Option<AttachmentState> {
        self.catalog.attachment_of_volume(volume_uid).unwrap().map(|(_, state)| state)
    }
}

impl DataSide for Double {
    fn create_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        let (_, row) = self.catalog.volume_in_any_state(&volume.name).unwrap().unwrap();
        let mut state = self.record(format!("create storage, row {row:?}"));
        if let Some(kind) = state.create_error {
            return Err(kind.into());
        }
        state.stored.insert(volume.volume_uid);
        Ok(())
    }

    fn delete_storage(&self, volume_uid: Uuid) -> io::Result<()> {
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
        Ok(self.state.lock().unwrap().stored.iter().copied().collect())
    }

    fn grow_storage(&self, _volume: &VolumeRecord, capacity_bytes: u64) -> io::Result<()> {
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
        0
    }

    fn storage_incarnation(&self, volume: &VolumeRecord) -> String {
        volume.incarnation.to_string()
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    lifecycle: Lifecycle<Double>,
    locks: NameLocks,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path()).unwrap();
        let double = Double { catalog: catalog.clone(), state: Mutex::default() };
        Self { _dir: dir, lifecycle: Lifecycle::new(catalog, Arc::new(double)), locks: NameLocks::default() }
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
        };
        self.lifecycle.create_volume(&self.locks.blocking_lock(name), &new)
    }

    fn delete(&self, name: &str) -> Result<bool, LifecycleError> {
        self.lifecycle.delete_volume(&self.locks.blocking_lock(name))
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

/// One that is there already, of a server up to 0.1.0, is still found, attached and deleted.
#[test]
fn a_new_volume_is_not_called_what_anothers_partition_is() {
    let bench = Bench::new();
    let error = bench.create("vol-1-part1", 4096).unwrap_err();
    assert!(error.to_string().contains("partition 1 of the volume vol-1"), "{error}");
    assert_eq!(bench.double().take_calls(), [""; 0]);
    let new = NewVolume {
        name: "vol-1-part1".to_owned(),
        capacity_bytes: 4096,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
    };
    let old = bench.double().catalog.begin_creating(&new).unwrap();
    bench.double().catalog.finish_creating(old.volume_uid).unwrap();
    assert_eq!(bench.create("vol-1-part1", 4096).unwrap().volume_uid, old.volume_uid);
    assert!(!bench.attach("vol-1-part1", "n", false).unwrap().existed);
    assert!(bench.detach("vol-1-part1").unwrap() && bench.delete("vol-1-part1").unwrap());
}

#[test]
fn a_volume_grows_in_its_storage_first_and_its_clients_are_told_last() {
    let (bench, volume) = Bench::with_volume();
    let resize =
        |capacity_bytes| bench.lifecycle.resize_volume(&bench.locks.blocking_lock("vol-1"), capacity_bytes);
    assert_eq!(resize(4096).unwrap(), volume, "it has that size");
    assert!(matches!(resize(512), Err(LifecycleError::Shrink { capacity_bytes: 4096, .. })));
    assert!(matches!(resize(4096 + 512), Err(LifecycleError::SizeUnaligned { unit_bytes: 4096 })));
    assert_eq!(bench.double().take_calls(), [""; 0]);
    bench.double().change(|state| state.create_error = Some(io::ErrorKind::StorageFull));
    assert!(matches!(resize(8192), Err(LifecycleError::NoSpace(_))));
    assert_eq!(bench.lifecycle.volume("vol-1").unwrap(), volume, "nothing was promised");
    bench.double().change(|state| state.create_error = None);
    bench.double().take_calls();
    assert_eq!(resize(8192).unwrap().capacity_bytes, 8192);
    assert_eq!(bench.double().take_calls(), ["grow storage to 8192", "reopen attachments"]);
    assert_eq!(bench.lifecycle.volume("vol-1").unwrap().capacity_bytes, 8192);
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
        state.create_error = Some(io::ErrorKind::StorageFull);
        state.delete_error = true;
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

#[test]
fn the_former_holder_is_fenced_before_the_new_attachment_exists() {
    let (bench, volume) = Bench::with_volume();
    let first = bench.attach("vol-1", "node-a", false).unwrap();
    assert_eq!(
        bench.double().take_calls(),
        ["fence named writers, row Some(Active)", "sync storage, row Some(Active)"]
    );
    let again = bench.attach("vol-1", "node-a", true).unwrap();
    assert!(again.existed && !first.existed);
    assert_eq!(again.attachment, first.attachment, "force takes nothing from its own node");
    let error = bench.attach("vol-1", "node-b", false).unwrap_err();
    assert!(
        matches!(&error, LifecycleError::VolumeAttached { node_id, .. } if node_id == "node-a"),
        "{error}"
    );
    assert_eq!(bench.double().take_calls(), [""; 0], "nobody was disturbed");

    let second = bench.attach("vol-1", "node-b", true).unwrap();
    assert_eq!(
        bench.double().take_calls(),
        [
            "fence node-a, row Ending",
            "fence named writers, row Some(Active)",
            "sync storage, row Some(Active)"
        ]
    );
    assert_ne!(second.attachment.attachment_id, first.attachment.attachment_id);
    assert_ne!(second.attachment.secret, first.attachment.secret);
    assert_eq!(second.attachment.generation, first.attachment.generation + 1);
    assert_eq!(bench.lifecycle.catalog().attachment(first.attachment.attachment_id).unwrap(), None);
    assert_eq!(bench.double().attachment_state(volume.volume_uid), Some(AttachmentState::Active));
}

#[test]
fn nothing_gets_past_a_fence_that_has_not_finished() {
    let (bench, _) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    bench.double().change(|state| state.fence_error = true);
    assert!(matches!(bench.attach("vol-1", "node-b", true), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.attach("vol-1", "node-b", false), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.attach("vol-1", "node-a", false), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.delete("vol-1"), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.detach("vol-1"), Err(LifecycleError::Unfenced { .. })));
    bench.double().change(|state| state.fence_error = false);
    bench.double().take_calls();
    // The generation went up once, with the force, however often the fence was tried.
    let attached = bench.attach("vol-1", "node-b", false).unwrap();
    assert_eq!((attached.existed, attached.attachment.generation), (false, 2));
    assert_eq!(
        bench.double().take_calls(),
        [
            "fence node-a, row Ending",
            "fence named writers, row Some(Active)",
            "sync storage, row Some(Active)"
        ]
    );
}

#[test]
fn an_attachment_is_not_answered_while_writers_by_name_remain() {
    let (bench, _) = Bench::with_volume();
    bench.double().change(|state| state.named_writer_error = true);
    assert!(matches!(bench.attach("vol-1", "node-a", false), Err(LifecycleError::Unfenced { .. })));
    bench.double().change(|state| state.named_writer_error = false);
    assert!(!bench.attach("vol-1", "node-a", false).unwrap().existed);
}

#[test]
fn an_attachment_is_not_answered_before_what_was_written_is_durable() {
    let (bench, _) = Bench::with_volume();
    bench.double().change(|state| state.sync_error = Some(true));
    let refused = bench.attach("vol-1", "node-a", false);
    assert!(matches!(refused, Err(LifecycleError::Storage { action: "sync", .. })), "{refused:?}");
    bench.double().change(|state| state.sync_error = Some(false));
    let refused = bench.attach("vol-1", "node-a", false);
    assert!(matches!(refused, Err(LifecycleError::Unfenced { .. })), "nothing is lost: {refused:?}");
    bench.double().change(|state| state.sync_error = None);
    assert!(!bench.attach("vol-1", "node-a", false).unwrap().existed);
}

#[test]
fn an_attachment_ends_only_for_who_names_it() {
    let (bench, _) = Bench::with_volume();
    let held = bench.attach("vol-1", "node-a", false).unwrap().attachment;
    let detach = |wanted: &DetachWanted| {
        bench.lifecycle.detach_volume(&bench.locks.blocking_lock("vol-1"), wanted).unwrap()
    };
    assert!(!detach(&DetachWanted { node_id: Some("node-b".to_owned()), attachment_id: None }));
    assert!(!detach(&DetachWanted { node_id: None, attachment_id: Some(Uuid::new_v4()) }));
    assert!(bench.lifecycle.catalog().attachment(held.attachment_id).unwrap().is_some());
    bench.double().take_calls();
    assert!(detach(&DetachWanted {
        node_id: Some("node-a".to_owned()),
        attachment_id: Some(held.attachment_id)
    }));
    assert_eq!(bench.double().take_calls(), ["fence node-a, row Ending"]);
    assert!(!detach(&DetachWanted::default()));
}

#[test]
fn the_other_access_mode_is_refused_and_taken_by_force() {
    let (bench, _) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    let attach_reader = |force| {
        let wanted =
            AttachWanted { node_id: "node-a".to_owned(), boot_id: String::new(), read_only: true, force };
        bench.lifecycle.attach_volume(&bench.locks.blocking_lock("vol-1"), &wanted)
    };
    assert!(matches!(attach_reader(false), Err(LifecycleError::AttachedDifferently { .. })));
    let reader = attach_reader(true).unwrap();
    assert!(reader.attachment.read_only && !reader.existed);
}

#[test]
fn another_boot_of_a_node_gets_the_volume_when_the_former_has_gone() {
    let (bench, _) = Bench::with_volume();
    let first = bench.attach_boot("vol-1", "node-a", "boot-1", false).unwrap();
    let again = bench.attach_boot("vol-1", "node-a", "boot-1", false).unwrap();
    assert!(again.existed && again.attachment == first.attachment);
    let holder = |connections, seconds| {
        let gone_for = Duration::from_secs(seconds);
        bench.double().state.lock().unwrap().holder = Some(Holder { connections, gone_for });
    };
    holder(1, 0);
    let clone = bench.attach_boot("vol-1", "node-a", "boot-2", false);
    assert!(matches!(clone, Err(LifecycleError::OtherBoot { .. })));
    holder(0, 10);
    let clone = bench.attach_boot("vol-1", "node-a", "boot-2", false);
    assert!(matches!(clone, Err(LifecycleError::OtherBootMayReturn { .. })));
    let told = bench.attach("vol-1", "node-a", false).unwrap();
    assert!(told.hides_secret && told.attachment == first.attachment, "a controller's call again");
    bench.double().take_calls();
    holder(0, 60);
    let second = bench.attach_boot("vol-1", "node-a", "boot-2", false).unwrap();
    assert!(!second.existed && second.attachment.secret != first.attachment.secret);
    assert!(second.attachment.generation > first.attachment.generation, "as by force");
    assert_eq!(bench.double().take_calls()[0], "fence node-a, row Ending");
}

#[test]
fn a_controllers_grant_is_bound_to_the_boot_that_fetches_it() {
    let (bench, _) = Bench::with_volume();
    let granted = bench.attach("vol-1", "node-a", false).unwrap();
    let fetched = bench.attach_boot("vol-1", "node-a", "boot-1", false).unwrap();
    assert!(fetched.existed && fetched.attachment.secret == granted.attachment.secret);
    assert_eq!(fetched.attachment.boot_id, "boot-1");
    bench.double().state.lock().unwrap().holder = Some(Holder { connections: 1, gone_for: Duration::ZERO });
    assert!(bench.attach_boot("vol-1", "node-a", "boot-2", false).is_err());
}

#[test]
fn recovery_finishes_what_a_killed_server_began() {
    let (bench, kept) = Bench::with_volume();
    let catalog = bench.lifecycle.catalog();
    let new = |name: &str| NewVolume {
        name: name.to_owned(),
        capacity_bytes: 4096,
        block_size_bytes: 512,
        backend: BackendKind::File,
        write_cache_on: true,
    };
    let half_made = catalog.begin_creating(&new("half-made")).unwrap();
    let half_gone = bench.create("half-gone", 4096).unwrap();
    catalog.begin_deleting(half_gone.volume_uid).unwrap();
    let restored = Uuid::new_v4();
    bench.double().change(|state| state.stored.extend([half_made.volume_uid, restored]));
    let held = bench.attach("vol-1", "node-a", false).unwrap().attachment;
    catalog.end_attachment(held.attachment_id, false).unwrap();

    let expected = Recovered { unfinished_volumes: 2, ending_attachments: 1, orphans: 1 };
    assert_eq!(bench.lifecycle.recover().unwrap(), expected);
    assert_eq!(catalog.all_volumes().unwrap(), [(kept.clone(), VolumeState::Ready)]);
    assert!(!catalog.volume_has_attachment(kept.volume_uid).unwrap());
    let stored: BTreeSet<Uuid> = bench.double().stored_volumes().unwrap().into_iter().collect();
    assert_eq!(stored, BTreeSet::from([kept.volume_uid, restored]), "what no row names is left alone");
    assert_eq!(bench.lifecycle.recover().unwrap(), Recovered { orphans: 1, ..Recovered::default() });
}

#[test]
fn a_locked_name_keeps_others_out_and_other_names_go_on() {
    let locks = Arc::new(NameLocks::default());
    let held = locks.blocking_lock("vol-1");
    let (sender, receiver) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn({
        let locks = Arc::clone(&locks);
        move || {
            drop(locks.blocking_lock("vol-2"));
            sender.send("other name").unwrap();
            drop(locks.blocking_lock("vol-1"));
            sender.send("same name").unwrap();
        }
    });
    let deadline = std::time::Duration::from_secs(10);
    assert_eq!(receiver.recv_timeout(deadline), Ok("other name"));
    assert!(receiver.try_recv().is_err(), "the name is still locked");
    drop(held);
    assert_eq!(receiver.recv_timeout(deadline), Ok("same name"));
    waiting.join().unwrap();
}
