//! Volumes over what is somebody else's: adopted, followed in size, and let go of as they are.
//!
//! Owns the steps. An adoption makes no storage: looked at → row creating → row of what is adopted → row ready → answer. A deletion is
//! that of any volume; storage of ours there is none of, and the device is not touched. Whoever makes the device larger makes the volume
//! larger: [`Lifecycle::follow_size`] is called when the volume is asked for, and for all that are open by
//! [`Lifecycle::follow_sizes`], once a minute.
//! Called by `management/` and `serve.rs`.

use uuid::Uuid;

use super::{DataSide, Lifecycle, LifecycleError, NameLock};
use crate::backend::device::{AdoptError, Found};
use crate::catalog::{Adopted, AdoptedKind, BackendKind, NewVolume, VolumeRecord, VolumeState};

/// What the lifecycle needs of the data side for adopted volumes. All calls block.
pub trait AdoptedData {
    /// Looks whether what is at the path can be adopted, and what it is. Nothing of it is changed or kept open.
    ///
    /// # Errors
    /// [`AdoptError`]
    fn adopt(&self, path: &str) -> Result<Found, AdoptError>;

    /// What the block device at the path is known by, whoever has it open; nothing of a file.
    ///
    /// # Errors
    /// [`AdoptError`]
    fn identities_at(&self, path: &str) -> Result<Vec<String>, AdoptError>;

    /// How large what an adopted volume has is now, in bytes; looked for, where it is not open, as what had
    /// `expected_bytes`, if that is known.
    ///
    /// # Errors
    /// [`AdoptError`]: it is not there.
    fn measure_adopted(
        &self,
        volume: &VolumeRecord,
        adopted: &Adopted,
        expected_bytes: Option<u64>,
    ) -> Result<u64, AdoptError>;

    /// Whether somebody has the volume open, or had it since the start.
    fn is_open(&self, volume_uid: Uuid) -> bool;
}

/// A volume that is to adopt something; the size, and the block size if none is asked for, are what that has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptWanted {
    /// Its properties, without a size.
    pub new: NewVolume,
    /// What it adopts.
    pub path: String,
    /// `None`: that of what it adopts.
    pub block_size_bytes: Option<u32>,
}

impl<D: DataSide> Lifecycle<D> {
    /// Makes a volume of what is at the path; one that has adopted just that is returned as it is.
    ///
    /// # Errors
    /// [`LifecycleError::Adopt`], [`LifecycleError::BlockSize`], [`LifecycleError::PartitionName`], [`LifecycleError::VolumeDiffers`],
    /// [`LifecycleError::NoSpace`]; the catalog's failure.
    pub fn adopt_volume(
        &self,
        lock: &NameLock,
        wanted: &AdoptWanted,
    ) -> Result<VolumeRecord, LifecycleError> {
        let name = &wanted.new.name;
        assert_eq!(lock.name(), *name, "the lock is of the volume's name");
        match self.catalog().volume_in_any_state(name)? {
            Some((existing, VolumeState::Ready)) => {
                self.is_what_was_wanted(&existing, wanted)?;
                return Ok(self.follow_size(existing)?.0);
            }
            found => {
                super::volumes::refuse_name_of_partition(name)?;
                if let Some((leftover, _)) = found {
                    self.remove_volume(&leftover)?;
                }
            }
        }
        let found = self.data_side().adopt(&wanted.path)?;
        let block_size_bytes = wanted.block_size_bytes.unwrap_or(found.block_size_bytes);
        if !fits(found.size_bytes, found.block_size_bytes, block_size_bytes) {
            let (path, size_bytes) = (wanted.path.clone(), found.size_bytes);
            let own_bytes = found.block_size_bytes;
            return Err(LifecycleError::BlockSize {
                path,
                size_bytes,
                own_bytes,
                wanted_bytes: block_size_bytes,
            });
        }
        let new = NewVolume { capacity_bytes: found.size_bytes, block_size_bytes, ..wanted.new.clone() };
        let volume = self.catalog().begin_creating(&new)?;
        let made = self.adopt_into(&volume, &found.adopted);
        if let Err(error) = made {
            if let Err(cleaning) = self.remove_volume(&volume) {
                tracing::warn!(%name, error = %cleaning, "what is left of a failed volume creation is not removed yet");
            }
            return Err(error);
        }
        let Adopted { path, identity, .. } = &found.adopted;
        tracing::info!(%name, volume_uid = %volume.volume_uid, %path, %identity, capacity_bytes = volume.capacity_bytes, "volume adopted");
        if identity.is_empty() && found.adopted.kind == AdoptedKind::BlockDevice {
            tracing::warn!(%name, %path, "the device has no identity (WWID, serial, UUID): it is recognised by path and size alone");
        }
        Ok(volume)
    }

    fn adopt_into(&self, volume: &VolumeRecord, adopted: &Adopted) -> Result<(), LifecycleError> {
        if let Some(name) = self.catalog().add_adopted(volume.volume_uid, adopted)? {
            return Err(AdoptError::Adopted { path: adopted.path.clone(), name }.into());
        }
        Ok(self.catalog().finish_creating(volume.volume_uid)?)
    }

    fn is_what_was_wanted(
        &self,
        existing: &VolumeRecord,
        wanted: &AdoptWanted,
    ) -> Result<(), LifecycleError> {
        let write_cache = |on: bool| if on { "on" } else { "off" }.to_owned();
        let adopted = self.catalog().adopted(existing.volume_uid)?;
        let is_same = adopted.as_ref().is_some_and(|adopted| self.is_at(adopted, &wanted.path));
        let adopted = match adopted {
            Some(_) if is_same => wanted.path.clone(),
            adopted => adopted.map_or_else(String::new, |adopted| adopted.path),
        };
        let block_size_bytes = wanted.block_size_bytes.unwrap_or(existing.block_size_bytes);
        let properties = [
            ("backend", existing.backend.as_str().to_owned(), BackendKind::Device.as_str().to_owned()),
            ("adopted path", adopted, wanted.path.clone()),
            ("block size", existing.block_size_bytes.to_string(), block_size_bytes.to_string()),
            ("write cache", write_cache(existing.write_cache_on), write_cache(wanted.new.write_cache_on)),
        ];
        super::volumes::none_differs(&existing.name, properties)
    }

    /// Whether what was adopted is at the path: devices have several names, and others from time to time.
    fn is_at(&self, adopted: &Adopted, path: &str) -> bool {
        if adopted.path == path || adopted.identity.is_empty() {
            return adopted.path == path;
        }
        // What cannot be looked at is not it.
        let found = self.data_side().identities_at(path).unwrap_or_default();
        found.contains(&adopted.identity)
    }

    /// The volume as large as its device is now, and what is wrong with the device, if something is. Of a volume of another kind: as
    /// it is. May wait where a raw file's file system does.
    ///
    /// # Errors
    /// The catalog's failure.
    pub fn follow_size(
        &self,
        volume: VolumeRecord,
    ) -> Result<(VolumeRecord, Option<AdoptError>), LifecycleError> {
        let adopted = self.catalog().adopted(volume.volume_uid)?;
        let Some(adopted) = adopted.filter(|_| volume.backend == BackendKind::Device) else {
            return Ok((volume, None));
        };
        let size_bytes =
            match self.data_side().measure_adopted(&volume, &adopted, Some(volume.capacity_bytes)) {
                Ok(size_bytes) => size_bytes,
                Err(error) => return Ok((volume, Some(error))),
            };
        if size_bytes < volume.capacity_bytes {
            let (path, expected_bytes) = (adopted.path, volume.capacity_bytes);
            let error = AdoptError::Shrunk { path, found_bytes: size_bytes, expected_bytes };
            return Ok((volume, Some(error)));
        }
        Ok((self.take_over_size(volume, size_bytes)?, None))
    }

    /// Follows the sizes of all adopted volumes, and says what is wrong.
    pub fn follow_sizes(&self) {
        let uids = self.catalog().adopted_uids();
        let uids = uids.inspect_err(|error| tracing::warn!(%error, "cannot check the adopted volumes"));
        for volume_uid in uids.unwrap_or_default() {
            let Ok(Some(volume)) = self.catalog().volume_by_uid(volume_uid) else { continue };
            if !self.data_side().is_open(volume_uid) {
                continue;
            }
            let name = volume.name.clone();
            match self.follow_size(volume) {
                Ok((_, None)) => {}
                Ok((_, Some(problem))) => {
                    tracing::error!(%name, %volume_uid, %problem, "an adopted volume is in trouble")
                }
                Err(error) => {
                    tracing::warn!(%name, %volume_uid, %error, "cannot check an adopted volume")
                }
            }
        }
    }

    /// Takes over the size that the device has, if that is the one asked for.
    ///
    /// # Errors
    /// [`LifecycleError::AdoptedSize`]: it has another; [`LifecycleError::Adopt`]; the catalog's failure.
    pub(super) fn resize_adopted(
        &self,
        volume: VolumeRecord,
        capacity_bytes: u64,
    ) -> Result<VolumeRecord, LifecycleError> {
        let uid = volume.volume_uid;
        let adopted = self
            .catalog()
            .adopted(uid)?
            .ok_or_else(|| LifecycleError::VolumeNotFound(volume.name.clone()))?;
        let size_bytes = self.data_side().measure_adopted(&volume, &adopted, None)?;
        if size_bytes != capacity_bytes {
            let name = volume.name;
            return Err(LifecycleError::AdoptedSize { name, path: adopted.path, size_bytes });
        }
        self.take_over_size(volume, size_bytes)
    }

    fn take_over_size(&self, volume: VolumeRecord, size_bytes: u64) -> Result<VolumeRecord, LifecycleError> {
        // What is left at its end is no block of the volume.
        let capacity_bytes = size_bytes - size_bytes % u64::from(volume.block_size_bytes);
        if capacity_bytes <= volume.capacity_bytes {
            return Ok(volume);
        }
        let capacity_bytes = self.catalog().raise_capacity(volume.volume_uid, capacity_bytes)?;
        self.data_side().reopen_attachments(volume.volume_uid);
        tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, capacity_bytes, "an adopted device has grown, and its volume with it");
        Ok(VolumeRecord { capacity_bytes, ..volume })
    }
}

/// Whether blocks of `wanted_bytes` can be had of what has this size and blocks of its own.
fn fits(size_bytes: u64, own_bytes: u32, wanted_bytes: u32) -> bool {
    wanted_bytes >= own_bytes && size_bytes.is_multiple_of(u64::from(wanted_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_the_devices_own_or_larger_and_whole() {
        assert!(fits(1 << 20, 512, 512) && fits(1 << 20, 512, 4096) && fits(1 << 20, 4096, 4096));
        assert!(!fits(1 << 20, 4096, 512), "smaller than the device has");
        assert!(fits(512 * 9, 512, 512) && !fits(512 * 9, 512, 4096), "not whole");
    }
}
