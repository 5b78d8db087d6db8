//! Adopted volumes: what is asked of the data side, and what never is.

use std::collections::BTreeMap;

use super::*;
use crate::backend::device::Found;
use crate::catalog::{Adopted, AdoptedKind, VolumeSettings};

impl AdoptedData for Double {
    fn adopt(&self, path: &str) -> Result<Found, AdoptError> {
        let state = self.record(format!("adopt {path}"));
        let adopted = Adopted {
            kind: AdoptedKind::BlockDevice,
            path: path.to_owned(),
            identity: state.device.identity.clone(),
        };
        Ok(Found { adopted, size_bytes: state.device.size_bytes, block_size_bytes: 512 })
    }

    fn identities_at(&self, path: &str) -> Result<Vec<String>, AdoptError> {
        let state = self.state.lock().unwrap();
        Ok(if path == MOVED_PATH { vec![state.device.identity.clone()] } else { vec!["wwid:2".to_owned()] })
    }

    fn measure_adopted(
        &self,
        _: &VolumeRecord,
        adopted: &Adopted,
        _: Option<u64>,
    ) -> Result<u64, AdoptError> {
        let (path, device_bytes) = (adopted.path.clone(), self.state.lock().unwrap().device.size_bytes);
        if device_bytes > 0 {
            Ok(device_bytes)
        } else {
            Err(AdoptError::Missing { path, identity: String::new() })
        }
    }

    fn is_open(&self, _: Uuid) -> bool {
        true
    }
}

/// What there is to adopt.
#[derive(Debug, Default)]
pub(super) struct Device {
    size_bytes: u64,
    identity: String,
}

const PATH: &str = "/dev/sda";
/// Another name of the same.
const MOVED_PATH: &str = "/dev/sdq";

fn wanted(name: &str) -> AdoptWanted {
    let new = NewVolume {
        name: name.to_owned(),
        capacity_bytes: 0,
        block_size_bytes: 4096,
        backend: BackendKind::Device,
        write_cache_on: true,
        settings: VolumeSettings::default(),
    };
    AdoptWanted { new, path: PATH.to_owned(), block_size_bytes: None }
}

/// With a device of so many bytes.
fn bench(device_bytes: u64, identity: &str) -> Bench {
    let bench = Bench::new();
    let device = Device { size_bytes: device_bytes, identity: identity.to_owned() };
    bench.double().change(|state| state.device = device);
    bench
}

fn adopt(bench: &Bench, wanted: &AdoptWanted) -> Result<VolumeRecord, LifecycleError> {
    bench.lifecycle.adopt_volume(&bench.locks.blocking_lock(&wanted.new.name), wanted)
}

fn resize(bench: &Bench, capacity_bytes: u64) -> Result<VolumeRecord, LifecycleError> {
    bench.lifecycle.resize_volume(&bench.locks.blocking_lock("disk"), capacity_bytes)
}

#[test]
fn an_adoption_makes_no_storage_and_may_be_repeated() {
    let bench = bench(1 << 20, "wwid:1");
    let volume = adopt(&bench, &wanted("disk")).unwrap();
    assert_eq!((volume.capacity_bytes, volume.block_size_bytes), (1 << 20, 512), "the device's own");
    assert_eq!(volume.backend, BackendKind::Device);
    assert_eq!(bench.double().take_calls(), ["adopt /dev/sda"]);
    assert_eq!(adopt(&bench, &wanted("disk")).unwrap().volume_uid, volume.volume_uid);
    assert!(bench.double().take_calls().is_empty(), "it may be in use by now, by ourselves");
    let elsewhere = AdoptWanted { path: "/dev/sdb".to_owned(), ..wanted("disk") };
    let differs = adopt(&bench, &elsewhere).unwrap_err();
    assert!(matches!(differs, LifecycleError::VolumeDiffers { property: "adopted path", .. }), "{differs}");
    let moved = AdoptWanted { path: MOVED_PATH.to_owned(), ..wanted("disk") };
    assert_eq!(adopt(&bench, &moved).unwrap().volume_uid, volume.volume_uid, "the same device");
}

#[test]
fn what_has_no_identity_is_what_its_path_says() {
    let bench = bench(1 << 20, "");
    adopt(&bench, &wanted("disk")).unwrap();
    let moved = AdoptWanted { path: MOVED_PATH.to_owned(), ..wanted("disk") };
    assert!(matches!(adopt(&bench, &moved), Err(LifecycleError::VolumeDiffers { .. })));
}

#[test]
fn what_another_volume_has_adopted_leaves_no_volume() {
    let bench = bench(1 << 20, "wwid:1");
    adopt(&bench, &wanted("disk")).unwrap();
    let error = adopt(&bench, &wanted("other")).unwrap_err();
    assert_eq!(error.to_string(), "/dev/sda is adopted already, by the volume disk");
    assert!(bench.lifecycle.catalog().volume_in_any_state("other").unwrap().is_none());
    assert!(bench.lifecycle.catalog().volume_by_name("disk").unwrap().is_some());
}

#[test]
fn a_block_size_that_the_device_has_not_is_refused() {
    let bench = bench(512 * 9, "");
    let large = AdoptWanted { block_size_bytes: Some(4096), ..wanted("disk") };
    assert!(matches!(adopt(&bench, &large), Err(LifecycleError::BlockSize { .. })));
    assert!(bench.lifecycle.catalog().volume_in_any_state("disk").unwrap().is_none());
}

#[test]
fn a_device_that_grows_takes_its_volume_along() {
    let bench = bench(1 << 20, "wwid:1");
    let volume = adopt(&bench, &wanted("disk")).unwrap();
    bench.double().take_calls();
    bench.double().change(|state| state.device.size_bytes = (2 << 20) + 100);
    bench.lifecycle.follow_sizes();
    let grown = bench.lifecycle.volume("disk").unwrap();
    assert_eq!(grown.capacity_bytes, 2 << 20, "whole blocks");
    assert_eq!(bench.double().take_calls(), ["reopen attachments"]);
    bench.lifecycle.follow_sizes();
    assert!(bench.double().take_calls().is_empty(), "once");
    bench.double().change(|state| state.device.size_bytes = 1 << 20);
    let (same, problem) = bench.lifecycle.follow_size(grown.clone()).unwrap();
    assert_eq!(same, grown, "never smaller by itself");
    assert!(matches!(problem, Some(AdoptError::Shrunk { found_bytes: 1_048_576, .. })));
    bench.double().change(|state| state.device.size_bytes = 0);
    let (_, problem) = bench.lifecycle.follow_size(volume).unwrap();
    assert!(matches!(problem, Some(AdoptError::Missing { .. })));
}

#[test]
fn a_resize_takes_over_the_size_that_the_device_has_and_no_other() {
    let bench = bench(1 << 20, "wwid:1");
    adopt(&bench, &wanted("disk")).unwrap();
    for size_bytes in [2 << 20, 1 << 19] {
        let error = resize(&bench, size_bytes).unwrap_err();
        assert!(matches!(error, LifecycleError::AdoptedSize { size_bytes: 1_048_576, .. }), "{error}");
    }
    bench.double().change(|state| state.device.size_bytes = 3 << 20);
    assert_eq!(resize(&bench, 3 << 20).unwrap().capacity_bytes, 3 << 20);
    let calls = bench.double().take_calls();
    assert!(!calls.iter().any(|call| call.starts_with("grow")), "{calls:?}");
}

#[test]
fn a_start_leaves_adopted_volumes_alone_and_removes_those_that_were_not_finished() {
    let bench = bench(1 << 20, "wwid:1");
    adopt(&bench, &wanted("disk")).unwrap();
    let catalog = bench.lifecycle.catalog();
    let half = catalog.begin_creating(&wanted("half").new);
    assert!(half.is_err(), "a volume has a size");
    let half = catalog.begin_creating(&NewVolume { capacity_bytes: 512, ..wanted("half").new }).unwrap();
    let recovered = bench.lifecycle.recover().unwrap();
    assert_eq!((recovered.unfinished_volumes, recovered.orphans), (1, 0));
    assert_eq!(catalog.adopted(half.volume_uid).unwrap(), None);
    assert!(bench.lifecycle.volume("disk").is_ok());
}

#[test]
fn snapshots_and_clones_of_what_was_adopted_are_refused_and_say_where_to_take_them() {
    let bench = bench(1 << 20, "wwid:1");
    adopt(&bench, &wanted("disk")).unwrap();
    bench.double().take_calls();
    let locks = [bench.locks.blocking_lock("disk"), bench.locks.blocking_lock("clone")];
    let snapshot = bench.lifecycle.create_snapshots(&locks, &["disk".to_owned()], "s", None).unwrap_err();
    let clone = CloneWanted {
        name: "clone".to_owned(),
        source: CloneOf::Volume("disk".to_owned()),
        capacity_bytes: 0,
        labels: BTreeMap::new(),
        description: String::new(),
    };
    for error in [snapshot, bench.lifecycle.clone_volume(&locks, &clone).unwrap_err()] {
        let LifecycleError::Snapshot(SnapshotError::Unsupported { name, reason }) = &error else {
            panic!("{error}");
        };
        assert!(name == "disk" && reason.contains("take the snapshot below it"), "{error}");
    }
    assert!(bench.lifecycle.catalog().volume_in_any_state("clone").unwrap().is_none());
    assert_eq!(bench.double().take_calls(), [""; 0]);
}
