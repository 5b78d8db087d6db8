//! NodePublishVolume: the staged volume, or its device, is shown at one more path.
//!
//! Owns: looking, and the bind. Never: decides; `plan` does. Called by: `service`.

use std::sync::Arc;

use proto::v1::NodeAttachment;
use rustix::mount::MountAttrFlags;
use tonic::Status;

use super::daemon::{disk_of, fails_by_us};
use super::device::{HeldDevice, Identity, is_mounted_elsewhere, place_of, shown};
use super::inner::{Inner, blocking, look, mark_of};
use super::plan::{self, Disk, Place, PublishStep, PublishView, Refusal, Shown, Use};
use super::request::{Usage, VolumeId};
use super::status;
use crate::csi::mounts::bind;
use crate::csi::targets::{Target, TargetKind};

/// One publish, as it was asked for.
#[derive(Debug, Clone)]
pub struct Publish {
    /// Which volume.
    pub volume: VolumeId,
    /// Where it is staged.
    pub staging: String,
    /// Where it is to be shown.
    pub target: String,
    /// Whether nothing may be written there.
    pub is_read_only: bool,
    /// How it is used.
    pub usage: Usage,
}

impl Inner {
    /// Shows a volume at a path.
    ///
    /// # Errors
    /// By cause; the repeat goes on where this ended.
    pub async fn publish(&self, asked: &Publish) -> Result<(), Status> {
        self.settled(asked.volume).await?;
        let attachment = self.daemon.attachment(asked.volume).await?;
        let disk = disk_of(attachment.as_ref());
        let not_staged = || status::of_refusal(&Refusal::NotStaged);
        let is_there = !matches!(disk, Disk::Locked | Disk::Leaving);
        // A stage that was refused may have left the disk of an encrypted volume in the clear.
        let is_right = |attachment: &NodeAttachment| attachment.is_encrypted || !asked.usage.is_encrypted;
        let Some(attachment) = attachment.filter(|attachment| is_there && is_right(attachment)) else {
            return Err(not_staged());
        };
        let identity = Identity::of(&attachment).map_err(|error| status::of_device(&error))?;
        let is_block = asked.usage.used_as() == Use::Block;
        let staging = match self.kubelet.target(&asked.staging) {
            Ok(target) => Some(Arc::new(target)),
            // A block volume has nothing there.
            Err(_) if is_block => None,
            Err(error) if error.is_not_there() => return Err(not_staged()),
            Err(error) => return Err(status::of_target(&error)),
        };
        let target = Arc::new(self.target_to_mount(&asked.target)?);
        let (seen, seen_staging, seen_target) = (identity.clone(), staging.clone(), Arc::clone(&target));
        let is_disk_read_only = attachment.read_only;
        let asked_read_only = asked.is_read_only || asked.usage.attach_as.read_only;
        let is_single = asked.usage.is_single;
        let looking = move || see(&seen, seen_staging.as_deref(), &seen_target);
        let seen = blocking(move || looking().map_err(|error| status::of_mount(&error))).await?;
        let is_staged_read_only = seen.staged == Place::Volume { read_only: true };
        let mut view = PublishView {
            is_block,
            disk,
            is_disk_read_only,
            staged: seen.staged,
            target: seen.target,
            is_read_only: asked_read_only || is_disk_read_only || (is_staged_read_only && !is_block),
            is_single,
            has_other_targets: seen.has_other_targets,
            shown: seen.shown,
            fails_by_us: fails_by_us(&attachment),
        };
        let mut step = plan::publish(&view);
        if step == PublishStep::WaitOnStall {
            self.daemon.wait_on_stall(&attachment.attachment_id).await?;
            view.fails_by_us = false;
            step = plan::publish(&view);
        }
        match step {
            PublishStep::Done => Ok(()),
            PublishStep::WaitOnStall => Err(Status::internal("the stall policy is asked for twice")),
            PublishStep::Refuse(why) => Err(status::of_refusal(&why)),
            PublishStep::Bind => self.show(asked, &view, &attachment, staging, target).await,
        }
    }

    async fn show(
        &self,
        asked: &Publish,
        view: &PublishView,
        attachment: &NodeAttachment,
        staging: Option<Arc<Target>>,
        target: Arc<Target>,
    ) -> Result<(), Status> {
        let kind = if view.is_block { TargetKind::File } else { TargetKind::Directory };
        target.create(kind).map_err(|error| status::of_target(&error))?;
        let mut attributes = asked.usage.options.as_ref().map_or(MountAttrFlags::empty(), |o| o.attributes);
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, view.is_read_only);
        // With all that matters: a repeat that asks for something else is another job.
        let (path, attachment_id) = (target.path(), &attachment.attachment_id);
        let options = mark_of(&attributes.bits());
        let what = format!("the bind at {path:?} with the options {options} for attachment {attachment_id}");
        let at = Arc::clone(&target);
        let identity = if view.is_block {
            // Held, so that the device that is shown is the one that was looked at.
            let device: Arc<HeldDevice> = self.hold(asked.volume, attachment).await?;
            let identity = device.identity.clone();
            self.run_call(asked.volume, &what, move || Ok(bind(&*device, attributes, &at)?)).await?;
            identity
        } else {
            let Some(staging) = staging else { return Err(status::of_refusal(&Refusal::NotStaged)) };
            let identity = Identity::of(attachment).map_err(|error| status::of_device(&error))?;
            let expected = identity.clone();
            let call = move || {
                let source = staging.open().map_err(std::io::Error::other)?;
                let is_volume = matches!(place_of(&staging, &expected)?, Place::Volume { .. });
                if !is_volume {
                    return Err(std::io::Error::other(Refusal::NotStaged));
                }
                Ok(bind(&source, attributes, &at)?)
            };
            self.run_call(asked.volume, &what, call).await?;
            identity
        };
        match look(&target, move |target| place_of(target, &identity)).await? {
            Place::Volume { .. } => Ok(()),
            Place::Free => Err(Status::aborted("somebody has unmounted the target path in this moment")),
            Place::Other(other) => Err(status::of_refusal(&Refusal::Occupied(other))),
        }
    }
}

/// What there is of the volume on this node.
struct Seen {
    staged: Place,
    target: Place,
    has_other_targets: bool,
    shown: Shown,
}

fn see(
    disk: &Identity,
    staging: Option<&Target>,
    target: &Target,
) -> Result<Seen, crate::csi::mounts::MountError> {
    let mut known = vec![target];
    known.extend(staging);
    Ok(Seen {
        staged: staging.map_or(Ok(Place::Free), |staging| place_of(staging, disk))?,
        target: place_of(target, disk)?,
        has_other_targets: is_mounted_elsewhere(disk, &known)?,
        shown: shown(disk)?,
    })
}
