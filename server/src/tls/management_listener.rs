//! The management API's port: TLS in front of gRPC, and what the caller's certificate allows.
//!
//! Owns: accepting, the TLS handshake (bounded in time and number), and the rights that go along with every call of a
//! connection ([`tonic::Request::extensions`] has them as [`ApiPeer`]). Never: looks at a call.
//! Where TLS is required, nothing else is answered; where it is allowed, the first byte of a connection tells which it
//! is: a TLS record begins with 22, HTTP/2 with `P`. Without TLS everybody who gets here may do everything, as before.
//! Called by: `serve.rs`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use proto::nbd::handshake::server::TlsState;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, info, warn};

use super::ServerTls;
use super::rights::Rights;

/// A caller that takes longer is not one.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes at once; further connections wait in the listener's queue.
const HANDSHAKES_MAX: usize = 128;
/// Connections that are ready for gRPC and not taken yet.
const READY_MAX: usize = 16;
/// When no connection can be accepted, the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// The type of a handshake record, the first byte of every TLS connection.
const TLS_HANDSHAKE_RECORD: u8 = 22;

/// Who calls, as far as TLS tells; in the extensions of every call.
#[derive(Debug, Clone)]
pub struct ApiPeer(pub Arc<Rights>);

/// A connection of the API.
#[derive(Debug)]
pub enum ApiStream {
    /// Without TLS.
    Plain(TcpStream),
    /// With TLS, and what its caller may do.
    Tls(Box<TlsStream<TcpStream>>, ApiPeer),
}

/// Accepts connections for as long as the stream is taken from.
pub fn connections(listener: TcpListener, tls: Arc<ServerTls>) -> ReceiverStream<io::Result<ApiStream>> {
    let (ready, taken) = mpsc::channel(READY_MAX);
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (socket, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "cannot accept connections of the management API");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Never closed, so there is always a permit to come.
            let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else { return };
            let (tls, ready) = (Arc::clone(&tls), ready.clone());
            tokio::spawn(async move {
                let begun = tokio::time::timeout(HANDSHAKE_LIMIT, begin(socket, &tls)).await;
                drop(permit);
                match begun.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    // The server is stopping where nobody takes it.
                    Ok(stream) => drop(ready.send(Ok(stream)).await),
                    Err(error) => info!(%peer, %error, "a connection of the management API is refused"),
                }
            });
        }
    });
    ReceiverStream::new(taken)
}

async fn begin(socket: TcpStream, tls: &ServerTls) -> io::Result<ApiStream> {
    socket.set_nodelay(true)?;
    let Some(config) = tls.config() else { return Ok(ApiStream::Plain(socket)) };
    if tls.state() != TlsState::Required {
        let mut first = [0];
        if socket.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE_RECORD {
            return Ok(ApiStream::Plain(socket));
        }
    }
    let mut config = (*config).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TlsAcceptor::from(Arc::new(config)).accept(socket).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let rights = tls.rights_of(certificate);
    debug!(?rights, "a caller of the management API");
    Ok(ApiStream::Tls(Box::new(stream), ApiPeer(Arc::new(rights))))
}

impl Connected for ApiStream {
    type ConnectInfo = ApiPeer;

    fn connect_info(&self) -> ApiPeer {
        match self {
            Self::Plain(_) => ApiPeer(Arc::new(Rights::everything())),
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
