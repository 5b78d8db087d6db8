//! The devices that are measured: how each is made, and that it is gone again before the next.
//!
//! Called by `cost_guest`. Everything has its defaults, one queue and one connection; the peers are those of `peers`. All
//! are as large ([`SIZE_MIB`]). A device lives as long as its value.

use std::any::Any;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::harness::Env;
use testlab::kernel_series::KernelSeries;
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

use super::fio::SIZE_MIB;
use super::peers::{KernelNbd, Nbdkit, NvmeTcp, NvmeTcpTarget};
use super::plan::{Cell, Subject};

const VOLUME: &str = "vol-1";

/// nbdkit's port: nothing else listens in the guest.
const NBDKIT_PORT: u16 = 10999;

/// The subsystem of the NVMe target.
const SUBSYSTEM: &str = "nqn.2026-01.volnode:cost";

/// The null target ends as soon as its standard input does.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// A device, and what keeps it alive.
pub(crate) struct Attached {
    device: PathBuf,
    /// Held for their drop, which takes them down in this order: a client before its server.
    _held: Vec<Box<dyn Any>>,
}

impl Attached {
    /// The block device.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }
}

/// Makes a subject's device. `directory` is empty, and the device's as long as it lives.
///
/// # Errors
/// It cannot be made, or the subject has no device.
pub(crate) fn attach(subject: Subject, programs: &Path, directory: &Path) -> Result<Attached> {
    let env = Env {
        series: KernelSeries::V7,
        directory: directory.to_owned(),
        programs: programs.to_owned(),
        in_vm: true,
    };
    match subject {
        Subject::Ours(data_path) => ours(&env, data_path.as_str()),
        Subject::KernelNbdAndNbdkit => {
            let server = Nbdkit::start(NBDKIT_PORT, SIZE_MIB)?;
            let client = KernelNbd::connect(server.address(), "")?;
            Ok(Attached {
                device: client.device().to_owned(),
                _held: vec![Box::new(client), Box::new(server)],
            })
        }
        Subject::KernelNbdAndOurServer => kernel_nbd_and_our_server(&env),
        Subject::NvmeTcp => {
            let target = NvmeTcpTarget::start(SUBSYSTEM, SIZE_MIB)?;
            let client = NvmeTcp::connect(SUBSYSTEM)?;
            Ok(Attached {
                device: client.device().to_owned(),
                _held: vec![Box::new(client), Box::new(target)],
            })
        }
        Subject::UblkNull => Program::floor(programs).null_target(&[]),
        Subject::UblkNullBatch => Program::floor(programs).null_target(&["--batch"]),
        Subject::NullBlk => {
            run("modprobe", &["null_blk", "nr_devices=1", "gb=1", "bs=4096", "submit_queues=1"])?;
            Ok(Attached { device: PathBuf::from("/dev/nullb0"), _held: Vec::new() })
        }
        Subject::Tcp => anyhow::bail!("TCP alone has no device"),
    }
}

fn create_volume(node: &StorageNode) -> Result<()> {
    let size = format!("{SIZE_MIB}M");
    node.volctl(&["create", VOLUME, "--size", &size, "--backend", "memory"])?.succeeded().map(drop)
}

/// A memory volume of our server through our client.
fn ours(env: &Env, data_path: &str) -> Result<Attached> {
    let node = StorageNode::start(env)?;
    create_volume(&node)?;
    let device = node.attach(&[VOLUME, "--data-path", data_path])?;
    ensure!(node.attachment(VOLUME)?["data_path"] == data_path, "not attached over {data_path}");
    Ok(Attached { device, _held: vec![Box::new(OurAttachment { node })] })
}

/// An attachment of our client, which would outlive its node daemon.
struct OurAttachment {
    node: StorageNode,
}

impl Drop for OurAttachment {
    fn drop(&mut self) {
        if let Err(error) = self.node.detach(VOLUME) {
            eprintln!("{error:#}");
        }
    }
}

/// A memory volume of our server, exported by its name to the kernel's client.
fn kernel_nbd_and_our_server(env: &Env) -> Result<Attached> {
    let node = StorageNode::start_server_only(env, &env.directory.join("data"), &["--export-by-name"])?;
    create_volume(&node)?;
    let address: SocketAddr = node.data_address.parse().context("the server's address")?;
    let client = KernelNbd::connect(address, VOLUME)?;
    Ok(Attached { device: client.device().to_owned(), _held: vec![Box::new(client), Box::new(node)] })
}

/// The program that is the floor (`tests/floor`).
pub(crate) struct Program(PathBuf);

impl Program {
    /// The one of this build.
    pub(crate) fn floor(programs: &Path) -> Self {
        Self(programs.join("floor"))
    }

    /// Exchanges at least `ios` requests and replies of a cell; gives what each took, microseconds of the guest.
    ///
    /// # Errors
    /// The program failed.
    pub(crate) fn exchange(&self, cell: Cell, ios: u64) -> Result<f64> {
        let direction = if cell.reads { "read" } else { "write" };
        let block_bytes = (cell.block_kib << 10).to_string();
        let (depth, batches) = (cell.depth.to_string(), ios.div_ceil(u64::from(cell.depth)).to_string());
        let mut arguments = vec!["tcp", "--direction", direction, "--block-bytes", &block_bytes];
        arguments.extend(["--depth", &depth, "--batches", &batches]);
        let printed = run(&self.0.display().to_string(), &arguments)?;
        let nanoseconds: f64 = printed.trim().parse().with_context(|| printed.clone())?;
        Ok(nanoseconds / 1000.0)
    }

    /// Starts the null target.
    fn null_target(&self, options: &[&str]) -> Result<Attached> {
        run("modprobe", &["ublk_drv"])?;
        let mut command = Command::new(&self.0);
        command.args(["null", "--size-mib", &SIZE_MIB.to_string()]).args(options);
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("floor null")?;
        let stdout = process.stdout.take().context("its output")?;
        let target = NullTarget(process);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("the null target's device")?;
        let device = PathBuf::from(line.trim());
        ensure!(device.exists(), "the null target said {line:?}");
        Ok(Attached { device, _held: vec![Box::new(target)] })
    }
}

/// A running null target; ends when its standard input is closed.
struct NullTarget(Child);

impl Drop for NullTarget {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let ended = wait_for("the null target to end", END_DEADLINE, || Ok(self.0.try_wait()?));
        if let Err(error) = ended {
            eprintln!("{error:#}");
        }
    }
}
