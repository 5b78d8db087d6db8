//! Channels to a storage server's management API: a Unix socket of this machine, `http://`, or `https://` with the client's
//! certificate.
//!
//! Owns: which URI is taken, and TLS under HTTP/2. The files are read at each connect, so that renewed certificates are
//! taken without a restart. Never: makes a call. Called by the node daemon (`node/management_client.rs`) and volctl.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{self, Channel, Endpoint};
use tower::service_fn;

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

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Not such a URI.
    #[error("{0:?} is not of the form unix:/path, http://host:port or https://host:port")]
    Uri(String),
    /// There is nobody to believe the server's certificate by.
    #[error("{0} needs the certificate of the server's authority: give --tls-ca")]
    NoAuthority(String),
    /// The server cannot be reached, or is not believed.
    #[error(transparent)]
    Connect(#[from] transport::Error),
}

/// Whether TLS is spoken to the API at this URI.
pub fn is_https(uri: &str) -> bool {
    uri.starts_with(HTTPS)
}

/// The host of the API's URI, without the brackets of an IPv6 address: the name that the server's certificate bears.
pub fn host(uri: &str) -> Option<String> {
    let uri: Uri = uri.parse().ok()?;
    Some(uri.host()?.trim_start_matches('[').trim_end_matches(']').to_owned())
}

/// Connects now.
///
/// # Errors
/// [`ChannelError`], by cause.
pub async fn connect(uri: &str, files: Option<&ClientFiles>) -> Result<Channel, ChannelError> {
    match Way::of(uri, files)? {
        Way::Http(endpoint) => Ok(endpoint.connect().await?),
        Way::Https(endpoint, files) => {
            let connector = service_fn(move |uri| tls_connect(uri, files.clone()));
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
        Way::Https(endpoint, files) => {
            endpoint.connect_with_connector_lazy(service_fn(move |uri| tls_connect(uri, files.clone())))
        }
        Way::Unix(endpoint, path) => {
            endpoint.connect_with_connector_lazy(service_fn(move |_| unix_connect(path.clone())))
        }
    })
}

/// How a URI is connected to.
enum Way {
    Http(Endpoint),
    Https(Endpoint, ClientFiles),
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
        let endpoint = with_limits(Endpoint::from_shared(uri.to_owned()).map_err(|_| off())?);
        if !is_https(uri) {
            return Ok(Self::Http(endpoint));
        }
        let files = files.ok_or_else(|| ChannelError::NoAuthority(uri.to_owned()))?;
        Ok(Self::Https(endpoint, files.clone()))
    }
}

async fn unix_connect(path: PathBuf) -> io::Result<TokioIo<UnixStream>> {
    Ok(TokioIo::new(UnixStream::connect(path).await?))
}

async fn tls_connect(uri: Uri, files: ClientFiles) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let mut config = files.load().map_err(io::Error::other)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(443))).await?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
    Ok(TokioIo::new(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_uri_of_another_form_is_refused() {
        for bad in ["127.0.0.1:10810", "http://", "https://", "unix:x", "unix:", "ftp://h:1"] {
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
        assert_eq!(host("/nowhere"), None);
    }
}
