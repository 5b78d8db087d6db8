//! Attaching and detaching: a holder ends before another begins.
//!
//! See the module's text for the order and its reason. A row `ending` whose I/O did not finish in time stays, and is taken
//! up again by the next call on the volume: no second attachment, and no deletion, gets past it. Called by `management/`
//! with the volume's name locked. Never hands out a secret but in [`Attached`].
//!
//! A snapshot is attached in the same way, with epochs and a secret, so that a detach and a reboot mean the same for every disk. But
//! nobody writes to it: nothing has to be durable first, and no other node is ever in the way.

use uuid::Uuid;

use super::claims::{self, Claim};
use super::volumes::nodes_of;
use super::{
    DataSide, GrantsError, Lifecycle, LifecycleError, NameLock, SettingsError, SnapshotError, SyncError,
    snapshot_lock_name,
};
use crate::catalog::{
    AttachmentRecord, AttachmentState, CatalogError, NewAttachment, SnapshotState, VolumeRecord, VolumeState,
};

/// An attachment as it is answered.
#[derive(Debug)]
pub struct Attached {
    /// The attachment, with its secret.
    pub attachment: AttachmentRecord,
    /// Its volume; or its snapshot, as a volume.
    pub volume: VolumeRecord,
    /// The node held it before this call.
    pub existed: bool,
    /// A boot of the node has it, and the caller has not said that it is that one: its secret is not for the caller.
    pub hides_secret: bool,
}

/// Who wants a volume, and how.
#[derive(Debug, Clone, Default)]
pub struct AttachWanted {
    /// The node that is to have it.
    pub node_id: String,
    /// Which boot of it; empty where that is not told.
    pub boot_id: String,
    /// Writes are refused.
    pub read_only: bool,
    /// Whatever holds it now is fenced first.
    pub force: bool,
    /// Others may read it as well; or write to it, without `read_only`.
    pub is_shared: bool,
    /// A node that has not registered gets nothing.
    pub node_must_be_registered: bool,
    /// Neither does one that the volume is not granted to, whoever asks; what it holds already is not told either.
    pub only_if_granted: bool,
}

impl AttachWanted {
    /// Whether both can have the volume at once.
    fn shares_with(&self, held: &AttachmentRecord) -> bool {
        let both_share = self.is_shared && held.is_shared && self.read_only == held.read_only;
        both_share && self.node_id != held.node_id
    }
}

/// What an attachment is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachedTo {
    /// The volume of this name.
    Volume(String),
    /// The snapshot of this identity.
    Snapshot(Uuid),
}

/// What is attached, and whether that is a snapshot.
#[derive(Debug)]
struct Attachable {
    record: VolumeRecord,
    is_snapshot: bool,
}

/// Which attachment of the locked volume to end; every field that is given must agree.
#[derive(Debug, Clone, Default)]
pub struct DetachWanted {
    /// The attachment itself.
    pub attachment_id: Option<Uuid>,
    /// The node that holds it.
    pub node_id: Option<String>,
}

impl DetachWanted {
    fn matches(&self, attachment: &AttachmentRecord) -> bool {
        self.attachment_id.is_none_or(|id| id == attachment.attachment_id)
            && self.node_id.as_ref().is_none_or(|node_id| *node_id == attachment.node_id)
    }
}

impl<D: DataSide> Lifecycle<D> {
    /// Gives the volume to the node, or returns what the node holds already.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; without force [`LifecycleError::VolumeAttached`] (another node),
    /// [`LifecycleError::OtherBoot`] and [`LifecycleError::OtherBootMayReturn`] (another boot of this node, see `claims.rs`) and
    /// [`LifecycleError::AttachedDifferently`] (this node, another mode); [`SettingsError::ReadOnly`],
    /// [`SettingsError::NotShared`]; [`GrantsError::NotGranted`], [`GrantsError::GrantedToRead`] where a grant is asked for;
    /// [`SnapshotError::InProgress`]: it is being restored; [`NodesError::NotFound`]: the node has to be registered;
    /// [`LifecycleError::Unfenced`]: repeat the call;
    /// [`LifecycleError::Storage`]: what was written before may be lost; the catalog's failure.
    ///
    /// [`SnapshotError::InProgress`]: super::SnapshotError::InProgress
    /// [`NodesError::NotFound`]: super::NodesError::NotFound
    pub fn attach_volume(&self, lock: &NameLock, wanted: &AttachWanted) -> Result<Attached, LifecycleError> {
        let volume = self.volume(lock.name())?;
        if wanted.only_if_granted {
            self.require_granted(&volume, &wanted.node_id, wanted.read_only)?;
        }
        if volume.settings.is_read_only && !wanted.read_only {
            return Err(SettingsError::ReadOnly(volume.name).into());
        }
        if wanted.is_shared && !wanted.read_only && !volume.settings.is_shared {
            return Err(SettingsError::NotShared(volume.name).into());
        }
        // It is hidden from the data side, and about to have other bytes.
        self.refuse_while(lock.name(), |operation| operation.makes(volume.volume_uid))?;
        self.attach(Attachable { record: volume, is_snapshot: false }, wanted)
    }

    /// Gives the snapshot to the node, read-only and beside others, or returns what the node holds already. The snapshot's lock
    /// ([`snapshot_lock_name`]) is held.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::InProgress`] (it is being made), [`SnapshotError::NeverChanges`] (to write is
    /// wanted), [`GrantsError::NotGranted`] (nobody is granted a snapshot); as of
    /// [`Self::attach_volume`] where another boot of this node has it, or its I/O has not finished.
    pub fn attach_snapshot(
        &self,
        lock: &NameLock,
        snapshot_uid: Uuid,
        wanted: &AttachWanted,
    ) -> Result<Attached, LifecycleError> {
        assert_eq!(lock.name(), snapshot_lock_name(snapshot_uid), "the lock is of the snapshot");
        let snapshot = self.ready_snapshot(snapshot_uid)?;
        if wanted.only_if_granted {
            let (name, node_id) = (snapshot.export_name(), wanted.node_id.clone());
            return Err(GrantsError::NotGranted { name, node_id }.into());
        }
        if !wanted.read_only {
            return Err(SnapshotError::NeverChanges(snapshot.export_name()).into());
        }
        // Also who wants to be alone: nobody can do anything that the others would notice.
        let wanted = AttachWanted { is_shared: true, ..wanted.clone() };
        self.attach(Attachable { record: snapshot.as_volume(), is_snapshot: true }, &wanted)
    }

    fn attach(&self, attachable: Attachable, wanted: &AttachWanted) -> Result<Attached, LifecycleError> {
        let Attachable { record: volume, is_snapshot } = attachable;
        // Before anybody is ended. What the node holds already keeps it from being forgotten.
        self.require_registered(&wanted.node_id, wanted.node_must_be_registered)?;
        let settle = || if is_snapshot { Ok(()) } else { self.settle(&volume) };
        self.finish_ending(&volume)?;
        let held = self.catalog.attachments_of_volume(volume.volume_uid)?;
        let in_the_way = held.into_iter().map(|(held, _)| held).filter(|held| !wanted.shares_with(held));
        // Nobody is ended before it is known that nobody refuses.
        let claims = in_the_way.map(|held| Ok((self.claim(&volume, &held, wanted)?, held)));
        for (claim, held) in claims.collect::<Result<Vec<_>, LifecycleError>>()? {
            // Nobody has opened it yet: whoever was to be answered first may not have been, because the server was killed before that.
            if claim != Claim::Take && held.session_epoch == 0 {
                settle()?;
            }
            match claim {
                Claim::Take => self.end(&volume, &held, true)?,
                Claim::Bind => {
                    self.catalog.bind_attachment(held.attachment_id, &wanted.boot_id)?;
                    self.data_side.holder_seen(held.attachment_id);
                    let attachment = AttachmentRecord { boot_id: wanted.boot_id.clone(), ..held };
                    return Ok(Attached { attachment, volume, existed: true, hides_secret: false });
                }
                claim => {
                    let hides_secret = claim == Claim::Show;
                    if !hides_secret {
                        self.data_side.holder_seen(held.attachment_id);
                    }
                    return Ok(Attached { attachment: held, volume, existed: true, hides_secret });
                }
            }
        }
        let AttachWanted { node_id, boot_id, read_only, is_shared, only_if_granted, .. } = wanted.clone();
        let volume_uid = volume.volume_uid;
        let new = NewAttachment { volume_uid, node_id, read_only, boot_id, is_shared, only_if_granted };
        let add = || match is_snapshot {
            true => self.catalog.add_snapshot_attachment(&new),
            false => self.catalog.add_attachment(&new),
        };
        let added = self.while_registered(&new.node_id, wanted.node_must_be_registered, add);
        let attachment = added.map_err(|error| match error {
            LifecycleError::Catalog(CatalogError::NotGranted(_)) => {
                let (name, node_id) = (volume.name.clone(), new.node_id.clone());
                GrantsError::NotGranted { name, node_id }.into()
            }
            error => error,
        })?;
        // With the row there, no new writer by name gets in; those that are in end before anybody is told the secret.
        if let Err(error) = settle() {
            self.catalog.end_attachment(attachment.attachment_id, false)?;
            return Err(error);
        }
        let attachment_id = attachment.attachment_id;
        self.data_side.holder_seen(attachment_id);
        tracing::info!(name = %volume.name, %attachment_id, node_id = %attachment.node_id, generation = attachment.generation, "volume attached");
        Ok(Attached { attachment, volume, existed: false, hides_secret: false })
    }

    /// What becomes of the attachment that there is: kept, bound, told of, or ended; or why the caller does not get it.
    fn claim(
        &self,
        volume: &VolumeRecord,
        held: &AttachmentRecord,
        wanted: &AttachWanted,
    ) -> Result<Claim, LifecycleError> {
        let (name, node_id) = (volume.name.clone(), held.node_id.clone());
        if held.node_id != wanted.node_id {
            return if wanted.force {
                Ok(Claim::Take)
            } else {
                Err(LifecycleError::VolumeAttached { name, node_id })
            };
        }
        let claim = claims::claim(&held.boot_id, &wanted.boot_id, self.data_side.holder(held.attachment_id));
        match claim {
            Claim::Take => {
                tracing::info!(%name, node_id, former = %held.boot_id, "an earlier boot of the node held the volume, and is gone");
                Ok(claim)
            }
            Claim::Wait(_) | Claim::Refuse | Claim::Show if wanted.force => Ok(Claim::Take),
            Claim::Wait(after) => Err(LifecycleError::OtherBootMayReturn { name, node_id, after }),
            Claim::Refuse => Err(LifecycleError::OtherBoot { name, node_id }),
            _ if (held.read_only, held.is_shared) == (wanted.read_only, wanted.is_shared) => Ok(claim),
            _ if wanted.force => Ok(Claim::Take),
            _ => Err(LifecycleError::AttachedDifferently { name, node_id }),
        }
    }

    /// Nobody writes to the volume any more, and what was written is durable: what its next holder reads, a power cut cannot
    /// take back.
    fn settle(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        let unfenced = |reason| LifecycleError::Unfenced { name: volume.name.clone(), reason };
        self.data_side.fence_named_writers(volume.volume_uid).map_err(unfenced)?;
        let volume_uid = volume.volume_uid;
        let unsynced = |error| match error {
            SyncError::Unfinished(reason) => unfenced(reason),
            SyncError::Failed(source) => LifecycleError::Storage { action: "sync", volume_uid, source },
        };
        self.data_side.sync_storage(volume).map_err(unsynced)
    }

    /// Ends the attachment of the volume that is wanted; false where there is none such.
    ///
    /// # Errors
    /// [`LifecycleError::Unfenced`]: its I/O has not finished in time, repeat the call; [`LifecycleError::SeveralHolders`]; the
    /// catalog's failure.
    pub fn detach_volume(&self, lock: &NameLock, wanted: &DetachWanted) -> Result<bool, LifecycleError> {
        let Some((volume, VolumeState::Ready)) = self.catalog.volume_in_any_state(lock.name())? else {
            return Ok(false);
        };
        self.detach(&volume, wanted)
    }

    /// Ends the attachment of the snapshot that is wanted, whose lock is held; false where there is none such.
    ///
    /// # Errors
    /// As of [`Self::detach_volume`].
    pub fn detach_snapshot(
        &self,
        lock: &NameLock,
        snapshot_uid: Uuid,
        wanted: &DetachWanted,
    ) -> Result<bool, LifecycleError> {
        assert_eq!(lock.name(), snapshot_lock_name(snapshot_uid), "the lock is of the snapshot");
        match self.catalog.snapshot_in_any_state(snapshot_uid)? {
            Some((snapshot, SnapshotState::Ready)) => self.detach(&snapshot.as_volume(), wanted),
            _ => Ok(false),
        }
    }

    fn detach(&self, volume: &VolumeRecord, wanted: &DetachWanted) -> Result<bool, LifecycleError> {
        let mut held = self.catalog.attachments_of_volume(volume.volume_uid)?;
        held.retain(|(held, _)| wanted.matches(held));
        match held.as_slice() {
            [] => Ok(false),
            [(held, _)] => {
                self.end(volume, held, false)?;
                Ok(true)
            }
            several => {
                let node_ids = nodes_of(several);
                Err(LifecycleError::SeveralHolders { name: volume.name.clone(), node_ids })
            }
        }
    }

    /// Finishes what a former call on the volume began and could not end in time.
    pub(super) fn finish_ending(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        for (held, state) in self.catalog.attachments_of_volume(volume.volume_uid)? {
            if state == AttachmentState::Ending {
                self.end(volume, &held, false)?;
            }
        }
        Ok(())
    }

    /// Refused from now on, then fenced, then gone.
    pub(super) fn end(
        &self,
        volume: &VolumeRecord,
        held: &AttachmentRecord,
        by_force: bool,
    ) -> Result<(), LifecycleError> {
        let attachment_id = held.attachment_id;
        self.catalog.end_attachment(attachment_id, by_force)?;
        self.data_side
            .fence_attachment(attachment_id)
            .map_err(|reason| LifecycleError::Unfenced { name: volume.name.clone(), reason })?;
        self.catalog.remove_attachment(attachment_id)?;
        tracing::info!(name = %volume.name, %attachment_id, node_id = %held.node_id, by_force, "attachment ended");
        Ok(())
    }

    /// The node that holds an attachment; `None` where there is no such attachment.
    ///
    /// # Errors
    /// The catalog's failure.
    pub fn node_id_of(&self, attachment_id: Uuid) -> Result<Option<String>, LifecycleError> {
        let found = self.catalog.attachment_in_any_state(attachment_id)?;
        Ok(found.map(|(attachment, _)| attachment.node_id))
    }

    /// What an attachment is of, to lock it; `None` where there is no such attachment.
    ///
    /// # Errors
    /// The catalog's failure.
    pub fn attached_to(&self, attachment_id: Uuid) -> Result<Option<AttachedTo>, LifecycleError> {
        let Some((attachment, _)) = self.catalog.attachment_in_any_state(attachment_id)? else {
            return Ok(None);
        };
        let uid = attachment.volume_uid;
        if let Some(volume) = self.catalog.volume_by_uid(uid)? {
            return Ok(Some(AttachedTo::Volume(volume.name)));
        }
        let snapshot = self.catalog.snapshot_in_any_state(uid)?;
        Ok(snapshot.map(|(snapshot, _)| AttachedTo::Snapshot(snapshot.snapshot_uid)))
    }
}
