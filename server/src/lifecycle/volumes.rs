//! Creating and deleting volumes: storage between two rows of the catalog.
//!
//! See the module's text for the order and its reason. Called by `management/` with the name locked. A call that fails in
//! the middle leaves its row, and the next call on the name (or the next start) finishes the work; a call that is refused
//! leaves nothing.

use std::io;

use proto::volume_name::partition_of;
use uuid::Uuid;

use super::settings::refuse_protected;
use super::{DataSide, Lifecycle, LifecycleError, NameLock, SnapshotError};
use crate::catalog::{AttachmentRecord, AttachmentState, BackendKind, NewVolume, VolumeRecord, VolumeState};

/// A volume that grows ends on such a multiple: a file that is open for direct I/O may need it (`statx`, at most a page).
const GROWTH_UNIT_BYTES: u64 = 4096;

impl<D: DataSide> Lifecycle<D> {
    /// Makes the volume; one with the same name and properties is returned as it is.
    ///
    /// # Errors
    /// [`LifecycleError::PartitionName`], [`LifecycleError::VolumeDiffers`], [`LifecycleError::NoSpace`], [`LifecycleError::NoMemory`],
    /// [`LifecycleError::TooLarge`], [`LifecycleError::NoThinPool`]; the catalog's or the storage's failure.
    pub fn create_volume(&self, lock: &NameLock, new: &NewVolume) -> Result<VolumeRecord, LifecycleError> {
        assert_eq!(lock.name(), new.name, "the lock is of the volume's name");
        match self.settled_volume(&new.name)? {
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
        if new.backend == BackendKind::Lvm && self.data_side.thin_pool().is_none() {
            return Err(LifecycleError::NoThinPool(new.name.clone()));
        }
        let volume = self.catalog.begin_creating(new)?;
        let made =
            self.make_storage(&volume).and_then(|()| Ok(self.catalog.finish_creating(volume.volume_uid)?));
        if let Err(error) = made {
            if let Err(cleaning) = self.remove_volume(&volume) {
                tracing::warn!(name = %volume.name, error = %cleaning, "what is left of a failed volume creation is not removed yet");
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

    /// Deletes the volume and its data; false where there is none. With `keep_snapshots` its snapshots stay, without a volume's name.
    ///
    /// # Errors
    /// [`SettingsError::Protected`](super::SettingsError::Protected), [`LifecycleError::VolumeAttached`],
    /// [`GrantsError::Granted`](super::GrantsError::Granted), [`LifecycleError::VolumeOpen`],
    /// [`LifecycleError::Unfenced`] (the I/O of an attachment that was ended has not finished), [`SnapshotError::VolumeHasSnapshots`],
    /// [`SnapshotError::InProgress`], [`SnapshotError::Attached`] (one that is to be kept); the
    /// catalog's or the storage's failure.
    pub fn delete_volume(&self, lock: &NameLock, keep_snapshots: bool) -> Result<bool, LifecycleError> {
        let name = lock.name();
        let volume = match self.settled_volume(name)? {
            None => return Ok(false),
            Some((volume, VolumeState::Ready)) => volume,
            Some((leftover, state)) => {
                self.remove_volume(&leftover)?;
                // One that was never made never existed; one that was being deleted did, for the caller who repeats.
                return Ok(state == VolumeState::Deleting);
            }
        };
        refuse_protected(&volume)?;
        let uid = volume.volume_uid;
        self.refuse_while(name, |operation| operation.makes(uid) || operation.reads(uid))?;
        self.refuse_attached(&volume)?;
        self.refuse_granted(&volume)?;
        let count = self.catalog.snapshot_count(uid)?;
        if count > 0 && !keep_snapshots {
            return Err(SnapshotError::VolumeHasSnapshots { name: name.to_owned(), count }.into());
        }
        self.refuse_attached_snapshots(uid)?;
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

    /// Finishes the deletion of a volume that a former call began; one that is not being deleted is left alone.
    ///
    /// # Errors
    /// The catalog's or the storage's failure.
    pub fn finish_deleting(&self, volume_uid: Uuid) -> Result<(), LifecycleError> {
        match self.catalog.volume_of_uid_in_any_state(volume_uid)? {
            Some((volume, VolumeState::Deleting)) => self.remove_volume(&volume),
            _ => Ok(()),
        }
    }

    /// Finishes what a former call began, and refuses where the volume is attached then.
    pub(super) fn refuse_attached(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        self.finish_ending(volume)?;
        let held = self.catalog.attachments_of_volume(volume.volume_uid)?;
        if held.is_empty() {
            return Ok(());
        }
        Err(LifecycleError::VolumeAttached { name: volume.name.clone(), node_id: nodes_of(&held) })
    }

    /// The same of its snapshots: the disk of one is called by the volume's name, which may soon be another volume's.
    pub(super) fn refuse_attached_snapshots(&self, volume_uid: Uuid) -> Result<(), LifecycleError> {
        while let Some(snapshot_uid) = self.catalog.attached_snapshot(volume_uid)?
            && let Some((snapshot, _)) = self.catalog.snapshot_in_any_state(snapshot_uid)?
        {
            self.refuse_attached_snapshot(&snapshot)?;
        }
        Ok(())
    }

    /// Makes the volume larger; one that has the size is returned as it is. The storage first, then the row: what a crash
    /// leaves in between is a file with room at its end, which the next call finds.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`], [`LifecycleError::Shrink`], [`LifecycleError::SizeUnaligned`],
    /// [`LifecycleError::SizeFixed`], [`LifecycleError::AdoptedSize`], [`LifecycleError::NoSpace`], [`LifecycleError::TooLarge`]; the
    /// catalog's or the storage's failure.
    pub fn resize_volume(
        &self,
        lock: &NameLock,
        capacity_bytes: u64,
    ) -> Result<VolumeRecord, LifecycleError> {
        let volume = self.volume(lock.name())?;
        self.refuse_while(lock.name(), |operation| operation.makes(volume.volume_uid))?;
        if capacity_bytes == volume.capacity_bytes {
            return Ok(volume);
        }
        if volume.backend == BackendKind::Device {
            return self.resize_adopted(volume, capacity_bytes);
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
        self.catalog.may_grow(volume.volume_uid, capacity_bytes)?;
        let grown = self.data_side.grow_storage(&volume, capacity_bytes);
        grown.map_err(|source| storage_error(source, "grow", volume.volume_uid, capacity_bytes))?;
        self.catalog.set_capacity(volume.volume_uid, capacity_bytes)?;
        self.data_side.reopen_attachments(volume.volume_uid);
        tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, capacity_bytes, "volume resized");
        Ok(VolumeRecord { capacity_bytes, ..volume })
    }

    /// The volume of that name, in whatever state no operation changes any more. An operation holds no name, and has its last word in the
    /// row before it ends: so the row is read anew once none is found.
    pub(super) fn settled_volume(
        &self,
        name: &str,
    ) -> Result<Option<(VolumeRecord, VolumeState)>, LifecycleError> {
        match self.catalog.volume_in_any_state(name)? {
            Some((volume, state)) if state != VolumeState::Ready => {
                self.refuse_while(name, |operation| operation.makes(volume.volume_uid))?;
                Ok(self.catalog.volume_in_any_state(name)?)
            }
            found => Ok(found),
        }
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

    /// The ready volume of that name, or uid as `uid:UUID`; also while a deletion that may yet be refused hides it from the data
    /// side.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; the catalog's failure.
    pub fn volume(&self, asked: &str) -> Result<VolumeRecord, LifecycleError> {
        match self.asked_volume(asked)? {
            Some((volume, VolumeState::Ready)) => Ok(volume),
            _ => Err(LifecycleError::VolumeNotFound(asked.to_owned())),
        }
    }

    /// The name of a volume that is asked for by its uid, as `uid:UUID`, or by its name; in whatever state it is.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; the catalog's failure.
    pub fn volume_name(&self, asked: &str) -> Result<String, LifecycleError> {
        let found = self.asked_volume(asked)?.map(|(volume, _)| volume.name);
        found.ok_or_else(|| LifecycleError::VolumeNotFound(asked.to_owned()))
    }

    /// The volume in whatever state it is; none where the uid is none.
    pub(super) fn asked_volume(
        &self,
        asked: &str,
    ) -> Result<Option<(VolumeRecord, VolumeState)>, LifecycleError> {
        Ok(match asked.strip_prefix("uid:").map(str::parse) {
            Some(Ok(uid)) => self.catalog.volume_of_uid_in_any_state(uid)?,
            Some(Err(_)) => None,
            None => self.catalog.volume_in_any_state(asked)?,
        })
    }
}

/// So many nodes an error names, and so many bytes of their names: it is told in the headers of its answer, twice, of which clients take
/// 16 KiB.
const NODES_TOLD_MAX: usize = 16;
const NODES_TOLD_BYTES_MAX: usize = 2048;

/// The nodes that hold a volume, for people; of many the first.
pub(super) fn nodes_of(held: &[(AttachmentRecord, AttachmentState)]) -> String {
    nodes_told(held.iter().map(|(held, _)| held.node_id.as_str()))
}

/// Nodes for people: the first of them, and how many others there are.
pub(super) fn nodes_told<'a>(nodes: impl Iterator<Item = &'a str>) -> String {
    let (mut told, mut others) = (String::new(), 0);
    for (index, node_id) in nodes.enumerate() {
        let fits = index < NODES_TOLD_MAX && told.len() + node_id.len() <= NODES_TOLD_BYTES_MAX;
        match index {
            0 => told.push_str(node_id),
            _ if fits && others == 0 => {
                told.push_str(", ");
                told.push_str(node_id);
            }
            _ => others += 1,
        }
    }
    match others {
        0 => told,
        1 => format!("{told} and 1 other"),
        others => format!("{told} and {others} others"),
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
pub(super) fn refuse_name_of_partition(name: &str) -> Result<(), LifecycleError> {
    partition_of(name).map_or(Ok(()), |(disk, partition)| {
        Err(LifecycleError::PartitionName { name: name.to_owned(), disk: disk.to_owned(), partition })
    })
}

/// The first property of which what is and what is wanted differ is an error.
pub(super) fn none_differs<const N: usize>(
    name: &str,
    properties: [(&'static str, String, String); N],
) -> Result<(), LifecycleError> {
    match properties.into_iter().find(|(_, existing, wanted)| existing != wanted) {
        None => Ok(()),
        Some((property, existing, wanted)) => {
            Err(LifecycleError::VolumeDiffers { name: name.to_owned(), property, existing, wanted })
        }
    }
}

/// Whether the volume is the one asked for; the error names the first property that is not.
fn same_properties(volume: &VolumeRecord, new: &NewVolume) -> Result<(), LifecycleError> {
    let write_cache = |on: bool| if on { "on" } else { "off" }.to_owned();
    let backend = |kind: BackendKind| kind.as_str().to_owned();
    let writers = |is_shared: bool| if is_shared { "several" } else { "one" }.to_owned();
    let encrypted = |is_encrypted: bool| if is_encrypted { "on" } else { "off" }.to_owned();
    let properties = [
        ("size in bytes", volume.capacity_bytes.to_string(), new.capacity_bytes.to_string()),
        ("block size", volume.block_size_bytes.to_string(), new.block_size_bytes.to_string()),
        ("backend", backend(volume.backend), backend(new.backend)),
        ("write cache", write_cache(volume.write_cache_on), write_cache(new.write_cache_on)),
        ("number of writers", writers(volume.settings.is_shared), writers(new.settings.is_shared)),
        ("encryption", encrypted(volume.settings.is_encrypted), encrypted(new.settings.is_encrypted)),
    ];
    none_differs(&volume.name, properties)
}
