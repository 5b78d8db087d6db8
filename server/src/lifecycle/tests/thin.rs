//! Volumes in a thin pool: what is refused, and where clones go.

use std::collections::BTreeMap;

use super::*;
use crate::catalog::NewSnapshot;

fn new_volume(name: &str) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        capacity_bytes: 1 << 20,
        block_size_bytes: 4096,
        backend: BackendKind::Lvm,
        write_cache_on: true,
        settings: Default::default(),
    }
}

fn create(bench: &Bench, name: &str) -> Result<VolumeRecord, LifecycleError> {
    bench.lifecycle.create_volume(&bench.locks.blocking_lock(name), &new_volume(name))
}

fn fill_to(bench: &Bench, data_percent: f64, metadata_percent: f64) {
    bench.double().change(|state| state.thin_pool = Some(PoolFill { data_percent, metadata_percent }));
}

#[test]
fn without_a_pool_there_are_no_such_volumes_and_a_row_is_not_made() {
    let bench = Bench::new();
    let error = create(&bench, "thin").unwrap_err();
    assert!(matches!(error, LifecycleError::NoThinPool(name) if name == "thin"));
    assert!(bench.lifecycle.catalog().volume_in_any_state("thin").unwrap().is_none());
}

#[test]
fn a_pool_that_is_nearly_full_takes_no_new_copies_and_a_clone_is_where_its_source_is() {
    let bench = Bench::new();
    fill_to(&bench, 10.0, 10.0);
    bench.lifecycle.catalog().set_thin_pool("vg0/pool".to_owned());
    create(&bench, "thin").unwrap();
    // Whether the data directory has reflinks is no matter of the pool's.
    bench.double().change(|state| state.can_copy_error = Some(CopyError::Unsupported("ext4".to_owned())));
    let locks = [bench.locks.blocking_lock("thin"), bench.locks.blocking_lock("clone")];
    let names = ["thin".to_owned()];
    for (data_percent, metadata_percent) in [(100.0, 1.0), (1.0, 100.0)] {
        fill_to(&bench, data_percent, metadata_percent);
        let refused = bench.lifecycle.create_snapshots(&locks, &names, "s", None).unwrap_err();
        assert!(matches!(refused, LifecycleError::Snapshot(SnapshotError::ThinPool { .. })), "{refused}");
    }
    // A reserve of nothing, which these tests have.
    fill_to(&bench, 99.0, 1.0);
    assert!(bench.lifecycle.create_snapshots(&locks, &names, "s", None).is_ok());
    let wanted = CloneWanted {
        name: "clone".to_owned(),
        source: CloneOf::Volume("thin".to_owned()),
        capacity_bytes: 0,
        labels: BTreeMap::new(),
        description: String::new(),
    };
    let started = bench.lifecycle.clone_volume(&locks, &wanted).unwrap();
    let operation = started.operation.unwrap();
    assert!(operation.blocking_wait(Duration::from_secs(60)));
    assert!(operation.end().is_some_and(|ended| ended.is_ok()));
    assert_eq!(bench.lifecycle.volume("clone").unwrap().backend, BackendKind::Lvm);
}

#[test]
fn what_cannot_be_removed_from_a_pool_keeps_its_row_and_holds_up_no_start() {
    let bench = Bench::new();
    fill_to(&bench, 10.0, 10.0);
    let catalog = bench.lifecycle.catalog();
    catalog.set_thin_pool("vg0/pool".to_owned());
    let half = catalog.begin_creating(&new_volume("half")).unwrap();
    let taken = create(&bench, "thin").unwrap();
    let new = [NewSnapshot { snapshot_uid: Uuid::new_v4(), volume: taken }];
    catalog.begin_snapshots("s", Uuid::new_v4(), None, &new).unwrap();
    let snapshot_uid = new[0].snapshot_uid;
    bench.double().change(|state| state.delete_error = true);
    let recovered = bench.lifecycle.recover().unwrap();
    assert_eq!((recovered.unfinished_volumes, recovered.unfinished_snapshots), (0, 0));
    assert!(catalog.all_volumes().unwrap().iter().any(|(volume, _)| volume.volume_uid == half.volume_uid));
    assert!(catalog.snapshot_in_any_state(snapshot_uid).unwrap().is_some());
    bench.double().change(|state| state.delete_error = false);
    let recovered = bench.lifecycle.recover().unwrap();
    assert_eq!((recovered.unfinished_volumes, recovered.unfinished_snapshots), (1, 1));
    assert!(catalog.snapshot_in_any_state(snapshot_uid).unwrap().is_none());
    // A file that cannot be removed is the data directory's trouble, which the server does not start with.
    let file = NewVolume { backend: BackendKind::File, ..new_volume("file") };
    catalog.begin_creating(&file).unwrap();
    bench.double().change(|state| state.delete_error = true);
    assert!(bench.lifecycle.recover().is_err());
}
