//! Files of our own in directories that others may write to, too: `/tmp`, or a share for images.
//!
//! Whoever runs this may be root. So a name that somebody else has put there never leads to another file, and a file that another user
//! made, or can still reach by another name, is not written to.
//! Used by `journal.rs`, and by volctl for images that are not whole yet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::io::Errno;

/// Makes a file to read and write, of this mode.
///
/// # Errors
/// Those of open(2); [`io::ErrorKind::AlreadyExists`] where there is anything of that name.
pub fn make(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path)
}

/// Opens a file to read and write that was made before, by whoever runs this.
///
/// # Errors
/// Those of open(2); [`io::ErrorKind::PermissionDenied`] where it is a symbolic link, no file, another user's, or has another name.
pub fn open(path: &Path) -> io::Result<File> {
    let refused = |why: String| io::Error::new(io::ErrorKind::PermissionDenied, why);
    let mut options = OpenOptions::new();
    // Nor does it wait for whoever is at the other end of a pipe.
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => refused("it is a symbolic link".into()),
        _ => error,
    })?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(refused("it is no file".into()));
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(refused(format!("it belongs to user {}, who is another one", metadata.uid())));
    }
    if metadata.nlink() > 1 {
        return Err(refused(format!("it has {} names (hard links)", metadata.nlink())));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_a_file_of_ours_is_opened_and_none_is_made_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        make(&path("ours"), 0o600).unwrap();
        assert_eq!(make(&path("ours"), 0o600).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        open(&path("ours")).unwrap();
        let refused = |name: &str, what: &str| {
            let error = open(&path(name)).unwrap_err();
            assert!(error.to_string().contains(what), "{name}: {error}");
        };
        std::os::unix::fs::symlink(path("ours"), path("symlink")).unwrap();
        refused("symlink", "symbolic link");
        std::os::unix::fs::symlink(path("nothing"), path("dangling")).unwrap();
        assert_eq!(make(&path("dangling"), 0o600).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        refused("pipe", "no file");
        fs::hard_link(path("ours"), path("another name")).unwrap();
        refused("ours", "2 names");
        assert_eq!(open(&path("nothing")).unwrap_err().kind(), io::ErrorKind::NotFound);
        if rustix::process::geteuid().is_root() {
            make(&path("theirs"), 0o666).unwrap();
            std::os::unix::fs::chown(path("theirs"), Some(65_534), None).unwrap();
            refused("theirs", "user 65534");
        }
    }
}
