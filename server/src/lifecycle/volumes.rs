//! Creating and deleting volumes: storage between two rows of the catalog.
//!
//! See the module's text for the order and its reason. Called by `management/` with the name locked. A call that fails in
//! the middle leaves its row, and the next call on the name (or the next start) finishes the work; a call that is refused
//! leaves nothing.

use std::io;

use proto::volume_name::partition_of;
use uuid::Uuid;

use super::{DataSide, Lifecycle, LifecycleError, NameLock};
use crate::catalog::{BackendKind, NewVolume, VolumeRecord, VolumeState};

/// A volume that grows ends on such a multiple: a file that is open for direct I/O may need it (`statx`, at most a page).
const GROWTH_UNIT_BYTES: u64 = 4096;

impl<D: DataSide> Lifecycle<D> {
    /// Makes the volume; one with the same name and properties is returned as it is.
    ///
    /// # Errors
    /// [`LifecycleError::PartitionName`], [`LifecycleError::VolumeDiffers`], [`LifecycleError::NoSpace`], [`LifecycleError::NoMemory`],
    /// [`LifecycleError::TooLarge`]; the catalog's or the storage's failure.
    pub fn create_volume(&self, lock: &NameLock, new: &NewVolume) -> Result<VolumeRecord, LifecycleError> {
        assert_eq!(lock.name(), new.name, "the lock is of the volume's name");
        match self.catalog.volume_in_any_state(&new.name)? {
            Some((existing, VolumeState::Ready)) => {
                return same_properties(&existing, new).map(|()| existing);
            }
            found => {
                refuse_name_of_partition(&new.name)?;
                if let Some((leftover, _)) = found {
                    self.remove_volume(&leftover)?;
                }
            }
        }
        let volume = self.catalog.begin_creating(new)?;
        let made =
            self.make_storage(&volume).and_then(|()| Ok(self.catalog.finish_creating(volume.volume_uid)?));
        if let Err(error) = made {
            if let Err(cleaning) = self.remove_volume(&volume) {
                tracing::warn!(name = %volume.name, error = %cleaning, "a volume that could not be made is still to be cleaned up");
            }
            return Err(error);
        }
        tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, capacity_bytes = volume.capacity_bytes, "volume created");
        Ok(volume)
    }

    fn make_storage(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        let volume_uid = volume.volume_uid;
        if volume.backend == BackendKind::Memory {
            // This one is in the catalog already, and so are others that are just being made.
            let fits = self.data_side.memory_for_volumes().check(self.catalog.memory_volumes_bytes()?);
            fits.map_err(|source| LifecycleError::NoMemory { name: volume.name.clone(), source })?;
        }
        let made = self.data_side.create_storage(volume);
        made.map_err(|source| storage_error(source, "make", volume_uid, volume.capacity_bytes))
    }

    /// Deletes the volume and its data; false where there is none.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeAttached`], [`LifecycleError::VolumeOpen`], [`LifecycleError::Unfenced`] (the I/O of an
    /// attachment that was ended has not finished); the catalog's or the storage's failure.
    pub fn delete_volume(&self, lock: &NameLock) -> Result<bool, LifecycleError> {
        let name = lock.name();
        let volume = match self.catalog.volume_in_any_state(name)? {
            None => return Ok(false),
            Some((volume, VolumeState::Ready)) => volume,
            Some((leftover, state)) => {
                self.remove_volume(&leftover)?;
                // One that was never made never existed; one that was being deleted did, for the caller who repeats.
                return Ok(state == VolumeState::Deleting);
            }
        };
        self.finish_ending(&volume)?;
        if let Some((attachment, _)) = self.catalog.attachment_of_volume(volume.volume_uid)? {
            return Err(LifecycleError::VolumeAttached {
                name: name.to_owned(),
                node_id: attachment.node_id,
            });
        }
        // Hidden first, then asked whether it is open: nobody can open it in between, and a refusal leaves nothing
        // durable behind that a restart would take for a deletion.
        let concealed = self.catalog.conceal_volume(volume.volume_uid);
        self.data_side
            .release_volume(volume.volume_uid)
            .map_err(|still_open| LifecycleError::VolumeOpen { name: name.to_owned(), still_open })?;
        self.catalog.begin_deleting(volume.volume_uid)?;
        drop(concealed);
        self.remove_volume(&volume)?;
        tracing::info!(name, volume_uid = %volume.volume_uid, "volume deleted");
        Ok(true)
    }

    /// Makes the volume larger; one that has the size is returned as it is. The storage first, then the row: what a crash
    /// leaves in between is a file with room at its end, which the next call finds.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`], [`LifecycleError::Shrink`], [`LifecycleError::SizeUnaligned`],
    /// [`LifecycleError::SizeFixed`], [`LifecycleError::NoSpace`], [`LifecycleError::TooLarge`]; the catalog's or the storage's
    /// failure.
    pub fn resize_volume(
        &self,
        lock: &NameLock,
        capacity_bytes: u64,
    ) -> Result<VolumeRecord, LifecycleError> {
        let volume = self.volume(lock.name())?;
        if capacity_bytes == volume.capacity_bytes {
            return Ok(volume);
        }
        if capacity_bytes < volume.capacity_bytes {
            let (name, capacity_bytes) = (volume.name, volume.capacity_bytes);
            return Err(LifecycleError::Shrink { name, capacity_bytes });
        }
        if !capacity_bytes.is_multiple_of(GROWTH_UNIT_BYTES) {
            return Err(LifecycleError::SizeUnaligned { unit_bytes: GROWTH_UNIT_BYTES });
        }
        if volume.backend == BackendKind::Memory {
            return Err(LifecycleError::SizeFixed { name: volume.name });
        }
        let grown = self.data_side.grow_storage(&volume, capacity_bytes);
        grown.map_err(|source| storage_error(source, "grow", volume.volume_uid, capacity_bytes))?;
        self.catalog.set_capacity(volume.volume_uid, capacity_bytes)?;
        self.data_side.reopen_attachments(volume.volume_uid);
        tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, capacity_bytes, "volume resized");
        Ok(VolumeRecord { capacity_bytes, ..volume })
    }

    /// Storage gone, then row gone: for a volume `creating` or `deleting`.
    pub(super) fn remove_volume(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        let volume_uid = volume.volume_uid;
        self.data_side.delete_storage(volume_uid).map_err(|source| LifecycleError::Storage {
            action: "remove",
            volume_uid,
            source,
        })?;
        Ok(self.catalog.forget_volume(volume_uid)?)
    }

    /// The ready volume of that name; also while a deletion that may yet be refused hides it from the data side.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; the catalog's failure.
    pub fn volume(&self, name: &str) -> Result<VolumeRecord, LifecycleError> {
        match self.catalog.volume_in_any_state(name)? {
            Some((volume, VolumeState::Ready)) => Ok(volume),
            _ => Err(LifecycleError::VolumeNotFound(name.to_owned())),
        }
    }
}

/// What the system's error means for a volume whose storage was to be made or to grow.
fn storage_error(
    source: io::Error,
    action: &'static str,
    volume_uid: Uuid,
    capacity_bytes: u64,
) -> LifecycleError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            LifecycleError::NoSpace("hold the volume's size")
        }
        io::ErrorKind::FileTooLarge => LifecycleError::TooLarge { capacity_bytes },
        _ => LifecycleError::Storage { action, volume_uid, source },
    }
}

/// Of a new volume only: those that there are keep their names.
fn refuse_name_of_partition(name: &str) -> Result<(), LifecycleError> {
    partition_of(name).map_or(Ok(()), |(disk, partition)| {
        Err(LifecycleError::PartitionName { name: name.to_owned(), disk: disk.to_owned(), partition })
    })
}

/// Whether the volume is the one asked for; the error names the first property that is not.
fn same_properties(volume: &VolumeRecord, new: &NewVolume) -> Result<(), LifecycleError> {
    let write_cache = |on: bool| if on { "on" } else { "off" }.to_owned();
    let backend = |kind: BackendKind| kind.as_str().to_owned();
    let properties = [
        ("size in bytes", volume.capacity_bytes.to_string(), new.capacity_bytes.to_string()),
        ("block size", volume.block_size_bytes.to_string(), new.block_size_bytes.to_string()),
        ("backend", backend(volume.backend), backend(new.backend)),
        ("write cache", write_cache(volume.write_cache_on), write_cache(new.write_cache_on)),
    ];
    match properties.into_iter().find(|(_, existing, wanted)| existing != wanted) {
        None => Ok(()),
        Some((property, existing, wanted)) => {
            Err(LifecycleError::VolumeDiffers { name: volume.name.clone(), property, existing, wanted })
        }
    }
}
