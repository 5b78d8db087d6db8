//! Detach: the device process stops, the server is told, the folder is removed; and what bounds it by force.
//!
//! | by force | at most |
//! | --- | --- |
//! | the device process takes its device away | [`device_process::FORCE_DEADLINE`] |
//! | it ends, or is killed | [`device_process::EXIT_DEADLINE`] |
//! | what it left is removed: the driver stops the device, and deletes it | twice [`STOP_DEADLINE`] |
//! | an encrypted volume's clear disk is closed behind its last user | [`FORCE_CLOSE_DEADLINE`] |
//! | the server says who it is, and is told | twice [`management_client::CALL_DEADLINE`] |
//!
//! In sum [`FORCE_DETACH_MAX`].

use std::time::Duration;

use proto::v1;
use tonic::Code;
use ublk_core::control::STOP_DEADLINE;
use uuid::Uuid;

use super::{Supervisor, remove_device_and_link, remove_folder};
use crate::contract::{
    AttachmentDir, ControlCommand, ControlResponse, DeviceState, ExportSpec, now_ms, write_file,
};
use crate::node::attachment_record::AttachmentRecord;
use crate::node::device_process;
use crate::node::error::NodeError;
use crate::node::luks::cryptsetup::FORCE_CLOSE_DEADLINE;
use crate::node::management_client;
use crate::node::target::{DetachSelector, Target};

/// What the steps of a detach by force may take in all, whatever the server, the network and the disk's users do.
pub const FORCE_DETACH_MAX: Duration = device_process::FORCE_DEADLINE
    .saturating_add(device_process::EXIT_DEADLINE)
    .saturating_add(STOP_DEADLINE.saturating_mul(2))
    .saturating_add(FORCE_CLOSE_DEADLINE)
    .saturating_add(management_client::CALL_DEADLINE.saturating_mul(2));

impl Supervisor {
    /// Takes a disk away; tells whether there was one.
    ///
    /// # Errors
    /// [`NodeError`], by cause; repeating the call goes on where it stopped.
    pub async fn detach(&self, request: &v1::DetachRequest) -> Result<bool, NodeError> {
        let selector = DetachSelector::parse(&request.target)?;
        let named_target = match &selector {
            DetachSelector::Name { target, .. } => Some(target.clone()),
            DetachSelector::DevId(_) | DetachSelector::Path(_) => None,
        };
        let found = self.find(&selector)?.and_then(|record| record.target()).or(named_target.clone());
        let Some(target) = found else { return Ok(false) };
        let _guard = self.locks.lock(&target.to_string()).await;
        // Another call may have ended it meanwhile.
        match (self.find(&selector)?, named_target) {
            (Some(record), _) => {
                self.stop_device(&record, request.force).await?;
                self.release(&record).await?;
                remove_folder(&record.dir)?;
                tracing::info!(target = record.spec.target, "detached");
                Ok(true)
            }
            (None, Some(Target::Volume(name) | Target::Snapshot(name))) => {
                let is_closed = match &selector {
                    DetachSelector::Name { attachment_id: Some(id), .. } => self.close_forgotten(*id).await?,
                    _ => false,
                };
                Ok(self.release_forgotten(&name).await? | is_closed)
            }
            (None, _) => Ok(false),
        }
    }

    /// Has the device process take its device away, or removes what a dead one left.
    async fn stop_device(&self, record: &AttachmentRecord, by_force: bool) -> Result<(), NodeError> {
        let target = &record.spec.target;
        if !by_force {
            self.close(record).await?;
        }
        if record.pid.is_some() && by_force {
            let asked = device_process::ask(&record.dir, target, ControlCommand::ForceStop).await;
            if !matches!(asked, Ok(Some(ControlResponse::Ok(_)) | None)) {
                tracing::warn!(target, ?asked, "the device process did not remove its device; killing it");
            }
            device_process::kill(&record.dir, target).await?;
        } else if record.pid.is_some() {
            match device_process::ask(&record.dir, target, ControlCommand::Stop).await? {
                Some(ControlResponse::Busy { holders }) => {
                    let holders =
                        if holders.is_empty() { vec!["somebody has it open".to_owned()] } else { holders };
                    return Err(NodeError::DeviceOpen { target: target.clone(), holders });
                }
                Some(ControlResponse::Error { message }) => {
                    return Err(NodeError::StopFailed { target: target.clone(), why: message });
                }
                // It ends after its answer; without an answer, it must have been ending.
                Some(ControlResponse::Ok(_)) | None => {}
            }
            device_process::wait_until_gone(&record.dir, target).await?;
        }
        remove_device_and_link(&record.spec, by_force).await?;
        self.close_by_force(record).await
    }

    /// Tells the server that the volume is no longer used here.
    async fn release(&self, record: &AttachmentRecord) -> Result<(), NodeError> {
        let ExportSpec::Attachment { server_id, .. } = &record.spec.export else { return Ok(()) };
        let told = async {
            self.management.expect_server(*server_id).await?;
            self.management.detach_volume(&record.spec.attachment_id.to_string()).await
        };
        match told.await {
            Ok(_) => Ok(()),
            Err(NodeError::Refused(status)) if status.code() == Code::NotFound => Ok(()),
            Err(NodeError::ServerUnreachable { cause, server }) => {
                let cause = format!("cannot reach {server}: {cause}");
                note_unfinished_detach(record, &cause)?;
                Err(NodeError::DetachUnfinished { target: record.spec.target.clone(), cause })
            }
            Err(error) => Err(error),
        }
    }

    /// Gives back an attachment that the server holds for this node and no folder knows: an attach was cut short. One
    /// that has connections is in use by another daemon of the same node id.
    async fn release_forgotten(&self, volume_name: &str) -> Result<bool, NodeError> {
        let idle = match self.management.idle_attachments(volume_name, &self.config.node_id).await {
            Ok(idle) => idle,
            Err(NodeError::Refused(status)) if status.code() == Code::NotFound => Vec::new(),
            // It is not attached here, and that is all a detach promises.
            Err(error @ NodeError::ServerUnreachable { .. }) => {
                tracing::warn!(target = volume_name, %error, "not attached here; the server was not asked");
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        let mut existed = false;
        // One that has a folder is a disk of this machine, under another name.
        let is_disk = |id: &String| {
            let id = Uuid::try_parse(id);
            id.is_ok_and(|id| AttachmentDir::new(&self.config.run_dir, id).path().exists())
        };
        for attachment_id in idle.into_iter().filter(|id| !is_disk(id)) {
            if let Ok(id) = Uuid::try_parse(&attachment_id) {
                self.close_forgotten(id).await?;
            }
            existed |= self.management.detach_volume(&attachment_id).await?;
        }
        Ok(existed)
    }
}

/// The device process is gone, so the status is the daemon's to write: it says what is left to do.
fn note_unfinished_detach(record: &AttachmentRecord, cause: &str) -> Result<(), NodeError> {
    let Some(mut status) = record.status.clone() else { return Ok(()) };
    status.state = DeviceState::Stopping;
    status.state_reason = format!("the storage server still holds the attachment ({cause}); detach again");
    status.state_since_ms = now_ms();
    status.dev_id = None;
    Ok(write_file(&record.dir.status(), &status)?)
}
