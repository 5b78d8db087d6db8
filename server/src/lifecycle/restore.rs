//! Giving a volume the bytes of one of its snapshots.
//!
//! See the module's text for the order and its reason. The volume is hidden from the data side from the call on, so that nobody opens
//! it before it has its new bytes; whoever manages it still sees it. Called by `management/`, with the names of both locked.

use uuid::Uuid;

use super::copies::Started;
use super::operations::{Operation, OperationKind, OperationWanted};
use super::settings::refuse_protected;
use super::snapshot_error::SnapshotError;
use super::snapshots::snapshot_lock_name;
use super::{DataSide, Lifecycle, LifecycleError, NameLock};
use crate::catalog::{Content, VolumeRecord};
use crate::volume::copying::{CopySource, CopyTarget, CopyWanted};

impl<D: DataSide> Lifecycle<D> {
    /// Begins to give the volume the bytes of its snapshot; where that goes on already, returns its operation.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`], [`SettingsError::Protected`](super::SettingsError::Protected), [`LifecycleError::VolumeAttached`], [`LifecycleError::VolumeOpen`],
    /// [`LifecycleError::Unfenced`], [`SnapshotError::NotFound`], [`SnapshotError::Unsupported`],
    /// [`SnapshotError::InProgress`], [`SnapshotError::Busy`]; the catalog's failure.
    pub fn restore_volume(
        &self,
        locks: &[NameLock],
        name: &str,
        snapshot_uid: Uuid,
    ) -> Result<Started<Uuid>, LifecycleError> {
        let is_locked = |name: &str| locks.iter().any(|lock| lock.name() == name);
        assert!(is_locked(name) && is_locked(&snapshot_lock_name(snapshot_uid)));
        // One that ended just now was written down before: what was written to the volume since is not to be lost.
        if let Some(there) = self.made_already(OperationKind::Restore)? {
            return Ok(there);
        }
        let volume = self.volume(name)?;
        let volume_uid = volume.volume_uid;
        let snapshot = self.ready_snapshot(snapshot_uid)?;
        if snapshot.volume_uid != volume_uid {
            return Err(SnapshotError::NotFound(format!("{name}@{}", snapshot.name)).into());
        }
        let is_this = |operation: &Operation| {
            let is_restore = operation.kind() == OperationKind::Restore;
            is_restore && operation.makes(volume_uid) && operation.reads(snapshot_uid)
        };
        if let Some(operation) = self.operations.find(is_this) {
            self.join(Some(&operation), &volume_uid.to_string())?;
            return Ok(Started { made: volume_uid, operation: Some(operation) });
        }
        self.refuse_while(name, |operation| operation.makes(volume_uid) || operation.reads(volume_uid))?;
        refuse_protected(&volume)?;
        self.refuse_attached(&volume)?;
        self.check_can_copy(&volume)?;
        let begun = self.operations.begin(OperationWanted {
            kind: OperationKind::Restore,
            targets: vec![name.to_owned()],
            made: vec![volume_uid],
            read: vec![snapshot_uid],
        })?;
        let concealed = self.catalog.conceal_volume(volume_uid);
        if let Err(still_open) = self.data_side.release_volume(volume_uid) {
            self.operations.forget(begun);
            return Err(LifecycleError::VolumeOpen { name: name.to_owned(), still_open });
        }
        let (this, content) = (self.clone(), snapshot.content);
        let wanted = CopyWanted {
            source: CopySource::Snapshot { snapshot_uid, capacity_bytes: snapshot.capacity_bytes },
            target: CopyTarget::Restored(volume_uid),
            capacity_bytes: volume.capacity_bytes,
        };
        let operation = self.go_on(begun, move |operation| {
            let _concealed = concealed;
            let restored =
                this.copy_in_line(operation, &wanted).and_then(|()| this.put_in_place(&volume, content));
            if restored.is_ok() {
                this.carry_out_joined(operation, &volume_uid.to_string());
            }
            restored.inspect_err(|_| this.discard_restored(volume_uid))
        });
        Ok(Started { made: volume_uid, operation: Some(operation) })
    }

    /// The incarnation first: a server that dies in between has raised it for nothing, and none that was restored has the old one.
    /// In the same way its content is `written` before there may be data, and `never-written` only when there is none.
    fn put_in_place(&self, volume: &VolumeRecord, content: Content) -> Result<(), LifecycleError> {
        let (name, volume_uid) = (&volume.name, volume.volume_uid);
        self.catalog.raise_incarnation_to(volume_uid, volume.incarnation + 1)?;
        self.catalog.mark_written(volume_uid)?;
        let replaced = self.data_side.replace_storage(volume);
        replaced.map_err(|source| LifecycleError::Storage { action: "restore", volume_uid, source })?;
        // Before anybody can have the volume, and write to it.
        self.catalog.note_carried_out(&volume_uid.to_string())?;
        if content == Content::NeverWritten {
            self.catalog.change_content(volume_uid, Content::Written, content)?;
        }
        self.data_side.content_changed(&self.volume(name)?);
        tracing::info!(%name, %volume_uid, "volume restored");
        Ok(())
    }

    /// Of a restore that came to nothing.
    fn discard_restored(&self, volume_uid: Uuid) {
        if let Err(error) = self.data_side.delete_copy(CopyTarget::Restored(volume_uid)) {
            tracing::warn!(%volume_uid, %error, "what is left of a failed restore is not removed yet");
        }
    }
}
