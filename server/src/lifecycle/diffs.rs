//! What changed between two snapshots, or between a snapshot and a volume at this instant.
//!
//! Owns the comparison's operation: an instant of a volume, as a copy without a name, of which no row and no file is left
//! however it ends; and the parts in which the changes are told. Never: decides what a change is (`volume/diff/` does). Called by
//! `management/`, with the names of both sides locked until it has begun: from then on the operation keeps what it reads from being deleted.
//! A caller that leaves ends it, and so does one that takes nothing for [`TAKE_LIMIT`].

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::clones::CloneOf;
use super::operations::{Begun, Operation, OperationKind, OperationWanted, Turn};
use super::snapshot_error::SnapshotError;
use super::snapshots::{refuse_initialising, snapshot_lock_name};
use super::{DataSide, Lifecycle, LifecycleError, Map, NameLock};
use crate::backend::extent_map::ExtentMap as _;
use crate::catalog::{BackendKind, SnapshotRecord, VolumeRecord};
use crate::volume::copying::{self, CopyError, CopyHandle};
use crate::volume::diff::{Change, Changed, Walk};

/// So long a part waits to be taken. Until then nobody can delete what is compared.
const TAKE_LIMIT: Duration = Duration::from_secs(60);
/// Between two tries to hand a part over.
const TAKE_PAUSE: Duration = Duration::from_millis(5);
/// Ranges in a part: with at most 25 bytes each, far below what a message may have.
const RANGES_MAX: usize = 1024;
/// A part is handed over at least so often, so that the caller sees how far it is.
const PART_INTERVAL: Duration = Duration::from_millis(500);

/// What is to be compared.
#[derive(Debug, Clone)]
pub struct DiffWanted {
    /// With this snapshot; `None`: with nothing but zeroes.
    pub base: Option<Uuid>,
    /// What has changed.
    pub target: CloneOf,
    /// Only what is at or behind it.
    pub offset_bytes: u64,
}

impl DiffWanted {
    /// What has to be locked.
    pub fn lock_names(&self) -> Vec<String> {
        self.base.map(snapshot_lock_name).into_iter().chain([self.target.lock_name()]).collect()
    }
}

/// Changes in order, the next of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiffPart {
    /// They do not overlap.
    pub changes: Vec<Changed>,
    /// All before it was told.
    pub next_offset_bytes: u64,
    /// Of the last part.
    pub total: Option<DiffTotal>,
}

/// What a comparison came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiffTotal {
    /// The base's size; 0 where there is none.
    pub base_bytes: u64,
    /// The target's size.
    pub target_bytes: u64,
    /// Of the changes.
    pub data_bytes: u64,
    /// The same of those that are zeroes in the target.
    pub zero_bytes: u64,
    /// How many there were.
    pub ranges: u64,
}

/// Why a part was not taken.
#[derive(Debug)]
pub enum NotTaken {
    /// There is no room yet.
    Full(DiffPart),
    /// Nobody is there any more.
    Gone,
}

/// A target that is about to be compared.
enum Target {
    Snapshot(SnapshotRecord, Map),
    Volume(VolumeRecord, Turn),
}

impl<D: DataSide> Lifecycle<D> {
    /// Begins to compare, and hands what changed to `take`, part by part. The operation has ended when nothing more comes.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::InProgress`], [`SnapshotError::BehindEnd`], [`SnapshotError::Busy`]; of a volume those of
    /// [`Lifecycle::create_snapshots`]; the storage's and the catalog's failure.
    pub fn begin_diff(
        &self,
        locks: &[NameLock],
        wanted: &DiffWanted,
        take: impl FnMut(DiffPart) -> Result<(), NotTaken> + Send + 'static,
    ) -> Result<std::sync::Arc<Operation>, LifecycleError> {
        let is_locked = |name: &String| locks.iter().any(|lock| lock.name() == name);
        assert!(wanted.lock_names().iter().all(is_locked));
        let base = wanted.base.map(|uid| self.snapshot_to_compare(uid)).transpose()?;
        let target = match &wanted.target {
            CloneOf::Snapshot(uid) => {
                let (snapshot, map) = self.snapshot_to_compare(*uid)?;
                Target::Snapshot(snapshot, map)
            }
            CloneOf::Volume(name) => self.volume_to_compare(name)?,
        };
        let (target_bytes, target_uid, target_name) = match &target {
            Target::Snapshot(of, _) => (of.capacity_bytes, of.snapshot_uid, of.export_name()),
            Target::Volume(of, _) => (of.capacity_bytes, of.volume_uid, of.name.clone()),
        };
        if wanted.offset_bytes > target_bytes {
            return Err(SnapshotError::BehindEnd { target_bytes }.into());
        }
        let base_name = base.iter().map(|(snapshot, _)| snapshot.export_name());
        let base_map = base.as_ref().map(|(snapshot, _)| snapshot.snapshot_uid);
        let begun = self.operations.begin(OperationWanted {
            kind: OperationKind::Diff,
            targets: base_name.chain([target_name]).collect(),
            made: Vec::new(),
            read: base_map.into_iter().chain([target_uid]).collect(),
        })?;
        let base = base.map(|(_, map)| map);
        self.compare(begun, base, target, wanted.offset_bytes, take)
    }

    fn compare(
        &self,
        begun: Begun,
        base: Option<Map>,
        target: Target,
        offset_bytes: u64,
        take: impl FnMut(DiffPart) -> Result<(), NotTaken> + Send + 'static,
    ) -> Result<std::sync::Arc<Operation>, LifecycleError> {
        let (target, copying) = match target {
            Target::Snapshot(_, map) => (map, None),
            Target::Volume(volume, turn) => match self.data_side.begin_nameless_copy(&volume) {
                Ok((copy, map)) => {
                    begun.operation().follow(&copy);
                    (map, Some((copy, turn)))
                }
                Err(error) => {
                    self.operations.forget(begun);
                    return Err(error.into());
                }
            },
        };
        Ok(self.go_on(begun, move |operation| {
            if let Some((copy, _turn)) = copying {
                operation.copies(&copy)?;
            }
            Comparison::new(operation, base, target, offset_bytes).run(take)
        }))
    }

    fn snapshot_to_compare(&self, snapshot_uid: Uuid) -> Result<(SnapshotRecord, Map), LifecycleError> {
        let snapshot = self.ready_snapshot(snapshot_uid)?;
        let map = self.data_side.snapshot_map(snapshot_uid, snapshot.capacity_bytes)?;
        Ok((snapshot, map))
    }

    /// What holds for a snapshot of it holds for a copy without a name, too.
    fn volume_to_compare(&self, name: &str) -> Result<Target, LifecycleError> {
        let volume = self.volume(name)?;
        refuse_initialising(&volume)?;
        self.check_can_copy(&volume)?;
        self.refuse_while(&volume.name, |operation| operation.makes(volume.volume_uid))?;
        // In a thin pool it is read from the metadata, which takes no space.
        if volume.backend != BackendKind::Lvm {
            self.check_reserve(volume.backend)?;
        }
        Ok(Target::Volume(volume, self.operations.try_turn()?))
    }
}

/// A comparison that goes on.
struct Comparison<'a> {
    operation: &'a Operation,
    /// By which the operation's progress is seen.
    report: copying::CopyReport,
    _handle: CopyHandle,
    walk: Walk<Map, Map>,
    total: DiffTotal,
}

impl<'a> Comparison<'a> {
    fn new(operation: &'a Operation, base: Option<Map>, target: Map, offset_bytes: u64) -> Self {
        let (handle, report) = copying::begin();
        let target_bytes = target.capacity_bytes();
        report.set_total(target_bytes);
        report.add_done(offset_bytes);
        operation.follow(&handle);
        let base_bytes = base.as_ref().map_or(0, |map| map.capacity_bytes());
        let total = DiffTotal { base_bytes, target_bytes, ..DiffTotal::default() };
        let walk = Walk::new(base, target, &(offset_bytes..target_bytes));
        Self { operation, report, _handle: handle, walk, total }
    }

    fn run(mut self, mut take: impl FnMut(DiffPart) -> Result<(), NotTaken>) -> Result<(), LifecycleError> {
        let (mut changes, mut handed_over_at) = (Vec::new(), Instant::now());
        loop {
            self.check()?;
            let before = self.walk.offset_bytes();
            let goes_on = self.walk.next(&mut changes).map_err(|error| match CopyError::from(error) {
                CopyError::Failed(words) => {
                    let targets = self.operation.targets().join(" and ");
                    CopyError::Failed(format!("cannot read the extents of {targets}: {words}"))
                }
                error => error,
            })?;
            self.report.add_done(self.walk.offset_bytes() - before);
            let is_last = !goes_on;
            if is_last || changes.len() >= RANGES_MAX || handed_over_at.elapsed() >= PART_INTERVAL {
                let part = self.part(std::mem::take(&mut changes), is_last);
                self.hand_over(part, &mut take)?;
                handed_over_at = Instant::now();
            }
            if is_last {
                self.report.end(Ok(()));
                return Ok(());
            }
        }
    }

    fn part(&mut self, changes: Vec<Changed>, is_last: bool) -> DiffPart {
        for changed in &changes {
            let bytes = changed.bytes.end - changed.bytes.start;
            match changed.change {
                Change::Data => self.total.data_bytes += bytes,
                Change::Zero => self.total.zero_bytes += bytes,
            }
        }
        self.total.ranges += changes.len() as u64;
        let total = is_last.then_some(self.total);
        DiffPart { changes, next_offset_bytes: self.walk.offset_bytes(), total }
    }

    fn hand_over(
        &self,
        mut part: DiffPart,
        take: &mut impl FnMut(DiffPart) -> Result<(), NotTaken>,
    ) -> Result<(), LifecycleError> {
        let give_up = Instant::now() + TAKE_LIMIT;
        loop {
            part = match take(part) {
                Ok(()) => return Ok(()),
                Err(NotTaken::Gone) => return Err(CopyError::Cancelled.into()),
                Err(NotTaken::Full(part)) => part,
            };
            self.check()?;
            if Instant::now() >= give_up {
                return Err(SnapshotError::NotTaken(TAKE_LIMIT).into());
            }
            std::thread::sleep(TAKE_PAUSE);
        }
    }

    fn check(&self) -> Result<(), CopyError> {
        if self.operation.is_cancelled() { Err(CopyError::Cancelled) } else { Ok(()) }
    }
}
