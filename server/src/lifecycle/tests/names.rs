//! Names, and locks on them.

use super::*;

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
        settings: Default::default(),
    };
    let old = bench.double().catalog.begin_creating(&new).unwrap();
    bench.double().catalog.finish_creating(old.volume_uid).unwrap();
    assert_eq!(bench.create("vol-1-part1", 4096).unwrap().volume_uid, old.volume_uid);
    assert!(!bench.attach("vol-1-part1", "n", false).unwrap().existed);
    assert!(bench.detach("vol-1-part1").unwrap() && bench.delete("vol-1-part1").unwrap());
}
