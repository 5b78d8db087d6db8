//! The records' files: one small file for each volume, in a directory that one process has at a time.
//!
//! Owns: how a file is read, replaced and changed in its place. Never: decides what a record means (`core.rs` does).
//! Called by: `mod.rs`, on threads that may wait for the runtime directory's file system, which is in memory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use file_lock::lock_alone;
use tracing::warn;
use uuid::Uuid;

use super::core::{Core, Found};
use super::history::Record;
use super::record;

const LOCK_FILE_NAME: &str = "lock";

/// Where a volume's record is.
pub(super) fn path(dir: &Path, volume_uid: Uuid) -> PathBuf {
    dir.join(volume_uid.to_string())
}

/// Makes the directory and locks it; `None`: somebody else has.
pub(super) fn prepare(dir: &Path) -> io::Result<Option<File>> {
    if !dir.is_dir() {
        if let Some(parent) = dir.parent().filter(|parent| !parent.is_dir()) {
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(dir.join(LOCK_FILE_NAME))?;
    Ok(lock_alone(&lock)?.then_some(lock))
}

/// Shows all records there are to the core, and removes those that say nothing.
pub(super) fn read_all(dir: &Path, core: &mut Core) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Some(volume_uid) = entry.file_name().to_str().and_then(|name| name.parse::<Uuid>().ok()) else {
            continue;
        };
        match core.found(volume_uid, &std::fs::read(entry.path())?) {
            Found::Kept => {}
            Found::Stale => std::fs::remove_file(entry.path())?,
            Found::Unreadable(error) => {
                warn!(%volume_uid, error, "what was known of the volume's storage cannot be read");
            }
        }
    }
    Ok(())
}

/// Puts a new file with the record in the place of the former one; gives it, to be changed in its place from then on. Without room for
/// another, the former one is changed. After an error it is as it was.
pub(super) fn replace(path: &Path, boot_id: &str, record: &Record) -> io::Result<File> {
    let new = path.with_extension("new");
    let made = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new);
    let written = made.and_then(|file| {
        write(&file, boot_id, record)?;
        std::fs::rename(&new, path)?;
        Ok(file)
    });
    written.or_else(|error| {
        drop(std::fs::remove_file(&new));
        let changed = OpenOptions::new().write(true).open(path).and_then(|file| {
            write(&file, boot_id, record)?;
            Ok(file)
        });
        changed.map_err(|_| error)
    })
}

/// Changes the record that a file has, which is not open.
pub(super) fn rewrite(path: &Path, boot_id: &str, record: &Record) -> io::Result<()> {
    write(&OpenOptions::new().write(true).open(path)?, boot_id, record)
}

/// Writes a record over the former one, in one piece.
pub(super) fn write(file: &File, boot_id: &str, record: &Record) -> io::Result<()> {
    file.write_all_at(&record::encode(boot_id, record)?, 0)
}
