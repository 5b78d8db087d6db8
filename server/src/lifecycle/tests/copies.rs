//! Snapshots, clones and restores: the order of their steps, each of them failing, and a server that dies between any two.

use super::*;
use crate::catalog::{Content, SnapshotFilter, SnapshotKey, SnapshotState, VolumeSettings};
use crate::lifecycle::operations::TURNS;

const DEADLINE: Duration = Duration::from_secs(60);

impl Bench {
    pub(super) fn locks(&self, names: &[&str]) -> Vec<NameLock> {
        let names: BTreeSet<&str> = names.iter().copied().collect();
        names.into_iter().map(|name| self.locks.blocking_lock(name)).collect()
    }

    pub(super) fn start_snapshot(
        &self,
        volumes: &[&str],
        name: &str,
    ) -> Result<Started<Vec<Uuid>>, LifecycleError> {
        let names: Vec<String> = volumes.iter().map(|name| (*name).to_owned()).collect();
        self.lifecycle.create_snapshots(&self.locks(volumes), &names, name, None)
    }

    /// The same to its end.
    pub(super) fn snapshot(&self, volumes: &[&str], name: &str) -> Result<Vec<Uuid>, LifecycleError> {
        finish(self.start_snapshot(volumes, name)?)
    }

    pub(super) fn start_clone(
        &self,
        name: &str,
        source: CloneOf,
        capacity_bytes: u64,
    ) -> Result<Started<Uuid>, LifecycleError> {
        let lock_name = source.lock_name();
        let labels = [("app".to_owned(), "db".to_owned())].into();
        let description = "a clone".to_owned();
        let wanted = CloneWanted { name: name.to_owned(), source, capacity_bytes, labels, description };
        self.lifecycle.clone_volume(&self.locks(&[name, &lock_name]), &wanted)
    }

    fn clone_of_volume(&self, name: &str, source: &str) -> Result<Uuid, LifecycleError> {
        finish(self.start_clone(name, CloneOf::Volume(source.to_owned()), 0)?)
    }

    pub(super) fn start_restore(
        &self,
        name: &str,
        snapshot_uid: Uuid,
    ) -> Result<Started<Uuid>, LifecycleError> {
        let locks = self.locks(&[name, &snapshot_lock_name(snapshot_uid)]);
        self.lifecycle.restore_volume(&locks, name, snapshot_uid)
    }

    pub(super) fn restore(&self, name: &str, snapshot_uid: Uuid) -> Result<Uuid, LifecycleError> {
        finish(self.start_restore(name, snapshot_uid)?)
    }

    pub(super) fn delete_snapshot(&self, snapshot_uid: Uuid) -> Result<bool, LifecycleError> {
        let lock = self.locks.blocking_lock(&snapshot_lock_name(snapshot_uid));
        self.lifecycle.delete_snapshot(&lock, snapshot_uid)
    }

    pub(super) fn hold_copies(&self) {
        self.double().change(|state| state.copy_end = CopyEnd::Held);
    }

    /// Has the copies that are held end, as soon as there are so many.
    pub(super) fn end_held(&self, count: usize, end: Result<(), CopyError>) {
        wait_until(|| self.double().state.lock().unwrap().held.len() >= count);
        let held: Vec<_> = self.double().state.lock().unwrap().held.drain(..count).collect();
        for (report, wanted) in held {
            if end.is_err() {
                self.double().change(|state| state.drop_copies(&wanted));
            }
            report.end(end.clone());
        }
    }

    /// What is listed: `VOLUME@NAME state`.
    pub(super) fn listed(&self) -> Vec<String> {
        let filter = SnapshotFilter::default();
        let listed = self.lifecycle.catalog().list_snapshots(&filter, &SnapshotKey::default(), 100).unwrap();
        listed
            .into_iter()
            .map(|(snapshot, state)| format!("{}@{} {state:?}", snapshot.volume_name, snapshot.name))
            .collect()
    }
}

pub(super) fn wait_until(holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for the operation; its own error is told in words, as it is kept by the operation, too.
pub(super) fn finish<T>(started: Started<T>) -> Result<T, LifecycleError> {
    if let Some(operation) = &started.operation {
        assert!(operation.blocking_wait(DEADLINE), "it ends");
        if let Some(Err(error)) = operation.end() {
            return Err(SnapshotError::Copy(CopyError::Failed(error.to_string())).into());
        }
    }
    Ok(started.made)
}

pub(super) fn in_progress(result: Result<impl Sized, LifecycleError>) -> bool {
    matches!(result, Err(LifecycleError::Snapshot(SnapshotError::InProgress { .. })))
}

#[test]
fn a_snapshot_is_copied_between_its_rows_and_removed_between_them() {
    let (bench, volume) = Bench::with_volume();
    let made = bench.snapshot(&["vol-1"], "monday").unwrap();
    assert_eq!(bench.double().take_calls(), ["begin copies, rows Some(Creating)"]);
    assert_eq!(bench.listed(), ["vol-1@monday Ready"]);
    let (snapshot, _) = bench.lifecycle.snapshot(&SnapshotNamed::Uid(made[0])).unwrap();
    assert_eq!((snapshot.volume_uid, snapshot.capacity_bytes), (volume.volume_uid, 4096));
    assert!(bench.delete_snapshot(made[0]).unwrap());
    let deleted = ["release, visible false", "delete copy, row Some(Deleting)"];
    assert_eq!(bench.double().take_calls(), deleted);
    assert!(!bench.delete_snapshot(made[0]).unwrap());
    assert_eq!(bench.listed(), [""; 0]);
}

#[test]
fn a_group_is_begun_in_one_call_and_found_again_as_a_whole() {
    let (bench, _) = Bench::with_volume();
    bench.create("vol-2", 8192).unwrap();
    bench.create("vol-3", 8192).unwrap();
    bench.double().take_calls();
    let made = bench.snapshot(&["vol-2", "vol-1"], "s").unwrap();
    assert_eq!(bench.double().take_calls(), ["begin copies, rows Some(Creating) Some(Creating)"]);
    assert_eq!(bench.snapshot(&["vol-2", "vol-1"], "s").unwrap(), made, "as it was");
    assert_eq!(bench.snapshot(&["vol-1"], "s").unwrap(), made[1..]);
    bench.snapshot(&["vol-3"], "s").unwrap();
    bench.double().take_calls();
    for (volumes, why) in [(["vol-1", "vol-3"], "other instants"), (["vol-1", "vol-4"], "not of all")] {
        if volumes[1] == "vol-4" {
            bench.create("vol-4", 4096).unwrap();
        }
        let error = bench.snapshot(&volumes, "s").unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(matches!(bench.snapshot(&["vol-1", "none"], "t"), Err(LifecycleError::VolumeNotFound(_))));
    assert_eq!(bench.listed().len(), 3);
}

#[test]
fn what_cannot_be_copied_is_refused_before_anything_is_written_down() {
    let (bench, _) = Bench::with_volume();
    bench.create_on(BackendKind::Memory, "mem", 4096).unwrap();
    bench.double().take_calls();
    let error = bench.snapshot(&["vol-1", "mem"], "s").unwrap_err();
    assert!(error.to_string().contains("mem cannot be copied: it is in memory"), "{error}");
    let why = CopyError::Unsupported("its file system is ext4".to_owned());
    bench.double().change(|state| state.can_copy_error = Some(why));
    let error = bench.snapshot(&["vol-1"], "s").unwrap_err();
    assert!(error.to_string().contains("ext4"), "{error}");
    assert_eq!(bench.lifecycle.snapshots_unsupported_reason(), "its file system is ext4");
    assert!(bench.clone_of_volume("c", "vol-1").is_err());
    bench.double().change(|state| state.can_copy_error = None);
    let full = Lifecycle::new(bench.lifecycle.catalog().clone(), Arc::clone(&bench.lifecycle.data_side))
        .with_snapshot_reserve(Some(100));
    let refused = full.create_snapshots(&bench.locks(&["vol-1"]), &["vol-1".to_owned()], "s", None);
    assert!(matches!(refused, Err(LifecycleError::Snapshot(SnapshotError::Reserve { .. }))));
    assert_eq!(bench.double().take_calls(), [""; 0]);
    assert_eq!(bench.listed(), [""; 0]);
    bench.snapshot(&["vol-1"], "s").unwrap();
    assert_eq!(bench.lifecycle.snapshots_unsupported_reason(), "");
}

#[test]
fn a_copy_that_fails_leaves_nothing_whenever_it_does() {
    let (bench, volume) = Bench::with_volume();
    let errors = [CopyError::NoSpace, CopyError::SourceLostWrites, CopyError::Busy("50 ms".to_owned())];
    for (number, error) in errors.into_iter().enumerate() {
        let told = number * 2;
        bench.double().change(|state| state.begin_error = Some(error.clone()));
        let refused = bench.snapshot(&["vol-1"], "s").unwrap_err();
        assert_eq!(refused.to_string(), error.to_string());
        bench.double().change(|state| state.begin_error = Some(error.clone()));
        assert_eq!(bench.clone_of_volume("c", "vol-1").unwrap_err().to_string(), error.to_string());
        assert_eq!(bench.lifecycle.operations().list().len(), told, "nobody was told of one");
        bench.double().change(|state| state.copy_end = CopyEnd::AtOnce(Err(error.clone())));
        assert!(bench.snapshot(&["vol-1"], "s").is_err() && bench.clone_of_volume("c", "vol-1").is_err());
        bench.double().change(|state| state.copy_end = CopyEnd::default());
        // The latest first.
        for operation in bench.lifecycle.operations().list().iter().take(2) {
            let end = operation.end().unwrap().unwrap_err();
            assert!(matches!(&*end, LifecycleError::Snapshot(SnapshotError::Copy(found)) if *found == error));
        }
    }
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    for fails in ["begin", "end", "replace"] {
        bench.double().change(|state| match fails {
            "begin" => state.begin_error = Some(CopyError::NoSpace),
            "end" => state.copy_end = CopyEnd::AtOnce(Err(CopyError::NoSpace)),
            _ => state.replace_error = true,
        });
        assert!(bench.restore("vol-1", snapshot_uid).is_err(), "{fails}");
        bench.double().change(|state| {
            (state.copy_end, state.replace_error) = (CopyEnd::default(), false);
            assert_eq!(state.copies, BTreeSet::from([CopyTarget::Snapshot(snapshot_uid)]), "{fails}");
            assert!(state.restored.is_empty());
        });
        assert!(bench.lifecycle.catalog().volume_by_uid(volume.volume_uid).unwrap().is_some(), "not hidden");
    }
    assert_eq!(bench.lifecycle.catalog().all_volumes().unwrap().len(), 1);
}

#[test]
fn what_is_made_of_an_encrypted_volume_is_encrypted() {
    let bench = Bench::new();
    let new = NewVolume {
        name: "vol-1".to_owned(),
        capacity_bytes: 4096,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: VolumeSettings { is_encrypted: true, ..VolumeSettings::default() },
    };
    bench.lifecycle.create_volume(&bench.locks.blocking_lock("vol-1"), &new).unwrap();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.clone_of_volume("of-volume", "vol-1").unwrap();
    finish(bench.start_clone("of-snapshot", CloneOf::Snapshot(snapshot_uid), 0).unwrap()).unwrap();
    for name in ["vol-1", "of-volume", "of-snapshot"] {
        assert!(bench.lifecycle.volume(name).unwrap().settings.is_encrypted, "{name}");
    }
    let snapshot = bench.lifecycle.catalog().snapshot_by_uid(snapshot_uid).unwrap().unwrap();
    assert!(snapshot.is_encrypted && snapshot.as_volume().settings.is_encrypted);
    bench.restore("vol-1", snapshot_uid).unwrap();
    assert!(bench.lifecycle.volume("vol-1").unwrap().settings.is_encrypted);
}

#[test]
fn a_clone_is_a_volume_of_its_own() {
    let (bench, volume) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.double().take_calls();
    let of_volume = bench.clone_of_volume("c", "vol-1").unwrap();
    assert_eq!(bench.double().take_calls(), ["begin copies, rows Some(Creating)"]);
    let of_snapshot = || CloneOf::Snapshot(snapshot_uid);
    let larger = finish(bench.start_clone("d", of_snapshot(), 8192).unwrap()).unwrap();
    let catalog = bench.lifecycle.catalog();
    assert_eq!(catalog.source_of(of_volume).unwrap(), Some(volume.volume_uid));
    assert_eq!(catalog.source_of(larger).unwrap(), Some(snapshot_uid));
    assert_eq!(catalog.source_of(volume.volume_uid).unwrap(), None);
    let clone = bench.lifecycle.volume("d").unwrap();
    assert_eq!((clone.capacity_bytes, clone.settings.labels["app"].as_str()), (8192, "db"));
    assert_eq!(clone.settings.description, "a clone");
    // Again.
    let again = bench.start_clone("d", of_snapshot(), 0).unwrap();
    assert!(again.made == larger && again.operation.is_none());
    for (name, source, capacity_bytes, property) in [
        ("d", CloneOf::Volume("vol-1".to_owned()), 0, "source"),
        ("vol-1", of_snapshot(), 0, "source"),
        ("d", of_snapshot(), 4096, "size in bytes"),
    ] {
        let error = bench.start_clone(name, source, capacity_bytes).unwrap_err();
        assert!(
            matches!(&error, LifecycleError::VolumeDiffers { property: is, .. } if *is == property),
            "{error}"
        );
    }
    let smaller = bench.start_clone("e", of_snapshot(), 512);
    assert!(matches!(smaller, Err(LifecycleError::Snapshot(SnapshotError::Smaller { source_bytes: 4096 }))));
    let odd = bench.start_clone("e", of_snapshot(), 4096 + 512);
    assert!(matches!(
        odd,
        Err(LifecycleError::Snapshot(SnapshotError::Unaligned { block_size_bytes: 4096 }))
    ));
    assert!(matches!(
        bench.start_clone("x-part1", of_snapshot(), 0),
        Err(LifecycleError::PartitionName { .. })
    ));
    // Any order of deletion.
    assert!(bench.delete_snapshot(snapshot_uid).unwrap() && bench.delete("vol-1").unwrap());
    assert!(bench.delete("c").unwrap() && bench.delete("d").unwrap());
}

#[test]
fn a_restore_is_hidden_until_it_is_done_and_raises_the_incarnation_first() {
    let (bench, volume) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.double().take_calls();
    bench.hold_copies();
    let started = bench.start_restore("vol-1", snapshot_uid).unwrap();
    let again = bench.start_restore("vol-1", snapshot_uid).unwrap();
    let id = |started: &Started<Uuid>| started.operation.as_ref().map(|operation| operation.id());
    assert_eq!(id(&started), id(&again), "a repeated call joins it");
    assert!(in_progress(bench.attach("vol-1", "node-a", true)));
    assert!(in_progress(bench.lifecycle.resize_volume(&bench.locks.blocking_lock("vol-1"), 8192)));
    assert!(in_progress(bench.snapshot(&["vol-1"], "t")) && in_progress(bench.clone_of_volume("c", "vol-1")));
    assert!(in_progress(bench.delete("vol-1")) && in_progress(bench.delete_snapshot(snapshot_uid)));
    bench.end_held(1, Ok(()));
    finish(started).unwrap();
    assert_eq!(
        bench.double().take_calls(),
        [
            "release, visible false",
            "begin copies, rows Some(Ready)",
            "replace storage, visible false, incarnation 2, content written",
            "content written"
        ]
    );
    let restored = bench.lifecycle.catalog().volume_by_uid(volume.volume_uid).unwrap();
    let restored_settings = VolumeSettings { content: Content::Written, ..volume.settings.clone() };
    assert_eq!(
        restored,
        Some(VolumeRecord { incarnation: 2, settings: restored_settings, ..volume }),
        "shown"
    );
    bench.attach("vol-1", "node-a", false).unwrap();
    assert!(matches!(bench.restore("vol-1", snapshot_uid), Err(LifecycleError::VolumeAttached { .. })));
    bench.detach("vol-1").unwrap();
    bench.double().change(|state| state.open_connections = 1);
    assert!(matches!(bench.restore("vol-1", snapshot_uid), Err(LifecycleError::VolumeOpen { .. })));
    assert!(bench.lifecycle.operations().list().len() == 2, "the snapshot and the restore that was");
    bench.create("vol-2", 4096).unwrap();
    let of_another = bench.restore("vol-2", snapshot_uid);
    assert!(matches!(of_another, Err(LifecycleError::Snapshot(SnapshotError::NotFound(_)))));
}

#[test]
fn while_a_copy_goes_on_nobody_takes_its_source_or_its_name() {
    let (bench, _) = Bench::with_volume();
    bench.hold_copies();
    let snapshot = bench.start_snapshot(&["vol-1"], "s").unwrap();
    let clone = bench.start_clone("c", CloneOf::Volume("vol-1".to_owned()), 0).unwrap();
    assert_eq!(bench.listed(), ["vol-1@s Creating"]);
    assert!(in_progress(bench.delete("vol-1")) && in_progress(bench.create("c", 4096)));
    assert!(in_progress(bench.delete("c")), "it is not there yet, and not for others to take");
    assert!(in_progress(bench.restore("vol-1", snapshot.made[0])), "not ready");
    assert!(in_progress(finish_start(bench.start_clone("d", CloneOf::Snapshot(snapshot.made[0]), 0))));
    // A repeated call joins it.
    let joined = bench.start_snapshot(&["vol-1"], "s").unwrap();
    assert_eq!(joined.made, snapshot.made);
    assert!(joined.operation.is_some());
    let joined = bench.start_clone("c", CloneOf::Volume("vol-1".to_owned()), 0).unwrap();
    assert!(joined.made == clone.made && joined.operation.is_some());
    // The volume itself is used meanwhile.
    bench.attach("vol-1", "node-a", false).unwrap();
    bench.detach("vol-1").unwrap();
    bench.end_held(2, Ok(()));
    finish(snapshot).unwrap();
    finish(clone).unwrap();
    assert_eq!(bench.listed(), ["vol-1@s Ready"]);
    assert!(bench.create("c", 4096).is_ok(), "it has these properties");
}

fn finish_start<T>(started: Result<Started<T>, LifecycleError>) -> Result<T, LifecycleError> {
    finish(started?)
}

#[test]
fn deleting_a_snapshot_that_is_being_made_cancels_it_and_its_group() {
    let (bench, _) = Bench::with_volume();
    bench.create("vol-2", 4096).unwrap();
    bench.hold_copies();
    let started = bench.start_snapshot(&["vol-1", "vol-2"], "s").unwrap();
    let copier = std::thread::spawn({
        let data_side = Arc::clone(&bench.lifecycle.data_side);
        move || {
            let (report, wanted) = data_side.state.lock().unwrap().held.pop().unwrap();
            wait_until(|| report.is_cancelled());
            data_side.change(|state| state.drop_copies(&wanted));
            report.end(Err(CopyError::Cancelled));
        }
    });
    assert!(bench.delete_snapshot(started.made[1]).unwrap(), "it was listed");
    copier.join().unwrap();
    assert_eq!(bench.listed(), [""; 0]);
    assert!(finish(started).unwrap_err().to_string().contains("cancelled"));
}

#[test]
fn more_copies_than_there_are_turns_wait_or_are_told_so() {
    let (bench, _) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.hold_copies();
    let clones: Vec<_> = (0..TURNS + 1)
        .map(|number| bench.start_clone(&format!("c{number}"), CloneOf::Snapshot(snapshot_uid), 0).unwrap())
        .collect();
    wait_until(|| bench.double().state.lock().unwrap().held.len() == TURNS);
    // An instant cannot wait behind the call.
    let busy = bench.start_snapshot(&["vol-1"], "t");
    assert!(matches!(busy, Err(LifecycleError::Snapshot(SnapshotError::Busy { running: TURNS }))));
    assert_eq!(bench.listed(), ["vol-1@s Ready"]);
    bench.end_held(1, Ok(()));
    bench.end_held(TURNS, Ok(()));
    for clone in clones {
        finish(clone).unwrap();
    }
    bench.double().change(|state| state.copy_end = CopyEnd::default());
    bench.snapshot(&["vol-1"], "t").unwrap();
}

#[test]
fn a_volume_with_snapshots_stays_unless_they_are_kept() {
    let (bench, _) = Bench::with_volume();
    let kept = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    let refused = bench.delete("vol-1");
    assert!(matches!(
        refused,
        Err(LifecycleError::Snapshot(SnapshotError::VolumeHasSnapshots { count: 1, .. }))
    ));
    let lock = bench.locks.blocking_lock("vol-1");
    assert!(bench.lifecycle.delete_volume(&lock, true).unwrap());
    drop(lock);
    assert_eq!(bench.listed(), ["@s Ready"]);
    // A new volume of the name has none, and takes none of it.
    bench.create("vol-1", 4096).unwrap();
    assert_eq!(
        bench
            .lifecycle
            .catalog()
            .snapshot_count(bench.lifecycle.volume("vol-1").unwrap().volume_uid)
            .unwrap(),
        0
    );
    let by_name = SnapshotNamed::Name { volume_name: "vol-1".to_owned(), name: "s".to_owned() };
    assert!(bench.lifecycle.snapshot(&by_name).is_err());
    let (snapshot, _) = bench.lifecycle.snapshot(&SnapshotNamed::Uid(kept)).unwrap();
    assert_eq!(snapshot.export_name(), format!("@{kept}"));
    assert!(bench.restore("vol-1", kept).is_err(), "it is another volume's");
    bench.snapshot(&["vol-1"], "s").unwrap();
    finish(bench.start_clone("again", CloneOf::Snapshot(kept), 0).unwrap()).unwrap();
    assert_eq!(bench.listed(), ["@s Ready", "vol-1@s Ready"]);
    assert!(bench.delete_snapshot(kept).unwrap());
    assert_eq!(bench.listed(), ["vol-1@s Ready"]);
}

#[test]
fn a_snapshot_that_is_open_stays() {
    let (bench, _) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.double().change(|state| state.open_connections = 2);
    let refused = bench.delete_snapshot(snapshot_uid);
    assert!(matches!(refused, Err(LifecycleError::Snapshot(SnapshotError::Open { .. }))));
    assert!(bench.lifecycle.catalog().snapshot_by_export_name("vol-1@s").unwrap().is_some(), "shown again");
}

#[test]
fn a_deletion_that_failed_is_finished_by_the_next_call() {
    let (bench, _) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.double().change(|state| state.delete_error = true);
    assert!(matches!(bench.delete_snapshot(snapshot_uid), Err(LifecycleError::Storage { .. })));
    assert_eq!(bench.listed(), [""; 0], "gone for everybody");
    assert!(bench.snapshot(&["vol-1"], "s").is_err(), "its name is not free yet");
    bench.double().change(|state| state.delete_error = false);
    let second = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    assert_ne!(second, snapshot_uid);
    assert_eq!(bench.double().state.lock().unwrap().copies, BTreeSet::from([CopyTarget::Snapshot(second)]));
}

/// What a server has after it was killed at that moment and started again: the double with its storage, and what was recovered.
fn started_again(moment: &Moment) -> (Lifecycle<Double>, Recovered) {
    let catalog = Catalog::open(&moment.data_dir).unwrap();
    let state = DoubleState {
        stored: moment.stored.clone(),
        copies: moment.copies.clone(),
        restored: moment.restored.clone(),
        ..DoubleState::default()
    };
    let double = Double { catalog: catalog.clone(), state: Mutex::new(state) };
    let lifecycle = Lifecycle::new(catalog, Arc::new(double));
    let recovered = lifecycle.recover().unwrap();
    (lifecycle, recovered)
}

/// Of the state after a recovery: every row is ready and has its storage, and no storage is without a row.
fn check_whole(lifecycle: &Lifecycle<Double>, moment: &Moment) {
    let volumes = lifecycle.catalog().all_volumes().unwrap();
    let snapshots = lifecycle.catalog().all_snapshots().unwrap();
    assert!(volumes.iter().all(|(_, state)| *state == VolumeState::Ready), "{moment:?}");
    assert!(snapshots.iter().all(|(_, state)| *state == SnapshotState::Ready), "{moment:?}");
    let state = lifecycle.data_side().state.lock().unwrap();
    let stored: BTreeSet<Uuid> = volumes.iter().map(|(volume, _)| volume.volume_uid).collect();
    assert_eq!(state.stored, stored, "{moment:?}");
    let copies: BTreeSet<CopyTarget> =
        snapshots.iter().map(|(snapshot, _)| CopyTarget::Snapshot(snapshot.snapshot_uid)).collect();
    assert_eq!(state.copies, copies, "{moment:?}");
}

#[test]
fn a_server_that_dies_between_any_two_steps_is_before_or_after() {
    let (bench, volume) = Bench::with_volume();
    bench.create("vol-2", 4096).unwrap();
    let data_dir = bench.dir.path().to_owned();
    bench.double().change(|state| state.moments_dir = Some(data_dir));
    let group = bench.snapshot(&["vol-1", "vol-2"], "s").unwrap();
    let cloned = bench.clone_of_volume("c", "vol-1").unwrap();
    let of_snapshot = finish(bench.start_clone("d", CloneOf::Snapshot(group[0]), 0).unwrap()).unwrap();
    bench.restore("vol-1", group[0]).unwrap();
    bench.double().change(|state| state.copy_end = CopyEnd::AtOnce(Err(CopyError::NoSpace)));
    assert!(bench.snapshot(&["vol-1", "vol-2"], "t").is_err() && bench.restore("vol-1", group[0]).is_err());
    bench.delete_snapshot(group[1]).unwrap();
    bench.double().moment();
    let moments = std::mem::take(&mut bench.double().state.lock().unwrap().moments);
    assert!(moments.len() > 12, "{} moments", moments.len());
    let (mut before, mut in_between) = (0, 0);
    for moment in &moments {
        let (lifecycle, recovered) = started_again(moment);
        check_whole(&lifecycle, moment);
        assert_eq!(recovered.orphans, 0, "{moment:?}");
        let catalog = lifecycle.catalog();
        let snapshots = catalog.all_snapshots().unwrap();
        let is_deleted = moment.behind.contains("delete copy");
        assert!(matches!(snapshots.len(), 0 | 2) || is_deleted || snapshots.len() == 1, "{moment:?}");
        before += usize::from(snapshots.is_empty());
        let unfinished =
            recovered.unfinished_snapshots + recovered.unfinished_volumes + recovered.unfinished_restores;
        in_between += usize::from(unfinished > 0);
        // Whoever has the new bytes has the new incarnation.
        if moment.restored.contains(&volume.volume_uid) {
            assert_eq!(catalog.volume_by_name("vol-1").unwrap().unwrap().incarnation, 2);
        }
        let volumes = catalog.all_volumes().unwrap();
        let uids: Vec<Uuid> = volumes.iter().map(|(volume, _)| volume.volume_uid).collect();
        assert!(!uids.contains(&of_snapshot) || uids.contains(&cloned), "in their order");
    }
    assert!(before >= 2 && in_between >= 5, "{before} before, {in_between} in between");
}

#[test]
fn a_copy_that_no_row_explains_is_left_alone() {
    let (bench, volume) = Bench::with_volume();
    let (orphan, unknown) = (CopyTarget::Snapshot(Uuid::new_v4()), CopyTarget::Restored(Uuid::new_v4()));
    let left = CopyTarget::Restored(volume.volume_uid);
    bench.double().change(|state| state.copies.extend([orphan, unknown, left]));
    let expected = Recovered { unfinished_restores: 1, orphans: 2, ..Recovered::default() };
    assert_eq!(bench.lifecycle.recover().unwrap(), expected);
    assert_eq!(bench.double().state.lock().unwrap().copies, BTreeSet::from([orphan, unknown]));
}

#[test]
fn copies_have_the_content_that_their_source_had_at_the_instant() {
    let (bench, volume) = Bench::with_volume();
    let catalog = bench.lifecycle.catalog();
    let volume_uid = volume.volume_uid;
    let content = |name: &str| bench.lifecycle.volume(name).unwrap().settings.content;
    let of_snapshot = |uid: Uuid| bench.lifecycle.snapshot(&SnapshotNamed::Uid(uid)).unwrap().0.content;
    catalog.change_content(volume_uid, content("vol-1"), Content::NeverWritten).unwrap();
    let empty = bench.snapshot(&["vol-1"], "empty").unwrap()[0];
    bench.clone_of_volume("empty", "vol-1").unwrap();
    assert_eq!((of_snapshot(empty), content("empty")), (Content::NeverWritten, Content::NeverWritten));
    // Somebody writes between the call's first look and the instant.
    bench.double().change(|state| state.writes_before_instant = true);
    let written = bench.snapshot(&["vol-1"], "written").unwrap()[0];
    assert_eq!(of_snapshot(written), Content::Written);
    bench.clone_of_volume("written", "vol-1").unwrap();
    assert_eq!(content("written"), Content::Written);
    bench.double().change(|state| state.writes_before_instant = false);
    // A restore takes the snapshot's.
    bench.restore("vol-1", empty).unwrap();
    assert_eq!(content("vol-1"), Content::NeverWritten);
    bench.restore("vol-1", written).unwrap();
    assert_eq!(content("vol-1"), Content::Written);
    let calls = bench.double().take_calls();
    let replaced: Vec<&String> = calls.iter().filter(|call| call.starts_with("replace")).collect();
    assert!(replaced.iter().all(|call| call.ends_with("content written")), "{replaced:?}: never the other");
    finish(bench.start_clone("of-empty", CloneOf::Snapshot(empty), 0).unwrap()).unwrap();
    assert_eq!(content("of-empty"), Content::NeverWritten);
    // Half a file system is nobody's.
    let attachment_id = Uuid::new_v4();
    catalog.change_content(volume_uid, Content::Written, Content::Initialising { attachment_id }).unwrap();
    for refused in [bench.snapshot(&["vol-1"], "t").map(drop), bench.clone_of_volume("t", "vol-1").map(drop)]
    {
        assert!(matches!(refused, Err(LifecycleError::Snapshot(SnapshotError::Initialising { .. }))));
    }
}

#[test]
fn a_protected_volume_is_not_restored() {
    let (bench, volume) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    let settings = VolumeSettings { is_protected: true, ..volume.settings };
    bench.lifecycle.catalog().set_properties(volume.volume_uid, &settings).unwrap();
    let refused = bench.restore("vol-1", snapshot_uid);
    assert!(matches!(refused, Err(LifecycleError::Settings(SettingsError::Protected(_)))));
    finish(bench.start_clone("c", CloneOf::Snapshot(snapshot_uid), 0).unwrap()).unwrap();
    assert!(!bench.lifecycle.volume("c").unwrap().settings.is_protected, "the clone is another");
}
