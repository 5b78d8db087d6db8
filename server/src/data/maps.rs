//! The extent maps of what is compared: snapshots, and copies without a name.
//!
//! Owns their files, each with a descriptor that is counted. Never: compares (`volume/diff/` does). Called by: `data/copies.rs` and
//! `dirty_bitmaps.rs`, on threads that may wait.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::backend::extent_map::FileMap;
use crate::backend::lvm::{Lvm, LvmError, Thin, ThinMap};
use crate::descriptors::{Descriptors, Taken};
use crate::volume::copying::{CopyError, CopyTarget};
use crate::volume::snapshot::files::{CopyFiles, failed};

/// So long a map in a thin pool is read, with what waits for its turn before: a client waits for an answer meanwhile.
const THIN_MAP_LIMIT: Duration = Duration::from_secs(60);
/// Of a map: its file.
const DESCRIPTORS_OF_MAP: u64 = 1;

/// The file of a snapshot, or of a copy without a name, that is compared.
#[derive(Debug)]
pub struct Compared {
    file: File,
    _descriptors: Taken,
}

impl AsRef<File> for Compared {
    fn as_ref(&self) -> &File {
        &self.file
    }
}

/// Opens maps.
#[derive(Debug, Clone)]
pub struct Maps {
    files: CopyFiles,
    descriptors: Arc<Descriptors>,
    lvm: Option<Arc<Lvm>>,
}

impl Maps {
    /// Of a server whose copies are there.
    pub fn new(files: CopyFiles, descriptors: Arc<Descriptors>) -> Self {
        Self { files, descriptors, lvm: None }
    }

    /// The same, with the thin pool that snapshots may be in.
    #[must_use]
    pub fn with_pool(self, lvm: Option<Arc<Lvm>>) -> Self {
        Self { lvm, ..self }
    }

    /// The map of a snapshot in the thin pool, which stays what it is when that is gone. Takes as long as `THIN_MAP_LIMIT`.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn of_thin_snapshot(&self, snapshot_uid: Uuid, capacity_bytes: u64) -> Result<ThinMap, CopyError> {
        let lvm = self.lvm.as_deref().ok_or(LvmError::NotConfigured)?;
        Ok(lvm.map(Thin::Snapshot(snapshot_uid), capacity_bytes, THIN_MAP_LIMIT)?)
    }

    /// The map of a snapshot, which keeps its file open.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn of_snapshot(
        &self,
        snapshot_uid: Uuid,
        capacity_bytes: u64,
    ) -> Result<FileMap<Compared>, CopyError> {
        let path = self.files.path(CopyTarget::Snapshot(snapshot_uid));
        let file = File::open(&path).map_err(|error| failed(&format!("open {}", path.display()), &error))?;
        self.of_file(file, capacity_bytes)
    }

    /// The map of a file that nobody writes to.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn of_file(&self, file: File, capacity_bytes: u64) -> Result<FileMap<Compared>, CopyError> {
        let taken = self.descriptors.take(DESCRIPTORS_OF_MAP);
        let _descriptors = taken.map_err(|error| CopyError::Busy(error.to_string()))?;
        FileMap::new(Compared { file, _descriptors }, capacity_bytes).map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => CopyError::Unsupported(error.to_string()),
            _ => failed("look at a file's extents", &error),
        })
    }
}
