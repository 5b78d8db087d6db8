//! Making clones: volumes with the bytes of a snapshot, or of a volume at an instant.
//!
//! See the module's text for the order and its reason. A clone of a volume has its instant in the call; one of a snapshot, which nobody
//! writes to, may wait in line for its turn. Called by `management/`, with the names of both locked. A row `creating` that
//! an operation speaks of is left alone by everybody else.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::copies::Started;
use super::operations::{Operation, OperationKind, OperationWanted, Turn};
use super::snapshot_error::SnapshotError;
use super::snapshots::{SnapshotNamed, refuse_initialising, snapshot_lock_name};
use super::volumes::refuse_name_of_partition;
use super::{DataSide, Lifecycle, LifecycleError, NameLock};
use crate::catalog::{Content, NewVolume, SnapshotRecord, VolumeRecord, VolumeSettings, VolumeState};
use crate::volume::copying::{CopyHandle, CopySource, CopyTarget, CopyWanted};

/// What a clone is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloneOf {
    /// A volume, at this instant.
    Volume(String),
    /// A snapshot.
    Snapshot(Uuid),
}

/// The clone that is wanted.
#[derive(Debug, Clone)]
pub struct CloneWanted {
    /// The new volume's name.
    pub name: String,
    /// Of what.
    pub source: CloneOf,
    /// Size in bytes; 0 is the source's.
    pub capacity_bytes: u64,
    /// Its labels. They do not make it another clone, as of new volumes.
    pub labels: BTreeMap<String, String>,
    /// Its description; the same.
    pub description: String,
}

/// What there is to be cloned.
enum Source {
    Volume(VolumeRecord),
    Snapshot(SnapshotRecord),
}

impl Source {
    fn uid(&self) -> Uuid {
        match self {
            Self::Volume(volume) => volume.volume_uid,
            Self::Snapshot(snapshot) => snapshot.snapshot_uid,
        }
    }

    /// As it is served.
    fn as_volume(&self) -> VolumeRecord {
        match self {
            Self::Volume(volume) => volume.clone(),
            Self::Snapshot(snapshot) => snapshot.as_volume(),
        }
    }

    fn to_copy(&self) -> CopySource {
        match self {
            Self::Volume(volume) => CopySource::Volume(volume.clone()),
            Self::Snapshot(SnapshotRecord { snapshot_uid, capacity_bytes, .. }) => {
                CopySource::Snapshot { snapshot_uid: *snapshot_uid, capacity_bytes: *capacity_bytes }
            }
        }
    }
}

/// How far the copy of a new clone is.
enum Copying {
    /// Its instant has been.
    Since(Turn, CopyHandle),
    /// It waits for its turn.
    InLine(CopyWanted),
}

impl CloneOf {
    /// What has to be locked beside the clone's name.
    pub fn lock_name(&self) -> String {
        match self {
            Self::Volume(name) => name.clone(),
            Self::Snapshot(snapshot_uid) => snapshot_lock_name(*snapshot_uid),
        }
    }
}

impl<D: DataSide> Lifecycle<D> {
    /// Makes the clone; one of the same source is returned as it is, or its operation where it is being made.
    ///
    /// # Errors
    /// As of [`Lifecycle::create_volume`] and [`Lifecycle::create_snapshots`]; [`SnapshotError::NotFound`],
    /// [`SnapshotError::Smaller`], [`SnapshotError::Unaligned`].
    pub fn clone_volume(
        &self,
        locks: &[NameLock],
        wanted: &CloneWanted,
    ) -> Result<Started<Uuid>, LifecycleError> {
        let is_locked = |name: &str| locks.iter().any(|lock| lock.name() == name);
        assert!(is_locked(&wanted.name) && is_locked(&wanted.source.lock_name()));
        if let Some(there) = self.made_already(OperationKind::Clone)? {
            return Ok(there);
        }
        let source = match &wanted.source {
            CloneOf::Volume(name) => Source::Volume(self.volume(name)?),
            CloneOf::Snapshot(uid) => Source::Snapshot(self.ready_snapshot(*uid)?),
        };
        let new = new_volume(wanted, &source.as_volume())?;
        if let Some(there) = self.clone_there(&new, wanted, source.uid())? {
            self.join(there.operation.as_ref(), &there.made.to_string())?;
            return Ok(there);
        }
        refuse_name_of_partition(&wanted.name)?;
        let of = source.as_volume();
        refuse_initialising(&of)?;
        self.check_can_copy(&of)?;
        self.refuse_while(&of.name, |operation| operation.makes(of.volume_uid))?;
        self.check_reserve(of.backend)?;
        let volume_uid = Uuid::new_v4();
        let begun = self.operations.begin(OperationWanted {
            kind: OperationKind::Clone,
            targets: vec![new.name.clone()],
            made: vec![volume_uid],
            read: vec![of.volume_uid],
        })?;
        let copy_wanted = CopyWanted {
            source: source.to_copy(),
            target: CopyTarget::Volume(volume_uid),
            capacity_bytes: new.capacity_bytes,
        };
        let (volume, copying) = match self.begin_clone(&new, volume_uid, &source, copy_wanted) {
            Ok(begun) => begun,
            Err(error) => {
                self.operations.forget(begun);
                return Err(error);
            }
        };
        if let Copying::Since(_, copy) = &copying {
            begun.operation().follow(copy);
        }
        // Behind the instant, as of snapshots.
        let is_never_written = match &source {
            Source::Volume(volume) => self.is_never_written(&volume.name),
            Source::Snapshot(snapshot) => snapshot.content == Content::NeverWritten,
        };
        let this = self.clone();
        let operation = self.go_on(begun, move |operation| {
            let copied = match copying {
                Copying::Since(_turn, copy) => operation.copies(&copy).map_err(LifecycleError::from),
                Copying::InLine(wanted) => this.copy_in_line(operation, &wanted),
            };
            this.finish_clone(&volume, is_never_written, copied)?;
            this.carry_out_joined(operation, &volume_uid.to_string());
            Ok(())
        });
        Ok(Started { made: volume_uid, operation: Some(operation) })
    }

    /// The row, and of a volume the instant.
    fn begin_clone(
        &self,
        new: &NewVolume,
        volume_uid: Uuid,
        source: &Source,
        wanted: CopyWanted,
    ) -> Result<(VolumeRecord, Copying), LifecycleError> {
        let begin = || self.catalog.begin_cloning(new, volume_uid, source.uid());
        match source {
            Source::Snapshot(_) => Ok((begin()?, Copying::InLine(wanted))),
            Source::Volume(_) => {
                let turn = self.operations.try_turn()?;
                let volume = begin()?;
                let copy = self.data_side.begin_copies(std::slice::from_ref(&wanted));
                let copy = copy.inspect_err(|_| self.discard_clone(&volume))?;
                Ok((volume, Copying::Since(turn, copy)))
            }
        }
    }

    /// Copies when it is the operation's turn.
    pub(super) fn copy_in_line(
        &self,
        operation: &Operation,
        wanted: &CopyWanted,
    ) -> Result<(), LifecycleError> {
        let _turn = self.operations.turn(operation)?;
        let copy = self.data_side.begin_copies(std::slice::from_ref(wanted))?;
        Ok(operation.copies(&copy)?)
    }

    /// A volume of the clone's name that is the clone, or is becoming it; a leftover of another is removed.
    fn clone_there(
        &self,
        new: &NewVolume,
        wanted: &CloneWanted,
        source_uid: Uuid,
    ) -> Result<Option<Started<Uuid>>, LifecycleError> {
        let Some((mut existing, mut state)) = self.catalog.volume_in_any_state(&new.name)? else {
            return Ok(None);
        };
        let made = existing.volume_uid;
        let operation = self.operations.find(|operation| operation.makes(made));
        if state != VolumeState::Ready && operation.is_none() {
            // One that ended just now has left its last word in the row.
            let Some(again) = self.catalog.volume_in_any_state(&new.name)? else { return Ok(None) };
            (existing, state) = again;
            if state != VolumeState::Ready {
                self.remove_volume(&existing)?;
                return Ok(None);
            }
        }
        let differs = |property, existing, wanted| {
            let name = new.name.clone();
            Err(LifecycleError::VolumeDiffers { name, property, existing, wanted })
        };
        let existing_source = self.catalog.source_of(made)?;
        if existing_source != Some(source_uid) {
            let existing = existing_source.map_or_else(|| "none".to_owned(), |uid| uid.to_string());
            return differs("source", existing, source_uid.to_string());
        }
        // Whoever asked for no size takes what it has grown to.
        if wanted.capacity_bytes != 0 && existing.capacity_bytes != new.capacity_bytes {
            let (existing, wanted) = (existing.capacity_bytes, new.capacity_bytes);
            return differs("size in bytes", existing.to_string(), wanted.to_string());
        }
        // A restore of it is none that the caller waits for.
        let operation = operation.filter(|operation| operation.kind() == OperationKind::Clone);
        Ok(Some(Started { made, operation }))
    }

    fn finish_clone(
        &self,
        volume: &VolumeRecord,
        is_never_written: bool,
        copied: Result<(), LifecycleError>,
    ) -> Result<(), LifecycleError> {
        let volume_uid = volume.volume_uid;
        let finished = copied.and_then(|()| {
            if is_never_written {
                self.catalog.change_content(volume_uid, Content::Written, Content::NeverWritten)?;
            }
            Ok(self.catalog.finish_creating(volume_uid)?)
        });
        match finished {
            Ok(()) => {
                tracing::info!(name = %volume.name, %volume_uid, "volume cloned");
                Ok(())
            }
            Err(error) => {
                self.discard_clone(volume);
                Err(error)
            }
        }
    }

    /// Of a clone that could not be made; one whose row turns out to be ready after all stays.
    fn discard_clone(&self, volume: &VolumeRecord) {
        let removed = match self.catalog.volume_in_any_state(&volume.name) {
            Ok(Some((found, VolumeState::Creating))) if found.volume_uid == volume.volume_uid => {
                self.remove_volume(volume)
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = removed {
            tracing::warn!(name = %volume.name, %error, "what is left of a failed clone is not removed yet");
        }
    }

    /// The snapshot's identity, to lock it.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; the catalog's failure.
    pub fn snapshot_uid(&self, named: &SnapshotNamed) -> Result<Uuid, LifecycleError> {
        self.snapshot(named).map(|(snapshot, _)| snapshot.snapshot_uid)
    }
}

/// The clone as a new volume, of a source that is served as `of`.
fn new_volume(wanted: &CloneWanted, of: &VolumeRecord) -> Result<NewVolume, SnapshotError> {
    let source_bytes = of.capacity_bytes;
    let capacity_bytes = if wanted.capacity_bytes == 0 { source_bytes } else { wanted.capacity_bytes };
    if capacity_bytes < source_bytes {
        return Err(SnapshotError::Smaller { source_bytes });
    }
    let block_size_bytes = of.block_size_bytes;
    if !capacity_bytes.is_multiple_of(u64::from(block_size_bytes)) {
        return Err(SnapshotError::Unaligned { block_size_bytes });
    }
    Ok(NewVolume {
        name: wanted.name.clone(),
        capacity_bytes,
        block_size_bytes,
        // Where its bytes are shared.
        backend: of.backend,
        write_cache_on: of.write_cache_on,
        settings: VolumeSettings {
            labels: wanted.labels.clone(),
            description: wanted.description.clone(),
            is_encrypted: of.settings.is_encrypted,
            // Until more is known.
            content: Content::Written,
            ..VolumeSettings::default()
        },
    })
}
