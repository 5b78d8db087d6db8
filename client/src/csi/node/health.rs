//! How a volume is, and how much of it is used: NodeGetVolumeStats, NodeGetVolumeHealth, NodeGetStorageHealth.
//!
//! Owns: what of the node daemon's words is which condition of CSI, but for the states of disks (`disk_health`). Never: asks a file system whose disk stalls, nor waits for one longer
//! than a second. Called by: `service`.

use std::sync::Arc;
use std::time::Duration;

use proto::csi::v1::node_get_storage_health_response::StorageBackendHealth;
use proto::csi::v1::volume_health::VolumeHealthEntry;
use proto::csi::v1::volume_usage::Unit;
use proto::csi::v1::{
    StorageHealthErrorType, VolumeCapability, VolumeHealth, VolumeHealthErrorType, VolumeUsage,
};
use proto::v1::{GetNodeInfoResponse, NodeAttachment};
use tonic::Status;

use super::daemon::{Daemon, disk_of};
use super::device::{Identity, place_of};
use super::inner::{Inner, blocking, look};
use super::plan::{Disk, Place, Refusal};
use super::request::{VolumeId, no_such_volume};
use super::status;
use crate::contract::state_word::state_word;
use crate::csi::disk_health::of_disk;
use crate::csi::mountinfo::{self, MountEntry};
use crate::csi::targets::TargetKind;
use crate::csi::usage::{Amounts, Usage, UsageError, statfs};

/// What a file system may take to tell how full it is.
const USAGE_DEADLINE: Duration = Duration::from_secs(1);
/// How much of a reason is passed on, in characters.
const SHOWN_CHARACTERS_MAX: usize = 500;

impl Inner {
    /// How much of the volume at the path is used.
    ///
    /// # Errors
    /// NOT_FOUND: no such volume here, or not at the path. UNAVAILABLE: it does not answer.
    pub async fn stats(&self, volume: VolumeId, path: &str) -> Result<Vec<VolumeUsage>, Status> {
        let attachment = self.daemon.attachment(volume).await?;
        let Some(attachment) = attachment else { return Err(no_such_volume(&volume.to_string())) };
        let not_there = || Status::not_found("the volume is not at this path");
        let target = Arc::new(self.kubelet.target(path).map_err(|_| not_there())?);
        match disk_of(Some(&attachment)) {
            Disk::Stalled => return Err(status::of_refusal(&Refusal::Stalled)),
            Disk::Dead | Disk::Failed => return Err(status::of_refusal(&Refusal::Failed)),
            Disk::Absent | Disk::Locked | Disk::Leaving => return Err(not_there()),
            Disk::Serving => {}
        }
        let identity = Identity::of(&attachment).map_err(|error| status::of_device(&error))?;
        let seen = look(&target, move |target| {
            let is_there = matches!(place_of(target, &identity)?, Place::Volume { .. });
            Ok(if is_there { target.kind()? } else { None })
        });
        match seen.await? {
            None => Err(not_there()),
            Some(TargetKind::File) => Ok(vec![VolumeUsage {
                total: i64::try_from(attachment.capacity_bytes).unwrap_or(i64::MAX),
                unit: Unit::Bytes.into(),
                ..Default::default()
            }]),
            Some(TargetKind::Directory) => {
                let ask = move || statfs(&target.open().map_err(std::io::Error::other)?);
                let asked = self.usage.usage(&volume.to_string(), ask, USAGE_DEADLINE).await;
                asked.map(told).map_err(|error| match error {
                    UsageError::Silent(_) => Status::unavailable(error.to_string()),
                    UsageError::Failed(_) => Status::internal(error.to_string()),
                })
            }
        }
    }

    /// What is known to be wrong with the volume here.
    ///
    /// # Errors
    /// NOT_FOUND: no such volume here.
    pub async fn volume_health(&self, volume: VolumeId) -> Result<VolumeHealth, Status> {
        let attachment = self.daemon.attachment(volume).await?;
        let Some(attachment) = attachment else { return Err(no_such_volume(&volume.to_string())) };
        let identity = Identity::of(&attachment).ok();
        let mounts = blocking(move || {
            let mounts =
                mountinfo::read().map_err(|error| Status::internal(format!("mountinfo: {error}")))?;
            Ok(mounts
                .into_iter()
                .filter(|mount| identity.as_ref().is_some_and(|disk| disk.is_of(mount)))
                .collect())
        });
        let mounts: Vec<MountEntry> = mounts.await?;
        let health_statuses = conditions(&attachment, &mounts);
        Ok(VolumeHealth { volume_id: volume.to_string(), health_statuses })
    }

    /// What is known to be wrong with this node's way to its storage.
    ///
    /// # Errors
    /// UNAVAILABLE: the node daemon does not answer.
    pub async fn storage_health(&self) -> Result<Vec<StorageBackendHealth>, Status> {
        let daemon: &Daemon = &self.daemon;
        let (info, reached) = tokio::join!(daemon.info(), self.content.reached());
        Ok(storage_conditions(&info?, reached))
    }
}

fn told(usage: Usage) -> Vec<VolumeUsage> {
    let number = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    let told = |amounts: Amounts, unit: Unit| VolumeUsage {
        available: number(amounts.available),
        total: number(amounts.total),
        used: number(amounts.used),
        unit: unit.into(),
    };
    vec![told(usage.bytes, Unit::Bytes), told(usage.inodes, Unit::Inodes)]
}

/// What is wrong, by the node daemon's words and by what the kernel has mounted.
fn conditions(attachment: &NodeAttachment, mounts: &[MountEntry]) -> Vec<VolumeHealthEntry> {
    let why: String = attachment.state_reason.chars().take(SHOWN_CHARACTERS_MAX).collect();
    let entry = |status: VolumeHealthErrorType, reason: &str, message: String| VolumeHealthEntry {
        status: status.into(),
        reason: reason.to_owned(),
        message,
    };
    let mut found = Vec::new();
    if let Some((status, reason)) = of_disk(state_word(attachment.state()), &attachment.state_reason) {
        found.push(entry(status, reason, why));
    }
    // A file system that found itself damaged, or could not write, lets nobody write any more.
    let is_turned = |mount: &MountEntry| mount.is_file_system_read_only && mount.fs_type != "devtmpfs";
    if !attachment.read_only && mounts.iter().any(|mount| is_turned(mount) && !mount.is_read_only) {
        let message = "the file system has turned read-only after an error; see the kernel's log";
        found.push(entry(VolumeHealthErrorType::Inaccessible, "FileSystemError", message.to_owned()));
    }
    found
}

fn storage_conditions(info: &GetNodeInfoResponse, reached: Result<(), String>) -> Vec<StorageBackendHealth> {
    let shortened = |text: String| text.chars().take(SHOWN_CHARACTERS_MAX).collect::<String>();
    let entry = |status: StorageHealthErrorType, reason: &str, message: String| StorageBackendHealth {
        status: status.into(),
        reason: reason.to_owned(),
        message: shortened(message),
        volume_capability: None::<VolumeCapability>,
    };
    let mut found = Vec::new();
    if let Err(why) = reached {
        let message = format!("the storage server at {} does not answer: {why}", info.server);
        found.push(entry(StorageHealthErrorType::StorageUnreachable, "ServerUnreachable", message));
    }
    if !info.data_paths.is_empty() && info.data_paths.iter().all(|path| !path.supported) {
        let why = info.data_paths.first().map(|path| path.reason.clone()).unwrap_or_default();
        let message = format!("this machine can make no disks: {why}");
        found.push(entry(StorageHealthErrorType::StorageDegraded, "NoDataPath", message));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proto::v1::{DataPathSupport, DeviceState, StallAction};

    use super::*;

    fn attachment(state: DeviceState, reason: &str) -> NodeAttachment {
        NodeAttachment { state: state.into(), state_reason: reason.to_owned(), ..Default::default() }
    }

    fn words(attachment: &NodeAttachment, mounts: &[MountEntry]) -> Vec<(VolumeHealthErrorType, String)> {
        conditions(attachment, mounts).iter().map(|entry| (entry.status(), entry.reason.clone())).collect()
    }

    #[test]
    fn a_disk_that_is_not_well_is_told_in_the_daemons_words() {
        let ended = "the server at s:1 says: the attachment has ended";
        let failed = attachment(DeviceState::Failed, ended);
        assert_eq!(words(&failed, &[]), [(VolumeHealthErrorType::Inaccessible, "Fenced".to_owned())]);
        assert_eq!(conditions(&failed, &[])[0].message, ended);
        // Its policy is to fail, and its time has not come.
        let waits = NodeAttachment {
            on_stall: StallAction::Fail.into(),
            ..attachment(DeviceState::Stalled, "I/O waits: no route")
        };
        assert_eq!(words(&waits, &[]), [(VolumeHealthErrorType::Degraded, "ServerUnreachable".to_owned())]);
        assert_eq!(words(&attachment(DeviceState::Live, ""), &[]), []);
    }

    #[test]
    fn a_file_system_that_turned_read_only_is_told_once() {
        let mount = |is_read_only, is_file_system_read_only| MountEntry {
            mount_id: 1,
            device: (259, 3),
            root: PathBuf::from("/"),
            mount_point: PathBuf::from("/x"),
            is_read_only,
            is_file_system_read_only,
            fs_type: "ext4".to_owned(),
            is_shared: true,
        };
        let live = attachment(DeviceState::Live, "");
        let turned = [mount(false, true), mount(true, true), mount(false, true)];
        assert_eq!(
            words(&live, &turned),
            [(VolumeHealthErrorType::Inaccessible, "FileSystemError".to_owned())]
        );
        // As it was asked for.
        assert_eq!(words(&live, &[mount(true, true), mount(true, false), mount(false, false)]), []);
        let reader = NodeAttachment { read_only: true, ..live };
        assert_eq!(words(&reader, &turned), []);
    }

    #[test]
    fn a_server_that_is_lost_and_a_machine_without_a_data_path_are_told() {
        let path =
            |supported| DataPathSupport { supported, reason: "no driver".into(), ..Default::default() };
        let info = |paths: &[bool]| GetNodeInfoResponse {
            data_paths: paths.iter().map(|is| path(*is)).collect(),
            ..Default::default()
        };
        assert_eq!(storage_conditions(&info(&[false, true]), Ok(())), []);
        let lost = storage_conditions(&info(&[true]), Err("connection refused".to_owned()));
        assert_eq!(lost.len(), 1);
        assert_eq!(lost[0].status(), StorageHealthErrorType::StorageUnreachable);
        let none = storage_conditions(&info(&[false, false]), Ok(()));
        assert_eq!(none[0].status(), StorageHealthErrorType::StorageDegraded);
        assert!(none[0].message.contains("no driver"));
    }
}
