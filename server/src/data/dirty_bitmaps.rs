//! `qemu:dirty-bitmap:NAME` of a snapshot's export: which of its blocks may differ from another snapshot of the volume.
//!
//! Owns what an export offers, and the other snapshots' files once a client has asked, or their maps in a thin pool. Never: touches a ring. Called by: `gate/run.rs`
//! (offers), `io/session_io/` (selects), `block_status.rs` (asks, on a thread that may wait).
//! Invariants: only of exports that nobody writes to; a file that was opened stays what it is until its connection ends, whether its
//! snapshot is deleted meanwhile or not. Source: QEMU `docs/interop/nbd.rst`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use proto::nbd::block_status::{ExtentState, StatusExtents};
use tracing::warn;
use uuid::Uuid;

use crate::backend::extent_map::{ExtentMap, FileMap};
use crate::backend::lvm::ThinMap;
use crate::catalog::SnapshotRecord;
use crate::data::maps::{Compared, Maps};
use crate::volume::copying::CopyError;
use crate::volume::diff::Walk;
use crate::volume::{Backend, Volume};

/// A snapshot that others of its volume may be compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapBase {
    /// What the bitmap is called: as the snapshot.
    pub name: String,
    /// What who compares has to be allowed to open.
    pub export_name: String,
    /// Its identity.
    pub snapshot_uid: Uuid,
    /// Its size.
    pub capacity_bytes: u64,
}

impl From<&SnapshotRecord> for BitmapBase {
    fn from(snapshot: &SnapshotRecord) -> Self {
        Self {
            name: snapshot.name.clone(),
            export_name: snapshot.export_name(),
            snapshot_uid: snapshot.snapshot_uid,
            capacity_bytes: snapshot.capacity_bytes,
        }
    }
}

/// What an export offers.
#[derive(Debug, Clone)]
pub struct OfferedBitmaps {
    /// With what it may be compared.
    pub bases: Vec<BitmapBase>,
    /// What opens them.
    pub maps: Maps,
}

/// What a client has selected, in the order of the contexts' ids. A snapshot that has gone since keeps its place: the others' ids stay
/// theirs.
#[derive(Debug)]
pub struct SelectedBitmaps {
    bases: Vec<Option<(BitmapBase, OnceLock<BaseMap>)>>,
    maps: Maps,
    /// Of the export itself, where it is in a thin pool: a snapshot's never changes.
    target: OnceLock<ThinMap>,
    /// When maps were tried last that could not be read.
    failed_at: Mutex<Option<Instant>>,
}

#[derive(Debug)]
enum BaseMap {
    File(FileMap<Compared>),
    Thin(ThinMap),
}

impl BaseMap {
    fn as_map(&self) -> &dyn ExtentMap {
        match self {
            Self::File(map) => map,
            Self::Thin(map) => map,
        }
    }
}

impl OfferedBitmaps {
    /// Those of these names.
    pub fn select(self, names: &[String]) -> SelectedBitmaps {
        let of_name = |name: &String| self.bases.iter().find(|base| base.name == *name);
        let bases = names.iter().map(|name| of_name(name).map(|base| (base.clone(), OnceLock::new())));
        SelectedBitmaps {
            bases: bases.collect(),
            maps: self.maps,
            target: OnceLock::new(),
            failed_at: Mutex::default(),
        }
    }
}

/// The file of an export, which is kept open with its volume.
struct Exported<'a>(&'a File);

impl AsRef<File> for Exported<'_> {
    fn as_ref(&self) -> &File {
        self.0
    }
}

impl SelectedBitmaps {
    /// Finds what may differ in a range of the volume: extents until there are enough, or until the deadline and one.
    ///
    /// # Errors
    /// `NotFound`: no such bitmap, or its snapshot is gone or cannot be opened. The file system's.
    pub fn find(
        &self,
        index: usize,
        volume: &Volume,
        wanted: &Wanted,
        deadline: Instant,
    ) -> io::Result<StatusExtents> {
        let (base, opened) = self.base(index)?;
        let Backend::File(file) = &volume.backend else { return Err(io::ErrorKind::Unsupported.into()) };
        if is_thin(volume) {
            // What is not read by now could not be: see `read_maps`.
            let maps = opened.get().zip(self.target.get());
            let (base_map, target) = maps.ok_or(io::ErrorKind::NotFound)?;
            return find(&base_map.as_map(), target, wanted, deadline);
        }
        let base_map = match opened.get() {
            Some(map) => map,
            None => {
                let map = self.maps.of_snapshot(base.snapshot_uid, base.capacity_bytes);
                let map = map.map_err(|error| cannot(base, &error))?;
                opened.get_or_init(|| BaseMap::File(map))
            }
        };
        let target = FileMap::new(Exported(file.file()), volume.capacity_bytes)?;
        find(&base_map.as_map(), target, wanted, deadline)
    }

    /// Whether maps have to be read from a pool's metadata before [`Self::find`], which takes long: see [`Self::read_maps`].
    pub fn has_to_read(&self, indices: impl IntoIterator<Item = usize>, volume: &Volume) -> bool {
        is_thin(volume) && indices.into_iter().any(|index| self.is_unread(index))
    }

    fn is_unread(&self, index: usize) -> bool {
        self.base(index).is_ok_and(|(_, opened)| opened.get().is_none() || self.target.get().is_none())
    }

    /// Reads the maps that are still to be read. Bounded, and long: for a thread that nobody else waits for. What could not be read since
    /// `asked_at` is not tried again for a question of then.
    ///
    /// # Errors
    /// `NotFound`: one cannot be read.
    pub fn read_maps(
        &self,
        indices: impl IntoIterator<Item = usize>,
        volume: &Volume,
        asked_at: Instant,
    ) -> io::Result<()> {
        for index in indices {
            let (base, opened) = self.base(index)?;
            if opened.get().is_some() && self.target.get().is_some() {
                continue;
            }
            if self.failed_at.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| at >= asked_at)
            {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.read_both(base, opened, volume).map_err(|error| {
                *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                cannot(base, &error)
            })?;
        }
        Ok(())
    }

    /// The base first: it is there when the target is read.
    fn read_both(
        &self,
        base: &BitmapBase,
        opened: &OnceLock<BaseMap>,
        volume: &Volume,
    ) -> Result<(), CopyError> {
        if opened.get().is_none() {
            let map = self.maps.of_thin_snapshot(base.snapshot_uid, base.capacity_bytes)?;
            opened.get_or_init(|| BaseMap::Thin(map));
        }
        if self.target.get().is_none() {
            let map = self.maps.of_thin_snapshot(volume.volume_uid, volume.capacity_bytes)?;
            self.target.get_or_init(|| map);
        }
        Ok(())
    }

    fn base(&self, index: usize) -> io::Result<&(BitmapBase, OnceLock<BaseMap>)> {
        Ok(self.bases.get(index).and_then(Option::as_ref).ok_or(io::ErrorKind::NotFound)?)
    }
}

/// A snapshot on a device is one in a thin pool.
fn is_thin(volume: &Volume) -> bool {
    matches!(&volume.backend, Backend::File(file) if file.device_marks().is_some())
}

fn cannot(base: &BitmapBase, error: &CopyError) -> io::Error {
    warn!(name = base.name, %error, "a snapshot cannot be compared with");
    io::ErrorKind::NotFound.into()
}

/// What a BLOCK_STATUS is answered with.
#[derive(Debug, PartialEq, Eq)]
pub struct StatusAnswer {
    /// A chunk's payload; and behind it, for each further context, a chunk's head and its payload.
    pub payload: Vec<u8>,
    /// Length of the first chunk's payload.
    pub first_bytes: u32,
}

/// What a client wants to know.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Of which bytes; not empty.
    pub bytes: Range<u64>,
    /// Extents that the reply has room for.
    pub extents_max: usize,
    /// Multiple of which they begin and end.
    pub alignment_bytes: u64,
}

fn find(
    base: &impl ExtentMap,
    target: impl ExtentMap,
    wanted: &Wanted,
    deadline: Instant,
) -> io::Result<StatusExtents> {
    let Range { start, end } = wanted.bytes;
    let mut extents = StatusExtents::new(end - start, wanted.extents_max);
    let mut walk = Walk::new(Some(base), target, &wanted.bytes);
    let (mut changes, mut told) = (Vec::new(), start);
    while walk.next(&mut changes)? {
        for changed in changes.drain(..) {
            let first = changed.bytes.start - changed.bytes.start % wanted.alignment_bytes;
            let last = changed.bytes.end.next_multiple_of(wanted.alignment_bytes).min(end);
            let first = first.clamp(told, last.max(told));
            let goes_on = extents.push(first - told, ExtentState::CLEAN)
                && extents.push(last.saturating_sub(first), ExtentState::DIRTY);
            told = told.max(last);
            if !goes_on {
                return Ok(extents);
            }
        }
        // Only whole blocks: the rest may be found to have changed in the next window.
        let at = walk.offset_bytes();
        let known_end = if at >= end { end } else { at - at % wanted.alignment_bytes };
        if known_end > told {
            if !extents.push(known_end - told, ExtentState::CLEAN) {
                return Ok(extents);
            }
            told = known_end;
        }
        if told > start && Instant::now() >= deadline {
            return Ok(extents);
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::extent_map::{Place, Run};

    /// Runs, of which so many are told at once.
    struct Fixed(Vec<Run>, usize);

    impl ExtentMap for Fixed {
        fn capacity_bytes(&self) -> u64 {
            1 << 20
        }

        fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
            let mut inside = self.0.iter().filter_map(|run| run.within(range));
            *runs = inside.by_ref().take(self.1).collect();
            let is_all = inside.next().is_none();
            Ok(runs.last().filter(|_| !is_all).map_or(range.end, |last| last.bytes.end))
        }
    }

    fn told(changed: &[Range<u64>], runs_max: usize, wanted: &Wanted, limit: Duration) -> Vec<(u64, u32)> {
        let runs = |at: u64| {
            let run = |bytes: &Range<u64>| Run { bytes: bytes.clone(), place: Place::At(at + bytes.start) };
            changed.iter().map(run).collect()
        };
        let (base, target) = (Fixed(runs(0), runs_max), Fixed(runs(1 << 30), runs_max));
        let extents = find(&base, target, wanted, Instant::now() + limit).unwrap();
        extents.as_slice().iter().map(|extent| (extent.length_bytes, extent.state.0)).collect()
    }

    const LONG: Duration = Duration::from_secs(600);

    fn wanted(bytes: Range<u64>, extents_max: usize) -> Wanted {
        Wanted { bytes, extents_max, alignment_bytes: 512 }
    }

    #[test]
    fn what_changed_is_dirty_to_whole_blocks_and_all_else_is_clean() {
        let changed = [1000..1100, 1500..1600, 4096..8192];
        for runs_max in 1..4 {
            let all = [(512, 0), (1536, 1), (2048, 0), (4096, 1), ((1 << 20) - 8192, 0)];
            assert_eq!(told(&changed, runs_max, &wanted(0..1 << 20, 100), LONG), all, "{runs_max} at once");
            assert_eq!(told(&changed, runs_max, &wanted(5120..7168, 100), LONG), [(2048, 1)]);
            assert_eq!(
                told(&changed, runs_max, &wanted(512..4608, 100), LONG),
                [(1536, 1), (2048, 0), (512, 1)]
            );
            assert_eq!(told(&changed, runs_max, &wanted(0..1 << 20, 1), LONG), [(512, 0)]);
            assert_eq!(told(&changed, runs_max, &wanted(0..1 << 20, 2), LONG), [(512, 0), (1536, 1)]);
        }
        assert_eq!(told(&[], 1, &wanted(0..4096, 1), LONG), [(4096, 0)]);
    }

    #[test]
    fn a_question_out_of_time_is_answered_in_part() {
        let changed: Vec<Range<u64>> = (0..16).map(|at| at * 8192..at * 8192 + 4096).collect();
        let at_once = told(&changed, 1, &wanted(0..1 << 20, 100), Duration::ZERO);
        assert_eq!(at_once, [(4096, 1)]);
        let less_than_a_block = [0..100, 200..300, 1024..2048];
        let told = told(&less_than_a_block, 1, &wanted(0..1 << 20, 100), Duration::ZERO);
        assert_eq!(told, [(512, 1)], "at least a block");
    }
}
