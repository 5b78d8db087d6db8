//! Opening a connection: TCP, its options, and the NBD handshake, on a blocking socket.
//!
//! Used before a queue thread starts. Every wait is bounded. The handshake itself is `proto`'s state machine.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError};
use socket2::{SockRef, TcpKeepalive};

/// How long one address may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the handshake may take: the server answers GO only when the I/O of fenced connections has finished.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that acknowledges nothing for this long is gone. Long, because a lost connection is final for its device: a
/// network that comes back within it goes unnoticed.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);
/// An idle connection is asked after this long whether it is still there; with the probes, as long as a busy one.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

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
    /// The spec names no address at all.
    #[error("there is no server address to try")]
    NoAddress,
}

/// An open export.
#[derive(Debug)]
pub struct Dialled {
    /// In the transmission phase, blocking, with its options set.
    pub socket: TcpStream,
    /// What the server told.
    pub export: ExportInfo,
    /// The address that answered.
    pub address: String,
}

/// Opens `export_name` at the first of `addresses` that can be reached.
///
/// # Errors
/// That of the last address tried. A server that answers and refuses ends the search: the others are the same server.
pub fn dial(addresses: &[String], export_name: &str) -> Result<Dialled, DialError> {
    let mut last_error = DialError::NoAddress;
    for address in addresses {
        match connect(address) {
            Ok(socket) => return handshake(socket, address, export_name),
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

fn handshake(socket: TcpStream, address: &str, export_name: &str) -> Result<Dialled, DialError> {
    let handshake_error = |source| DialError::Handshake { address: address.to_owned(), source };
    let io_error = |source| DialError::Io { address: address.to_owned(), source };
    let mut machine = ClientHandshake::new(export_name).map_err(handshake_error)?;
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let (mut input, mut output) = ([0u8; 4096], Vec::new());
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io_error(io::ErrorKind::TimedOut.into()));
        }
        socket.set_read_timeout(Some(left)).map_err(io_error)?;
        let received = match (&socket).read(&mut input) {
            // Task work of a ring that went away looks like a signal; the deadline above bounds the repetition.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            received => received.map_err(io_error)?,
        };
        if received == 0 {
            return Err(io_error(io::ErrorKind::UnexpectedEof.into()));
        }
        let opened = machine.handle_bytes(&input[..received], &mut output).map_err(handshake_error)?;
        (&socket).write_all(&output).map_err(io_error)?;
        output.clear();
        if let Some(export) = opened {
            if !machine.leftover().is_empty() {
                let source = ClientHandshakeError::Protocol("bytes after the end of the handshake");
                return Err(handshake_error(source));
            }
            socket.set_read_timeout(None).map_err(io_error)?;
            return Ok(Dialled { socket, export, address: address.to_owned() });
        }
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
        let foreign = dial(std::slice::from_ref(&address), "x").unwrap_err();
        assert!(matches!(foreign, DialError::Handshake { .. }), "{foreign}");
        server.join().unwrap();
        let refused = dial(&[address], "x").unwrap_err();
        assert!(matches!(refused, DialError::Connect { .. }), "{refused}");
        assert!(matches!(dial(&[], "x").unwrap_err(), DialError::NoAddress));
    }
}
