//! Making and deleting snapshots: a copy between two rows of the catalog.
//!
//! See the module's text for the order and its reason. The instant is in [`Lifecycle::create_snapshots`], with the names of all
//! volumes locked; the rest goes on in an operation's thread, which needs no lock: a row `creating` belongs to the operation that
//! makes it. Called by `management/`.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::copies::Started;
use super::operations::{Operation, OperationKind, OperationWanted};
use super::snapshot_error::{SnapshotError, reserve_bytes};
use super::volumes::nodes_of;
use super::{DataSide, Lifecycle, LifecycleError, NameLock, SettingsError};
use crate::backend::lvm;
use crate::catalog::{
    BackendKind, CatalogError, Content, NewSnapshot, SnapshotRecord, SnapshotState, VolumeRecord, VolumeState,
};
use crate::scope::Scope;
use crate::volume::copying::{CopyError, CopySource, CopyTarget, CopyWanted};

/// So long a deletion waits for the end of the operation that makes the snapshot, which it cancels.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// Which snapshot is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotNamed {
    /// By its volume's name and its own.
    Name {
        /// The volume's.
        volume_name: String,
        /// Its own.
        name: String,
    },
    /// By its identity.
    Uid(Uuid),
}

impl std::fmt::Display for SnapshotNamed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name { volume_name, name } => write!(f, "{volume_name}@{name}"),
            Self::Uid(uid) => write!(f, "@{uid}"),
        }
    }
}

/// What there is of the snapshots that are wanted.
pub(super) enum Found {
    Nothing,
    /// All, of one group.
    All(Vec<(SnapshotRecord, SnapshotState)>),
}

impl<D: DataSide> Lifecycle<D> {
    /// Takes snapshots of the volumes whose names are locked, all at one instant, which has been when this returns. Where all are
    /// there already, of one group, they are returned; with a `freeze_id` only those of this freeze, and those that are called frozen. The
    /// answer has them in the order of `volume_names`.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; [`SnapshotError::Exists`], [`SnapshotError::Initialising`], [`SnapshotError::Unsupported`],
    /// [`SnapshotError::Reserve`], [`SnapshotError::InProgress`], [`SnapshotError::Busy`], [`SnapshotError::Copy`]; the catalog's
    /// failure.
    pub fn create_snapshots(
        &self,
        locks: &[NameLock],
        volume_names: &[String],
        name: &str,
        freeze_id: Option<Uuid>,
    ) -> Result<Started<Vec<Uuid>>, LifecycleError> {
        assert!(volume_names.iter().all(|name| locks.iter().any(|lock| lock.name() == name)));
        if let Some(subject) = self.carried_out()? {
            let made = uids(&subject);
            let operation = self.operation_that_makes(&made);
            return Ok(Started { made, operation });
        }
        let volumes: Vec<VolumeRecord> =
            volume_names.iter().map(|name| self.volume(name)).collect::<Result<_, _>>()?;
        if let Some(there) = self.group_there(&volumes, name, freeze_id)? {
            return Ok(there);
        }
        for volume in &volumes {
            if freeze_id.is_some() && volume.settings.is_shared {
                let what = "a freeze on one machine stops none of the others";
                return Err(SettingsError::Shared { name: volume.name.clone(), what }.into());
            }
            refuse_initialising(volume)?;
            self.check_can_copy(volume)?;
            let is_replaced = |operation: &Operation| operation.makes(volume.volume_uid);
            self.refuse_while(&volume.name, is_replaced)?;
        }
        for volume in &volumes {
            self.check_reserve(volume.backend)?;
        }
        let turn = self.operations.try_turn()?;
        let new: Vec<NewSnapshot> =
            volumes.into_iter().map(|volume| NewSnapshot { snapshot_uid: Uuid::new_v4(), volume }).collect();
        let made: Vec<Uuid> = new.iter().map(|new| new.snapshot_uid).collect();
        let begun = self.operations.begin(OperationWanted {
            kind: OperationKind::Snapshot,
            targets: new.iter().map(|new| format!("{}@{name}", new.volume.name)).collect(),
            made: made.clone(),
            read: new.iter().map(|new| new.volume.volume_uid).collect(),
        })?;
        let group_uid = Uuid::new_v4();
        let wanted: Vec<CopyWanted> = new.iter().map(copy_wanted).collect();
        let rows = self.catalog.begin_snapshots(name, group_uid, freeze_id, &new);
        let copy = rows
            .map_err(LifecycleError::from)
            .and_then(|()| self.data_side.begin_copies(&wanted).map_err(LifecycleError::from));
        let copy = match copy {
            Ok(copy) => copy,
            Err(error) => {
                self.discard_snapshots(&made);
                self.operations.forget(begun);
                return Err(error);
            }
        };
        begun.operation().follow(&copy);
        let never_written = self.never_written(&new);
        let (this, uids) = (self.clone(), made.clone());
        let operation = self.go_on(begun, move |operation| {
            let _turn = turn;
            let copied = operation.copies(&copy).map_err(LifecycleError::from);
            let finished = copied.and_then(|()| {
                for snapshot_uid in &never_written {
                    this.catalog.mark_never_written(*snapshot_uid)?;
                }
                this.catalog.finish_snapshots(group_uid)?;
                this.carry_out_joined(operation, &subject(&uids));
                Ok(())
            });
            finished.inspect_err(|_| this.discard_snapshots(&uids))
        });
        Ok(Started { made, operation: Some(operation) })
    }

    /// The wanted snapshots where all are there already, or are being made, of one group.
    fn group_there(
        &self,
        volumes: &[VolumeRecord],
        name: &str,
        freeze_id: Option<Uuid>,
    ) -> Result<Option<Started<Vec<Uuid>>>, LifecycleError> {
        let Found::All(found) = self.found(volumes, name)? else { return Ok(None) };
        let is_other = |(snapshot, _): &&(SnapshotRecord, _)| {
            freeze_id.is_some() && snapshot.freeze_id != freeze_id && !snapshot.is_frozen
        };
        if let Some((other, _)) = found.iter().find(is_other) {
            let why = "and the file system was not frozen then";
            return Err(SnapshotError::Exists { export_name: other.export_name(), why }.into());
        }
        let made: Vec<Uuid> = found.iter().map(|(snapshot, _)| snapshot.snapshot_uid).collect();
        let operation = self.operation_that_makes(&made);
        self.join(operation.as_ref(), &subject(&made))?;
        Ok(Some(Started { made, operation }))
    }

    /// What makes one of these snapshots still.
    pub fn operation_that_makes(&self, made: &[Uuid]) -> Option<Arc<Operation>> {
        self.operations.find(|operation| made.iter().any(|uid| operation.makes(*uid)))
    }

    /// Says of the scope's snapshots of a freeze that it held to the end; and which they are.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; the catalog's failure.
    pub fn mark_frozen(&self, scope: &Scope, freeze_id: Uuid) -> Result<Vec<Uuid>, LifecycleError> {
        let marked = self.catalog.mark_frozen(scope, freeze_id)?;
        if marked.is_empty() {
            return Err(SnapshotError::NotFound(format!("of the freeze {freeze_id}")).into());
        }
        tracing::info!(%freeze_id, snapshots = marked.len(), "snapshots were taken of frozen file systems");
        Ok(marked)
    }

    /// Says of these snapshots that the freeze of their file systems held to the end.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`] where one is not there any more; the catalog's failure.
    pub fn mark_these_frozen(&self, made: &[Uuid]) -> Result<(), LifecycleError> {
        if !self.catalog.mark_these_frozen(made)? {
            return Err(SnapshotError::NotFound("that was to be called frozen".to_owned()).into());
        }
        tracing::info!(snapshots = made.len(), "snapshots were taken of frozen file systems");
        Ok(())
    }

    /// The snapshots whose volumes nobody had written to at the instant. Asked behind it: whoever writes says so first, durably.
    fn never_written(&self, new: &[NewSnapshot]) -> Vec<Uuid> {
        let is_so = |new: &&NewSnapshot| self.is_never_written(&new.volume.name);
        new.iter().filter(is_so).map(|new| new.snapshot_uid).collect()
    }

    /// Whether nobody has written to the volume; not where the catalog does not tell.
    pub(super) fn is_never_written(&self, volume_name: &str) -> bool {
        self.volume(volume_name).is_ok_and(|volume| volume.settings.content == Content::NeverWritten)
    }

    /// Whether the wanted snapshots are there; what is left of some that were not made is removed.
    pub(super) fn found(&self, volumes: &[VolumeRecord], name: &str) -> Result<Found, LifecycleError> {
        let mut found = Vec::new();
        for volume in volumes {
            let there = self.catalog.snapshot_of_volume(volume.volume_uid, name)?;
            let Some((snapshot, state)) = there else { continue };
            let uid = snapshot.snapshot_uid;
            let is_made = self.operations.find(|operation| operation.makes(uid)).is_some();
            if state == SnapshotState::Ready || is_made {
                found.push((snapshot, state));
                continue;
            }
            // One that ended just now has left its last word in the row.
            match self.catalog.snapshot_in_any_state(uid)? {
                Some((snapshot, SnapshotState::Ready)) => found.push((snapshot, SnapshotState::Ready)),
                Some(_) => self.remove_snapshot(uid)?,
                None => {}
            }
        }
        let Some((first, _)) = found.first() else { return Ok(Found::Nothing) };
        let exists = |why| {
            let export_name = first.export_name();
            Err(SnapshotError::Exists { export_name, why }.into())
        };
        if found.len() < volumes.len() {
            return exists("but not of all of the volumes");
        }
        if found.iter().any(|(snapshot, _)| snapshot.group_uid != first.group_uid) {
            return exists("and those of the other volumes are of other instants");
        }
        Ok(Found::All(found))
    }

    /// Whether the volume's storage can be copied.
    pub(super) fn check_can_copy(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        let unsupported = |reason| SnapshotError::Unsupported { name: volume.name.clone(), reason };
        let refused = match volume.backend {
            BackendKind::File => None,
            BackendKind::Lvm if self.data_side.thin_pool().is_some() => return Ok(()),
            BackendKind::Lvm => Some("it is in a thin pool, and this server was started without --lvm"),
            BackendKind::Memory => Some("it is in memory"),
            BackendKind::Device => Some(
                "it is an adopted device or file, which the server cannot copy: take the snapshot below it (LVM, the storage array)",
            ),
        };
        if let Some(reason) = refused {
            return Err(unsupported(reason.to_owned()).into());
        }
        match self.data_side.can_copy() {
            Err(CopyError::Unsupported(reason)) => {
                self.note_unsupported(&reason);
                Err(unsupported(reason).into())
            }
            checked => {
                self.note_unsupported("");
                Ok(checked.map_err(SnapshotError::from)?)
            }
        }
    }

    /// Whether there is as much free as is kept for what is written to volumes that share their bytes.
    pub(super) fn check_reserve(&self, backend: BackendKind) -> Result<(), LifecycleError> {
        if backend == BackendKind::Lvm {
            return self.check_thin_pool();
        }
        // Of a file system that tells nothing, nothing is asked.
        let Some(space) = self.catalog.volumes_space() else { return Ok(()) };
        let (free_bytes, total_bytes) = (space.free_bytes, space.total_bytes);
        let reserve_bytes = reserve_bytes(total_bytes, self.snapshot_reserve);
        if free_bytes < reserve_bytes {
            return Err(SnapshotError::Reserve { free_bytes, total_bytes, reserve_bytes }.into());
        }
        Ok(())
    }

    /// The same of the thin pool, whose metadata may run full as well.
    fn check_thin_pool(&self) -> Result<(), LifecycleError> {
        let Some(fill) = self.data_side.thin_pool() else { return Ok(()) };
        let fill = fill.map_err(SnapshotError::from)?;
        match lvm::too_full(fill, self.snapshot_reserve) {
            None => Ok(()),
            Some(most_percent) => Err(SnapshotError::ThinPool { fill, most_percent }.into()),
        }
    }

    /// The snapshot that is meant, with its state; one that is being deleted is none.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; the catalog's failure.
    pub fn snapshot(&self, named: &SnapshotNamed) -> Result<(SnapshotRecord, SnapshotState), LifecycleError> {
        let found = match named {
            SnapshotNamed::Uid(snapshot_uid) => self.catalog.snapshot_in_any_state(*snapshot_uid)?,
            SnapshotNamed::Name { volume_name, name } => match self.asked_volume(volume_name)? {
                Some((volume, VolumeState::Ready)) => {
                    self.catalog.snapshot_of_volume(volume.volume_uid, name)?
                }
                _ => None,
            },
        };
        let found = found.filter(|(_, state)| *state != SnapshotState::Deleting);
        Ok(found.ok_or_else(|| SnapshotError::NotFound(named.to_string()))?)
    }

    /// The snapshot that is meant, if it is ready.
    pub(super) fn ready_snapshot(&self, snapshot_uid: Uuid) -> Result<SnapshotRecord, LifecycleError> {
        match self.snapshot(&SnapshotNamed::Uid(snapshot_uid))? {
            (snapshot, SnapshotState::Ready) => Ok(snapshot),
            (snapshot, _) => {
                self.refuse_while(&snapshot.export_name(), |operation| operation.makes(snapshot_uid))?;
                // Its operation may have ended just now; else it is what is left of one that could not be made.
                match self.catalog.snapshot_in_any_state(snapshot_uid)? {
                    Some((snapshot, SnapshotState::Ready)) => Ok(snapshot),
                    _ => Err(SnapshotError::NotFound(snapshot.export_name()).into()),
                }
            }
        }
    }

    /// Refuses to delete a snapshot that is being made together with what is outside of the scope: its group would be cancelled.
    ///
    /// # Errors
    /// [`SnapshotError::InProgress`]; the catalog's failure.
    pub fn refuse_to_cancel(&self, scope: &Scope, snapshot_uid: Uuid) -> Result<(), LifecycleError> {
        let is_anothers =
            |operation: &Operation| operation.makes(snapshot_uid) && !operation.is_within(scope);
        if self.operations.find(is_anothers).is_none() {
            return Ok(());
        }
        let found = self.catalog.snapshot_in_any_state(snapshot_uid)?;
        let name = found.map_or_else(String::new, |(snapshot, _)| snapshot.export_name());
        self.refuse_while(&name, is_anothers)
    }

    /// Deletes the snapshot whose lock ([`snapshot_lock_name`]) is held; one that is being made is cancelled, with all of its
    /// group. False where there is none.
    ///
    /// # Errors
    /// [`SnapshotError::InProgress`], [`SnapshotError::Attached`], [`SnapshotError::Open`], [`LifecycleError::Unfenced`] (the I/O of an
    /// attachment that was ended has not finished); the catalog's or the storage's failure.
    pub fn delete_snapshot(&self, lock: &NameLock, snapshot_uid: Uuid) -> Result<bool, LifecycleError> {
        assert_eq!(lock.name(), snapshot_lock_name(snapshot_uid), "the lock is of the snapshot");
        let making = self.operations.find(|operation| operation.makes(snapshot_uid));
        let was_cancelled = making.is_some_and(|making| {
            making.cancel();
            making.blocking_wait(CANCEL_LIMIT);
            true
        });
        let Some((snapshot, state)) = self.catalog.snapshot_in_any_state(snapshot_uid)? else {
            if was_cancelled {
                self.catalog.note_carried_out(&snapshot_uid.to_string())?;
            }
            return Ok(was_cancelled);
        };
        let export_name = snapshot.export_name();
        self.refuse_while(&export_name, |operation| {
            operation.makes(snapshot_uid) || operation.reads(snapshot_uid)
        })?;
        if state == SnapshotState::Ready {
            self.refuse_attached_snapshot(&snapshot)?;
            // As for volumes: hidden first, then asked whether it is open.
            let concealed = self.catalog.conceal_volume(snapshot_uid);
            self.data_side
                .release_volume(snapshot_uid)
                .map_err(|still_open| SnapshotError::Open { export_name: export_name.clone(), still_open })?;
            self.catalog.begin_deleting_snapshot(snapshot_uid)?;
            drop(concealed);
        }
        self.remove_snapshot(snapshot_uid)?;
        tracing::info!(name = %export_name, %snapshot_uid, "snapshot deleted");
        // One that was never made never existed; one that was being deleted did, for the caller who repeats.
        Ok(was_cancelled || state != SnapshotState::Creating)
    }

    /// Finishes what a former call began, and refuses where the snapshot is attached then.
    pub(super) fn refuse_attached_snapshot(&self, snapshot: &SnapshotRecord) -> Result<(), LifecycleError> {
        self.finish_ending(&snapshot.as_volume())?;
        let held = self.catalog.attachments_of_volume(snapshot.snapshot_uid)?;
        if held.is_empty() {
            return Ok(());
        }
        let (export_name, node_ids) = (snapshot.export_name(), nodes_of(&held));
        Err(SnapshotError::Attached { export_name, node_ids }.into())
    }

    /// Row deleting, storage gone, row gone.
    pub(super) fn remove_snapshot(&self, snapshot_uid: Uuid) -> Result<(), LifecycleError> {
        // What is made and comes to nothing is removed here, too: that is not what its call is for.
        match self.catalog.beside().begin_deleting_snapshot(snapshot_uid) {
            // Somebody else has removed it.
            Err(CatalogError::SnapshotNotFound(_)) => return Ok(()),
            begun => begun?,
        }
        let deleted = self.data_side.delete_copy(CopyTarget::Snapshot(snapshot_uid));
        deleted.map_err(|source| LifecycleError::Storage {
            action: "remove",
            volume_uid: snapshot_uid,
            source,
        })?;
        Ok(self.catalog.forget_snapshot(snapshot_uid)?)
    }

    /// Finishes the deletion of a snapshot that a former call began; one that is not being deleted is left alone.
    ///
    /// # Errors
    /// The catalog's or the storage's failure.
    pub fn finish_deleting_snapshot(&self, snapshot_uid: Uuid) -> Result<(), LifecycleError> {
        match self.catalog.snapshot_in_any_state(snapshot_uid)? {
            Some((_, SnapshotState::Deleting)) => self.remove_snapshot(snapshot_uid),
            _ => Ok(()),
        }
    }

    /// Of snapshots that could not be made.
    fn discard_snapshots(&self, snapshot_uids: &[Uuid]) {
        for snapshot_uid in snapshot_uids {
            if let Err(error) = self.remove_snapshot(*snapshot_uid) {
                tracing::warn!(%snapshot_uid, %error, "what is left of a failed snapshot is not removed yet");
            }
        }
    }
}

/// Under which name a snapshot is locked: no volume has such a name.
pub fn snapshot_lock_name(snapshot_uid: Uuid) -> String {
    format!("@{snapshot_uid}")
}

/// Refuses to copy a volume that is being formatted: half a file system is nobody's.
pub(super) fn refuse_initialising(volume: &VolumeRecord) -> Result<(), SnapshotError> {
    match volume.settings.content {
        Content::Initialising { attachment_id } => {
            Err(SnapshotError::Initialising { name: volume.name.clone(), attachment_id })
        }
        Content::NeverWritten | Content::Written => Ok(()),
    }
}

/// Snapshots as the subject of a call that made them.
fn subject(made: &[Uuid]) -> String {
    made.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" ")
}

/// The same read; what is none is none.
fn uids(subject: &str) -> Vec<Uuid> {
    subject.split(' ').filter_map(|uid| uid.parse().ok()).collect()
}

fn copy_wanted(new: &NewSnapshot) -> CopyWanted {
    CopyWanted {
        source: CopySource::Volume(new.volume.clone()),
        target: CopyTarget::Snapshot(new.snapshot_uid),
        capacity_bytes: new.volume.capacity_bytes,
    }
}
