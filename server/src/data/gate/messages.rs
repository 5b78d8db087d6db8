//! What the gate is told by the ring threads, the openers of volumes and the control side.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use proto::nbd::handshake::server::Open;
use uuid::Uuid;

use super::answers::{FenceError, VolumeBusy};
use crate::backend::device::AdoptError;
use crate::backend::file::FileError;
use crate::backend::lvm::LvmError;
use crate::catalog::{CatalogError, VolumeRecord};
use crate::data::admission::NotAdmitted;
use crate::ids::ConnectionId;
use crate::tls::rights::Rights;
use crate::volume::Volume;
use crate::volume::copying::CopyError;
use crate::volume::incarnation::AdmitError;

/// What the gate can be told.
pub enum GateMessage {
    /// A connection asks for an export.
    Open {
        /// Who.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
        /// For what.
        open: Open,
        /// What it may have.
        rights: Arc<Rights>,
        /// The limit that was reached when it came; `None`: it has a place.
        beyond: Option<NotAdmitted>,
    },
    /// A connection asks for the public names.
    List {
        /// Who.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
        /// What it may see.
        rights: Arc<Rights>,
    },
    /// A connection is gone, and all its submitted I/O has finished.
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// The opener of a volume has ended.
    VolumeOpened {
        /// Which.
        volume_uid: Uuid,
        /// The volume, its file locked.
        result: Result<Arc<Volume>, OpenError>,
    },
    /// A sync of a volume has failed, which is recorded on the spot or not at all.
    LostWrites {
        /// Which.
        volume_uid: Uuid,
    },
    /// See `DataServer::sync_failed`.
    SyncFailed {
        /// Of which.
        volume: Box<VolumeRecord>,
        /// How: an errno.
        errno: i32,
        /// Answered when it is recorded, or cannot be.
        reply: Sender<Result<(), String>>,
    },
    /// See `DataServer::fence_attachment`.
    FenceAttachment {
        /// Which.
        attachment_id: Uuid,
        /// Answered when drained, or too late.
        reply: Sender<Result<(), FenceError>>,
    },
    /// See `DataServer::fence_named_writers`.
    FenceNamedWriters {
        /// Of which volume.
        volume_uid: Uuid,
        /// Answered when drained, or too late.
        reply: Sender<Result<(), FenceError>>,
    },
    /// See `DataServer::reopen_attachments`.
    ReopenAttachments {
        /// Of which volume.
        volume_uid: Uuid,
        /// Answered when all were told to close.
        reply: Sender<()>,
    },
    /// See `DataServer::release_volume`.
    ReleaseVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer.
        reply: Sender<Result<(), VolumeBusy>>,
    },
    /// A volume is to be copied: opened, and kept open.
    CopyVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer; who has it says [`GateMessage::CopyEnded`] in the end.
        reply: Sender<Result<Arc<Volume>, CopyError>>,
    },
    /// A copy of a volume has ended.
    CopyEnded {
        /// Of which.
        volume_uid: Uuid,
    },
    /// Connections that are served on an attachment.
    ConnectionsOf {
        /// Which.
        attachment_id: Uuid,
        /// The answer.
        reply: Sender<u32>,
    },
    /// See `DataServer::holder_seen`.
    HolderSeen {
        /// Of which attachment.
        attachment_id: Uuid,
    },
    /// See `DataServer::holder_of`.
    HolderOf {
        /// Of which attachment.
        attachment_id: Uuid,
        /// The answer.
        reply: Sender<(u32, Duration)>,
    },
    /// Connections that have a volume open.
    ConnectionsOfVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer.
        reply: Sender<u32>,
    },
    /// The same of those that may write.
    WritersOfVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer.
        reply: Sender<u32>,
    },
    /// A connection is about to write to its volume, which is not marked as written; answered by
    /// [`RingMessage::Marked`](crate::data::mailbox::RingMessage::Marked).
    Mark {
        /// Which.
        connection: ConnectionId,
    },
    /// Bytes of memory of a volume that is open.
    MemoryAllocated {
        /// Which.
        volume_uid: Uuid,
        /// The answer; 0 for one that is not open.
        reply: Sender<u64>,
    },
    /// The volume itself, where it is open.
    OpenVolume {
        /// Which.
        volume_uid: Uuid,
        /// The answer.
        reply: Sender<Option<Arc<Volume>>>,
    },
    /// End.
    Shutdown {
        /// No ring has an operation under way.
        is_drained: bool,
    },
}

/// Why a volume cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its backing file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its device.
    #[error(transparent)]
    Adopted(#[from] AdoptError),
    /// Its logical volume.
    #[error(transparent)]
    Lvm(#[from] LvmError),
    /// What it adopted cannot be looked up.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Its memory, or the thread that opens it.
    #[error("{0}")]
    System(#[from] io::Error),
    /// What is remembered of it.
    #[error(transparent)]
    Admit(#[from] AdmitError),
}
