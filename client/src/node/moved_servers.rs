//! A storage server that has got another address: the disks that wait for it are told where it is.
//!
//! Owns: when the management API is asked, and for which attachments. A device process knows the addresses of its attach; the
//! management API is known by name, which is looked up at each connection, and tells where data is served now. Foreign
//! servers are known by name from the beginning. Called by: `serve`, once.
//! Invariant: an address is taken only from the server that gave the attachment out (its `server_id`), because whoever answers at
//! it is told the attachment's secret.

use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use tokio::time::timeout;

use super::attachment_record::AttachmentRecord;
use super::device_process;
use super::error::NodeError;
use super::supervisor::Supervisor;
use crate::causes::with_sources;
use crate::contract::{ControlCommand, ControlResponse, DeviceState, ExportSpec, write_file};

/// Between two looks at the state of the attachments.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
/// The same while the management API cannot be reached, at most.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(30);
/// Another call works on the target: it is looked at again.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Looks after all attachments of this node, for as long as the daemon lives.
    pub(super) async fn follow_moved_servers(self: Arc<Self>) {
        let mut pause = LOOK_INTERVAL;
        loop {
            tokio::time::sleep(pause).await;
            let waiting = match AttachmentRecord::read_all(&self.config().run_dir) {
                Ok(records) => records.into_iter().filter(waits_for_its_server).collect(),
                Err(error) => {
                    tracing::debug!(%error, "cannot read the attachments");
                    Vec::new()
                }
            };
            pause = match self.tell_addresses(waiting).await {
                Ok(()) => LOOK_INTERVAL,
                Err(error) => {
                    tracing::debug!(
                        error = with_sources(&error),
                        "no server answered where the volume is served now; asking again later"
                    );
                    LOOK_INTERVAL_MAX.min(pause * 2)
                }
            };
        }
    }

    async fn tell_addresses(&self, waiting: Vec<AttachmentRecord>) -> Result<(), NodeError> {
        if waiting.is_empty() {
            return Ok(());
        }
        let mut info = self.management.server_info().await?;
        info.data_addresses = self.as_seen_from_here(info.data_addresses);
        for record in waiting.iter().filter(|record| has_moved(record, &info)) {
            if let Err(error) = self.tell_address(record, &info).await {
                let target = &record.spec.target;
                tracing::warn!(
                    target,
                    error = with_sources(&error),
                    "cannot tell a device process the new addresses of its server"
                );
            }
        }
        Ok(())
    }

    async fn tell_address(
        &self,
        found: &AttachmentRecord,
        info: &v1::GetServerInfoResponse,
    ) -> Result<(), NodeError> {
        let Ok(_guard) = timeout(LOCK_PATIENCE, self.locks.lock(&found.lock_name())).await else {
            return Ok(());
        };
        let Some(mut record) = AttachmentRecord::read(found.dir.clone())? else { return Ok(()) };
        if !waits_for_its_server(&record) || !has_moved(&record, info) {
            return Ok(());
        }
        let (target, addresses) = (record.spec.target.clone(), info.data_addresses.clone());
        let command = ControlCommand::SetAddresses(addresses.clone());
        match device_process::ask(&record.dir, &target, command).await? {
            Some(ControlResponse::Ok(_)) => {}
            // A program of before cannot be told; the one after it reads the spec.
            Some(ControlResponse::Error { message }) => {
                tracing::warn!(target, message, "the device process refused the new addresses")
            }
            Some(ControlResponse::Busy { .. }) | None => return Ok(()),
        }
        tracing::warn!(target, ?addresses, "the server has moved to other addresses");
        record.spec.addresses = addresses;
        Ok(write_file(&record.dir.spec(), &record.spec)?)
    }
}

fn waits_for_its_server(record: &AttachmentRecord) -> bool {
    // Also while it is looked whether it can be taken away, which may wait for its server.
    record.pid.is_some() && record.status.as_ref().is_some_and(|status| status.state == DeviceState::Stalled)
}

/// Whether the attachment's own server tells other addresses than the attachment knows.
fn has_moved(record: &AttachmentRecord, info: &v1::GetServerInfoResponse) -> bool {
    let ExportSpec::Attachment { server_id, .. } = &record.spec.export else { return false };
    let is_its_own = info.server_id == server_id.to_string();
    is_its_own && !info.data_addresses.is_empty() && record.spec.addresses != info.data_addresses
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::contract::AttachmentDir;
    use crate::node::attachment_record::tests::{spec, status};

    #[test]
    fn only_the_attachments_own_server_is_believed() {
        let mut record = AttachmentRecord {
            dir: AttachmentDir::from_path("/nowhere"),
            spec: spec(Uuid::from_u128(7), "vol-1"),
            status: None,
            pid: None,
        };
        record.status = Some(status(&record.spec, DeviceState::Stalled, "boot"));
        let server_id = Uuid::from_u128(9);
        record.spec.export = ExportSpec::Attachment {
            secret: String::new(),
            session_epoch: 1,
            server_id,
            volume_uid: Uuid::from_u128(10),
        };
        let info = |server_id: Uuid, addresses: &[&str]| v1::GetServerInfoResponse {
            server_id: server_id.to_string(),
            data_addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
            ..Default::default()
        };
        let known: Vec<&str> = record.spec.addresses.iter().map(String::as_str).collect();
        assert!(has_moved(&record, &info(server_id, &["192.0.2.7:10809"])));
        assert!(!has_moved(&record, &info(server_id, &known)), "it is where it was");
        assert!(!has_moved(&record, &info(server_id, &[])), "it listens nowhere");
        assert!(!has_moved(&record, &info(Uuid::from_u128(8), &["192.0.2.7:10809"])), "another server");
        record.spec.export = ExportSpec::Nbd { export_name: "vol-1".to_owned() };
        assert!(!has_moved(&record, &info(server_id, &["192.0.2.7:10809"])), "somebody else's");
    }
}
