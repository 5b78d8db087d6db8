//! The directory of one running machine: share, sockets, scratch disk, console log.
//!
//! Removed when the machine ends, or when the next one starts if the lab was killed (`owned_directory`).

use std::path::Path;

use anyhow::{Result, ensure};

use super::owned_directory::OwnedDirectory;

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
