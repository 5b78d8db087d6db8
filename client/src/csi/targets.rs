//! Paths that kubelet names: staging and target paths, all of them below kubelet's directory.
//!
//! Owns: how such a path is opened, made and removed. Never: follows a symbolic link, leaves the directory, or removes what is in
//! something. The workload may own directories on the way and change them while we look: so each path is opened from the
//! directory's descriptor (openat2), and everything else is done from the parent's. Called by: `mounts`.
//! Source: openat2(2), Linux 5.6.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Longest path that the kernel takes, in bytes: `PATH_MAX` less the final zero.
const PATH_BYTES_MAX: usize = 4095;
/// Longest name within a directory, in bytes: `NAME_MAX`.
const NAME_BYTES_MAX: usize = 255;
/// How much of a path a message shows, in characters.
const SHOWN_CHARACTERS_MAX: usize = 200;
/// For kubelet, which makes its own directories with it.
const DIRECTORY_MODE: u32 = 0o750;
/// A device is shown over it; it is never read or written itself.
const FILE_MODE: u32 = 0o600;
const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Why a path is not taken, or nothing can be made or removed there.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// No path could look like this.
    #[error("{path:?} is no path of a volume: {why}; give the absolute path that kubelet made")]
    Malformed {
        /// As given, cut.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not below kubelet's directory.
    #[error("{path:?} is not below {}; start volcsi with the --kubelet-dir that kubelet has as its --root-dir", .kubelet_dir.display())]
    Elsewhere {
        /// As given, cut.
        path: String,
        /// Where paths have to be.
        kubelet_dir: PathBuf,
    },
    /// A part of the path is a symbolic link, or became one.
    #[error("{path:?} leads through a symbolic link; remove the link")]
    Link {
        /// As given, cut.
        path: String,
    },
    /// Something else is there.
    #[error("{path:?} is {found}, and has to be {wanted}; remove it")]
    OtherKind {
        /// As given, cut.
        path: String,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// It holds something that is not ours.
    #[error("{path:?} is not empty though nothing is mounted there; look what it holds, and remove that")]
    NotEmpty {
        /// As given, cut.
        path: String,
    },
    /// The system's own error; `NotFound` where the directory that holds it is not there.
    #[error("{path:?}: {source}")]
    Io {
        /// As given, cut.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl TargetError {
    /// Whether the directory that is to hold the target is not there, and so the target neither.
    pub fn is_not_there(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What is at a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetKind {
    /// For a file system.
    Directory,
    /// For a block device.
    File,
}

impl TargetKind {
    fn words(self) -> &'static str {
        match self {
            Self::Directory => "a directory",
            Self::File => "a file",
        }
    }
}

/// Kubelet's directory, such as `/var/lib/kubelet`, held open.
#[derive(Debug)]
pub struct KubeletDir {
    descriptor: OwnedFd,
    path: PathBuf,
}

impl KubeletDir {
    /// Opens kubelet's directory; the administrator named it, so a link is followed.
    ///
    /// # Errors
    /// [`TargetError::Malformed`]: not absolute. [`TargetError::Io`]: not there, or no directory.
    pub fn open(path: &Path) -> Result<Self, TargetError> {
        let shown = || shorten(&path.to_string_lossy());
        if !path.is_absolute() {
            return Err(TargetError::Malformed { path: shown(), why: "it is not absolute" });
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = rustix::fs::openat(CWD, path, flags, Mode::empty());
        let descriptor =
            descriptor.map_err(|errno| TargetError::Io { path: shown(), source: errno.into() })?;
        Ok(Self { descriptor, path: path.to_owned() })
    }

    /// A path below it, whose parent is there. Whether the target itself is, is not looked at.
    ///
    /// # Errors
    /// [`TargetError`], by cause.
    pub fn target(&self, path: &str) -> Result<Target, TargetError> {
        let below = self.check(path)?;
        let name = below.file_name().unwrap_or_default().to_owned();
        let parent = below.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::openat2(&self.descriptor, parent, flags, Mode::empty(), RESOLVE);
        let parent = parent.map_err(|errno| failure(path, errno))?;
        Ok(Target { parent, name, path: path.to_owned() })
    }

    /// A directory below it, such as `pods`; `None`: there is none.
    ///
    /// # Errors
    /// [`TargetError::Link`], [`TargetError::Io`]
    pub fn directory(&self, below: &str) -> Result<Option<OwnedFd>, TargetError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat2(&self.descriptor, below, flags, Mode::empty(), RESOLVE) {
            Ok(directory) => Ok(Some(directory)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(failure(below, errno)),
        }
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the text alone tells; the way from the directory to the target.
    fn check<'a>(&self, path: &'a str) -> Result<&'a Path, TargetError> {
        let malformed = |why| Err(TargetError::Malformed { path: shorten(path), why });
        if path.is_empty() {
            return malformed("it is empty");
        }
        if path.len() > PATH_BYTES_MAX {
            return malformed("it is longer than 4095 bytes");
        }
        if path.chars().any(char::is_control) {
            return malformed("it has control characters");
        }
        if !path.starts_with('/') {
            return malformed("it is not absolute");
        }
        // `Path` leaves out what is a single dot; as text it would be another name for one target.
        if path.split('/').any(|part| part == "." || part == "..") {
            return malformed("it has a part \".\" or \"..\"");
        }
        if path.split('/').any(|part| part.len() > NAME_BYTES_MAX) {
            return malformed("a part of it is longer than 255 bytes");
        }
        let below = Path::new(path).strip_prefix(&self.path).ok();
        let below = below.filter(|below| below.components().any(|part| matches!(part, Component::Normal(_))));
        below.ok_or_else(|| TargetError::Elsewhere { path: shorten(path), kubelet_dir: self.path.clone() })
    }
}

/// A name in a directory that is held open: what happens to the way there does not matter any more.
#[derive(Debug)]
pub struct Target {
    parent: OwnedFd,
    name: OsString,
    path: String,
}

impl Target {
    /// The path as kubelet gave it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The directory that holds it.
    pub fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    /// The path under which the kernel knows it, in `mountinfo`: links on the way to kubelet's directory resolved.
    ///
    /// # Errors
    /// [`TargetError::Io`]: the parent was removed, or /proc is not mounted.
    pub fn kernel_path(&self) -> Result<PathBuf, TargetError> {
        let parent = rustix::fs::readlink(self.parent_link(), Vec::new())
            .map_err(|errno| failure(&self.path, errno))?;
        let parent =
            PathBuf::from(<OsString as std::os::unix::ffi::OsStringExt>::from_vec(parent.into_bytes()));
        Ok(parent.join(&self.name))
    }

    /// A path for calls that take no descriptor: through the parent's, so that only the last part is looked up.
    pub fn path_by_parent(&self) -> PathBuf {
        self.parent_link().join(&self.name)
    }

    fn parent_link(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.parent.as_raw_fd()))
    }

    /// What is there, the uppermost mount's root if something is mounted; `None`: nothing.
    ///
    /// # Errors
    /// [`TargetError::Link`]; [`TargetError::OtherKind`]: neither file, device nor directory.
    pub fn kind(&self) -> Result<Option<TargetKind>, TargetError> {
        let stat = match rustix::fs::statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failure(&self.path, errno)),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Ok(Some(TargetKind::Directory)),
            FileType::RegularFile | FileType::BlockDevice => Ok(Some(TargetKind::File)),
            FileType::Symlink => Err(TargetError::Link { path: shorten(&self.path) }),
            _ => Err(TargetError::OtherKind {
                path: shorten(&self.path),
                found: "neither a file nor a directory",
                wanted: "one of these",
            }),
        }
    }

    /// Makes it, unless it is there.
    ///
    /// # Errors
    /// [`TargetError::OtherKind`], [`TargetError::Link`]: something else is there. [`TargetError::Io`]
    pub fn create(&self, wanted: TargetKind) -> Result<(), TargetError> {
        let made = match wanted {
            TargetKind::Directory => {
                rustix::fs::mkdirat(&self.parent, &self.name, Mode::from_raw_mode(DIRECTORY_MODE))
            }
            TargetKind::File => {
                // With O_EXCL a link is not followed.
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&self.parent, &self.name, flags, Mode::from_raw_mode(FILE_MODE)).map(drop)
            }
        };
        match made {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => match self.kind() {
                Ok(Some(found)) if found != wanted => Err(TargetError::OtherKind {
                    path: shorten(&self.path),
                    found: found.words(),
                    wanted: wanted.words(),
                }),
                // The root of a file system that has shut down answers nobody. What is mounted there, the mounts tell.
                Ok(_) | Err(TargetError::Io { .. }) => Ok(()),
                Err(error) => Err(error),
            },
            Err(errno) => Err(failure(&self.path, errno)),
        }
    }

    /// Removes an empty directory or file; never what is in it. Nothing there is a success.
    ///
    /// # Errors
    /// [`TargetError::NotEmpty`], [`TargetError::Link`]; [`TargetError::Io`]: something is mounted there (`ResourceBusy`), say.
    pub fn remove(&self) -> Result<(), TargetError> {
        let flags = match self.kind()? {
            None => return Ok(()),
            Some(TargetKind::Directory) => AtFlags::REMOVEDIR,
            Some(TargetKind::File) => {
                let stat = rustix::fs::statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW);
                let stat = stat.map_err(|errno| failure(&self.path, errno))?;
                // Ours is never written. A device node, or a file with something in it, is somebody else's.
                if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size != 0 {
                    return Err(TargetError::NotEmpty { path: shorten(&self.path) });
                }
                AtFlags::empty()
            }
        };
        match rustix::fs::unlinkat(&self.parent, &self.name, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Err(TargetError::NotEmpty { path: shorten(&self.path) }),
            Err(errno) => Err(failure(&self.path, errno)),
        }
    }

    /// Opens what is there, for its identity and as the place of a mount; reads and waits for nothing.
    ///
    /// # Errors
    /// [`TargetError`], by cause.
    pub fn open(&self) -> Result<OwnedFd, TargetError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.parent, self.name.as_os_str(), flags, Mode::empty(), RESOLVE);
        opened.map_err(|errno| failure(&self.path, errno))
    }
}

fn failure(path: &str, errno: Errno) -> TargetError {
    let path = shorten(path);
    match errno {
        Errno::LOOP => TargetError::Link { path },
        errno => TargetError::Io { path, source: errno.into() },
    }
}

/// For messages: whatever a caller sends, they stay short.
fn shorten(path: &str) -> String {
    match path.char_indices().nth(SHOWN_CHARACTERS_MAX) {
        Some((at, _)) => format!("{}…", &path[..at]),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Kubelet {
        dir: KubeletDir,
        root: PathBuf,
        _temporary: tempfile::TempDir,
    }

    fn kubelet() -> Kubelet {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("kubelet");
        fs::create_dir(&root).unwrap();
        Kubelet { dir: KubeletDir::open(&root).unwrap(), root, _temporary: temporary }
    }

    impl Kubelet {
        fn path(&self, below: &str) -> String {
            format!("{}/{below}", self.root.display())
        }

        fn target(&self, below: &str) -> Result<Target, TargetError> {
            self.dir.target(&self.path(below))
        }
    }

    #[test]
    fn a_target_is_made_once_and_removed_once() {
        let kubelet = kubelet();
        for kind in [TargetKind::Directory, TargetKind::File] {
            let target = kubelet.target("target").unwrap();
            assert_eq!(target.kind().unwrap(), None);
            for _ in 0..2 {
                target.create(kind).unwrap();
                assert_eq!(target.kind().unwrap(), Some(kind));
            }
            assert_eq!(target.kernel_path().unwrap(), fs::canonicalize(kubelet.path("target")).unwrap());
            target.open().unwrap();
            for _ in 0..2 {
                target.remove().unwrap();
                assert!(!Path::new(&kubelet.path("target")).exists());
            }
        }
    }

    #[test]
    fn what_is_of_another_kind_is_neither_taken_nor_removed() {
        let kubelet = kubelet();
        let target = kubelet.target("target").unwrap();
        target.create(TargetKind::File).unwrap();
        let error = target.create(TargetKind::Directory).unwrap_err();
        assert!(error.to_string().contains("is a file, and has to be a directory; remove it"), "{error}");
        let _socket = std::os::unix::net::UnixListener::bind(kubelet.root.join("socket")).unwrap();
        assert!(matches!(kubelet.target("socket").unwrap().remove(), Err(TargetError::OtherKind { .. })));
        assert!(kubelet.root.join("socket").exists());
    }

    #[test]
    fn nothing_that_holds_something_is_removed() {
        let kubelet = kubelet();
        let full = kubelet.root.join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("data"), "data").unwrap();
        for path in ["full", "full/data"] {
            assert!(
                matches!(kubelet.target(path).unwrap().remove(), Err(TargetError::NotEmpty { .. })),
                "{path}"
            );
        }
        assert_eq!(fs::read(full.join("data")).unwrap(), b"data");
    }

    #[test]
    fn a_link_is_never_followed() {
        let kubelet = kubelet();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "").unwrap();
        symlink(outside.path(), kubelet.root.join("way")).unwrap();
        symlink(outside.path().join("file"), kubelet.root.join("last")).unwrap();
        symlink("nowhere", kubelet.root.join("dangling")).unwrap();
        assert!(matches!(kubelet.target("way/file"), Err(TargetError::Link { .. })));
        for last in ["last", "dangling"] {
            let target = kubelet.target(last).unwrap();
            assert!(matches!(target.kind(), Err(TargetError::Link { .. })), "{last}");
            assert!(matches!(target.open(), Err(TargetError::Link { .. })), "{last}");
            for kind in [TargetKind::File, TargetKind::Directory] {
                assert!(matches!(target.create(kind), Err(TargetError::Link { .. })), "{last}");
            }
            assert!(matches!(target.remove(), Err(TargetError::Link { .. })), "{last}");
        }
        assert!(outside.path().join("file").exists() && !kubelet.root.join("nowhere").exists());
    }

    #[test]
    fn a_directory_that_is_swapped_for_a_link_leads_nowhere_else() {
        let kubelet = kubelet();
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("target")).unwrap();
        fs::create_dir(kubelet.root.join("pod")).unwrap();
        let target = kubelet.target("pod/target").unwrap();
        target.create(TargetKind::Directory).unwrap();
        fs::rename(kubelet.root.join("pod"), kubelet.root.join("moved")).unwrap();
        symlink(outside.path(), kubelet.root.join("pod")).unwrap();
        target.remove().unwrap();
        assert!(outside.path().join("target").exists() && !kubelet.root.join("moved/target").exists());
    }

    #[test]
    fn no_text_leads_out_of_the_directory() {
        let kubelet = kubelet();
        let long_part = "x".repeat(256);
        let long = "x/".repeat(5000);
        for malformed in
            ["../kubelet/x", "a/../../x", "./x", "x/.", "a\nb", "a\u{7f}b", "a\0b", &long_part, &long]
        {
            let error = kubelet.target(malformed).unwrap_err();
            assert!(matches!(error, TargetError::Malformed { .. }), "{malformed:?}: {error}");
            let message = error.to_string();
            assert!(message.len() < 600 && !message.chars().any(char::is_control), "{message}");
        }
        for elsewhere in
            [kubelet.path(""), "/etc/passwd".to_owned(), format!("{}2/x", kubelet.root.display())]
        {
            assert!(
                matches!(kubelet.dir.target(&elsewhere), Err(TargetError::Elsewhere { .. })),
                "{elsewhere}"
            );
        }
        for malformed in ["", "some/path"] {
            assert!(
                matches!(kubelet.dir.target(malformed), Err(TargetError::Malformed { .. })),
                "{malformed}"
            );
        }
        assert!(KubeletDir::open(Path::new("var/lib/kubelet")).is_err());
    }

    #[test]
    fn a_missing_parent_is_told_apart() {
        let kubelet = kubelet();
        assert!(kubelet.target("no/such/target").unwrap_err().is_not_there());
        assert!(!kubelet.target("..").unwrap_err().is_not_there());
    }

    #[test]
    fn kubelets_directory_may_be_a_link() {
        let kubelet = kubelet();
        let link = kubelet.root.with_file_name("link");
        symlink(&kubelet.root, &link).unwrap();
        let dir = KubeletDir::open(&link).unwrap();
        let target = dir.target(&format!("{}/a, \"b\" c", link.display())).unwrap();
        target.create(TargetKind::Directory).unwrap();
        assert_eq!(target.kernel_path().unwrap(), fs::canonicalize(kubelet.path("a, \"b\" c")).unwrap());
    }
}
