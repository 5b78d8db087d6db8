//! What changed: which instants it takes, what it keeps from being deleted, and how it ends.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use super::copies::wait_until;
use super::*;
use crate::backend::extent_map::{Place, Run};
use crate::catalog::Content;
use crate::volume::diff::{Change, Changed};

/// All bytes of a file at one address.
pub(super) struct OneRun {
    pub(super) capacity_bytes: u64,
    pub(super) address: u64,
}

impl ExtentMap for OneRun {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        *runs = vec![Run { bytes: range.clone(), place: Place::At(self.address + range.start) }];
        Ok(range.end)
    }
}

/// What is told of a comparison; nothing is taken while it is shut.
struct Told {
    operation: Arc<Operation>,
    parts: Receiver<DiffPart>,
    is_shut: Arc<AtomicBool>,
}

impl Bench {
    fn diff(
        &self,
        base: Option<Uuid>,
        target: CloneOf,
        offset_bytes: u64,
        is_shut: bool,
    ) -> Result<Told, LifecycleError> {
        let wanted = DiffWanted { base, target, offset_bytes };
        let names = wanted.lock_names();
        let locks = self.locks(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let (sender, parts) = channel();
        let is_shut = Arc::new(AtomicBool::new(is_shut));
        let takes = Arc::clone(&is_shut);
        let operation = self.lifecycle.begin_diff(&locks, &wanted, move |part| {
            if takes.load(Ordering::Relaxed) {
                return Err(NotTaken::Full(part));
            }
            sender.send(part).map_err(|_| NotTaken::Gone)
        })?;
        Ok(Told { operation, parts, is_shut })
    }
}

impl Told {
    /// The changes, to the end.
    fn all(self) -> (Vec<Changed>, DiffTotal) {
        let mut changes = Vec::new();
        for part in self.parts.iter() {
            changes.extend(part.changes);
            if let Some(total) = part.total {
                self.ended().unwrap();
                return (changes, total);
            }
        }
        panic!("it ended with {:?}", self.operation.end());
    }

    fn ended(&self) -> OperationEnd {
        wait_until(|| self.operation.end().is_some());
        self.operation.end().unwrap()
    }
}

fn data(bytes: Range<u64>) -> Vec<Changed> {
    vec![Changed { bytes, change: Change::Data }]
}

#[test]
fn two_snapshots_are_compared_from_an_offset_on_and_nothing_is_copied() {
    let (bench, _) = Bench::with_volume();
    let (first, second) =
        (bench.snapshot(&["vol-1"], "a").unwrap()[0], bench.snapshot(&["vol-1"], "b").unwrap()[0]);
    bench.double().take_calls();
    let of = |base, target, offset| bench.diff(base, CloneOf::Snapshot(target), offset, false).unwrap().all();
    let (changes, total) = of(Some(first), second, 0);
    assert_eq!(changes, data(0..4096));
    let expected =
        DiffTotal { base_bytes: 4096, target_bytes: 4096, data_bytes: 4096, zero_bytes: 0, ranges: 1 };
    assert_eq!(total, expected);
    assert_eq!(of(Some(first), first, 0).0, []);
    assert_eq!(of(None, first, 0), (data(0..4096), DiffTotal { base_bytes: 0, ..expected }));
    assert_eq!(of(Some(first), second, 1024).0, data(1024..4096));
    assert_eq!(of(Some(first), second, 4096).0, []);
    let behind = bench.diff(Some(first), CloneOf::Snapshot(second), 4097, false).map(|_| ());
    let behind =
        matches!(behind, Err(LifecycleError::Snapshot(SnapshotError::BehindEnd { target_bytes: 4096 })));
    assert!(behind);
    assert_eq!(bench.double().take_calls(), [""; 0]);
}

#[test]
fn a_volume_is_compared_through_an_instant_of_which_nothing_is_left() {
    let (bench, _) = Bench::with_volume();
    let base = bench.snapshot(&["vol-1"], "a").unwrap()[0];
    bench.double().take_calls();
    let volume = || CloneOf::Volume("vol-1".to_owned());
    let (changes, _) = bench.diff(Some(base), volume(), 0, false).unwrap().all();
    assert_eq!(changes, data(0..4096));
    assert_eq!(bench.double().take_calls(), ["begin copies, rows None"], "the catalog knows nothing of it");
    assert_eq!(bench.listed(), ["vol-1@a Ready"]);
    bench.hold_copies();
    let told = bench.diff(Some(base), volume(), 0, false).unwrap();
    assert!(told.parts.try_recv().is_err(), "before its bytes are gathered nothing is told");
    bench.end_held(1, Err(CopyError::NoSpace));
    assert!(told.ended().is_err() && told.parts.recv().is_err());
}

#[test]
fn a_volume_that_cannot_be_copied_cannot_be_compared() {
    let (bench, volume) = Bench::with_volume();
    let refused = |bench: &Bench| {
        let refused = bench.diff(None, CloneOf::Volume("vol-1".to_owned()), 0, false).map(|_| ());
        refused.unwrap_err().to_string()
    };
    bench.double().change(|state| state.begin_error = Some(CopyError::NoSpace));
    assert!(refused(&bench).contains("no space left"));
    assert!(bench.lifecycle.operations().list().is_empty(), "nobody was told of it");
    bench.double().change(|state| state.can_copy_error = Some(CopyError::Unsupported("ext4".to_owned())));
    assert!(refused(&bench).contains("ext4"));
    bench.double().change(|state| state.can_copy_error = None);
    let attachment_id = Uuid::new_v4();
    let initialising = Content::Initialising { attachment_id };
    let catalog = bench.lifecycle.catalog();
    catalog.change_content(volume.volume_uid, volume.settings.content, initialising).unwrap();
    assert!(refused(&bench).contains("initialised"));
}

#[test]
fn what_is_compared_is_neither_deleted_nor_restored_until_the_comparison_ends() {
    let (bench, _) = Bench::with_volume();
    let uids: Vec<Uuid> =
        ["a", "b"].iter().map(|name| bench.snapshot(&["vol-1"], name).unwrap()[0]).collect();
    let told = bench.diff(Some(uids[0]), CloneOf::Snapshot(uids[1]), 0, true).unwrap();
    let of_volume = bench.diff(Some(uids[0]), CloneOf::Volume("vol-1".to_owned()), 0, true).unwrap();
    for uid in &uids {
        assert!(copies::in_progress(bench.delete_snapshot(*uid)));
    }
    assert!(copies::in_progress(bench.start_restore("vol-1", uids[0])));
    of_volume.operation.cancel();
    assert!(of_volume.ended().is_err());
    told.is_shut.store(false, Ordering::Relaxed);
    told.all();
    for uid in uids {
        assert!(bench.delete_snapshot(uid).unwrap());
    }
}

#[test]
fn a_caller_that_leaves_ends_the_comparison_and_so_does_a_cancel() {
    let (bench, _) = Bench::with_volume();
    let base = bench.snapshot(&["vol-1"], "a").unwrap()[0];
    let told = bench.diff(None, CloneOf::Snapshot(base), 0, true).unwrap();
    let Told { operation, parts, is_shut } = told;
    drop(parts);
    is_shut.store(false, Ordering::Relaxed);
    wait_until(|| operation.end().is_some());
    assert!(operation.end().unwrap().is_err());
    let told = bench.diff(None, CloneOf::Snapshot(base), 0, true).unwrap();
    told.operation.cancel();
    assert!(matches!(
        told.ended().unwrap_err().as_ref(),
        LifecycleError::Snapshot(SnapshotError::Copy(CopyError::Cancelled))
    ));
    assert!(bench.delete_snapshot(base).unwrap(), "nothing holds it any more");
}
