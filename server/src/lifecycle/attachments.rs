//! Attaching and detaching: a holder ends before another begins.
//!
//! See the module's text for the order and its reason. A row `ending` whose I/O did not finish in time stays, and is taken
//! up again by the next call on the volume: no second attachment, and no deletion, gets past it. Called by `management/`
//! with the volume's name locked. Never hands out a secret but in [`Attached`].

use uuid::Uuid;

use super::claims::{self, Claim};
use super::{DataSide, Lifecycle, LifecycleError, NameLock, SyncError};
use crate::catalog::{AttachmentRecord, AttachmentState, NewAttachment, VolumeRecord, VolumeState};

/// An attachment as it is answered.
#[derive(Debug)]
pub struct Attached {
    /// The attachment, with its secret.
    pub attachment: AttachmentRecord,
    /// Its volume.
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
    /// [`LifecycleError::AttachedDifferently`] (this node, another mode); [`LifecycleError::Unfenced`]: repeat the call;
    /// [`LifecycleError::Storage`]: what was written before may be lost; the catalog's failure.
    pub fn attach_volume(&self, lock: &NameLock, wanted: &AttachWanted) -> Result<Attached, LifecycleError> {
        let volume = self.volume(lock.name())?;
        self.finish_ending(&volume)?;
        if let Some((held, _)) = self.catalog.attachment_of_volume(volume.volume_uid)? {
            match self.claim(&volume, &held, wanted)? {
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
        let AttachWanted { node_id, boot_id, read_only, .. } = wanted.clone();
        let new = NewAttachment { volume_uid: volume.volume_uid, node_id, read_only, boot_id };
        let attachment = self.catalog.add_attachment(&new)?;
        // With the row there, no new writer by name gets in; those that are in end before anybody is told the secret.
        if let Err(error) = self.settle(&volume) {
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
                tracing::info!(%name, node_id, former = %held.boot_id, "another boot of the node holds the volume, and has gone");
                Ok(claim)
            }
            Claim::Wait(_) | Claim::Refuse | Claim::Show if wanted.force => Ok(Claim::Take),
            Claim::Wait(after) => Err(LifecycleError::OtherBootMayReturn { name, node_id, after }),
            Claim::Refuse => Err(LifecycleError::OtherBoot { name, node_id }),
            _ if held.read_only == wanted.read_only => Ok(claim),
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
    /// [`LifecycleError::Unfenced`]: its I/O has not finished in time, repeat the call; the catalog's failure.
    pub fn detach_volume(&self, lock: &NameLock, wanted: &DetachWanted) -> Result<bool, LifecycleError> {
        let Some((volume, VolumeState::Ready)) = self.catalog.volume_in_any_state(lock.name())? else {
            return Ok(false);
        };
        let held = self.catalog.attachment_of_volume(volume.volume_uid)?;
        let Some((held, _)) = held.filter(|(held, _)| wanted.matches(held)) else {
            return Ok(false);
        };
        self.end(&volume, &held, false)?;
        Ok(true)
    }

    /// Finishes what a former call on the volume began and could not end in time.
    pub(super) fn finish_ending(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        match self.catalog.attachment_of_volume(volume.volume_uid)? {
            Some((held, AttachmentState::Ending)) => self.end(volume, &held, false),
            _ => Ok(()),
        }
    }

    /// Refused from now on, then fenced, then gone.
    fn end(
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

    /// The name of the volume that an attachment is of, to lock it; `None` where there is no such attachment.
    ///
    /// # Errors
    /// The catalog's failure.
    pub fn volume_name_of(&self, attachment_id: Uuid) -> Result<Option<String>, LifecycleError> {
        let Some((attachment, _)) = self.catalog.attachment_in_any_state(attachment_id)? else {
            return Ok(None);
        };
        Ok(self.catalog.volume_by_uid(attachment.volume_uid)?.map(|volume| volume.name))
    }
}
