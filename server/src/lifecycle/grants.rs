//! Grants: which node may have a volume, said apart from the attachment, and taken away together with it.
//!
//! ```text
//! grant:    row → answer
//! withdraw: row gone and attachment ending, at once → connections closed and their I/O finished → attachment's row gone → answer
//! ```
//! Owns which grants of a volume go together: those that attachments would. The volume's name is locked for all of it, as for an attach,
//! so that an attach under a grant comes before its withdrawal, and is ended by it, or after it, and is refused. Called by `management/`.

use super::volumes::{nodes_of, nodes_told};
use super::{DataSide, Lifecycle, LifecycleError, NameLock, SettingsError};
use crate::catalog::{AttachmentRecord, CatalogError, GrantRecord, VolumeRecord, VolumeState};

/// Which node is to have a volume, and how.
#[derive(Debug, Clone, Default)]
pub struct GrantWanted {
    /// The node.
    pub node_id: String,
    /// It may not write.
    pub read_only: bool,
    /// A node that has not registered gets nothing.
    pub node_must_be_registered: bool,
}

/// What was there of a grant that is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GrantEnded {
    /// The grant itself.
    pub existed: bool,
    /// An attachment of the node, which has ended.
    pub was_attached: bool,
}

/// Why a grant is not made, or stands in the way of something.
#[derive(Debug, thiserror::Error)]
pub enum GrantsError {
    /// An attach was to be under a grant.
    #[error("{name} is not granted to node {node_id}")]
    NotGranted {
        /// The volume or snapshot.
        name: String,
        /// The node.
        node_id: String,
    },
    /// An attach was to be under a grant, which is one to read only.
    #[error("volume {name} is granted to node {node_id} read-only")]
    GrantedToRead {
        /// The volume.
        name: String,
        /// The node.
        node_id: String,
    },
    /// The volume is granted to nodes beside which there can be no such grant, or none at all.
    #[error("volume {name} is granted to node {node_ids}")]
    Granted {
        /// The volume.
        name: String,
        /// Which nodes.
        node_ids: String,
    },
    /// The node's grant is another.
    #[error("volume {name} is granted to node {node_id} {}", mode(*.read_only))]
    Differently {
        /// The volume.
        name: String,
        /// The node.
        node_id: String,
        /// How it has it.
        read_only: bool,
    },
    /// The node can have no more volumes.
    #[error(
        "node {node_id} has {volumes} volumes, and can have {max_volumes}: volume {name} is not granted to it"
    )]
    NodeFull {
        /// The volume.
        name: String,
        /// The node.
        node_id: String,
        /// What is granted or attached to it.
        volumes: u32,
        /// As it registered.
        max_volumes: u32,
    },
}

fn mode(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "to read and write" }
}

/// Whether two nodes can have grants of one volume: as with attachments, where all only read, or all write to a volume made for it.
fn go_together(read_only: bool, other_read_only: bool, is_shared: bool) -> bool {
    read_only == other_read_only && (read_only || is_shared)
}

/// Whether what a node would attach under a grant can be beside what another has.
fn goes_with_attachment(read_only: bool, held: &AttachmentRecord) -> bool {
    held.is_shared && held.read_only == read_only
}

/// Whether an attachment keeps a grant from being made: another node's that it does not go with, or the node's own that writes where the
/// grant is one to read.
fn stands_in_the_way(node_id: &str, read_only: bool, held: &AttachmentRecord) -> bool {
    if held.node_id == node_id {
        return read_only && !held.read_only;
    }
    !goes_with_attachment(read_only, held)
}

/// Looks for the grant that an attach wants to be made under, among those of the volume.
fn check(granted: &[GrantRecord], name: &str, node_id: &str, read_only: bool) -> Result<(), GrantsError> {
    let (name, node_id) = (name.to_owned(), node_id.to_owned());
    match granted.iter().find(|grant| grant.node_id == node_id) {
        None => Err(GrantsError::NotGranted { name, node_id }),
        Some(grant) if grant.read_only && !read_only => Err(GrantsError::GrantedToRead { name, node_id }),
        Some(_) => Ok(()),
    }
}

fn nodes<'a>(granted: impl Iterator<Item = &'a GrantRecord>) -> String {
    nodes_told(granted.map(|grant| grant.node_id.as_str()))
}

impl<D: DataSide> Lifecycle<D> {
    /// Lets a node attach the volume; or finds that it may.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; [`NodesError::NotFound`]: the node has to be registered; [`GrantsError::Differently`];
    /// [`GrantsError::Granted`] and [`LifecycleError::VolumeAttached`]: another node is in the way, or what the node itself has attached
    /// and writes to; [`SettingsError::ReadOnly`]; [`GrantsError::NodeFull`];
    /// [`LifecycleError::Unfenced`]: repeat the call; the catalog's failure.
    ///
    /// [`NodesError::NotFound`]: super::NodesError::NotFound
    pub fn create_grant(
        &self,
        lock: &NameLock,
        wanted: &GrantWanted,
    ) -> Result<(VolumeRecord, GrantRecord), LifecycleError> {
        let volume = self.volume(lock.name())?;
        let GrantWanted { node_id, read_only, node_must_be_registered } = wanted;
        self.require_registered(node_id, *node_must_be_registered)?;
        let (name, granted) = (volume.name.clone(), self.catalog.grants_of_volume(volume.volume_uid)?);
        if let Some(grant) = granted.iter().find(|grant| grant.node_id == *node_id) {
            if grant.read_only != *read_only {
                let (node_id, read_only) = (node_id.clone(), grant.read_only);
                return Err(GrantsError::Differently { name, node_id, read_only }.into());
            }
            return Ok((volume, grant.clone()));
        }
        if volume.settings.is_read_only && !read_only {
            return Err(SettingsError::ReadOnly(name).into());
        }
        let is_shared = volume.settings.is_shared;
        let node_ids =
            nodes(granted.iter().filter(|grant| !go_together(*read_only, grant.read_only, is_shared)));
        if !node_ids.is_empty() {
            return Err(GrantsError::Granted { name, node_ids }.into());
        }
        self.finish_ending(&volume)?;
        let mut held = self.catalog.attachments_of_volume(volume.volume_uid)?;
        held.retain(|(held, _)| stands_in_the_way(node_id, *read_only, held));
        if !held.is_empty() {
            return Err(LifecycleError::VolumeAttached { name, node_id: nodes_of(&held) });
        }
        let add = || self.catalog.add_grant(volume.volume_uid, node_id, *read_only);
        let grant = match self.while_registered(node_id, *node_must_be_registered, add) {
            Err(LifecycleError::Catalog(CatalogError::NodeFull { volumes, max_volumes })) => {
                let node_id = node_id.clone();
                return Err(GrantsError::NodeFull { name, node_id, volumes, max_volumes }.into());
            }
            added => added?,
        };
        tracing::info!(name, node_id, read_only, "volume granted");
        Ok((volume, grant))
    }

    /// Takes a node's grant of the volume away, and what it has attached of it, under the grant or not. When this has returned, the node
    /// does not have the volume, and does not get it under a grant.
    ///
    /// # Errors
    /// [`LifecycleError::Unfenced`]: the grant is gone, and the attachment's I/O has not finished in time; repeat the call. The catalog's
    /// failure.
    pub fn delete_grant(&self, lock: &NameLock, node_id: &str) -> Result<GrantEnded, LifecycleError> {
        let Some((volume, VolumeState::Ready)) = self.catalog.volume_in_any_state(lock.name())? else {
            return Ok(GrantEnded::default());
        };
        let withdrawn = self.catalog.withdraw_grant(volume.volume_uid, node_id)?;
        if withdrawn.existed {
            tracing::info!(name = %volume.name, node_id, "grant withdrawn");
        }
        for (held, _) in self.catalog.attachments_of_volume(volume.volume_uid)? {
            if held.node_id == node_id {
                self.end(&volume, &held, false)?;
            }
        }
        Ok(GrantEnded { existed: withdrawn.existed, was_attached: withdrawn.was_attached })
    }

    /// Finishes the end of attachments that a former call took away with their grants. No other is touched.
    ///
    /// # Errors
    /// [`LifecycleError::Unfenced`]: repeat the call; the catalog's failure.
    pub fn finish_withdrawal(&self, lock: &NameLock) -> Result<(), LifecycleError> {
        match self.catalog.volume_in_any_state(lock.name())? {
            Some((volume, VolumeState::Ready)) => self.finish_ending(&volume),
            _ => Ok(()),
        }
    }

    /// Refuses an attach that is to be under a grant, and has none.
    pub(super) fn require_granted(
        &self,
        volume: &VolumeRecord,
        node_id: &str,
        read_only: bool,
    ) -> Result<(), LifecycleError> {
        let granted = self.catalog.grants_of_volume(volume.volume_uid)?;
        Ok(check(&granted, &volume.name, node_id, read_only)?)
    }

    /// Refuses to delete a volume that nodes may attach.
    pub(super) fn refuse_granted(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        let node_ids = nodes(self.catalog.grants_of_volume(volume.volume_uid)?.iter());
        if node_ids.is_empty() {
            return Ok(());
        }
        Err(GrantsError::Granted { name: volume.name.clone(), node_ids }.into())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn grant(node_id: &str, read_only: bool) -> GrantRecord {
        GrantRecord { volume_uid: Uuid::nil(), node_id: node_id.to_owned(), read_only, created_at_ms: 1 }
    }

    #[test]
    fn readers_go_together_and_writers_where_the_volume_is_shared() {
        for (read_only, other_read_only, is_shared, expected) in [
            (true, true, false, true),
            (true, true, true, true),
            (false, false, true, true),
            (false, false, false, false),
            (true, false, true, false),
            (false, true, true, false),
            (true, false, false, false),
        ] {
            let told = go_together(read_only, other_read_only, is_shared);
            assert_eq!(told, expected, "{read_only}, {other_read_only}, {is_shared}");
        }
    }

    #[test]
    fn of_many_nodes_an_error_names_the_first() {
        let grants: Vec<GrantRecord> = (0..1000).map(|n| grant(&format!("n{n}"), true)).collect();
        let told = nodes(grants.iter());
        assert!(told.starts_with("n0, n1, ") && told.ends_with(", n15 and 984 others"), "{told}");
        assert_eq!(nodes(grants[..16].iter()).matches(", ").count(), 15);
        assert!(nodes(grants[..17].iter()).ends_with(", n15 and 1 other"));
        let long: Vec<GrantRecord> = (0..10).map(|_| grant(&"n".repeat(256), true)).collect();
        assert!(nodes(long.iter()).len() < 2100, "it is told in headers");
    }

    #[test]
    fn who_may_write_may_read_and_nobody_else_may_do_either() {
        let granted = [grant("reader", true), grant("writer", false)];
        let may = |node_id, read_only| check(&granted, "vol-1", node_id, read_only);
        assert!(may("writer", false).is_ok() && may("writer", true).is_ok() && may("reader", true).is_ok());
        assert!(matches!(may("reader", false), Err(GrantsError::GrantedToRead { .. })));
        for read_only in [true, false] {
            let refused = may("other", read_only).unwrap_err();
            assert_eq!(refused.to_string(), "vol-1 is not granted to node other");
        }
    }
}
