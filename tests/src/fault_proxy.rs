//! A TCP proxy that breaks: between a client of ours and an honest server, in the ways in which networks and machines do.
//!
//! Connections are passed on faithfully until [`FaultProxy::cut`] ends all that are open in one of the ways of [`Cut`], or
//! until one has passed on as many bytes of replies as [`FaultProxy::cut_replies_after`] allows it; and late, where
//! [`FaultProxy::delay`] says so. New connections are passed on again, to wherever the server is then. Knows nothing of NBD.
//! One thread for each connection; they end with it.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How often a thread looks whether its connection is to be cut.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// What is passed on at once.
const BUFFER_BYTES: usize = 64 << 10;

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// With RST on both sides: the other machine lost its memory of it.
    Reset,
    /// With FIN on both sides: the other process ended.
    Close,
    /// With FIN to the client only, while its requests still arrive: the server's replies have ended.
    HalfClose,
    /// Not at all: nothing is passed on any more, and nobody is told.
    BlackHole,
}

impl Cut {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Reset, Self::Close, Self::HalfClose, Self::BlackHole];
}

#[derive(Debug, Default)]
struct Shared {
    target: Option<SocketAddr>,
    /// Raised with each cut; a connection that was made before ends.
    generation: u64,
    cut: Option<Cut>,
    reply_bytes_max: Option<u64>,
    /// The same for the next connection only.
    next_reply_bytes_max: Option<u64>,
    /// Passed on to the client by whichever connection moved something last.
    reply_bytes: u64,
    /// How long a piece is held back before it is passed on.
    delay: Duration,
    connections: u64,
}

/// A proxy on a free port of loopback; it lives as long as the process.
#[derive(Debug, Clone)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

impl FaultProxy {
    /// Starts it; connections are refused until there is a target.
    ///
    /// # Errors
    /// No port can be listened on.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let proxy = Self { address: listener.local_addr()?, shared: Arc::default() };
        let shared = Arc::clone(&proxy.shared);
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let (target, generation, reply_bytes_max) = {
                    let mut shared = lock(&shared);
                    shared.connections += 1;
                    let reply_bytes_max = shared.next_reply_bytes_max.take().or(shared.reply_bytes_max);
                    (shared.target, shared.generation, reply_bytes_max)
                };
                // Dropped otherwise: refused, as far as a client can tell.
                if let Some(far) = target.and_then(|target| TcpStream::connect(target).ok()) {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || Relay { near, far, reply_bytes_max }.run(generation, &shared));
                }
            }
        });
        Ok(proxy)
    }

    /// Where to connect instead of to the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where new connections are passed on to.
    pub fn set_target(&self, target: SocketAddr) {
        lock(&self.shared).target = Some(target);
    }

    /// Ends all connections that are open.
    pub fn cut(&self, cut: Cut) {
        let mut shared = lock(&self.shared);
        shared.generation += 1;
        shared.cut = Some(cut);
    }

    /// Lets each connection that is made from now on end with RST after so many bytes from the server, wherever in a reply
    /// that is; `None`: no more.
    pub fn cut_replies_after(&self, reply_bytes_max: Option<u64>) {
        lock(&self.shared).reply_bytes_max = reply_bytes_max;
    }

    /// The same for one connection only, the next.
    pub fn cut_next_replies_after(&self, reply_bytes_max: u64) {
        lock(&self.shared).next_reply_bytes_max = Some(reply_bytes_max);
    }

    /// Bytes that the server has sent on the connection that moved something last.
    pub fn reply_bytes(&self) -> u64 {
        lock(&self.shared).reply_bytes
    }

    /// Holds every piece back for so long, in both directions.
    pub fn delay(&self, delay: Duration) {
        lock(&self.shared).delay = delay;
    }

    /// How many connections were made.
    pub fn connections(&self) -> u64 {
        lock(&self.shared).connections
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Nothing can panic while it is held.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection.
struct Relay {
    near: TcpStream,
    far: TcpStream,
    reply_bytes_max: Option<u64>,
}

/// Bytes on their way in one direction.
#[derive(Default)]
struct Direction {
    held: Vec<u8>,
    has_ended: bool,
    was_told: bool,
    passed_on: u64,
}

impl Relay {
    fn run(self, generation: u64, shared: &Mutex<Shared>) {
        match self.pass_on(generation, shared) {
            Ok(None | Some(Cut::Close)) => {}
            Ok(Some(Cut::Reset)) | Err(_) => self.reset(),
            Ok(Some(Cut::HalfClose)) => {
                let _ = self.near.shutdown(Shutdown::Write);
                self.wait_for_the_client();
            }
            Ok(Some(Cut::BlackHole)) => self.wait_for_the_client(),
        }
    }

    /// How the connection is to end; `None`: both sides have ended it.
    fn pass_on(&self, generation: u64, shared: &Mutex<Shared>) -> io::Result<Option<Cut>> {
        for socket in [&self.near, &self.far] {
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
        }
        let (mut requests, mut replies) = (Direction::default(), Direction::default());
        loop {
            let (now, cut, delay) = {
                let shared = lock(shared);
                (shared.generation, shared.cut, shared.delay)
            };
            if now != generation {
                return Ok(cut);
            }
            if self.reply_bytes_max.is_some_and(|max| replies.passed_on >= max) {
                return Ok(Some(Cut::Reset));
            }
            let budget = self.reply_bytes_max.map(|max| max - replies.passed_on);
            let moved =
                requests.step(&self.near, &self.far, None)? | replies.step(&self.far, &self.near, budget)?;
            if requests.was_told && replies.was_told {
                return Ok(None);
            }
            if moved {
                lock(shared).reply_bytes = replies.passed_on;
                thread::sleep(delay);
            } else {
                self.wait(&requests, &replies)?;
            }
        }
    }

    fn wait(&self, requests: &Direction, replies: &Direction) -> io::Result<()> {
        let interest = |incoming: &Direction, outgoing: &Direction| {
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, incoming.held.is_empty() && !incoming.has_ended);
            interest.set(PollFlags::OUT, !outgoing.held.is_empty());
            interest
        };
        let mut sockets = [
            PollFd::new(&self.near, interest(requests, replies)),
            PollFd::new(&self.far, interest(replies, requests)),
        ];
        let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK_INTERVAL.subsec_nanos().into() };
        poll(&mut sockets, Some(&timeout))?;
        Ok(())
    }

    fn reset(&self) {
        for socket in [&self.near, &self.far] {
            let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }

    /// Holds both sides open, and takes nothing, until the client hangs up.
    fn wait_for_the_client(&self) {
        loop {
            let mut sockets = [PollFd::new(&self.near, PollFlags::RDHUP)];
            match poll(&mut sockets, None) {
                Err(rustix::io::Errno::INTR) => {}
                _ => return,
            }
        }
    }
}

impl Direction {
    /// Moves what can be moved, of at most `budget` bytes; whether that was anything.
    fn step(&mut self, mut from: &TcpStream, mut to: &TcpStream, budget: Option<u64>) -> io::Result<bool> {
        if self.held.is_empty() && !self.has_ended {
            let mut buffer = [0; BUFFER_BYTES];
            match from.read(&mut buffer) {
                Ok(0) => self.has_ended = true,
                Ok(count) => self.held.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if self.held.is_empty() {
            if self.has_ended && !self.was_told {
                self.was_told = true;
                let _ = to.shutdown(Shutdown::Write);
                return Ok(true);
            }
            return Ok(false);
        }
        let allowed = budget.map_or(self.held.len(), |budget| self.held.len().min(budget as usize));
        match to.write(&self.held[..allowed]) {
            Ok(count) => {
                self.held.drain(..count);
                self.passed_on += count as u64;
                Ok(count > 0)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers every byte with itself.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for peer in listener.incoming().flatten() {
                thread::spawn(move || {
                    let (mut from, mut to) = (&peer, &peer);
                    let _ = io::copy(&mut from, &mut to);
                });
            }
        });
        address
    }

    fn connect(proxy: &FaultProxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn exchange(stream: &mut TcpStream) -> io::Result<usize> {
        stream.write_all(b"hello")?;
        stream.read(&mut [0; 5])
    }

    #[test]
    fn each_cut_looks_to_the_client_as_it_should() {
        let proxy = FaultProxy::start().unwrap();
        proxy.set_target(echo());
        for cut in Cut::ALL {
            let mut stream = connect(&proxy);
            assert_eq!(exchange(&mut stream).unwrap(), 5, "{cut:?}");
            proxy.cut(cut);
            if cut == Cut::BlackHole {
                // That nothing comes is what is to be seen.
                stream.set_read_timeout(Some(LOOK_INTERVAL * 50)).unwrap();
            }
            let seen = stream.read(&mut [0; 5]).map_err(|error| error.kind());
            match cut {
                Cut::Reset => assert_eq!(seen, Err(io::ErrorKind::ConnectionReset)),
                Cut::Close | Cut::HalfClose => assert_eq!(seen, Ok(0), "{cut:?}"),
                Cut::BlackHole => assert_eq!(seen, Err(io::ErrorKind::WouldBlock)),
            }
        }
        assert_eq!(exchange(&mut connect(&proxy)).unwrap(), 5, "the next connection works");
    }

    #[test]
    fn replies_end_at_the_byte_that_was_asked_for() {
        let proxy = FaultProxy::start().unwrap();
        proxy.set_target(echo());
        proxy.cut_replies_after(Some(3));
        let mut stream = connect(&proxy);
        stream.write_all(b"hello").unwrap();
        let mut seen = Vec::new();
        assert!(stream.read_to_end(&mut seen).is_err());
        assert_eq!(seen, b"hel");
    }
}
