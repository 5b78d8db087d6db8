//! Where callers of the management API connect: who they are, how many there may be, and how long they may be silent.
//!
//! Owns: accepting on TCP addresses and Unix sockets, the TLS handshake, the bounds of connections, and the rights that go along
//! with every call of a connection ([`tonic::Request::extensions`] has them as [`ApiPeer`]). Never: looks at a call.
//! A Unix socket's caller is who the kernel says: root, the server's own user, and members of the socket's group may do everything;
//! nobody else gets in. On TCP, where TLS is required nothing else is answered; where it is allowed, the first byte of a
//! connection tells which it is: a TLS record begins with 22, HTTP/2 with `P`.
//! Nobody is refused for numbers: where there are too many connections, or too many of one caller, one that has been there for some
//! seconds makes room: one that has not begun, or has said next to nothing, before others; of those the one that has been silent the
//! longest. So callers that say nothing, however many, keep nobody out.
//! Called by: `serve.rs`.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use proto::nbd::handshake::server::TlsState;
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use socket2::Socket;
use tls::certificates::{fingerprint, uri_names};
use tls::explain;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, info, warn};

use crate::advertised::ReachedAt;
use crate::data::address::{self, Listener, Peer};
use crate::data::admission::accountable;
use crate::tls::ServerTls;
use crate::tls::rights::Rights;

/// Connections at once of one address (with IPv6: one /64), or of one local user; but never more than a quarter of all.
const CONNECTIONS_OF_PEER_MAX: usize = 128;
/// The TLS handshake and the beginning of HTTP/2: a caller that takes longer is not one.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);
/// So long a client whose handshake failed may take to hear of it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// A client's side of a connection begins with so many bytes that are always the same (RFC 9113, 3.4).
const PREFACE_BYTES: u64 = 24;
/// Milliseconds that a newcomer is spared for.
const NEW_MS: u64 = 2000;
/// Who has said so much has made calls.
const KNOWN_BYTES: u64 = 1024;
/// Of a caller that has begun: longer than from one ping of ours to its answer.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Connections that are ready for gRPC and not taken yet.
const READY_MAX: usize = 16;
/// When no connection can be accepted, the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// The type of a handshake record, the first byte of every TLS connection.
const TLS_HANDSHAKE_RECORD: u8 = 22;

/// Who calls, and how; in the extensions of every call.
#[derive(Debug, Clone)]
pub struct ApiPeer {
    /// What the caller may do.
    pub rights: Arc<Rights>,
    /// Where the connection was accepted.
    pub reached_at: ReachedAt,
    /// Who it is, for the audit log.
    pub identity: Arc<Identity>,
}

/// Who calls, as the audit log has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The user and process of a caller of this machine, or the fingerprint and names of its certificate; null where neither is known.
    pub caller: Value,
    /// Its address, or `unix`.
    pub from: String,
}

impl Identity {
    fn of(peer: &Peer, certificate: Option<&CertificateDer<'_>>) -> Self {
        let from = match peer {
            Peer::Tcp(address) => address.to_string(),
            Peer::Unix { .. } => "unix".to_owned(),
        };
        let caller = match (certificate, peer) {
            (Some(certificate), _) => json!({
                "certificate_sha256": fingerprint(certificate),
                "certificate_names": uri_names(certificate),
            }),
            (None, Peer::Unix { process_id, user_id }) => json!({ "uid": user_id, "pid": process_id }),
            (None, Peer::Tcp(_)) => Value::Null,
        };
        Self { caller, from }
    }
}

/// Accepts connections for as long as the stream is taken from, at most `connections_max` at once.
///
/// # Errors
/// The listeners cannot be waited for.
pub fn connections(
    listeners: Vec<Listener>,
    tls: Arc<ServerTls>,
    connections_max: u32,
) -> io::Result<ReceiverStream<io::Result<ApiStream>>> {
    let (ready, taken) = mpsc::channel(READY_MAX);
    let crowd = Arc::new(Crowd::of_at_most(connections_max));
    for listener in listeners {
        let group_id = listener.group_id();
        #[allow(unsafe_code)] // Waiting for a descriptor that tokio has not made.
        // SAFETY: a listener's descriptor is its socket's, which it owns and keeps until it is dropped.
        let listener = unsafe { AsyncFd::register(listener) }?;
        let (tls, ready, crowd) = (Arc::clone(&tls), ready.clone(), Arc::clone(&crowd));
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = accept(&listener) => accepted,
                    () = ready.closed() => return,
                };
                match accepted {
                    Ok((socket, peer)) => begin(socket, peer, group_id, &tls, &ready, &crowd),
                    Err(error) => {
                        warn!(%error, "cannot accept connections of the management API");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
    }
    Ok(ReceiverStream::new(taken))
}

async fn accept(listener: &AsyncFd<Listener>) -> io::Result<(Socket, Peer)> {
    loop {
        let mut readable = listener.readable().await?;
        match readable.try_io(|listener| listener.get_ref().accept()) {
            // The peer has gone again.
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Ok(accepted) => return accepted,
            Err(_would_block) => {}
        }
    }
}

/// Has the connection begin on a task of its own.
fn begin(
    socket: Socket,
    peer: Peer,
    group_id: Option<u32>,
    tls: &Arc<ServerTls>,
    ready: &mpsc::Sender<io::Result<ApiStream>>,
    crowd: &Arc<Crowd>,
) {
    let Peer::Unix { user_id, .. } = peer else {
        let (tls, ready, guarded) = (Arc::clone(tls), ready.clone(), crowd.enter(socket, peer));
        tokio::spawn(async move {
            let begun = match guarded {
                Ok(socket) => tokio::time::timeout(BEGIN_LIMIT, begin_tcp(socket, &tls)).await,
                Err(error) => Ok(Err(error)),
            };
            match begun.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                // The server is stopping where nobody takes it.
                Ok(stream) => drop(ready.send(Ok(stream)).await),
                Err(error) => match error.get_ref().and_then(|inner| inner.downcast_ref()) {
                    Some(of_tls) => {
                        let why = explain::handshake_failure(of_tls);
                        info!(%peer, why, "a TLS handshake of the management API fails");
                    }
                    None => debug!(%peer, %error, "a connection of the management API has not begun"),
                },
            }
        });
        return;
    };
    if !may_manage(&socket, user_id, group_id) {
        info!(%peer, "a connection of the management API is refused: not root, and not of the socket's group");
        return;
    }
    let ready = ready.clone();
    match crowd.enter(socket, peer) {
        Ok(socket) => {
            tokio::spawn(async move { drop(ready.send(Ok(ApiStream::Plain(Box::new(socket)))).await) });
        }
        Err(error) => warn!(%error, "a connection of the management API cannot be taken"),
    }
}

/// Whether the process at the other end of a Unix socket may do everything.
fn may_manage(socket: &Socket, user_id: u32, group_id: Option<u32>) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let is_member = |group_id| {
        let primary = address::peer_credentials(socket).map(|told| told.gid);
        primary.is_ok_and(|primary| primary == group_id)
            || peer_groups::of(socket).is_ok_and(|groups| groups.contains(&group_id))
    };
    user_id == 0 || user_id == own || group_id.is_some_and(is_member)
}

async fn begin_tcp(mut socket: Guarded, tls: &ServerTls) -> io::Result<ApiStream> {
    let Some(config) = tls.config() else { return Ok(ApiStream::Plain(Box::new(socket))) };
    if tls.state() != TlsState::Required
        && let Transport::Tcp(tcp) = &socket.transport
    {
        let mut first = [0];
        let peeked = tokio::select! {
            peeked = tcp.peek(&mut first) => peeked?,
            _ = &mut socket.told_to_leave => return Err(io::ErrorKind::ConnectionAborted.into()),
        };
        if peeked == 1 && first[0] != TLS_HANDSHAKE_RECORD {
            return Ok(ApiStream::Plain(Box::new(socket)));
        }
    }
    let mut config = (*config).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (reached_at, peer) = (socket.reached_at(), socket.peer);
    let stream = match TlsAcceptor::from(Arc::new(config)).accept(socket).into_fallible().await {
        Ok(stream) => stream,
        Err((error, socket)) => {
            say_farewell(socket).await;
            return Err(error);
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let rights = Arc::new(tls.rights_of(certificate));
    debug!(?rights, "a caller of the management API");
    let identity = Arc::new(Identity::of(&peer, certificate));
    Ok(ApiStream::Tls(Box::new(stream), ApiPeer { rights, reached_at, identity }))
}

/// Has the alert arrive that says why: what the client sends meanwhile, unread, would reset the connection and take it along.
async fn say_farewell(mut socket: Guarded) {
    if socket.shutdown().await.is_ok() {
        let mut nowhere = tokio::io::sink();
        let drained = tokio::io::copy(&mut socket, &mut nowhere);
        let _ = tokio::time::timeout(FAREWELL_LIMIT, drained).await;
    }
}

// ------------------------------------------------------------------------------------------------ how many

/// Whom a connection is counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    Address(IpAddr),
    User(u32),
}

#[derive(Debug)]
struct Present {
    caller: Caller,
    heard: Arc<Heard>,
    leave: oneshot::Sender<()>,
}

/// What was read of a connection, and when last.
#[derive(Debug)]
struct Heard {
    epoch: Instant,
    entered_ms: u64,
    last_ms: AtomicU64,
    bytes: AtomicU64,
}

impl Heard {
    fn now(&self) {
        self.last_ms.store(self.epoch.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Who has just come has time for a call, if anybody else can go.
    fn is_new(&self) -> bool {
        self.epoch.elapsed().as_millis() as u64 - self.entered_ms < NEW_MS
    }

    /// Whether it has made calls: however many come at once, it goes after all who have not.
    fn is_known(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) >= KNOWN_BYTES
    }

    /// Whether it has begun a conversation. Who has not goes first, then who has said next to nothing: a newcomer takes no old caller's
    /// place while there are such.
    fn has_begun(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) >= PREFACE_BYTES
    }
}

/// The connections that there are.
#[derive(Debug)]
struct Crowd {
    epoch: Instant,
    next: AtomicU64,
    connections_max: usize,
    of_peer_max: usize,
    present: Mutex<HashMap<u64, Present>>,
}

impl Crowd {
    fn of_at_most(connections_max: u32) -> Self {
        let (epoch, next) = (Instant::now(), AtomicU64::new(0));
        let connections_max = connections_max as usize;
        Self {
            epoch,
            next,
            connections_max,
            of_peer_max: of_peer_max(connections_max),
            present: Mutex::default(),
        }
    }

    /// Takes a connection in; another one leaves for it where there are too many.
    fn enter(self: &Arc<Self>, socket: Socket, peer: Peer) -> io::Result<Guarded> {
        socket.set_nonblocking(true)?;
        let (transport, caller) = match peer {
            Peer::Tcp(address) => {
                let transport = Transport::Tcp(TcpStream::from_std(socket.into())?);
                (transport, Caller::Address(accountable(address.ip())))
            }
            Peer::Unix { user_id, .. } => {
                (Transport::Unix(UnixStream::from_std(socket.into())?), Caller::User(user_id))
            }
        };
        let (leave, told_to_leave) = oneshot::channel();
        let (entered_ms, last_ms) = (self.epoch.elapsed().as_millis() as u64, AtomicU64::new(0));
        let heard = Arc::new(Heard { epoch: self.epoch, entered_ms, last_ms, bytes: AtomicU64::new(0) });
        heard.now();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if present.values().filter(|other| other.caller == caller).count() >= self.of_peer_max {
            evict_most_silent(&mut present, |other| other.caller == caller);
        } else if present.len() >= self.connections_max {
            evict_most_silent(&mut present, |_| true);
        }
        present.insert(number, Present { caller, heard: Arc::clone(&heard), leave });
        drop(present);
        let place = Place { crowd: Arc::clone(self), number };
        let silence = Box::pin(tokio::time::sleep(BEGIN_LIMIT));
        Ok(Guarded { transport, peer, heard, silence, told_to_leave, _place: place })
    }
}

/// One caller never has all places, however few there are.
fn of_peer_max(connections_max: usize) -> usize {
    CONNECTIONS_OF_PEER_MAX.min(connections_max / 4).max(1)
}

fn evict_most_silent(present: &mut HashMap<u64, Present>, is_candidate: impl Fn(&Present) -> bool) {
    let candidates = present.iter().filter(|(_, other)| is_candidate(other));
    let silent = candidates.min_by_key(|(number, other)| {
        let heard = &other.heard;
        (heard.is_known(), heard.is_new(), heard.has_begun(), heard.last_ms.load(Ordering::Relaxed), **number)
    });
    if let Some(number) = silent.map(|(number, _)| *number)
        && let Some(left) = present.remove(&number)
    {
        debug!(caller = ?left.caller, "a silent connection of the management API makes room for another");
        let _ = left.leave.send(());
    }
}

/// A connection's place in the crowd, given back when dropped.
#[derive(Debug)]
struct Place {
    crowd: Arc<Crowd>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.crowd.present.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

// ------------------------------------------------------------------------------------------------ how long

#[derive(Debug)]
enum Transport {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection that ends when it is silent for too long, or has to make room.
#[derive(Debug)]
pub struct Guarded {
    transport: Transport,
    peer: Peer,
    heard: Arc<Heard>,
    /// Runs out when nothing was read for so long.
    silence: Pin<Box<Sleep>>,
    told_to_leave: oneshot::Receiver<()>,
    _place: Place,
}

impl Guarded {
    fn reached_at(&self) -> ReachedAt {
        match &self.transport {
            // Of a connection that has ended there is none, and nobody is told anything any more.
            Transport::Tcp(socket) => {
                socket.local_addr().map_or(ReachedAt::Address(Ipv4Addr::LOCALHOST.into()), |local| {
                    ReachedAt::Address(local.ip())
                })
            }
            Transport::Unix(_) => ReachedAt::Socket,
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        let read = match &mut this.transport {
            Transport::Tcp(socket) => Pin::new(socket).poll_read(cx, into),
            Transport::Unix(socket) => Pin::new(socket).poll_read(cx, into),
        };
        if Pin::new(&mut this.told_to_leave).poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if read.is_ready() {
            let read_bytes = (into.filled().len() - before) as u64;
            let all_bytes = this.heard.bytes.fetch_add(read_bytes, Ordering::Relaxed) + read_bytes;
            // Before that, one time limit is for all of it.
            if read_bytes > 0 && all_bytes >= PREFACE_BYTES {
                this.heard.now();
                this.silence.as_mut().reset(tokio::time::Instant::now() + SILENCE_LIMIT);
            }
            return read;
        }
        ready!(this.silence.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().transport {
            Transport::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Transport::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Tcp(socket) => Pin::new(socket).poll_flush(cx),
            Transport::Unix(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Transport::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}

/// A connection of the API.
#[derive(Debug)]
pub enum ApiStream {
    /// Without TLS: who gets here may do everything.
    Plain(Box<Guarded>),
    /// With TLS, and what its caller may do.
    Tls(Box<TlsStream<Guarded>>, ApiPeer),
}

impl Connected for ApiStream {
    type ConnectInfo = ApiPeer;

    fn connect_info(&self) -> ApiPeer {
        match self {
            Self::Plain(socket) => ApiPeer {
                rights: Arc::new(Rights::everything()),
                reached_at: socket.reached_at(),
                identity: Arc::new(Identity::of(&socket.peer, None)),
            },
            Self::Tls(_, peer) => peer.clone(),
        }
    }
}

impl AsyncRead for ApiStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, into),
            Self::Tls(stream, _) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for ApiStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(stream, _) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// The groups of the process at the other end of a Unix socket.
mod peer_groups {
    #![allow(unsafe_code)] // One socket option that no library has.

    use std::io;
    use std::os::fd::AsRawFd as _;

    use socket2::Socket;

    /// More than any process has (`NGROUPS_MAX`).
    const GROUPS_MAX: usize = 65536;

    /// As it was when it connected. Source: socket(7), `SO_PEERGROUPS`.
    pub(super) fn of(socket: &Socket) -> io::Result<Vec<u32>> {
        let mut groups = vec![0u32; GROUPS_MAX];
        let mut length_bytes = (GROUPS_MAX * size_of::<u32>()) as libc::socklen_t;
        let option = libc::SO_PEERGROUPS;
        // SAFETY: the kernel writes at most so many bytes there, and how many it wrote.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                groups.as_mut_ptr().cast(),
                &raw mut length_bytes,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        groups.truncate(length_bytes as usize / size_of::<u32>());
        Ok(groups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MANAGEMENT_CONNECTIONS_MAX;

    /// All of the others have come in this moment.
    #[test]
    fn who_has_made_calls_does_not_go_for_a_burst_of_newcomers() {
        let present = |number: u64, entered_ms: u64, bytes: u64| {
            let epoch = Instant::now() - Duration::from_secs(3600);
            let heard = Heard {
                epoch,
                entered_ms,
                last_ms: AtomicU64::new(entered_ms),
                bytes: AtomicU64::new(bytes),
            };
            let caller = Caller::User(number as u32);
            (number, Present { caller, heard: Arc::new(heard), leave: oneshot::channel().0 })
        };
        let now_ms = 3_600_000;
        let mut there = HashMap::from([
            present(0, 0, KNOWN_BYTES),
            present(1, now_ms, 0),
            present(2, now_ms, PREFACE_BYTES),
        ]);
        for gone in [1, 2, 0] {
            evict_most_silent(&mut there, |_| true);
            assert!(!there.contains_key(&gone), "{gone}");
        }
    }

    #[test]
    fn a_caller_of_this_machine_is_told_by_its_user() {
        let of = Identity::of(&Peer::Unix { process_id: 7, user_id: 1000 }, None);
        assert_eq!((of.caller, of.from.as_str()), (json!({ "uid": 1000, "pid": 7 }), "unix"));
        let of = Identity::of(&Peer::Tcp("[::1]:5".parse().unwrap()), None);
        assert_eq!((of.caller, of.from.as_str()), (Value::Null, "[::1]:5"));
    }

    #[test]
    fn one_caller_leaves_places_to_others_where_there_are_few() {
        assert_eq!(of_peer_max(MANAGEMENT_CONNECTIONS_MAX as usize), CONNECTIONS_OF_PEER_MAX);
        assert_eq!(of_peer_max(100), 25);
        assert_eq!((of_peer_max(16), of_peer_max(1)), (4, 1));
    }
}
