//! The catalog: which volumes, attachments and grants there are, kept in `<data-dir>/catalog.sqlite`.
//!
//! Owns the SQLite database, the data directory's lock, and the formats of both. It holds identities, states, secrets,
//! generations, epochs and incarnations; it never touches a volume's data and never talks to a peer.
//! Called by the management side (`management/`, `lifecycle/mod.rs`) and by the data side when a connection is opened, an
//! epoch is raised or an fsync has failed. Every call blocks; tokio tasks go through `spawn_blocking`.
//!
//! Invariants:
//! - A change that was returned as done is durable: WAL with `synchronous=FULL`, one fsync for each commit.
//! - Only volumes in state `ready` and attachments in state `active` are visible to the data side.
//! - A volume has at most one attachment, kept by a UNIQUE constraint, unless all share it and only read.
//! - Session epochs, attach generations and incarnations never go down.
//! - No error and no `Debug` text of this module holds a secret.

mod adopted;
mod attachment_tables;
mod attachments;
mod changes;
mod columns;
mod data_dir;
mod grants;
mod held;
mod nodes;
mod records;
mod requests;
mod reserve;
mod schema;
mod settings;
mod snapshots;
mod tenants;
mod thin;
mod volumes;

use std::collections::HashSet;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::Connection;
use tokio::sync::watch;
use uuid::Uuid;

pub use adopted::{Adopted, AdoptedKind};
pub use changes::{
    AttachmentFacts, Change, ChangePoint, Facts, GrantFacts, Happened, NodeFacts as WatchedNodeFacts,
    PresentPage, SnapshotFacts, Told, VolumeFacts, WatchedKind,
};
pub use data_dir::{DataDirError, SNAPSHOTS_DIR_NAME, VOLUMES_DIR_NAME};
pub use grants::{GrantFilter, GrantRecord, Withdrawn};
pub use nodes::{NodeFacts, NodeRecord};
pub use records::{
    AttachmentFilter, AttachmentRecord, AttachmentState, BackendKind, ListedAttachment, NewAttachment,
    NewSnapshot, NewVolume, SnapshotFilter, SnapshotKey, SnapshotRecord, SnapshotState, VolumeRecord,
    VolumeState,
};
pub use requests::{Carried, RequestKey};
pub use schema::FORMAT_VERSION;
pub use settings::{Content, VolumeLimits, VolumeSettings};
pub use tenants::{Limited, Quota, QuotaReached, TenantRecord, Usage};
pub use volumes::Concealed;

/// File name of the database inside the data directory.
pub const CATALOG_FILE_NAME: &str = "catalog.sqlite";

/// What the catalog's files take when a server starts, in bytes, with what a file system needs around them.
const SPACE_BYTES_LEAST: u64 = 1 << 20;

/// Statements that are kept compiled: more than there are.
const STATEMENTS_KEPT: usize = 128;

/// Below this no catalog is opened, because its index could end the process.
const INDEX_SPACE_BYTES: u64 = 128 << 10;

/// Why the catalog could not be opened, read or changed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The data directory cannot be used, or another server uses it.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The database file could not be made or its access rights set.
    #[error("cannot prepare {path}: {source}")]
    File {
        /// The database file.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The server cannot start, because its file system is full.
    #[error(
        "no space left on the file system of {dir}, where the catalog is kept ({cause}): free some there, then start volserver again"
    )]
    NoSpace {
        /// The data directory.
        dir: PathBuf,
        /// What failed for it.
        cause: String,
    },
    /// SQLite failed: no space, an I/O error, a damaged file.
    #[error("catalog: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The server cannot start, because another program has the catalog's lock.
    #[error("another program{by} holds the catalog {path}: close it, then start volserver again")]
    Held {
        /// The database file.
        path: PathBuf,
        /// Which, if that is known.
        by: String,
    },
    /// The file is a database, but not a volnode catalog.
    #[error("{0} is not a volnode catalog: choose another --data-dir, or move that file away")]
    Foreign(PathBuf),
    /// There is no catalog, but volumes that one must have known: making a new one would orphan them.
    #[error(
        "{CATALOG_FILE_NAME} is missing, but {0} holds volumes: restore it from a backup, or move the volumes away if \
         they are not wanted"
    )]
    Lost(PathBuf),
    /// A newer program wrote the catalog in a format that this one cannot read.
    #[error(
        "the catalog has format version {found}, which needs a program that knows version {needed}; \
         this one knows {FORMAT_VERSION}: upgrade volserver"
    )]
    NewerFormat {
        /// Version of the format found.
        found: u32,
        /// Oldest version that can read it, as the file says.
        needed: u32,
    },
    /// A row holds a value that no version of this program writes.
    #[error(
        "the catalog is damaged: {table}.{column} holds an unreadable value; restore {CATALOG_FILE_NAME} from a backup"
    )]
    Damaged {
        /// Table of the row.
        table: &'static str,
        /// Column of the value.
        column: &'static str,
    },
    /// No volume has that identity (or it is being made or deleted).
    #[error("no volume {0}")]
    VolumeNotFound(Uuid),
    /// The name is taken by another volume.
    #[error("a volume of that name exists")]
    VolumeExists,
    /// No volume can be in a thin pool.
    #[error("the server has no thin pool")]
    NoThinPool,
    /// No snapshot has that identity, or not in that state.
    #[error("no snapshot {0}")]
    SnapshotNotFound(Uuid),
    /// One of the volumes has a snapshot of that name.
    #[error("a snapshot of that name exists")]
    SnapshotExists,
    /// The volume has an attachment already.
    #[error("volume {0} is attached")]
    VolumeAttached(Uuid),
    /// The attachment was to be made under a grant, and the node has none of the volume, or one to read only.
    #[error("volume {0} is not granted to the node")]
    NotGranted(Uuid),
    /// The node of a grant that was to be made has as many volumes as it can have.
    #[error("the node has {volumes} volumes, and can have {max_volumes}")]
    NodeFull {
        /// Granted or attached to it.
        volumes: u32,
        /// As it registered.
        max_volumes: u32,
    },
    /// No attachment has that identity, or it is ending.
    #[error("no attachment {0}")]
    AttachmentNotFound(Uuid),
    /// A higher session epoch was opened before.
    #[error("session epoch {epoch} is over: epoch {current} has been opened")]
    StaleEpoch {
        /// The epoch asked for.
        epoch: u64,
        /// The epoch kept.
        current: u64,
    },
    /// A number does not fit the database's signed 64 bits.
    #[error("{0} is more than the catalog can keep (2^63 - 1)")]
    TooLarge(&'static str),
    /// The operating system's random source failed, so no secret could be made.
    #[error("no random bytes for a secret: {0}")]
    Random(String),
    /// The tenant in whose name space it is has as much as it may.
    #[error(transparent)]
    Quota(#[from] QuotaReached),
}

impl CatalogError {
    /// True where SQLite's own error may come of a file that it could not make or make longer, and of other things.
    fn may_be_for_space(&self) -> bool {
        let Self::Sqlite(error) = self else { return false };
        let code = error.sqlite_error_code();
        matches!(code, Some(rusqlite::ErrorCode::CannotOpen | rusqlite::ErrorCode::SystemIoFailure))
    }

    /// True where another program has the catalog's lock.
    pub fn is_held(&self) -> bool {
        match self {
            Self::Held { .. } => true,
            Self::Sqlite(error) => {
                let code = error.sqlite_error_code();
                matches!(code, Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked))
            }
            _ => false,
        }
    }

    /// True where the cause is a full file system under the data directory.
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Sqlite(error) => error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            Self::DataDir(DataDirError::Io { source, .. }) | Self::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}

/// The catalog of one server; clones share it.
#[derive(Clone)]
pub struct Catalog {
    inner: Arc<Inner>,
    /// The call that it is used for, where that has an id; see `requests.rs`.
    request: Option<Arc<RequestKey>>,
}

struct Inner {
    state: Mutex<State>,
    server_id: Uuid,
    data_dir: PathBuf,
    /// Where new volumes of the backend `lvm` are, if there can be any.
    thin_pool: OnceLock<String>,
    /// Told of each row of `changes`.
    changes: watch::Sender<u64>,
    /// How many of them there had been when it was last seen to that there is room for more.
    changes_at_look: AtomicU64,
    /// Behind the database, whose locks they would take along: POSIX locks of a file go with any of its descriptors.
    _preallocated: Vec<File>,
    /// Behind the database: it has given its log back by then.
    _reserve: reserve::MadeAtClose,
    /// Held as long as the catalog is open: no second server uses the directory.
    _lock: File,
}

struct State {
    db: Connection,
    /// Volumes and snapshots that a deletion has hidden from the data side while it looks whether anybody has them open, and volumes
    /// that are being restored. In memory
    /// only: a deletion that is refused leaves nothing behind, whenever the process dies.
    concealed: HashSet<Uuid>,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").field("data_dir", &self.inner.data_dir).finish_non_exhaustive()
    }
}

impl Catalog {
    /// Locks `data_dir` and opens its catalog; makes both (directory 0700, file 0600) where they are missing.
    ///
    /// # Errors
    /// The directory cannot be made or written, another process holds it, the catalog is foreign, damaged, lost or of a
    /// newer format, or SQLite failed. [`CatalogError::NoSpace`]: its file system is full. [`CatalogError::Held`]: another
    /// program has it.
    pub fn open(data_dir: &Path) -> Result<Self, CatalogError> {
        // SQLite has several words for a file of its own that it could not make or make longer.
        let is_for_space = |error: &CatalogError| {
            error.is_out_of_space() || (error.may_be_for_space() && is_nearly_full(data_dir))
        };
        let mut is_released = false;
        let mut opened = Self::open_in(data_dir, &mut is_released);
        if opened.as_ref().is_err_and(is_for_space) && reserve::release(data_dir) {
            opened = Self::open_in(data_dir, &mut is_released);
            is_released = true;
        }
        let catalog = opened.map_err(|error| {
            if error.is_held() {
                let path = data_dir.join(CATALOG_FILE_NAME);
                return CatalogError::Held { by: held::holder(&path), path };
            }
            if !is_for_space(&error) {
                return error;
            }
            CatalogError::NoSpace { dir: data_dir.to_owned(), cause: error.to_string() }
        })?;
        // What was given up just now is for what follows.
        if !is_released {
            reserve::make(data_dir);
        }
        Ok(catalog)
    }

    fn open_in(data_dir: &Path, is_released: &mut bool) -> Result<Self, CatalogError> {
        let lock = data_dir::prepare(data_dir)?;
        // Before it is needed: what SQLite maps into memory and finds no block for ends the process.
        *is_released |= is_nearly_full(data_dir) && reserve::release(data_dir);
        // Whoever has made room starts the server at once.
        if !reserve::has_soon(data_dir, INDEX_SPACE_BYTES) {
            let cause = "what is left is too little for its index".to_owned();
            return Err(CatalogError::NoSpace { dir: data_dir.to_owned(), cause });
        }
        let path = data_dir.join(CATALOG_FILE_NAME);
        create_private_file(&path).map_err(|source| CatalogError::File { path: path.clone(), source })?;
        let mut db = Connection::open(&path)?;
        db.busy_handler(Some(held::wait))?;
        db.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update(None, "foreign_keys", true)?;
        db.pragma_update(None, "wal_autocheckpoint", reserve::LOG_PAGES)?;
        let storage_dirs = [VOLUMES_DIR_NAME, SNAPSHOTS_DIR_NAME].map(|name| data_dir.join(name));
        schema::prepare(&mut db, &path, &storage_dirs)?;
        schema::add_columns(&mut db)?;
        db.execute_batch(adopted::TABLE)?;
        db.execute_batch(thin::TABLE)?;
        nodes::prepare(&db)?;
        db.execute_batch(grants::TABLE)?;
        requests::prepare(&db)?;
        db.execute_batch(tenants::TABLES)?;
        changes::prepare(&mut db)?;
        db.execute_batch(tenants::TIDY)?;
        let changes = changes::notify(&mut db)?;
        let server_id = schema::server_id(&db)?;
        // The entries of the directory (database, lock, volumes) are durable before anything is answered.
        data_dir::sync(data_dir)?;
        let preallocated = reserve::preallocate(&path);
        if let Err(error) = changes::make_room(&db, data_dir, changes::STEPS_MAX) {
            tracing::warn!(%error, "cannot make room in the catalog; its file system is nearly full");
        }
        let state = Mutex::new(State { db, concealed: HashSet::new() });
        let inner = Inner {
            state,
            server_id,
            data_dir: data_dir.to_owned(),
            thin_pool: OnceLock::new(),
            changes,
            changes_at_look: AtomicU64::new(0),
            _preallocated: preallocated,
            _reserve: reserve::MadeAtClose(data_dir.to_owned()),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner), request: None })
    }

    /// Identity of this server, made once with the catalog.
    pub fn server_id(&self) -> Uuid {
        self.inner.server_id
    }

    /// Which other program has the catalog's lock, as a text to be put behind "another program"; empty: it is not known.
    pub fn holder(&self) -> String {
        held::holder(&self.inner.data_dir.join(CATALOG_FILE_NAME))
    }

    /// Where the backing files of the volumes are.
    pub fn volumes_dir(&self) -> PathBuf {
        self.inner.data_dir.join(VOLUMES_DIR_NAME)
    }

    /// What there is on the volumes' file system, and what is left of it; `None`: that is not known.
    pub fn volumes_space(&self) -> Option<Space> {
        space(&self.volumes_dir())
    }

    /// The database, for one call. A panic elsewhere rolled its transaction back, so the state is sound even then.
    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.keep_room(&state.db);
        state
    }

    /// Runs a call that takes something away; once more, with room made for it, where the file system is full.
    fn taking_away<T>(
        &self,
        write: impl Fn(&mut State) -> Result<T, CatalogError>,
    ) -> Result<T, CatalogError> {
        let mut state = self.state();
        match write(&mut state) {
            Err(error) if error.is_out_of_space() => {
                tracing::warn!(%error, "the catalog is full: dropping its oldest changes to make room for a deletion");
                // What the log and the database need to take those away is in the reserve.
                let is_released = reserve::release(&self.inner.data_dir);
                let written = changes::make_room_at_any_price(&state.db)
                    .map_err(CatalogError::from)
                    .and_then(|()| write(&mut state));
                if is_released {
                    reserve::make(&self.inner.data_dir);
                }
                written
            }
            written => written,
        }
    }
}

/// Makes the file with access for its owner only, or takes such access away from an existing one; SQLite gives its WAL
/// the same rights.
fn create_private_file(path: &Path) -> std::io::Result<()> {
    let file =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))
}

/// Whether the file system has less space than the catalog's own files may want, or no place for another file.
fn is_nearly_full(dir: &Path) -> bool {
    let has_files_left = rustix::fs::statvfs(dir).is_ok_and(|space| {
        // Some have no fixed number of files, and say 0.
        space.f_files == 0 || space.f_favail > 0
    });
    space_bytes(dir).is_some_and(|bytes| bytes < SPACE_BYTES_LEAST || !has_files_left)
}

/// Of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this process may still take.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// What is left on the file system, in bytes; `None`: that is not known.
fn space_bytes(dir: &Path) -> Option<u64> {
    space(dir).map(|space| space.free_bytes)
}

fn space(dir: &Path) -> Option<Space> {
    // Some file systems tell nothing.
    let space = rustix::fs::statvfs(dir).ok().filter(|space| space.f_blocks > 0)?;
    // Some keep a part for root.
    let blocks = if rustix::process::geteuid().is_root() { space.f_bfree } else { space.f_bavail };
    let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
    Some(Space { free_bytes: bytes(blocks), total_bytes: bytes(space.f_blocks) })
}

/// Milliseconds since the Unix epoch; 0 on a machine whose clock is before it.
pub(crate) fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// A number as the database keeps it.
fn to_db(value: u64, name: &'static str) -> Result<i64, CatalogError> {
    i64::try_from(value).map_err(|_| CatalogError::TooLarge(name))
}

#[cfg(test)]
mod tests;
