//! The listening sockets, and the thread that accepts connections and gives each to the ring that has the fewest.
//!
//! Owns: the listeners and the options of accepted sockets. Never: reads or writes a connection.
//! Called by: `data_server.rs`.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tracing::warn;

use crate::data_server::{DataServerError, Limits};
use crate::fence::ConnectionId;
use crate::mailbox::{Mailbox, RingMessage};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Listens on an address.
///
/// # Errors
/// [`DataServerError::Address`]: it is in use, not this machine's, or not allowed.
pub fn listen(address: SocketAddr) -> Result<TcpListener, DataServerError> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    open().map_err(|source| DataServerError::Address { address, source })
}

/// What the accepting thread works on.
#[derive(Debug)]
pub struct Acceptor {
    /// Where connections come in; not blocking.
    pub listeners: Vec<TcpListener>,
    /// Where they go.
    pub rings: Vec<Arc<Mailbox>>,
    /// How many there may be.
    pub limits: Limits,
}

/// Source of connection identities.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// How long nothing is accepted when the process or the system has run out of descriptors.
const ACCEPT_PAUSE: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

impl Acceptor {
    /// Accepts until `stop` (an eventfd) is written.
    pub fn run(self, stop: &OwnedFd) {
        loop {
            let mut waits: Vec<PollFd<'_>> = vec![PollFd::new(stop, PollFlags::IN)];
            waits.extend(self.listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
            if poll(&mut waits, None).is_err() {
                continue; // Interrupted.
            }
            if !waits[0].revents().is_empty() {
                return;
            }
            let ready: Vec<bool> = waits[1..].iter().map(|wait| !wait.revents().is_empty()).collect();
            for (listener, _) in self.listeners.iter().zip(ready).filter(|(_, is_ready)| *is_ready) {
                self.accept(listener, stop);
            }
        }
    }

    fn accept(&self, listener: &TcpListener, stop: &OwnedFd) {
        match listener.accept() {
            Ok((stream, peer)) => self.hand_over(stream, peer),
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) =>
            {
                warn!(%error, "cannot accept connections");
                let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&ACCEPT_PAUSE));
            }
            // The peer has gone again, or another wake-up took it.
            Err(_) => {}
        }
    }

    fn hand_over(&self, stream: TcpStream, peer: SocketAddr) {
        let total: u32 = self.rings.iter().map(|ring| ring.connections()).sum();
        if total >= self.limits.connections_max {
            warn!(%peer, total, "too many connections: one is closed");
            return;
        }
        let Some(ring) = self.rings.iter().min_by_key(|ring| ring.connections()) else { return };
        if let Err(error) = set_options(&stream) {
            warn!(%peer, %error, "a connection cannot be set up");
            return;
        }
        let connection = ConnectionId(NEXT_CONNECTION.fetch_add(1, Ordering::Relaxed));
        ring.connection_added();
        ring.post(RingMessage::Accept { connection, socket: stream.into(), peer });
    }
}

/// Small replies leave at once; a peer that vanished is noticed within about a minute even when nothing is sent.
fn set_options(stream: &TcpStream) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}
