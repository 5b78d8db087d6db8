//! Running the plugin: its socket, the one for kubelet, the health check over HTTP; and its end.
//!
//! Owns: the order. Kubelet finds the plugin when it can be called, and loses sight of it before it ends. Never: keeps state: it may be killed
//! at any time. Called by: `volcsi`.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::csi::registration::registration_server::RegistrationServer;
use proto::csi::v1::controller_server::ControllerServer;
use proto::csi::v1::group_controller_server::GroupControllerServer;
use proto::csi::v1::identity_client::IdentityClient;
use proto::csi::v1::identity_server::IdentityServer;
use proto::csi::v1::node_server::NodeServer;
use proto::csi::v1::{GetPluginInfoRequest, ProbeRequest};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Server};

use super::controller::Controller;
use super::kubelet_authority;
use super::node::service::{NodeError, NodeOptions, NodeService};
use super::services::{DRIVER_NAME, Plugin, Registrar};
use super::socket::{SocketError, listen};
use crate::api_channel::{self, ChannelError};
use crate::causes::with_sources;
use crate::end_signal::EndSignals;
use crate::tls_spec::ClientFiles;

/// How long calls in progress may go on once the plugin is told to end. Their repeats go on with what is cut off.
const LAST_CALLS_DEADLINE: Duration = Duration::from_secs(10);
/// How long a mkfs, fsck or mount may go on after that; all in all less than the 300 s that docs/kubernetes.md has as the pod's
/// `terminationGracePeriodSeconds`. In a container programs are killed with the plugin, and an fsck is better not cut off.
const LAST_JOBS_DEADLINE: Duration = Duration::from_secs(280);
/// Health checks at once; kubelet makes one at a time.
const HEALTH_CHECKS_MAX: usize = 16;
/// What one may take, request and all.
const HEALTH_CHECK_DEADLINE: Duration = Duration::from_secs(5);
/// What a probe hears where nobody answers at the plugin's socket.
const NO_ANSWER: (http::StatusCode, &str) =
    (http::StatusCode::SERVICE_UNAVAILABLE, "the plugin does not answer at its socket\n");
/// After an error of accepting, such as no free descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What `volcsi` is told.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The plugin's socket.
    pub endpoint: PathBuf,
    /// The node daemon's socket.
    pub node_socket: PathBuf,
    /// The storage server's management API: `unix:/path`, `http://host[:port]` or `https://host[:port]`.
    pub server: String,
    /// For `https://`.
    pub tls_files: Option<ClientFiles>,
    /// What the Node service is told; `None`: it is not served.
    pub node: Option<NodeOptions>,
    /// Whether the Controller service is served, and then from where the server's volumes can be reached: of no keys, everywhere.
    pub controller: Option<BTreeMap<String, String>>,
    /// Where kubelet looks for plugins, and where it reaches this one.
    pub registration: Option<RegistrationOptions>,
    /// Where `/healthz` and `/readyz` are answered.
    pub healthz: Option<SocketAddr>,
}

/// How kubelet gets to know the plugin.
#[derive(Debug, Clone)]
pub struct RegistrationOptions {
    /// `plugins_registry` of kubelet's directory, as it is seen here.
    pub dir: PathBuf,
    /// The plugin's socket, as kubelet sees it.
    pub endpoint: String,
}

/// Why the plugin cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The path of the node daemon's socket.
    #[error("--socket: {0}")]
    NodeSocket(#[from] ChannelError),
    /// The server's address, or the files of TLS.
    #[error("--server: {0}")]
    Server(#[source] ChannelError),
    /// The Node service.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The signals that end it.
    #[error("cannot take SIGTERM and SIGINT: {0}")]
    Signals(#[source] io::Error),
    /// The address of the health check.
    #[error("--healthz {address}: {source}")]
    Healthz {
        /// As given.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A gRPC server ended by itself.
    #[error("the plugin's server ended: {0}")]
    Grpc(String),
}

/// Serves until SIGTERM or SIGINT; calls in progress, and what they have started, are finished first, if they end in time.
///
/// # Errors
/// [`ServeError`], by cause.
pub async fn serve(options: ServeOptions) -> Result<(), ServeError> {
    // From here on a signal ends it in order, also before anybody is told that it is ready.
    let ended_by_signal = EndSignals::take().map_err(ServeError::Signals)?;
    let daemon = api_channel::connect_lazy(&format!("unix:{}", options.node_socket.display()), None)?;
    let server = api_channel::connect_lazy(&options.server, options.tls_files.as_ref());
    let server = server.map_err(ServeError::Server)?;
    let mut plugin = Plugin::new(daemon.clone(), options.node.is_some());
    let mut services = Services { node: None, controller: None };
    if let Some(topology) = options.controller {
        let controller = Controller::new(server.clone(), api_channel::with_port(&options.server), topology);
        plugin = plugin.with_controller(server.clone(), controller.plugin_capabilities());
        services.controller = Some(controller);
    }
    if let Some(told) = options.node {
        services.node = Some(NodeService::new(told, daemon, server)?);
    }
    let (listener, _socket) = listen(&options.endpoint)?;
    let healthz = match options.healthz {
        None => None,
        Some(address) => {
            let failed = |source| ServeError::Healthz { address, source };
            Some(TcpListener::bind(address).await.map_err(failed)?)
        }
    };
    let registration = match &options.registration {
        None => None,
        Some(told) => {
            let (listener, socket) = listen(&told.dir.join(format!("{DRIVER_NAME}-reg.sock")))?;
            Some((listener, socket, told.endpoint.clone()))
        }
    };
    if let Some(healthz) = healthz {
        tracing::info!(address = ?healthz.local_addr().ok(), "answers /healthz");
        tokio::spawn(answer_health_checks(healthz, options.endpoint.clone()));
    }
    tracing::info!(endpoint = %options.endpoint.display(), version = env!("CARGO_PKG_VERSION"), "volcsi starts");
    daemon_log::announce(format!("volcsi ready: {}", options.endpoint.display()))
        .map_err(|source| SocketError::Io { path: options.endpoint.clone(), source })?;
    let (ending, ended) = watch::channel(false);
    let node = services.node.clone();
    let serving = run_grpc(listener, plugin, services, ended);
    let registering = register(registration);
    let out_of_time = async {
        ended_by_signal.come().await;
        ending.send_replace(true);
        tokio::time::sleep(LAST_CALLS_DEADLINE).await;
    };
    let outcome = tokio::select! {
        served = serving => served,
        failed = registering => Err(failed),
        () = out_of_time => {
            tracing::warn!("calls are cut off after {} s", LAST_CALLS_DEADLINE.as_secs());
            Ok(())
        }
    };
    if let Some(node) = node {
        node.end(LAST_JOBS_DEADLINE).await;
    }
    outcome
}

/// What is served beside Identity.
struct Services {
    node: Option<NodeService>,
    controller: Option<Controller>,
}

async fn run_grpc(
    listener: UnixListener,
    plugin: Plugin,
    Services { node, controller }: Services,
    mut ended: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let shutdown = async move { drop(ended.wait_for(|is_ending| *is_ending).await) };
    let serving = Server::builder()
        .add_service(IdentityServer::new(plugin))
        .add_optional_service(node.map(NodeServer::new))
        .add_optional_service(controller.clone().map(ControllerServer::new))
        .add_optional_service(controller.map(GroupControllerServer::new))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown);
    serving.await.map_err(|error| ServeError::Grpc(with_sources(&error)))
}

/// Answers kubelet for as long as the plugin is there; returns on an error alone.
async fn register(registration: Option<(UnixListener, super::socket::SocketFile, String)>) -> ServeError {
    let Some((listener, _socket, endpoint)) = registration else { return std::future::pending().await };
    let registrar = RegistrationServer::new(Registrar { endpoint });
    let serving = Server::builder().add_service(registrar);
    let connections =
        UnixListenerStream::new(listener).map(|kubelet| kubelet.map(kubelet_authority::understood));
    match serving.serve_with_incoming(connections).await {
        Ok(()) => ServeError::Grpc("no more connections of kubelet's".to_owned()),
        Err(error) => ServeError::Grpc(with_sources(&error)),
    }
}

/// For probes: the plugin's own socket is called anew, as kubelet does. Whether the node daemon and the server are there is another question,
/// for which no restart of the plugin helps: `/healthz` does not ask it, and `/readyz` does.
async fn answer_health_checks(listener: TcpListener, endpoint: PathBuf) {
    let at_once = Arc::new(Semaphore::new(HEALTH_CHECKS_MAX));
    let endpoint: Arc<Path> = endpoint.into();
    loop {
        let Ok(permit) = Arc::clone(&at_once).acquire_owned().await else { return };
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let endpoint = Arc::clone(&endpoint);
        tokio::spawn(async move {
            tokio::time::timeout(HEALTH_CHECK_DEADLINE, answer_health_check(socket, &endpoint)).await.ok();
            drop(permit);
        });
    }
}

async fn answer_health_check(socket: TcpStream, endpoint: &Path) {
    let answer = service_fn(|request: http::Request<Incoming>| async move {
        let (status, text) = match request.uri().path() {
            "/healthz" => health(endpoint).await,
            "/readyz" => readiness(endpoint).await,
            _ => (http::StatusCode::NOT_FOUND, "there are /healthz and /readyz, and nothing else\n"),
        };
        let mut response = http::Response::new(text.to_owned());
        *response.status_mut() = status;
        Ok::<_, std::convert::Infallible>(response)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(socket), answer).await {
        tracing::debug!(%error, "a health check was cut off");
    }
}

/// Whether who connects to the plugin's socket now is answered.
async fn health(endpoint: &Path) -> (http::StatusCode, &'static str) {
    let Ok(mut own) = own_identity(endpoint) else { return NO_ANSWER };
    match own.get_plugin_info(GetPluginInfoRequest {}).await {
        Ok(_) => (http::StatusCode::OK, "ok\n"),
        Err(_) => NO_ANSWER,
    }
}

/// The same, and whether what the plugin needs answers.
async fn readiness(endpoint: &Path) -> (http::StatusCode, &'static str) {
    let Ok(mut own) = own_identity(endpoint) else { return NO_ANSWER };
    match own.probe(ProbeRequest {}).await.map(|answer| answer.into_inner().ready) {
        Ok(Some(true)) => (http::StatusCode::OK, "ok\n"),
        Ok(_) => {
            let text = "the node daemon or the storage server does not answer\n";
            (http::StatusCode::SERVICE_UNAVAILABLE, text)
        }
        Err(_) => NO_ANSWER,
    }
}

/// Connects at the first call.
fn own_identity(endpoint: &Path) -> Result<IdentityClient<Channel>, ChannelError> {
    let channel = api_channel::connect_lazy(&format!("unix:{}", endpoint.display()), None)?;
    Ok(IdentityClient::new(channel))
}
