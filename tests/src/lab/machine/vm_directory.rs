//! The directory of one running machine: share, sockets, scratch disk, console log.
//!
//! Removed when the machine ends, or when the next one starts if the lab was killed (`owned_directory`).

use std::path::Path;

use anyhow::{Result, ensure};

use crate::lab::owned_directory::OwnedDirectory;

/// A Unix socket's address holds 108 bytes with the final zero (`unix(7)`).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The longest name of a socket in the directory.
const SOCKET_NAME_BYTES: usize = "/stdout.sock".len();

/// A directory that lives as long as this value.
pub(crate) struct VmDirectory(OwnedDirectory);

impl VmDirectory {
    /// Makes a new one below `cache`, after removing those whose owners are gone.
    ///
    /// # Errors
    /// The cache cannot be written, or its path is too long for a socket.
    pub(crate) fn create(cache: &Path) -> Result<Self> {
        let directory = OwnedDirectory::create(&cache.join("vm"))?;
        let path = directory.path();
        ensure!(
            path.as_os_str().len() + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES_MAX,
            "{} is too long for a socket's address: set VOLNODE_LAB_CACHE to a shorter path",
            path.display()
        );
        Ok(Self(directory))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::thread;

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

    #[test]
    fn machines_that_start_together_get_directories_of_their_own() {
        let cache = std::env::temp_dir().join(format!("lab-together-{}", std::process::id()));
        let make = || (0..20).map(|_| VmDirectory::create(&cache).unwrap()).collect::<Vec<_>>();
        let made: Vec<VmDirectory> = thread::scope(|scope| {
            let makers: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
            makers.into_iter().flat_map(|maker| maker.join().unwrap()).collect()
        });
        let paths: HashSet<_> = made.iter().map(|directory| directory.path().to_owned()).collect();
        assert!(paths.len() == 80 && paths.iter().all(|path| path.exists()));
        drop(made);
        fs::remove_dir_all(&cache).unwrap();
    }
}
