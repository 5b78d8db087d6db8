//! How volumes and attachments come into being and end: the order of the steps, so that a crash between any two of them
//! leaves nothing half-made behind and nothing answered is lost.
//!
//! Owns that order, and the lock that serializes the calls on one volume name. It keeps no state of its own beyond that:
//! the catalog is the truth, storage follows it. It knows nothing of gRPC (`management/` calls it) and nothing of NBD: what
//! it needs of the data side is the trait [`DataSide`]. Every method blocks.
//!
//! ```text
//! create:   row creating → storage durable → row ready → answer
//! delete:   hidden, nobody has it open → row deleting → storage gone → row gone → answer
//! snapshot: rows creating → copies begun (the instant) → copies durable → rows ready → answer
//! clone:    row creating → copy begun → copy durable → row ready → answer
//! restore:  hidden, nobody has it open → copy durable beside it → incarnation raised → copy put in its place → shown → answer
//! attach:   (former holder: row ending → fenced → row gone) → row active → writers by name fenced → storage durable → answer
//! detach:   row ending → connections closed and their I/O finished → row gone → answer
//! grant:    row → answer
//! withdraw: row gone and the node's attachment ending, at once → connections closed and their I/O finished → attachment's row gone → answer
//! rename:   hidden, nobody has it open → row changed → shown → answer
//! set:      row changed → clients held to it → answer
//! diff:     (copy without a name begun: the instant → durable →) extent maps compared → ranges answered; no row
//! ```
//! A row `creating`, `deleting` or `ending` is work that somebody has to finish: the operation that makes it (`operations.rs`), the
//! next call on that volume, or [`Lifecycle::recover`] at the next start. A snapshot is deleted as a volume is. Copies take their
//! time: the lock is held for the steps before, and what goes on then is kept apart by the operations that there are.

mod adopted;
mod attachments;
mod claims;
mod clones;
mod copies;
mod diffs;
mod etags;
mod frozen;
mod grants;
mod name_locks;
mod nodes;
mod operations;
mod recovery;
mod rename;
mod restore;
mod settings;
mod snapshot_error;
mod snapshots;
mod space;
mod tenants;
mod volumes;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

pub use adopted::{AdoptWanted, AdoptedData};
pub use attachments::{AttachWanted, Attached, AttachedTo, DetachWanted};
pub use claims::{HOLDER_TIMEOUT, Holder};
pub use clones::{CloneOf, CloneWanted};
pub use copies::Started;
pub use diffs::{DiffPart, DiffTotal, DiffWanted, NotTaken};
pub use etags::{node_etag, volume_etag};
pub use frozen::{FreezeError, FreezePlan};
pub use grants::{GrantEnded, GrantWanted, GrantsError};
pub use name_locks::{NameLock, NameLocks};
pub use nodes::{NodeCondition, NodeDisk, NodeSeen, NodesError};
pub use operations::{Operation, OperationEnd, OperationKind, Operations};
pub use recovery::Recovered;
pub use settings::{ContentWanted, LABELS_MAX, LimitsWanted, PropertiesWanted, SettingsError};
pub use snapshot_error::SnapshotError;
pub use snapshots::{SnapshotNamed, snapshot_lock_name};
pub use space::{SpaceLevel, StorageSpace};
pub use tenants::TenantsError;

use crate::backend::device::AdoptError;
use crate::backend::extent_map::ExtentMap;
use crate::backend::lvm::PoolFill;
use crate::catalog::{BackendKind, Catalog, CatalogError, RequestKey, SnapshotRecord, VolumeRecord};
use crate::machine_memory::{ForVolumes, TooMuchMemory};
use crate::volume::copying::{CopyError, CopyHandle, CopyTarget, CopyWanted};

/// A volume that cannot be released: somebody has it open, or is opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("connections: {connections}")]
pub struct StillOpen {
    /// How many; 0 while the first is being opened.
    pub connections: u32,
}

/// Why what was written to a volume is not durable.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// Nothing is known of it yet: another try may succeed.
    #[error("{0}")]
    Unfinished(String),
    /// It failed: what was written may be lost.
    #[error(transparent)]
    Failed(#[from] io::Error),
}

/// An extent map, of whatever stores the bytes.
pub type Map = Box<dyn ExtentMap + Send>;

/// What the lifecycle needs of the data side. All calls block, for a bounded time.
pub trait DataSide: AdoptedData + Send + Sync + 'static {
    /// Makes the volume's storage, durable when it returns; what a killed server left half-made is made anew.
    ///
    /// # Errors
    /// The system's: `StorageFull`, `FileTooLarge` and others.
    fn create_storage(&self, volume: &VolumeRecord) -> io::Result<()>;

    /// Removes a volume's storage, durably; storage that is not there is a success.
    ///
    /// # Errors
    /// The system's.
    fn delete_storage(&self, volume_uid: Uuid) -> io::Result<()>;

    /// What volumes in memory may have together, now.
    fn memory_for_volumes(&self) -> ForVolumes;

    /// Every volume that has storage on this server, catalogued or not.
    ///
    /// # Errors
    /// The system's.
    fn stored_volumes(&self) -> io::Result<Vec<Uuid>>;

    /// Makes the storage of a volume larger, durably; storage that is as large already is a success.
    ///
    /// # Errors
    /// The system's: `StorageFull`, `FileTooLarge` and others.
    fn grow_storage(&self, volume: &VolumeRecord, capacity_bytes: u64) -> io::Result<()>;

    /// Makes all that was written to the volume durable. After a failure, what is read of it is what its disk has.
    ///
    /// # Errors
    /// [`SyncError`], by what is known.
    fn sync_storage(&self, volume: &VolumeRecord) -> Result<(), SyncError>;

    /// Whether volumes of this server's storage can be copied without reading them.
    ///
    /// # Errors
    /// [`CopyError::Unsupported`]: what the storage is, and what to do.
    fn can_copy(&self) -> Result<(), CopyError>;

    /// How full the thin pool is, or why that is not known; `None`: the server has none.
    fn thin_pool(&self) -> Option<Result<PoolFill, CopyError>>;

    /// Begins copies, all of one instant: each has everything that was answered before this call, and nothing that begins after it
    /// returns. They go on after that, and end together: durable, or with nothing left of any of them.
    ///
    /// # Errors
    /// [`CopyError`]; nothing is left.
    fn begin_copies(&self, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError>;

    /// The extent map of a snapshot, whose storage stays as long as this does. Where it takes long to read, that is when it is asked for
    /// the first time, and not in the call.
    ///
    /// # Errors
    /// [`CopyError`]
    fn snapshot_map(&self, snapshot_uid: Uuid, capacity_bytes: u64) -> Result<Map, CopyError>;

    /// Begins a copy of a volume at this instant that nobody finds, and that is gone when its map is dropped or the server dies.
    /// The map may be read when the copy has ended.
    ///
    /// # Errors
    /// [`CopyError`]; nothing is left.
    fn begin_nameless_copy(&self, volume: &VolumeRecord) -> Result<(CopyHandle, Map), CopyError>;

    /// What was copied as [`CopyTarget::Restored`] takes the place of the volume's
    /// storage, durably and at once. The volume is released and hidden.
    ///
    /// # Errors
    /// The system's.
    fn replace_storage(&self, volume: &VolumeRecord) -> io::Result<()>;

    /// Removes what was copied, durably; what is not there is a success.
    ///
    /// # Errors
    /// The system's.
    fn delete_copy(&self, target: CopyTarget) -> io::Result<()>;

    /// Every copy that has storage and is no volume: snapshots, and what was to be restored.
    ///
    /// # Errors
    /// The system's.
    fn stored_copies(&self) -> io::Result<Vec<CopyTarget>>;

    /// Bytes of storage that the snapshot takes now.
    fn snapshot_allocated_bytes(&self, snapshot: &SnapshotRecord) -> u64;

    /// Bytes of storage that a volume or a snapshot has alone; `None`: it is not known. May wait.
    fn exclusive_bytes(&self, of: CopyTarget, backend: BackendKind) -> Option<u64>;

    /// Closes the connections of the volume's attachments, which come again and are told what is new.
    fn reopen_attachments(&self, volume_uid: Uuid);

    /// Closes every connection of the attachment and waits until their submitted I/O has finished; from the call on, no
    /// new one is opened. The catalog does not show the attachment as active any more.
    ///
    /// # Errors
    /// Why it could not be done in time; the call may be repeated.
    fn fence_attachment(&self, attachment_id: Uuid) -> Result<(), String>;

    /// The same for connections that write to the volume by its plain name.
    ///
    /// # Errors
    /// As [`DataSide::fence_attachment`].
    fn fence_named_writers(&self, volume_uid: Uuid) -> Result<(), String>;

    /// Closes the volume's storage, which the catalog hides meanwhile, if nobody has it open.
    ///
    /// # Errors
    /// [`StillOpen`] where somebody has.
    fn release_volume(&self, volume_uid: Uuid) -> Result<(), StillOpen>;

    /// Connections that the attachment has open now.
    fn connections_of(&self, attachment_id: Uuid) -> u32;

    /// How the attachment's holder is.
    fn holder(&self, attachment_id: Uuid) -> Holder;

    /// The attachment's holder was here just now: it has as long to connect as one whose connections ended.
    fn holder_seen(&self, attachment_id: Uuid);

    /// Bytes of storage that the volume takes now.
    fn allocated_bytes(&self, volume: &VolumeRecord) -> u64;

    /// A word that changes whenever acknowledged, unflushed writes of the volume may have been lost.
    fn storage_incarnation(&self, volume: &VolumeRecord) -> String;

    /// The catalog has other limits of the volume now: its clients are held to them at once.
    fn limits_changed(&self, volume: &VolumeRecord);

    /// The catalog has another content of the volume now.
    fn content_changed(&self, volume: &VolumeRecord);

    /// For how long the volume's connections were held back by its limits, together, since the start.
    fn throttled(&self, volume_uid: Uuid) -> Duration;

    /// Connections that have the volume open for writing now, or are about to.
    fn writers_of_volume(&self, volume_uid: Uuid) -> u32;
}

/// Why a volume or attachment was not made or ended.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// No volume of that name.
    #[error("there is no volume {0}")]
    VolumeNotFound(String),
    /// A new volume may not be called what another's partition is.
    #[error(
        "the name {name} is that of partition {partition} of the volume {disk}: choose one that does not end in -part and a number"
    )]
    PartitionName {
        /// The name.
        name: String,
        /// Whose partition is called so.
        disk: String,
        /// Which.
        partition: u32,
    },
    /// A volume of that name has other properties than those asked for.
    #[error("volume {name} exists with another {property}: {existing}, not {wanted}")]
    VolumeDiffers {
        /// Its name.
        name: String,
        /// Which property differs first.
        property: &'static str,
        /// What it is.
        existing: String,
        /// What was asked for.
        wanted: String,
    },
    /// The volume is attached to a node.
    #[error("volume {name} is attached to node {node_id}")]
    VolumeAttached {
        /// Its name.
        name: String,
        /// The node that holds it.
        node_id: String,
    },
    /// Another boot of the node holds the volume, and is connected.
    #[error(
        "volume {name} is attached to another machine that is called {node_id} as well, and is connected: a clone with the same \
         /etc/machine-id, or this machine's former boot, whose connections have not timed out yet"
    )]
    OtherBoot {
        /// Its name.
        name: String,
        /// The node.
        node_id: String,
    },
    /// Another boot of the node holds the volume, and may come back.
    #[error(
        "volume {name} is attached to another boot of node {node_id}, which may come back within {after:?}"
    )]
    OtherBootMayReturn {
        /// Its name.
        name: String,
        /// The node.
        node_id: String,
        /// In what time the volume can be had.
        after: Duration,
    },
    /// The node holds the volume in another access mode.
    #[error("volume {name} is attached to node {node_id} in another access mode")]
    AttachedDifferently {
        /// Its name.
        name: String,
        /// The node.
        node_id: String,
    },
    /// Several nodes have the volume, and the caller did not say which one is to lose it.
    #[error("volume {name} is attached to several nodes: {node_ids}")]
    SeveralHolders {
        /// Its name.
        name: String,
        /// Which.
        node_ids: String,
    },
    /// Connections by plain name have the volume open.
    #[error("volume {name} is open ({still_open})")]
    VolumeOpen {
        /// Its name.
        name: String,
        /// By how many.
        still_open: StillOpen,
    },
    /// A volume cannot be made smaller: what its users keep at its end would be gone.
    #[error("volume {name} has {capacity_bytes} bytes and cannot be made smaller")]
    Shrink {
        /// Its name.
        name: String,
        /// What it has.
        capacity_bytes: u64,
    },
    /// The size is not one that a volume can grow to.
    #[error("must be a multiple of {unit_bytes} bytes")]
    SizeUnaligned {
        /// Of what.
        unit_bytes: u64,
    },
    /// A volume in memory keeps its size.
    #[error("volume {name} is in memory, and keeps its size")]
    SizeFixed {
        /// Its name.
        name: String,
    },
    /// The server has no thin pool.
    #[error("volume {0} is to be in a thin pool, and this server has none")]
    NoThinPool(String),
    /// It cannot be adopted, or what was adopted cannot be found.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// What is to be adopted has no blocks of that size.
    #[error("{path} has {size_bytes} bytes in blocks of {own_bytes}, which are no blocks of {wanted_bytes}")]
    BlockSize {
        /// What.
        path: String,
        /// Its size.
        size_bytes: u64,
        /// Its own block size.
        own_bytes: u32,
        /// The one asked for.
        wanted_bytes: u32,
    },
    /// The size of an adopted volume is its device's.
    #[error("volume {name} is as large as {path}, which has {size_bytes} bytes")]
    AdoptedSize {
        /// Its name.
        name: String,
        /// What it adopted.
        path: String,
        /// What that has.
        size_bytes: u64,
    },
    /// The file system under the data directory cannot hold a file of that size.
    #[error("the server's file system cannot hold a file of {capacity_bytes} bytes")]
    TooLarge {
        /// The size asked for.
        capacity_bytes: u64,
    },
    /// No space under the data directory.
    #[error("no space left on the server to {0}")]
    NoSpace(&'static str),
    /// With this one the volumes in memory would come to more than there is.
    #[error("no memory for volume {name}: {source}")]
    NoMemory {
        /// Its name.
        name: String,
        /// What there is.
        source: TooMuchMemory,
    },
    /// The former connections are refused everything new, but their I/O has not finished in time.
    #[error("connections of volume {name} were closed, but their I/O has not finished yet: {reason}")]
    Unfenced {
        /// The volume's name.
        name: String,
        /// What the data side said.
        reason: String,
    },
    /// The volume's storage failed.
    #[error("cannot {action} the storage of volume {volume_uid}: {source}")]
    Storage {
        /// What was tried.
        action: &'static str,
        /// Whose storage.
        volume_uid: Uuid,
        /// The system's own error.
        source: io::Error,
    },
    /// The storage directory cannot be listed.
    #[error("cannot list the volumes' storage: {0}")]
    Listing(io::Error),
    /// What is set of the volume does not allow it.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A node is not known, or is needed.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// What is granted to nodes does not allow it.
    #[error(transparent)]
    Grants(#[from] GrantsError),
    /// What is wrong with a tenant, or what it may not have.
    #[error(transparent)]
    Tenants(#[from] TenantsError),
    /// A snapshot has no frozen file systems.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// There is no snapshot, clone or restored volume.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Another program has the catalog's lock.
    #[error("another program{by} holds the server's catalog")]
    CatalogHeld {
        /// Which, if that is known.
        by: String,
    },
    /// The catalog failed.
    #[error(transparent)]
    Catalog(CatalogError),
}

impl From<CatalogError> for LifecycleError {
    fn from(error: CatalogError) -> Self {
        if error.is_out_of_space() {
            Self::NoSpace("write the catalog")
        } else if error.is_held() {
            Self::CatalogHeld { by: String::new() }
        } else if let CatalogError::Quota(reached) = error {
            Self::Tenants(TenantsError::Quota(reached))
        } else {
            Self::Catalog(error)
        }
    }
}

/// The lifecycle of one server's volumes and attachments; see the module's text.
#[derive(Debug)]
pub struct Lifecycle<D> {
    catalog: Catalog,
    data_side: Arc<D>,
    operations: Operations,
    /// Percent of the file system that no snapshot may take; `None`: see [`snapshot_error::reserve_bytes`].
    snapshot_reserve: Option<u8>,
    /// Why the storage has no snapshots, as it was found last; empty where it has.
    unsupported: Arc<Mutex<String>>,
    space_seen: space::SpaceSeen,
    nodes_seen: nodes::NodesSeen,
}

/// For an operation's thread: all of it is shared.
impl<D> Clone for Lifecycle<D> {
    fn clone(&self) -> Self {
        Self {
            catalog: self.catalog.clone(),
            data_side: Arc::clone(&self.data_side),
            operations: self.operations.clone(),
            snapshot_reserve: self.snapshot_reserve,
            unsupported: Arc::clone(&self.unsupported),
            space_seen: Arc::clone(&self.space_seen),
            nodes_seen: Arc::clone(&self.nodes_seen),
        }
    }
}

impl<D: DataSide> Lifecycle<D> {
    /// Over an open catalog and a running data side.
    pub fn new(catalog: Catalog, data_side: Arc<D>) -> Self {
        Self {
            catalog,
            data_side,
            operations: Operations::default(),
            snapshot_reserve: None,
            unsupported: Arc::default(),
            space_seen: Arc::default(),
            nodes_seen: Arc::default(),
        }
    }

    /// The same, with so many percent of the file system kept from snapshots; `None` is the default.
    pub fn with_snapshot_reserve(self, percent: Option<u8>) -> Self {
        Self { snapshot_reserve: percent, ..self }
    }

    /// The same for one call, whose change is written down together with its id; see `catalog/requests.rs`.
    pub fn under(&self, request: RequestKey) -> Self {
        Self { catalog: self.catalog.under(request), ..self.clone() }
    }

    /// Looks whether the storage has snapshots, and remembers it.
    pub fn look_whether_can_copy(&self) {
        match self.data_side.can_copy() {
            Ok(()) => tracing::info!("file volumes have snapshots here"),
            Err(CopyError::Unsupported(reason)) => {
                tracing::warn!(reason, "file volumes have no snapshots here");
                self.note_unsupported(&reason);
            }
            // It may be there, and is looked for again with the first snapshot.
            Err(error) => tracing::warn!(%error, "cannot tell whether file volumes have snapshots here"),
        }
    }

    /// Why the storage has no snapshots, as it was found last; empty where it has.
    pub fn snapshots_unsupported_reason(&self) -> String {
        self.unsupported.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_unsupported(&self, reason: &str) {
        reason.clone_into(&mut self.unsupported.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The same error, with what can be found out about its cause; looks at the system.
    pub fn explained(&self, error: LifecycleError) -> LifecycleError {
        match error {
            LifecycleError::CatalogHeld { .. } => LifecycleError::CatalogHeld { by: self.catalog.holder() },
            error => error,
        }
    }

    /// The catalog, for reading.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The data side, for reading.
    pub fn data_side(&self) -> &D {
        &self.data_side
    }
}

#[cfg(test)]
mod tests;
