//! What the core of the gate is told ([`Input`]) and what it wants done ([`Output`]).
//!
//! Plain values. What the core has to know of the catalog it asks for by an output, which carries along what the answer is for and
//! comes back with it: so no open is kept half looked up.

use std::sync::Arc;

use proto::export_name::AttachmentExportName;
use proto::nbd::handshake::server::{OpenKind, Refusal};
use uuid::Uuid;

use super::answers::{FenceError, VolumeBusy};
use crate::catalog::{AttachmentRecord, VolumeRecord};
use crate::data::admission::NotAdmitted;
use crate::ids::ConnectionId;
use crate::tls::rights::Rights;

/// A call of the control side that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// The catalog cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogFailed;

/// What the catalog has of something; `None`: there is none.
pub type Found<T> = Result<Option<T>, CatalogFailed>;

/// Who asks for an export.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Who.
    pub connection: ConnectionId,
    /// On which ring.
    pub ring: usize,
    /// To be told of it, or to be served.
    pub kind: OpenKind,
    /// What it may have.
    pub rights: Arc<Rights>,
    /// The limit that was reached when it came; `None`: it has a place.
    pub beyond: Option<NotAdmitted>,
}

/// An open whose attachment is there, and whose secret is the right one.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Who asks.
    pub asked: Asked,
    /// In which session, and for which slot.
    pub name: AttachmentExportName,
    /// For what.
    pub attachment: AttachmentRecord,
}

/// A volume, or a snapshot, that was looked up by its plain name.
#[derive(Debug, Clone)]
pub struct NamedVolume {
    /// The volume; a snapshot as it is served.
    pub volume: VolumeRecord,
    /// An attachment has it, or it is a snapshot: by its name it can only be read.
    pub is_attached: bool,
}

/// Why somebody does not get a volume that was granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotServed {
    /// The catalog has it no more.
    Unknown,
    /// The catalog cannot be read.
    Catalog,
    /// There are too few descriptors; in words.
    Descriptors(String),
    /// Its storage cannot be opened.
    Storage,
    /// It lost writes, and that is recorded nowhere.
    LossUnrecorded,
}

/// Why a volume is not copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotCopied {
    /// It cannot be opened.
    NotServed(NotServed),
    /// It lost writes, and is not opened anew before all who have it are gone.
    LostWrites,
    /// It takes too long to open.
    TooLate,
}

/// An open that is to be answered with its volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Who.
    pub connection: ConnectionId,
    /// On which ring.
    pub ring: usize,
    /// The volume, which is open.
    pub volume_uid: Uuid,
    /// To be told of it, or to be served.
    pub kind: OpenKind,
    /// Writes are refused.
    pub read_only: bool,
    /// The attachment, if it is through one: what was promised of blocks holds.
    pub attachment_id: Option<Uuid>,
    /// It only asks whether the server lives.
    pub is_probe: bool,
}

/// What goes on once it is known whether a loss of writes is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterLoss {
    /// Nothing.
    Nothing,
    /// The connection gets the volume, or another one of the same storage.
    Find(ConnectionId),
    /// The connection has left.
    Left(ConnectionId, Option<Uuid>),
    /// The call is answered.
    Answer(CallId),
    /// Who waits to copy the volume has it opened anew.
    Copy,
}

/// What the core can be told.
#[derive(Debug)]
pub enum Input {
    /// A connection asks for an export.
    Open {
        /// Who.
        asked: Asked,
        /// For what.
        name: String,
    },
    /// The answer to [`Output::FindAttachment`].
    AttachmentFound {
        /// Who asks.
        asked: Asked,
        /// For what.
        name: AttachmentExportName,
        /// What there is.
        found: Found<AttachmentRecord>,
    },
    /// The answer to [`Output::FindExport`].
    ExportFound {
        /// For what.
        claim: Box<Claim>,
        /// The volume of the attachment.
        found: Found<VolumeRecord>,
    },
    /// The answer to [`Output::FindName`].
    NameFound {
        /// Who asks.
        asked: Asked,
        /// What there is.
        found: Found<NamedVolume>,
    },
    /// The answer to [`Output::Answer`].
    Answered {
        /// Who was to be answered.
        connection: ConnectionId,
        /// Whether that was possible.
        result: Result<(), NotServed>,
    },
    /// The answer to [`Output::Persist`].
    Persisted {
        /// Of which attachment.
        attachment_id: Uuid,
        /// Up to where.
        epoch: u64,
        /// False: it is not in the catalog.
        is_persisted: bool,
    },
    /// The answer to [`Output::Open`], which takes its time.
    VolumeOpened {
        /// Which.
        volume_uid: Uuid,
        /// Whether it is open, its file locked.
        result: Result<(), NotServed>,
    },
    /// A sync of a volume has failed, which is recorded on the spot or not at all. Comes before the connection is closed that
    /// was told of it, and before the volume is found for who asks for it. May come twice.
    LostWrites {
        /// Which.
        volume_uid: Uuid,
    },
    /// The answer to [`Output::RecordLoss`].
    LossRecorded {
        /// Of which volume.
        volume_uid: Uuid,
        /// False: it is recorded nowhere.
        is_recorded: bool,
        /// What goes on.
        then: AfterLoss,
    },
    /// A sync failed that was no client's.
    SyncFailed {
        /// Of which volume.
        volume_uid: Uuid,
        /// How: an errno.
        errno: i32,
        /// Who says so.
        call: CallId,
    },
    /// A connection is gone, and all its submitted I/O has finished.
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// Nobody may be served on an attachment any more.
    FenceAttachment {
        /// Which.
        attachment_id: Uuid,
        /// Its generation in the catalog; `None`: it is there no more.
        generation: Option<u64>,
        /// Who waits for it.
        call: CallId,
    },
    /// The answer to [`Output::LookWhetherGone`] where the catalog has the attachment no more.
    AttachmentGone {
        /// Which.
        attachment_id: Uuid,
    },
    /// Nobody may write to a volume by its plain name any more.
    FenceNamedWriters {
        /// Which.
        volume_uid: Uuid,
        /// Who waits for it.
        call: CallId,
    },
    /// Those who are served on attachments of a volume are to come again.
    ReopenAttachments {
        /// Of which.
        volume_uid: Uuid,
    },
    /// A volume is to be closed, if nobody has it.
    ReleaseVolume {
        /// Which.
        volume_uid: Uuid,
        /// Who asks.
        call: CallId,
    },
    /// A volume is to be copied, and to be kept open for that.
    CopyVolume {
        /// Which.
        volume_uid: Uuid,
        /// Who copies.
        call: CallId,
    },
    /// A copy of a volume has ended, and all its descriptors are closed.
    CopyEnded {
        /// Of which.
        volume_uid: Uuid,
    },
    /// The holder of an attachment was told its secret just now.
    HolderSeen {
        /// Of which.
        attachment_id: Uuid,
    },
    /// A connection is about to write to its volume, which is not marked as written; it waits.
    WantsMark {
        /// Which.
        connection: ConnectionId,
    },
    /// The answer to [`Output::Mark`].
    Marked {
        /// Which volume.
        volume_uid: Uuid,
        /// For whom.
        connection: ConnectionId,
        /// False: the catalog does not have it.
        is_marked: bool,
    },
}

/// What the core wants done, in this order. What has an answer is answered by an input of its own, before anything else is told
/// but [`Input::LostWrites`] of the volume that it is about.
#[derive(Debug)]
pub enum Output {
    /// Look an attachment up.
    FindAttachment {
        /// For whom.
        asked: Asked,
        /// What was asked for.
        name: AttachmentExportName,
    },
    /// Look up the volume of an attachment.
    FindExport(Box<Claim>),
    /// Look up a volume by its plain name.
    FindName {
        /// For whom.
        asked: Asked,
        /// The name.
        name: String,
    },
    /// Remember that a volume is opened under an attachment of this generation.
    OpenedUnder {
        /// Which volume.
        volume_uid: Uuid,
        /// The attachment's.
        generation: u64,
    },
    /// Make the epoch of an attachment durable.
    Persist {
        /// Which.
        attachment_id: Uuid,
        /// Its epoch.
        epoch: u64,
    },
    /// Open a volume's storage and wait for its lock, without keeping anybody else waiting.
    Open {
        /// Which.
        volume_uid: Uuid,
    },
    /// Answer an open with its volume.
    Answer(Granted),
    /// Answer an open with a refusal.
    Refuse {
        /// Whose.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
        /// Why.
        refusal: Refusal,
    },
    /// Close a connection; it is reported closed when its submitted I/O has finished.
    Close {
        /// Which.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
    },
    /// Have the loss of a volume's writes in the catalog, unless it is recorded elsewhere.
    RecordLoss {
        /// Of which.
        volume_uid: Uuid,
        /// To be said with the answer.
        then: AfterLoss,
    },
    /// Let a volume that is open say that its syncs fail: the loss is recorded.
    LossKnown {
        /// Which.
        volume_uid: Uuid,
    },
    /// Have a volume that is open acknowledge nothing as durable any more.
    FailSyncs {
        /// Which.
        volume_uid: Uuid,
        /// Why: an errno.
        errno: i32,
    },
    /// Record the loss of writes of the volume that the call is about, which is not open; and answer it.
    RaiseIncarnation {
        /// Which call.
        call: CallId,
    },
    /// Have the catalog know, durably, that a volume is written to.
    Mark {
        /// Which.
        volume_uid: Uuid,
        /// For whom.
        connection: ConnectionId,
    },
    /// Let a connection write to its volume, or tell it that this cannot be.
    GoOn {
        /// Which.
        connection: ConnectionId,
        /// On which ring.
        ring: usize,
        /// False: the volume could not be marked.
        is_marked: bool,
    },
    /// Let a volume go that was open.
    Retire {
        /// Which.
        volume_uid: Uuid,
    },
    /// Answer who waited for connections to be gone.
    Fenced {
        /// Which call.
        call: CallId,
        /// Whether they are.
        result: Result<(), FenceError>,
    },
    /// Say so if the catalog has the attachment no more.
    LookWhetherGone {
        /// Which.
        attachment_id: Uuid,
    },
    /// Answer who wanted a volume closed.
    Released {
        /// Which call.
        call: CallId,
        /// Whether it is.
        result: Result<(), VolumeBusy>,
    },
    /// Answer who wants to copy a volume: with the volume, which is open.
    CopyAnswered {
        /// Which call.
        call: CallId,
        /// Of which volume.
        volume_uid: Uuid,
        /// Whether it may; then [`Input::CopyEnded`] has to come.
        result: Result<(), NotCopied>,
    },
    /// Answer who told of a failed sync.
    LossAnswered {
        /// Which call.
        call: CallId,
        /// False: it is recorded nowhere.
        is_recorded: bool,
    },
}

impl Input {
    /// The volume that an open turns out to be for.
    pub fn asked_volume(&self) -> Option<Uuid> {
        match self {
            Self::ExportFound { found: Ok(Some(volume)), .. } => Some(volume.volume_uid),
            Self::NameFound { found: Ok(Some(found)), .. } => Some(found.volume.volume_uid),
            _ => None,
        }
    }
}

impl NotServed {
    /// What the client is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Unknown => Refusal::unknown("no such export"),
            Self::Catalog => Refusal::shutdown("the server's catalog failed; try again"),
            Self::Descriptors(words) => Refusal::shutdown(words.clone()),
            Self::Storage => Refusal::shutdown("the volume's storage cannot be opened"),
            Self::LossUnrecorded => Refusal::shutdown("the server cannot record that the volume lost writes"),
        }
    }
}
