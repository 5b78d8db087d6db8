//! What the control side asks for of bytes to be compared, or to be copied by somebody else.
//!
//! Called by: `data_side.rs`.

use std::sync::Arc;

use uuid::Uuid;

use super::DataServer;
use crate::backend::extent_map::FileMap;
use crate::catalog::VolumeRecord;
use crate::data::copies::{HeldVolumes, OpenedVolumes};
use crate::data::gate::{FenceError, GateMessage};
use crate::data::maps::Compared;
use crate::volume::Volume;
use crate::volume::copying::{CopyError, CopyHandle};

impl DataServer {
    /// Begins a copy of a volume that has no name, and gives its extent map: see
    /// [`Copies::begin_nameless`](crate::data::copies::Copies::begin_nameless).
    ///
    /// # Errors
    /// [`CopyError`]; nothing is left.
    pub fn begin_nameless_copy(
        &self,
        volume: &VolumeRecord,
    ) -> Result<(CopyHandle, FileMap<Compared>), CopyError> {
        self.copies.begin_nameless(volume, |volume_uid| self.open_to_copy(volume_uid))
    }

    /// Opens the extent map of a snapshot: see [`Maps::of_snapshot`](crate::data::maps::Maps::of_snapshot).
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn snapshot_map(
        &self,
        snapshot_uid: Uuid,
        capacity_bytes: u64,
    ) -> Result<FileMap<Compared>, CopyError> {
        self.copies.maps().of_snapshot(snapshot_uid, capacity_bytes)
    }

    /// Opens volumes that are to hold: see [`Copies::open_all`](crate::data::copies::Copies::open_all).
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn open_volumes(&self, volumes: &[VolumeRecord]) -> Result<OpenedVolumes, CopyError> {
        self.copies.open_all(volumes, |volume_uid| self.open_to_copy(volume_uid))
    }

    /// Has volumes hold every change until what this gives is dropped: see
    /// [`Copies::hold_all`](crate::data::copies::Copies::hold_all).
    ///
    /// # Errors
    /// [`CopyError`]; none of them holds any more.
    pub fn hold_volumes(&self, opened: OpenedVolumes) -> Result<HeldVolumes, CopyError> {
        self.copies.hold_all(opened)
    }

    /// Has the gate open a volume to be copied.
    pub(super) fn open_to_copy(&self, volume_uid: Uuid) -> Result<Arc<Volume>, CopyError> {
        let no_answer = || Err(CopyError::Failed(FenceError::NoAnswer.to_string()));
        self.ask(|reply| GateMessage::CopyVolume { volume_uid, reply }).unwrap_or_else(no_answer)
    }
}
