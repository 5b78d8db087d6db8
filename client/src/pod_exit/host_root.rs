//! The root of device processes that outlive their pod: a directory of the host's.
//!
//! ```text
//!   DIRECTORY/program-HASH/usr/local/bin/volclient, its libraries, and an empty directory for each mount
//!   DIRECTORY/etc/resolv.conf, hosts, ...: one for all versions, so that a new daemon renews them for old processes
//! ```
//! Invariants: a root has its name while it is whole, which each daemon looks at, and what is in it never changes, for processes run from it. The files of
//! `etc` are replaced, never written into. Called by: `PodExit::prepare`, under the lock of the run directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::PodExitError;
use crate::device::mount_namespace;

/// Where the program is in its root.
pub const PROGRAM: &str = "/usr/local/bin/volclient";
/// Where the kernel and its devices are looked up.
pub const ALWAYS_KEPT: [&str; 3] = ["/dev", "/proc", "/sys"];
/// Where programs have the path of their loader written in, on the machines that we build for; another link may lead to it.
const LOADERS: [&str; 2] = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
/// By what the C library looks names up.
const NAME_FILES: [&str; 5] = ["resolv.conf", "hosts", "nsswitch.conf", "host.conf", "gai.conf"];
const PREFIX: &str = "program-";
/// A root that is being made, or removed.
const UNFINISHED: &str = "unfinished";

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The root of this version.
    pub root: PathBuf,
    /// What becomes `/etc` in it.
    pub etc: PathBuf,
}

/// The directories among `paths` that lie in none of the others, nor in what is always kept.
pub fn outermost(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut sorted = paths.to_vec();
    sorted.sort_unstable();
    let mut kept: Vec<PathBuf> = Vec::new();
    for path in sorted {
        let is_within = |other: &Path| path.starts_with(other);
        if !ALWAYS_KEPT.iter().any(|other| is_within(Path::new(other)))
            && !kept.iter().any(|other| is_within(other))
        {
            kept.push(path);
        }
    }
    kept
}

/// Makes the root of this program below `directory`, unless it is there, with a place for each of `kept`, and renews `etc`.
///
/// # Errors
/// [`PodExitError::Io`]
pub fn make(directory: &Path, kept: &[PathBuf]) -> Result<Made, PodExitError> {
    make_of(directory, kept, &files_of_program()?, Path::new("/etc"))
}

/// [`make`], of these files (from where, by where they go to), and of those in `names`.
fn make_of(
    directory: &Path,
    kept: &[PathBuf],
    files: &BTreeMap<PathBuf, PathBuf>,
    names: &Path,
) -> Result<Made, PodExitError> {
    make_directory(directory)?;
    let hashed = hash(files)?;
    let root = directory.join(format!("{PREFIX}{hashed}"));
    let unfinished = directory.join(UNFINISHED);
    remove_all(&unfinished).map_err(PodExitError::io(&unfinished))?;
    if root.is_dir() && !is_whole(&root, files, &hashed) {
        let found = fs::metadata(&root).map_err(PodExitError::io(&root))?;
        if roots_of_processes().map_err(PodExitError::io(&root))?.contains(&(found.dev(), found.ino())) {
            let why = "its files are not what they were, and device processes run in it: drain the node";
            return Err(PodExitError::io(&root)(io::Error::other(why)));
        }
        tracing::warn!(root = %root.display(), "its files are not what they were: it is made anew");
        remove_root(directory, &root).map_err(PodExitError::io(&root))?;
    }
    if !root.is_dir() {
        for (to, from) in files {
            let to = below(&unfinished, to);
            make_directory(to.parent().unwrap_or(&unfinished))?;
            fs::copy(from, &to).map_err(PodExitError::io(from))?;
        }
        // The name outlives a power cut, and so does what bears it.
        let opened = File::open(directory).map_err(PodExitError::io(directory))?;
        rustix::fs::syncfs(&opened).map_err(|errno| PodExitError::io(directory)(errno.into()))?;
        fs::rename(&unfinished, &root).map_err(PodExitError::io(&root))?;
    }
    let etc = directory.join("etc");
    make_directory(&root.join("etc"))?;
    make_directory(&etc)?;
    for name in NAME_FILES {
        renew(&names.join(name), &etc.join(name))?;
    }
    for path in ALWAYS_KEPT.iter().map(Path::new).chain(kept.iter().map(PathBuf::as_path)) {
        make_directory(&place(&root, &etc, path))?;
    }
    Ok(Made { root, etc })
}

/// Whether all files of a root are there as they were when it was made.
fn is_whole(root: &Path, files: &BTreeMap<PathBuf, PathBuf>, hashed: &str) -> bool {
    let in_root = files.keys().map(|to| (to.clone(), below(root, to))).collect();
    hash(&in_root).is_ok_and(|found| found == hashed)
}

/// Removes a root, which has its name no longer when the first of its files goes.
fn remove_root(directory: &Path, root: &Path) -> io::Result<()> {
    let unfinished = directory.join(UNFINISHED);
    remove_all(&unfinished)?;
    fs::rename(root, &unfinished)?;
    fs::remove_dir_all(&unfinished)
}

/// Where a path is, with this root and this `/etc`.
fn place(root: &Path, etc: &Path, path: &Path) -> PathBuf {
    path.strip_prefix("/etc").map_or_else(|_| below(root, path), |rest| etc.join(rest))
}

/// An absolute path below another root.
pub fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// This program, its loader and its libraries.
fn files_of_program() -> Result<BTreeMap<PathBuf, PathBuf>, PodExitError> {
    let own = std::env::current_exe().map_err(PodExitError::io(Path::new("/proc/self/exe")))?;
    let libraries = mount_namespace::paths_of_program().into_iter().filter(|path| *path != own);
    let loaders = LOADERS.into_iter().map(PathBuf::from).filter(|path| path.exists());
    let mut files: BTreeMap<_, _> = libraries.chain(loaders).map(|path| (path.clone(), path)).collect();
    // The file that runs, whatever has its name by now.
    files.insert(PROGRAM.into(), "/proc/self/exe".into());
    Ok(files)
}

/// Of the files' paths and contents, in hexadecimal.
fn hash(files: &BTreeMap<PathBuf, PathBuf>) -> Result<String, PodExitError> {
    let mut all = blake3::Hasher::new();
    for (to, from) in files {
        let mut one = blake3::Hasher::new();
        one.update(to.as_os_str().as_encoded_bytes());
        let read = File::open(from).and_then(|file| one.update_reader(file).map(drop));
        read.map_err(PodExitError::io(from))?;
        all.update(one.finalize().as_bytes());
    }
    Ok(all.finalize().to_hex()[..16].to_owned())
}

/// Has `to` be what `from` is: readers see the old file or the new one, whole.
fn renew(from: &Path, to: &Path) -> Result<(), PodExitError> {
    let bytes = match fs::read(from) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match fs::remove_file(to) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PodExitError::io(to)(error)),
                _ => Ok(()),
            };
        }
        Err(error) => return Err(PodExitError::io(from)(error)),
    };
    let new = to.with_extension("new");
    let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, to));
    written.map_err(PodExitError::io(to))
}

/// Removes the roots beside `own` in which no process runs. What cannot be removed is left for the next daemon.
pub fn remove_unused(directory: &Path, own: &Path) {
    let removed = roots_of_processes().and_then(|used| {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let (path, metadata) = (entry.path(), entry.metadata()?);
            let is_root = entry.file_name().to_string_lossy().starts_with(PREFIX);
            if is_root && path != own && !used.contains(&(metadata.dev(), metadata.ino())) {
                remove_root(directory, &path)?;
                tracing::info!(root = %path.display(), "no device process runs in it any more: removed");
            }
        }
        Ok(())
    });
    if let Err(error) = removed {
        tracing::warn!(%error, directory = %directory.display(), "roots of former versions stay");
    }
}

/// The roots of all processes, by device and inode.
fn roots_of_processes() -> io::Result<Vec<(u64, u64)>> {
    let mut roots = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        match fs::metadata(entry.path().join("root")) {
            Ok(root) => roots.push((root.dev(), root.ino())),
            // It has ended, or is a thread of the kernel's that has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(roots)
}

fn make_directory(path: &Path) -> Result<(), PodExitError> {
    fs::create_dir_all(path).map_err(PodExitError::io(path))
}

/// Removes a directory that may not be there.
fn remove_all(path: &Path) -> io::Result<()> {
    fs::remove_dir_all(path).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(paths: &[&str]) -> Vec<PathBuf> {
        paths.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn what_lies_in_another_directory_is_kept_with_it() {
        let used = [
            "/run/volnode",
            "/dev/volnode",
            "/etc/tls/..data",
            "/etc/tls",
            "/run/volnode/x",
            "/run/volnode2",
        ];
        assert_eq!(outermost(&paths(&used)), paths(&["/etc/tls", "/run/volnode", "/run/volnode2"]));
        assert_eq!(outermost(&paths(&["/ca", "/"])), paths(&["/"]));
    }

    #[test]
    fn a_root_is_made_once_for_a_version_and_names_are_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let (host, names, program) =
            (folder.path().join("host"), folder.path().join("names"), folder.path().join("volclient"));
        fs::create_dir(&names).unwrap();
        fs::write(names.join("hosts"), "::1 one\n").unwrap();
        fs::write(&program, "version 1").unwrap();
        let files: BTreeMap<PathBuf, PathBuf> = [(PROGRAM.into(), program.clone())].into();
        let kept = paths(&["/run/volnode", "/etc/volnode/tls"]);
        // What a daemon that was killed left.
        fs::create_dir_all(host.join("unfinished/usr")).unwrap();
        let first = make_of(&host, &kept, &files, &names).unwrap();
        assert_eq!(fs::read_to_string(below(&first.root, Path::new(PROGRAM))).unwrap(), "version 1");
        for place in ["dev", "proc", "sys", "etc", "run/volnode"] {
            assert!(first.root.join(place).is_dir(), "{place}");
        }
        assert!(first.etc.join("volnode/tls").is_dir() && !host.join("unfinished").exists());
        assert_eq!(fs::read_to_string(first.etc.join("hosts")).unwrap(), "::1 one\n");
        let inode = |made: &Made| fs::metadata(below(&made.root, Path::new(PROGRAM))).unwrap().ino();
        let before = inode(&first);
        fs::write(names.join("resolv.conf"), "nameserver ::1\n").unwrap();
        fs::remove_file(names.join("hosts")).unwrap();
        let again = make_of(&host, &kept, &files, &names).unwrap();
        assert_eq!((&again, inode(&again)), (&first, before), "it was made anew");
        assert!(again.etc.join("resolv.conf").is_file() && !again.etc.join("hosts").exists());
        fs::write(&program, "version 2").unwrap();
        let second = make_of(&host, &kept, &files, &names).unwrap();
        assert_ne!(second.root, first.root);
        assert_eq!(fs::read_to_string(below(&first.root, Path::new(PROGRAM))).unwrap(), "version 1");
    }

    #[test]
    fn this_program_is_found_with_its_loader_and_libraries() {
        let files = files_of_program().unwrap();
        assert_eq!(files[Path::new(PROGRAM)], Path::new("/proc/self/exe"));
        let has = |name: &str| files.keys().any(|path| path.to_string_lossy().contains(name));
        assert!(has("/ld-linux-") && has("/libc.so"), "{files:?}");
        assert!(files.values().all(|from| from.is_file()), "{files:?}");
    }
}
