//! The node API as a test asks it: what is attached, without starting a program; and starting the daemon with options.
//!
//! Tests ask for the state of an attachment far more often than users do, many times in a wait, and on an emulated processor
//! volctl takes a third of a second to say what the daemon says in some milliseconds. That volctl shows the same, name by
//! name, is looked at by `rungs::each_is_listed_as_usable_or_with_a_reason`. Each call makes a connection of its own, so that
//! a daemon that was started anew is found.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use proto::v1;
use proto::v1::node_client::NodeClient;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

use super::StorageNode;

/// A call that takes longer is not coming back.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// The attachments, each with the names and words of `volctl attachments --output json`.
///
/// # Errors
/// No daemon listens, or it refuses.
pub(super) fn attachments(socket: &Path) -> Result<Vec<Value>> {
    let attachments = ask(socket, CALL_DEADLINE, async |mut node| {
        let answer = node.list_node_attachments(v1::ListNodeAttachmentsRequest {}).await?;
        Ok(answer.into_inner().attachments)
    })?;
    Ok(attachments.iter().map(shown).collect())
}

/// Makes one call of the daemon.
fn ask<T>(
    socket: &Path,
    deadline: Duration,
    call: impl AsyncFnOnce(NodeClient<Channel>) -> Result<T>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(deadline);
        call(NodeClient::new(endpoint.connect().await.context("the node daemon")?)).await
    })
}

impl StorageNode {
    /// Starts the node daemon with these options, which its later starts have as well.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_client_with(&mut self, options: &[&str]) -> Result<()> {
        self.client_options = options.iter().map(|&option| option.to_owned()).collect();
        self.start_client()
    }

    /// From its next start on the node daemon finds programs in this folder before others.
    pub fn have_the_client_look_in(&mut self, folder: &Path) {
        self.client_programs = Some(folder.to_owned());
    }

    /// Freezes what is mounted of the volumes, as volctl does before a snapshot; gives the freeze's id.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn freeze(&self, volumes: &[&str]) -> Result<Uuid> {
        self.freeze_within(volumes, CALL_DEADLINE)
    }

    /// The same, waiting so long for the answer.
    ///
    /// # Errors
    /// The daemon refuses, or does not answer.
    pub fn freeze_within(&self, volumes: &[&str], deadline: Duration) -> Result<Uuid> {
        let freeze_id = Uuid::new_v4();
        let targets = volumes.iter().map(|&volume| volume.to_owned()).collect();
        let request = v1::FreezeRequest { targets, freeze_id: freeze_id.to_string() };
        ask(&self.socket(), deadline, async |mut node| {
            node.freeze(request).await?;
            Ok(freeze_id)
        })
    }

    /// Thaws that; `None`: it was frozen until now, or why not.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn thaw(&self, freeze_id: Uuid) -> Result<Option<String>> {
        let request = v1::ThawRequest { freeze_id: freeze_id.to_string() };
        ask(&self.socket(), CALL_DEADLINE, async |mut node| {
            let answer = node.thaw(request).await?.into_inner();
            Ok((!answer.was_frozen).then_some(answer.reason))
        })
    }
}

fn shown(attachment: &v1::NodeAttachment) -> Value {
    json!({
        "attachment_id": attachment.attachment_id,
        "target": attachment.target,
        "device_path": attachment.device_path,
        "device_link": attachment.device_link,
        "capacity_bytes": attachment.capacity_bytes,
        "block_size_bytes": attachment.block_size_bytes,
        "read_only": attachment.read_only,
        "tail_bytes": attachment.tail_bytes,
        "state": word(attachment.state().as_str_name(), "DEVICE_STATE_"),
        "state_reason": attachment.state_reason,
        "state_since_ms": attachment.state_since_ms,
        "data_path": attachment.data_path,
        "data_path_reason": attachment.data_path_reason,
        "nr_hw_queues": attachment.nr_hw_queues,
        "nr_connections": attachment.nr_connections,
        "queue_depth": attachment.queue_depth,
        "busy_poll_us": attachment.busy_poll_us,
        "send_zc": attachment.send_zc,
        "send_zc_mode": word(attachment.send_zc_mode().as_str_name(), "SEND_ZC_MODE_"),
        "server_address": attachment.server_address,
        "encryption": attachment.encryption,
        "pid": attachment.pid,
        "session_epoch": attachment.session_epoch,
        "on_stall": word(attachment.on_stall().as_str_name(), "STALL_ACTION_"),
        "stall_fail_after_ms": attachment.stall_fail_after_ms,
        "reconnects": attachment.reconnects,
        "program_version": attachment.program_version,
        "only_if_granted": attachment.only_if_granted,
        "is_encrypted": attachment.is_encrypted,
        "clear_device_path": attachment.clear_device_path,
    })
}

/// The API's name of a value without its enumeration's, in small letters.
fn word(name: &str, enumeration: &str) -> String {
    name.strip_prefix(enumeration).unwrap_or(name).to_lowercase()
}
