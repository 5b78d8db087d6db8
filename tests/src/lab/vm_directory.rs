//! The directory of one running machine: share, sockets, scratch disk, console log.
//!
//! Removed when the machine ends. A lab that was killed outright cannot do that, so each start sweeps the
//! directories whose owner is gone: every owner holds a lock on its directory's `lock` file for as long as
//! it lives, and the kernel lets go of it whatever the way the owner died.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A Unix socket's address holds 108 bytes with the final zero (`unix(7)`).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The longest name of a socket in the directory.
const SOCKET_NAME_BYTES: usize = "/stdout.sock".len();

/// A directory that lives as long as this value.
pub(crate) struct VmDirectory {
    path: PathBuf,
    /// Held locked; see the head of the file.
    _lock: File,
}

impl VmDirectory {
    /// Makes a new one below `cache`, after removing those whose owners are gone.
    ///
    /// # Errors
    /// The cache cannot be written, or its path is too long for a socket.
    pub(crate) fn create(cache: &Path) -> Result<Self> {
        let parent = cache.join("vm");
        fs::create_dir_all(&parent).with_context(|| format!("creating {}", parent.display()))?;
        sweep(&parent);
        let process = std::process::id();
        let free = |number: &u32| !parent.join(format!("{process}-{number}")).exists();
        let number = (0..).find(free).context("every directory name is taken")?;
        let path = parent.join(format!("{process}-{number}"));
        ensure!(
            path.as_os_str().len() + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES_MAX,
            "{} is too long for a socket's address: set VOLNODE_LAB_CACHE to a shorter path",
            path.display()
        );
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        let lock = File::create(path.join("lock")).context("creating the directory's lock")?;
        lock.lock().context("locking the machine's directory")?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for VmDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("lab: removing {}: {error}", self.path.display());
        }
    }
}

/// Removes the directories whose lock nobody holds. One that cannot be removed is left for the next time.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let abandoned = match File::open(entry.path().join("lock")) {
            Ok(lock) => lock.try_lock().is_ok(),
            // Between its creation and its lock a directory has no lock file: it belongs to someone starting now.
            Err(_) => false,
        };
        if abandoned {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_owners_directory_is_swept_and_a_living_ones_is_kept() {
        let cache = std::env::temp_dir().join(format!("lab-sweep-{}", std::process::id()));
        let living = VmDirectory::create(&cache).unwrap();
        let dead = cache.join("vm/1-0");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("lock"), "").unwrap();
        let other = VmDirectory::create(&cache).unwrap();
        assert!(living.path().exists() && other.path().exists() && !dead.exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
        drop(other);
        fs::remove_dir_all(&cache).unwrap();
    }
}
