//! A directory of the lab's that lives as long as the value, and not much longer than the process if that is killed.
//!
//! Removed when dropped. A lab that was killed outright cannot do that, so each new one sweeps the directories beside it whose
//! owner is gone: every owner holds a lock on its directory's `lock` file for as long as it lives, and the kernel lets go of it
//! whatever the way the owner died. Used for running machines (`vm_directory`) and for fresh ones (`fresh`).

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::progress::Step;
use super::{interrupt, tool};

/// Held while a directory is made, in the parent.
const MAKERS_LOCK: &str = "makers.lock";

/// How often a removal is tried, and how long is waited in between: processes that were killed may not be gone yet, and make
/// files meanwhile.
const REMOVALS: u32 = 20;
const REMOVAL_INTERVAL: Duration = Duration::from_millis(250);

/// A directory that lives as long as this value.
pub(crate) struct OwnedDirectory {
    path: PathBuf,
    /// Held locked; see the head of the file.
    _lock: File,
}

impl OwnedDirectory {
    /// Makes a new one in `parent`, which holds nothing else, after removing those whose owners are gone.
    ///
    /// # Errors
    /// `parent` cannot be made or written.
    pub(crate) fn create(parent: &Path) -> Result<Self> {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        // One at a time, threads of this process included: between its making and its lock a directory looks abandoned.
        let makers = File::create(parent.join(MAKERS_LOCK)).context("creating the lock of all makers")?;
        while let Err(error) = makers.try_lock() {
            ensure!(matches!(error, TryLockError::WouldBlock), "waiting for other makers: {error}");
            interrupt::check()?;
            thread::sleep(tool::POLL_INTERVAL);
        }
        sweep(parent);
        let process = std::process::id();
        let free = |number: &u32| !parent.join(format!("{process}-{number}")).exists();
        let number = (0..).find(free).context("every directory name is taken")?;
        let path = parent.join(format!("{process}-{number}"));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        let lock = File::create(path.join("lock")).context("creating the directory's lock")?;
        lock.lock().context("locking the directory")?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OwnedDirectory {
    fn drop(&mut self) {
        for attempt in 1..=REMOVALS {
            match fs::remove_dir_all(&self.path) {
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && attempt < REMOVALS => {
                    thread::sleep(REMOVAL_INTERVAL);
                }
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return eprintln!("lab: removing {}: {error}", self.path.display());
                }
                _ => return,
            }
        }
    }
}

/// Removes the directories whose lock nobody holds. One that cannot be removed is left for the next time.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        // The makers' own lock is a file, and has none in it.
        let abandoned = match File::open(entry.path().join("lock")) {
            Ok(lock) => lock.try_lock().is_ok(),
            // Makers wait for each other, so its owner was killed while it removed it, or removes it now.
            Err(error) => error.kind() == ErrorKind::NotFound,
        };
        if abandoned {
            let step = Step::begin(&format!("removing {}, whose lab was killed", entry.path().display()));
            let _ = fs::remove_dir_all(entry.path());
            step.end();
        }
    }
}
