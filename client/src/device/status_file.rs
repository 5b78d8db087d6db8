//! `status.json`: what the device process tells of itself, kept current.
//!
//! Written by rename on every change of state, so that a reader sees a whole status; a status of another boot means
//! nothing, which is why the boot id is in it.

use std::path::PathBuf;

use ublk_core::control::block_device_path;

use crate::contract::{
    self, AttachmentDir, CONTRACT_VERSION, ContractError, DeviceSpec, DeviceState, DeviceStatus, ExportSpec,
    SendZc,
};

/// The status file of this process.
#[derive(Debug)]
pub struct StatusFile {
    path: PathBuf,
    status: DeviceStatus,
}

impl StatusFile {
    /// A status of a device that is being made, written.
    ///
    /// # Errors
    /// [`ContractError::Io`]
    pub fn create(dir: &AttachmentDir, spec: &DeviceSpec) -> Result<Self, ContractError> {
        let session_epoch = match &spec.export {
            ExportSpec::Attachment { session_epoch, .. } => *session_epoch,
            ExportSpec::Nbd { .. } => 0,
        };
        let status = DeviceStatus {
            format_version: CONTRACT_VERSION,
            boot_id: contract::boot_id()?,
            pid: std::process::id(),
            attachment_id: spec.attachment_id,
            target: spec.target.clone(),
            state: DeviceState::Starting,
            state_reason: String::new(),
            state_since_ms: contract::now_ms(),
            dev_id: None,
            device_link: spec.device_link.clone(),
            capacity_bytes: 0,
            block_size_bytes: 0,
            read_only: spec.read_only,
            data_path: String::new(),
            data_path_reason: String::new(),
            nr_hw_queues: spec.nr_hw_queues,
            nr_connections: spec.nr_connections,
            queue_depth: spec.queue_depth,
            server_address: String::new(),
            encryption: String::new(),
            send_zc: SendZc::default(),
            session_epoch,
            on_stall: spec.on_stall,
            on_stall_is_told: spec.on_stall_is_told,
            reconnects: 0,
            is_stopping: false,
            session: None,
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let file = Self { path: dir.status(), status };
        file.write()?;
        Ok(file)
    }

    /// The status as it was last written.
    pub fn status(&self) -> &DeviceStatus {
        &self.status
    }

    /// Changes it and writes it.
    ///
    /// # Errors
    /// [`ContractError::Io`]
    pub fn update(&mut self, change: impl FnOnce(&mut DeviceStatus)) -> Result<(), ContractError> {
        change(&mut self.status);
        self.write()
    }

    /// Enters a state and writes it. A status that cannot be written is logged: the device itself goes on.
    pub fn enter(&mut self, state: DeviceState, reason: &str) {
        self.note(|status| {
            if status.state != state {
                status.state_since_ms = contract::now_ms();
            }
            status.state = state;
            status.state_reason = reason.to_owned();
        });
    }

    /// Changes it and writes it; that it cannot be written is logged.
    pub fn note(&mut self, change: impl FnOnce(&mut DeviceStatus)) {
        if let Err(error) = self.update(change) {
            tracing::error!(%error, "cannot write the status file");
        }
    }

    /// `/dev/ublkbN`, once there is one.
    pub fn device_path(&self) -> Option<PathBuf> {
        self.status.dev_id.map(block_device_path)
    }

    fn write(&self) -> Result<(), ContractError> {
        contract::write_file(&self.path, &self.status)
    }
}
