//! At start: what a killed server left half-done is finished.
//!
//! Called once by `main.rs`, before the server says that it is ready; nothing else changes volumes meanwhile. Each thing
//! removed is logged. A volume that the catalog shows as ready is never touched, even where its storage is missing.
//! Storage without a row is left alone too: a row is durable before its storage is made and until it is removed, so no
//! crash leaves such storage. It is there because somebody restored an older catalog, and may be all that is left.

use std::collections::HashSet;

use super::{DataSide, Lifecycle, LifecycleError};
use crate::catalog::{BackendKind, VolumeState};

/// What the recovery did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Volumes that were being made or deleted, removed.
    pub unfinished_volumes: usize,
    /// Attachments that were ending, removed.
    pub ending_attachments: usize,
    /// Storage that no row of the catalog names, left alone.
    pub orphans: usize,
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
                tracing::info!(name = %volume.name, %volume_uid, ?state, "removing a volume that a former process left unfinished");
                self.remove_volume(&volume)?;
                recovered.unfinished_volumes += 1;
            } else if volume.backend == BackendKind::File && !stored.contains(&volume_uid) {
                tracing::error!(name = %volume.name, %volume_uid, "the volume's storage is missing: it cannot be opened until its file is restored");
            }
        }
        for orphan in stored.difference(&known) {
            tracing::warn!(volume_uid = %orphan, "storage that no volume of the catalog has: left alone, remove it by hand if it is not wanted");
            recovered.orphans += 1;
        }
        Ok(recovered)
    }
}
