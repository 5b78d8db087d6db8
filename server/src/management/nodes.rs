//! The calls about nodes: who registers, who is heard of, who is known.
//!
//! Owns their fields' rules and their messages. Called by the service, which has looked at the caller's rights.

use std::time::{Duration, Instant};

use proto::v1;
use tonic::Status;

use super::fields::Fields;
use super::page_token::{PageToken, page_limit};
use super::{ManagementService, freezes, settings_fields};
use crate::catalog::{NodeFacts, NodeRecord};
use crate::lifecycle::{DataSide, NodeCondition, NodeDisk, NodeSeen, node_etag};
use crate::scope::Scope;

/// Disks of one node at most, as it tells them: the kernel's `ublks_max` by default is 64. All of them, each with the longest reason, fit
/// into one message.
const DISKS_MAX: usize = 256;
/// Bytes of a version, and of a disk's state.
const WORD_BYTES_MAX: usize = 64;
/// Bytes of why a disk is in its state.
const REASON_BYTES_MAX: usize = 512;
/// Things that are wrong with one node at most; a node daemon looks at three.
const CONDITIONS_MAX: usize = 16;
const _: () = assert!(
    (DISKS_MAX + CONDITIONS_MAX) * (REASON_BYTES_MAX + WORD_BYTES_MAX + 128) < super::MESSAGE_BYTES_MAX
);

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn make_known(
        &self,
        request: v1::RegisterNodeRequest,
    ) -> Result<v1::RegisteredNode, Status> {
        let mut fields = Fields::default();
        let facts = NodeFacts {
            node_id: fields.node_id("node_id", request.node_id),
            boot_id: fields.boot_id("boot_id", request.boot_id),
            version: fields.word("version", request.version, WORD_BYTES_MAX),
            labels: settings_fields::new_labels(&mut fields, request.labels),
            max_volumes: request.max_volumes,
        };
        fields.finish()?;
        let answer = self.blocking(move |lifecycle| {
            let (record, seen) = lifecycle.register_node(&facts)?;
            Ok(message(record, seen))
        });
        Ok(answer.await?.into_inner())
    }

    pub(super) async fn hear(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatResponse, Status> {
        let mut fields = Fields::default();
        let node_id = fields.node_id("node_id", request.node_id);
        let boot_id = fields.boot_id("boot_id", request.boot_id);
        fields.require(request.disks.len() <= DISKS_MAX, "disks", || format!("must be at most {DISKS_MAX}"));
        let disk = |disk: v1::NodeDisk| NodeDisk {
            attachment_id: fields.uuid("disks.attachment_id", &disk.attachment_id),
            state: fields.word("disks.state", disk.state, WORD_BYTES_MAX),
            state_reason: fields.word("disks.state_reason", disk.state_reason, REASON_BYTES_MAX),
            state_since_ms: disk.state_since_ms,
        };
        let disks = request.disks.into_iter().map(disk).collect();
        fields.require(request.conditions.len() <= CONDITIONS_MAX, "conditions", || {
            format!("must be at most {CONDITIONS_MAX}")
        });
        let condition = |condition: v1::NodeCondition| NodeCondition {
            id: fields.word("conditions.id", condition.id, WORD_BYTES_MAX),
            severity: fields.word("conditions.severity", condition.severity, WORD_BYTES_MAX),
            text: fields.word("conditions.text", condition.text, REASON_BYTES_MAX),
        };
        let conditions = request.conditions.into_iter().map(condition).collect();
        let report = fields.freeze_report(node_id.clone(), &request.daemon_id, request.freezes);
        fields.finish()?;
        let heard =
            self.looking(move |lifecycle| lifecycle.hear_of_node(&node_id, &boot_id, disks, conditions));
        heard.await?;
        let wait = Duration::from_millis(request.wait_ms.into());
        let wanted = self.calls.freezes.answer(&report, wait).await;
        Ok(v1::HeartbeatResponse {
            server_id: self.lifecycle.catalog().server_id().to_string(),
            freezes: wanted.into_iter().map(freezes::message).collect(),
        })
    }

    pub(super) async fn find_node(
        &self,
        scope: Scope,
        request: v1::GetNodeRequest,
    ) -> Result<v1::RegisteredNode, Status> {
        let mut fields = Fields::default();
        let node_id = fields.node_id("node_id", request.node_id);
        fields.finish()?;
        let found = self.looking(move |lifecycle| {
            let (record, seen) = lifecycle.node(&scope, &node_id)?;
            Ok(message(record, seen))
        });
        Ok(found.await?.into_inner())
    }

    pub(super) async fn page_of_nodes(
        &self,
        scope: Scope,
        request: v1::ListNodesRequest,
    ) -> Result<v1::ListNodesResponse, Status> {
        let token = PageToken::new("nodes", self.lifecycle.catalog().server_id());
        let mut fields = Fields::default();
        let after = match request.page_token.as_str() {
            "" => String::new(),
            text => {
                let after = token.key(text).map(str::to_owned);
                fields.require(after.is_some(), "page_token", || {
                    "is not a token of this list and server".to_owned()
                });
                fields.node_id("page_token", after.unwrap_or_default())
            }
        };
        fields.finish()?;
        let limit = page_limit(request.page_size);
        let page = self.looking(move |lifecycle| {
            let mut found = lifecycle.list_nodes(&scope, &after, limit + 1)?;
            let next_page_token = token.next(&mut found, limit, |(record, _)| &record.facts.node_id);
            // Without what may be more than a message takes; and a tenant hears nothing of others' disks.
            let node = |(record, seen)| {
                let told = message(record, seen);
                v1::RegisteredNode {
                    disks: Vec::new(),
                    conditions: Vec::new(),
                    disk_count: told.disk_count.filter(|_| scope.is_all()),
                    ..told
                }
            };
            let nodes = found.into_iter().map(node).collect();
            Ok(v1::ListNodesResponse { nodes, next_page_token })
        });
        Ok(page.await?.into_inner())
    }

    pub(super) async fn forget_node(
        &self,
        request: v1::DeleteNodeRequest,
    ) -> Result<v1::DeleteNodeResponse, Status> {
        let mut fields = Fields::default();
        let (node_id, etag) = (fields.node_id("node_id", request.node_id), request.etag);
        fields.finish()?;
        let existed =
            self.blocking(move |lifecycle| lifecycle.delete_node(&node_id, &etag)).await?.into_inner();
        Ok(v1::DeleteNodeResponse { existed })
    }
}

impl Fields {
    /// A short text for people or programs.
    pub(super) fn word(&mut self, field: &'static str, text: String, bytes_max: usize) -> String {
        let holds = text.len() <= bytes_max && !text.chars().any(char::is_control);
        self.require(holds, field, || {
            format!("must be at most {bytes_max} bytes without control characters")
        });
        text
    }
}

fn message(record: NodeRecord, seen: NodeSeen) -> v1::RegisteredNode {
    let etag = node_etag(&record);
    let NodeFacts { node_id, boot_id, version, labels, max_volumes } = record.facts;
    let disk = |disk: NodeDisk| v1::NodeDisk {
        attachment_id: disk.attachment_id.to_string(),
        state: disk.state,
        state_reason: disk.state_reason,
        state_since_ms: disk.state_since_ms,
    };
    let last_seen_age_ms = seen.age_ms(Instant::now());
    let condition = |condition: NodeCondition| v1::NodeCondition {
        id: condition.id,
        severity: condition.severity,
        text: condition.text,
    };
    v1::RegisteredNode {
        node_id,
        boot_id,
        version,
        labels: labels.into_iter().collect(),
        registered_at_ms: record.registered_at_ms,
        last_seen_at_ms: seen.at_ms,
        disk_count: Some(u32::try_from(seen.disks.len()).unwrap_or(u32::MAX)),
        disks: seen.disks.into_iter().map(disk).collect(),
        conditions: seen.conditions.into_iter().map(condition).collect(),
        last_seen_age_ms,
        max_volumes,
        etag,
    }
}
