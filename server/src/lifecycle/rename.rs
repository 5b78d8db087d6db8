//! Giving a volume another name.
//!
//! Everything of a volume but its name is kept by its uid: one row of the catalog changes. But disks and connections are called by the
//! name they were made with, and a daemon that comes back asks for that: so nobody has the volume, or a snapshot of it, meanwhile. Called
//! by `management/` with both names locked.

use proto::volume_name::tenant_of;

use super::settings::SettingsError;
use super::volumes::refuse_name_of_partition;
use super::{DataSide, Lifecycle, LifecycleError, NameLock, SnapshotError, TenantsError};
use crate::catalog::{BackendKind, Concealed, SnapshotFilter, SnapshotKey, VolumeRecord, VolumeState};

impl<D: DataSide> Lifecycle<D> {
    /// Gives the volume another name; one that has it is returned as it is.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`], [`LifecycleError::PartitionName`], [`SettingsError::NameTaken`], [`SettingsError::NameFixed`],
    /// [`TenantsError::Fixed`],
    /// [`LifecycleError::VolumeAttached`], [`LifecycleError::VolumeOpen`], [`LifecycleError::Unfenced`];
    /// [`SnapshotError::Attached`], [`SnapshotError::Open`], [`SnapshotError::InProgress`]; the catalog's or the storage's failure.
    pub fn rename_volume(
        &self,
        locks: &[NameLock],
        name: &str,
        new_name: &str,
    ) -> Result<VolumeRecord, LifecycleError> {
        let is_locked = |name: &str| locks.iter().any(|lock| lock.name() == name);
        assert!(is_locked(name) && is_locked(new_name), "both names are locked");
        let volume = self.volume(name)?;
        if name == new_name {
            return Ok(volume);
        }
        if tenant_of(name) != tenant_of(new_name) {
            let (name, new_name) = (volume.name, new_name.to_owned());
            return Err(TenantsError::Fixed { name, new_name }.into());
        }
        refuse_name_of_partition(new_name)?;
        if volume.backend == BackendKind::Memory {
            return Err(SettingsError::NameFixed(volume.name).into());
        }
        let uid = volume.volume_uid;
        self.refuse_while(name, |operation| operation.makes(uid) || operation.reads(uid))?;
        match self.settled_volume(new_name)? {
            None => {}
            Some((_, VolumeState::Ready)) => return Err(SettingsError::NameTaken(new_name.to_owned()).into()),
            Some((leftover, _)) => self.remove_volume(&leftover)?,
        }
        self.refuse_attached(&volume)?;
        self.refuse_attached_snapshots(uid)?;
        let _concealed_snapshots = self.conceal_snapshots(&volume)?;
        // Hidden first, then asked whether it is open: nobody can open it by the old name in between.
        let concealed = self.catalog.conceal_volume(uid);
        self.data_side
            .release_volume(uid)
            .map_err(|still_open| LifecycleError::VolumeOpen { name: name.to_owned(), still_open })?;
        self.catalog.set_name(uid, new_name)?;
        drop(concealed);
        tracing::info!(name = new_name, former = name, volume_uid = %uid, "volume renamed");
        Ok(VolumeRecord { name: new_name.to_owned(), ..volume })
    }

    /// Hides the volume's snapshots, which clients open as `VOLUME@SNAPSHOT`, if nobody has one open.
    fn conceal_snapshots(&self, volume: &VolumeRecord) -> Result<Vec<Concealed>, LifecycleError> {
        let of_volume =
            SnapshotFilter { volume_name: Some(volume.name.clone()), ..SnapshotFilter::default() };
        let snapshots = self.catalog.list_snapshots(&of_volume, &SnapshotKey::default(), u32::MAX)?;
        let mut concealed = Vec::with_capacity(snapshots.len());
        for (snapshot, _) in snapshots {
            concealed.push(self.catalog.conceal_volume(snapshot.snapshot_uid));
            let open = |still_open| SnapshotError::Open { export_name: snapshot.export_name(), still_open };
            self.data_side.release_volume(snapshot.snapshot_uid).map_err(open)?;
        }
        Ok(concealed)
    }
}
