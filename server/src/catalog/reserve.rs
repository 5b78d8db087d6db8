//! Space that the catalog has before it needs it: on a full file system a server still starts, deletes, detaches and opens sessions.
//!
//! Two kinds. The database and its log (WAL) get blocks beyond their ends, which nobody else can take, so that a change finds
//! room where it is written. And a file, `reserve`, stands for what a start needs, when the log and its index are made; it is given
//! up for a start, or a deletion, that finds no space, and made again when there is some.
//! Called by [`super::Catalog::open`] and after deletions. Failures are no errors: without a reserve the catalog is as good, until the
//! file system is full.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};

const FILE_NAME: &str = "reserve";
/// A log, its index, and a journal's block for each; less is better than nothing.
const RESERVE_BYTES: [u64; 3] = [1 << 20, 512 << 10, 256 << 10];
const SPARED_BYTES: u64 = 64 << 10;
/// Below this much of free space the catalog saves it.
pub(super) const PLENTY_BYTES: u64 = 8 << 20;
/// Blocks of a file that was deleted are waited for.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(50);
/// The log is begun anew when it has so many pages of 4 KiB, if nobody reads it just then.
pub(super) const LOG_PAGES: u32 = 64;
const LOG_BYTES: u64 = 384 << 10;
/// For twice as many pages as SQLite maps at first.
const INDEX_BYTES: u64 = 64 << 10;
/// Some hundred volumes and attachments more.
const GROWTH_BYTES: u64 = 128 << 10;
/// The same with what is written down of their changes, up to where the oldest of those make room: see `changes/`.
const GROWTH_BYTES_MOST: u64 = 512 << 10;

/// Has the file of a start's reserve, as large as there is room for. What is left is not all taken, not even for a moment.
pub(super) fn make(data_dir: &Path) {
    let path = data_dir.join(FILE_NAME);
    let left_bytes = super::space_bytes(data_dir).unwrap_or(0);
    let fits = |bytes: &u64| left_bytes >= *bytes + SPARED_BYTES;
    let Some(bytes) = RESERVE_BYTES.into_iter().find(fits) else { return };
    match std::fs::metadata(&path) {
        Ok(found) if found.len() >= bytes => return,
        // Smaller than there is room for, or left by a server that was killed while it made it.
        Ok(_) => drop(std::fs::remove_file(&path)),
        Err(_) => {}
    }
    let options = OpenOptions::new().create_new(true).write(true).mode(0o600).clone();
    let made = options.open(&path).and_then(|file| {
        fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        file.sync_all()
    });
    if let Err(error) = made {
        tracing::debug!(%error, "there is no room for the catalog's reserve");
        let _ = std::fs::remove_file(&path);
    }
}

/// The same while the catalog is open, whose files may still need what little there is.
pub(super) fn renew(data_dir: &Path) {
    if super::space_bytes(data_dir).is_some_and(|bytes| bytes >= PLENTY_BYTES) {
        make(data_dir);
    }
}

/// Makes the reserve when it is dropped: of what a catalog that was closed gave back.
#[derive(Debug)]
pub(super) struct MadeAtClose(pub(super) PathBuf);

impl Drop for MadeAtClose {
    fn drop(&mut self) {
        // The log's blocks come back some time later.
        for _ in 0..TRIES {
            make(&self.0);
            if self.0.join(FILE_NAME).exists() || !self.0.exists() {
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// Gives the file up, and waits until its blocks can be had; false: there is none.
pub(super) fn release(data_dir: &Path) -> bool {
    let path = data_dir.join(FILE_NAME);
    let wanted_bytes = super::space_bytes(data_dir).unwrap_or(0) + length_bytes(&path) / 2;
    if std::fs::remove_file(path).is_err() {
        return false;
    }
    tracing::warn!("the file system of the data directory is full: using the space reserved for the catalog");
    has_soon(data_dir, wanted_bytes);
    true
}

/// Waits a moment until so much is free: of what was deleted just now. False: it is not.
pub(super) fn has_soon(data_dir: &Path, wanted_bytes: u64) -> bool {
    let has = || super::space_bytes(data_dir).is_none_or(|bytes| bytes >= wanted_bytes);
    if has() {
        return true;
    }
    // A journal lets others have the blocks only when it is written; XFS later than that.
    let _ = File::open(data_dir).and_then(|dir| dir.sync_all());
    for _ in 0..TRIES {
        if has() {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    false
}

/// Gives the open catalog's files blocks beyond their ends. The log's index first: it is mapped into memory, where a block that is
/// not to be had is SIGBUS. The files may be closed only after the database: with any descriptor of a file that a process closes
/// it loses all of its POSIX locks on it, and SQLite's are such.
#[must_use = "closing them takes SQLite's locks away"]
pub(super) fn preallocate(database: &Path) -> Vec<File> {
    let beside = |suffix: &str| {
        let mut path = database.as_os_str().to_owned();
        path.push(suffix);
        PathBuf::from(path)
    };
    let files = [
        (beside("-shm"), 0, INDEX_BYTES),
        (database.to_owned(), length_bytes(database), GROWTH_BYTES),
        (beside("-wal"), 0, LOG_BYTES),
        // Last, because it is wanted last: where there is no room for it, the others have theirs.
        (database.to_owned(), length_bytes(database), GROWTH_BYTES_MOST),
    ];
    let mut opened = Vec::new();
    for (path, from_bytes, more_bytes) in files {
        let Ok(file) = File::options().write(true).open(&path) else { continue };
        if let Err(error) = fallocate(&file, FallocateFlags::KEEP_SIZE, from_bytes, more_bytes) {
            tracing::debug!(path = %path.display(), %error, "nothing is kept ready for the catalog to grow");
        }
        opened.push(file);
    }
    opened
}

fn length_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}
