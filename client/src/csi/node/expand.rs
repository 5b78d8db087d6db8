//! NodeExpandVolume: the file system grows to the size that its disk has by now.
//!
//! Owns: finding out what is at the path, because kubelet need not say. Never: makes the disk larger; the server has done so, and the device
//! process follows; of an encrypted volume the node daemon has the clear disk follow that, without a passphrase. Called by: `service`.

use std::sync::Arc;

use proto::csi::v1::CapacityRange;
use tonic::Status;

use super::daemon::disk_of;
use super::device::{Identity, place_of};
use super::inner::{Inner, blocking, look};
use super::plan::{Disk, Place, Refusal};
use super::request::{VolumeId, no_such_volume};
use super::status;
use crate::csi::mount_options::FsType;
use crate::csi::mounts::mounts_at;
use crate::csi::targets::TargetKind;

impl Inner {
    /// Grows what is on the volume, and tells how large the volume is, in bytes.
    ///
    /// # Errors
    /// NOT_FOUND: no such volume here, or not at the path. OUT_OF_RANGE, FAILED_PRECONDITION: the disk has not the size.
    pub async fn expand(
        &self,
        volume: VolumeId,
        path: &str,
        range: Option<&CapacityRange>,
    ) -> Result<i64, Status> {
        self.settled(volume).await?;
        let attachment = self.daemon.attachment(volume).await?;
        let Some(attachment) = attachment else { return Err(no_such_volume(&volume.to_string())) };
        match disk_of(Some(&attachment)) {
            Disk::Serving => {}
            Disk::Stalled => return Err(status::of_refusal(&Refusal::Stalled)),
            Disk::Locked => return Err(status::of_refusal(&Refusal::NotStaged)),
            _ => return Err(status::of_refusal(&Refusal::Failed)),
        }
        let not_there = || Status::not_found("the volume is not at this path");
        let target = Arc::new(self.kubelet.target(path).map_err(|_| not_there())?);
        let identity = Identity::of(&attachment).map_err(|error| status::of_device(&error))?;
        let mounts = look(&target, move |target| {
            let is_there = matches!(place_of(target, &identity)?, Place::Volume { .. });
            let mounts = if is_there { mounts_at(target)? } else { Vec::new() };
            Ok((mounts.into_iter().next_back(), target.kind()?))
        });
        let (Some(mount), Some(kind)) = mounts.await? else { return Err(not_there()) };
        let device = self.hold(volume, &attachment).await?;
        let held = Arc::clone(&device);
        let wanted = range.map_or(0, |range| range.required_bytes).max(0).unsigned_abs();
        let bytes = blocking(move || {
            let grown = held.wait_until_grown(wanted).and_then(|()| held.bytes());
            grown.map_err(|error| status::of_device(&error))
        });
        let bytes = bytes.await?;
        let limit = range.map_or(0, |range| range.limit_bytes).max(0).unsigned_abs();
        if limit != 0 && bytes > limit {
            return Err(Status::out_of_range(format!("the volume has {bytes} bytes, more than {limit}")));
        }
        if kind == TargetKind::Directory && !mount.is_file_system_read_only {
            let fs_type = FsType::parse(&mount.fs_type)
                .map_err(|error| Status::failed_precondition(error.to_string()))?;
            self.grow(volume, fs_type, device, target).await?;
        }
        i64::try_from(bytes).map_err(|_| Status::out_of_range("the volume is larger than CSI can tell"))
    }
}
