//! volclient: the node daemon (`serve`) and the device processes (`device`).
//!
//! Owns: the command line and the log. Never: does anything itself; see `node` and `device` of the library.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand, value_parser};
use client::contract::AttachmentDir;
use client::daemon_process;
use client::disk_ends;
use client::freezer::{self, Mount};
use client::holders;
use client::node::attachment_record::AttachmentRecord;
use client::node::device_process;
use client::node::node_labels::{LabelList, labels_of, parse_labels};
use client::node::serve::{ServeOptions, serve};
use client::node::take_away::take_all_away;
use client::pod_exit::{self, OutlivePod, PodExit, leave};
use client::safe_stop;
use client::tls_spec::ClientFiles;

/// Turns network volumes into local disks (/dev/ublkbN).
#[derive(Debug, Parser)]
#[command(name = "volclient", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log on stderr: error, warn, info, debug or trace; or a filter such as client::node=debug
    #[arg(long, global = true, env = "VOLCLIENT_LOG", default_value = "info", value_name = "LEVEL")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node daemon: attach and detach volumes at the request of volctl
    ///
    /// Prints "volclient ready: SOCKET" once it can be used. It may be stopped and started at any time: attached
    /// volumes are served by processes of their own.
    Serve {
        #[command(flatten)]
        args: ServeArgs,
        /// What the storage server is told that this machine is and where, such as topology.volnode.io/zone=z1; may be given several times
        ///
        /// As labels of volumes: at most 64, keys are [DOMAIN/]NAME. The variable has commas between them. `volctl node show` shows them.
        #[arg(long = "label", env = "VOLCLIENT_LABELS", value_name = "KEY=VALUE", value_parser = parse_labels)]
        labels: Vec<LabelList>,
        /// How many volumes this machine can have: the storage server grants it no more, and kubelet is told the same. 0: no limit. Default:
        /// 256, and up to Linux 6.14 no more than the ublk driver makes (/sys/module/ublk_drv/parameters/ublks_max, 64)
        #[arg(long, env = "VOLCLIENT_MAX_VOLUMES", value_name = "N", value_parser = value_parser!(u32).range(..=256))]
        max_volumes: Option<u32>,
        #[command(flatten)]
        pod: PodArgs,
    },
    /// Take every disk of this machine away, without the node daemon: the last step of a shutdown
    ///
    /// What is mounted is unmounted first, as far as that ends in time; then the disk goes, whoever has it open, and what was
    /// not flushed may be lost. The node daemon must not run; while it does, use `volctl detach --all --force`.
    TakeAway(ServeArgs),
    /// Print what a ublk disk is called, as udev imports it: VOLNODE_NAME, and VOLNODE_STALLED=1 where reading would wait
    ///
    /// The name is the volume's, or such as nbd@host@port@export for an NBD server's export. Prints nothing for a disk of another
    /// program.
    DeviceName {
        /// The kernel's name of the disk, such as ublkb0
        disk: String,
        /// The run directory of the node daemon
        #[arg(long, env = "VOLCLIENT_RUN_DIR", default_value = "/run/volnode", value_name = "DIR")]
        run_dir: PathBuf,
    },
    /// Serve one attachment; started by `volclient serve`, or by a service manager
    Device(DeviceArgs),
    /// Leave the pod of the node daemon and serve an attachment outside of it; started by `volclient serve --outlive-pod`
    #[command(name = pod_exit::SUBCOMMAND, hide = true)]
    LeavePod {
        /// What becomes the root
        #[arg(long)]
        root: PathBuf,
        /// What becomes /etc in it
        #[arg(long)]
        etc: PathBuf,
        /// The cgroup to go into
        #[arg(long)]
        cgroup: PathBuf,
        /// Directories that stay where they are
        #[arg(long = "keep")]
        kept: Vec<PathBuf>,
        /// What volclient is told there
        #[arg(last = true, required = true)]
        arguments: Vec<OsString>,
    },
    /// Take a ublk disk away unless somebody uses it, and print what came of it; started by the others
    #[command(name = safe_stop::SUBCOMMAND, hide = true)]
    StopDisk {
        /// The number in the disk's name
        dev_id: u32,
    },
    /// Tell by the exit code what lies at both ends of a disk; started by `volclient serve`
    #[command(name = disk_ends::LOOK_SUBCOMMAND, hide = true)]
    LookAtEnds {
        /// Its path
        disk: PathBuf,
    },
    /// Write zeros over both ends of a disk; started by `volclient serve`
    #[command(name = disk_ends::ERASE_SUBCOMMAND, hide = true)]
    EraseEnds {
        /// Its path
        disk: PathBuf,
    },
    /// Hold a mounted file system frozen for some seconds at most; started by `volclient serve`
    #[command(name = freezer::HOLD_SUBCOMMAND, hide = true)]
    HoldFrozen {
        /// The freeze's id
        id: String,
        /// Mounts of the file system, MOUNT_ID,DEVICE,PATH; the first that is there is taken
        #[arg(required = true)]
        mounts: Vec<Mount>,
    },
    /// Thaw what a killed process left; started by `volclient serve`
    #[command(name = freezer::THAW_SUBCOMMAND, hide = true)]
    ThawLeft {
        /// The freeze's id
        id: String,
        /// Processes that may still be about to freeze
        #[arg(long = "pid")]
        pids: Vec<u32>,
        /// As for hold-frozen
        #[arg(required = true)]
        mounts: Vec<Mount>,
    },
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Management API of the storage server: unix:/path, http://host:port or https://host:port (port 10810 if left out)
    #[arg(long, env = "VOLCLIENT_SERVER", default_value = client::api_channel::DEFAULT_URI, value_name = "URI")]
    server: String,
    /// Authority of the servers' certificates (PEM): needed for https:// and nbds://
    ///
    /// With an https:// server its volumes' data is encrypted, too. The files are read at each connect.
    #[arg(long, env = "VOLCLIENT_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// This machine's certificate (PEM), for servers that ask for one
    #[arg(long, env = "VOLCLIENT_TLS_CERT", value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "VOLCLIENT_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Encrypt in the device processes even where the kernel could (kTLS)
    #[arg(long, env = "VOLCLIENT_TLS_USER_SPACE", value_parser = BoolishValueParser::new())]
    tls_user_space: bool,
    /// Make a connection anew once the kernel has encrypted so many bytes under one key (for tests)
    #[arg(long, hide = true, default_value_t = tls::kernel::KEY_BYTES_MAX, value_name = "BYTES")]
    tls_key_bytes_max: u64,
    /// Where the state of attachments is kept; gone with a reboot
    #[arg(long, env = "VOLCLIENT_RUN_DIR", default_value = "/run/volnode", value_name = "DIR")]
    run_dir: PathBuf,
    /// Socket of the node API [default: volclient.sock in the run directory]
    #[arg(long, env = "VOLCLIENT_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Name of this machine to the server [default: /etc/machine-id, else the host name]
    #[arg(long, env = "VOLCLIENT_NODE_ID", value_name = "ID")]
    node_id: Option<String>,
    /// Where stable device names are made
    #[arg(long, env = "VOLCLIENT_DEVICE_DIR", default_value = "/dev/volnode", value_name = "DIR")]
    device_dir: PathBuf,
}

#[derive(Debug, Args)]
struct PodArgs {
    /// In a pod: device processes leave the pod and go on when it ends. DIR is a directory of the host's for their programs
    ///
    /// The pod needs hostPID, hostNetwork, privileged and the host's /dev, /sys, /run/volnode, DIR and certificates, each at its
    /// own path. Without it the end of the pod ends device processes, and I/O waits for the next pod.
    #[arg(long, env = "VOLCLIENT_OUTLIVE_POD", value_name = "DIR")]
    outlive_pod: Option<PathBuf>,
    /// With --outlive-pod: the cgroup of device processes, in the host's /sys/fs/cgroup; it is made
    #[arg(
        long,
        env = "VOLCLIENT_DEVICE_CGROUP",
        default_value = "/sys/fs/cgroup/volnode",
        value_name = "DIR"
    )]
    device_cgroup: PathBuf,
}

impl PodArgs {
    fn wanted(self) -> anyhow::Result<Option<OutlivePod>> {
        let Some(directory) = self.outlive_pod else { return Ok(None) };
        let directory = std::path::absolute(directory).context("--outlive-pod")?;
        let cgroup = std::path::absolute(self.device_cgroup).context("--device-cgroup")?;
        Ok(Some(OutlivePod { directory, cgroup }))
    }
}

#[derive(Debug, Args)]
struct DeviceArgs {
    /// The attachment's folder, with its spec.json
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// Threads of tokio that are always there.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    daemon_process::end("volclient", run(Cli::parse()))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // Secrets of attachments and private keys are in this process's memory.
    daemon_process::begin(&cli.log)?;
    match cli.command {
        Command::Serve { args, labels, max_volumes, pod } => {
            let labels = labels_of(labels).map_err(anyhow::Error::msg).context("--label")?;
            let outlive_pod = pod.wanted()?;
            let options = serve_options(args, cli.log)?;
            run_on_tokio(serve(ServeOptions { labels, max_volumes, outlive_pod, ..options }))
        }
        Command::TakeAway(args) => run_take_away(args, cli.log),
        Command::DeviceName { disk, run_dir } => run_device_name(&disk, &run_dir),
        // It starts the log's writer itself, when no mount is in its way any more.
        Command::Device(args) => run_device(args),
        Command::LeavePod { root, etc, cgroup, kept, arguments } => {
            Err(leave::leave_and_run(&PodExit { root, etc, cgroup, kept }, &arguments).into())
        }
        Command::StopDisk { dev_id } => run_stop_disk(dev_id),
        Command::LookAtEnds { disk } => std::process::exit(i32::from(disk_ends::look(&disk)?.exit_code())),
        Command::EraseEnds { disk } => Ok(disk_ends::erase(&disk)?),
        Command::HoldFrozen { mounts, .. } => Ok(freezer::hold_frozen(&mounts)?),
        Command::ThawLeft { id, pids, mounts } => {
            Ok(freezer::thaw_left(&id, &pids, &mounts, holders::mounts_of_device)?)
        }
    }
}

fn run_take_away(args: ServeArgs, log_filter: String) -> anyhow::Result<()> {
    run_on_tokio(take_all_away(serve_options(args, log_filter)?))
}

fn serve_options(args: ServeArgs, log_filter: String) -> anyhow::Result<ServeOptions> {
    // The daemon's paths reach device processes, whose working directory is another.
    let run_dir = std::path::absolute(&args.run_dir).context("--run-dir")?;
    let device_dir = std::path::absolute(&args.device_dir).context("--device-dir")?;
    let socket = match args.socket {
        Some(socket) => std::path::absolute(socket).context("--socket")?,
        None => run_dir.join("volclient.sock"),
    };
    Ok(ServeOptions {
        server: args.server,
        tls_files: ClientFiles::named(args.tls_ca, args.tls_cert, args.tls_key).context("--tls-ca")?,
        tls_user_space_only: args.tls_user_space,
        tls_key_bytes_max: args.tls_key_bytes_max,
        run_dir,
        socket,
        node_id: args.node_id,
        device_dir,
        log_filter,
        labels: BTreeMap::new(),
        max_volumes: None,
        outlive_pod: None,
    })
}

fn run_on_tokio<E: Into<anyhow::Error>>(work: impl Future<Output = Result<(), E>>) -> anyhow::Result<()> {
    daemon_log::start_writer().context("cannot start a thread for the log")?;
    daemon_log::try_threads(WORKERS + 1).context("cannot start the daemon's threads")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let outcome = runtime.block_on(work);
    // A call that was cut off may be in the kernel, on a thread that nobody can end: it goes with the process.
    runtime.shutdown_background();
    outcome.map_err(Into::into)
}

/// Reads state files and nothing else: udev may ask while the disk is being made, or hangs.
fn run_device_name(disk: &str, run_dir: &Path) -> anyhow::Result<()> {
    let dev_id: u32 = disk
        .strip_prefix("ublkb")
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("{disk:?} is not the name of a ublk disk, such as ublkb0"))?;
    if let Some(name) = AttachmentRecord::name_of_device(run_dir, dev_id)? {
        print!("{name}");
    }
    Ok(())
}

fn run_stop_disk(dev_id: u32) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(&safe_stop::stop_disk(dev_id))?;
    line.push('\n');
    // Whoever asked may have ended meanwhile.
    Ok(std::io::stdout().write_all(line.as_bytes())?)
}

fn run_device(args: DeviceArgs) -> anyhow::Result<()> {
    let dir = AttachmentDir::from_path(OsString::from(args.dir));
    // Held until the process ends: it tells the daemon that, and which, process works on the folder.
    let claim = device_process::claim(&dir)
        .with_context(|| format!("{}: no such folder, or another process serves it", dir.path().display()))?;
    // By the kernel: what this process still has to say, it says while it is known to live.
    std::mem::forget(claim);
    Ok(client::device::run(&dir)?)
}
