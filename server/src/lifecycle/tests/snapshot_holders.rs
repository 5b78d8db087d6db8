//! Snapshots that somebody has as a disk, and those of frozen file systems.

use super::copies::finish;
use super::*;
use crate::scope::Scope;

#[test]
fn a_snapshot_is_attached_beside_the_written_volume_and_stays_while_it_is() {
    let (bench, _) = Bench::with_volume();
    let snapshot_uid = bench.snapshot(&["vol-1"], "s").unwrap()[0];
    bench.attach("vol-1", "node-w", false).unwrap();
    bench.double().take_calls();
    let lock = || bench.locks.blocking_lock(&snapshot_lock_name(snapshot_uid));
    let wanted = |node_id: &str, boot_id: &str| AttachWanted {
        node_id: node_id.to_owned(),
        boot_id: boot_id.to_owned(),
        read_only: true,
        ..AttachWanted::default()
    };
    let attach = |wanted: &AttachWanted| bench.lifecycle.attach_snapshot(&lock(), snapshot_uid, wanted);
    let first = attach(&wanted("node-a", "boot")).unwrap();
    let second = attach(&wanted("node-b", "boot")).unwrap();
    assert_eq!((first.existed, first.volume.name.as_str()), (false, "vol-1@s"));
    assert!(first.attachment.read_only && first.attachment.is_shared, "{:?}", first.attachment);
    assert!(attach(&wanted("node-a", "boot")).unwrap().existed);
    let writer = AttachWanted { read_only: false, force: true, ..wanted("node-c", "") };
    let refused = attach(&writer);
    assert!(matches!(refused, Err(LifecycleError::Snapshot(SnapshotError::NeverChanges(_)))), "{refused:?}");
    assert!(bench.double().take_calls().is_empty(), "nothing waits for a sync, nobody is fenced");

    let is_attached = |result: Result<bool, LifecycleError>| match result {
        Err(LifecycleError::Snapshot(SnapshotError::Attached { node_ids, .. })) => node_ids,
        other => panic!("{other:?}"),
    };
    let nodes = is_attached(bench.delete_snapshot(snapshot_uid));
    assert!(nodes.contains("node-a") && nodes.contains("node-b"), "{nodes}");
    let end = |wanted: &DetachWanted| bench.lifecycle.detach_snapshot(&lock(), snapshot_uid, wanted);
    assert!(matches!(end(&DetachWanted::default()), Err(LifecycleError::SeveralHolders { .. })));
    let by_id = DetachWanted { attachment_id: Some(second.attachment.attachment_id), node_id: None };
    let attached_to = |id| bench.lifecycle.attached_to(id).unwrap();
    assert_eq!(attached_to(second.attachment.attachment_id), Some(AttachedTo::Snapshot(snapshot_uid)));
    assert!(end(&by_id).unwrap());
    assert_eq!(attached_to(second.attachment.attachment_id), None);

    // The disk of a kept one would have the name of a new volume's.
    let of_node = DetachWanted { node_id: Some("node-w".to_owned()), attachment_id: None };
    assert!(bench.lifecycle.detach_volume(&bench.locks.blocking_lock("vol-1"), &of_node).unwrap());
    let delete = || bench.lifecycle.delete_volume(&bench.locks.blocking_lock("vol-1"), true);
    assert_eq!(is_attached(delete()), "node-a");
    // One whose I/O has not finished is still there, and is waited for by whoever comes next.
    bench.double().change(|state| state.fence_error = true);
    assert!(matches!(end(&DetachWanted::default()), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.delete_snapshot(snapshot_uid), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(delete(), Err(LifecycleError::Unfenced { .. })));
    bench.double().change(|state| state.fence_error = false);
    assert!(delete().unwrap());
    assert!(bench.delete_snapshot(snapshot_uid).unwrap());
}

#[test]
fn only_snapshots_of_a_freeze_that_held_are_called_frozen() {
    let (bench, _) = Bench::with_volume();
    let take = |name: &str, freeze_id: u128| {
        let (locks, names) = (bench.locks(&["vol-1"]), ["vol-1".to_owned()]);
        let freeze_id = (freeze_id > 0).then(|| Uuid::from_u128(freeze_id));
        bench.lifecycle.create_snapshots(&locks, &names, name, freeze_id).and_then(finish)
    };
    let is_frozen = |uid: &Uuid| bench.lifecycle.snapshot(&SnapshotNamed::Uid(*uid)).unwrap().0.is_frozen;
    let (plain, first, second) = (take("p", 0).unwrap(), take("a", 1).unwrap(), take("b", 2).unwrap());
    assert_eq!(bench.lifecycle.mark_frozen(&Scope::All, Uuid::from_u128(1)).unwrap(), first);
    assert!(is_frozen(&first[0]) && !is_frozen(&second[0]) && !is_frozen(&plain[0]));
    let refused = bench.lifecycle.mark_frozen(&Scope::All, Uuid::from_u128(3));
    assert!(matches!(refused, Err(LifecycleError::Snapshot(SnapshotError::NotFound(_)))), "{refused:?}");
    // One that is there is what was asked for only if it was frozen, or is of the same freeze.
    assert_eq!(take("a", 9).unwrap(), first);
    assert_eq!(take("b", 2).unwrap(), second);
    for other in ["b", "p"] {
        let refused = take(other, 9);
        assert!(
            matches!(refused, Err(LifecycleError::Snapshot(SnapshotError::Exists { .. }))),
            "{refused:?}"
        );
    }
    assert_eq!(take("b", 0).unwrap(), second, "whoever asks for no freeze takes what is there");
}
