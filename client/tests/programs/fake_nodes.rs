//! The nodes of the fake storage server: what registered, and every heartbeat.

use std::collections::BTreeMap;

use proto::error_reason as reason;
use proto::v1;
use tonic::{Code, Status};

use crate::fake_server::refuse;

/// Nodes that a page of the list holds: fewer than asked for, so that paging shows.
const PAGE_NODES: usize = 2;

/// How the server takes calls about nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Takes {
    /// As the API says.
    #[default]
    All,
    /// As a server of before there were nodes.
    None,
    /// As where the caller's certificate does not name the node.
    Refused,
}

/// What the server knows of nodes.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    pub(crate) takes: Takes,
    /// By name.
    pub(crate) registered: BTreeMap<String, v1::RegisteredNode>,
    /// All RegisterNode calls, also those that were refused.
    pub(crate) registrations: Vec<v1::RegisterNodeRequest>,
    /// Those that were heard.
    pub(crate) heartbeats: Vec<v1::HeartbeatRequest>,
    /// What the next one is answered with.
    pub(crate) wanted: Vec<v1::WantedFreeze>,
}

impl Nodes {
    fn look(&self) -> Result<(), Status> {
        match self.takes {
            Takes::All => Ok(()),
            Takes::None => Err(Status::unimplemented("")),
            Takes::Refused => {
                let message = "the certificate does not allow the caller to speak for this node".to_owned();
                let next = "issue another certificate";
                Err(refuse(Code::PermissionDenied, reason::NOT_AUTHORIZED, message, next))
            }
        }
    }

    pub(crate) fn register(
        &mut self,
        request: v1::RegisterNodeRequest,
    ) -> Result<v1::RegisteredNode, Status> {
        self.registrations.push(request.clone());
        self.look()?;
        let v1::RegisterNodeRequest { node_id, boot_id, version, labels, max_volumes, .. } = request;
        let node = v1::RegisteredNode {
            node_id: node_id.clone(),
            boot_id,
            version,
            labels,
            max_volumes,
            registered_at_ms: 1_772_366_399_000,
            last_seen_at_ms: 1_772_366_399_000,
            ..Default::default()
        };
        self.registered.insert(node_id, node.clone());
        Ok(node)
    }

    pub(crate) fn hear(&mut self, request: v1::HeartbeatRequest) -> Result<Vec<v1::WantedFreeze>, Status> {
        self.look()?;
        let known = self.registered.get_mut(&request.node_id);
        let known = known.filter(|known| known.boot_id == request.boot_id).ok_or_else(not_found)?;
        known.disk_count = u32::try_from(request.disks.len()).ok();
        (known.disks, known.conditions) = (request.disks.clone(), request.conditions.clone());
        self.heartbeats.push(request);
        Ok(std::mem::take(&mut self.wanted))
    }

    pub(crate) fn get(&self, node_id: &str) -> Result<v1::RegisteredNode, Status> {
        self.look()?;
        self.registered.get(node_id).cloned().ok_or_else(not_found)
    }

    pub(crate) fn page(&self, after: &str) -> Result<v1::ListNodesResponse, Status> {
        self.look()?;
        let mut rest = self.registered.values().filter(|node| node.node_id.as_str() > after).cloned();
        let nodes: Vec<v1::RegisteredNode> = rest
            .by_ref()
            .take(PAGE_NODES)
            .map(|node| v1::RegisteredNode { disks: Vec::new(), conditions: Vec::new(), ..node })
            .collect();
        let last = nodes.last().map(|node| node.node_id.clone()).unwrap_or_default();
        let next_page_token = if rest.next().is_some() { last } else { String::new() };
        Ok(v1::ListNodesResponse { nodes, next_page_token })
    }

    /// Whether something is attached to it is the caller's to know.
    pub(crate) fn delete(&mut self, node_id: &str, is_attached: bool) -> Result<bool, Status> {
        self.look()?;
        if is_attached {
            let message = format!("something is attached to the node {node_id}");
            let next = "detach what is attached to it";
            return Err(refuse(Code::FailedPrecondition, reason::NODE_ATTACHED, message, next));
        }
        Ok(self.registered.remove(node_id).is_some())
    }
}

fn not_found() -> Status {
    let message = "no node of that name has registered, or not in this boot".to_owned();
    refuse(Code::NotFound, reason::NODE_NOT_FOUND, message, "list the nodes to see which there are")
}
