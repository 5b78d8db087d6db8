//! What the catalog keeps of a volume, of a snapshot and of an attachment, and how it is read from a row.
//!
//! Plain values: they are copies of a row at one moment and change nothing. Rows are read by column name, so that a later
//! format may add columns. Used by every caller of the catalog.

use proto::export_name::Secret;
use rusqlite::Row;
use uuid::Uuid;

use super::CatalogError;
use super::columns::{Columns, damaged};
use super::settings::{self, Content, VolumeSettings};
use crate::scope::Scope;

/// Where a volume's data lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// A sparse file under `<data-dir>/volumes`.
    File,
    /// Memory of the server process, gone with it.
    Memory,
    /// A block device or raw file of somebody else's making; see [`super::Adopted`].
    Device,
    /// A thin logical volume of the server's pool; see `thin.rs`.
    Lvm,
}

impl BackendKind {
    /// The word for it in messages, and where it is read from the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Memory => "memory",
            Self::Device => "device",
            Self::Lvm => "lvm",
        }
    }

    /// What `volumes.backend` holds; `adopted.rs` and `thin.rs` say why.
    pub(super) fn in_catalog(self) -> &'static str {
        match self {
            Self::File | Self::Device | Self::Lvm => "file",
            Self::Memory => "memory",
        }
    }
}

/// How far a volume's making or deletion has come; see `lifecycle/mod.rs` for the order of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeState {
    /// Its storage is being made: nobody was told of it yet.
    Creating,
    /// It exists.
    Ready,
    /// Its storage is being removed: it does not exist any more for anybody.
    Deleting,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRecord {
    /// The name people use.
    pub name: String,
    /// Immutable identity.
    pub volume_uid: Uuid,
    /// Size that attachments see.
    pub capacity_bytes: u64,
    /// Logical block size: 512 or 4096.
    pub block_size_bytes: u32,
    /// Where the data lives.
    pub backend: BackendKind,
    /// False: every write is durable before its reply, and no volatile cache is announced.
    pub write_cache_on: bool,
    /// Raised whenever acknowledged, unflushed writes may have been lost.
    pub incarnation: u64,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// What is set of it, and known of its content.
    pub settings: VolumeSettings,
}

/// What [`super::Catalog::begin_creating`] needs; name and numbers were checked by the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// The name people use; unique.
    pub name: String,
    /// Size in bytes.
    pub capacity_bytes: u64,
    /// 512 or 4096.
    pub block_size_bytes: u32,
    /// Where the data is to live.
    pub backend: BackendKind,
    /// See [`VolumeRecord::write_cache_on`].
    pub write_cache_on: bool,
    /// What is set of it from the beginning.
    pub settings: VolumeSettings,
}

/// How far a snapshot's making or deletion has come; see `lifecycle/mod.rs` for the order of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// Its instant has been or is about to be; its bytes are not durable.
    Creating,
    /// It exists.
    Ready,
    /// Its storage is being removed: it does not exist any more for anybody.
    Deleting,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// The name people use; unique among those of its volume.
    pub name: String,
    /// Immutable identity.
    pub snapshot_uid: Uuid,
    /// The volume that it was taken of.
    pub volume_uid: Uuid,
    /// That volume's name; empty once it is deleted.
    pub volume_name: String,
    /// The same for all that were taken at one instant.
    pub group_uid: Uuid,
    /// The volume's size at the instant, in bytes.
    pub capacity_bytes: u64,
    /// Logical block size: 512 or 4096.
    pub block_size_bytes: u32,
    /// Where the data lives.
    pub backend: BackendKind,
    /// As the volume's, for clones.
    pub write_cache_on: bool,
    /// The volume's content at the instant; one that is being made has none that is known.
    pub content: Content,
    /// Its instant, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// Of the call that took it, if its caller had the file systems frozen.
    pub freeze_id: Option<Uuid>,
    /// They were found frozen when they were thawed after the instant.
    pub is_frozen: bool,
    /// In whose name space its volume is or was; empty: in none.
    pub tenant: String,
    /// As the volume was.
    pub is_encrypted: bool,
}

/// A snapshot that [`super::Catalog::begin_snapshots`] is to write down.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Its identity.
    pub snapshot_uid: Uuid,
    /// The volume that it is of.
    pub volume: VolumeRecord,
}

/// Which snapshots [`super::Catalog::list_snapshots`] gives; `None` is all.
#[derive(Debug, Clone, Default)]
pub struct SnapshotFilter {
    /// Only of the volume of this name.
    pub volume_name: Option<String>,
    /// Only of this group.
    pub group_uid: Option<Uuid>,
    /// Only those of this name.
    pub name: Option<String>,
    /// Only of these tenants, as a JSON array; [`SnapshotFilter::within`] says it.
    pub tenants: Option<String>,
}

impl SnapshotFilter {
    /// Only of volumes of this scope.
    pub fn within(self, scope: &Scope) -> Self {
        Self { tenants: scope.for_query(), ..self }
    }
}

/// Where a snapshot stands in lists.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotKey {
    /// Its volume's name; empty once that is deleted.
    pub volume_name: String,
    /// Its own.
    pub name: String,
    /// Its identity, as text: kept ones may have one name.
    pub snapshot_uid: String,
}

impl SnapshotRecord {
    /// Where it stands in lists.
    pub fn key(&self) -> SnapshotKey {
        SnapshotKey {
            volume_name: self.volume_name.clone(),
            name: self.name.clone(),
            snapshot_uid: self.snapshot_uid.to_string(),
        }
    }

    /// `VOLUME@NAME`; of one that was kept `@UID`.
    pub fn export_name(&self) -> String {
        if self.volume_name.is_empty() {
            return format!("@{}", self.snapshot_uid);
        }
        format!("{}@{}", self.volume_name, self.name)
    }

    /// What is served of it: as a volume, with its own identity.
    pub fn as_volume(&self) -> VolumeRecord {
        VolumeRecord {
            name: self.export_name(),
            volume_uid: self.snapshot_uid,
            capacity_bytes: self.capacity_bytes,
            block_size_bytes: self.block_size_bytes,
            backend: self.backend,
            write_cache_on: self.write_cache_on,
            incarnation: 1,
            created_at_ms: self.created_at_ms,
            settings: VolumeSettings {
                is_read_only: true,
                is_encrypted: self.is_encrypted,
                content: self.content,
                ..VolumeSettings::default()
            },
        }
    }
}

/// Whether an attachment may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachmentState {
    /// Its holder may open the export.
    Active,
    /// It was detached or taken by force: nothing new is opened under it, and its last I/O is being waited for.
    Ending,
}

/// The right of one node to open one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachmentRecord {
    /// Public identity.
    pub attachment_id: Uuid,
    /// The volume.
    pub volume_uid: Uuid,
    /// The machine that holds it.
    pub node_id: String,
    /// True: writes are refused.
    pub read_only: bool,
    /// What the holder proves itself with.
    pub secret: Secret,
    /// Attach generation of the volume when the attachment was made; raised by each attach by force.
    pub generation: u64,
    /// Highest session epoch that has opened the export; 0 before the first.
    pub session_epoch: u64,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// The boot of the node that has it; empty where none has yet, or none was told.
    pub boot_id: String,
    /// Others may read the volume as well; or, if this one writes, write to it.
    pub is_shared: bool,
}

/// What [`super::Catalog::add_attachment`] needs; the rest is made by the catalog.
#[derive(Debug, Clone)]
pub struct NewAttachment {
    /// The volume, which must be ready and free.
    pub volume_uid: Uuid,
    /// The machine that gets it.
    pub node_id: String,
    /// True: writes are refused.
    pub read_only: bool,
    /// Which boot of it; empty where that is not told.
    pub boot_id: String,
    /// As in [`AttachmentRecord`].
    pub is_shared: bool,
    /// Not without a grant of the volume for the node.
    pub only_if_granted: bool,
}

/// Which attachments [`super::Catalog::list_attachments`] gives; `None` is all.
#[derive(Debug, Clone, Default)]
pub struct AttachmentFilter {
    /// Only of the volume of this name.
    pub volume_name: Option<String>,
    /// Only of this node.
    pub node_id: Option<String>,
    /// Only of these tenants, as a JSON array; [`AttachmentFilter::within`] says it.
    pub tenants: Option<String>,
}

impl AttachmentFilter {
    /// Only of volumes of this scope, and their snapshots.
    pub fn within(self, scope: &Scope) -> Self {
        Self { tenants: scope.for_query(), ..self }
    }
}

/// An attachment's place in a list of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListedAttachment {
    /// Its volume.
    pub volume_name: String,
    /// Its identity, as text; empty: before all of the volume's.
    pub attachment_id: String,
}

/// Reads a row of `volumes`.
pub(super) fn volume(row: &Row<'_>) -> Result<(VolumeRecord, VolumeState), CatalogError> {
    let columns = Columns { row, table: "volumes" };
    let backend = columns.backend()?;
    let state = match columns.text("state")?.as_str() {
        "creating" => VolumeState::Creating,
        "ready" => VolumeState::Ready,
        "deleting" => VolumeState::Deleting,
        _ => return Err(damaged("volumes", "state")),
    };
    let record = VolumeRecord {
        name: columns.text("name")?,
        volume_uid: columns.uuid("volume_uid")?,
        capacity_bytes: columns.number("capacity_bytes")?,
        block_size_bytes: columns.number("block_size_bytes")?,
        backend,
        write_cache_on: columns.flag("write_cache_on")?,
        incarnation: columns.number("incarnation")?,
        created_at_ms: columns.signed("created_at_ms")?,
        settings: settings::settings(&columns)?,
    };
    Ok((record, state))
}

/// Reads a row of `snapshots`, with its volume's name beside it as `volume_name`.
pub(super) fn snapshot(row: &Row<'_>) -> Result<(SnapshotRecord, SnapshotState), CatalogError> {
    let columns = Columns { row, table: "snapshots" };
    let state = match columns.text("state")?.as_str() {
        "creating" => SnapshotState::Creating,
        "ready" => SnapshotState::Ready,
        "deleting" => SnapshotState::Deleting,
        _ => return Err(damaged("snapshots", "state")),
    };
    let record = SnapshotRecord {
        name: columns.text("name")?,
        snapshot_uid: columns.uuid("snapshot_uid")?,
        volume_uid: columns.uuid("volume_uid")?,
        volume_name: columns.text("volume_name")?,
        group_uid: columns.uuid("group_uid")?,
        capacity_bytes: columns.number("capacity_bytes")?,
        block_size_bytes: columns.number("block_size_bytes")?,
        backend: columns.backend()?,
        write_cache_on: columns.flag("write_cache_on")?,
        content: match columns.text("content")?.as_str() {
            "never-written" => Content::NeverWritten,
            "written" => Content::Written,
            _ => return Err(damaged("snapshots", "content")),
        },
        created_at_ms: columns.signed("created_at_ms")?,
        freeze_id: match columns.text("freeze_id")?.as_str() {
            "" => None,
            _ => Some(columns.uuid("freeze_id")?),
        },
        is_frozen: columns.flag("is_frozen")?,
        tenant: columns.text("tenant")?,
        is_encrypted: columns.flag("is_encrypted")?,
    };
    Ok((record, state))
}

/// Reads a row of `attachments`.
pub(super) fn attachment(row: &Row<'_>) -> Result<(AttachmentRecord, AttachmentState), CatalogError> {
    let columns = Columns { row, table: "attachments" };
    let state = match columns.text("state")?.as_str() {
        "active" => AttachmentState::Active,
        "ending" => AttachmentState::Ending,
        _ => return Err(damaged("attachments", "state")),
    };
    let record = AttachmentRecord {
        attachment_id: columns.uuid("attachment_id")?,
        volume_uid: columns.uuid("volume_uid")?,
        node_id: columns.text("node_id")?,
        read_only: columns.flag("read_only")?,
        secret: Secret::parse(&columns.text("secret")?).ok_or_else(|| damaged("attachments", "secret"))?,
        generation: columns.number("generation")?,
        session_epoch: columns.number("session_epoch")?,
        created_at_ms: columns.signed("created_at_ms")?,
        boot_id: columns.text("boot_id")?,
        is_shared: columns.flag("is_shared")?,
    };
    Ok((record, state))
}
