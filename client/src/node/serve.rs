//! Starting the node daemon: the run directory, its lock, the socket, the gRPC server; and its end.
//!
//! Invariants: one daemon for each run directory (a lock held for its life). The socket has mode 0600 before anybody
//! can connect. The end of the daemon ends no device process.
//! Called by: `volclient serve`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use file_lock::lock_alone;
use proto::v1::FILE_DESCRIPTOR_SET;
use proto::v1::node_server::NodeServer;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use uuid::Uuid;

use super::error::NodeError;
use super::freeze::{self, Freezes};
use super::management_client::ManagementClient;
use super::node_service::NodeService;
use super::registration::{NodeProfile, keep_registered, volume_limit};
use super::supervisor::{Supervisor, SupervisorConfig};
use crate::causes::with_sources;
use crate::contract::AttachmentDir;
use crate::end_signal::ended_by_signal;
use crate::pod_exit::{OutlivePod, PodExit, PodExitError};
use crate::tls_spec::ClientFiles;

/// Longest path of a Unix socket, in bytes: `sun_path` less its final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// How long calls in progress may go on once the daemon is told to end. What is cut off then is left as by a crash: repeating
/// the call goes on with it. `deploy/volclient.service` gives a stop more than this.
const LAST_CALLS_DEADLINE: Duration = Duration::from_secs(20);

/// What `volclient serve` is told.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The storage server's management API.
    pub server: String,
    /// The files of TLS, where there is TLS.
    pub tls_files: Option<ClientFiles>,
    /// The kernel may not encrypt, even if it could.
    pub tls_user_space_only: bool,
    /// How much the kernel may encrypt under one key, in bytes.
    pub tls_key_bytes_max: u64,
    /// Run directory.
    pub run_dir: PathBuf,
    /// The node API's socket.
    pub socket: PathBuf,
    /// This machine's id; `None` takes the machine's own.
    pub node_id: Option<String>,
    /// Where stable links are made.
    pub device_dir: PathBuf,
    /// What device processes log.
    pub log_filter: String,
    /// What this machine is and where, as the server is told.
    pub labels: BTreeMap<String, String>,
    /// How many volumes it can have, as the server is told; 0: no limit; `None`: what the driver allows.
    pub max_volumes: Option<u32>,
    /// Whether, and by what, device processes outlive the pod that the daemon is in.
    pub outlive_pod: Option<OutlivePod>,
}

/// Why the daemon cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another daemon has the run directory or the socket.
    #[error("another volclient serves {} already; stop it, or give this one a run directory of its own", .0.display())]
    Taken(PathBuf),
    /// A socket below the run directory, or the given one, would not fit.
    #[error("{} is too long for a Unix socket (at most {SOCKET_PATH_BYTES_MAX} bytes); choose a shorter path", .0.display())]
    PathTooLong(PathBuf),
    /// A file or folder may not be used.
    #[error("{}: permission denied; run `volclient serve` as root", .0.display())]
    NotPermitted(PathBuf),
    /// A file or folder cannot be used.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No name for this machine.
    #[error("this machine has neither /etc/machine-id nor a host name; give --node-id")]
    NoNodeId,
    /// Device processes would end with the pod.
    #[error(transparent)]
    PodExit(#[from] PodExitError),
    /// The server's URI is off, or the attachments cannot be read.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The gRPC server ended by itself.
    #[error("the node API ended: {0}")]
    Grpc(String),
}

impl ServeError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted(path.to_owned()),
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

/// Serves until SIGTERM or SIGINT; calls in progress are finished first, if they end in time, and watchers are told the end.
///
/// # Errors
/// [`ServeError`], by cause.
pub async fn serve(options: ServeOptions) -> Result<(), ServeError> {
    check_path_lengths(&options)?;
    let parent = AttachmentDir::parent(&options.run_dir);
    for folder in [&options.run_dir, &parent] {
        make_private_folder(folder)?;
    }
    let _lock = lock_run_dir(&options.run_dir)?;
    // Passphrases pass through its memory: no core has them.
    let undumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    undumpable.map_err(|errno| ServeError::io(Path::new("/proc/self"))(errno.into()))?;
    let pod_exit = match &options.outlive_pod {
        Some(wanted) => Some(PodExit::prepare(wanted, &kept_directories(&options)?)?),
        None => None,
    };
    let supervisor = supervisor(&options, pod_exit)?;
    tracing::info!(node_id = supervisor.config().node_id, server = options.server, "volclient starts");
    supervisor.adopt_found_attachments()?;
    freeze::thaw_what_was_left(&options.run_dir)?;
    let listener = listen(&options.socket)?;
    announce(&options.socket).map_err(ServeError::io(&options.socket))?;
    let moves = tokio::spawn(Arc::clone(&supervisor).follow_moved_servers());
    let growth = tokio::spawn(Arc::clone(&supervisor).follow_grown_disks());
    let max_volumes = options.max_volumes.unwrap_or_else(volume_limit::of_this_machine);
    let profile = NodeProfile { labels: options.labels, max_volumes };
    let freezes = Arc::new(Freezes::new(Arc::clone(&supervisor)));
    let registering = keep_registered(Arc::clone(&supervisor), Arc::clone(&freezes), profile.clone());
    let registration = tokio::spawn(registering);
    let served = run_grpc(listener, supervisor, freezes, profile).await;
    moves.abort();
    growth.abort();
    registration.abort();
    fs::remove_file(&options.socket).ok();
    tracing::info!("volclient ends; device processes go on");
    served
}

/// The directories that device processes use, besides the kernel's; those that the daemon makes are made.
fn kept_directories(options: &ServeOptions) -> Result<Vec<PathBuf>, ServeError> {
    make_private_folder(&options.run_dir)?;
    fs::create_dir_all(&options.device_dir).map_err(ServeError::io(&options.device_dir))?;
    let files = options.tls_files.as_ref().map(ClientFiles::paths).unwrap_or_default();
    // What is renewed is another file in the same directory.
    let of_files = files.iter().filter_map(|path| path.parent()).map(Path::to_owned);
    Ok([options.run_dir.clone(), options.device_dir.clone()].into_iter().chain(of_files).collect())
}

/// What does the work, as the options have it.
pub(super) fn supervisor(
    options: &ServeOptions,
    pod_exit: Option<PodExit>,
) -> Result<Arc<Supervisor>, ServeError> {
    let node_id = options.node_id.clone().map_or_else(default_node_id, Ok)?;
    let management = ManagementClient::new(&options.server, options.tls_files.as_ref())?;
    let config = SupervisorConfig {
        run_dir: options.run_dir.clone(),
        device_dir: options.device_dir.clone(),
        node_id,
        log_filter: options.log_filter.clone(),
        tls_files: options.tls_files.clone(),
        tls_user_space_only: options.tls_user_space_only,
        tls_key_bytes_max: options.tls_key_bytes_max,
        pod_exit,
    };
    Ok(Arc::new(Supervisor::new(config, management)))
}

async fn run_grpc(
    listener: UnixListener,
    supervisor: Arc<Supervisor>,
    freezes: Arc<Freezes>,
    profile: NodeProfile,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<NodeServer<NodeService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| ServeError::Grpc(error.to_string()))?;
    let (ending, ended) = watch::channel(false);
    let shutdown = {
        let mut ended = ended.clone();
        // Sent by this function alone, which outlives it.
        async move { drop(ended.wait_for(|is_ending| *is_ending).await) }
    };
    let serving = Server::builder()
        .add_service(health_service)
        .add_service(reflection)
        .add_service(NodeServer::new(NodeService::new(supervisor, freezes, ended.clone(), profile)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown);
    let out_of_time = async {
        ended_by_signal().await;
        // Whoever asks for the daemon again is not served by this one.
        sd_notify::notify(&[sd_notify::NotifyState::Stopping]).ok();
        ending.send_replace(true);
        tokio::time::sleep(LAST_CALLS_DEADLINE).await;
    };
    tokio::select! {
        served = serving => served.map_err(|error| ServeError::Grpc(with_sources(&error))),
        () = out_of_time => {
            tracing::warn!("calls are cut off after {} s", LAST_CALLS_DEADLINE.as_secs());
            Ok(())
        }
    }
}

/// The sockets of device processes lie below the run directory: a path that is too long is told now, not at attach.
fn check_path_lengths(options: &ServeOptions) -> Result<(), ServeError> {
    let control_socket = AttachmentDir::new(&options.run_dir, Uuid::nil()).control_socket();
    for path in [&options.socket, &control_socket] {
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(ServeError::PathTooLong(path.clone()));
        }
    }
    Ok(())
}

fn make_private_folder(folder: &Path) -> Result<(), ServeError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(ServeError::io(folder))
}

/// Only this program takes the lock; the kernel drops it with the process. Children do not inherit it.
pub(super) fn lock_run_dir(run_dir: &Path) -> Result<File, ServeError> {
    let path = run_dir.join("volclient.lock");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(ServeError::io(&path))?;
    if lock_alone(&file).map_err(ServeError::io(&path))? {
        Ok(file)
    } else {
        Err(ServeError::Taken(run_dir.to_owned()))
    }
}

/// Binds the socket under another name, closes it to others, then gives it its name.
fn listen(socket: &Path) -> Result<UnixListener, ServeError> {
    // Outside the run directory, a socket may be another daemon's.
    if StdUnixStream::connect(socket).is_ok() {
        return Err(ServeError::Taken(socket.to_owned()));
    }
    let mut new_name = socket.as_os_str().to_owned();
    new_name.push("~");
    let new_socket = PathBuf::from(new_name);
    fs::remove_file(&new_socket).ok();
    let listener = UnixListener::bind(&new_socket).map_err(ServeError::io(socket))?;
    let closed = fs::set_permissions(&new_socket, fs::Permissions::from_mode(0o600));
    closed.and_then(|()| fs::rename(&new_socket, socket)).map_err(ServeError::io(socket))?;
    Ok(listener)
}

/// Tells whoever started the daemon that it can be used.
fn announce(socket: &Path) -> io::Result<()> {
    daemon_log::announce(format!("volclient ready: {}", socket.display()))?;
    sd_notify::notify(&[sd_notify::NotifyState::Ready])
}

/// `/etc/machine-id`, which is made once for each installation; else the host name.
fn default_node_id() -> Result<String, ServeError> {
    let machine_id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    node_id_of(&machine_id, &host_name)
}

/// The first of the two that is a name.
fn node_id_of(machine_id: &str, host_name: &str) -> Result<String, ServeError> {
    // "uninitialized" stands there until the first boot has ended.
    let candidates = [machine_id.trim(), host_name.trim()];
    let usable = |name: &&&str| !name.is_empty() && **name != "uninitialized" && **name != "(none)";
    candidates.iter().find(usable).map(|name| (*name).to_owned()).ok_or(ServeError::NoNodeId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_has_one_daemon() {
        let run_dir = tempfile::tempdir().unwrap();
        let first = lock_run_dir(run_dir.path()).unwrap();
        assert!(matches!(lock_run_dir(run_dir.path()), Err(ServeError::Taken(_))));
        drop(first);
        lock_run_dir(run_dir.path()).unwrap();
    }

    #[tokio::test]
    async fn the_socket_is_its_owners_alone_and_a_stale_one_is_replaced() {
        // Not below TMPDIR, which may be too long for a socket's name.
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let socket = folder.path().join("s");
        let first = listen(&socket).unwrap();
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(listen(&socket), Err(ServeError::Taken(_))));
        drop(first);
        listen(&socket).unwrap();
    }

    #[test]
    fn a_run_directory_too_deep_for_sockets_is_refused() {
        let run_dir = PathBuf::from("/").join("x".repeat(60));
        let options = ServeOptions {
            server: String::new(),
            tls_files: None,
            tls_user_space_only: false,
            tls_key_bytes_max: 0,
            socket: run_dir.join("s"),
            run_dir,
            node_id: None,
            device_dir: PathBuf::new(),
            log_filter: String::new(),
            labels: BTreeMap::new(),
            max_volumes: None,
            outlive_pod: None,
        };
        assert!(matches!(check_path_lengths(&options), Err(ServeError::PathTooLong(_))));
    }

    #[test]
    fn this_machine_has_a_name() {
        // Whether this one has is not for sure: a container has no machine id, and a host name where somebody gave it one.
        for (machine_id, host_name, expected) in [
            ("0123456789abcdef\n", "host", Some("0123456789abcdef")),
            ("uninitialized\n", "host", Some("host")),
            ("", "host", Some("host")),
            ("\n", "(none)", None),
            ("", "", None),
        ] {
            assert_eq!(
                node_id_of(machine_id, host_name).ok().as_deref(),
                expected,
                "{machine_id:?} {host_name:?}"
            );
        }
        assert!(default_node_id().is_ok_and(|name| !name.is_empty()) || !has_name());
    }

    fn has_name() -> bool {
        let machine_id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let host_name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        [machine_id, host_name].iter().any(|name| !["", "uninitialized", "(none)"].contains(&name.trim()))
    }
}
