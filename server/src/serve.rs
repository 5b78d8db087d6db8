//! One volserver process from start to stop.
//!
//! Owns the order of both. Start: addresses allowed → catalog open (directory locked) → management port bound → data side
//! running → what a killed server left is finished → API answering → "ready". Stop, each step bounded in time: API stops
//! taking calls and finishes those it has → operations are cancelled and undone → data side closes its connections and waits for their I/O → catalog closed.
//! Never decides what a call does. Called by `main.rs`.

use std::fmt::Display;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use rustls::ProtocolVersion;
use tls::certificates::CertificateError;
use tls::kernel::{self, CipherKind};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Server;

use crate::advertised::Advertised;
use crate::backend::lvm::Lvm;
use crate::catalog::{Catalog, CatalogError};
use crate::config::{Config, TlsMode, TlsRecords};
use crate::data::address::{DataAddress, Listener};
use crate::data::config::DataServerConfig;
use crate::data::server::{DataServer, DataServerError};
use crate::data_side::ServedData;
use crate::lifecycle::{DataSide, Lifecycle, LifecycleError, Operations};
use crate::management::audit::AuditLog;
use crate::management::{Audited, Calls, ManagementService, listener};
use crate::tls::ServerTls;

/// How often it is looked how full the volumes' file system is.
const SPACE_PAUSE: Duration = Duration::from_secs(10);

/// Calls in progress get this long at stop: a fence takes less.
const CALLS_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Copies that go on are cancelled at stop, and get this long to undo what they did.
const OPERATIONS_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers of finished calls get this long to leave, and clients to close their connections.
const ANSWERS_TIMEOUT: Duration = Duration::from_secs(1);
/// The data side bounds its own stop at 20 s; this is for the case that it cannot.
const DATA_STOP_TIMEOUT: Duration = Duration::from_secs(25);

/// Between two looks at the sizes of adopted devices and the thin pool: as soon as people wonder, and of no weight.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(60);

/// Between two pings of a connection of the API, and how long an answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(20);
/// Calls of one connection that may be open, and that are worked on at once; the others wait.
const STREAMS_MAX: u32 = 128;
const CALLS_OF_CONNECTION_MAX: usize = 32;
/// Headers of a call; none of ours has more.
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// Why the server did not start, or did not stop in order.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address beyond loopback, without the word for it.
    #[error(
        "{0} can be reached from other machines, where nothing is encrypted or the API asks for no password: listen on \
         127.0.0.1, or use --tls required (with --tls-client-ca for the API), or say --insecure if that network is trusted"
    )]
    BeyondLoopback(SocketAddr),
    /// The management API on TCP without TLS, without the word for it.
    #[error(
        "every user of this machine can reach the management API at {0}, and delete volumes: leave --management away (it is a \
         Unix socket then, for root and its group), or use --tls, or say --insecure if all of them are trusted"
    )]
    OpenToLocalUsers(SocketAddr),
    /// No such group.
    #[error("{0}")]
    Group(String),
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// The data directory or the catalog cannot be used.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// What a former process left cannot be finished.
    #[error("cannot finish what a former volserver left: {0}")]
    Recovery(LifecycleError),
    /// The management address cannot be listened on.
    #[error(
        "cannot listen on {address} (management): {source}; stop what uses it or choose another --management"
    )]
    ManagementAddress {
        /// The address.
        address: DataAddress,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The data side did not start.
    #[error(transparent)]
    Data(#[from] DataServerError),
    /// The audit log cannot be opened.
    #[error("cannot open the audit log {}: {source}; make its directory, or name another file with --audit-log", path.display())]
    AuditLog {
        /// Its path.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// Signals cannot be caught, or reflection not built.
    #[error("cannot set up {what}: {reason}")]
    SetUp {
        /// What failed.
        what: &'static str,
        /// How.
        reason: String,
    },
    /// The management API ended by itself.
    #[error("the management API failed: {0}")]
    Management(tonic::transport::Error),
    /// Not everything ended in time.
    #[error("stopped, but {0} did not end in time")]
    Unclean(&'static str),
}

impl ServeError {
    /// The process's exit code, as `--help` lists them.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::BeyondLoopback(_) | Self::OpenToLocalUsers(_) | Self::Certificates(_) => 2,
            Self::Group(_) | Self::AuditLog { .. } => 2,
            Self::Catalog(error) if error.is_out_of_space() => 8,
            Self::Recovery(LifecycleError::NoSpace(_)) => 8,
            Self::Catalog(_) | Self::Recovery(_) => 3,
            Self::ManagementAddress { .. } => 4,
            Self::Data(error) if error.is_address() => 4,
            Self::Data(
                DataServerError::Memory(_)
                | DataServerError::DefaultMemory { .. }
                | DataServerError::Descriptors(_),
            ) => 2,
            Self::Data(DataServerError::RuntimeDir(_)) => 3,
            Self::Data(_) | Self::SetUp { .. } | Self::Management(_) => 1,
            Self::Unclean(_) => 5,
        }
    }
}

fn set_up<E: Display>(what: &'static str) -> impl FnOnce(E) -> ServeError {
    move |error| ServeError::SetUp { what, reason: error.to_string() }
}

/// Runs the server until SIGTERM or SIGINT.
///
/// # Errors
/// Why it did not start, or what did not end in time.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    let mut stop = StopSignals::new()?;
    check_addresses(&config)?;
    let tls = Arc::new(start_tls(&config)?);
    let audit_log = audit_log(&config)?;
    reload_at_sighup(Arc::clone(&tls), audit_log.clone())?;
    let catalog = Catalog::open(&config.data_dir)?;
    let runtime_dir = runtime_dir(&config);
    let management = bind_management(&config, runtime_dir.as_deref())?;
    let management_addresses: Vec<DataAddress> =
        management.iter().map(|listener| listener.address().clone()).collect();
    let lvm = start_lvm(&config, &catalog).await?;
    let data_config =
        DataServerConfig { lvm: lvm.clone(), ..data_server_config(&config, &catalog, &tls, runtime_dir) };
    let adoptable = Arc::clone(&data_config.adoptable);
    let data_server = DataServer::start(data_config, catalog.clone())?;
    let data_side =
        Arc::new(ServedData::new(Arc::clone(&data_server), catalog.clone(), adoptable, lvm.clone()));
    let lifecycle = Lifecycle::new(catalog.clone(), data_side).with_snapshot_reserve(config.snapshot_reserve);
    let recovered = lifecycle.recover().map_err(|error| ServeError::Recovery(lifecycle.explained(error)))?;
    tracing::info!(server_id = %catalog.server_id(), ?recovered, "catalog open");

    lifecycle.look_whether_can_copy();
    lifecycle.look_at_space();
    watch_space(lifecycle.clone());
    let operations = lifecycle.operations().clone();
    let advertised = advertised(&config, &data_server);
    let (stop_api, stopped) = oneshot::channel::<()>();
    let calls = Calls::default();
    let service = ManagementService::new(lifecycle.clone(), calls.clone(), advertised, audit_log.clone());
    let connections_max = data_server.management_connections_max();
    let mut api = tokio::spawn(answer(service, management, connections_max, tls, stopped)?);
    announce(data_server.local_addrs(), &management_addresses);
    let following = tokio::spawn(look_after(lifecycle, lvm));

    let failure = tokio::select! {
        signal = stop.next() => {
            tracing::info!(signal, "stopping");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            None
        }
        ended = &mut api => Some(match ended {
            Ok(Ok(())) => set_up("the management API")("it ended without being told to"),
            Ok(Err(error)) => ServeError::Management(error),
            Err(panicked) => set_up("the management API")(panicked),
        }),
    };
    following.abort();
    let in_time = tokio::select! {
        stopped = stop_in_order(calls, operations, stop_api, api, data_server) => stopped,
        signal = stop.next() => {
            tracing::warn!(signal, "told again to stop: not waiting any longer");
            Err(ServeError::Unclean("connections or calls"))
        }
    };
    if let Some(log) = audit_log {
        // It bounds its own time.
        let _ = tokio::task::spawn_blocking(move || log.finish()).await;
    }
    failure.map_or(in_time, Err)
}

/// Looks after the sizes of adopted volumes, and after the thin pool, for as long as the server runs.
async fn look_after(lifecycle: Lifecycle<ServedData>, lvm: Option<Arc<Lvm>>) {
    loop {
        tokio::time::sleep(FOLLOW_INTERVAL).await;
        let (lifecycle, lvm) = (lifecycle.clone(), lvm.clone());
        // One at a time, however long a file system takes; what fails has been logged.
        let _ = tokio::task::spawn_blocking(move || {
            lifecycle.follow_sizes();
            if let Some(lvm) = lvm {
                lvm.watch();
            }
        })
        .await;
    }
}

/// Takes no more calls, finishes those there are, then ends the connections of both sides.
async fn stop_in_order(
    calls: Calls,
    operations: Operations,
    stop_api: oneshot::Sender<()>,
    mut api: JoinHandle<Result<(), tonic::transport::Error>>,
    data_server: Arc<DataServer>,
) -> Result<(), ServeError> {
    // The receiver is gone only where the API has ended already.
    let _ = stop_api.send(());
    let calls_finished = tokio::time::timeout(CALLS_STOP_TIMEOUT, calls.finish()).await.is_ok();
    // While the data side is there to undo them.
    let operations_ended = operations.stop(OPERATIONS_STOP_TIMEOUT).await;
    // A client that keeps an idle connection open must not keep the server.
    if !api.is_finished() && tokio::time::timeout(ANSWERS_TIMEOUT, &mut api).await.is_err() {
        api.abort();
    }
    let stopping = tokio::task::spawn_blocking(move || data_server.shutdown());
    let data_stopped = matches!(tokio::time::timeout(DATA_STOP_TIMEOUT, stopping).await, Ok(Ok(true)));
    match (calls_finished, operations_ended, data_stopped) {
        (true, true, true) => Ok(()),
        (false, ..) => Err(ServeError::Unclean("calls of the management API")),
        (true, false, _) => Err(ServeError::Unclean("operations that copy")),
        (true, true, false) => Err(ServeError::Unclean("connections or their I/O")),
    }
}

/// Refuses, or warns of, what other machines can reach.
fn check_addresses(config: &Config) -> Result<(), ServeError> {
    for address in config.exposed() {
        if !config.insecure {
            return Err(ServeError::BeyondLoopback(address));
        }
        tracing::warn!(
            %address,
            "--insecure: whoever reaches this address can read what passes, or manage volumes without a password"
        );
    }
    if config.tls != TlsMode::Off && !config.tells_who_calls() {
        for address in config.management.iter().filter_map(DataAddress::tcp) {
            tracing::warn!(%address, "without --tls required and --tls-client-ca every user of this machine may manage volumes here");
        }
    }
    if let Some(address) = config.open_to_local_users().next().filter(|_| !config.insecure) {
        return Err(ServeError::OpenToLocalUsers(address));
    }
    Ok(())
}

/// Reads the certificates, and says who will do the records.
fn start_tls(config: &Config) -> Result<ServerTls, CertificateError> {
    let Some(files) = config.tls_files() else { return Ok(ServerTls::default()) };
    if config.tls == TlsMode::Allowed && files.client_authority.is_some() {
        tracing::warn!(
            "--tls allowed: clients without TLS show no certificate, and are not restricted by one"
        );
    }
    let tls = ServerTls::new(files, config.tls == TlsMode::Required, config.tls_records.into())?;
    let offload = kernel::support(ProtocolVersion::TLSv1_3, CipherKind::Aes256Gcm);
    match (config.tls_records, offload) {
        (TlsRecords::Auto, Ok(())) => tracing::info!("TLS: the kernel encrypts and decrypts"),
        (TlsRecords::Auto, Err(why)) => {
            tracing::warn!(why, "TLS: user space encrypts and decrypts, with a thread for each connection");
        }
        (TlsRecords::UserSpace, _) => tracing::info!("TLS: user space encrypts and decrypts, as configured"),
    }
    Ok(tls)
}

/// One look at a time: a file system that hangs keeps one thread.
fn watch_space<D: DataSide>(lifecycle: Lifecycle<D>) {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SPACE_PAUSE).await;
            let looking = lifecycle.clone();
            let look = move || {
                looking.look_at_space();
                if let Err(error) = looking.catalog().spare_changes() {
                    tracing::warn!(%error, "cannot make room in the catalog; its file system is nearly full");
                }
            };
            if tokio::task::spawn_blocking(look).await.is_err() {
                return;
            }
        }
    });
}

/// New certificates are taken without a restart: connections stay, those that come get the new ones. The audit log is opened anew.
fn reload_at_sighup(tls: Arc<ServerTls>, audit_log: Option<AuditLog>) -> Result<(), ServeError> {
    let mut hangups = signal(SignalKind::hangup()).map_err(set_up("signals"))?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            audit_log.iter().for_each(AuditLog::reopen);
            let tls = Arc::clone(&tls);
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(())) => tracing::info!("SIGHUP: certificates reloaded"),
                Ok(Err(error)) => {
                    tracing::error!(%error, "SIGHUP: cannot reload the certificates; the old ones stay in use")
                }
                Err(panicked) => tracing::error!(%panicked, "SIGHUP: cannot reload the certificates"),
            }
        }
    });
    Ok(())
}

fn audit_log(config: &Config) -> Result<Option<AuditLog>, ServeError> {
    let open = |path: &PathBuf| {
        AuditLog::open(path).map_err(|source| ServeError::AuditLog { path: path.clone(), source })
    };
    config.audit_log.as_ref().map(open).transpose()
}

fn bind_management(config: &Config, runtime_dir: Option<&Path>) -> Result<Vec<Listener>, ServeError> {
    let addresses = config.management_addresses(runtime_dir);
    let group_id = config.management_group_id().map_err(ServeError::Group)?;
    let bind = |address: &DataAddress| {
        let group_id = address.tcp().is_none().then_some(group_id);
        Listener::bind_among(address, &addresses, group_id)
            .map_err(|source| ServeError::ManagementAddress { address: address.clone(), source })
    };
    addresses.iter().map(bind).collect()
}

/// Takes the thin pool into use, if there is to be one.
async fn start_lvm(config: &Config, catalog: &Catalog) -> Result<Option<Arc<Lvm>>, ServeError> {
    let Some(pool) = config.lvm.clone() else { return Ok(None) };
    catalog.set_thin_pool(pool.to_string());
    let server_id = catalog.server_id();
    let data_dir = config.data_dir.clone();
    let started = tokio::task::spawn_blocking(move || Lvm::start(pool, server_id, &data_dir)).await;
    let started = started.map_err(set_up("the thin pool"))?;
    Ok(Some(Arc::new(started.map_err(set_up("the thin pool"))?)))
}

fn data_server_config(
    config: &Config,
    catalog: &Catalog,
    tls: &Arc<ServerTls>,
    runtime_dir: Option<PathBuf>,
) -> DataServerConfig {
    DataServerConfig {
        listen: config.listen.clone(),
        threads: config.threads.map_or(0, usize::from),
        volumes_dir: catalog.volumes_dir(),
        runtime_dir,
        cache: config.cache.into(),
        export_by_name: config.export_by_name,
        adoptable: Arc::new(config.adoptable()),
        tls: Arc::clone(tls),
        faults: config.fault.unwrap_or_default(),
        lvm: None,
        opener: None,
        limits: config.limits(),
    }
}

/// Says so where there is none: a server without one is as good, until its storage fails.
fn runtime_dir(config: &Config) -> Option<PathBuf> {
    let dir = config.runtime_dir();
    let device = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.dev());
    let is_beside = |dir: &PathBuf| matches!((device(dir), device(&config.data_dir)), (Ok(runtime), Ok(data)) if runtime == data);
    if let Some(dir) = dir.as_ref().filter(|dir| is_beside(dir)) {
        tracing::warn!(
            runtime_dir = %dir.display(),
            "the runtime directory is on the file system of the data: what that loses may go unnoticed (see --runtime-dir)"
        );
    }
    if dir.is_none() {
        tracing::warn!(
            "no runtime directory can be written to: what a failing file system loses while no server runs goes unnoticed \
             (see --runtime-dir)"
        );
    }
    dir
}

/// What clients are told: as configured, else where the data side listens.
fn advertised(config: &Config, data: &DataServer) -> Advertised {
    let advertised = Advertised::new(config.advertise.clone(), data.local_addrs().to_vec())
        .with_ipv6_only(data.ipv6_only().to_vec());
    if advertised.depends_on_caller() {
        tracing::info!(
            "--listen has a wildcard address: clients are told the address at which they reach the management API, unless \
             --advertise says another"
        );
    }
    advertised
}

/// The API with health and reflection, as a future that ends some time after `stopped` is told.
fn answer<D: DataSide>(
    service: v1::management_server::ManagementServer<Audited<ManagementService<D>>>,
    listeners: Vec<Listener>,
    connections_max: u32,
    tls: Arc<ServerTls>,
    stopped: oneshot::Receiver<()>,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>>, ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("volnode.v1.Management")
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection")
        .build_v1()
        .map_err(set_up("gRPC reflection"))?;
    let connections = listener::connections(listeners, tls, connections_max)
        .map_err(set_up("the management API's listeners"))?;
    Ok(async move {
        reporter
            .set_serving::<v1::management_server::ManagementServer<Audited<ManagementService<D>>>>()
            .await;
        Server::builder()
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_LIMIT))
            .max_concurrent_streams(STREAMS_MAX)
            .concurrency_limit_per_connection(CALLS_OF_CONNECTION_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .add_service(health)
            .add_service(reflection)
            .add_service(service)
            .serve_with_incoming_shutdown(connections, async move {
                // An error says that the sender is gone: stop as well.
                let _ = stopped.await;
                reporter
                    .set_not_serving::<v1::management_server::ManagementServer<Audited<ManagementService<D>>>>()
                    .await;
            })
            .await
    })
}

/// Says on stdout, and to systemd, that the server can be used.
fn announce(data: &[DataAddress], management: &[DataAddress]) {
    let joined = |addresses: &[DataAddress]| {
        addresses.iter().map(DataAddress::to_string).collect::<Vec<_>>().join(" ")
    };
    let line = format!("volserver ready: data {}, management {}", joined(data), joined(management));
    if let Err(error) = daemon_log::announce(line) {
        tracing::warn!(%error, "cannot report on stdout that the server is ready");
    }
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "cannot tell the service manager that the server is ready");
    }
}

/// The signals that stop the server.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> Result<Self, ServeError> {
        let catch = |kind| signal(kind).map_err(set_up("signals"));
        Ok(Self { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
