//! The files of copies, and where they are.
//!
//! ```text
//!   <data-dir>/snapshots/<snapshot_uid>           a snapshot
//!   <data-dir>/volumes/<volume_uid>               a clone, which is a volume
//!   <data-dir>/volumes/<volume_uid>.restoring     what is to take the volume's place
//!   <data-dir>/snapshots/, without a name         a volume's instant, as long as it is compared
//! ```
//! Owns: making, finding, measuring and removing them. Never: copies (`copier.rs` does).
//! Called by: `data/copies.rs`, `data_side.rs`. Invariants: what removes or replaces is durable when it returns; names of another form
//! are passed over. A volserver that knows nothing of snapshots passes all of these over.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::backend::reflink;
use crate::volume::copying::{CopyError, CopyTarget};

/// Directory of the snapshots, beside that of the volumes.
const SNAPSHOTS_DIR_NAME: &str = "snapshots";
const RESTORING: &str = ".restoring";
/// What is shared to find out whether that can be done, in bytes.
const PROBE_BYTES: u64 = 64 << 10;

/// Where copies are.
#[derive(Debug, Clone)]
pub struct CopyFiles {
    volumes_dir: PathBuf,
    snapshots_dir: PathBuf,
}

impl CopyFiles {
    /// Of a server whose volumes are there.
    pub fn new(volumes_dir: PathBuf) -> Self {
        let snapshots_dir = volumes_dir.with_file_name(SNAPSHOTS_DIR_NAME);
        Self { volumes_dir, snapshots_dir }
    }

    /// The file of a volume.
    pub fn volume(&self, volume_uid: Uuid) -> PathBuf {
        self.volumes_dir.join(volume_uid.to_string())
    }

    /// The file of a copy.
    pub fn path(&self, target: CopyTarget) -> PathBuf {
        match target {
            CopyTarget::Snapshot(snapshot_uid) => self.snapshots_dir.join(snapshot_uid.to_string()),
            CopyTarget::Volume(volume_uid) => self.volume(volume_uid),
            CopyTarget::Restored(volume_uid) => self.volumes_dir.join(format!("{volume_uid}{RESTORING}")),
            // For messages alone.
            CopyTarget::Nameless(_) => self.snapshots_dir.clone(),
        }
    }

    /// Whether files of volumes can share their blocks with files of snapshots: tries it.
    ///
    /// # Errors
    /// [`CopyError::Unsupported`]: what the storage is, and what to do; [`CopyError::NoSpace`], [`CopyError::Failed`]: not even
    /// that can be found out.
    pub fn can_copy(&self) -> Result<(), CopyError> {
        self.make_snapshots_dir().map_err(|error| failed("make the directory of snapshots", &error))?;
        let name = format!(".probe-{}", Uuid::new_v4());
        let [from, to] = [self.volumes_dir.join(&name), self.snapshots_dir.join(&name)];
        let shared = probe(&from, &to);
        for path in [&from, &to] {
            // One that was not made, or stays: it is passed over.
            let _ = std::fs::remove_file(path);
        }
        shared
    }

    /// Makes the file of a copy, empty; one that is left of an interrupted call is emptied.
    ///
    /// # Errors
    /// The system's.
    pub fn create(&self, target: CopyTarget) -> io::Result<File> {
        self.make_snapshots_dir()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if let CopyTarget::Nameless(_) = target {
            return options.custom_flags(libc::O_TMPFILE).open(&self.snapshots_dir);
        }
        options.create(true).truncate(true).open(self.path(target))
    }

    /// Removes a copy, durably; one that is not there is a success.
    ///
    /// # Errors
    /// The system's.
    pub fn delete(&self, target: CopyTarget) -> io::Result<()> {
        if let CopyTarget::Nameless(_) = target {
            return Ok(());
        }
        let path = self.path(target);
        match std::fs::remove_file(&path) {
            Ok(()) => self.sync_directory(target),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes durable that the copy is there.
    ///
    /// # Errors
    /// The system's.
    pub fn sync_directory(&self, target: CopyTarget) -> io::Result<()> {
        let directory = match target {
            CopyTarget::Snapshot(_) => &self.snapshots_dir,
            CopyTarget::Nameless(_) => return Ok(()),
            CopyTarget::Volume(_) | CopyTarget::Restored(_) => &self.volumes_dir,
        };
        File::open(directory)?.sync_all()
    }

    /// What was copied to be restored takes the place of the volume's file, durably and at once.
    ///
    /// # Errors
    /// The system's: `NotFound` where nothing was copied.
    pub fn replace(&self, volume_uid: Uuid) -> io::Result<()> {
        let restored = CopyTarget::Restored(volume_uid);
        std::fs::rename(self.path(restored), self.volume(volume_uid))?;
        self.sync_directory(restored)
    }

    /// The copies that are no volumes.
    ///
    /// # Errors
    /// The system's.
    pub fn stored(&self) -> io::Result<Vec<CopyTarget>> {
        let snapshots = names_in(&self.snapshots_dir).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(Vec::new()),
            _ => Err(error),
        })?;
        let snapshots = snapshots.iter().filter_map(|name| uid(name)).map(CopyTarget::Snapshot);
        let in_volumes = names_in(&self.volumes_dir)?;
        let restored = in_volumes.iter().filter_map(|name| uid(name.strip_suffix(RESTORING)?));
        Ok(snapshots.chain(restored.map(CopyTarget::Restored)).collect())
    }

    /// Bytes of storage that a snapshot takes, those that it shares among them; 0 where there is none.
    pub fn allocated_bytes(&self, snapshot_uid: Uuid) -> u64 {
        // st_blocks counts units of 512 bytes whatever the file system's block size.
        let path = self.path(CopyTarget::Snapshot(snapshot_uid));
        std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
    }

    fn make_snapshots_dir(&self) -> io::Result<()> {
        if self.snapshots_dir.is_dir() {
            return Ok(());
        }
        match DirBuilder::new().mode(0o700).create(&self.snapshots_dir) {
            // Two calls at once.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        let parent = self.snapshots_dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

fn uid(name: &str) -> Option<Uuid> {
    name.parse::<Uuid>().ok().filter(|uid| uid.to_string() == name)
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    let names = std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
    Ok(names.collect::<io::Result<Vec<Option<String>>>>()?.into_iter().flatten().collect())
}

/// The way out is the same for all.
fn unsupported(what: &str) -> CopyError {
    CopyError::Unsupported(format!(
        "the data directory is on {what}: put --data-dir on XFS (mkfs.xfs, reflink is on by default) or btrfs"
    ))
}

/// What a failure of the system means.
pub fn failed(action: &str, error: &io::Error) -> CopyError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CopyError::NoSpace,
        _ => CopyError::Failed(format!("cannot {action}: {error}")),
    }
}

fn probe(from: &Path, to: &Path) -> Result<(), CopyError> {
    let make = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        // Without a name, nothing is left of it by a kill; where a file system has no such files, with one.
        let nameless = options.clone().custom_flags(libc::O_TMPFILE).open(path.parent().unwrap_or(path));
        let made = nameless.or_else(|_| options.create_new(true).open(path));
        let sized = made.and_then(|file| file.set_len(PROBE_BYTES).map(|()| file));
        sized.map_err(|error| failed(&format!("make {}", path.display()), &error))
    };
    let (from, to) = (make(from)?, make(to)?);
    match reflink::share(&from, &to, &(0..PROBE_BYTES)) {
        Ok(()) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EXDEV) => Err(unsupported(
                "two file systems, one with volumes/ and one with snapshots/, and blocks are shared within one alone",
            )),
            Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => {
                Err(unsupported(&reflink::why_not(&from)))
            }
            _ => Err(failed("share blocks of two files", &error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> (tempfile::TempDir, CopyFiles) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("volumes")).unwrap();
        let files = CopyFiles::new(dir.path().join("volumes"));
        (dir, files)
    }

    #[test]
    fn copies_are_listed_replaced_and_deleted_and_what_is_not_theirs_is_passed_over() {
        let (dir, files) = files();
        assert_eq!(files.stored().unwrap(), [], "before the first one");
        let [snapshot, volume] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let (snapshot, restored) = (CopyTarget::Snapshot(snapshot), CopyTarget::Restored(volume));
        for target in [snapshot, restored, CopyTarget::Volume(volume)] {
            files.create(target).unwrap().set_len(4096).unwrap();
        }
        for name in ["snapshots/lost+found", "volumes/x.restoring", "volumes/y"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(files.stored().unwrap(), [snapshot, restored]);
        std::fs::write(files.path(restored), "restored").unwrap();
        files.replace(volume).unwrap();
        assert_eq!(std::fs::read(files.volume(volume)).unwrap(), b"restored");
        assert_eq!(files.replace(volume).unwrap_err().kind(), io::ErrorKind::NotFound);
        files.delete(snapshot).unwrap();
        files.delete(snapshot).unwrap();
        assert_eq!(files.stored().unwrap(), []);
    }

    #[test]
    fn storage_that_cannot_says_what_it_is_and_what_to_do() {
        let (dir, files) = files();
        let answer = files.can_copy();
        let left = std::fs::read_dir(dir.path().join("volumes")).unwrap().count();
        assert_eq!(left, 0, "nothing is left of the attempt");
        if let Err(error) = answer {
            assert!(matches!(error, CopyError::Unsupported(_)), "{error:?}");
            assert!(error.to_string().contains("put --data-dir on XFS"), "{error}");
        }
    }
}
