//! NodeUnpublishVolume and NodeUnstageVolume: what was mounted is unmounted, and the disk goes.
//!
//! Owns: carrying out one step after the other, as `plan` says. Never: believes an unmount before `mountinfo` does, takes a disk away that
//! is mounted and serves, or removes what is in something. Called by: `service`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::Status;

use super::daemon::{disk_of, is_failing, is_permanent};
use super::device::{Identity, is_mounted_elsewhere, place_to_free};
use super::inner::{Attached, Inner, blocking, look};
use super::plan::{self, Disk, Place, Refusal, UnstageStep, UnstageView};
use super::request::{AttachAs, VolumeId};
use super::status;
use crate::csi::mounts::{mounts_at, unmount_all};
use crate::csi::targets::{Target, TargetError};

/// More steps than any way to the end has.
const STEPS_MAX: usize = 12;

impl Inner {
    /// Takes the volume away from a path that it was shown at, and the path as well.
    ///
    /// # Errors
    /// By cause; the repeat goes on where this ended.
    pub async fn unpublish(&self, volume: VolumeId, path: &str) -> Result<(), Status> {
        let target = self.target_to_free(path)?;
        self.free_jobs(volume, target.as_ref()).await?;
        self.settled(volume).await?;
        let Some(target) = target else { return Ok(()) };
        // Without the daemon nobody knows whose a mount is; but where there is none, that is no matter.
        if look(&target, |target| Ok(!mounts_at(target)?.is_empty())).await? {
            let attached = self.attached(volume).await?;
            match see(&target, &attached).await? {
                Place::Other(what) => return Err(status::of_refusal(&Refusal::Occupied(what))),
                Place::Volume { .. } => {
                    self.fail_if_last(&target, &attached).await?;
                    self.unmount(volume, &target).await?;
                }
                Place::Free => {}
            }
        }
        target.remove().map_err(|error| status::of_target(&error))
    }

    /// For an id that no volume has: nothing of it can be mounted, but its path may be there.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: something is mounted there, or in it.
    pub async fn remove_target(&self, path: &str) -> Result<(), Status> {
        let Some(target) = self.target_to_free(path)? else { return Ok(()) };
        match look(&target, |target| place_to_free(target, None, &[])).await? {
            Place::Free => target.remove().map_err(|error| status::of_target(&error)),
            Place::Volume { .. } => {
                Err(status::of_refusal(&Refusal::Occupied("a file system of another volume".to_owned())))
            }
            Place::Other(what) => Err(status::of_refusal(&Refusal::Occupied(what))),
        }
    }

    /// Unmounts the staging path and detaches the disk.
    ///
    /// # Errors
    /// By cause; the repeat goes on where this ended.
    pub async fn unstage(&self, volume: VolumeId, path: &str) -> Result<(), Status> {
        let target = self.target_to_free(path)?;
        self.free_jobs(volume, target.as_ref()).await?;
        self.settled(volume).await?;
        let mut is_given_up = false;
        for _ in 0..STEPS_MAX {
            let attached = self.attached(volume).await?;
            let place = match &target {
                Some(target) => see(target, &attached).await?,
                None => Place::Free,
            };
            let own = attached.own.as_ref();
            let identity = attached.identity();
            let view = UnstageView {
                disk: disk_of(own),
                place,
                fails_on_stall: fails_on_stall(&attached),
                is_given_up,
                has_device: identity.is_some(),
                is_elsewhere: is_elsewhere(identity, target.as_ref()).await?,
            };
            let step = plan::unstage(&view);
            tracing::debug!(%volume, ?step, "unstages");
            let attachment_id = own.map(|own| own.attachment_id.clone()).unwrap_or_default();
            match step {
                UnstageStep::Done if attached.is_anothers => return Ok(()),
                UnstageStep::Done => return self.released(volume).await,
                UnstageStep::Refuse(why) => return Err(status::of_refusal(&why)),
                UnstageStep::FailOnStall => self.daemon.fail_on_stall(&attachment_id).await?,
                UnstageStep::Recover => {
                    let read_only = own.is_some_and(|own| own.read_only);
                    // Nothing is said of a file system that is not made yet. An encrypted disk that is open needs no passphrase.
                    let how = AttachAs { read_only, shared: false, makes_file_system: true };
                    match self.daemon.attach(volume, how, None).await {
                        Ok(_) => {}
                        Err(why) if is_permanent(&why) => {
                            tracing::warn!(%volume, why = why.message(), "a dead disk cannot be taken on; what was not written to it is lost");
                            is_given_up = true;
                        }
                        // The server or the daemon is away for a while, say: the disk still holds what was written to it.
                        Err(why) => return Err(why),
                    }
                }
                UnstageStep::Unmount => {
                    let Some(target) = &target else { return Err(Status::internal("nothing is mounted")) };
                    self.unmount(volume, target).await?;
                }
                UnstageStep::Detach { by_force } => self.daemon.detach(&attachment_id, by_force).await?,
            }
        }
        Err(Status::aborted("the volume's disk comes and goes; see volctl attachments, and repeat the call"))
    }

    /// What an attach that was cut short left at the server.
    async fn released(&self, volume: VolumeId) -> Result<(), Status> {
        self.daemon.detach(&volume.as_name(), false).await
    }

    /// The path; `None`: the directory that should hold it is not there, and so nothing is mounted in it.
    fn target_to_free(&self, path: &str) -> Result<Option<Arc<Target>>, Status> {
        match self.kubelet.target(path) {
            Ok(target) => match target.kind() {
                Ok(None) => Ok(None),
                Err(error @ TargetError::Link { .. }) => Err(status::of_target(&error)),
                // Also where it cannot be looked at: the root of a file system that has shut down answers EIO, and is unmounted as any other.
                Ok(Some(_)) | Err(_) => Ok(Some(Arc::new(target))),
            },
            Err(error) if error.is_not_there() => Ok(None),
            Err(error) => Err(status::of_target(&error)),
        }
    }

    /// The last unmount of a file system writes: it is not to wait for a server that is lost. Others touch no disk.
    async fn fail_if_last(&self, target: &Arc<Target>, attached: &Attached) -> Result<(), Status> {
        let Some(own) = attached.own.as_ref().filter(|own| disk_of(Some(own)) == Disk::Stalled) else {
            return Ok(());
        };
        let Some(identity) = attached.identity() else { return Ok(()) };
        if fails_on_stall(attached) || is_elsewhere(Some(identity), Some(target)).await? {
            return Ok(());
        }
        self.daemon.fail_on_stall(&own.attachment_id).await
    }

    /// Has a job of a former call come to its end though its server is lost.
    async fn free_jobs(&self, volume: VolumeId, target: Option<&Arc<Target>>) -> Result<(), Status> {
        let Some((what, _)) = self.jobs.running(&volume.to_string()) else { return Ok(()) };
        // Where the daemon cannot be asked, the job is waited for.
        let Ok(attached) = self.attached(volume).await else { return Ok(()) };
        let Some(own) = &attached.own else { return Ok(()) };
        let is_elsewhere = is_elsewhere(attached.identity(), target).await?;
        if !plan::frees_jobs(disk_of(Some(own)), fails_on_stall(&attached), true, is_elsewhere) {
            return Ok(());
        }
        tracing::warn!(%volume, what, "waits for a server that cannot be reached; its I/O fails once that has lasted for two minutes");
        self.daemon.fail_on_stall(&own.attachment_id).await
    }

    /// Says in the log that what an unmount wrote is lost.
    async fn warn_if_failing(&self, volume: VolumeId) {
        let Ok(Some(own)) = self.daemon.attachment(volume).await else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if is_failing(&own, i64::try_from(now.as_millis()).unwrap_or(i64::MAX)) {
            tracing::warn!(%volume, "unmounts while the server cannot be reached and I/O fails; what was not written yet is lost");
        }
    }

    async fn unmount(&self, volume: VolumeId, target: &Arc<Target>) -> Result<(), Status> {
        let what = format!("the unmount of {:?}", target.path());
        let at = Arc::clone(target);
        let call = move || {
            unmount_all(&at)?;
            Ok(())
        };
        let unmounted = self.run_call(volume, &what, call).await;
        self.warn_if_failing(volume).await;
        unmounted
    }
}

fn fails_on_stall(attached: &Attached) -> bool {
    attached.own.as_ref().is_some_and(|own| own.on_stall() == proto::v1::StallAction::Fail)
}

/// Whether the disk is mounted or shown at another path than this one; one without a device is nowhere.
async fn is_elsewhere(disk: Option<Identity>, target: Option<&Arc<Target>>) -> Result<bool, Status> {
    let Some(disk) = disk else { return Ok(false) };
    let target = target.cloned();
    blocking(move || {
        let but: Vec<&Target> = target.as_deref().into_iter().collect();
        is_mounted_elsewhere(&disk, &but).map_err(|error| status::of_mount(&error))
    })
    .await
}

async fn see(target: &Arc<Target>, attached: &Attached) -> Result<Place, Status> {
    // A disk whose device is gone is known by nothing but its mounts.
    let own = attached.identity();
    let others = attached.others.clone();
    look(target, move |target| place_to_free(target, own.as_ref(), &others)).await
}
