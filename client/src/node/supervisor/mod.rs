//! Attach, detach and list: the order of steps, and what is undone when one fails.
//!
//! ```text
//! attach:  server grants ──▶ spec written ──▶ device process started ──▶ live
//!             │ any failure: process killed, device and link removed, grant given back, folder removed
//! detach:  device process stops ──▶ server told ──▶ folder removed
//! death:   process ends unasked ──▶ another one takes its device on (`recover.rs`)
//! ```
//!
//! Invariants: calls on one target run one after the other. A folder is removed last, so that whatever was left half
//! done by a crash is found again. The session epoch in a spec is higher than any that the server or an earlier spec
//! has told. A secret goes into the spec and nowhere else.
//! Called by: `node_service`.

mod attach;
mod clear_disk;
mod detach;
mod recover;
mod wishes;

pub use detach::FORCE_DETACH_MAX;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use proto::v1;
use ublk_core::{ControlDevice, ProbeReport};

use super::attachment_record::{AttachmentRecord, stall_policy};
use super::device_process;
use super::error::NodeError;
use super::leftovers;
use super::management_client::ManagementClient;
use super::target::DetachSelector;
use super::target_locks::TargetLocks;
use crate::api_channel;
use crate::contract::{AttachmentDir, ControlCommand, ControlResponse, DeviceSpec};
use crate::data_address::on_the_link_of;
use crate::pod_exit::PodExit;
use crate::tls_spec::ClientFiles;

/// What the daemon was started with.
#[derive(Debug, Clone)]
pub struct SupervisorConfig {
    /// Attachment folders lie below it.
    pub run_dir: PathBuf,
    /// Stable links are made in it.
    pub device_dir: PathBuf,
    /// This machine, to the server.
    pub node_id: String,
    /// What device processes log.
    pub log_filter: String,
    /// The files of TLS, where there is TLS.
    pub tls_files: Option<ClientFiles>,
    /// The kernel may not encrypt, even if it could.
    pub tls_user_space_only: bool,
    /// How much the kernel may encrypt under one key, in bytes.
    pub tls_key_bytes_max: u64,
    /// How device processes leave the daemon's pod; `None`: they stay where the daemon is.
    pub pod_exit: Option<PodExit>,
}

/// The attachments of this node.
#[derive(Debug)]
pub struct Supervisor {
    config: SupervisorConfig,
    pub(in crate::node) management: ManagementClient,
    pub(in crate::node) locks: TargetLocks,
}

impl Supervisor {
    /// A supervisor for the attachments below `config.run_dir`.
    pub fn new(config: SupervisorConfig, management: ManagementClient) -> Self {
        Self { config, management, locks: TargetLocks::default() }
    }

    /// What the daemon was started with.
    pub fn config(&self) -> &SupervisorConfig {
        &self.config
    }

    /// The storage server's URI.
    pub fn server(&self) -> &str {
        self.management.server()
    }

    /// Every attachment, in order of target.
    ///
    /// # Errors
    /// [`NodeError::Io`]
    pub fn list(&self) -> Result<Vec<v1::NodeAttachment>, NodeError> {
        let records = AttachmentRecord::read_all(&self.config.run_dir)?;
        Ok(records.iter().map(AttachmentRecord::to_proto).collect())
    }

    /// Tells the log what was found at the start of the daemon, and takes it on: what runs is watched, what died is
    /// recovered where it can be.
    ///
    /// # Errors
    /// [`NodeError::Io`]
    pub fn adopt_found_attachments(self: &Arc<Self>) -> Result<(), NodeError> {
        for record in AttachmentRecord::read_all(&self.config.run_dir)? {
            let attachment = record.to_proto();
            let (target, state) = (&attachment.target, record.state());
            if record.pid.is_some() {
                tracing::info!(target, pid = attachment.pid, ?state, "attachment found running");
            } else {
                tracing::warn!(target, reason = attachment.state_reason, "attachment found dead");
            }
            self.watch(&record.dir);
        }
        self.tell_forgotten_clear_disks()
    }

    /// Data addresses that the server tells, with the zone of those that are of the link on which its API is.
    pub(in crate::node) fn as_seen_from_here(&self, told: Vec<String>) -> Vec<String> {
        let zone = api_channel::zone(self.management.server());
        told.into_iter().map(|address| on_the_link_of(zone.as_deref(), address)).collect()
    }

    pub(in crate::node) fn find(
        &self,
        selector: &DetachSelector,
    ) -> Result<Option<AttachmentRecord>, NodeError> {
        let records = AttachmentRecord::read_all(&self.config.run_dir)?;
        Ok(records.into_iter().find(|record| record.is_meant_by(selector)))
    }

    /// Changes what an attachment's I/O does while its server cannot be reached.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn set_stall_policy(
        &self,
        request: &v1::SetStallPolicyRequest,
    ) -> Result<v1::NodeAttachment, NodeError> {
        let policy = match request.on_stall() {
            v1::StallAction::Unspecified => {
                let message = "say what I/O is to do: wait or fail".to_owned();
                return Err(NodeError::InvalidField { field: "on_stall", message });
            }
            action => stall_policy(action, request.stall_fail_after_ms),
        };
        let selector = DetachSelector::parse(&request.target)?;
        let target = request.target.clone();
        let Some(record) = self.find(&selector)? else { return Err(NodeError::NotAttached { target }) };
        if record.pid.is_none() {
            let why = record.to_proto().state_reason;
            return Err(NodeError::DeviceFailed { target, why });
        }
        match device_process::ask(&record.dir, &target, ControlCommand::SetStallPolicy(policy)).await? {
            Some(ControlResponse::Ok(_)) => {}
            Some(ControlResponse::Error { message: why }) => {
                return Err(NodeError::PolicyRefused { target, why });
            }
            Some(ControlResponse::Busy { .. }) | None => {
                let why = "the device process did not answer".to_owned();
                return Err(NodeError::PolicyRefused { target, why });
            }
        }
        let record = AttachmentRecord::read(record.dir.clone())?;
        record.map(|record| record.to_proto()).ok_or(NodeError::NotAttached { target })
    }
}

/// Tries every data path on this machine.
///
/// # Errors
/// [`NodeError::Ublk`]: no driver, or no right to use it.
pub async fn probe_data_paths() -> Result<ProbeReport, NodeError> {
    blocking(|| Ok(ublk_core::probe_driver(&ControlDevice::open()?)?)).await
}

pub(in crate::node) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| NodeError::Panicked)?
}

/// Removes what a dead device process left in the kernel and in /dev. Of an earlier boot there is nothing.
async fn remove_device_and_link(spec: &DeviceSpec, by_force: bool) -> Result<(), NodeError> {
    let (attachment_id, target, link) = (spec.attachment_id, spec.target.clone(), spec.device_link.clone());
    blocking(move || {
        leftovers::remove_devices(attachment_id, &target, by_force)?;
        leftovers::remove_link(&link)
    })
    .await
}

fn remove_folder(dir: &AttachmentDir) -> Result<(), NodeError> {
    match fs::remove_dir_all(dir.path()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(NodeError::Io { what: format!("cannot remove {}", dir.path().display()), source: error })
        }
        _ => Ok(()),
    }
}
