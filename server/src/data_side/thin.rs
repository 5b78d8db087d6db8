//! The data side of volumes in a thin pool.
//!
//! A snapshot, clone or copy to restore from is a thin snapshot: made in the call, durable and at one instant, for which device mapper
//! stops the volume's device and flushes it. It has every write that was answered before, since they all go past the page cache; and none
//! that begins after the call. Those of several volumes are made while none of them is written to. What changed between two of them is in
//! the pool's metadata.

use std::cell::OnceCell;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;
use uuid::Uuid;

use super::{EXCLUSIVE_LIMIT, ServedData};
use crate::backend::extent_map::{ExtentMap, Run};
use crate::backend::lvm::{Lvm, LvmError, Thin, ThinMap};
use crate::catalog::{BackendKind, CatalogError, VolumeRecord};
use crate::data::copies::HeldVolumes;
use crate::lifecycle::{DataSide as _, Map, SyncError};
use crate::volume::copying::{self, CopyError, CopyHandle, CopySource, CopyTarget, CopyWanted};

/// The logical volume of a copy; a pool has none without a name.
pub(super) fn of(target: CopyTarget) -> Option<Thin> {
    match target {
        CopyTarget::Snapshot(snapshot_uid) => Some(Thin::Snapshot(snapshot_uid)),
        CopyTarget::Volume(volume_uid) => Some(Thin::Volume(volume_uid)),
        CopyTarget::Restored(volume_uid) => Some(Thin::Restoring(volume_uid)),
        CopyTarget::Nameless(_) => None,
    }
}

/// The volume that it is, if it is one.
pub(super) fn volume(thin: Thin) -> Option<Uuid> {
    match thin {
        Thin::Volume(volume_uid) => Some(volume_uid),
        Thin::Snapshot(_) | Thin::Restoring(_) | Thin::Replaced(_) => None,
    }
}

/// The copy that it is, if it is one that is no volume.
pub(super) fn copy(thin: Thin) -> Option<CopyTarget> {
    match thin {
        Thin::Snapshot(snapshot_uid) => Some(CopyTarget::Snapshot(snapshot_uid)),
        Thin::Restoring(volume_uid) => Some(CopyTarget::Restored(volume_uid)),
        Thin::Volume(_) | Thin::Replaced(_) => None,
    }
}

/// So long the metadata of the pool are read to compare: some millions of mappings. With what waits for its turn before.
const COMPARE_LIMIT: Duration = Duration::from_secs(300);

/// A thin volume's map that is read when it is asked for the first time, on the thread of whoever compares: that may take minutes.
struct MapToRead {
    capacity_bytes: u64,
    read: OnceCell<ThinMap>,
    reader: Box<dyn Fn() -> Result<ThinMap, CopyError> + Send>,
}

impl ExtentMap for MapToRead {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        let map = match self.read.get() {
            Some(map) => map,
            None => {
                let map = (self.reader)().map_err(io::Error::other)?;
                self.read.get_or_init(|| map)
            }
        };
        map.read(range, runs)
    }
}

/// A volume, and what is copied to what of it.
type VolumeCopy = (VolumeRecord, (Thin, Thin));

/// The volumes, all in the pool, and what is to be copied for each.
fn of_one_instant(wanted: &[CopyWanted]) -> Result<Vec<VolumeCopy>, CopyError> {
    let mut copies = Vec::new();
    for wanted in wanted {
        let of_volume = match &wanted.source {
            CopySource::Volume(volume) if volume.backend == BackendKind::Lvm => Some(volume),
            _ => None,
        };
        let (Some(volume), Some(target)) = (of_volume, of(wanted.target)) else {
            let words = "volumes in the thin pool and volumes in files cannot be copied at one instant: take their snapshots apart";
            return Err(CopyError::Unsupported(words.to_owned()));
        };
        copies.push((volume.clone(), (Thin::Volume(volume.volume_uid), target)));
    }
    Ok(copies)
}

/// A copy that was made in the call.
fn ended(bytes: u64) -> CopyHandle {
    let (handle, report) = copying::begin();
    report.set_total(bytes);
    report.add_done(bytes);
    report.end(Ok(()));
    handle
}

impl ServedData {
    /// Does something with the pool, which there has to be.
    pub(super) fn thin(&self, work: impl FnOnce(&Lvm) -> Result<(), LvmError>) -> io::Result<()> {
        self.pool().and_then(|lvm| work(lvm)).map_err(io::Error::other)
    }

    /// The same with what is in the pool `recorded`, which has to be the server's: what is in another is not taken for missing.
    pub(super) fn thin_in(
        &self,
        recorded: Option<String>,
        work: impl FnOnce(&Lvm) -> Result<(), LvmError>,
    ) -> io::Result<()> {
        self.thin(|lvm| {
            lvm.check_pool(recorded)?;
            work(lvm)
        })
    }

    /// Whether the copy is in a thin pool, as the catalog has it: LVM is not asked about files.
    pub(super) fn is_thin(&self, target: CopyTarget) -> io::Result<bool> {
        Ok(match target {
            CopyTarget::Snapshot(snapshot_uid) => {
                self.is_thin_snapshot(snapshot_uid).map_err(io::Error::other)?
            }
            CopyTarget::Volume(_) | CopyTarget::Restored(_) => self.pool_of(target)?.is_some(),
            CopyTarget::Nameless(_) => false,
        })
    }

    fn is_thin_snapshot(&self, snapshot_uid: Uuid) -> Result<bool, CatalogError> {
        let found = self.catalog.snapshot_in_any_state(snapshot_uid)?;
        Ok(found.is_some_and(|(snapshot, _)| snapshot.backend == BackendKind::Lvm))
    }

    /// In which pool the copy is, as far as that is written down.
    pub(super) fn pool_of(&self, target: CopyTarget) -> io::Result<Option<String>> {
        let pool = match target {
            CopyTarget::Snapshot(snapshot_uid) => self.catalog.thin_pool_of_snapshot(snapshot_uid),
            CopyTarget::Volume(volume_uid) | CopyTarget::Restored(volume_uid) => {
                self.catalog.thin_pool_of(volume_uid)
            }
            CopyTarget::Nameless(_) => Ok(None),
        };
        pool.map_err(io::Error::other)
    }

    /// All logical volumes of this server; none, with a warning, where LVM does not tell: volumes in files are served all the same.
    pub(super) fn stored_thin(&self) -> Vec<Thin> {
        let Some(lvm) = &self.lvm else { return Vec::new() };
        match lvm.list() {
            Ok(found) => found.into_iter().map(|found| found.thin).collect(),
            Err(error) => {
                warn!(pool = %lvm.pool(), %error, "what is in the thin pool is not known: its volumes count as missing");
                Vec::new()
            }
        }
    }

    /// Makes the logical volume larger, and has requests held to its new end.
    pub(super) fn grow_thin(&self, volume_uid: Uuid, capacity_bytes: u64) -> io::Result<()> {
        self.thin(|lvm| lvm.grow(Thin::Volume(volume_uid), capacity_bytes))?;
        self.server.measure_volume(volume_uid).map_or(Ok(()), |measured| measured.map(drop))
    }

    /// Makes a copy in the pool, if that is where its source is.
    pub(super) fn thin_copy(&self, wanted: &[CopyWanted]) -> Result<Option<CopyHandle>, CopyError> {
        let mut are_in_pool = false;
        for wanted in wanted {
            are_in_pool |= match &wanted.source {
                CopySource::Volume(volume) => volume.backend == BackendKind::Lvm,
                CopySource::Snapshot { snapshot_uid, .. } => {
                    let found = self.is_thin_snapshot(*snapshot_uid);
                    found.map_err(|error| CopyError::Failed(error.to_string()))?
                }
            };
        }
        match wanted {
            _ if !are_in_pool => Ok(None),
            [one] => {
                let lvm = self.pool()?;
                self.copy_one(lvm, one).map(Some)
            }
            several => {
                let lvm = self.pool()?;
                self.copy_several(lvm, several).map(Some)
            }
        }
    }

    /// Thin snapshots of several volumes, made one after the other while nobody writes to any of them.
    ///
    /// What was answered before the call has landed when the first is made, since writes go past the page cache, so it is in. What begins after
    /// the call finds its volume held, and waits until the last is made, so it is in none; what LVM is at work at when the call comes is waited
    /// for before that. What had begun and was not answered may be in:
    /// everything that had been answered before it began is in as well.
    fn copy_several(&self, lvm: &Lvm, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError> {
        let (volumes, copies): (Vec<_>, Vec<_>) = of_one_instant(wanted)?.into_iter().unzip();
        volumes.iter().try_for_each(|volume| self.sync_source(volume))?;
        let release = |held: HeldVolumes| {
            held.release();
            if held.have_lost_writes() { Err(CopyError::SourceLostWrites) } else { Ok(()) }
        };
        // Before LVM's turn is taken: opening calls LVM.
        let opened = self.server.open_volumes(&volumes)?;
        lvm.copy_together(&copies, || self.server.hold_volumes(opened), release)?;
        Ok(ended(wanted.iter().map(|wanted| wanted.capacity_bytes).sum()))
    }

    /// A volume that lost writes is found out here, and not by LVM, which would take a snapshot of what is left.
    fn sync_source(&self, volume: &VolumeRecord) -> Result<(), CopyError> {
        self.sync_storage(volume).map_err(|error| match error {
            SyncError::Unfinished(words) => CopyError::Busy(words),
            SyncError::Failed(_) => CopyError::SourceLostWrites,
        })
    }

    fn pool(&self) -> Result<&Arc<Lvm>, LvmError> {
        self.lvm.as_ref().ok_or(LvmError::NotConfigured)
    }

    /// The map of a snapshot in the pool, which is read when it is asked.
    pub(super) fn thin_snapshot_map(
        &self,
        snapshot_uid: Uuid,
        capacity_bytes: u64,
    ) -> Result<Map, CopyError> {
        let recorded = self.pool_of(CopyTarget::Snapshot(snapshot_uid));
        let recorded = recorded.map_err(|error| CopyError::Failed(error.to_string()))?;
        let lvm = Arc::clone(self.pool()?);
        lvm.check_pool(recorded)?;
        let reader = move || Ok(lvm.map(Thin::Snapshot(snapshot_uid), capacity_bytes, COMPARE_LIMIT)?);
        Ok(Box::new(MapToRead { capacity_bytes, read: OnceCell::new(), reader: Box::new(reader) }))
    }

    /// The map of a volume at an instant behind the call's begin, when it is asked for the first time. It needs no copy: what the pool keeps of
    /// its metadata is one, and nobody reads more of it.
    pub(super) fn thin_volume_map(&self, volume: &VolumeRecord) -> Result<(CopyHandle, Map), CopyError> {
        self.sync_source(volume)?;
        let (lvm, server) = (Arc::clone(self.pool()?), Arc::clone(&self.server));
        let recorded = self.catalog.thin_pool_of(volume.volume_uid);
        lvm.check_pool(recorded.map_err(|error| CopyError::Failed(error.to_string()))?)?;
        let (volume_uid, capacity_bytes) = (volume.volume_uid, volume.capacity_bytes);
        let reader = move || {
            let map = lvm.map(Thin::Volume(volume_uid), capacity_bytes, COMPARE_LIMIT)?;
            if server.has_lost_writes(volume_uid) { Err(CopyError::SourceLostWrites) } else { Ok(map) }
        };
        let map = MapToRead { capacity_bytes, read: OnceCell::new(), reader: Box::new(reader) };
        Ok((ended(capacity_bytes), Box::new(map)))
    }

    /// What a volume or snapshot has alone in the pool.
    pub(super) fn thin_exclusive_bytes(&self, of_copy: CopyTarget) -> io::Result<u64> {
        let thin = of(of_copy).ok_or(io::ErrorKind::NotFound)?;
        let mut exclusive_bytes = 0;
        self.thin_in(self.pool_of(of_copy)?, |lvm| {
            exclusive_bytes = lvm.exclusive_bytes(thin, EXCLUSIVE_LIMIT)?;
            Ok(())
        })?;
        Ok(exclusive_bytes)
    }

    fn copy_one(&self, lvm: &Lvm, wanted: &CopyWanted) -> Result<CopyHandle, CopyError> {
        let of_volume = match &wanted.source {
            CopySource::Volume(volume) => Some(volume),
            CopySource::Snapshot { .. } => None,
        };
        let source = match &wanted.source {
            CopySource::Volume(volume) => {
                self.sync_source(volume)?;
                Thin::Volume(volume.volume_uid)
            }
            CopySource::Snapshot { snapshot_uid, .. } => Thin::Snapshot(*snapshot_uid),
        };
        let nameless = || CopyError::Unsupported("a thin pool has no copies without a name".to_owned());
        let target = of(wanted.target).ok_or_else(nameless)?;
        lvm.copy(source, target, wanted.capacity_bytes)?;
        if of_volume.is_some_and(|volume| self.server.has_lost_writes(volume.volume_uid)) {
            lvm.remove(target)?;
            return Err(CopyError::SourceLostWrites);
        }
        Ok(ended(wanted.capacity_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logical_volume_is_a_volume_or_a_copy_or_what_the_next_start_removes() {
        let uid = Uuid::from_u128(1);
        for target in [CopyTarget::Snapshot(uid), CopyTarget::Restored(uid)] {
            let thin = of(target).unwrap();
            assert_eq!((copy(thin), volume(thin)), (Some(target), None));
        }
        assert_eq!(
            (of(CopyTarget::Volume(uid)).and_then(copy), volume(Thin::Volume(uid))),
            (None, Some(uid))
        );
        assert_eq!(of(CopyTarget::Nameless(uid)), None);
        assert_eq!((copy(Thin::Replaced(uid)), volume(Thin::Replaced(uid))), (None, None));
    }

    fn volume_record(number: u128, backend: BackendKind) -> VolumeRecord {
        VolumeRecord {
            name: format!("vol-{number}"),
            volume_uid: Uuid::from_u128(number),
            capacity_bytes: 4096,
            block_size_bytes: 4096,
            backend,
            write_cache_on: true,
            incarnation: 1,
            created_at_ms: 0,
            settings: Default::default(),
        }
    }

    #[test]
    fn a_group_of_volumes_in_the_pool_and_in_files_is_refused() {
        let wanted = |number, backend| CopyWanted {
            source: CopySource::Volume(volume_record(number, backend)),
            target: CopyTarget::Snapshot(Uuid::from_u128(number + 10)),
            capacity_bytes: 4096,
        };
        let thin = of_one_instant(&[wanted(1, BackendKind::Lvm), wanted(2, BackendKind::Lvm)]).unwrap();
        let uid = Uuid::from_u128;
        let copies: Vec<_> = thin.iter().map(|(_, copy)| *copy).collect();
        assert_eq!(copies, [1, 2].map(|at| (Thin::Volume(uid(at)), Thin::Snapshot(uid(at + 10)))));
        for other in [BackendKind::File, BackendKind::Memory, BackendKind::Device] {
            for mixed in [[BackendKind::Lvm, other], [other, BackendKind::Lvm]] {
                let refused = of_one_instant(&[wanted(1, mixed[0]), wanted(2, mixed[1])]).unwrap_err();
                let CopyError::Unsupported(words) = refused else { panic!("{refused}") };
                assert!(words.contains("take their snapshots apart"), "{words}");
            }
        }
    }

    #[test]
    fn a_map_is_read_when_it_is_asked_and_its_error_is_told_as_it_is() {
        use std::sync::atomic::{AtomicUsize, Ordering};

        let reads = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&reads);
        let reader = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Err(CopyError::SourceLostWrites)
        };
        let map = MapToRead { capacity_bytes: 4096, read: OnceCell::new(), reader: Box::new(reader) };
        assert_eq!(
            (map.capacity_bytes(), reads.load(Ordering::Relaxed)),
            (4096, 0),
            "nobody waits for it yet"
        );
        let error = map.read(&(0..4096), &mut Vec::new()).unwrap_err();
        assert_eq!((CopyError::from(error), reads.load(Ordering::Relaxed)), (CopyError::SourceLostWrites, 1));
    }
}
