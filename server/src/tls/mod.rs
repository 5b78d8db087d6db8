//! TLS on the server: whether it is spoken, with which certificates, and the handshakes.
//!
//! ```text
//!   ring: STARTTLS acknowledged ──► a thread: handshake ─┬─► keys to the kernel ──────────► ring: the same socket
//!                                                        └─► relay (kernel cannot) ───────► ring: a Unix socket
//! ```
//! Owns: the rustls configuration, replaced as a whole by a reload, and the handshake threads. Never: touches a socket
//! that a ring is using: the ring hands its connection over with nothing in flight and takes it back by message.
//! Called by: `io/run.rs` (a handshake), `serve.rs` (start, reload, the management API's port). A handshake thread lives
//! no longer than the ring's limit of a handshake: the ring shuts the socket down then.
//! [`rights`] says what a client's certificate allows; `management/listener.rs` is the API's side of it.

pub mod rights;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use proto::nbd::handshake::server::TlsState;
use rustls::ServerConfig;
use rustls::pki_types::UnixTime;
use tls::certificates::{CertificateError, Pair, faults_of_server, server_config};
use tls::relay;
use tls::stream::{Carrier, Records, StreamError, TlsStream};
use tracing::{debug, info, warn};

use crate::ids::ConnectionId;
use rights::Rights;

/// A handshake needs some 100 KiB; what is not touched costs nothing.
const STACK_BYTES: usize = 512 << 10;

/// A handshake's flights and the part of its stack that is touched come to less than a relay: that has a chunk of plaintext,
/// rustls's records both ways, and a stack.
const CONNECTION_BYTES: u64 = relay::CONNECTION_BYTES;

/// The files that TLS is spoken with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate and key.
    pub pair: Pair,
    /// Who vouches for clients; `None`: clients are not asked for a certificate.
    pub client_authority: Option<PathBuf>,
}

/// How TLS is spoken, if it is.
pub struct ServerTls {
    state: TlsState,
    records: Records,
    files: Option<TlsFiles>,
    config: RwLock<Option<Arc<ServerConfig>>>,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls")
            .field("state", &self.state)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl Default for ServerTls {
    fn default() -> Self {
        Self { state: TlsState::Off, records: Records::Auto, files: None, config: RwLock::new(None) }
    }
}

/// A connection that has TLS now.
#[derive(Debug)]
pub struct Secured {
    /// Where its plaintext comes and goes.
    pub carrier: Carrier,
    /// What its client may do.
    pub rights: Arc<Rights>,
}

impl ServerTls {
    /// TLS with these files, allowed or required.
    ///
    /// # Errors
    /// [`CertificateError`]: a file cannot be used.
    pub fn new(files: TlsFiles, is_required: bool, records: Records) -> Result<Self, CertificateError> {
        let config = load(&files)?;
        let state = if is_required { TlsState::Required } else { TlsState::Allowed };
        Ok(Self { state, records, files: Some(files), config: RwLock::new(Some(config)) })
    }

    /// What a new connection is told.
    pub fn state(&self) -> TlsState {
        self.state
    }

    /// Whether every client that uses TLS shows a certificate.
    pub fn checks_clients(&self) -> bool {
        self.files.as_ref().is_some_and(|files| files.client_authority.is_some())
    }

    /// Memory that TLS may take for one connection, in bytes: its handshake, then, if it comes to that, its relay.
    pub fn connection_bytes(&self) -> u64 {
        if self.state == TlsState::Off { 0 } else { CONNECTION_BYTES }
    }

    /// Descriptors that one connection may come to have: its socket, and with TLS a second one of it for the handshake and the
    /// two ends of a relay.
    pub fn connection_descriptors(&self) -> u32 {
        if self.state == TlsState::Off { 1 } else { 4 }
    }

    /// Reads the files again. Connections stay as they are; those that come get the new certificates.
    ///
    /// # Errors
    /// [`CertificateError`]: the old ones stay in use.
    pub fn reload(&self) -> Result<(), CertificateError> {
        if let Some(files) = &self.files {
            let config = load(files)?;
            *self.config.write().unwrap_or_else(PoisonError::into_inner) = Some(config);
        }
        Ok(())
    }

    /// The configuration for the next handshake; `None`: there is no TLS.
    pub fn config(&self) -> Option<Arc<ServerConfig>> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the holder of this connection's certificate may do.
    pub fn rights_of(&self, certificate: Option<&rustls::pki_types::CertificateDer<'_>>) -> Rights {
        if !self.checks_clients() {
            return Rights::everything();
        }
        certificate.map_or_else(Rights::nothing, Rights::of_certificate)
    }

    /// Does the handshake of a connection on a thread of its own and tells the outcome; `None`: it failed, which was logged.
    /// `socket` is another descriptor of the ring's socket, which has nothing in flight.
    pub fn start_handshake(
        self: &Arc<Self>,
        connection: ConnectionId,
        socket: OwnedFd,
        deadline: Instant,
        on_end: impl Fn(Option<Secured>) + Clone + Send + 'static,
    ) {
        let (tls, tell) = (Arc::clone(self), on_end.clone());
        let thread = std::thread::Builder::new().name("tls-handshake".into()).stack_size(STACK_BYTES);
        let started = thread.spawn(move || {
            let secured = tls.handshake(connection, socket.into(), deadline);
            if let Err(error) = &secured {
                info!(connection = connection.0, %error, "a TLS handshake fails");
            }
            tell(secured.ok());
        });
        if let Err(error) = started {
            info!(connection = connection.0, %error, "no thread for a TLS handshake");
            on_end(None);
        }
    }

    fn handshake(
        &self,
        connection: ConnectionId,
        socket: TcpStream,
        deadline: Instant,
    ) -> Result<Secured, StreamError> {
        // Where there is no TLS nobody gets here; a client that did would speak to a wall.
        let config = self.config().ok_or(StreamError::NotTls)?;
        let stream = TlsStream::accept(socket, config, deadline)?;
        let rights = Arc::new(self.rights_of(stream.peer_certificate()));
        let agreed = stream.describe();
        let carrier = stream.hand_over(self.records)?;
        let is_kernel = matches!(carrier, Carrier::Kernel(_));
        debug!(connection = connection.0, agreed, is_kernel, ?rights, "TLS has started");
        Ok(Secured { carrier, rights })
    }
}

fn load(files: &TlsFiles) -> Result<Arc<ServerConfig>, CertificateError> {
    let config = server_config(&files.pair, files.client_authority.as_deref()).map(Arc::new)?;
    // Served all the same: some clients look away, and one that has expired is no reason to keep the others' disks waiting.
    for fault in faults_of_server(&files.pair, UnixTime::now())? {
        warn!(fault, "clients refuse the server's certificate");
    }
    Ok(config)
}
