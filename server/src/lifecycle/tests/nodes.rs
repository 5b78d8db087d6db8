//! Nodes that are deleted while volumes are attached to them.

use std::time::Instant;

use super::*;
use crate::catalog::NodeFacts;

/// Nothing here takes so long.
const DEADLINE: Duration = Duration::from_secs(60);

fn register(bench: &Bench, node_id: &str) {
    let facts = NodeFacts { node_id: node_id.to_owned(), ..NodeFacts::default() };
    bench.lifecycle.register_node(&facts).unwrap();
}

/// By force, and only if the node is registered.
fn wanted(node_id: &str) -> AttachWanted {
    let node_id = node_id.to_owned();
    AttachWanted { node_id, force: true, node_must_be_registered: true, ..AttachWanted::default() }
}

fn is_unknown(outcome: &Result<Attached, LifecycleError>) -> bool {
    matches!(outcome, Err(LifecycleError::Nodes(NodesError::NotFound(_))))
}

#[test]
fn a_node_that_was_deleted_while_the_attach_waited_for_its_volume_gets_nothing_and_ends_nobody() {
    let (bench, _) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    bench.double().take_calls();
    register(&bench, "node-b");
    // The attach waits for this.
    let lock = bench.locks.blocking_lock("vol-1");
    assert!(bench.lifecycle.delete_node("node-b", "").unwrap());
    let outcome = bench.lifecycle.attach_volume(&lock, &wanted("node-b"));
    assert!(is_unknown(&outcome), "{outcome:?}");
    assert_eq!(bench.double().take_calls(), [""; 0], "nobody was disturbed");
    drop(lock);
    register(&bench, "node-b");
    let lock = bench.locks.blocking_lock("vol-1");
    bench.lifecycle.attach_volume(&lock, &wanted("node-b")).unwrap();
    let refused = bench.lifecycle.delete_node("node-b", "");
    assert!(matches!(refused, Err(LifecycleError::Nodes(NodesError::Attached(_)))), "{refused:?}");
}

#[test]
fn a_node_that_is_deleted_while_its_predecessor_is_fenced_gets_nothing() {
    let (bench, volume) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    register(&bench, "node-b");
    bench.double().take_calls();
    std::thread::scope(|threads| {
        // A deletion is about to commit.
        let deletion = bench.lifecycle.nodes_seen.lock().unwrap();
        let attach = threads
            .spawn(|| bench.lifecycle.attach_volume(&bench.locks.blocking_lock("vol-1"), &wanted("node-b")));
        let deadline = Instant::now() + DEADLINE;
        // The attach has looked for the node by now.
        while bench.double().state.lock().unwrap().calls.is_empty() {
            assert!(Instant::now() < deadline && !attach.is_finished(), "nobody is fenced");
            std::thread::yield_now();
        }
        assert!(bench.lifecycle.catalog().forget_node("node-b").unwrap());
        drop(deletion);
        let outcome = attach.join().unwrap();
        assert!(is_unknown(&outcome), "{outcome:?}");
    });
    assert_eq!(bench.double().attachment_state(volume.volume_uid), None);
    assert_eq!(bench.double().take_calls(), ["fence node-a, row Ending"]);
}

#[test]
fn of_an_attach_and_a_deletion_at_once_one_is_refused() {
    for _ in 0..50 {
        let (bench, volume) = Bench::with_volume();
        register(&bench, "node-b");
        let (attached, deleted) = std::thread::scope(|threads| {
            let deletion = threads.spawn(|| bench.lifecycle.delete_node("node-b", ""));
            let lock = bench.locks.blocking_lock("vol-1");
            let attached = bench.lifecycle.attach_volume(&lock, &wanted("node-b"));
            (attached, deletion.join().unwrap())
        });
        assert_eq!(attached.is_ok(), deleted.is_err(), "{attached:?} {deleted:?}");
        let is_there = bench.double().attachment_state(volume.volume_uid).is_some();
        assert_eq!(attached.is_ok(), is_there);
    }
}
