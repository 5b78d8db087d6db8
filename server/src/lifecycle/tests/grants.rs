//! Grants: what goes together, and what has ended when one is taken away.

use super::*;
use crate::catalog::{GrantRecord, NodeFacts, VolumeSettings};

fn grant(bench: &Bench, node_id: &str, read_only: bool) -> Result<GrantRecord, LifecycleError> {
    let wanted = GrantWanted { node_id: node_id.to_owned(), read_only, node_must_be_registered: false };
    let lock = bench.locks.blocking_lock("vol-1");
    bench.lifecycle.create_grant(&lock, &wanted).map(|(_, grant)| grant)
}

fn withdraw(bench: &Bench, node_id: &str) -> Result<GrantEnded, LifecycleError> {
    bench.lifecycle.delete_grant(&bench.locks.blocking_lock("vol-1"), node_id)
}

fn attach(bench: &Bench, node_id: &str, read_only: bool) -> Result<Attached, LifecycleError> {
    let wanted = AttachWanted {
        node_id: node_id.to_owned(),
        read_only,
        only_if_granted: true,
        ..AttachWanted::default()
    };
    bench.lifecycle.attach_volume(&bench.locks.blocking_lock("vol-1"), &wanted)
}

/// Which nodes are in the way, as the error says.
fn in_the_way<T: std::fmt::Debug>(outcome: Result<T, LifecycleError>) -> String {
    match outcome {
        Err(LifecycleError::Grants(GrantsError::Granted { node_ids, .. })) => node_ids,
        Err(LifecycleError::VolumeAttached { node_id, .. }) => format!("attached {node_id}"),
        other => panic!("{other:?}"),
    }
}

fn is_not_granted(outcome: &Result<Attached, LifecycleError>) -> bool {
    matches!(outcome, Err(LifecycleError::Grants(GrantsError::NotGranted { .. })))
}

#[test]
fn the_grant_is_gone_before_the_node_is_fenced_and_the_fence_is_finished_by_whoever_comes_next() {
    let (bench, volume) = Bench::with_volume();
    assert!(is_not_granted(&attach(&bench, "node-a", false)));
    let made = grant(&bench, "node-a", false).unwrap();
    assert_eq!(grant(&bench, "node-a", false).unwrap(), made);
    attach(&bench, "node-a", false).unwrap();
    assert!(attach(&bench, "node-a", false).unwrap().existed);
    bench.double().take_calls();
    bench.double().change(|state| state.fence_error = true);
    let unfenced = withdraw(&bench, "node-a");
    assert!(matches!(unfenced, Err(LifecycleError::Unfenced { .. })), "{unfenced:?}");
    assert_eq!(bench.lifecycle.catalog().grants_of_volume(volume.volume_uid).unwrap(), []);
    assert!(is_not_granted(&attach(&bench, "node-a", false)), "from the first step on");
    // Another node waits for the fence as well.
    let waits = grant(&bench, "node-b", false);
    assert!(matches!(waits, Err(LifecycleError::Unfenced { .. })), "{waits:?}");
    bench.double().change(|state| state.fence_error = false);
    assert_eq!(withdraw(&bench, "node-a").unwrap(), GrantEnded { existed: false, was_attached: true });
    assert_eq!(bench.double().attachment_state(volume.volume_uid), None);
    assert_eq!(withdraw(&bench, "node-a").unwrap(), GrantEnded::default());
    grant(&bench, "node-b", false).unwrap();
    attach(&bench, "node-b", false).unwrap();
}

#[test]
fn a_node_that_detaches_keeps_its_grant_and_one_that_was_attached_by_hand_loses_it_too() {
    let (bench, volume) = Bench::with_volume();
    grant(&bench, "node-a", false).unwrap();
    for _ in 0..2 {
        assert!(!attach(&bench, "node-a", false).unwrap().existed);
        assert!(bench.detach("vol-1").unwrap());
    }
    bench.attach("vol-1", "node-b", false).unwrap();
    assert!(is_not_granted(&attach(&bench, "node-b", false)), "what it has is no grant");
    assert_eq!(withdraw(&bench, "node-a").unwrap(), GrantEnded { existed: true, was_attached: false });
    assert!(bench.double().attachment_state(volume.volume_uid).is_some(), "another node's is left alone");
    assert_eq!(withdraw(&bench, "node-b").unwrap(), GrantEnded { existed: false, was_attached: true });
    assert_eq!(bench.double().attachment_state(volume.volume_uid), None);
}

#[test]
fn one_writes_or_many_read() {
    let (bench, _) = Bench::with_volume();
    grant(&bench, "node-a", false).unwrap();
    for read_only in [false, true] {
        assert_eq!(in_the_way(grant(&bench, "node-b", read_only)), "node-a");
    }
    let differently = grant(&bench, "node-a", true);
    assert!(
        matches!(differently, Err(LifecycleError::Grants(GrantsError::Differently { read_only: false, .. }))),
        "{differently:?}"
    );
    withdraw(&bench, "node-a").unwrap();
    for node_id in ["node-a", "node-b", "node-c"] {
        grant(&bench, node_id, true).unwrap();
    }
    assert_eq!(in_the_way(grant(&bench, "node-d", false)), "node-a, node-b, node-c");
    let writes = attach(&bench, "node-a", false);
    assert!(matches!(writes, Err(LifecycleError::Grants(GrantsError::GrantedToRead { .. }))), "{writes:?}");
    attach(&bench, "node-a", true).unwrap();
    assert!(bench.detach("vol-1").unwrap());
    assert_eq!(in_the_way(bench.delete("vol-1")), "node-a, node-b, node-c");
    for node_id in ["node-a", "node-b", "node-c"] {
        withdraw(&bench, node_id).unwrap();
    }
    // Who has it without a grant is in the way as well.
    bench.attach("vol-1", "node-e", false).unwrap();
    assert_eq!(in_the_way(grant(&bench, "node-d", false)), "attached node-e");
    assert_eq!(in_the_way(grant(&bench, "node-e", true)), "attached node-e", "it writes itself");
    grant(&bench, "node-e", false).unwrap();
    withdraw(&bench, "node-e").unwrap();
    assert!(bench.delete("vol-1").unwrap());
    assert_eq!(withdraw(&bench, "node-a").unwrap(), GrantEnded::default(), "there is no such volume");
    assert!(matches!(grant(&bench, "node-a", true), Err(LifecycleError::VolumeNotFound(_))));
}

#[test]
fn a_shared_volume_has_several_writers_and_a_read_only_one_has_none() {
    let bench = Bench::new();
    let new = |settings| NewVolume {
        name: "vol-1".to_owned(),
        capacity_bytes: 4096,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
        settings,
    };
    let create = |settings| {
        let lock = bench.locks.blocking_lock("vol-1");
        bench.lifecycle.create_volume(&lock, &new(settings)).unwrap()
    };
    create(VolumeSettings { is_shared: true, ..VolumeSettings::default() });
    grant(&bench, "node-a", false).unwrap();
    grant(&bench, "node-b", false).unwrap();
    assert_eq!(in_the_way(grant(&bench, "node-c", true)), "node-a, node-b");
    for node_id in ["node-a", "node-b"] {
        withdraw(&bench, node_id).unwrap();
    }
    assert!(bench.delete("vol-1").unwrap());
    create(VolumeSettings { is_read_only: true, ..VolumeSettings::default() });
    let writes = grant(&bench, "node-a", false);
    assert!(matches!(writes, Err(LifecycleError::Settings(SettingsError::ReadOnly(_)))), "{writes:?}");
    grant(&bench, "node-a", true).unwrap();
}

#[test]
fn a_node_with_a_grant_stays_known_and_one_that_is_not_known_gets_none_where_it_has_to_be() {
    let (bench, _) = Bench::with_volume();
    let wanted = |node_id: &str| GrantWanted {
        node_id: node_id.to_owned(),
        read_only: false,
        node_must_be_registered: true,
    };
    let lock = bench.locks.blocking_lock("vol-1");
    let refused = bench.lifecycle.create_grant(&lock, &wanted("node-a"));
    assert!(matches!(refused, Err(LifecycleError::Nodes(NodesError::NotFound(_)))), "{refused:?}");
    let facts = NodeFacts { node_id: "node-a".to_owned(), ..NodeFacts::default() };
    bench.lifecycle.register_node(&facts).unwrap();
    bench.lifecycle.create_grant(&lock, &wanted("node-a")).unwrap();
    let kept = bench.lifecycle.delete_node("node-a", "");
    assert!(matches!(kept, Err(LifecycleError::Nodes(NodesError::Granted(_)))), "{kept:?}");
    bench.lifecycle.delete_grant(&lock, "node-a").unwrap();
    assert!(bench.lifecycle.delete_node("node-a", "").unwrap());
}

#[test]
fn of_a_grant_and_the_deletion_of_its_node_at_once_one_is_refused() {
    for _ in 0..50 {
        let (bench, volume) = Bench::with_volume();
        let facts = NodeFacts { node_id: "node-a".to_owned(), ..NodeFacts::default() };
        bench.lifecycle.register_node(&facts).unwrap();
        let wanted =
            GrantWanted { node_id: "node-a".to_owned(), node_must_be_registered: true, read_only: false };
        let (granted, deleted) = std::thread::scope(|threads| {
            let deletion = threads.spawn(|| bench.lifecycle.delete_node("node-a", ""));
            let lock = bench.locks.blocking_lock("vol-1");
            (bench.lifecycle.create_grant(&lock, &wanted), deletion.join().unwrap())
        });
        assert_eq!(granted.is_ok(), deleted.is_err(), "{granted:?} {deleted:?}");
        let there = bench.lifecycle.catalog().grants_of_volume(volume.volume_uid).unwrap();
        assert_eq!(granted.is_ok(), !there.is_empty());
    }
}
