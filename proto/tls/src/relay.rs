//! TLS in user space, for connections whose records the kernel does not do: a socket pair whose far end a thread copies
//! through rustls to the TCP socket, so that the near end is a plain stream socket for its user.
//!
//! ```text
//!   ring ◄──plain──► near end ◄─ Unix socket pair ─► relay thread (rustls) ◄──records──► TCP
//! ```
//! Owns: the far end, the TCP socket and the rustls connection, until both directions have ended. One thread for each
//! connection, because it is a fallback: a system call and a copy each way more than kTLS, and a thread's stack.
//! Invariants: what waits to be sent is bounded in both directions (a direction whose target is full is not read from);
//! the end of one direction is passed on after the bytes before it. A near end that closes ends the relay within
//! `GOODBYE_LIMIT`, whatever the peer does.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::Connection;

/// Bytes that are copied at a time: four records.
const CHUNK_BYTES: usize = 64 << 10;
/// How long the peer may take to receive what was sent before the near end closed.
const GOODBYE_LIMIT: Duration = Duration::from_secs(10);
/// rustls needs little; what is not touched costs nothing.
const STACK_BYTES: usize = 256 << 10;

/// What the kernel may keep of plaintext in each direction, in bytes as it counts them, with one packet too many.
const PAIR_BUFFER_BYTES: u64 = 64 << 10;
const PAIR_BYTES: u64 = 2 * (PAIR_BUFFER_BYTES + (36 << 10));

/// Memory that a relay may come to hold, in bytes: a chunk of plaintext and a quarter more to send, what rustls buffers in each
/// direction (64 KiB), the part of its stack that is touched, and the kernel's between its two ends.
pub const CONNECTION_BYTES: u64 = (CHUNK_BYTES as u64 * 5 / 4) + 2 * (64 << 10) + (64 << 10) + PAIR_BYTES;

/// Starts a relay; gives the near end, which is blocking.
///
/// # Errors
/// No sockets or no thread: `EMFILE`, `EAGAIN`.
pub fn start(tcp: TcpStream, connection: Connection) -> io::Result<OwnedFd> {
    let (near, far) = UnixStream::pair()?;
    for end in [&near, &far] {
        // The kernel doubles it.
        rustix::net::sockopt::set_socket_send_buffer_size(end, PAIR_BUFFER_BYTES as usize / 2)?;
    }
    far.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    let relay = Relay {
        tcp,
        plain: far,
        connection,
        chunk: vec![0; CHUNK_BYTES].into_boxed_slice(),
        received: 0..0,
        has_peer_ended: false,
        has_told_end: false,
        goodbye: None,
    };
    let thread = std::thread::Builder::new().name("tls-relay".into()).stack_size(STACK_BYTES);
    thread.spawn(move || {
        if let Err(error) = relay.run() {
            tracing::debug!(%error, "a TLS relay ends");
        }
    })?;
    Ok(near.into())
}

struct Relay {
    tcp: TcpStream,
    plain: UnixStream,
    connection: Connection,
    /// Plaintext from the peer on its way to the near end.
    chunk: Box<[u8]>,
    received: std::ops::Range<usize>,
    /// The peer sends no more.
    has_peer_ended: bool,
    /// The near end was told so.
    has_told_end: bool,
    /// The near end sends no more; until then the rest has to have left.
    goodbye: Option<Instant>,
}

impl Relay {
    fn run(mut self) -> io::Result<()> {
        // What was received behind the handshake is already here.
        self.take_plaintext()?;
        loop {
            self.give_plaintext()?;
            let is_all_sent = !self.connection.wants_write();
            if self.goodbye.is_some_and(|deadline| is_all_sent || Instant::now() >= deadline) {
                return Ok(());
            }
            let (tcp, plain) = self.wait()?;
            if tcp.intersects(PollFlags::OUT | PollFlags::HUP | PollFlags::ERR) {
                self.send_records()?;
            }
            if tcp.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && self.wants_records() {
                self.receive_records()?;
            }
            if plain.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && self.wants_plain() {
                self.take_from_near_end()?;
            }
        }
    }

    fn wants_records(&self) -> bool {
        !self.has_peer_ended && self.received.is_empty() && self.connection.wants_read()
    }

    fn wants_plain(&self) -> bool {
        self.goodbye.is_none() && !self.connection.wants_write()
    }

    /// Waits until something can go on, or the time for goodbye is up.
    fn wait(&self) -> io::Result<(PollFlags, PollFlags)> {
        let flag = |is_wanted, flag| if is_wanted { flag } else { PollFlags::empty() };
        let tcp =
            flag(self.wants_records(), PollFlags::IN) | flag(self.connection.wants_write(), PollFlags::OUT);
        let plain = flag(self.wants_plain(), PollFlags::IN) | flag(!self.received.is_empty(), PollFlags::OUT);
        let timeout = self.goodbye.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        // A socket of which nothing is wanted would wake us for its end over and over.
        let mut waits = Vec::with_capacity(2);
        if !tcp.is_empty() {
            waits.push(PollFd::new(&self.tcp, tcp));
        }
        if !plain.is_empty() {
            waits.push(PollFd::new(&self.plain, plain));
        }
        match poll(&mut waits, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok((PollFlags::empty(), PollFlags::empty())),
            other => other?,
        };
        let mut woken = waits.iter().map(PollFd::revents);
        let tcp = if tcp.is_empty() { tcp } else { woken.next().unwrap_or(PollFlags::empty()) };
        let plain = if plain.is_empty() { plain } else { woken.next().unwrap_or(PollFlags::empty()) };
        Ok((tcp, plain))
    }

    fn receive_records(&mut self) -> io::Result<()> {
        match self.connection.read_tls(&mut self.tcp) {
            Ok(0) => self.has_peer_ended = true,
            Ok(_) => {
                if let Err(error) = self.connection.process_new_packets() {
                    // Sends the alert, if there is room for it.
                    let _ = self.send_records();
                    return Err(io::Error::other(error));
                }
                self.take_plaintext()?;
            }
            Err(error) => return unless_later(error),
        }
        Ok(())
    }

    fn take_plaintext(&mut self) -> io::Result<()> {
        match self.connection.reader().read(&mut self.chunk) {
            Ok(0) => self.has_peer_ended = true,
            Ok(bytes) => self.received = 0..bytes,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.has_peer_ended = true,
            Err(error) => return unless_later(error),
        }
        Ok(())
    }

    /// Brings what the peer sent to the near end, as far as there is room; and the peer's end behind it.
    fn give_plaintext(&mut self) -> io::Result<()> {
        while !self.received.is_empty() {
            match self.plain.write(&self.chunk[self.received.clone()]) {
                Ok(bytes) => self.received.start += bytes,
                Err(error) if is_for_later(&error) => return Ok(()),
                // The near end is gone: what it sent before still has to leave.
                Err(_) => {
                    self.received = 0..0;
                    self.has_peer_ended = true;
                    break;
                }
            }
            if self.received.is_empty() {
                self.take_plaintext()?;
            }
        }
        if self.has_peer_ended && !self.has_told_end {
            self.has_told_end = true;
            // The near end may be gone itself.
            let _ = self.plain.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    fn take_from_near_end(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK_BYTES / 4];
        match self.plain.read(&mut chunk) {
            Ok(bytes) if bytes > 0 => self.connection.writer().write_all(&chunk[..bytes])?,
            Err(error) if is_for_later(&error) => return Ok(()),
            // Closed; an error only says that it had not read everything.
            Ok(_) | Err(_) => {
                self.connection.send_close_notify();
                self.goodbye = Some(Instant::now() + GOODBYE_LIMIT);
            }
        }
        self.send_records()
    }

    fn send_records(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            if let Err(error) = self.connection.write_tls(&mut self.tcp) {
                return unless_later(error);
            }
        }
        Ok(())
    }
}

fn unless_later(error: io::Error) -> io::Result<()> {
    if is_for_later(&error) { Ok(()) } else { Err(error) }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
