//! Where NBD clients connect: TCP addresses and Unix sockets, how each is listened on, and who has connected.
//!
//! Owns: a Unix socket's file, which is made for the server's user alone, replaces what a killed server left, and is taken
//! away when the listener is dropped. Never: accepts (`acceptor.rs` does) or decides whether an address is safe (`config.rs`
//! does). Called by: `config.rs` (parses), `data/server.rs` (listens), `acceptor.rs` (peers).

#![allow(unsafe_code)] // A socket option whose answer libraries cannot hold: a process id of 0.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use crate::data::socket_memory;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// So long what was sent to an attachment's client may wait for its acknowledgement: as long as a silent connection lives.
const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// Marks a Unix socket in the configuration.
const UNIX_PREFIX: &str = "unix:";

/// An address of the data side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataAddress {
    /// A TCP address; port 0 is one of the system's choice.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl DataAddress {
    /// The TCP address, if it is one.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl From<SocketAddr> for DataAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl FromStr for DataAddress {
    type Err = String;

    /// Reads `ADDR:PORT` or `unix:/PATH`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix(UNIX_PREFIX) {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(format!(
                    "{text:?}: a Unix socket needs an absolute path, such as unix:/run/volnode/nbd.sock"
                ))
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!("{text:?} is neither ADDR:PORT, such as 127.0.0.1:10809, nor unix:/PATH of a Unix socket")
        })
    }
}

impl fmt::Display for DataAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX_PREFIX}{}", path.display()),
        }
    }
}

/// Who has connected; for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// From this address.
    Tcp(SocketAddr),
    /// A process of this machine.
    Unix {
        /// Its id, as it was when it connected; 0 where it is in another PID namespace.
        process_id: i32,
        /// Its user.
        user_id: u32,
    },
}

impl Peer {
    /// The address that its connections are counted for; a process of this machine has none.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix { .. } => None,
        }
    }
}

impl Peer {
    /// Has a connection end within a minute of its machine's silence, also while something is on its way there; for clients that come
    /// again by themselves, because it also ends one whose program is stopped and takes nothing.
    pub fn notice_when_gone(&self, socket: BorrowedFd<'_>) {
        if let Self::Tcp(_) = self {
            // Refused by the near end of a relay that encrypts: its far end has it already.
            let _ = socket2::SockRef::from(&socket).set_tcp_user_timeout(Some(USER_TIMEOUT));
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { process_id, user_id } => write!(f, "process {process_id} of user {user_id}"),
        }
    }
}

/// A socket that clients connect to; not blocking.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: DataAddress,
    /// Device and inode of the file that a Unix socket was bound to.
    file: Option<(u64, u64)>,
    /// The group that may connect as well.
    group_id: Option<u32>,
    /// A wildcard of IPv6 that could not have IPv4 as well.
    is_ipv6_only: bool,
}

impl Listener {
    /// Listens on an address.
    ///
    /// # Errors
    /// The system's own: it is in use, not this machine's, not allowed, or a path that is too long or is no socket's.
    pub fn bind(address: &DataAddress) -> io::Result<Self> {
        Self::bind_among(address, &[], None)
    }

    /// The same for one of several addresses, see [`takes_ipv4`]; a Unix socket is also for the members of a group.
    ///
    /// # Errors
    /// As of [`Self::bind`]; the socket's file may not be given to that group.
    pub fn bind_among(address: &DataAddress, all: &[DataAddress], group_id: Option<u32>) -> io::Result<Self> {
        let wants_ipv4 = address.tcp().is_some_and(|address| takes_ipv4(address, all));
        let mut is_ipv6_only = false;
        let (socket, file) = match address {
            DataAddress::Tcp(address) if wants_ipv4 => {
                let (socket, has_ipv4) = bind_both_families(*address)?;
                is_ipv6_only = !has_ipv4;
                (socket, None)
            }
            DataAddress::Tcp(address) => (bind_tcp(*address, false)?, None),
            DataAddress::Unix(path) => {
                let socket = bind_unix(path)?;
                if let Some(group_id) = group_id {
                    if fs::symlink_metadata(path)?.gid() != group_id {
                        std::os::unix::fs::lchown(path, None, Some(group_id))?;
                    }
                    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
                }
                let metadata = fs::symlink_metadata(path)?;
                (socket, Some((metadata.dev(), metadata.ino())))
            }
        };
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let address = match address {
            // With the port that the system chose.
            DataAddress::Tcp(_) => {
                let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
                DataAddress::Tcp(local)
            }
            DataAddress::Unix(path) => DataAddress::Unix(path.clone()),
        };
        if wants_ipv4 && !is_ipv6_only {
            tracing::info!(%address, "IPv4 is served on that port as well; a listener on 0.0.0.0 would take it");
        }
        Ok(Self { socket, address, file, group_id, is_ipv6_only })
    }

    /// Whether it is a wildcard of IPv6 at which another program has IPv4.
    pub fn is_ipv6_only(&self) -> bool {
        self.is_ipv6_only
    }

    /// The group that may connect to a Unix socket, beside the server's user.
    pub fn group_id(&self) -> Option<u32> {
        self.group_id
    }

    /// Where it listens.
    pub fn address(&self) -> &DataAddress {
        &self.address
    }

    /// Takes the next connection, with its options set.
    ///
    /// # Errors
    /// `EAGAIN`: there is none. `EMFILE`, `ENFILE`, `ENOMEM`: none can be taken now. Others: the peer has gone again.
    pub fn accept(&self) -> io::Result<(Socket, Peer)> {
        let (socket, address) = self.socket.accept()?;
        let peer = match address.as_socket() {
            Some(address) => {
                set_tcp_options(&socket)?;
                Peer::Tcp(plain(address))
            }
            None => {
                socket_memory::bound_unix(&socket)?;
                let credentials = peer_credentials(&socket)?;
                Peer::Unix { process_id: credentials.pid, user_id: credentials.uid }
            }
        };
        Ok((socket, peer))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    /// Takes a Unix socket's file away, unless somebody has put another in its place.
    fn drop(&mut self) {
        let (DataAddress::Unix(path), Some(file)) = (&self.address, self.file) else { return };
        let is_ours = fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == file);
        if is_ours && let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove the file of a Unix socket");
        }
    }
}

/// The process at the other end of a Unix socket, as it was when it connected; its id is 0 where this PID namespace does not know it.
///
/// # Errors
/// The system's.
pub fn peer_credentials(socket: &Socket) -> io::Result<libc::ucred> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length_bytes = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most so many bytes there, and how many it wrote.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length_bytes,
        )
    };
    if result == 0 { Ok(credentials) } else { Err(io::Error::last_os_error()) }
}

/// Whether a listener takes IPv4 connections beside those of IPv6: `[::]` is every address of the machine, unless IPv4 has a listener
/// of its own at that port.
pub fn takes_ipv4(address: SocketAddr, all: &[DataAddress]) -> bool {
    let has_its_own = |other: SocketAddr| other.is_ipv4() && other.port() == address.port();
    let is_left = address.port() == 0 || !all.iter().filter_map(DataAddress::tcp).any(has_its_own);
    address.is_ipv6() && address.ip().is_unspecified() && is_left
}

/// An IPv4 address as such, also where a socket for both families has accepted the connection.
fn plain(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// Binds a wildcard of IPv6 for IPv4 too, unless another program has the port there; and whether it has IPv4.
fn bind_both_families(address: SocketAddr) -> io::Result<(Socket, bool)> {
    match bind_tcp(address, true) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let socket = bind_tcp(address, false)?;
            tracing::warn!(%address, "another program has this port for IPv4: only IPv6 is served there; stop it, or choose another port");
            Ok((socket, false))
        }
        bound => Ok((bound?, true)),
    }
}

fn bind_tcp(address: SocketAddr, takes_ipv4: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Whatever net.ipv6.bindv6only says.
        socket.set_only_v6(!takes_ipv4)?;
    }
    match socket.bind(&address.into()) {
        // At boot an address may come later than the server.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            if address.is_ipv6() {
                socket.set_freebind_v6(true)?;
            } else {
                socket.set_freebind_v4(true)?;
            }
            socket.bind(&address.into())?;
            tracing::warn!(%address, "this machine does not have the listen address yet: clients are served once it does");
        }
        bound => bound?,
    }
    Ok(socket)
}

fn bind_unix(path: &Path) -> io::Result<Socket> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before the file is there: from its first moment on nobody but the server's user can connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind(path, &address) => {
            fs::remove_file(path)?;
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    Ok(socket)
}

/// Whether there is a Unix socket that nobody listens on any more.
fn is_left_behind(path: &Path, address: &SockAddr) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refused = || {
        let connected =
            Socket::new(Domain::UNIX, Type::STREAM, None).and_then(|probe| probe.connect(address));
        connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    is_socket && refused()
}

/// Small replies leave at once; a peer that vanished is noticed within about a minute even when nothing is sent; what waits in
/// the kernel is bounded.
fn set_tcp_options(socket: &Socket) -> io::Result<()> {
    socket_memory::narrow(socket)?;
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_shown() {
        for text in ["127.0.0.1:10809", "[::1]:0", "unix:/run/volnode/nbd.sock"] {
            assert_eq!(text.parse::<DataAddress>().unwrap().to_string(), text);
        }
        for wrong in ["", "localhost:1", "unix:", "unix:relative/path", "/run/nbd.sock", "127.0.0.1"] {
            assert!(wrong.parse::<DataAddress>().is_err(), "{wrong}");
        }
    }

    /// Not below TMPDIR, which may be too long for a socket's name.
    fn short_directory() -> tempfile::TempDir {
        tempfile::tempdir_in("/tmp").unwrap()
    }

    fn address(dir: &tempfile::TempDir) -> (PathBuf, DataAddress) {
        let path = dir.path().join("nbd.sock");
        (path.clone(), DataAddress::Unix(path))
    }

    #[test]
    fn a_unix_socket_is_its_owners_alone_and_gone_with_the_listener() {
        let dir = short_directory();
        let (path, address) = address(&dir);
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o177, 0);
        let _client = UnixStream::connect(&path).unwrap();
        let (_, peer) = listener.accept().unwrap();
        let user_id = rustix::process::geteuid().as_raw();
        assert_eq!(peer, Peer::Unix { process_id: std::process::id() as i32, user_id });
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_nothing_else() {
        let dir = short_directory();
        let (path, address) = address(&dir);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file, as a killed server does");
        let first = Listener::bind(&address).unwrap();
        assert_eq!(Listener::bind(&address).unwrap_err().kind(), io::ErrorKind::AddrInUse, "one that serves");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(Listener::bind(&address).is_err(), "not a socket");
        drop(first);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    /// As at boot, before the network is configured: an address of those that are for documentation, which nobody has.
    #[test]
    fn an_address_that_the_machine_does_not_have_yet_is_listened_on() {
        let listener = Listener::bind(&"192.0.2.77:0".parse().unwrap()).unwrap();
        assert_ne!(listener.address().tcp().unwrap().port(), 0);
    }

    #[test]
    fn the_ipv6_wildcard_takes_ipv4_unless_that_has_a_listener_of_its_own() {
        let takes = |address: &str, all: &[&str]| {
            let all: Vec<DataAddress> = all.iter().map(|address| address.parse().unwrap()).collect();
            takes_ipv4(address.parse().unwrap(), &all)
        };
        assert!(takes("[::]:1", &["[::]:1", "[::1]:1", "0.0.0.0:2", "unix:/s"]));
        assert!(takes("[::]:0", &["[::]:0", "0.0.0.0:0"]));
        for other in ["0.0.0.0:1", "127.0.0.1:1"] {
            assert!(!takes("[::]:1", &[other, "[::]:1"]), "{other}");
        }
        assert!(!takes("[::1]:1", &[]) && !takes("0.0.0.0:1", &[]));
    }

    #[test]
    fn a_client_over_ipv4_is_known_by_its_own_address() {
        let Ok(listener) = Listener::bind(&"[::]:0".parse().unwrap()) else {
            println!("SKIP this machine has no IPv6");
            return;
        };
        let port = listener.address().tcp().unwrap().port();
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (_, peer) = listener.accept().unwrap();
        assert_eq!(peer, Peer::Tcp(client.local_addr().unwrap()));
        // Beside a listener for IPv4 it is one for IPv6 alone.
        let ipv4 = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let beside = DataAddress::Tcp((Ipv6Addr::UNSPECIFIED, ipv4.address().tcp().unwrap().port()).into());
        Listener::bind_among(&beside, &[ipv4.address().clone(), beside.clone()], None).unwrap();
    }

    #[test]
    fn the_ipv6_wildcard_is_one_for_ipv6_alone_where_another_program_has_ipv4() {
        if Listener::bind(&"[::]:0".parse().unwrap()).is_err() {
            println!("SKIP this machine has no IPv6");
            return;
        }
        let other = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = other.local_addr().unwrap().port();
        let wildcard = DataAddress::Tcp((Ipv6Addr::UNSPECIFIED, port).into());
        let listener = Listener::bind(&wildcard).unwrap();
        assert!(listener.is_ipv6_only());
        std::net::TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
        listener.accept().unwrap();
        // Who has both keeps both from a second one.
        assert_eq!(Listener::bind(&wildcard).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(!Listener::bind(&"[::]:0".parse().unwrap()).unwrap().is_ipv6_only());
    }

    #[test]
    fn a_tcp_listener_tells_the_port_it_got() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        assert_ne!(listener.address().tcp().unwrap().port(), 0);
    }
}
