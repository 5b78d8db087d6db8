//! volcsi: the CSI plugin.
//!
//! Owns: the command line and the log. Never: does anything itself; see `csi` of the library.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use client::csi::node::service::NodeOptions;
use client::csi::serve::{RegistrationOptions, ServeOptions, serve};
use client::csi::socket::path_of_endpoint;
use client::node::node_labels::{LabelList, labels_of, parse_labels};
use client::tls_spec::ClientFiles;
use client::{api_channel, daemon_process};

/// The CSI plugin csi.volnode.io: the controller makes volumes and snapshots on the storage server and says which node has them; the node
/// stages and publishes volumes for kubelet
#[derive(Debug, Parser)]
#[command(name = "volcsi", version, max_term_width = 100)]
struct Cli {
    /// The plugin's socket, unix:///path
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock", value_name = "URI")]
    endpoint: String,
    /// Serve the Controller service, and no Node service unless --node is given as well; without both, both are served
    #[arg(long)]
    controller: bool,
    /// Serve the Node service; see --controller
    #[arg(long)]
    node: bool,
    /// Socket of this machine's node daemon, `volclient serve`
    #[arg(long, env = "VOLNODE_SOCKET", default_value = "/run/volnode/volclient.sock", value_name = "PATH")]
    socket: PathBuf,
    /// Management API of the storage server: unix:/path, http://host:port or https://host:port (port 10810 if left out)
    #[arg(long, env = "VOLNODE_SERVER", default_value = api_channel::DEFAULT_URI, value_name = "URI")]
    server: String,
    /// Where the server's volumes can be reached, for the controller: from nodes with all of these labels, KEY=VALUE[,KEY=VALUE...], such
    /// as topology.volnode.io/zone=z1. Without it, everywhere
    #[arg(long, value_name = "LABELS", value_parser = parse_labels)]
    topology: Vec<LabelList>,
    /// Authority of the server's certificate (PEM): needed for https://. The files are read at each connect
    #[arg(long, env = "VOLNODE_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// The plugin's certificate (PEM), for a server that asks for one
    #[arg(long, env = "VOLNODE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "VOLNODE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Kubelet's directory, its --root-dir, as it is seen here; what is mounted below it has to be seen outside as well
    #[arg(long, default_value = "/var/lib/kubelet", value_name = "DIR")]
    kubelet_dir: PathBuf,
    /// Take a kubelet directory below which mounts are seen by volcsi alone: for tests
    #[arg(long, hide = true)]
    private_mounts: bool,
    /// Where the lock files of running mkfs, fsck, mounts and unmounts are: a directory that outlives a container. Default: jobs, beside
    /// the plugin's socket
    #[arg(long, value_name = "DIR")]
    job_locks: Option<PathBuf>,
    /// Tell kubelet that this node can have no more volumes than this. Without it, and with 0: as many as the node daemon says, its own
    /// --max-volumes
    #[arg(long, default_value_t = 0, value_name = "N")]
    max_volumes: u32,
    /// Register with kubelet, which looks in this directory: plugins_registry below its own. Without it, node-driver-registrar can do it
    #[arg(long, value_name = "DIR")]
    register: Option<PathBuf>,
    /// The plugin's socket as kubelet sees it, a path of the host; with --register
    #[arg(
        long,
        default_value = "/var/lib/kubelet/plugins/csi.volnode.io/csi.sock",
        value_name = "PATH",
        requires = "register"
    )]
    kubelet_endpoint: String,
    /// Answer HTTP GET here, such as 0.0.0.0:9808: /healthz with 200 while the plugin's socket answers, /readyz while the node daemon and
    /// the storage server do as well, else with 503
    #[arg(long, value_name = "ADDRESS")]
    healthz: Option<SocketAddr>,
    /// What to log on stderr: error, warn, info, debug or trace; or a filter such as client::csi=debug
    #[arg(long, env = "VOLCSI_LOG", default_value = "info", value_name = "LEVEL")]
    log: String,
}

/// Threads of tokio that are always there.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    daemon_process::end("volcsi", run(Cli::parse()))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // Secrets of volumes pass through this process's memory.
    daemon_process::begin(&cli.log)?;
    let endpoint = path_of_endpoint(&cli.endpoint).context("--endpoint")?;
    let is_node = cli.node || !cli.controller;
    let topology = labels_of(cli.topology).map_err(anyhow::Error::msg).context("--topology")?;
    let node = NodeOptions {
        kubelet_dir: cli.kubelet_dir,
        may_be_private: cli.private_mounts,
        job_locks: cli.job_locks.unwrap_or_else(|| endpoint.with_file_name("jobs")),
        max_volumes: cli.max_volumes,
    };
    let options = ServeOptions {
        endpoint,
        node: is_node.then_some(node),
        controller: (cli.controller || !cli.node).then_some(topology),
        server: cli.server,
        tls_files: ClientFiles::named(cli.tls_ca, cli.tls_cert, cli.tls_key).context("--tls-ca")?,
        node_socket: std::path::absolute(&cli.socket).context("--socket")?,
        registration: cli.register.map(|dir| RegistrationOptions { dir, endpoint: cli.kubelet_endpoint }),
        healthz: cli.healthz,
    };
    daemon_log::start_writer().context("cannot start a thread for the log")?;
    daemon_log::try_threads(WORKERS + 1).context("cannot start the plugin's threads")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let outcome = runtime.block_on(serve(options));
    // A call that was cut off may be in the kernel, on a thread that nobody can end: it goes with the process.
    runtime.shutdown_background();
    Ok(outcome?)
}
