//! Opening a connection: TCP or a Unix socket, its options, TLS where it is asked for, and the NBD handshake, on a blocking
//! socket.
//!
//! Used before a queue thread starts, and to open what was lost. Every wait is bounded. What to make of a server that opens the
//! export, or does not, is `slots.rs`'s to say: here one address is tried after the other for as long as it asks. The handshake itself is `proto`'s state machine. With TLS all
//! of it but STARTTLS is done by rustls, which also takes the records that come behind a TLS handshake; only then the
//! connection's records go to the kernel, or to a relay.

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError, ClientNegotiated};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use tls::stream::{Records, StreamError, TlsStream};

use super::data_socket::DataSocket;
use crate::data_address::{self, Place, ResolveError};
use crate::tls_spec::{TlsSpec, TlsSpecError};

/// How long one address may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer that accepts the connection may take to greet, and then to start TLS: it waits for nobody there.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the answer to GO may take: the server gives it only when the I/O of fenced connections has finished.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that acknowledges nothing for this long is gone. Some retransmissions more than a network loses on an ordinary
/// day, and little enough that another connection is tried while people still wait.
pub const NETWORK_TIMEOUT: Duration = Duration::from_secs(15);
/// An idle connection is asked after this long whether it is still there; with the probes, as long as a busy one.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(6);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;

/// Why an export could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// A host name without an address, or an address with the zone of no interface.
    #[error("cannot find the server {address}: {source}")]
    Resolve {
        /// `host:port`
        address: String,
        /// The resolver's reason.
        source: ResolveError,
    },
    /// Nobody accepts connections there.
    #[error("cannot reach the server at {address}: {source}")]
    Connect {
        /// `host:port`
        address: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// It accepts connections and does not go on.
    #[error("{address} accepts connections, but did not answer within {} s", waited.as_secs())]
    Silent {
        /// `host:port`
        address: String,
        /// For how long an answer was waited for.
        waited: Duration,
    },
    /// The connection broke during the handshake.
    #[error("the connection to {address} broke during the handshake: {source}")]
    Io {
        /// `host:port`
        address: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The server is not one, or does not give us the export.
    #[error("{address}: {source}")]
    Handshake {
        /// `host:port`
        address: String,
        /// What it did.
        source: ClientHandshakeError,
    },
    /// TLS does not start: one side does not believe the other, or the connection broke.
    #[error("{address}: TLS: {source}")]
    Tls {
        /// `host:port`
        address: String,
        /// Why.
        source: StreamError,
    },
    /// The spec's files or name are of no use.
    #[error(transparent)]
    TlsSpec(#[from] TlsSpecError),
}

/// An open export.
#[derive(Debug)]
pub struct Dialled<S = DataSocket> {
    /// In the transmission phase, blocking, with its options set.
    pub socket: S,
    /// What the server told.
    pub export: ExportInfo,
    /// What was settled beside it; nothing but by [`attempts_with_context`].
    pub negotiated: ClientNegotiated,
    /// The address that answered.
    pub address: String,
}

/// Tries to open `export_name` at each of `addresses` in turn, at every address that a host name stands for, over TLS where
/// `tls` says how. Once it was asked for, the export may take `open_timeout`. Whoever asks for no further attempt leaves the other addresses alone.
///
/// # Errors
/// [`DialError::TlsSpec`]: `tls` is of no use anywhere. That an attempt failed is its own result.
pub fn attempts<'a>(
    addresses: &'a [String],
    export_name: &'a str,
    tls: Option<&TlsSpec>,
    open_timeout: Duration,
) -> Result<impl Iterator<Item = Result<Dialled, DialError>> + use<'a>, DialError> {
    attempts_with_context(addresses, export_name, None, tls, open_timeout)
}

/// The same, and asks for structured replies and this metadata context.
///
/// # Errors
/// As [`attempts`].
pub fn attempts_with_context<'a>(
    addresses: &'a [String],
    export_name: &'a str,
    context: Option<&'a str>,
    tls: Option<&TlsSpec>,
    open_timeout: Duration,
) -> Result<impl Iterator<Item = Result<Dialled, DialError>> + use<'a>, DialError> {
    let tls = tls.map(Tls::load).transpose()?;
    let targets = addresses.iter().flat_map(|address| resolve(address));
    Ok(targets.map(move |target| {
        let target = target?;
        let socket = connect(&target)?;
        let mut handshake = Handshake::new(target, export_name, open_timeout)?;
        if let Some(context) = context {
            handshake.machine = handshake.machine.with_context(context);
        }
        handshake.run(socket, tls.as_ref())
    }))
}

/// One place to connect to.
struct Target {
    /// `host:port` or `unix:/path`, as it was given.
    address: String,
    /// The same for people: with what the name stands for, where it is a name.
    shown: String,
    place: Place,
}

fn resolve(address: &str) -> Vec<Result<Target, DialError>> {
    let found = match data_address::resolve(address) {
        Ok(found) => found,
        Err(source) => return vec![Err(DialError::Resolve { address: address.to_owned(), source })],
    };
    let target = |place: Place| {
        let name_of = match &place {
            Place::Tcp(tcp) if !address.starts_with('[') && tcp.to_string() != address => Some(tcp.ip()),
            Place::Tcp(_) | Place::Unix(_) => None,
        };
        let shown = name_of.map_or_else(|| address.to_owned(), |ip| format!("{address} ({ip})"));
        Ok(Target { address: address.to_owned(), shown, place })
    };
    found.into_iter().map(target).collect()
}

fn connect(target: &Target) -> Result<Socket, DialError> {
    let connected = match &target.place {
        Place::Tcp(address) => connect_tcp(*address),
        Place::Unix(path) => connect_unix(path),
    };
    connected.map_err(|source| DialError::Connect { address: target.shown.clone(), source })
}

fn connect_tcp(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.connect_timeout(&address.into(), CONNECT_TIMEOUT)?;
    set_options(&socket)?;
    Ok(socket)
}

fn connect_unix(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A server that takes no connections has them wait; a connect that does not wait would fail at once.
    socket.set_write_timeout(Some(CONNECT_TIMEOUT))?;
    socket.connect(&SockAddr::unix(path)?).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    })?;
    socket.set_write_timeout(None)?;
    Ok(socket)
}

fn set_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(NETWORK_TIMEOUT))
}

/// What the spec says, loaded.
struct Tls {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
    records: Records,
}

impl Tls {
    fn load(spec: &TlsSpec) -> Result<Self, TlsSpecError> {
        let (config, server_name) = spec.load()?;
        let records = if spec.user_space_only { Records::UserSpace } else { Records::Auto };
        Ok(Self { config, server_name, records })
    }
}

/// An NBD handshake with one server.
struct Handshake {
    target: Target,
    machine: ClientHandshake,
    /// How long what is waited for now may take.
    patience: Duration,
    deadline: Instant,
    open_timeout: Duration,
}

impl Handshake {
    fn new(target: Target, export_name: &str, open_timeout: Duration) -> Result<Self, DialError> {
        let machine = ClientHandshake::new(export_name)
            .map_err(|source| DialError::Handshake { address: target.shown.clone(), source })?;
        let (patience, deadline) = (GREETING_TIMEOUT, Instant::now() + GREETING_TIMEOUT);
        Ok(Self { target, machine, patience, deadline, open_timeout })
    }

    fn run(mut self, socket: Socket, tls: Option<&Tls>) -> Result<Dialled, DialError> {
        let Some(tls) = tls else {
            let export = self.speak(&mut PlainStream(&socket), |_| false)?;
            let export = export.ok_or_else(|| self.protocol_error("it does not tell the export"))?;
            let socket = DataSocket::from(socket);
            socket.bear_with_a_full_peer().map_err(|source| self.io_error(source))?;
            let negotiated = self.machine.negotiated();
            return Ok(Dialled { socket, export, negotiated, address: self.target.address });
        };
        self.machine = self.machine.with_tls();
        self.speak(&mut PlainStream(&socket), ClientHandshake::is_tls_acknowledged)?;
        self.wait_for(GREETING_TIMEOUT);
        let (config, server_name) = (Arc::clone(&tls.config), tls.server_name.clone());
        // TLS is asked for on TCP only.
        let mut stream = TlsStream::connect(TcpStream::from(socket), config, server_name, self.deadline)
            .map_err(|error| self.stream_error(error))?;
        let mut output = Vec::new();
        self.machine.tls_started(&mut output);
        self.wait_for(self.open_timeout);
        stream.write_all(&output, self.deadline).map_err(|error| self.stream_error(error))?;
        let export = self.speak(&mut stream, |_| false)?;
        let export = export.ok_or_else(|| self.protocol_error("it does not tell the export"))?;
        tracing::debug!(address = self.target.shown, agreed = stream.describe(), "TLS has started");
        let carrier = stream.hand_over(tls.records).map_err(|error| self.stream_error(error))?;
        let socket = DataSocket::from(carrier);
        socket.bear_with_a_full_peer().map_err(|source| self.io_error(source))?;
        let negotiated = self.machine.negotiated();
        Ok(Dialled { socket, export, negotiated, address: self.target.address })
    }

    fn wait_for(&mut self, patience: Duration) {
        (self.patience, self.deadline) = (patience, Instant::now() + patience);
    }

    /// Goes on until the export is open, or `is_enough`.
    fn speak(
        &mut self,
        stream: &mut impl Conversation,
        is_enough: impl Fn(&ClientHandshake) -> bool,
    ) -> Result<Option<ExportInfo>, DialError> {
        let (mut input, mut output) = ([0u8; 4096], Vec::new());
        loop {
            let received =
                stream.receive(&mut input, self.deadline).map_err(|error| self.stream_error(error))?;
            if received == 0 {
                return Err(self.io_error(io::ErrorKind::UnexpectedEof.into()));
            }
            let opened = match self.machine.handle_bytes(&input[..received], &mut output) {
                Ok(opened) => opened,
                Err(source) => {
                    // A farewell, if anything; whether it arrives changes nothing.
                    let _ = stream.send(&output, self.deadline);
                    return Err(self.handshake_error(source));
                }
            };
            if self.machine.has_asked_for_export() && self.patience != self.open_timeout {
                self.wait_for(self.open_timeout);
            }
            stream.send(&output, self.deadline).map_err(|error| self.stream_error(error))?;
            output.clear();
            if opened.is_some() && !self.machine.leftover().is_empty() {
                return Err(self.protocol_error("bytes after the end of the handshake"));
            }
            if opened.is_some() || is_enough(&self.machine) {
                return Ok(opened);
            }
        }
    }

    fn io_error(&self, source: io::Error) -> DialError {
        let address = self.target.shown.clone();
        match source.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                DialError::Silent { address, waited: self.patience }
            }
            _ => DialError::Io { address, source },
        }
    }

    fn handshake_error(&self, source: ClientHandshakeError) -> DialError {
        DialError::Handshake { address: self.target.shown.clone(), source }
    }

    fn protocol_error(&self, what: &'static str) -> DialError {
        self.handshake_error(ClientHandshakeError::Protocol(what))
    }

    fn stream_error(&self, error: StreamError) -> DialError {
        match error {
            StreamError::Io(source) => self.io_error(source),
            source => DialError::Tls { address: self.target.shown.clone(), source },
        }
    }
}

/// A connection that is spoken on, with or without TLS.
trait Conversation {
    /// Receives what comes; 0 bytes: the peer has closed.
    fn receive(&mut self, into: &mut [u8], deadline: Instant) -> Result<usize, StreamError>;
    /// Sends everything.
    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), StreamError>;
}

/// Receives what comes, once something does; 0 bytes: the peer has closed. Errors: `TimedOut` at the deadline; those of read(2).
pub(super) fn receive_until(socket: impl AsFd, into: &mut [u8], deadline: Instant) -> io::Result<usize> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let received = match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => continue,
            Ok(_) => rustix::io::read(&socket, &mut *into),
            Err(error) => Err(error),
        };
        match received {
            // Task work of a ring that went away looks like a signal; the deadline above bounds the repetition.
            Err(Errno::INTR | Errno::AGAIN) => {}
            received => return Ok(received?),
        }
    }
}

struct PlainStream<'a>(&'a Socket);

impl Conversation for PlainStream<'_> {
    fn receive(&mut self, into: &mut [u8], deadline: Instant) -> Result<usize, StreamError> {
        Ok(receive_until(self.0, into, deadline)?)
    }

    fn send(&mut self, bytes: &[u8], _deadline: Instant) -> Result<(), StreamError> {
        // Some hundred bytes: a new connection's buffer has room for them.
        Ok(self.0.write_all(bytes)?)
    }
}

impl Conversation for TlsStream {
    fn receive(&mut self, into: &mut [u8], deadline: Instant) -> Result<usize, StreamError> {
        self.read(into, deadline)
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), StreamError> {
        self.write_all(bytes, deadline)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn unreachable_and_foreign_servers_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            peer.write_all(b"220 mail.example.org ESMTP\r\n").unwrap();
        });
        let dial =
            || attempts(std::slice::from_ref(&address), "x", None, OPEN_TIMEOUT).unwrap().next().unwrap();
        let foreign = dial().unwrap_err();
        assert!(matches!(foreign, DialError::Handshake { .. }), "{foreign}");
        server.join().unwrap();
        let refused = dial().unwrap_err();
        assert!(matches!(refused, DialError::Connect { .. }), "{refused}");
    }

    #[test]
    fn a_unix_socket_is_dialled_like_any_address() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let address = format!("unix:{}", dir.path().join("nbd.sock").display());
        let dial =
            || attempts(std::slice::from_ref(&address), "x", None, OPEN_TIMEOUT).unwrap().next().unwrap();
        let missing = dial().unwrap_err();
        assert!(matches!(missing, DialError::Connect { .. }), "{missing}");
        let listener = UnixListener::bind(dir.path().join("nbd.sock")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            peer.write_all(b"220 mail.example.org ESMTP\r\n").unwrap();
        });
        let foreign = dial().unwrap_err();
        assert!(matches!(foreign, DialError::Handshake { .. }), "{foreign}");
        server.join().unwrap();
    }

    #[test]
    fn a_zone_of_no_interface_is_told() {
        let address = "[fe80::1%no-such-if0]:10809".to_owned();
        let dialled =
            attempts(std::slice::from_ref(&address), "x", None, OPEN_TIMEOUT).unwrap().next().unwrap();
        let told = dialled.unwrap_err().to_string();
        assert!(told.contains("no network interface \"no-such-if0\""), "{told}");
    }
}
