//! What is measured: volnode's devices and those of the kernel's clients, all of them set up side by side.
//!
//! Called by `bench_guest`. Owns the list of subjects and how each becomes a block device; `peers` owns what is not ours.
//! Every device is as its defaults make it but for the number of queues; an idle one costs the others nothing but memory.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testlab::harness::Env;
use testlab::storage_node::StorageNode;

use super::cpu_time::Account;
use crate::peers::{KernelNbd, Nbdkit, NvmeTcp, NvmeTcpTarget};

/// nbdkit's port; the one of NBD is somebody else's on some machines.
const NBDKIT_PORT: u16 = 10999;

/// NVMe subsystems by the I/O queues of their client.
const NVME_SUBSYSTEMS: [&str; 2] = ["volnode-bench-1", "volnode-bench-2"];

/// A volume that is served by its plain name, and never attached.
const VOLUME_BY_NAME: &str = "by-name";

/// What a subject is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Our client and our server, over this data path.
    Volnode(&'static str),
    /// The kernel's NBD client on nbdkit's memory plugin.
    KernelNbdOnNbdkit,
    /// The kernel's NBD client on our server.
    KernelNbdOnVolserver,
    /// The kernel's NVMe/TCP client on its own target.
    NvmeTcp,
}

/// One line of the plots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    kind: Kind,
    /// Hardware queues of the device, each with a TCP connection of its own.
    pub(crate) queues: u32,
}

/// Every subject, in the order of the tables.
pub(crate) const SUBJECTS: [Subject; 8] = [
    Subject { kind: Kind::Volnode("fused"), queues: 1 },
    Subject { kind: Kind::Volnode("mapped"), queues: 1 },
    Subject { kind: Kind::KernelNbdOnNbdkit, queues: 1 },
    Subject { kind: Kind::KernelNbdOnVolserver, queues: 1 },
    Subject { kind: Kind::NvmeTcp, queues: 1 },
    Subject { kind: Kind::Volnode("fused"), queues: 2 },
    Subject { kind: Kind::KernelNbdOnNbdkit, queues: 2 },
    Subject { kind: Kind::NvmeTcp, queues: 2 },
];

/// Where the CPU time of a subject's two ends is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// In two accounts: the client's, the server's.
    Apart(Account, Account),
    /// Both in the kernel's workers; `worker_split` tells them apart.
    SharedWorkers,
}

impl Subject {
    /// What it is, without the number of queues.
    pub(crate) fn family(&self) -> String {
        match self.kind {
            Kind::Volnode(data_path) => format!("volnode, `{data_path}`"),
            Kind::KernelNbdOnNbdkit => "kernel nbd + nbdkit memory".to_owned(),
            Kind::KernelNbdOnVolserver => "kernel nbd + volserver".to_owned(),
            Kind::NvmeTcp => "kernel NVMe/TCP + nvmet on brd".to_owned(),
        }
    }

    /// Its name in tables.
    pub(crate) fn name(&self) -> String {
        format!("{}, {} queue{}", self.family(), self.queues, if self.queues == 1 { "" } else { "s" })
    }

    /// Whether it is the product: the same client and server as are shipped.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self.kind, Kind::Volnode(_))
    }

    /// Whether the others' speed is said beside its own: what the product replaces.
    pub(crate) fn is_baseline(&self) -> bool {
        self.kind == Kind::KernelNbdOnNbdkit
    }

    /// Where its CPU time is found.
    pub(super) fn ends(&self) -> Ends {
        match self.kind {
            Kind::Volnode(_) => Ends::Apart(Account::Program("volclient"), Account::Program("volserver")),
            Kind::KernelNbdOnNbdkit => Ends::Apart(Account::KernelWorkers, Account::Program("nbdkit")),
            Kind::KernelNbdOnVolserver => Ends::Apart(Account::KernelWorkers, Account::Program("volserver")),
            Kind::NvmeTcp => Ends::SharedWorkers,
        }
    }
}

/// Every subject's device. Fields are dropped in this order: clients before the servers they talk to.
pub(super) struct Devices {
    kernel_nbd: Vec<KernelNbd>,
    nvme: Vec<NvmeTcp>,
    _nvme_target: NvmeTcpTarget,
    nbdkit: Nbdkit,
    node: StorageNode,
    size_mib: u64,
    volumes: Vec<String>,
    paths: Vec<PathBuf>,
}

impl Devices {
    /// Sets up every subject, each as large.
    ///
    /// # Errors
    /// One of them cannot be set up, or has not the queues it should have.
    pub(super) fn set_up(env: &Env, size_mib: u64) -> Result<Self> {
        let mut devices = Self {
            kernel_nbd: Vec::new(),
            nvme: Vec::new(),
            _nvme_target: NvmeTcpTarget::start(&NVME_SUBSYSTEMS, size_mib)?,
            nbdkit: Nbdkit::start(NBDKIT_PORT, size_mib)?,
            node: StorageNode::start_with(env, &env.directory.join("data"), &["--export-by-name"])?,
            size_mib,
            volumes: Vec::new(),
            paths: Vec::new(),
        };
        for subject in SUBJECTS {
            let path = devices.attach(subject).with_context(|| subject.name())?;
            without_scheduler(&path)?;
            let queues = std::fs::read_dir(block_directory(&path)?.join("mq"))?.count();
            ensure!(queues == subject.queues as usize, "{} has {queues} queues", subject.name());
            devices.paths.push(path);
        }
        Ok(devices)
    }

    /// Each subject's block device, in the order of [`SUBJECTS`].
    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Detaches ours, which must be detachable; the peers go when this is dropped.
    ///
    /// # Errors
    /// volctl failed.
    pub(super) fn take_down(self) -> Result<()> {
        self.volumes.iter().try_for_each(|volume| self.node.detach(volume))
    }

    fn attach(&mut self, subject: Subject) -> Result<PathBuf> {
        match subject.kind {
            Kind::Volnode(data_path) => self.attach_ours(data_path, subject.queues),
            Kind::KernelNbdOnNbdkit => {
                let server = self.nbdkit.address();
                self.connect_nbd(server, "", subject.queues)
            }
            Kind::KernelNbdOnVolserver => {
                self.create_volume(VOLUME_BY_NAME)?;
                let server: SocketAddr = self.node.data_address.parse().context("the server's address")?;
                self.connect_nbd(server, VOLUME_BY_NAME, subject.queues)
            }
            Kind::NvmeTcp => {
                let name = NVME_SUBSYSTEMS[subject.queues as usize - 1];
                let connected = NvmeTcp::connect(name, subject.queues)?;
                let path = connected.device().to_owned();
                self.nvme.push(connected);
                Ok(path)
            }
        }
    }

    fn attach_ours(&mut self, data_path: &str, queues: u32) -> Result<PathBuf> {
        let volume = format!("{data_path}-{queues}");
        self.create_volume(&volume)?;
        let queues = queues.to_string();
        let path = self.node.attach(&[&volume, "--data-path", data_path, "--queues", &queues])?;
        let used = self.node.attachment(&volume)?["data_path"].clone();
        ensure!(used == data_path, "attached over {used}");
        self.volumes.push(volume);
        Ok(path)
    }

    fn create_volume(&self, name: &str) -> Result<()> {
        let size = format!("{}M", self.size_mib);
        self.node.volctl(&["create", name, "--size", &size, "--backend", "memory"])?.succeeded().map(drop)
    }

    fn connect_nbd(&mut self, server: SocketAddr, export: &str, connections: u32) -> Result<PathBuf> {
        let index = u32::try_from(self.kernel_nbd.len())?;
        let connected = KernelNbd::connect(index, server, export, connections)?;
        let path = connected.device().to_owned();
        self.kernel_nbd.push(connected);
        Ok(path)
    }
}

/// The same for all devices, whatever scheduler each driver asks for.
fn without_scheduler(device: &Path) -> Result<()> {
    let file = block_directory(device)?.join("queue/scheduler");
    std::fs::write(&file, "none").with_context(|| file.display().to_string())
}

fn block_directory(device: &Path) -> Result<PathBuf> {
    Ok(Path::new("/sys/block").join(device.file_name().context("a device's name")?))
}
