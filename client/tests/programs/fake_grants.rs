//! The grants of the fake storage server.

use std::collections::BTreeMap;

use proto::error_reason as reason;
use proto::v1;
use tonic::{Code, Status};

use crate::fake_server::refuse;

/// Grants that a page of the list holds: fewer than asked for, so that paging shows.
const PAGE_GRANTS: usize = 2;

/// What the server knows of grants.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    /// As a server of before there were grants.
    pub(crate) are_unknown: bool,
    /// By volume and node.
    pub(crate) granted: BTreeMap<(String, String), v1::Grant>,
    /// All CreateGrant calls.
    pub(crate) asked: Vec<v1::CreateGrantRequest>,
}

impl Grants {
    fn look(&self) -> Result<(), Status> {
        if self.are_unknown { Err(Status::unimplemented("")) } else { Ok(()) }
    }

    pub(crate) fn create(&mut self, request: v1::CreateGrantRequest) -> Result<v1::Grant, Status> {
        self.look()?;
        self.asked.push(request.clone());
        let v1::CreateGrantRequest { volume_name, node_id, read_only, .. } = request;
        let of_volume = self.granted.values().filter(|grant| grant.volume_name == volume_name);
        if let Some(other) = of_volume.clone().find(|grant| grant.node_id != node_id && !read_only) {
            let message = format!("volume {volume_name} is granted to node {}", other.node_id);
            let next = "take it from there first";
            return Err(refuse(Code::FailedPrecondition, reason::VOLUME_GRANTED, message, next));
        }
        let key = (volume_name.clone(), node_id.clone());
        let grant = self.granted.entry(key).or_insert_with(|| v1::Grant {
            volume_name,
            volume_uid: "8f14e45f-ceea-467f-a0e6-4f1a1d2c9b10".to_owned(),
            node_id,
            read_only,
            created_at_ms: 1_772_366_399_000,
        });
        if grant.read_only != read_only {
            let message = format!("volume {} is granted otherwise", grant.volume_name);
            let next = "take the grant away first";
            return Err(refuse(Code::AlreadyExists, reason::GRANTED_DIFFERENTLY, message, next));
        }
        Ok(grant.clone())
    }

    pub(crate) fn delete(&mut self, request: v1::DeleteGrantRequest) -> Result<bool, Status> {
        self.look()?;
        Ok(self.granted.remove(&(request.volume_name, request.node_id)).is_some())
    }

    /// Refuses an attach under a grant that there is not.
    pub(crate) fn require(&self, volume_name: &str, node_id: &str) -> Result<(), Status> {
        if self.granted.contains_key(&(volume_name.to_owned(), node_id.to_owned())) {
            return Ok(());
        }
        let message = format!("{volume_name} is not granted to node {node_id}");
        Err(refuse(Code::FailedPrecondition, reason::VOLUME_NOT_GRANTED, message, "grant it first"))
    }

    pub(crate) fn page(&self, request: &v1::ListGrantsRequest) -> Result<v1::ListGrantsResponse, Status> {
        self.look()?;
        let is_wanted = |grant: &&v1::Grant| {
            let is = |wanted: &str, found: &str| wanted.is_empty() || wanted == found;
            is(&request.volume_name, &grant.volume_name) && is(&request.node_id, &grant.node_id)
        };
        let key = |grant: &v1::Grant| format!("{}/{}", grant.volume_name, grant.node_id);
        let mut rest =
            self.granted.values().filter(is_wanted).filter(|grant| key(grant) > request.page_token).cloned();
        let grants: Vec<v1::Grant> = rest.by_ref().take(PAGE_GRANTS).collect();
        let last = grants.last().map(key).unwrap_or_default();
        let next_page_token = if rest.next().is_some() { last } else { String::new() };
        Ok(v1::ListGrantsResponse { grants, next_page_token })
    }
}
