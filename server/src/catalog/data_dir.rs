//! The data directory: made, checked, locked and synced.
//!
//! Owns the directory's layout (`lock`, `catalog.sqlite`, `volumes/`) and the lock that keeps two servers apart: a flock
//! on `<data-dir>/lock`, which the kernel drops with the process however it ends. The file's text is the holder's pid, for
//! the message only. Never opens the catalog or a volume. Called by [`super::Catalog::open`].

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use file_lock::lock_alone;

/// Directory of the backing files inside the data directory.
pub const VOLUMES_DIR_NAME: &str = "volumes";
/// Directory of the snapshots' files inside the data directory; there is none before the first.
pub const SNAPSHOTS_DIR_NAME: &str = "snapshots";
const LOCK_FILE_NAME: &str = "lock";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// It, or something in it, cannot be made, opened or synced.
    #[error(
        "cannot use the data directory: {action} {path}: {source}; make it writable for this user or choose another --data-dir"
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// Another volserver has it open.
    #[error(
        "the data directory {path} is used by another volserver (pid {pid}): stop that one or choose another --data-dir"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Process id of the holder, as it wrote it; `unknown` if it has not yet.
        pid: String,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io { action, path, source }
}

/// Makes the directory and its `volumes` where missing (0700), and takes the lock; the lock lives as long as the file.
pub(super) fn prepare(data_dir: &Path) -> Result<File, DataDirError> {
    let volumes = data_dir.join(VOLUMES_DIR_NAME);
    if !data_dir.is_dir() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir)
            .map_err(io_error("making", data_dir))?;
        if let Some(parent) = data_dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync(parent)?;
        }
    }
    let lock = lock(data_dir)?;
    if !volumes.is_dir() {
        DirBuilder::new().mode(0o700).create(&volumes).map_err(io_error("making", &volumes))?;
    }
    Ok(lock)
}

fn lock(data_dir: &Path) -> Result<File, DataDirError> {
    let path = data_dir.join(LOCK_FILE_NAME);
    let mut options = OpenOptions::new();
    let mut file = options
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("opening", &path))?;
    if !lock_alone(&file).map_err(io_error("locking", &path))? {
        return Err(DataDirError::Locked { path: data_dir.to_owned(), pid: holder(&mut file) });
    }
    match write_pid(&mut file) {
        // The pid is for people; without room for it the lock is as good.
        Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => Ok(file),
        written => written.map(|()| file).map_err(io_error("writing", &path)),
    }
}

fn write_pid(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// The pid in the lock file, if there is one; nothing is decided by it.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.read_to_string(&mut text);
    let pid = text.trim();
    if read.is_ok() && !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()) {
        pid.to_owned()
    } else {
        "unknown".to_owned()
    }
}

/// Makes the directory's entries durable.
pub(super) fn sync(dir: &Path) -> Result<(), DataDirError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("syncing", dir))
}
