//! Which nodes have to freeze what for a snapshot.
//!
//! Looks only; who asks the nodes is `management/freezes/`. Called by `management/`, also at the instant itself, with the volumes' names
//! locked: what was frozen has to be what the volumes' writers have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use uuid::Uuid;

use super::snapshots::Found;
use super::{DataSide, Lifecycle, LifecycleError, NameLock, SettingsError, SnapshotError};
use crate::catalog::{AttachmentState, VolumeRecord};

/// A node that was not heard of for so long is not asked: six heartbeats.
const SILENT_AFTER: Duration = Duration::from_secs(60);

/// What a snapshot of frozen file systems needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FreezePlan {
    /// Nothing: the snapshots are there, and called frozen.
    There(Vec<Uuid>),
    /// That these attachments are frozen, by their nodes.
    Freeze(BTreeMap<String, BTreeSet<Uuid>>),
}

/// Why a snapshot has no frozen file systems.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Nobody has it mounted.
    #[error("volume {0} is attached to no node that writes to it: nothing of it can be frozen")]
    NotAttached(String),
    /// Each has a state of its own.
    #[error(
        "volume {0} is attached by several nodes that write to it: a freeze on one stops none of the others"
    )]
    SeveralNodes(String),
    /// It cannot be asked.
    #[error("volume {name} is attached to {node_id}, which has not registered: the server cannot ask it")]
    NotRegistered {
        /// The volume.
        name: String,
        /// Who has it.
        node_id: String,
    },
    /// It does not ask what to do.
    #[error("volume {name} is attached to {node_id}, of which nothing was heard for {} s", .silent_for.as_secs())]
    Silent {
        /// The volume.
        name: String,
        /// Who has it.
        node_id: String,
        /// Since when.
        silent_for: Duration,
    },
    /// Others have it attached than were asked to freeze it.
    #[error("the volumes were attached or detached while they were frozen")]
    Moved,
    /// As the nodes say, or do not say.
    #[error("the file system was not frozen: {0}")]
    NotFrozen(String),
    /// The same at the thaw, when the snapshots were taken.
    #[error("the file system was not frozen all the time: {0}; the snapshot was deleted")]
    NotHeld(String),
}

impl FreezeError {
    /// Its word in the API.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAttached(_) => reason::NOT_MOUNTED,
            _ => reason::FREEZE_FAILED,
        }
    }

    /// What is to be done, for people.
    pub fn next(&self) -> &'static str {
        match self {
            Self::NotAttached(_) => "attach it and mount it; or take the snapshot without a freeze",
            Self::SeveralNodes(_) => {
                "detach it from all of the nodes but one; or take the snapshot without a freeze"
            }
            Self::NotRegistered { .. } | Self::Silent { .. } => {
                "see why the node daemon there is not heard (volctl node list, its log), then repeat the call; or take the snapshot \
                 without a freeze"
            }
            Self::NotFrozen(_) => {
                "mend what it says, then repeat the call; or take the snapshot without a freeze"
            }
            Self::Moved | Self::NotHeld(_) => "repeat the call; or take the snapshot without a freeze",
        }
    }
}

impl<D: DataSide> Lifecycle<D> {
    /// What is to be frozen for snapshots of these volumes, whose names are locked.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; [`SnapshotError::Exists`]; [`SettingsError::Shared`]; [`FreezeError`]; the catalog's failure.
    pub fn freeze_plan(
        &self,
        locks: &[NameLock],
        volume_names: &[String],
        name: &str,
    ) -> Result<FreezePlan, LifecycleError> {
        assert!(volume_names.iter().all(|name| locks.iter().any(|lock| lock.name() == name)));
        let volumes: Vec<VolumeRecord> =
            volume_names.iter().map(|name| self.volume(name)).collect::<Result<_, _>>()?;
        if let Found::All(found) = self.found(&volumes, name)? {
            if let Some((other, _)) = found.iter().find(|(snapshot, _)| !snapshot.is_frozen) {
                let why = "and the file system was not frozen then";
                return Err(SnapshotError::Exists { export_name: other.export_name(), why }.into());
            }
            return Ok(FreezePlan::There(found.iter().map(|(snapshot, _)| snapshot.snapshot_uid).collect()));
        }
        let mut parts: BTreeMap<String, BTreeSet<Uuid>> = BTreeMap::new();
        for volume in &volumes {
            let (node_id, attachment_id) = self.writer_of(volume)?;
            parts.entry(node_id).or_default().insert(attachment_id);
        }
        Ok(FreezePlan::Freeze(parts))
    }

    /// The node that has the volume attached for writing, and may be asked; and its attachment.
    fn writer_of(&self, volume: &VolumeRecord) -> Result<(String, Uuid), LifecycleError> {
        let name = volume.name.clone();
        if volume.settings.is_shared {
            let what = "a freeze on one machine stops none of the others";
            return Err(SettingsError::Shared { name, what }.into());
        }
        let mut held = self.catalog.attachments_of_volume(volume.volume_uid)?;
        held.retain(|(held, state)| !held.read_only && *state == AttachmentState::Active);
        let writer = match held.as_slice() {
            [(writer, _)] => writer,
            [] => return Err(FreezeError::NotAttached(name).into()),
            _ => return Err(FreezeError::SeveralNodes(name).into()),
        };
        let node_id = writer.node_id.clone();
        if self.catalog.node(&node_id)?.is_none() {
            return Err(FreezeError::NotRegistered { name, node_id }.into());
        }
        // One that was not heard of since the server's start may come.
        let silent_for = self.seen_of(&node_id).age_ms(Instant::now()).map(Duration::from_millis);
        if let Some(silent_for) = silent_for.filter(|silent_for| *silent_for > SILENT_AFTER) {
            return Err(FreezeError::Silent { name, node_id, silent_for }.into());
        }
        Ok((node_id, writer.attachment_id))
    }
}
