//! volcsi: the CSI plugin.
//!
//! Owns: the command line and the log. Never: does anything itself; see `csi` of the library.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use client::csi::serve::{RegistrationOptions, ServeOptions, serve};
use client::csi::socket::path_of_endpoint;
use client::daemon_process;

/// The CSI plugin of a Kubernetes node, csi.volnode.io: it tells kubelet who this node is. Volumes are not staged or published yet.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    /// The plugin's socket, unix:///path
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock", value_name = "URI")]
    endpoint: String,
    /// Socket of this machine's node daemon, `volclient serve`
    #[arg(long, env = "VOLNODE_SOCKET", default_value = "/run/volnode/volclient.sock", value_name = "PATH")]
    socket: PathBuf,
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
    /// Answer HTTP GET /healthz here, such as 0.0.0.0:9808: 200 while the plugin's socket answers
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
    let options = ServeOptions {
        endpoint: path_of_endpoint(&cli.endpoint).context("--endpoint")?,
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
