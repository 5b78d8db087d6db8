//! A volserver that checks its clients' certificates, and clients of its API that have some.
#![allow(dead_code, unreachable_pub)] // Each test file is a crate of its own and uses a part of this.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use proto::error_reason as reason;
use proto::v1::management_client::ManagementClient;
use rustls::pki_types::ServerName;
use tls::certificates::client_config;
use tls::test_authority::{Authority, Issued};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::volserver::{self, Volserver, command};

/// A volserver that checks clients.
pub struct Rig {
    pub authority: Authority,
    pub dir: tempfile::TempDir,
    pub files: Issued,
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let files = authority.issue(&dir.path().join("server"), &[]);
        Self { authority, dir, files }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn command(&self, mode: &str) -> Command {
        let mut command = command(&self.data_dir());
        command.args(["--tls", mode, "--tls-cert"]).arg(self.files.pair().certificate);
        command.arg("--tls-key").arg(self.files.pair().key);
        command.arg("--tls-client-ca").arg(self.files.authority());
        command
    }

    pub fn start(&self, mode: &str) -> Volserver {
        Volserver::start_with(self.command(mode), &self.dir.path().join("log"))
    }

    pub fn client(&self, name: &str, uris: &[&str]) -> Issued {
        self.authority.issue(&self.dir.path().join(name), uris)
    }

    /// A client of the API whose certificate has these URIs.
    pub async fn connect(&self, server: &Volserver, name: &str, uris: &[&str]) -> ManagementClient<Channel> {
        connect(server.management, &self.client(name, uris)).await.unwrap()
    }
}

/// A client of the API with this certificate.
pub async fn connect(
    address: SocketAddr,
    client: &Issued,
) -> Result<ManagementClient<Channel>, tonic::transport::Error> {
    let mut config = client_config(&client.authority(), Some(&client.pair())).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let socket = TcpStream::connect(address).await?;
            // Or each call waits for the acknowledgement of its first half.
            socket.set_nodelay(true)?;
            let name = ServerName::try_from("localhost").map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, socket).await?))
        }
    });
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().timeout(volserver::DEADLINE);
    Ok(ManagementClient::new(endpoint.connect_with_connector(connect).await?))
}

/// The reason that a status has for programs.
pub fn reason_of(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

pub fn is_forbidden(status: &Status) -> bool {
    status.code() == Code::PermissionDenied && reason_of(status) == reason::NOT_AUTHORIZED
}
