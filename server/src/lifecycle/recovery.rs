//! At start: what a killed server left half-done is finished.
//!
//! Called once by `main.rs`, before the server says that it is ready; nothing else changes volumes meanwhile. Each thing
//! removed is logged. A volume that the catalog shows as ready is never touched, even where its storage is missing.
//! Storage without a row is left alone too: a row is durable before its storage is made and until it is removed, so no
//! crash leaves such storage. It is there because somebody restored an older catalog, and may be all that is left.

use std::collections::HashSet;

use uuid::Uuid;

use super::{DataSide, Lifecycle, LifecycleError};
use crate::catalog::{BackendKind, Content, SnapshotState, VolumeState};
use crate::volume::copying::CopyTarget;

/// What the recovery did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Volumes that were being made or deleted, removed.
    pub unfinished_volumes: usize,
    /// Snapshots that were being made or deleted, removed.
    pub unfinished_snapshots: usize,
    /// Copies that were to take the place of a volume's storage, removed.
    pub unfinished_restores: usize,
    /// Attachments that were ending, removed.
    pub ending_attachments: usize,
    /// Storage that no row of the catalog names, left alone.
    pub orphans: usize,
}

/// What cannot be removed from a thin pool keeps its row, and no other volume waits for it.
fn left_in_pool(name: &str, uid: Uuid, error: &dyn std::fmt::Display) {
    tracing::warn!(%name, %uid, %error, "cannot remove what an earlier process left unfinished in a thin pool: the next start tries again");
}

impl<D: DataSide> Lifecycle<D> {
    /// Finishes every creation, deletion and detachment that a former process began.
    ///
    /// # Errors
    /// The catalog's or the storage's failure.
    pub fn recover(&self) -> Result<Recovered, LifecycleError> {
        let stored: HashSet<_> =
            self.data_side.stored_volumes().map_err(LifecycleError::Listing)?.into_iter().collect();
        // Connections end with their process, so nothing is left to fence.
        let ending_attachments = self.catalog.remove_ending_attachments()?;
        let mut recovered = Recovered { ending_attachments, ..Recovered::default() };
        let mut known = HashSet::new();
        for (volume, state) in self.catalog.all_volumes()? {
            let volume_uid = volume.volume_uid;
            known.insert(volume_uid);
            if state != VolumeState::Ready {
                tracing::info!(name = %volume.name, %volume_uid, ?state, "removing a volume that an earlier process left unfinished");
                match self.remove_volume(&volume) {
                    Err(error @ LifecycleError::Storage { .. }) if volume.backend == BackendKind::Lvm => {
                        left_in_pool(&volume.name, volume_uid, &error);
                    }
                    removed => {
                        removed?;
                        recovered.unfinished_volumes += 1;
                    }
                }
            } else if volume.settings.content == Content::NeverWritten
                && self.data_side.allocated_bytes(&volume) > 0
            {
                // By an older program, which does not tell, or past the server.
                tracing::warn!(name = %volume.name, %volume_uid, "a volume that was never written to has data: it counts as written");
                self.catalog.mark_written(volume_uid)?;
            } else if matches!(volume.backend, BackendKind::File | BackendKind::Lvm)
                && !stored.contains(&volume_uid)
            {
                tracing::error!(name = %volume.name, %volume_uid, "the volume's storage is missing: it cannot be opened until its file is restored");
            }
        }
        for orphan in stored.difference(&known) {
            tracing::warn!(volume_uid = %orphan, "storage that belongs to no volume of the catalog: left alone; remove it by hand if nobody wants it");
            recovered.orphans += 1;
        }
        self.recover_copies(&known, &mut recovered)?;
        Ok(recovered)
    }

    fn recover_copies(
        &self,
        volumes: &HashSet<Uuid>,
        recovered: &mut Recovered,
    ) -> Result<(), LifecycleError> {
        let stored: HashSet<CopyTarget> =
            self.data_side.stored_copies().map_err(LifecycleError::Listing)?.into_iter().collect();
        let mut known = HashSet::new();
        for (snapshot, state) in self.catalog.all_snapshots()? {
            let (name, snapshot_uid) = (snapshot.export_name(), snapshot.snapshot_uid);
            known.insert(CopyTarget::Snapshot(snapshot_uid));
            if state != SnapshotState::Ready {
                tracing::info!(%name, %snapshot_uid, ?state, "removing a snapshot that an earlier process left unfinished");
                match self.remove_snapshot(snapshot_uid) {
                    Err(error @ LifecycleError::Storage { .. }) if snapshot.backend == BackendKind::Lvm => {
                        left_in_pool(&name, snapshot_uid, &error);
                    }
                    removed => {
                        removed?;
                        recovered.unfinished_snapshots += 1;
                    }
                }
            } else if !stored.contains(&CopyTarget::Snapshot(snapshot_uid)) {
                tracing::error!(%name, %snapshot_uid, "the snapshot's storage is missing: it cannot be used until its file is restored");
            }
        }
        for copy in stored.difference(&known) {
            match copy {
                // Nothing but a copy of a snapshot, which is still there.
                CopyTarget::Restored(volume_uid) if volumes.contains(volume_uid) => {
                    tracing::info!(%volume_uid, "removing the copy from which an earlier process was restoring a volume");
                    match self.data_side.delete_copy(*copy) {
                        Err(error) if self.catalog.thin_pool_of(*volume_uid)?.is_some() => {
                            left_in_pool("", *volume_uid, &error);
                            continue;
                        }
                        deleted => deleted.map_err(|source| LifecycleError::Storage {
                            action: "clean up",
                            volume_uid: *volume_uid,
                            source,
                        })?,
                    }
                    recovered.unfinished_restores += 1;
                }
                _ => {
                    tracing::warn!(
                        ?copy,
                        "storage that belongs to no snapshot of the catalog: left alone; remove it by hand if nobody wants it"
                    );
                    recovered.orphans += 1;
                }
            }
        }
        Ok(())
    }
}
