//! Lock files: what one process is to do alone, known to all others, and to those that come after it.
//!
//! Owns: taking a lock, the note in it, and its removal. The lock is the kernel's (flock) and belongs to the open file: whoever inherits
//! the descriptor has it as well, so a program goes on holding it when the process that started it is gone. Never: waits, or takes a file
//! for locked because it is there. Called by: `socket`, `jobs`.
//! Source: flock(2).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

/// How much of a note is read, in bytes: more than any that is written.
const NOTE_BYTES_MAX: usize = 1000;

/// A lock that is held. The file goes when this is dropped; the lock when nobody has its descriptor any more.
#[derive(Debug)]
pub struct LockFile {
    file: File,
    path: PathBuf,
}

impl LockFile {
    /// Takes the lock; `None`: somebody else has it.
    ///
    /// # Errors
    /// The file system's; a symbolic link at the path is one.
    pub fn take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let mut options = File::options();
            options.read(true).write(true).create(true).mode(0o600);
            options.custom_flags(OFlags::NOFOLLOW.bits() as i32);
            let file = options.open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
            // Whoever had it may have removed the file in between: then this is the lock of a file without a name.
            let held = file.metadata()?;
            match fs::symlink_metadata(path) {
                Ok(named) if (named.dev(), named.ino()) == (held.dev(), held.ino()) => {
                    return Ok(Some(Self { file, path: path.to_owned() }));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes down what it is held for.
    ///
    /// # Errors
    /// The file system's.
    pub fn note(&self, text: &str) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(text.as_bytes(), 0)
    }
}

impl AsFd for LockFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Still locked, so nobody else has taken it for theirs.
        fs::remove_file(&self.path).ok();
    }
}

/// What the holder of a lock wrote down; empty where nothing can be read.
pub fn note_of(path: &Path) -> String {
    let mut bytes = fs::read(path).unwrap_or_default();
    bytes.truncate(NOTE_BYTES_MAX);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_lock_is_one_holders_and_its_file_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = LockFile::take(&path).unwrap().unwrap();
        held.note("a longer note").unwrap();
        held.note("a note").unwrap();
        assert!(LockFile::take(&path).unwrap().is_none());
        assert_eq!(note_of(&path), "a note");
        drop(held);
        assert!(!path.exists());
        assert_eq!(note_of(&path), "");
        drop(LockFile::take(&path).unwrap().unwrap());
    }

    #[test]
    fn a_file_that_a_killed_process_left_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(&path, "an old note").unwrap();
        assert!(LockFile::take(&path).unwrap().is_some());
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(LockFile::take(&path).is_err());
        assert!(!dir.path().join("elsewhere").exists());
    }
}
