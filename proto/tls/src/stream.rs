//! A TLS connection from its handshake until its records are handed over: to the kernel, or to a relay.
//!
//! Blocking, every wait bounded by a deadline. One record is read at a time, never a byte beyond it: what the peer sends
//! behind the last record that was needed stays in the socket, for whoever has the records then.
//! Called by the server's handshake threads, and by the client's dial, which does the whole NBD handshake on it.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CipherSuite, ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use crate::explain;
use crate::kernel::{self, CipherKind, HandOverError};
use crate::relay;

/// Type, version and length.
const RECORD_HEADER_BYTES: usize = 5;
/// Longest body of a record: 2^14 of data and, in TLS 1.2, up to 2^11 around them.
const RECORD_BODY_BYTES_MAX: usize = (16 << 10) + 2048;

/// So long a client whose handshake failed may take to hear of it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer is not believed, does not believe us, or breaks the protocol.
    #[error("{}", explain::handshake_failure(.0))]
    Tls(rustls::Error),
    /// The socket failed, or the time was up (`TimedOut`).
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no TLS.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// The records cannot be handed over.
    #[error(transparent)]
    HandOver(#[from] HandOverError),
}

// Not by thiserror, which would make it the source as well: its own words would be told beside ours.
impl From<rustls::Error> for StreamError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

/// Who does the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Records {
    /// The kernel if it can, else a relay.
    #[default]
    Auto,
    /// A relay, always.
    UserSpace,
}

/// A plain stream socket whose bytes are carried by TLS.
#[derive(Debug)]
pub enum Carrier {
    /// The TCP socket itself: the kernel does the records (kTLS).
    Kernel(TcpStream),
    /// One end of a Unix stream socket: a thread does the records and ends with it.
    Relay(OwnedFd),
}

/// A connection whose handshake has succeeded.
#[derive(Debug)]
pub struct TlsStream {
    socket: TcpStream,
    connection: Connection,
    record: Vec<u8>,
}

impl TlsStream {
    /// The server's side of a handshake.
    ///
    /// # Errors
    /// [`StreamError`]; the peer was told by an alert where there is one.
    pub fn accept(
        socket: TcpStream,
        config: Arc<ServerConfig>,
        deadline: Instant,
    ) -> Result<Self, StreamError> {
        Self::begin(socket, ServerConnection::new(config)?.into(), deadline)
    }

    /// The client's side: with the server of this name.
    ///
    /// # Errors
    /// As of [`Self::accept`].
    pub fn connect(
        socket: TcpStream,
        config: Arc<ClientConfig>,
        server_name: ServerName<'static>,
        deadline: Instant,
    ) -> Result<Self, StreamError> {
        Self::begin(socket, ClientConnection::new(config, server_name)?.into(), deadline)
    }

    fn begin(socket: TcpStream, connection: Connection, deadline: Instant) -> Result<Self, StreamError> {
        socket.set_nonblocking(false)?;
        let mut stream = Self { socket, connection, record: Vec::new() };
        let outcome = stream.handshake(deadline);
        if let Err(StreamError::Tls(_) | StreamError::NotTls) = &outcome {
            // The alert says why; a peer that does not take it has no use for it.
            let _ = stream.send_records(deadline);
            let _ = stream.socket.shutdown(Shutdown::Write);
            if matches!(stream.connection, Connection::Server(_)) {
                stream.say_farewell();
            }
        }
        outcome.map(|()| stream)
    }

    /// Has the alert arrive: a client learns of it only after its own side of the handshake, and what it sends meanwhile, unread, would
    /// reset the connection and take the alert along.
    fn say_farewell(&self) {
        let (give_up, mut nowhere) = (Instant::now() + FAREWELL_LIMIT, [0; 4096]);
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() || self.socket.set_read_timeout(Some(left)).is_err() {
                return;
            }
            if !matches!((&self.socket).read(&mut nowhere), Ok(1..)) {
                return;
            }
        }
    }

    fn handshake(&mut self, deadline: Instant) -> Result<(), StreamError> {
        while self.connection.is_handshaking() {
            self.send_records(deadline)?;
            if self.connection.is_handshaking() {
                self.receive_record(deadline)?;
            }
        }
        Ok(self.send_records(deadline)?)
    }

    /// The certificate that the peer has shown, which was checked.
    pub fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        self.connection.peer_certificates().and_then(<[_]>::first)
    }

    /// What was agreed on, for the log: such as `TLSv1_3 TLS13_AES_256_GCM_SHA384`.
    pub fn describe(&self) -> String {
        let version = self.connection.protocol_version();
        let suite = self.connection.negotiated_cipher_suite();
        match (version, suite) {
            (Some(version), Some(suite)) => format!("{version:?} {:?}", suite.suite()),
            _ => "no TLS".to_owned(),
        }
    }

    /// Receives plaintext; 0 bytes: the peer has ended the session.
    ///
    /// # Errors
    /// [`StreamError`]; `UnexpectedEof` where the connection ended without the session's end.
    pub fn read(&mut self, into: &mut [u8], deadline: Instant) -> Result<usize, StreamError> {
        loop {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.receive_record(deadline)?;
                    // An answer to a key update, or nothing.
                    self.send_records(deadline)?;
                }
                other => return Ok(other?),
            }
        }
    }

    /// Sends plaintext, all of it.
    ///
    /// # Errors
    /// [`StreamError::Io`]
    pub fn write_all(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let taken = self.connection.writer().write(bytes)?;
            bytes = &bytes[taken..];
            self.send_records(deadline)?;
        }
        Ok(())
    }

    /// Gives the connection to whoever does its records from now on. Received plaintext that was not read yet goes with
    /// it, which only a relay can take.
    ///
    /// # Errors
    /// [`StreamError::HandOver`], [`StreamError::Io`]
    pub fn hand_over(mut self, records: Records) -> Result<Carrier, StreamError> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        if records == Records::UserSpace || !self.fits_the_kernel() {
            return Ok(Carrier::Relay(relay::start(self.socket, self.connection)?));
        }
        let version = self.connection.protocol_version().ok_or(HandOverError::Kind)?;
        let secrets = self.connection.dangerous_extract_secrets().map_err(HandOverError::Secrets)?;
        kernel::hand_over(&self.socket, version, secrets)?;
        Ok(Carrier::Kernel(self.socket))
    }

    fn fits_the_kernel(&mut self) -> bool {
        let suite = self.connection.negotiated_cipher_suite().map(|suite| suite.suite());
        let cipher = suite.and_then(cipher_kind);
        let is_known = self
            .connection
            .protocol_version()
            .zip(cipher)
            .is_some_and(|(version, cipher)| kernel::support(version, cipher).is_ok());
        // Processing nothing tells how much plaintext waits.
        let has_plaintext =
            self.connection.process_new_packets().map_or(true, |state| state.plaintext_bytes_to_read() > 0);
        // A Unix socket has an address of another family, and no kTLS.
        let is_tcp = self.socket.local_addr().is_ok();
        is_known && is_tcp && !has_plaintext
    }

    fn send_records(&mut self, deadline: Instant) -> io::Result<()> {
        while self.connection.wants_write() {
            self.socket.set_write_timeout(Some(left(deadline)?))?;
            match self.connection.write_tls(&mut self.socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(timed_out(error)),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    fn receive_record(&mut self, deadline: Instant) -> Result<(), StreamError> {
        self.record.resize(RECORD_HEADER_BYTES, 0);
        read_exact(&self.socket, &mut self.record, deadline)?;
        let body_bytes = usize::from(u16::from_be_bytes([self.record[3], self.record[4]]));
        // Types 20 to 23, versions 3.x: anything else would be waited for in vain.
        if !(20..=23).contains(&self.record[0]) || self.record[1] != 3 || body_bytes > RECORD_BODY_BYTES_MAX {
            return Err(StreamError::NotTls);
        }
        self.record.resize(RECORD_HEADER_BYTES + body_bytes, 0);
        read_exact(&self.socket, &mut self.record[RECORD_HEADER_BYTES..], deadline)?;
        let mut rest = &self.record[..];
        while !rest.is_empty() {
            self.connection.read_tls(&mut rest)?;
            self.connection.process_new_packets()?;
        }
        Ok(())
    }
}

fn cipher_kind(suite: CipherSuite) -> Option<CipherKind> {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => Some(CipherKind::Aes128Gcm),
        CipherSuite::TLS13_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => Some(CipherKind::Aes256Gcm),
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => Some(CipherKind::Chacha20Poly1305),
        _ => None,
    }
}

/// Time until the deadline; the wait is renewed for each read, so that a peer that sends a byte now and then gains none.
fn left(deadline: Instant) -> io::Result<std::time::Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket's time-out looks like a read that would block.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn read_exact(mut socket: &TcpStream, mut into: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !into.is_empty() {
        socket.set_read_timeout(Some(left(deadline)?))?;
        match socket.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => into = &mut into[received..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(timed_out(error)),
        }
    }
    Ok(())
}
