//! What the catalog keeps of a volume and of an attachment, and how it is read from a row.
//!
//! Plain values: they are copies of a row at one moment and change nothing. Rows are read by column name, so that a later
//! format may add columns. Used by every caller of the catalog.

use proto::export_name::Secret;
use rusqlite::Row;
use uuid::Uuid;

use super::CatalogError;

/// Where a volume's data lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// A sparse file under `<data-dir>/volumes`.
    File,
    /// Memory of the server process, gone with it.
    Memory,
}

impl BackendKind {
    /// The word for it, in the catalog and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
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
}

/// Which attachments [`super::Catalog::list_attachments`] gives; `None` is all.
#[derive(Debug, Clone, Default)]
pub struct AttachmentFilter {
    /// Only of the volume of this name.
    pub volume_name: Option<String>,
    /// Only of this node.
    pub node_id: Option<String>,
}

fn damaged(table: &'static str, column: &'static str) -> CatalogError {
    CatalogError::Damaged { table, column }
}

/// Reads one column of a row, whatever its type; a value that does not fit is damage.
struct Columns<'a> {
    row: &'a Row<'a>,
    table: &'static str,
}

impl Columns<'_> {
    fn text(&self, column: &'static str) -> Result<String, CatalogError> {
        self.row.get(column).map_err(|_| damaged(self.table, column))
    }

    fn uuid(&self, column: &'static str) -> Result<Uuid, CatalogError> {
        self.text(column)?.parse().map_err(|_| damaged(self.table, column))
    }

    fn signed(&self, column: &'static str) -> Result<i64, CatalogError> {
        self.row.get(column).map_err(|_| damaged(self.table, column))
    }

    fn number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, CatalogError> {
        T::try_from(self.signed(column)?).map_err(|_| damaged(self.table, column))
    }

    fn flag(&self, column: &'static str) -> Result<bool, CatalogError> {
        Ok(self.signed(column)? != 0)
    }
}

/// Reads a row of `volumes`.
pub(super) fn volume(row: &Row<'_>) -> Result<(VolumeRecord, VolumeState), CatalogError> {
    let columns = Columns { row, table: "volumes" };
    let backend = match columns.text("backend")?.as_str() {
        "file" => BackendKind::File,
        "memory" => BackendKind::Memory,
        _ => return Err(damaged("volumes", "backend")),
    };
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
    };
    Ok((record, state))
}
