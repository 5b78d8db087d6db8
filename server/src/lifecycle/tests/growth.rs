//! Volumes that are made larger.

use super::*;

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
