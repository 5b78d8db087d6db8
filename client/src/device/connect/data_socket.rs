//! The socket of one connection as a queue sees it, whoever encrypts what goes through it.
//!
//! Owns: the socket, and the one thing that differs for the ring: on a kTLS socket, MSG_WAITALL and links of RECV and SEND
//! do not work (`ring.rs` then takes other operations). A relay's end is a Unix stream socket, like that of a server on this
//! machine.
//! Made by `dial.rs`; owned by `ring.rs`.

use std::io::{self, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use socket2::Socket;
use tls::kernel::{self, ControlRecord};
use tls::stream::Carrier;

use crate::contract::Encryption;

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct DataSocket {
    socket: Socket,
    encryption: Encryption,
}

impl From<Socket> for DataSocket {
    fn from(socket: Socket) -> Self {
        Self { socket, encryption: Encryption::None }
    }
}

impl From<Carrier> for DataSocket {
    fn from(carrier: Carrier) -> Self {
        match carrier {
            Carrier::Kernel(socket) => Self { socket: socket.into(), encryption: Encryption::Kernel },
            Carrier::Relay(near_end) => Self { socket: near_end.into(), encryption: Encryption::UserSpace },
        }
    }
}

impl DataSocket {
    /// One whose peer is gone already. Errors: those of socketpair(2).
    pub fn disconnected() -> io::Result<Self> {
        let (near_end, _) = UnixStream::pair()?;
        Ok(Self { socket: OwnedFd::from(near_end).into(), encryption: Encryption::None })
    }

    /// Who encrypts what goes through it.
    pub fn encryption(&self) -> Encryption {
        self.encryption
    }

    /// Whether the kernel does.
    pub fn is_ktls(&self) -> bool {
        self.encryption == Encryption::Kernel
    }

    /// Whether its data may leave by reference: not through what encrypts or passes it on first.
    pub fn takes_references(&self) -> bool {
        self.is_tcp() && self.encryption == Encryption::None
    }

    /// Whenever it is closed, by the end of the process too, what it has not sent yet is dropped.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn drop_unsent_when_closed(&self) -> io::Result<()> {
        self.socket.set_linger(Some(Duration::ZERO))
    }

    /// Ends both directions; what waits on the socket completes.
    ///
    /// # Errors
    /// `ENOTCONN`: the peer was first.
    pub fn shut_down(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Both)
    }

    /// Closes it and drops what it has not sent yet.
    pub fn abort(self) {
        // Fails only on what is no TCP socket, where there is nothing to drop.
        let _ = self.drop_unsent_when_closed();
    }

    /// What is sent without the ring from now on does not wait.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)
    }

    /// Sends all of these bytes; waits for room.
    ///
    /// # Errors
    /// Those of send(2); `EAGAIN` when the socket is full.
    pub fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.socket).write_all(bytes)
    }

    /// Lets the peer take as long as it likes to read, as long as it acknowledges that: TCP_USER_TIMEOUT ends a connection whose
    /// peer has had no room for so long, though it acknowledges every probe of its window. Whoever uses the socket looks
    /// at [`DataSocket::unacknowledged_for`] instead. A relay's TCP socket stays as it is.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn bear_with_a_full_peer(&self) -> io::Result<()> {
        if self.is_tcp() { self.socket.set_tcp_user_timeout(None) } else { Ok(()) }
    }

    /// How long data has been out of which the peer's TCP acknowledges nothing; `None` where there is none, or no TCP.
    pub fn unacknowledged_for(&self) -> Option<Duration> {
        kernel::unacknowledged_for(&self.socket).ok().flatten()
    }

    fn is_tcp(&self) -> bool {
        self.socket.local_addr().is_ok_and(|address| address.as_socket().is_some())
    }

    /// How much the kernel has encrypted or decrypted under the connection's keys, in bytes; 0 where it does neither.
    pub fn key_bytes(&self) -> u64 {
        // It fails on what is no TCP connection, which kTLS always is.
        if self.is_ktls() { kernel::bytes_carried(&self.socket).unwrap_or(0) } else { 0 }
    }

    /// After a receive ended with EIO: the TLS record that is not data, if that was the cause.
    pub fn take_control_record(&self) -> Option<ControlRecord> {
        self.is_ktls().then(|| kernel::take_control_record(&self.socket)).flatten()
    }
}

impl From<DataSocket> for OwnedFd {
    fn from(socket: DataSocket) -> Self {
        socket.socket.into()
    }
}

impl AsFd for DataSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for DataSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
