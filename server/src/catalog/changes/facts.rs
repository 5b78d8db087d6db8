//! What is told of an object that is watched, as the catalog's triggers wrote it.
//!
//! Words stay words: what a later program writes and this one does not know is passed on as unknown, and is no damage. Never holds an
//! attachment's secret. Read by [`super`], made into messages by `management/watch/`.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// Of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct VolumeFacts {
    /// What people call it.
    pub name: String,
    /// Its size.
    pub capacity_bytes: u64,
    /// Its logical block size.
    pub block_size_bytes: u32,
    /// Where its bytes are: `file`, `memory`, `device` or `lvm`.
    pub backend: String,
    /// 0 or 1, as all flags here.
    pub write_cache_on: u8,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// By key.
    #[serde(deserialize_with = "labels")]
    pub labels: BTreeMap<String, String>,
    /// For people.
    pub description: String,
    /// It is not deleted or restored.
    pub is_protected: u8,
    /// Nobody writes to it.
    pub is_read_only: u8,
    /// Several may write to it.
    pub is_shared: u8,
    /// Who writes to it encrypts.
    pub is_encrypted: u8,
    /// What is known of its bytes.
    pub content: String,
    /// Who formats it, if somebody does.
    pub initialising_attachment_id: String,
    /// Limits, as `settings.rs` has them.
    pub read_iops: u64,
    /// The same of writes.
    pub write_iops: u64,
    /// Bytes that are read.
    pub read_bytes_per_second: u64,
    /// Bytes that are written.
    pub write_bytes_per_second: u64,
    /// Seconds that may be saved up.
    pub burst_seconds: u32,
    /// What it was cloned from.
    pub source_uid: String,
}

/// Of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct AttachmentFacts {
    /// Of its volume or snapshot.
    pub volume_uid: String,
    /// What that was called at the time.
    pub volume_name: String,
    /// Who has it.
    pub node_id: String,
    /// It only reads.
    pub read_only: u8,
    /// Others may have one as well.
    pub is_shared: u8,
    /// Of the volume, when it was made.
    pub generation: u64,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// The boot that has it.
    pub boot_id: String,
    /// Of a snapshot's; empty otherwise.
    pub snapshot_uid: String,
}

/// Of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct SnapshotFacts {
    /// Among those of its volume.
    pub name: String,
    /// Of the volume it was taken of.
    pub volume_uid: String,
    /// What that was called at the time; empty where it was gone.
    pub volume_name: String,
    /// Its size.
    pub capacity_bytes: u64,
    /// Its logical block size.
    pub block_size_bytes: u32,
    /// Its instant, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// The same for all of one instant.
    pub group_uid: String,
    /// What was known of the bytes.
    pub content: String,
    /// The file systems were frozen.
    pub is_frozen: u8,
    /// Of which freeze it is.
    pub freeze_id: String,
    /// As its volume was.
    pub is_encrypted: u8,
}

/// Of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct NodeFacts {
    /// The boot that registered last.
    pub boot_id: String,
    /// Of its node daemon.
    pub version: String,
    /// Where and what it is.
    #[serde(deserialize_with = "labels")]
    pub labels: BTreeMap<String, String>,
    /// Milliseconds since the Unix epoch.
    pub registered_at_ms: i64,
}

/// Of a grant.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct GrantFacts {
    /// Of its volume.
    pub volume_uid: String,
    /// What that was called at the time.
    pub volume_name: String,
    /// Who may attach it.
    pub node_id: String,
    /// It may not write.
    pub read_only: u8,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// An object that is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Facts {
    /// A volume.
    Volume(VolumeFacts),
    /// An attachment.
    Attachment(AttachmentFacts),
    /// A snapshot.
    Snapshot(SnapshotFacts),
    /// A node.
    Node(NodeFacts),
    /// A grant.
    Grant(GrantFacts),
}

/// The kinds of objects that are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WatchedKind {
    /// Volumes.
    Volume,
    /// Attachments, of volumes and snapshots.
    Attachment,
    /// Snapshots.
    Snapshot,
    /// Nodes.
    Node,
    /// Grants.
    Grant,
}

impl WatchedKind {
    /// All of them, in the order in which what is there is told: what others refer to comes first.
    pub const ALL: [Self; 5] = [Self::Node, Self::Volume, Self::Snapshot, Self::Grant, Self::Attachment];

    /// The word for it in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Volume => "volume",
            Self::Attachment => "attachment",
            Self::Snapshot => "snapshot",
            Self::Node => "node",
            Self::Grant => "grant",
        }
    }

    /// Of the word for it; `None`: a later program's.
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

impl Facts {
    /// Reads what was written of an object of that kind.
    pub(super) fn parse(kind: WatchedKind, text: &str) -> serde_json::Result<Self> {
        Ok(match kind {
            WatchedKind::Volume => Self::Volume(serde_json::from_str(text)?),
            WatchedKind::Attachment => Self::Attachment(serde_json::from_str(text)?),
            WatchedKind::Snapshot => Self::Snapshot(serde_json::from_str(text)?),
            WatchedKind::Node => Self::Node(serde_json::from_str(text)?),
            WatchedKind::Grant => Self::Grant(serde_json::from_str(text)?),
        })
    }

    /// Which kind it is of.
    pub fn kind(&self) -> WatchedKind {
        match self {
            Self::Volume(_) => WatchedKind::Volume,
            Self::Attachment(_) => WatchedKind::Attachment,
            Self::Snapshot(_) => WatchedKind::Snapshot,
            Self::Node(_) => WatchedKind::Node,
            Self::Grant(_) => WatchedKind::Grant,
        }
    }
}

/// Labels are a text in the catalog, which holds a JSON object of strings.
fn labels<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    let text = String::deserialize(from)?;
    serde_json::from_str(&text).map_err(serde::de::Error::custom)
}
