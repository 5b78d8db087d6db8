//! The sockets of the plugin: its own, and the one by which kubelet finds it.
//!
//! Owns: how an endpoint is written, and how a socket comes and goes. A socket that a killed process left is replaced, one that somebody
//! listens at is not: a lock beside it tells the two apart, and lets one of two that start at once through. Never: is there for others, or
//! before it can be connected to.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use super::lock_file::LockFile;

/// Longest path of a Unix socket, in bytes: `sun_path` less its final zero.
const PATH_BYTES_MAX: usize = 107;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Not the form of an endpoint.
    #[error("{0:?} is not of the form unix:///path; give the path of the socket, as in unix:///csi/csi.sock")]
    Endpoint(String),
    /// Too long for a socket.
    #[error("{} is too long for a Unix socket (at most {PATH_BYTES_MAX} bytes, and one more for its making); choose a shorter path", .0.display())]
    TooLong(PathBuf),
    /// Another process listens there.
    #[error("another process listens at {} already; end it, or choose another path", .0.display())]
    Taken(PathBuf),
    /// No socket of ours.
    #[error("{} is there and is no socket; remove it, or choose another path", .0.display())]
    NoSocket(PathBuf),
    /// The system's.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The path in `unix:///path` or `unix:/path`; gRPC's two spellings.
///
/// # Errors
/// [`SocketError::Endpoint`]
pub fn path_of_endpoint(endpoint: &str) -> Result<PathBuf, SocketError> {
    let path = endpoint.strip_prefix("unix:").map(|path| path.strip_prefix("//").unwrap_or(path));
    let path = path.filter(|path| path.starts_with('/') && !path.ends_with('/') && !path.contains('\0'));
    path.map(PathBuf::from).ok_or_else(|| SocketError::Endpoint(endpoint.to_owned()))
}

/// A socket with this process behind it. It goes when this is dropped, unless another process has put its own there.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    /// Dropped behind the socket.
    _lock: LockFile,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours =
            fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if is_ours {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Listens there, for root alone.
///
/// Within a tokio runtime.
///
/// # Errors
/// [`SocketError`], by cause.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    let failed = |source| SocketError::Io { path: path.to_owned(), source };
    // Made under another name and closed to others, then given its own. Kubelet passes over what begins with a dot.
    let beside = |end: &str| {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(end);
        path.with_file_name(name)
    };
    let hidden = beside("");
    if hidden.as_os_str().len() > PATH_BYTES_MAX {
        return Err(SocketError::TooLong(path.to_owned()));
    }
    let taken = || SocketError::Taken(path.to_owned());
    let lock = LockFile::take(&beside(".lock")).map_err(failed)?.ok_or_else(taken)?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NoSocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(taken()),
            // Nobody listens: left by a process that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Somebody may well listen who does not let us in, or has no time.
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    fs::remove_file(&hidden).ok();
    let listener = UnixListener::bind(&hidden).map_err(failed)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let made = fs::symlink_metadata(&hidden).map_err(failed)?;
    fs::rename(&hidden, path).map_err(failed)?;
    Ok((listener, SocketFile { path: path.to_owned(), identity: (made.dev(), made.ino()), _lock: lock }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_the_path_of_a_socket() {
        for endpoint in ["unix:///csi/csi.sock", "unix:/csi/csi.sock"] {
            assert_eq!(path_of_endpoint(endpoint).unwrap(), Path::new("/csi/csi.sock"));
        }
        for wrong in [
            "",
            "/csi/csi.sock",
            "unix://csi/csi.sock",
            "unix:csi.sock",
            "tcp://127.0.0.1:1",
            "unix:///",
            "unix:///a\0b",
        ] {
            assert!(matches!(path_of_endpoint(wrong), Err(SocketError::Endpoint(_))), "{wrong}");
        }
    }

    #[tokio::test]
    async fn what_a_killed_process_left_is_replaced_and_what_is_used_is_not() {
        // Not below TMPDIR, which may be too long for a socket's name.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("csi.sock");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(SocketError::Taken(_))));
        drop(listener);
        assert!(matches!(listen(&path), Err(SocketError::Taken(_))), "it is about to end");
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // As a killed process leaves them.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        fs::write(dir.path().join(".csi.sock.lock"), "").unwrap();
        let (_listener, file) = listen(&path).unwrap();
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_socket_of_a_program_without_a_lock_is_not_replaced() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("csi.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(listen(&path), Err(SocketError::Taken(_))));
        drop(listener);
        listen(&path).unwrap();
    }

    #[tokio::test]
    async fn of_two_that_start_at_once_one_listens() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("csi.sock");
        let runtime = tokio::runtime::Handle::current();
        let start = || {
            let _entered = runtime.enter();
            listen(&path)
        };
        for _ in 0..50 {
            let outcomes = std::thread::scope(|scope| {
                let threads = [scope.spawn(start), scope.spawn(start)];
                threads.map(|thread| thread.join().unwrap())
            });
            assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
        }
    }

    #[tokio::test]
    async fn nothing_but_a_socket_is_replaced() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("data");
        fs::write(&path, "data").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let long = dir.path().join("x".repeat(PATH_BYTES_MAX));
        assert!(matches!(listen(&long), Err(SocketError::TooLong(_))));
        assert!(matches!(listen(Path::new("/no/such/dir/s")), Err(SocketError::Io { .. })));
    }
}
