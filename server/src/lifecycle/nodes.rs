//! The nodes that volumes are given to: who is known, and who was heard of when.
//!
//! Known is who registered, until it is deleted; that is in the catalog. What a heartbeat says is in memory alone: it is old soon,
//! and must not cost a commit. Never decides who may have a volume; an attach that asks for a registered node writes its row while
//! none is forgotten ([`Lifecycle::while_registered`]), so that it is either refused, or keeps its node known.
//! Called by `management/`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use super::etags::node_etag;
use super::{DataSide, Lifecycle, LifecycleError};
use crate::catalog::{AttachmentFilter, CatalogError, ListedAttachment, NodeFacts, NodeRecord, now_ms};
use crate::scope::Scope;

/// Nodes that are known at most: each has some 24 KiB in the catalog and some 170 KiB in memory, where it says as much as it may. Where no
/// certificates are asked for, anybody could make up names without end.
const NODES_MAX: u64 = 10_000;

/// What was heard of each node since the server's start, by its name.
pub(super) type NodesSeen = Arc<Mutex<HashMap<String, NodeSeen>>>;

/// What a node said last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSeen {
    /// When, in milliseconds since the Unix epoch; 0: it was not heard of.
    pub at_ms: i64,
    /// The same by a clock that nobody sets.
    pub heard_at: Option<Instant>,
    /// Which boot of it.
    pub boot_id: String,
    /// Its disks of this server's volumes.
    pub disks: Vec<NodeDisk>,
    /// What is wrong there.
    pub conditions: Vec<NodeCondition>,
}

impl NodeSeen {
    /// How long ago it was heard of by `now`, in milliseconds; `None` where it was not.
    pub fn age_ms(&self, now: Instant) -> Option<u64> {
        let age = now.saturating_duration_since(self.heard_at?);
        Some(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Whether there is room for a node, where `count` are known.
fn may_register(is_known: bool, count: u64, nodes_max: u64) -> Result<(), NodesError> {
    if is_known || count < nodes_max { Ok(()) } else { Err(NodesError::TooMany(nodes_max)) }
}

/// Something that is wrong with a node, as it tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCondition {
    /// What was looked at.
    pub id: String,
    /// How bad it is, in the node's word.
    pub severity: String,
    /// What is wrong and what to do, for people.
    pub text: String,
}

/// A disk, as its node tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeDisk {
    /// Which attachment it is of.
    pub attachment_id: Uuid,
    /// How it is, in the node's word.
    pub state: String,
    /// Why, for people.
    pub state_reason: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub state_since_ms: i64,
}

/// Why a call about a node is refused.
#[derive(Debug, thiserror::Error)]
pub enum NodesError {
    /// It has not registered, or was deleted.
    #[error("no node {0} has registered, or not in this boot")]
    NotFound(String),
    /// It is to be registered.
    #[error("{0} nodes are known, and there may be no more")]
    TooMany(u64),
    /// It is not as the caller has seen it.
    #[error("the node {node_id} has registered anew: its etag is {etag} now")]
    Changed {
        /// Its name.
        node_id: String,
        /// As it is now.
        etag: String,
    },
    /// It is to be deleted.
    #[error("something is attached to the node {0}")]
    Attached(String),
    /// The same.
    #[error("something is granted to the node {0}")]
    Granted(String),
}

impl<D: DataSide> Lifecycle<D> {
    /// Makes a node known, or writes down what it says anew.
    ///
    /// # Errors
    /// [`NodesError::TooMany`]; the catalog's failure.
    pub fn register_node(&self, facts: &NodeFacts) -> Result<(NodeRecord, NodeSeen), LifecycleError> {
        // One after the other with what is heard and forgotten.
        let mut nodes = self.nodes_seen();
        let is_known = self.catalog.node(&facts.node_id)?.is_some();
        may_register(is_known, self.catalog.count_nodes()?, NODES_MAX)?;
        let record = self.catalog.put_node(facts)?;
        let seen = nodes.entry(facts.node_id.clone()).or_default();
        if seen.boot_id != facts.boot_id {
            *seen = NodeSeen { boot_id: facts.boot_id.clone(), ..NodeSeen::default() };
        }
        (seen.at_ms, seen.heard_at) = (now_ms(), Some(Instant::now()));
        Ok((record, seen.clone()))
    }

    /// Remembers what a node says of its disks and of itself.
    ///
    /// # Errors
    /// [`NodesError::NotFound`]; the catalog's failure.
    pub fn hear_of_node(
        &self,
        node_id: &str,
        boot_id: &str,
        disks: Vec<NodeDisk>,
        conditions: Vec<NodeCondition>,
    ) -> Result<(), LifecycleError> {
        let mut nodes = self.nodes_seen();
        let known = self.catalog.node(node_id)?.filter(|known| known.facts.boot_id == boot_id);
        if known.is_none() {
            return Err(NodesError::NotFound(node_id.to_owned()).into());
        }
        let (at_ms, heard_at) = (now_ms(), Some(Instant::now()));
        let seen = NodeSeen { at_ms, heard_at, boot_id: boot_id.to_owned(), disks, conditions };
        nodes.insert(node_id.to_owned(), seen);
        Ok(())
    }

    /// A node, and what was heard of it last: of its disks those that are in the scope. One that has nothing of the scope is none.
    ///
    /// # Errors
    /// [`NodesError::NotFound`]; the catalog's failure.
    pub fn node(&self, scope: &Scope, node_id: &str) -> Result<(NodeRecord, NodeSeen), LifecycleError> {
        let known = self.catalog.node(node_id)?;
        let is_seen = scope.is_all() || self.catalog.node_has_of(scope, node_id)?;
        let known = known.filter(|_| is_seen).ok_or_else(|| NodesError::NotFound(node_id.to_owned()))?;
        let mut seen = self.seen_of(node_id);
        if !scope.is_all() {
            let of_node =
                AttachmentFilter { node_id: Some(node_id.to_owned()), ..AttachmentFilter::default() };
            let of_node = of_node.within(scope);
            let held = self.catalog.list_attachments(&of_node, &ListedAttachment::default(), u32::MAX)?;
            let is_held = |id| held.iter().any(|(_, (held, _))| held.attachment_id == id);
            seen.disks.retain(|disk| is_held(disk.attachment_id));
        }
        Ok((known, seen))
    }

    /// The same of at most `limit` nodes of the scope whose names come after `after`.
    ///
    /// # Errors
    /// The catalog's failure.
    pub fn list_nodes(
        &self,
        scope: &Scope,
        after: &str,
        limit: u32,
    ) -> Result<Vec<(NodeRecord, NodeSeen)>, LifecycleError> {
        let found = self.catalog.list_nodes(scope, after, limit)?;
        Ok(found
            .into_iter()
            .map(|node| {
                let seen = self.seen_of(&node.facts.node_id);
                (node, seen)
            })
            .collect())
    }

    /// Forgets a node, if it is as the etag says, where that is not empty; false where it was not known.
    ///
    /// # Errors
    /// [`NodesError::Changed`], [`NodesError::Attached`], [`NodesError::Granted`]; the catalog's failure.
    pub fn delete_node(&self, node_id: &str, wanted_etag: &str) -> Result<bool, LifecycleError> {
        let mut nodes = self.nodes_seen();
        if !wanted_etag.is_empty()
            && let Some(node) = self.catalog.node(node_id)?
        {
            let (node_id, etag) = (node_id.to_owned(), node_etag(&node));
            if etag != wanted_etag {
                return Err(NodesError::Changed { node_id, etag }.into());
            }
        }
        let existed = self.catalog.forget_node(node_id)?;
        if !existed && self.catalog.node(node_id)?.is_some() {
            let node_id = node_id.to_owned();
            let is_granted = self.catalog.node_has_grants(&node_id)?;
            let why = if is_granted { NodesError::Granted(node_id) } else { NodesError::Attached(node_id) };
            return Err(why.into());
        }
        nodes.remove(node_id);
        if existed {
            tracing::info!(node_id, "node deleted");
        }
        Ok(existed)
    }

    /// Refuses a node that nobody knows, where it has to be known.
    ///
    /// # Errors
    /// [`NodesError::NotFound`]; the catalog's failure.
    pub(super) fn require_registered(&self, node_id: &str, is_required: bool) -> Result<(), LifecycleError> {
        if is_required && self.catalog.node(node_id)?.is_none() {
            return Err(NodesError::NotFound(node_id.to_owned()).into());
        }
        Ok(())
    }

    /// The same, and no node is forgotten before `commit` has ended: a commit, which waits for no disk of a volume.
    ///
    /// # Errors
    /// As of [`Self::require_registered`]; what `commit` returns.
    pub(super) fn while_registered<T>(
        &self,
        node_id: &str,
        is_required: bool,
        commit: impl FnOnce() -> Result<T, CatalogError>,
    ) -> Result<T, LifecycleError> {
        let _nothing_is_forgotten = is_required.then(|| self.nodes_seen());
        self.require_registered(node_id, is_required)?;
        Ok(commit()?)
    }

    pub(super) fn seen_of(&self, node_id: &str) -> NodeSeen {
        self.nodes_seen().get(node_id).cloned().unwrap_or_default()
    }

    fn nodes_seen(&self) -> std::sync::MutexGuard<'_, HashMap<String, NodeSeen>> {
        self.nodes_seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_age_does_not_depend_on_the_date_and_what_was_never_has_none() {
        let heard_at = Instant::now();
        // By a clock that was an hour ahead then.
        let seen = NodeSeen { at_ms: now_ms() + 3_600_000, heard_at: Some(heard_at), ..NodeSeen::default() };
        assert_eq!(seen.age_ms(heard_at), Some(0));
        assert_eq!(seen.age_ms(heard_at + Duration::from_millis(61_002)), Some(61_002));
        assert_eq!(NodeSeen::default().age_ms(heard_at), None);
    }

    #[test]
    fn who_is_new_needs_room_and_who_is_known_does_not() {
        assert!(may_register(false, 2, 3).is_ok());
        assert!(matches!(may_register(false, 3, 3), Err(NodesError::TooMany(3))));
        assert!(matches!(may_register(false, 4, 3), Err(NodesError::TooMany(3))));
        assert!(may_register(true, 3, 3).is_ok() && may_register(true, 4, 3).is_ok());
    }
}
