//! How volumes and attachments come into being and end: the order of the steps, so that a crash between any two of them
//! leaves nothing half-made behind and nothing answered is lost.
//!
//! Owns that order, and the lock that serializes the calls on one volume name. It keeps no state of its own beyond that:
//! the catalog is the truth, storage follows it. It knows nothing of gRPC (`management/` calls it) and nothing of NBD: what
//! it needs of the data side is the trait [`DataSide`]. Every method blocks.
//!
//! ```text
//! create:  row creating → storage durable → row ready → answer
//! delete:  hidden, nobody has it open → row deleting → storage gone → row gone → answer
//! attach:  (former holder: row ending → fenced → row gone) → row active → writers by name fenced → storage durable → answer
//! detach:  row ending → connections closed and their I/O finished → row gone → answer
//! ```
//! A row `creating`, `deleting` or `ending` is work that somebody has to finish: the next call on that volume, or
//! [`Lifecycle::recover`] at the next start.

mod attachments;
mod claims;
mod name_locks;
mod recovery;
mod volumes;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

pub use attachments::{AttachWanted, Attached, DetachWanted};
pub use claims::{HOLDER_TIMEOUT, Holder};
pub use name_locks::{NameLock, NameLocks};
pub use recovery::Recovered;

use crate::catalog::{Catalog, CatalogError, VolumeRecord};
use crate::machine_memory::{ForVolumes, TooMuchMemory};

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

/// What the lifecycle needs of the data side. All calls block, for a bounded time.
pub trait DataSide: Send + Sync + 'static {
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
}

impl<D: DataSide> Lifecycle<D> {
    /// Over an open catalog and a running data side.
    pub fn new(catalog: Catalog, data_side: Arc<D>) -> Self {
        Self { catalog, data_side }
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
