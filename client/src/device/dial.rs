//! Opening a connection: TCP, its options, TLS where it is asked for, and the NBD handshake, on a blocking socket.
//!
//! Used before a queue thread starts. Every wait is bounded. The handshake itself is `proto`'s state machine. With TLS all
//! of it but STARTTLS is done by rustls, which also takes the records that come behind a TLS handshake; only then the
//! connection's records go to the kernel, or to a relay.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tls::stream::{Records, StreamError, TlsStream};

use super::data_socket::DataSocket;
use crate::tls_spec::{TlsSpec, TlsSpecError};

/// How long one address may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the handshake may take: the server answers GO only when the I/O of fenced connections has finished.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that acknowledges nothing for this long is gone. Some retransmissions more than a network loses on an ordinary
/// day, and little enough that another connection is tried while people still wait.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(15);
/// An idle connection is asked after this long whether it is still there; with the probes, as long as a busy one.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(6);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;

/// Why an export could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// A host name without an address.
    #[error("cannot find the server {address}: {source}")]
    Resolve {
        /// `host:port`
        address: String,
        /// The resolver's reason.
        source: io::Error,
    },
    /// Nobody accepts connections there.
    #[error("cannot reach the server at {address}: {source}")]
    Connect {
        /// `host:port`
        address: String,
        /// The operating system's reason.
        source: io::Error,
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
    /// The spec names no address at all.
    #[error("there is no server address to try")]
    NoAddress,
}

/// An open export.
#[derive(Debug)]
pub struct Dialled {
    /// In the transmission phase, blocking, with its options set.
    pub socket: DataSocket,
    /// What the server told.
    pub export: ExportInfo,
    /// The address that answered.
    pub address: String,
}

/// Opens `export_name` at the first of `addresses` that can be reached, over TLS where `tls` says how.
///
/// # Errors
/// That of the last address tried. A server that answers and refuses ends the search: the others are the same server.
pub fn dial(addresses: &[String], export_name: &str, tls: Option<&TlsSpec>) -> Result<Dialled, DialError> {
    let tls = tls.map(Tls::load).transpose()?;
    let mut last_error = DialError::NoAddress;
    for address in addresses {
        match connect(address) {
            Ok(socket) => return Handshake::new(address, export_name)?.run(socket, tls),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

fn connect(address: &str) -> Result<TcpStream, DialError> {
    let resolve_error = |source| DialError::Resolve { address: address.to_owned(), source };
    let targets: Vec<SocketAddr> = address.to_socket_addrs().map_err(resolve_error)?.collect();
    let connect_error = |source| DialError::Connect { address: address.to_owned(), source };
    let mut last_error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for target in targets {
        match TcpStream::connect_timeout(&target, CONNECT_TIMEOUT) {
            Ok(socket) => return set_options(&socket).map(|()| socket).map_err(connect_error),
            Err(error) => last_error = error,
        }
    }
    Err(connect_error(last_error))
}

fn set_options(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    let options = SockRef::from(socket);
    options.set_tcp_keepalive(&keepalive)?;
    options.set_tcp_user_timeout(Some(SILENCE_TIMEOUT))
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
struct Handshake<'a> {
    address: &'a str,
    machine: ClientHandshake,
    deadline: Instant,
}

impl<'a> Handshake<'a> {
    fn new(address: &'a str, export_name: &str) -> Result<Self, DialError> {
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        let machine = ClientHandshake::new(export_name)
            .map_err(|source| DialError::Handshake { address: address.to_owned(), source })?;
        Ok(Self { address, machine, deadline })
    }

    fn run(mut self, socket: TcpStream, tls: Option<Tls>) -> Result<Dialled, DialError> {
        let Some(tls) = tls else {
            let export = self.speak(&mut PlainStream(&socket), |_| false)?;
            let export = export.ok_or_else(|| self.protocol_error("it does not tell the export"))?;
            socket.set_read_timeout(None).map_err(|source| self.io_error(source))?;
            return Ok(Dialled { socket: socket.into(), export, address: self.address.to_owned() });
        };
        self.machine = self.machine.with_tls();
        self.speak(&mut PlainStream(&socket), ClientHandshake::is_tls_acknowledged)?;
        let address = self.address.to_owned();
        let tls_error = |source| DialError::Tls { address: address.clone(), source };
        let mut stream =
            TlsStream::connect(socket, tls.config, tls.server_name, self.deadline).map_err(tls_error)?;
        let mut output = Vec::new();
        self.machine.tls_started(&mut output);
        stream.write_all(&output, self.deadline).map_err(tls_error)?;
        let export = self.speak(&mut stream, |_| false)?;
        let export = export.ok_or_else(|| self.protocol_error("it does not tell the export"))?;
        tracing::debug!(address, agreed = stream.describe(), "TLS has started");
        let carrier = stream.hand_over(tls.records).map_err(tls_error)?;
        Ok(Dialled { socket: carrier.into(), export, address: address.clone() })
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
        DialError::Io { address: self.address.to_owned(), source }
    }

    fn handshake_error(&self, source: ClientHandshakeError) -> DialError {
        DialError::Handshake { address: self.address.to_owned(), source }
    }

    fn protocol_error(&self, what: &'static str) -> DialError {
        self.handshake_error(ClientHandshakeError::Protocol(what))
    }

    fn stream_error(&self, error: StreamError) -> DialError {
        match error {
            StreamError::Io(source) => self.io_error(source),
            source => DialError::Tls { address: self.address.to_owned(), source },
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

struct PlainStream<'a>(&'a TcpStream);

impl Conversation for PlainStream<'_> {
    fn receive(&mut self, into: &mut [u8], deadline: Instant) -> Result<usize, StreamError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            self.0.set_read_timeout(Some(left))?;
            match self.0.read(into) {
                // Task work of a ring that went away looks like a signal; the deadline above bounds the repetition.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => return Ok(received?),
            }
        }
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

    use super::*;

    #[test]
    fn unreachable_and_foreign_servers_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            peer.write_all(b"220 mail.example.org ESMTP\r\n").unwrap();
        });
        let foreign = dial(std::slice::from_ref(&address), "x", None).unwrap_err();
        assert!(matches!(foreign, DialError::Handshake { .. }), "{foreign}");
        server.join().unwrap();
        let refused = dial(&[address], "x", None).unwrap_err();
        assert!(matches!(refused, DialError::Connect { .. }), "{refused}");
        assert!(matches!(dial(&[], "x", None).unwrap_err(), DialError::NoAddress));
    }
}
