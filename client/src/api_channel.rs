//! Channels to a storage server's management API: a Unix socket of this machine, `http://`, or `https://` with the client's
//! certificate.
//!
//! Owns: which URI is taken, and TLS under HTTP/2. The files are read at each connect, so that renewed certificates are
//! taken without a restart. Never: makes a call. Called by the node daemon (`node/management_client.rs`) and volctl.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tls::certificates::CertificateError;
use tls::explain;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{self, Channel, Endpoint};
use tower::service_fn;

use crate::causes::with_sources;
use crate::data_address::{self, Place, host_and_zone};
use crate::tls_spec::ClientFiles;

/// TCP, TLS and HTTP/2 to the server.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Between two pings while a call waits. A server that is stopped keeps its connections, and only its silence tells.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// A server that answers no ping for so long is gone, and with it the calls that wait.
const PING_DEADLINE: Duration = Duration::from_secs(10);
const HTTP: &str = "http://";
const UNIX: &str = "unix:";

/// Where a server of this machine listens unless it was told otherwise.
pub const DEFAULT_URI: &str = "unix:/run/volserver/management.sock";
const HTTPS: &str = "https://";
/// Where a server's API listens on TCP unless it was told otherwise; nobody keeps one at the ports of the Web.
const DEFAULT_PORT: u16 = 10810;

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Not such a URI.
    #[error("{0:?} is not of the form unix:/path, http://host[:port] or https://host[:port]")]
    Uri(String),
    /// There is nobody to believe the server's certificate by.
    #[error("{0} needs the certificate of the server's authority: give --tls-ca")]
    NoAuthority(String),
    /// A certificate or key of ours cannot be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// The server cannot be reached, or is not believed.
    #[error(transparent)]
    Connect(#[from] transport::Error),
}

/// What the system or TLS saw, such as "Connection refused"; the layers around it only say that connecting failed. Of what is wrong
/// with certificates and keys, in words that say what to change.
pub fn innermost_cause(error: &(dyn Error + 'static)) -> String {
    let causes = || std::iter::successors(Some(error), |cause| <dyn Error>::source(*cause));
    let inner = |cause: &'_ (dyn Error + 'static)| {
        let inner = cause.downcast_ref::<io::Error>()?.get_ref()?;
        let of_tls = inner.downcast_ref().map(explain::handshake_failure);
        of_tls.or_else(|| inner.downcast_ref::<CertificateError>().map(|error| with_sources(error)))
    };
    causes().find_map(inner).or_else(|| causes().last().map(ToString::to_string)).unwrap_or_default()
}

/// Whether TLS is spoken to the API at this URI.
pub fn is_https(uri: &str) -> bool {
    uri.starts_with(HTTPS)
}

/// The host of the API's URI, without the brackets and the zone of an IPv6 address: the name that the server's certificate bears.
pub fn host(uri: &str) -> Option<String> {
    Authority::of(uri).map(|authority| authority.host)
}

/// The interface that the API's host is reached through, where it is a link-local address.
pub fn zone(uri: &str) -> Option<String> {
    Authority::of(uri)?.zone
}

/// The URI with the port that is meant, for messages.
pub fn with_port(uri: &str) -> String {
    match Authority::of(uri) {
        Some(authority) if is_https(uri) => format!("{HTTPS}{}", authority.display("%25")),
        Some(authority) if uri.starts_with(HTTP) => format!("{HTTP}{}", authority.display("%25")),
        _ => uri.to_owned(),
    }
}

/// Where a server is on the network.
#[derive(Debug, Clone)]
struct Authority {
    host: String,
    zone: Option<String>,
    port: u16,
}

impl Authority {
    fn of(uri: &str) -> Option<Self> {
        let uri: Uri = uri.parse().ok()?;
        let (host, zone) = host_and_zone(uri.host()?).ok()?;
        let port = data_address::port(uri.authority()?.as_str(), DEFAULT_PORT)?;
        Some(Self { host, zone, port })
    }

    fn display(&self, percent: &str) -> String {
        data_address::authority(&self.host, self.zone.as_deref(), percent, self.port)
    }

    /// As HTTP names it, where a zone means nothing (RFC 6874, section 4).
    fn endpoint(&self, scheme: &str) -> Result<Endpoint, transport::Error> {
        let authority = data_address::authority(&self.host, None, "", self.port);
        Endpoint::from_shared(format!("{scheme}{authority}"))
    }
}

/// Connects now, over TLS where the URI says https; waits for the TCP or Unix connection.
///
/// # Errors
/// [`ChannelError`], by cause.
pub async fn connect(uri: &str, files: Option<&ClientFiles>) -> Result<Channel, ChannelError> {
    match Way::of(uri, files)? {
        Way::Http(endpoint) => Ok(endpoint.connect().await?),
        Way::LinkLocal(endpoint, authority) => {
            let connector = service_fn(move |_| link_local_connect(authority.clone()));
            Ok(endpoint.connect_with_connector(connector).await?)
        }
        Way::Https(endpoint, authority, files) => {
            // For its own error: below a connector it would look as if the server were not there.
            files.load()?;
            let connector = service_fn(move |_| tls_connect(authority.clone(), files.clone()));
            Ok(endpoint.connect_with_connector(connector).await?)
        }
        Way::Unix(endpoint, path) => {
            Ok(endpoint.connect_with_connector(service_fn(move |_| unix_connect(path.clone()))).await?)
        }
    }
}

/// Connects at the first call, and again when the connection was lost; within a tokio runtime.
///
/// # Errors
/// [`ChannelError::Uri`], [`ChannelError::NoAuthority`]
pub fn connect_lazy(uri: &str, files: Option<&ClientFiles>) -> Result<Channel, ChannelError> {
    Ok(match Way::of(uri, files)? {
        Way::Http(endpoint) => endpoint.connect_lazy(),
        Way::LinkLocal(endpoint, authority) => {
            endpoint.connect_with_connector_lazy(service_fn(move |_| link_local_connect(authority.clone())))
        }
        Way::Https(endpoint, authority, files) => {
            let connector = service_fn(move |_| tls_connect(authority.clone(), files.clone()));
            endpoint.connect_with_connector_lazy(connector)
        }
        Way::Unix(endpoint, path) => {
            endpoint.connect_with_connector_lazy(service_fn(move |_| unix_connect(path.clone())))
        }
    })
}

/// How a URI is connected to.
enum Way {
    Http(Endpoint),
    /// `http://` with a zone, which HTTP libraries know nothing of.
    LinkLocal(Endpoint, Authority),
    Https(Endpoint, Authority, ClientFiles),
    Unix(Endpoint, PathBuf),
}

impl Way {
    fn of(uri: &str, files: Option<&ClientFiles>) -> Result<Self, ChannelError> {
        let off = || ChannelError::Uri(uri.to_owned());
        let with_limits = |endpoint: Endpoint| {
            let endpoint =
                endpoint.http2_keep_alive_interval(PING_INTERVAL).keep_alive_timeout(PING_DEADLINE);
            endpoint.connect_timeout(CONNECT_DEADLINE)
        };
        if let Some(path) = uri.strip_prefix(UNIX) {
            // As `unix:/path` and as `unix:///path`, gRPC's two spellings.
            let path = PathBuf::from(path.strip_prefix("//").unwrap_or(path));
            if !path.is_absolute() {
                return Err(off());
            }
            return Ok(Self::Unix(with_limits(Endpoint::from_static("http://localhost")), path));
        }
        if !uri.starts_with(HTTP) && !is_https(uri) {
            return Err(off());
        }
        let authority = Authority::of(uri).ok_or_else(off)?;
        if is_https(uri) {
            let files = files.ok_or_else(|| ChannelError::NoAuthority(uri.to_owned()))?;
            let endpoint = with_limits(authority.endpoint(HTTPS).map_err(|_| off())?);
            return Ok(Self::Https(endpoint, authority, files.clone()));
        }
        let endpoint = with_limits(authority.endpoint(HTTP).map_err(|_| off())?);
        match authority.zone {
            None => Ok(Self::Http(endpoint)),
            Some(_) => Ok(Self::LinkLocal(endpoint, authority)),
        }
    }
}

async fn unix_connect(path: PathBuf) -> io::Result<TokioIo<UnixStream>> {
    Ok(TokioIo::new(UnixStream::connect(path).await?))
}

async fn link_local_connect(authority: Authority) -> io::Result<TokioIo<TcpStream>> {
    Ok(TokioIo::new(tcp_connect(&authority).await?))
}

async fn tcp_connect(authority: &Authority) -> io::Result<TcpStream> {
    let address = authority.display("%");
    let resolved = tokio::task::spawn_blocking(move || data_address::resolve(&address)).await;
    let places = resolved.map_err(io::Error::other)?.map_err(io::Error::other)?;
    let tcp = |place| match place {
        Place::Tcp(address) => Some(address),
        Place::Unix(_) => None,
    };
    let addresses: Vec<SocketAddr> = places.into_iter().filter_map(tcp).collect();
    let socket = TcpStream::connect(addresses.as_slice()).await?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

async fn tls_connect(authority: Authority, files: ClientFiles) -> io::Result<TokioIo<Explained>> {
    let mut config = files.load().map_err(io::Error::other)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = tcp_connect(&authority).await?;
    let name = ServerName::try_from(authority.host).map_err(io::Error::other)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
    Ok(TokioIo::new(Explained(stream)))
}

/// A stream whose errors say what to change: the server refuses a certificate of ours only after the client's handshake, and HTTP/2
/// keeps nothing of an error but its words.
struct Explained(TlsStream<TcpStream>);

impl AsyncRead for Explained {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.0).poll_read(cx, into);
        read.map_err(|error| match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(of_tls) => io::Error::new(error.kind(), explain::handshake_failure(of_tls)),
            None => error,
        })
    }
}

impl AsyncWrite for Explained {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_uri_of_another_form_is_refused() {
        for bad in [
            "127.0.0.1:10810",
            "http://",
            "https://",
            "http://h:0",
            "http://h:x",
            "unix:x",
            "unix:",
            "ftp://h:1",
        ] {
            assert!(matches!(connect_lazy(bad, None), Err(ChannelError::Uri(_))), "{bad}");
        }
        assert!(matches!(connect_lazy("https://h:1", None), Err(ChannelError::NoAuthority(_))));
        for good in ["http://h:1", "unix:/x", "unix:///run/x.sock", DEFAULT_URI] {
            connect_lazy(good, None).unwrap();
        }
    }

    #[test]
    fn the_host_is_the_name_in_the_certificate() {
        assert_eq!(host("https://storage-1.example:10810").as_deref(), Some("storage-1.example"));
        assert_eq!(host("https://[2001:db8::1]:1").as_deref(), Some("2001:db8::1"));
        assert_eq!(host("https://[fe80::1%25eth0]:1").as_deref(), Some("fe80::1"));
        assert_eq!(host("/nowhere"), None);
    }

    #[test]
    fn a_port_that_is_left_out_is_the_apis_own() {
        for (given, meant) in [
            ("http://storage-1", "http://storage-1:10810"),
            ("https://storage-1/", "https://storage-1:10810"),
            ("http://[2001:db8::1]", "http://[2001:db8::1]:10810"),
            ("http://[fe80::1%eth0]", "http://[fe80::1%25eth0]:10810"),
            ("http://storage-1:80", "http://storage-1:80"),
            ("https://storage-1:443", "https://storage-1:443"),
            (DEFAULT_URI, DEFAULT_URI),
        ] {
            assert_eq!(with_port(given), meant);
        }
        let Ok(Way::Http(endpoint)) = Way::of("http://storage-1", None) else { panic!("it is HTTP") };
        assert_eq!(endpoint.uri().port_u16(), Some(10810));
    }

    #[tokio::test]
    async fn a_link_local_server_is_reached_through_its_interface() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let failure = |uri: String| async move {
            let error = connect(&uri, None).await.unwrap_err();
            crate::causes::with_sources(&error)
        };
        let nowhere = failure(format!("http://[fe80::1%25no-such-if0]:{port}")).await;
        assert!(nowhere.contains("no network interface \"no-such-if0\""), "{nowhere}");
        let somewhere = failure(format!("http://[fe80::1%25lo]:{port}")).await;
        assert!(!somewhere.contains("no network interface"), "{somewhere}");
    }
}
